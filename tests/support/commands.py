"""Commands of the package and pieces of Python, in this process or in one of their own."""

import functools
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest


def call(name: str, *arguments: object, raises: bool = True) -> None:
    """Run `carafepp-NAME` with these arguments in this process.

    Args:
        name: module of the command in carafepp.scripts.
        arguments: its command line.
        raises: raise the error of the command itself. False prints it and raises SystemExit, as in a shell.
    """
    with pytest.MonkeyPatch.context() as patch:
        if raises:
            patch.setenv("HYDRA_FULL_ERROR", "1")
        importlib.import_module(f"carafepp.scripts.{name}").main([str(argument) for argument in arguments])


def command_line(name: str, *arguments: object) -> list[str]:
    """Command line that runs `carafepp-NAME` with this interpreter, which imports nothing from the working directory."""
    return [sys.executable, "-P", "-m", f"carafepp.scripts.{name}", *map(str, arguments)]


def torchrun_line(processes: int, job: str, name: str, *arguments: object) -> list[str]:
    """Command line that runs `carafepp-NAME` in several processes of torchrun."""
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    return [sys.executable, "-P", *launcher, f"--rdzv-id={job}", "-m", f"carafepp.scripts.{name}", *map(str, arguments)]


def run_line(line: list[str], cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command line to its end, with more variables in its environment, and keep what it prints."""
    return subprocess.run(line, capture_output=True, text=True, cwd=cwd, timeout=600, env=os.environ | environment)


def run_in_interpreter(path: str, chosen: str) -> str:
    """Run the tests of a file whose names `chosen` selects in Triton's interpreter, which is chosen when Triton is imported.

    Returns:
        What pytest printed; a failure is an AssertionError.
    """
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen, path]
    run = run_line(command, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def run_command(name: str, *arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `carafepp-NAME` in a process of its own to its end, and keep what it prints."""
    return run_line(command_line(name, *arguments), cwd)


def run_code(
    code: str, *options: str, isolated: bool = True, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run Python code in an interpreter of its own, which must succeed. An `isolated` one imports nothing from the working directory."""
    done = run_line([sys.executable, *(["-P"] if isolated else []), *options, "-c", code], cwd, **environment)
    assert done.returncode == 0, done.stderr
    return done


# imports torch once, which takes seconds, and forks for the code of every line; the last words of an interpreter are its exit status
FORKS = """
import json, os, sys, traceback
import torch
for line in sys.stdin:
    code, folder, environment, output = json.loads(line)
    child = os.fork()
    if not child:
        status = 1
        for descriptor, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(os.path.join(output, name), os.O_WRONLY | os.O_CREAT, 0o600), descriptor)
        try:
            os.chdir(folder)
            os.environ.clear()
            os.environ.update(environment)
            sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def start_forks() -> subprocess.Popen[str]:
    """Start an interpreter with torch, and nothing of this package, which runs code in forks."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    line = [sys.executable, "-P", "-c", FORKS]
    return subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def run_after_torch(code: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python code, as `run_code` does, in an interpreter that has imported torch: in a tenth of the time."""
    forks = start_forks()
    with tempfile.TemporaryDirectory() as output:
        request = [code, str(cwd or Path.cwd()), os.environ | environment, output]
        print(json.dumps(request), file=forks.stdin, flush=True)
        status = int(forks.stdout.readline())
        said = [(Path(output) / name).read_text() for name in ("out", "err")]
    assert status == 0, said[1]
    return subprocess.CompletedProcess([], status, *said)


def count_rows(folder: Path) -> int:
    """Lines of the metrics.csv of a run folder, header included."""
    path = folder / "metrics.csv"
    return len(path.read_text().splitlines()) if path.exists() else 0


def wait_for_rows(folder: Path, rows: int, process: subprocess.Popen, seconds: float = 240) -> None:
    """Wait until a run has written `rows` lines of metrics.csv, until its process ends, or for `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None and count_rows(folder) < rows:
        time.sleep(0.01)


def find_processes(*words: str) -> list[int]:
    """List the living processes whose command line has all the words."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line, status = (folder / "cmdline").read_text(), (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if status != "Z" and all(word in line for word in words):
            found.append(int(folder.name))
    return found
