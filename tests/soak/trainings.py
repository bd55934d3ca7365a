"""Trainings of every task that are killed at random moments, and end with the bits of an uninterrupted training."""

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random

import torch
from carafepp.scripts.common.checkpoints import is_whole
from carafepp.scripts.common.results import is_finished
from tqdm import tqdm
from training import TASKS, read_result

from soak.findings import keep_failure, run_cases
from soak.victims import Victim, can_mount, fill_disk, forbid_writing, limit_files, mount_small_disk, pick_moment

LAUNCHERS = {"basic": [], "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]}
# ways to be interrupted, with the numbers of workers; the order mixes them, so that a short soak sees several
CASES = [
    (task, workers, way)
    for task in TASKS
    for workers in (0, 2)
    for way in ("alone", "alone", *(("basic", "full") if workers else ("joblib", "unwritable")))
]
Random(0).shuffle(CASES)
SIGNALS = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
CLOCKS = {"seconds", "cpu_seconds"}
# PyTorch's workers look every five seconds whether their parent lives
SECONDS_TO_END = 20


class Wrong(Exception):
    """What a case shows to be wrong."""


def expect(condition: object, what: str) -> None:
    """Raise Wrong unless the condition holds."""
    if not condition:
        raise Wrong(what)


class Soak:
    """The references that cases share, in a folder, and what they count."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.counts = folder, Counter()
        self.victims: list[Victim] = []

    def start(self, folder: Path, *arguments: str, fork: bool = False) -> Victim:
        """Start a training or a sweep."""
        self.victims.append(Victim(folder, *arguments, fork=fork))
        return self.victims[-1]

    def clear(self) -> None:
        """End what is left of everything that was started."""
        for victim in self.victims:
            victim.clear()
        self.victims.clear()

    def arguments(self, task: str, workers: int) -> list[str]:
        """Command line of the training of a case, except its folder."""
        return [*TASKS[task], f"data.workers={workers}", "data.epochs=4", "seed=0"]

    def reference(self, task: str, workers: int) -> Path:
        """Return the folder of the uninterrupted training, which is trained once."""
        folder = self.folder / "whole" / f"{task}-{workers}"
        if not folder.exists():
            victim = self.start(
                folder.with_name(f"{folder.name}-out"), *self.arguments(task, workers), f"hydra.run.dir={folder}", fork=True
            )
            expect(victim.wait() == 0, f"the uninterrupted training failed: {victim.said.read_text()[-3000:]}")
        return folder

    def run(self, seed: int, folder: Path) -> None:
        """Run one case in a new folder; a failure raises Wrong."""
        rng, (task, workers, way) = Random(seed), CASES[seed % len(CASES)]
        if way in LAUNCHERS:
            self.sweep(rng, task, workers, way, folder)
        elif way == "alone":
            self.train(rng, task, workers, folder)
        else:
            self.run_out_of_disk(rng, task, workers, way, folder)
        self.counts[f"cases {way}"] += 1

    def count_kill(self, task: str, workers: int, way: str, signum: signal.Signals, runs: Path, rows: int, target: str) -> None:
        """Count a kill under every heading."""
        after = (runs / "last.ckpt").exists() or any(runs.glob("*/last.ckpt"))
        headings = [
            "kills",
            f"kills of {task}",
            f"kills by {signum.name}",
            f"kills with {workers} workers",
            f"kills {way}",
            f"kills of {target}",
        ]
        headings.append(f"kills {'after' if after else 'before'} the first checkpoint")
        headings.append(f"kills {'after' if after else 'before'} the first checkpoint, {task}")
        headings.append(f"kills {'while it trained' if rows else 'before it trained'}")
        self.counts.update(headings)

    def train(self, rng: Random, task: str, workers: int, folder: Path) -> None:
        """Kill one training several times, continue it, and compare it."""
        run = folder / "run"
        reference = self.reference(task, workers)
        new = [*self.arguments(task, workers), f"hydra.run.dir={run}"]
        early = rng.randint(0, 2)
        for kill in range(rng.randint(5, 8)):
            victim = self.start(folder, *continue_or(new, run), fork=rng.random() < 0.8)
            rows, delay = pick_moment(rng, kill < early)
            rows = victim.wait_for_training(run, rows)
            time.sleep(delay)
            if victim.poll() is not None:
                expect(victim.wait() == 0, f"failed without a kill: {victim.said.read_text()[-3000:]}")
                expect(is_finished(run), "exit status 0 without a result.json")
                self.counts["finished before the kill"] += 1
                break
            signum, group, twice = rng.choice(SIGNALS), rng.random() < 0.4, rng.random() < 0.15
            self.count_kill(task, workers, "alone", signum, run, rows, "its group" if group else "its process")
            self.kill(rng, victim, signum, victim.pid, group, twice)
            status = victim.wait(120)
            self.check_end(run, status, signum, rows, twice, victim.said.read_text())
            # the other half goes on at once, while workers may still end
            if rng.random() < 0.5:
                self.expect_none_left(victim)
        victim = self.start(folder, *continue_or(new, run), fork=True)
        expect(victim.wait() == 0, f"could not be continued: {victim.said.read_text()[-3000:]}")
        self.expect_none_left(victim)
        self.compare(run, reference)
        left = [path.name for path in (folder / "tmp").rglob("*") if path.is_file()]
        expect(not left, f"temporary files are left: {left}")

    def kill(self, rng: Random, victim: Victim, signum: signal.Signals, pid: int, group: bool, twice: bool) -> None:
        """Send a signal to a process or to the group of the victim, and some seconds later perhaps again."""
        for again in range(1 + twice):
            time.sleep(again * rng.uniform(0, 0.5))
            with contextlib.suppress(ProcessLookupError):
                os.killpg(victim.pid, signum) if group else os.kill(pid, signum)

    def check_end(self, run: Path, status: int, signum: signal.Signals, rows: int, twice: bool, said: str) -> None:
        """Check that a killed training is no success, and says what happened."""
        if status == 0:
            expect(is_finished(run), "exit status 0 without a result.json")
            return
        expect(status in (-signum, 128 + signum, 1), f"exit status {status} after {signum.name}: {said[-3000:]}")
        if signum == signal.SIGKILL or not rows or twice or is_finished(run):
            return
        expect(status == 128 + signum, f"exit status {status} after {signum.name}: {said[-3000:]}")
        record = run / "error.txt"
        expect(record.exists(), f"no error.txt after {signum.name}: {said[-3000:]}")
        expect(
            record.read_text().startswith(f"interrupted by {signum.name}"), f"error.txt after {signum.name}: {record.read_text()[-3000:]}"
        )
        # workers that get the signal too may print theirs
        expect("scripts/train.py" not in said, f"a traceback after {signum.name}: {said[-3000:]}")

    def expect_none_left(self, victim: Victim) -> None:
        """Check that no process of a run is alive."""
        left = victim.find_left(SECONDS_TO_END)
        lines = [Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")[:200] for pid in left if Path(f"/proc/{pid}").exists()]
        victim.clear()
        # joblib's processes without a job, which end by themselves after five minutes
        lines = [line for line in lines if "loky" not in line and "resource_tracker" not in line]
        expect(not lines, f"{len(lines)} processes are alive {SECONDS_TO_END} s after the end: {lines}")

    def sweep(self, rng: Random, task: str, workers: int, launcher: str, folder: Path) -> None:
        """Kill a sweep of two trainings, or one of them, several times, repeat its command, and compare both trainings."""
        runs = folder / "sweep"
        reference = self.reference(task, workers)
        command = ["-m", *LAUNCHERS[launcher], *self.arguments(task, workers)[:-1], "seed=0,0", f"hydra.sweep.dir={runs}"]
        for kill in range(rng.randint(3, 4)):
            victim = self.start(folder, *command)
            rows, delay = pick_moment(rng, kill == 0 and rng.random() < 0.5)
            rows = victim.wait_for_training(runs, rows)
            time.sleep(delay)
            if victim.poll() is not None:
                expect(victim.wait() == 0, f"failed without a kill: {victim.said.read_text()[-3000:]}")
                self.counts["finished before the kill"] += 1
                break
            signum, target = rng.choice(SIGNALS), rng.choice(["job", "sweep", "group"])
            trainings = victim.find_trainings() if target == "job" else []
            target = target if trainings or target != "job" else "sweep"
            pid = rng.choice(trainings) if target == "job" else victim.pid
            self.count_kill(
                task, workers, launcher, signum, runs, rows, {"job": "a job", "sweep": "the sweep", "group": "its group"}[target]
            )
            self.kill(rng, victim, signum, pid, target == "group", False)
            status = victim.wait(300 if target == "job" else 120)
            done = all(is_finished(runs / str(job)) for job in (0, 1))
            expect(status or done, "a sweep with an unfinished training ended with exit status 0")
            self.expect_none_left(victim)
        victim = self.start(folder, *command)
        expect(victim.wait() == 0, f"the sweep could not be continued: {victim.said.read_text()[-3000:]}")
        self.expect_none_left(victim)
        for job in (0, 1):
            self.compare(runs / str(job), reference)

    def run_out_of_disk(self, rng: Random, task: str, workers: int, way: str, folder: Path) -> None:
        """Let the disk be full, or the folder unwritable, after some rows; continue when there is space, and compare."""
        disk = folder / "disk"
        run, reference = disk / "run", self.reference(task, workers)
        new = [*self.arguments(task, workers), f"hydra.run.dir={run}"]
        mounted = way == "full" and can_mount()
        if way == "unwritable" and os.geteuid() == 0 and not can_mount():
            self.counts["skipped: unwritable (root without mounts)"] += 1
            return
        with mount_small_disk(disk) if mounted else contextlib.nullcontext():
            for _ in range(rng.randint(1, 3)):
                victim = self.start(folder, *continue_or(new, run), fork=True)
                victim.wait_for_training(run, rng.randint(1, 10))
                before = (run / "last.ckpt").exists()
                # less than a checkpoint takes
                free = int(rng.uniform(0, 0.8) * (reference / "last.ckpt").stat().st_size)
                if way == "unwritable":
                    trouble, error = forbid_writing(run), "Read-only file system|Permission denied"
                elif mounted:
                    trouble, error = fill_disk(disk, free), "No space left on device"
                else:
                    trouble, error = limit_files(victim.pid, free), "File too large"
                with trouble:
                    status = victim.wait()
                    said = victim.said.read_text()
                    if status == 0:
                        self.counts[f"{way}: finished before"] += 1
                        break
                    expect(not (run / "result.json").exists(), f"a result.json after exit status {status}: {said[-3000:]}")
                    expect(any(words in said for words in error.split("|")), f"exit status {status} without the reason: {said[-3000:]}")
                    expect(str(run) in said, f"the path is not named: {said[-3000:]}")
                if before:
                    expect((run / "last.ckpt").exists() and is_whole(run / "last.ckpt"), f"last.ckpt is damaged: {said[-3000:]}")
                self.counts.update([f"{way}: ended", f"{way}: ended {'after' if before else 'before'} the first checkpoint"])
                if mounted:
                    self.counts["full: by a disk of 64 MB"] += 1
                self.expect_none_left(victim)
            victim = self.start(folder, *continue_or(new, run), fork=True)
            expect(victim.wait() == 0, f"could not be continued: {victim.said.read_text()[-3000:]}")
            self.compare(run, reference)
            if mounted:
                shutil.copytree(run, folder / "copy")

    def compare(self, run: Path, reference: Path) -> None:
        """Compare a training, bit by bit, with the uninterrupted one."""
        expect(not (run / "error.txt").exists(), "error.txt is left after the end")
        names, wanted = ({str(path.relative_to(f)) for path in f.rglob("*")} for f in (run, reference))
        expect(names == wanted, f"files are missing or left over: {sorted(names ^ wanted)}")
        for name in sorted(wanted):
            if name.endswith((".csv", ".png", "bbox.json", "segm.json")):
                expect((run / name).read_bytes() == (reference / name).read_bytes(), f"{name} differs")
        ours, theirs = ({k: v for k, v in read_result(f).items() if k not in CLOCKS} for f in (run, reference))
        for result in (ours, theirs):
            # a sweep writes them as Hydra understands them, False for false
            result["overrides"] = sorted(map(str.lower, result["overrides"]))
        expect(ours == theirs, f"result.json differs: {json.dumps(ours)} and {json.dumps(theirs)}")
        for name in ("last.ckpt", "best.ckpt"):
            ours, theirs = (torch.load(f / name, weights_only=True) for f in (run, reference))
            expect(same(ours["state_dict"], theirs["state_dict"]), f"the weights of {name} differ")
            expect(ours["global_step"] == theirs["global_step"], f"{name} is of step {ours['global_step']}, not {theirs['global_step']}")
            expect(same(ours["optimizer_states"], theirs["optimizer_states"]), f"the optimizer of {name} differs")
        self.counts["compared bit by bit"] += 1


def continue_or(new: list[str], run: Path) -> list[str]:
    """Command line that continues the run of a folder, or that starts it if it has no configuration yet."""
    return [f"resume={run}"] if (run / "config.yaml").exists() else new


def same(ours: object, theirs: object) -> bool:
    """Return whether two trees of tensors and values are the same, bit by bit."""
    if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
        return ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list | tuple) and isinstance(theirs, list | tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return ours == theirs


def run(minutes: float, seed: int) -> dict[str, int | float]:
    """Run cases until the time is over, and return what they counted."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak") as temporary:
        soak = Soak(Path(temporary))
        try:
            for case in run_cases("trainings", minutes, seed):
                folder = Path(temporary) / f"case-{case}"
                before = soak.counts["kills"]
                try:
                    soak.run(case, folder)
                except Exception as error:
                    keep_failure(
                        "trainings", case, f"{' with '.join(map(str, CASES[case % len(CASES)]))}: {type(error).__name__}: {error}", folder
                    )
                names = " ".join(map(str, CASES[case % len(CASES)]))
                tqdm.write(
                    f"trainings, seed {case}: {names}, {soak.counts['kills'] - before} kills of {soak.counts['kills']}", file=sys.stderr
                )
                soak.clear()
                shutil.rmtree(folder, ignore_errors=True)
        except KeyboardInterrupt:
            soak.counts["interrupted"] = 1
            soak.clear()
        soak.counts["minutes"] = round((time.monotonic() - started) / 60, 1)
        return dict(sorted(soak.counts.items()))
