"""The benchmarks run here; their numbers are in benchmarks/results/."""
import csv
import json
import os
import signal
import sys
import time
from pathlib import Path

import forked
import gpu  # benchmarks/gpu.py
import pytest
import tables  # benchmarks/tables.py
import throughput  # benchmarks/throughput.py
import timm
import torch
import transfer
from conftest import finish, start_alone
from PIL import Image
from worker import Worker  # benchmarks/worker.py

from timm_densese.demo import generate_images

BENCHMARKS = Path(__file__).parent.parent / 'benchmarks'
TINY = {'DEVICE': 'cpu', 'TINY_NETS': '1'}


def test_the_readme_quotes_transfer():
    record = json.loads((BENCHMARKS / 'results' / 'transfer.json').read_text())
    page = (BENCHMARKS.parent / 'docs' / 'study.md').read_text()
    quoted = page.split('<!-- transfer -->\n')[1].split('\n<!-- /transfer -->')[0]
    assert quoted == transfer.summarise(record['runs'])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_transfer_runs_and_goes_on(tmp_path, monkeypatch):
    generate_images(tmp_path / 'msld', per_class=12, size=32)
    for part in ('train', 'test'):
        generate_images(tmp_path / 'cifar' / part, per_class=12, size=32, seed=len(part))
    torch.save(timm.create_model('densenet121', num_classes=2).state_dict(), tmp_path / 'net.pth')
    monkeypatch.setattr(transfer, 'RESULTS', tmp_path)
    monkeypatch.setattr('common.RESULTS', tmp_path)
    monkeypatch.setattr(transfer, 'SIZE', {'cifar10': 32, 'msld': 32})
    monkeypatch.setattr(transfer, 'SE_PLACEMENTS', ('stage',))
    monkeypatch.setattr(sys, 'argv', [
        'transfer.py', '--weights', str(tmp_path / 'net.pth'), '--cifar10', str(tmp_path / 'cifar'), '--msld',
        str(tmp_path / 'msld'), '--work', str(tmp_path / 'work'), '--epochs', '1', '1', '--seeds', '1', '--every', '1'])
    real, stops = transfer.train, [2, 3]  # interrupted before the third run, and again before the sixth

    def train(*args):
        if not stops[0]:
            stops.pop(0)
            raise KeyboardInterrupt
        stops[0] -= 1
        return real(*args)

    monkeypatch.setattr(transfer, 'train', train)
    found = []
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            transfer.main()
        found.append(json.loads((tmp_path / 'transfer.json').read_text())['runs'])
    first, runs = found
    assert (first, len(runs)) == (runs[:2], 5)
    assert [(r['data'], r['way']) for r in runs] == [
        *(('cifar10', way) for way in ('plain', *transfer.WAYS)), ('msld', 'plain')]
    assert runs[3]['scores'][0] == runs[0]['scores'][0]  # as the identity, SE leaves the scores as they are
    assert "| `'stage'` |" in transfer.summarise(runs)
    assert len(transfer.draw(runs).axes) == 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_quick_throughput(tmp_path, run_alone):
    result = run_alone('throughput', '--quick', '--memory-limit', .03, '--out', tmp_path, function=forked.benchmark,
                       **TINY)
    assert result.returncode == 0, result.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / 'rows.jsonl').read_text().splitlines()]
    assert {row['execution'] for row in rows} >= {'eager'}
    assert {row['kind'] for row in rows} == {'infer', 'train'}
    for row in rows:
        assert {'device', 'driver', 'torch', 'timm', 'commit', 'command', 'threads'} <= set(row)
        assert 'error' in row or row['step_time_ms_p25'] <= row['step_time_ms'] <= row['step_time_ms_p75']
    largest = {row['model']: row for row in rows if row['batch'] == 'largest' and row['kind'] == 'infer'}
    assert largest['densenet121']['batch_size'] > 4
    assert not [row for row in rows if 'error' in row and row['batch'] != 'largest']

    # The columns of timm's results/benchmark-infer-*.csv and benchmark-train-*.csv.
    columns = {'infer': ['model', 'infer_img_size', 'infer_samples_per_sec', 'infer_step_time', 'infer_batch_size',
                         'param_count', 'infer_gmacs', 'infer_macts'],
               'train': ['model', 'train_img_size', 'train_samples_per_sec', 'train_step_time', 'train_batch_size',
                         'param_count']}
    for kind, names in columns.items():
        tables = list(tmp_path.glob(f'benchmark-{kind}-*-eager.csv'))
        assert len(tables) == 1
        with open(tables[0], newline='') as file:
            table = list(csv.DictReader(file))
        assert list(table[0]) == names
        ours = f'se_densenet121 {"fused" if kind == "infer" else "linear memory"}'
        assert ours in [row['model'] for row in table]
        for row in table:
            speed, step = (float(row[f'{kind}_{name}']) for name in ('samples_per_sec', 'step_time'))
            assert abs(speed * step / 1e3 / int(row[f'{kind}_batch_size']) - 1) < .01
    summary = (tmp_path / 'README.md').read_text()
    assert '## Training step, eager, float32, 64x64' in summary
    inferred = {row['execution'] for row in rows if row['kind'] == 'infer'}
    assert summary.count('| se_densenet121 fused |') == len(inferred)
    for name in ('infer-batch', 'infer-memory', 'train-batch', 'train-memory', 'se-cost'):
        assert Image.open(tmp_path / f'{name}.png').size[0] > 300


@pytest.mark.slow
def test_a_peer_that_fails_is_a_row(tmp_path):
    bench = throughput.Bench(tmp_path, 32, .01, 3)
    sizes = {'densenet121': 1, 'no_such_net': 1, 'se_densenet121': 1}
    assert bench.group('infer', 'eager', 'float32', sizes, tmp_path) == ['densenet121', 'se_densenet121']
    rows = {row['model']: row for row in tables.read(tmp_path)}
    assert 'Unknown model' in rows['no_such_net']['error']
    faster = rows['se_densenet121']['faster_than_densenet']
    assert 0 < faster['p25'] <= faster['p50'] <= faster['p75']
    tables.write_tables(list(rows.values()), tmp_path)
    tables.write_summary(list(rows.values()), tmp_path)
    assert '| no_such_net | RuntimeError: Unknown model' in (tmp_path / 'README.md').read_text()


def test_a_worker_says_what_failed():
    fails, ends, late = (Worker(
        'infer', name, 'eager', 'float32', 1, 32, threads=1, nice=0) for name in ('no_such_net', 'densenet121', ''))
    ends.process.kill()  # before it can have built anything
    late.wait(time.monotonic())
    assert late.error == 'not built in time'
    assert late.process.wait() == -signal.SIGKILL
    fails.wait(time.monotonic() + 120)
    assert 'Unknown model (no_such_net)' in fails.error
    ends.wait(time.monotonic() + 120)
    assert ends.error == 'its process ended with status -9'


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ctrl_c_leaves_what_was_measured(tmp_path):
    process = start_alone(
        forked.benchmark, 'throughput', '--executions', 'eager', '--dtypes', 'float32', '--kinds', 'infer',
        '--img-size', 64, '--seconds', .1, '--batch-sizes', 2, 3, 4, 8, 16, 32, '--no-largest', '--out', tmp_path,
        stdout=tmp_path / 'stdout', stderr=tmp_path / 'stderr', **TINY)
    while not tables.read(tmp_path):
        assert process.exitcode is None, (tmp_path / 'stderr').read_text()
        time.sleep(.1)
    os.kill(process.pid, signal.SIGINT)
    result = finish(process, tmp_path / 'stdout', tmp_path / 'stderr')
    assert result.returncode == 1
    assert 'What was measured is in' in result.stderr
    assert 'Traceback' not in result.stderr
    rows = [json.loads(line) for line in (tmp_path / 'rows.jsonl').read_text().splitlines()]
    assert f'{len(rows)} rows' in result.stdout
    assert list(tmp_path.glob('benchmark-infer-*.csv'))
    assert (tmp_path / 'infer-batch.png').exists()


@pytest.mark.parametrize('file', tables.DOCS, ids=lambda file: file.name)
def test_docs_quote_what_was_measured(file):
    quoted = tables.MARKS.search(file.read_text())
    folders = sorted((BENCHMARKS / 'results').glob('throughput-*')) or [BENCHMARKS / 'results' / 'none']
    assert quoted[2] in [tables.quoted_table(tables.read(folder), file) for folder in folders]


def test_the_quoted_table(tmp_path):
    bench = throughput.Bench(tmp_path, 224, .01, 3)
    for kind, model, batch_size in (('infer', 'se_densenet161 fused', 1), ('train', 'se_densenet121 linear memory', 8)):
        bench.write(kind, 'eager', 'float32', model, batch_size, None, [.1, .2, .3], 5., (1.1, 1.23, 1.4))
    file = tmp_path / 'doc.md'
    file.write_text('before\n<!-- throughput -->\nold\n<!-- /throughput -->\nafter\n')
    tables.quote(tables.read(tmp_path), file)
    text = file.read_text()
    assert '| se_densenet161 fused, float32 | 1.23x (1.10 to 1.40) |  |  |  |' in text
    assert '| se_densenet121 linear memory, float32 |  |  | 1.23x (1.10 to 1.40) |  |' in text
    assert text.startswith('before\n')
    assert text.endswith('\nafter\n')
    assert 'old' not in text
    tables.quote(tables.read(tmp_path), file)
    assert file.read_text() == text


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_gpu_dry_run(tmp_path, run_alone):
    result = run_alone('gpu', '--dry-run', '--out', tmp_path, function=forked.benchmark, **TINY)
    record = json.loads((tmp_path / 'gpu.json').read_text())
    assert result.returncode == 0, record['steps']
    assert all('error' not in step and 'left_out' not in step for step in record['steps'].values())
    assert list(tmp_path.glob('benchmark-train-amp_bfloat16-*-eager.csv'))
    assert (tmp_path / 'roofline.png').exists()


def test_gpu_steps_keep_what_was_measured(tmp_path):
    steps = gpu.Steps(tmp_path, 1)
    steps.run('good', lambda: 3)
    steps.run('bad', lambda: 1 / 0)
    steps.end = 0
    steps.run('late', lambda: 4)
    record = json.loads((tmp_path / 'gpu.json').read_text())['steps']
    assert record['good']['result'] == 3
    assert record['bad']['error'] == 'ZeroDivisionError: division by zero'
    assert record['late']['left_out'] == 'no time was left'
