"""Trainings and sweeps that a signal ends: no success is reported, the folder says what happened, and the run can be finished."""

import contextlib
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from carafepp.scripts.common import jobs
from carafepp.scripts.common.checkpoints import check_last_checkpoint
from carafepp.scripts.common.results import is_finished
from carafepp.scripts.common.run_folders import record_failure
from carafepp.scripts.reporting import read_runs
from carafepp.tasks.runs import LastCheckpoint
from commands import call, count_rows, find_processes
from lightning.pytorch.utilities.exceptions import SIGTERMException
from training import TASKS, TINY, read_result

LAUNCHERS, LAUNCHER_NAMES = [[], ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]], ["basic", "joblib"]
TRAIN = [sys.executable, "-P", "-m", "carafepp.scripts.train"]

pytestmark = pytest.mark.slow


def start(folder: Path, *arguments: str, **options: object) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*TRAIN, *arguments], cwd=folder, env=environment, **pipes, **options)


def wait_for_rows(process: subprocess.Popen, folder: Path, count: int) -> None:
    deadline = time.monotonic() + 240
    while count_rows(folder) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def interrupted(folder: Path, name: str) -> None:
    """Check what an interrupted run leaves, and what a report says of it."""
    assert not (folder / "result.json").exists(), "the run must be interrupted before its end for this test to say anything"
    assert (folder / "error.txt").read_text() == f"interrupted by {name}, continue it with carafepp-train resume={folder}\n"
    assert (folder / "last.ckpt").exists()
    assert any(f"{folder}: unfinished (interrupted by {name}, continue it" in problem for problem in read_runs([folder.parent])[1])


@pytest.fixture(scope="module", autouse=True)
def one_thread(threads_restored):
    """Trainings in this process sum in the order of those in other processes, which have one thread."""
    torch.set_num_threads(1)


@functools.cache
def train_whole(task: str, folder: Path) -> Path:
    """Train a task without an interruption, once in this module, in a folder below this one."""
    call("train", *TASKS[task], "data.epochs=2", f"hydra.run.dir={folder}/{task}")
    return folder / task


@pytest.fixture(scope="module")
def wholes(tmp_path_factory):
    """A folder for the uninterrupted runs of 20 steps."""
    return tmp_path_factory.mktemp("wholes")


def resumes_bit_identically(folder: Path, whole: Path) -> None:
    """Continue an interrupted run, and compare it with an uninterrupted one."""
    call("train", f"resume={folder}")
    assert not (folder / "error.txt").exists()
    assert read_result(folder)["weights_sha256"] == read_result(whole)["weights_sha256"]
    assert (folder / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=lambda signum: signum.name)
def test_interrupted_process_says_so_and_its_run_resumes_bit_identically(signum, wholes, tmp_path):
    folder = tmp_path / "run"
    process = start(tmp_path, *TASKS["segmentation"], "data.epochs=2", f"hydra.run.dir={folder}")
    wait_for_rows(process, folder, 6)
    process.send_signal(signum)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 128 + signum
    interrupted(folder, signum.name)
    assert f"{folder}: interrupted by {signum.name}" in said
    assert "Traceback" not in said
    resumes_bit_identically(folder, train_whole("segmentation", wholes))


@pytest.mark.parametrize("task", [task for task in TASKS if task != "segmentation"])
def test_interrupted_training_of_every_task_resumes_bit_identically(task, wholes, tmp_path, monkeypatch):
    folder, save = tmp_path / "run", LastCheckpoint.on_train_batch_end

    def save_and_stop(self, trainer, *arguments):
        save(self, trainer, *arguments)
        if trainer.global_step == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(LastCheckpoint, "on_train_batch_end", save_and_stop)
        with pytest.raises(SystemExit) as stop:
            call("train", *TASKS[task], "data.epochs=2", f"hydra.run.dir={folder}")
    assert stop.value.code == 128 + signal.SIGTERM
    interrupted(folder, "SIGTERM")
    resumes_bit_identically(folder, train_whole(task, wholes))


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds processes in /proc, which only Linux has")
def test_sweep_goes_on_after_an_interrupted_training_and_does_not_succeed(tmp_path):
    sweep = tmp_path / "sweep"
    process = start(tmp_path, "-m", *TINY, "data.batch_size=4", "data.epochs=2", "seed=0,1", f"hydra.sweep.dir={sweep}")
    wait_for_rows(process, sweep / "0", 6)
    for training in find_processes(f"resume='{sweep}/0'"):
        os.kill(training, signal.SIGTERM)
    _, said = process.communicate(timeout=240)
    assert process.returncode not in (0, 128 + signal.SIGTERM)
    assert f"{sweep}/0: interrupted by SIGTERM" in said
    interrupted(sweep / "0", "SIGTERM")
    assert [run.folder.name for run in read_runs([sweep])[0]] == ["1"]


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds processes in /proc, which only Linux has")
def test_interrupted_joblib_sweep_ends_its_trainings_and_begins_no_other(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    sweep = tmp_path / "sweep"
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    process = start(tmp_path, "-m", *launcher, *TINY, "data.batch_size=4", "data.epochs=60", "seed=0,1,2", f"hydra.sweep.dir={sweep}")
    for job in (0, 1):
        wait_for_rows(process, sweep / str(job), 6)
    process.terminate()
    process.communicate(timeout=240)
    assert process.returncode == 128 + signal.SIGTERM
    assert find_processes(str(sweep)) == []
    for job in (0, 1):
        interrupted(sweep / str(job), "SIGTERM")
    assert not (sweep / "2" / "config.yaml").exists()


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds processes in /proc, which only Linux has")
@pytest.mark.parametrize(("signum", "group"), [(signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGINT, True)], ids=str)
def test_interrupted_sweep_ends_its_training(signum, group, tmp_path):
    """Ctrl-C in a terminal reaches the sweep and its training, `kill` the sweep alone."""
    sweep = tmp_path / "sweep"
    arguments = ["-m", *TINY, "data.batch_size=4", "seed=0,1", f"hydra.sweep.dir={sweep}"]
    process = start(tmp_path, *arguments, start_new_session=True)
    wait_for_rows(process, sweep / "0", 6)
    (os.killpg if group else os.kill)(process.pid, signum)
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert find_processes(str(sweep)) == []
    assert not (sweep / "1").exists()
    assert not (sweep / "0" / "result.json").exists()
    assert re.match(r"interrupted by SIG(TERM|INT), continue it", (sweep / "0" / "error.txt").read_text())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent was killed")
@pytest.mark.parametrize("launcher", LAUNCHERS, ids=LAUNCHER_NAMES)
def test_killed_sweep_ends_its_training(launcher, tmp_path):
    """As by the kernel when memory is short: the training must not go on without its sweep."""
    if launcher:
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    sweep = tmp_path / "sweep"
    arguments = ["-m", *launcher, *TINY, "data.batch_size=4", "seed=0,1", f"hydra.sweep.dir={sweep}"]
    process = start(tmp_path, *arguments, start_new_session=True)
    wait_for_rows(process, sweep / "0", 6)
    process.kill()
    # the pipes close when the last process has ended
    process.communicate(timeout=60)
    assert find_processes(str(sweep)) == []
    interrupted(sweep / "0", "SIGTERM")


def test_training_without_a_result_is_a_failure(tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nexit 0\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(RuntimeError, match=rf"{tmp_path}: ended with exit status 0 and without result.json, continue it with .*{tmp_path}"):
        jobs.train_in_subprocess(tmp_path, [])
    assert "without result.json" in (tmp_path / "error.txt").read_text()
    (tmp_path / "result.json").write_text('{"seed": 0')
    with pytest.raises(RuntimeError, match=r"without result\.json"):
        jobs.train_in_subprocess(tmp_path, [])
    # error.txt cannot be written
    with pytest.raises(RuntimeError, match=r"missing: ended with exit status 0 and without result\.json"):
        jobs.train_in_subprocess(tmp_path / "missing", [])


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=lambda signum: signum.name)
def test_signal_while_nothing_trains_is_recorded(signum, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop, record_failure(tmp_path):
        signal.raise_signal(signum)
    assert stop.value.code == 128 + signum
    assert (tmp_path / "error.txt").read_text().startswith(f"interrupted by {signum.name}, continue it with")
    assert signal.getsignal(signal.SIGTERM) == before
    with record_failure(tmp_path):
        pass
    assert not (tmp_path / "error.txt").exists()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=lambda signum: signum.name)
def test_error_that_follows_a_signal_is_an_interruption(signum, tmp_path):
    """Python ignores the exception of a handler that runs in a callback of fork, and the signal ends the processes that load data too."""

    def lose_worker() -> None:
        with contextlib.suppress(SIGTERMException, KeyboardInterrupt):
            signal.raise_signal(signum)
        raise RuntimeError("DataLoader worker (pid(s) 1) exited unexpectedly")

    with pytest.raises(SystemExit) as stop, record_failure(tmp_path):
        lose_worker()
    assert stop.value.code == 128 + signum
    assert (tmp_path / "error.txt").read_text().startswith(f"interrupted by {signum.name}, continue it with")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_launcher_that_requeues_keeps_its_handler_and_its_exit(tmp_path):
    """submitit bypasses SIGTERM, and exits by itself after it has returned the job to the queue."""
    seen = []
    before = signal.signal(signal.SIGTERM, lambda signum, frame: seen.append(signum))
    try:
        with record_failure(tmp_path):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM]
    with pytest.raises(SystemExit) as stop, record_failure(tmp_path):
        sys.exit(-1)
    assert stop.value.code == -1
    assert not (tmp_path / "error.txt").exists()


def test_training_goes_on_where_a_launcher_passes_over_the_signal(wholes, tmp_path, monkeypatch):
    """Slurm announces a preemption by SIGTERM, and requeues the job only if it runs until it is killed."""
    save, seen = LastCheckpoint.on_train_batch_end, []

    def save_and_announce(self, trainer, *arguments):
        save(self, trainer, *arguments)
        if trainer.global_step == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda signum, frame: seen.append(signum))
    try:
        with monkeypatch.context() as patch:
            patch.setattr(LastCheckpoint, "on_train_batch_end", save_and_announce)
            call("train", *TASKS["segmentation"], "data.epochs=2", f"hydra.run.dir={tmp_path}/run")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM]
    assert not (tmp_path / "run" / "error.txt").exists()
    whole = train_whole("segmentation", wholes)
    assert read_result(tmp_path / "run")["weights_sha256"] == read_result(whole)["weights_sha256"]


@pytest.fixture(scope="module")
def whole(wholes):
    """A finished run of 20 steps."""
    return train_whole("segmentation", wholes)


CLOCKS = ("seconds", "cpu_seconds")


def test_broken_result_is_none_for_everyone_and_is_written_again(whole, tmp_path, capsys):
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    path = folder / "result.json"
    assert is_finished(folder)
    for damaged in ("", "{}", "[" * 100_000, "\udc80", path.read_text()[:500]):
        path.write_text(damaged, errors="surrogateescape")
        assert not is_finished(folder)
        runs, problems = read_runs([tmp_path])
        assert runs == []
        assert f"{path}: broken (" in problems[0]
        assert f"carafepp-train resume={folder} writes it again" in problems[0]
    capsys.readouterr()
    call("train", f"resume={folder}")
    assert f"{path} is broken (" in capsys.readouterr().out
    assert {k: v for k, v in read_result(folder).items() if k not in CLOCKS} == {
        k: v for k, v in read_result(whole).items() if k not in CLOCKS
    }
    assert (folder / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()
    assert read_runs([tmp_path])[1] == []


def test_damaged_last_checkpoint_is_named_and_the_best_one_continues(whole, tmp_path):
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    (folder / "result.json").unlink()
    last, best = folder / "last.ckpt", folder / "best.ckpt"
    content = last.read_bytes()
    check_last_checkpoint(folder)
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    for damaged in (b"", b"text", content[:100], content[: len(content) // 2], content[:-1], flipped):
        last.write_bytes(damaged)
        offer = rf"{last} is damaged: replace it by {best}.*\(cp '{best}' '{last}'\), or delete it .*resume={folder}"
        with pytest.raises(ValueError, match=offer):
            check_last_checkpoint(folder)
    with pytest.raises(SystemExit, match=f"{last} is damaged.*\n.*error.txt"):
        call("train", f"resume={folder}", raises=False)
    assert f"{last} is damaged" in (folder / "error.txt").read_text().splitlines()[0]
    shutil.copy(best, last)
    call("train", f"resume={folder}")
    assert read_result(folder)["weights_sha256"] == read_result(whole)["weights_sha256"]
    last.write_bytes(b"")
    best.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{last} is damaged: delete it to train from the start"):
        check_last_checkpoint(folder)
