"""Processes that a soak starts and ends: their signals, what is left of them, and disks that are full or cannot be written."""

import contextlib
import faulthandler
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

from carafepp.scripts.train import main
from commands import find_processes

TRAIN = [sys.executable, "-P", "-m", "carafepp.scripts.train"]


class Victim:
    """A training or a sweep in its own session, with its own folder of temporary files; its output goes to `folder`/said.

    Args:
        folder: its working directory.
        arguments: its command line.
        fork: fork this process, which has imported everything, instead of starting Python, which takes longer than a small training.
    """

    def __init__(self, folder: Path, *arguments: str, fork: bool = False) -> None:
        (folder / "tmp").mkdir(parents=True, exist_ok=True)
        self.said = folder / "said"
        more = {"OMP_NUM_THREADS": "1", "TMPDIR": str(folder / "tmp"), "PYTHONFAULTHANDLER": "1"}
        if fork:
            self.process = multiprocessing.get_context("fork").Process(target=train_here, args=(folder, self.said, arguments, more))
            self.process.start()
            while self.poll() is None and os.getsid(self.pid) != self.pid:
                time.sleep(0.001)
        else:
            with open(self.said, "w") as said:
                options = {"cwd": folder, "env": os.environ | more, "stdout": said, "stderr": said, "start_new_session": True}
                self.process = subprocess.Popen([*TRAIN, *arguments], **options)

    @property
    def pid(self) -> int:
        """Process, group and session."""
        return self.process.pid

    def poll(self) -> int | None:
        """Return the exit status, or None while the process is alive."""
        return self.process.poll() if isinstance(self.process, subprocess.Popen) else self.process.exitcode

    def wait(self, seconds: float = 300) -> int:
        """Wait for the end and return the exit status; a process that hangs is killed and raises TimeoutError."""
        end = time.monotonic() + seconds
        while (status := self.poll()) is None and time.monotonic() < end:
            time.sleep(0.01)
        if status is not None:
            return status
        # its stack goes to its output
        os.kill(self.pid, signal.SIGABRT)
        time.sleep(1)
        self.clear()
        raise TimeoutError(f"still alive after {seconds} s: {self.said.read_text()[-3000:]}")

    def wait_for_training(self, runs: Path, changes: int, seconds: float = 300) -> int:
        """Wait until `changes` writes of files metrics.csv below `runs` were seen, or the process ends; return how many there were."""
        seen, before, end = 0, read_clocks(runs), time.monotonic() + seconds
        while seen < changes and self.poll() is None and time.monotonic() < end:
            after = read_clocks(runs)
            seen, before = seen + (after != before), after
            time.sleep(0.003)
        return seen

    def find_trainings(self) -> list[int]:
        """List the processes that train a job of this sweep, without their workers."""
        found = set(find_processes("resume='")) & set(self.find_left(0))
        return [pid for pid in found if read_stat(pid)["parent"] not in found]

    def find_left(self, seconds: float) -> list[int]:
        """List the processes of this session that are alive after at most `seconds`."""
        end = time.monotonic() + seconds
        while (left := [pid for pid in find_processes() if read_stat(pid)["session"] == self.pid]) and time.monotonic() < end:
            time.sleep(0.05)
        return left

    def clear(self) -> None:
        """Kill what is left."""
        for pid in self.find_left(0):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        while self.poll() is None:
            time.sleep(0.01)


def train_here(folder: Path, said: Path, arguments: Sequence[str], environment: dict[str, str]) -> None:
    """Be `carafepp-train`, in a session of its own, in a process that was forked."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.setsid()
    output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    faulthandler.enable()
    os.environ.update(environment)
    tempfile.tempdir = None
    os.chdir(folder)
    main(arguments)


def read_stat(pid: int) -> dict[str, int]:
    """Read the parent and the session of a process; those of a process that has ended are 0."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        fields = ["Z", "0", "0", "0"]
    return {"parent": int(fields[1]), "session": int(fields[3])}


def read_clocks(runs: Path) -> list[tuple[str, int]]:
    """Read when the files metrics.csv of a run, or of the jobs of a sweep, were written."""
    found = []
    for path in sorted([runs / "metrics.csv", *runs.glob("*/metrics.csv")]):
        with contextlib.suppress(FileNotFoundError):
            found.append((str(path), path.stat().st_mtime_ns))
    return found


def can_mount() -> bool:
    """Return whether this user may mount file systems."""
    return os.geteuid() == 0 and subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0


@contextlib.contextmanager
def mount_small_disk(folder: Path, megabytes: int = 64) -> Iterator[None]:
    """Mount an empty disk of this size at a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@contextlib.contextmanager
def fill_disk(folder: Path, free: int) -> Iterator[None]:
    """Fill the disk of a folder except for `free` bytes, and empty it again."""
    filler = folder / "filler"
    try:
        with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 14))
        os.truncate(filler, max(0, filler.stat().st_size - free))
        yield
    finally:
        filler.unlink(missing_ok=True)


@contextlib.contextmanager
def limit_files(pid: int, size: int) -> Iterator[None]:
    """Let a process write no file beyond `size` bytes: what a full disk is to it, for users who cannot mount one."""
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    yield


@contextlib.contextmanager
def forbid_writing(folder: Path) -> Iterator[None]:
    """Make a folder unwritable, for root by a read-only mount, because permissions do not bind root."""
    if os.geteuid():
        mode = folder.stat().st_mode
        folder.chmod(0o555)
        try:
            yield
        finally:
            folder.chmod(mode)
        return
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def pick_moment(rng: Random, early: bool) -> tuple[int, float]:
    """Pick when to end a process: after so many rows of metrics.csv, and so many seconds more. `early` is before most checkpoints."""
    if early:
        return rng.choice([(0, rng.uniform(0, 3)), (1, rng.uniform(0, 0.03)), (2, rng.uniform(0, 0.03))])
    return rng.randint(1, 14), rng.uniform(0, 0.15)
