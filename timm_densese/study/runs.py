"""The runs of a study: dealt out, trained or gone on with, and their predictions written down."""
import csv
import gc
import io
import json
import os
import time
import traceback
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence, Tuple

import numpy as np
import torch
from filelock import FileLock, Timeout  # comes with huggingface_hub
from torch.distributed.rendezvous import rendezvous

from ..checkpoints import load_model
from ..data.splits import read_split
from ..errors import TrainingFinishedError, UserError
from ..evaluate import run_split
from ..files import replace_file
from ..metrics import score, softmax
from ..training import train
from .plan import Run
from .pooled import PRIMARY, PROBABILITY

__all__ = ['do_runs', 'in_first_process']

_OF_TORCHRUN = ('RANK', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE')


def in_first_process(prepare: Callable[[], None]) -> int:
    """Prepare in the first of torchrun's processes while the others wait; where it fails, all stop.

    After it, torch and timm see one process: each run is a training of its own.

    Returns:
        This process's rank.
    """
    if int(os.environ.get('WORLD_SIZE', 1)) == 1:
        prepare()
        return 0
    store, rank, _ = next(rendezvous('env://'))
    for name in _OF_TORCHRUN:
        os.environ.pop(name, None)
    os.environ['WORLD_SIZE'] = '1'  # without it timm would look for SLURM's
    key = f'study-{os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)}'
    if rank:
        store.wait([key], timedelta(days=1))
        if problem := store.get(key).decode():
            raise UserError(f'process {rank} stops, for the first one did: {problem}')
        return rank
    problem = 'it was stopped'
    try:
        prepare()
        problem = ''
    except UserError as e:
        problem = str(e)
        raise
    finally:
        store.set(key, problem)
    return 0


def do_runs(plan: Sequence[Run], wait: bool) -> None:
    """Do every run that no other process does; where one of those dies, its run is taken over."""
    durations: List[float] = []
    while left := [run for run in plan if not run.is_done and not run.error]:
        did = False
        for run in left:
            run.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(run.folder / '.study.lock', timeout=0)  # the system frees it when the process dies
            try:
                held = lock.acquire()
            except Timeout:
                continue
            with held:
                if not run.is_done and not run.error:
                    did = True
                    started = time.monotonic()
                    _do(run)
                    durations.append(time.monotonic() - started)
                    _tell(run, plan, durations)
        if not did:
            if not wait:
                return
            time.sleep(.2)


def _tell(run: Run, plan: Sequence[Run], durations: Sequence[float]) -> None:
    done = sum(other.is_done for other in plan)
    left = len(plan) - done - sum(bool(other.error) for other in plan)
    what = f'FAILED ({run.error})' if run.error else (
        f'{PRIMARY.replace("_", " ")} {json.loads((run.folder / "run.json").read_text())[PRIMARY]:.3f}')
    remaining = f'; {left} left, about {_minutes(left * float(np.mean(durations)))} in one process' if left else ''
    print(f'[{done}/{len(plan)}] {run.title}: {what}, in {_minutes(durations[-1])}{remaining}', flush=True)


def _minutes(seconds: float) -> str:
    if seconds < 90:
        return f'{seconds:.0f} s'
    return f'{seconds / 60:.0f} min' if seconds < 5400 else f'{seconds / 3600:.1f} h'


def _do(run: Run) -> None:
    """Train a model, or go on with it, and write what it says of its validation and test images."""
    try:
        with open(run.folder / 'log.txt', 'a', encoding='utf-8') as log, redirect_stdout(log):
            last = run.folder / 'last.pth.tar'
            with suppress(TrainingFinishedError):  # it was stopped between its last epoch and its predictions
                train(replace(run.config, resume=str(last) if last.exists() else ''))
            _write_predictions(run)
    except Exception as e:  # whatever a training meets: the other runs stand
        replace_file(run.folder / 'error.txt',
                     f'{traceback.format_exc()}\n{type(e).__name__}: {" ".join(str(e).split())}\n')
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _write_predictions(run: Run) -> None:
    best = run.folder / 'model_best.pth.tar'
    loaded = load_model(str(best), run.config.device)
    classes, data = loaded.class_names, Path(run.config.data_dir)
    table = read_split(data)
    # By bytes and class: files of the same bytes have a row each.
    known: Dict[Tuple[str, str], List[Dict[str, str]]] = {}
    for row in reversed(table.rows):
        known.setdefault((row['stored_sha256'], row['label']), []).append(row)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(['image', 'label', 'group', 'fold', 'seed', 'model', 'split',
                     *(PROBABILITY + name for name in classes)])
    result: Dict[str, Any] = {'weights': loaded.hash_weights()}
    for split in ('val', 'test'):
        scored = run_split(loaded, data, split, classes, run.config.validation_batch_size or 32, run.config.workers)
        probabilities = softmax(scored.logits)
        result[split] = len(scored.labels)
        if split == 'test':
            result[PRIMARY] = float(score(scored.labels, probabilities, classes)[PRIMARY][0])
        for digest, label, p in zip(scored.hashes, scored.labels, probabilities, strict=True):
            row = known[digest, classes[label]].pop()
            writer.writerow([row['file'], classes[label], row['group'], run.fold, run.seed, run.name, split,
                             *map(repr, map(float, p))])
    result['train'] = len([row for row in table.rows if row[table.column] == 'train'])
    replace_file(run.folder / 'predictions.csv', text.getvalue())
    # The optimizer's state, which only resuming needs, is most of what a run leaves.
    saved = torch.load(best, map_location='cpu', weights_only=False)  # this run wrote it
    saved.pop('optimizer', None)
    torch.save(saved, best.with_name('tmp.pth.tar'))
    os.replace(best.with_name('tmp.pth.tar'), best)
    replace_file(run.folder / 'run.json', json.dumps(result, indent=1) + '\n')
    for file in (run.folder / 'last.pth.tar', *run.folder.glob('checkpoint-*.pth.tar')):
        file.unlink(missing_ok=True)
