"""What a training leaves in its folder, whatever stops it."""
import os
import random
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import SMALL_RUN, load_saved, read_summary, run_cli, run_training, same, start_cli, wait_for_checkpoints

from timm_densese.errors import TrainingError

ARGS = ('--model-kwargs', 'growth_rate=4', 'block_config=(2,3,2)', '--img-size', '32', '--patience', '0')


def assert_same_training(whole, resumed):
    expected, found = load_saved(whole), load_saved(resumed)
    for key in ('state_dict', 'state_dict_ema', 'optimizer', 'metric', 'epoch'):
        assert same(expected[key], found[key]), key
    assert (resumed / 'summary.csv').read_bytes() == (whole / 'summary.csv').read_bytes()
    best = 'model_best.pth.tar'
    assert same(load_saved(whole, best)['state_dict'], load_saved(resumed, best)['state_dict'])


@pytest.mark.slow
def test_ten_kills_change_nothing(small_split, tmp_path):
    """At random moments of an epoch, of its checkpoints and of the start."""
    args = ('train', small_split, *ARGS, '--epochs', 48, '--drop', .2)
    whole = start_cli(*args, '--workers', 1, '--output', tmp_path / 'whole')
    output = tmp_path / 'killed'
    args = (*args, '--workers', 0, '--output', output)
    rng = random.Random(0)
    for _ in range(10):
        process = start_cli(*args, *(('--resume', last) if (last := output / 'last.pth.tar').exists() else ()))
        wait_for_checkpoints(process, output, rng.randint(0, 2))
        time.sleep(rng.uniform(0, .2))
        assert process.exitcode is None, 'it was done before it could be killed'
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    process = start_cli(*args, '--resume', output / 'last.pth.tar')
    process.join()
    whole.join()
    assert (process.exitcode, whole.exitcode) == (0, 0)
    assert_same_training(tmp_path / 'whole', output)


@pytest.mark.slow
def test_resumed_with_another_number_of_workers(small_split, tmp_path):
    options = dict(drop=.3, model_kwargs=SMALL_RUN['model_kwargs'])
    run_training(small_split, tmp_path / 'whole', epochs=3, workers=1, **options)
    # A run that is to end after the first epoch has another schedule, so this one is cut off there.
    started = start_cli('train', small_split, *ARGS, '--epochs', 3, '--drop', .3, '--workers', 0, '--output',
                        tmp_path / 'cut')
    wait_for_checkpoints(started, tmp_path / 'cut')
    started.kill()
    started.join()
    run_training(small_split, tmp_path / 'cut', epochs=3, resume=str(tmp_path / 'cut' / 'last.pth.tar'), **options)
    assert_same_training(tmp_path / 'whole', tmp_path / 'cut')


def test_killed_between_its_two_checkpoints(small_split, tmp_path):
    options = dict(lr=0., warmup_lr=0., warmup_epochs=0, eval_metric='top1', model_ema=False)
    run_training(small_split, tmp_path, **options)
    (tmp_path / 'checkpoint-0.pth.tar').unlink()
    (tmp_path / 'model_best.pth.tar').unlink()
    result = run_training(small_split, tmp_path, epochs=2, resume=str(tmp_path / 'last.pth.tar'), **options)
    assert result['best_epoch'] == 0  # the second epoch is no better
    assert load_saved(tmp_path, 'model_best.pth.tar')['epoch'] == 0
    assert load_saved(tmp_path)['epoch'] == 1


@pytest.mark.slow
def test_disk_full(small_split, small_disk, tmp_path):
    output = small_disk / 'run'
    run_training(small_split, output)
    before = load_saved(output)
    filler = small_disk / 'filler'
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free))
    with pytest.raises(TrainingError, match=r'(?s)could not be written.*MB are free.*Make room and go on'):
        run_training(small_split, output, epochs=3, resume=str(output / 'last.pth.tar'))
    assert same(load_saved(output), before)
    assert not (output / 'tmp.pth.tar').exists()
    filler.unlink()
    moved = tmp_path / 'moved'  # to where there is room for all of it
    shutil.copytree(output, moved)
    assert run_training(small_split, moved, epochs=3, resume=str(moved / 'last.pth.tar'))['best']
    assert [row['epoch'] for row in read_summary(moved)] == [0, 1, 2]


@pytest.mark.slow
def test_two_trainings_into_one_folder(small_split, tmp_path):
    first = start_cli('train', small_split, *ARGS, '--workers', 0, '--epochs', 200, '--output', tmp_path)
    try:
        wait_for_checkpoints(first, tmp_path)
        with pytest.raises(TrainingError, match='Another training is writing to'):
            run_training(small_split, tmp_path, epochs=300, resume=str(tmp_path / 'last.pth.tar'))
        with pytest.raises(TrainingError, match='holds a training already'):
            run_training(small_split, tmp_path)
        assert first.is_alive()
    finally:
        first.kill()
        first.join()
    shutil.rmtree(tmp_path)
    run_training(small_split, tmp_path)  # a killed training holds nothing


def test_a_loss_that_is_no_number(small_split, tmp_path):
    run_training(small_split, tmp_path / 'run')
    before = (tmp_path / 'run' / 'last.pth.tar').read_bytes()
    with pytest.raises(TrainingError, match=r'The loss is nan in batch \d+ of epoch [12]\. Lower --lr'):
        run_training(small_split, tmp_path / 'run', epochs=3, resume=str(tmp_path / 'run' / 'last.pth.tar'), lr=1e30,
                     warmup_epochs=0, batch_size=4)
    # Epoch 1 may have ended: it is not saved where its numbers are none.
    assert (tmp_path / 'run' / 'last.pth.tar').read_bytes() == before
    assert all(torch.isfinite(t).all() for t in load_saved(tmp_path / 'run')['state_dict'].values())
    with pytest.raises(TrainingError, match='validation loss is nan after epoch 0'):
        run_training(small_split, tmp_path / 'jump', lr=1e30, warmup_epochs=0, batch_size=36, model_ema=False)
    assert not (tmp_path / 'jump' / 'last.pth.tar').exists()


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(small_split, tmp_path):
    args = ('train', small_split, *ARGS, '--epochs', 400, '--workers', 0, '--output', tmp_path / 'run')
    process = start_cli(*args, stderr=tmp_path / 'stderr')
    wait_for_checkpoints(process, tmp_path / 'run')
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    said = (tmp_path / 'stderr').read_text()
    assert said.splitlines()[-1] == f'timm-densese: stopped. Go on with --resume {tmp_path / "run" / "last.pth.tar"}'
    assert 'Traceback' not in said


def test_ctrl_c_waits_for_an_epoch_that_is_being_written(small_split, tmp_path, monkeypatch):
    """With TensorBoard, whose queue an interrupt can break: closing it then hangs."""
    board = pytest.importorskip('torch.utils.tensorboard', reason='tensorboard is missing: pip install .[test]')
    written, write = [], board.SummaryWriter.add_scalar

    def add_scalar(self, name, *args):
        signal.raise_signal(signal.SIGINT)
        write(self, name, *args)
        written.append(name)

    monkeypatch.setattr(board.SummaryWriter, 'add_scalar', add_scalar)
    with pytest.raises(KeyboardInterrupt, match='Go on with --resume'):
        run_training(small_split, tmp_path, epochs=2)
    assert written == ['train/loss', 'lr', 'val/loss', 'val/top1', 'val/balanced_top1']
    assert load_saved(tmp_path)['epoch'] == 0
    monkeypatch.undo()
    with ThreadPoolExecutor(1) as pool:  # which Ctrl-C does not reach
        assert pool.submit(run_training, small_split, tmp_path / 'thread').result()['best_epoch'] == 0


def test_the_start_and_the_end_are_said(small_split, tmp_path, capsys):
    """Images by class and split, weights, device; the best epoch, its checkpoint, the next command, which runs."""
    run_training(small_split, tmp_path / 'run')
    start, _, end = capsys.readouterr().out.partition('epoch 0:')
    for split in ('train', 'val'):
        for label in ('spots', 'stripes'):
            count = len(list((small_split / split / label).iterdir()))
            assert any(line.split()[0] == label and str(count) in line.split() for line in start.splitlines()
                       if line), (split, label)
    for said in ('RANDOM weights', 'on cpu', '32x32 pixels', 'M parameters are trained'):
        assert said in start
    assert f'Checkpoint: {tmp_path / "run" / "model_best.pth.tar"}' in end
    command = end.split('Next: timm-densese ')[1].split()
    assert run_cli(*command, '--workers', 0).returncode == 0
    run_training(small_split, tmp_path / 'run', epochs=2, resume=str(tmp_path / 'run' / 'last.pth.tar'))
    assert 'from epoch 1 on' in capsys.readouterr().out
    run_training(small_split, tmp_path / 'next', initial_checkpoint=str(tmp_path / 'run' / 'last.pth.tar'))
    assert 'RANDOM' not in capsys.readouterr().out


@pytest.mark.parametrize('name', ['args.yaml', 'summary.csv', 'curves.png', 'model_best.pth.tar'])
def test_files_of_something_else_are_not_written_over(small_split, tmp_path, name):
    (tmp_path / name).write_text('of another')
    with pytest.raises(TrainingError, match=f'holds {name}, which would be written over'):
        run_training(small_split, tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ['of another']


def test_a_training_that_was_stopped_before_its_first_checkpoint_starts_again(small_split, tmp_path):
    with pytest.raises(TrainingError, match='loss is nan'):
        run_training(small_split, tmp_path, lr=1e30, warmup_epochs=0, batch_size=4)
    assert (tmp_path / 'args.yaml').exists()
    assert run_training(small_split, tmp_path)['best_epoch'] == 0


def test_a_dry_run_writes_nothing(small_split, tmp_path, capsys):
    assert run_training(small_split, tmp_path / 'run', dry_run=True, batch_size=4, epochs=50) == {
        'classes': ['spots', 'stripes']}
    assert not (tmp_path / 'run').exists()
    out, err = capsys.readouterr()
    assert 'one batch was trained on' in out
    assert '1/1' in err
