"""Commands of the package and pieces of Python, in this process or in one of their own."""

import importlib
import os
import subprocess
import sys
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
