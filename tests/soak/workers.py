"""Cases in a process of their own: one that crashes or hangs is named by its seed, and the next process goes on after it.

`python -m soak.workers MODULE ARGUMENTS` is such a process. MODULE is a module of this package whose `prepare(*ARGUMENTS)` returns the
function that runs a case and returns what it counts as. The process says that it is ready, then reads a seed from each line of its input
and answers with a line of JSON, {"counted": what} or {"failed": why}.
"""

import faulthandler
import importlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from soak import findings

TESTS = Path(__file__).parents[1]

Check = Callable[[int], str]


class Worker:
    """A process that runs cases in an empty folder, which it leaves as it was at the last case.

    Args:
        module, arguments: see the module's docstring.
        seconds: a case that takes longer counts as a hang.
        environment: more variables.
    """

    def __init__(self, module: str, *arguments: object, seconds: float, environment: dict[str, str]) -> None:
        self.seconds = seconds
        self.folder = Path(tempfile.mkdtemp(prefix="soak-"))
        paths = [str(TESTS), str(TESTS / "support"), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
        self.log = (self.folder.parent / f"{self.folder.name}.log").open("w+b")
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "soak.workers", module, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            cwd=self.folder,
            # threads that wait in a loop would take the cores from the others
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_WAIT_POLICY": "passive"} | environment,
        )
        assert self.process.stdout is not None
        if not self.process.stdout.readline():
            self.log.seek(0)
            raise RuntimeError(f"the process of the cases does not start: {self.log.read().decode(errors='replace')}")

    def run(self, seed: int) -> dict[str, str]:
        """Run a case: {"counted": what} or {"failed": why}; after a crash or a hang the process has ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.log.truncate(0)
        self.log.seek(0)
        try:
            self.process.stdin.write(f"{seed}\n".encode())
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        answered, _, _ = select.select([self.process.stdout], [], [], self.seconds)
        if not answered:
            # Python prints the stack of every thread
            self.process.send_signal(signal.SIGABRT)
        line = self.process.stdout.readline()
        if line and answered:
            return json.loads(line)
        status = self.process.wait()
        self.log.seek(0)
        reason = f"ended by signal {-status}" if status < 0 else f"ended with status {status}"
        reason = reason if answered else f"no answer after {self.seconds} seconds"
        return {"failed": f"{reason}\n{self.log.read().decode(errors='replace')[-8000:]}"}

    def close(self) -> None:
        """End the process and delete its folder."""
        self.process.kill()
        self.process.wait()
        self.log.close()
        Path(self.log.name).unlink()
        shutil.rmtree(self.folder, ignore_errors=True)


def run_cases(
    part: str,
    module: str,
    *arguments: object,
    minutes: float,
    seed: int,
    seconds: float = 300,
    environment: dict[str, str] | None = None,
) -> Counter[str]:
    """Run the cases with the seeds `seed`, `seed` + 1, ... of a part of the soak, and count them; see `Worker` for the arguments."""
    counts: Counter[str] = Counter(failed=0)
    # the time begins when the first process is ready
    worker = Worker(module, *arguments, seconds=seconds, environment=environment or {})
    try:
        for case in findings.run_cases(part, minutes, seed):
            worker = worker or Worker(module, *arguments, seconds=seconds, environment=environment or {})
            answer = worker.run(case)
            counts[answer.get("counted", "failed")] += 1
            if "failed" in answer:
                (worker.folder / "why.txt").write_text(f"{answer['failed']}\n")
                what = f"{' '.join(map(str, arguments))} {answer.get('summary') or answer['failed'].partition(chr(10))[0]}"
                findings.keep_failure(part, case, what[:500].strip(), worker.folder)
            if worker.process.poll() is not None:
                worker.close()
                worker = None
    finally:
        if worker:
            worker.close()
    return counts


def summarize(error: Exception) -> str:
    """Return the type, the message and the notes of an error on one line."""
    notes = getattr(error, "__notes__", [])
    return f"{' '.join(notes)}: {type(error).__name__}: {' '.join(str(error)[:300].split())}".removeprefix(": ")


def _serve(module: str, arguments: list[str]) -> None:
    """Answer the lines of the input."""
    # what a library prints goes to the log
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    faulthandler.enable()
    check: Check = importlib.import_module(f"soak.{module}").prepare(*arguments)
    print(json.dumps({"counted": "ready"}), file=answers)
    for line in sys.stdin:
        try:
            answer = {"counted": check(int(line))}
        except Exception as error:
            answer = {"failed": traceback.format_exc(), "summary": summarize(error)}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2:])
