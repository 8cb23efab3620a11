"""Models that are built, and timed, in processes of their own: compiled ones take minutes, and are built side by side.

As a program, it is such a process: it reads what to build, answers with the memory that it took, and then times a run
for each line that it reads.
"""
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import build_measured, first_line, time_run


class Worker:
    """A process that builds a model.

    Args:
        args: As to `common.build`, without the folder.
        threads: That compile.
        nice: How far its priority is below this process's.
    """

    def __init__(self, *args: Any, threads: int, nice: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(args), str(nice)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, env={**os.environ, 'TORCHINDUCTOR_COMPILE_THREADS': str(threads)})
        self.memory: float | None = None
        self.error: str | None = 'not built in time'

    def wait(self, end: float) -> None:
        """Wait until it has built its model; at a time on the monotonic clock, end it.

        Afterwards, `error` says what failed, or is None.
        """
        if select.select([self.process.stdout], [], [], max(0, end - time.monotonic()))[0]:
            answer = self._read()
            self.memory, self.error = answer.get('memory'), answer.get('error')
        if self.error:
            self.process.kill()

    def time(self) -> float:
        """Run once, then once more for the seconds that it takes; the first, as another process used the device."""
        assert self.process.stdin
        self.process.stdin.write('\n')
        self.process.stdin.flush()
        answer = self._read()
        if 'error' in answer:
            raise RuntimeError(answer['error'])
        return answer['seconds']

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        return json.loads(line) if line else {'error': f'its process ended with status {self.process.wait()}'}


def main() -> None:
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # what libraries print is no answer
    os.nice(int(sys.argv[2]))

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    try:
        run, memory = build_measured(*json.loads(sys.argv[1]), Path())
        answer(memory=memory)
        for _ in sys.stdin:
            run()
            answer(seconds=time_run(run))
    except Exception as error:
        answer(error=first_line(error))


if __name__ == '__main__':
    main()
