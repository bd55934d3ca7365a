"""make gpu: the `gpu` tests, and every figure of the documentation that a GPU gives, within eight minutes.

Each step is a command with a time limit, and the next step follows whatever happens. The figures of the steps that succeed go to
docs/measurements/DATE_DEVICE/, from which docs/tables.py writes the tables of the pages. The program needs only PyTorch and Triton, pytest
for the tests, and torchvision and Lightning for the networks; docs/wheels.py brings the others.
"""

import contextlib
import csv
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import NamedTuple

from wheels import find_packages

ROOT = Path(__file__).parent.parent
MEASUREMENTS = ROOT / "docs" / "measurements"
# all steps together, in seconds
BUDGET = 480


class Step(NamedTuple):
    """A command: `arguments` of the Python interpreter, killed after `seconds`; its run folders hold the table `csv`, if it has one."""

    name: str
    arguments: tuple[str, ...]
    seconds: int
    csv: str | None = None


def bench(command: str, name: str, seconds: int, *overrides: str) -> Step:
    """Return the step that runs a sweep of a bench on the GPU: "operator", "module", "models", "samplers" or "attention"."""
    words = [] if command == "operator" else [command]
    table = "times.csv" if command == "operator" else f"{command}.csv"
    arguments = ("-P", "-m", "carafepp.scripts.bench", *words, "-m", "device=cuda", *overrides)
    return Step(f"{command}: {name}", arguments, seconds, table)


# the maps at which the operator is timed, by the name of their configuration in conf/op
MAPS = {
    "up2": "[1,256,50,76],[2,256,100,168],[512,256,14,14],[4,512,64,64],[2,64,56,56]",
    "down2": "[64,64,112,112],[64,256,56,56],[2,64,400,672],[8,64,128,128]",
    "up3_grouped": "[1,128,33,47]",
}
OPERATOR = (
    "providers=[triton,mmcv,bilinear,avg_pool,copy]",
    "dtype=float16,float32",
    "channels_last=true,false",
    "rounds=15",
    "seconds=0.2",
)
MIXED = ("dtype=bfloat16", "channels_last=true")
TESTS = ("tests/kernels", "tests/models", "tests/scripts/test_models_bench.py")
# the limits are estimates: together they are the budget, and the last step also gets what the others leave
STEPS = (
    Step("tests", ("-P", "-m", "pytest", "-q", "-m", "gpu", "--continue-on-collection-errors", *TESTS), 80),
    Step("kernels", ("-P", "docs/compile_kernels.py", *(word for item in MAPS.items() for word in item)), 40),
    bench("operator", "up 2", 50, "op=up2", f"op.shape={MAPS['up2']}", *OPERATOR),
    bench("operator", "down 2", 30, "op=down2", f"op.shape={MAPS['down2']}", *OPERATOR),
    bench("operator", "up 3, 4 groups", 15, "op=up3_grouped", *OPERATOR),
    bench("operator", "torch.compile", 20, "op=up2", "providers=[triton,compiled_definition,copy]", "dtype=float16", "rounds=20"),
    bench("samplers", "all", 30, "batch=8", "dtype=float16", "channels_last=true"),
    bench("attention", "9 x 9 windows", 10, "channels=384", "query_channels=128", "dtype=float16", "rounds=10"),
    bench("module", "up 2", 15, "op=up2", "op.shape=[4,256,100,168],[4,256,25,42]", *MIXED),
    bench("module", "down 2", 15, "op=down2", "op.shape=[64,64,112,112],[64,512,28,28]", "options.compressor_norm=true", *MIXED),
    bench("models", "batch 1", 35, "table=table2,table9", "modes=[inference,graph]", "rounds=15", *MIXED),
    bench(
        "models",
        "ResNet-50, large batches",
        55,
        "table=table2",
        "rows=[resnet50_carafe]",
        "batch=64",
        "step_batch=128",
        "modes=[inference,step,compiled,graph]",
        "rounds=15",
        *MIXED,
    ),
    bench("models", "Mask R-CNN, training", 30, "table=table7", "step_batch=4", "modes=[step]", *MIXED),
    bench("models", "frames per second", 45, "table=table1,table3,table4,table5", "modes=[inference]", "rounds=10", *MIXED),
)


class Outcome(NamedTuple):
    """How a step ended: "passed", "failed (STATUS)", "out of time" or "no time left", after some seconds, with its output in `log`."""

    step: Step
    state: str
    seconds: float
    log: Path


def run_step(step: Step, folder: Path, seconds: float, environment: dict[str, str]) -> Outcome:
    """Run a step in a folder of its own; kill it and the processes that it started after some seconds."""
    run = folder / re.sub(r"\W+", "_", step.name)
    run.mkdir(parents=True)
    log = run / "output.txt"
    sweep = (f"hydra.sweep.dir={run / 'runs'}",) if step.csv else ()
    start = time.monotonic()
    if seconds <= 0:
        return Outcome(step, "no time left", 0, log)
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *step.arguments, *sweep],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(seconds)
            state = "passed" if status == 0 else f"failed ({status})"
        except subprocess.TimeoutExpired:
            state = "out of time"
        finally:
            # also what the step started and left running
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Outcome(step, state, time.monotonic() - start, log)


def run_steps(steps: Sequence[Step], folder: Path, environment: dict[str, str], budget: float = BUDGET) -> list[Outcome]:
    """Run all steps, each except the last in its own limit and all within the budget in seconds, and print how each ends."""
    end = time.monotonic() + budget
    outcomes = []
    for step in steps:
        left = end - time.monotonic()
        outcome = run_step(step, folder, left if step is steps[-1] else min(step.seconds, left), environment)
        print(f"{outcome.state:<14}{outcome.seconds:>6.0f} s  {step.name}", flush=True)
        if outcome.state != "passed" and outcome.log.exists():
            print(*(f"    {line}" for line in outcome.log.read_text(errors="replace").splitlines()[-5:]), f"    {outcome.log}", sep="\n")
        outcomes.append(outcome)
    return outcomes


def merge_tables(paths: Sequence[Path], target: Path) -> None:
    """Write the rows of several tables as one, with the columns of all."""
    rows = [row for path in paths for row in csv.DictReader(path.open(newline=""))]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with target.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_measurements(outcomes: Sequence[Outcome], target: Path, about: dict[str, str]) -> None:
    """Write the tables of the steps that passed, one file for each kind of table, and what they were measured with."""
    names = dict.fromkeys(outcome.step.csv for outcome in outcomes if outcome.step.csv)
    for name in names:
        passed = [outcome for outcome in outcomes if outcome.step.csv == name and outcome.state == "passed"]
        if tables := [table for outcome in passed for table in sorted(outcome.log.parent.rglob(name))]:
            target.mkdir(parents=True, exist_ok=True)
            merge_tables(tables, target / name)
    if target.exists():
        (target / "about.json").write_text(json.dumps(about, indent=2) + "\n")
        print(f"figures written to {target}")


def name_commit() -> str:
    """Return the commit of the files, and whether tracked files have changed since; nothing without git or a repository."""

    def git(*arguments: str) -> str:
        with contextlib.suppress(FileNotFoundError):
            return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        return ""

    return git("rev-parse", "--short", "HEAD") + (" with changes" if git("status", "--porcelain", "--untracked-files=no") else "")


def describe() -> dict[str, str]:
    """Describe this run: date, device, versions and commit."""
    import torch
    import triton

    return {
        "kind": "gpu",
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": name_commit(),
    }


def main() -> int:
    """Run all steps and write their figures; return the exit status."""
    try:
        import torch
    except ImportError:
        print(f"make gpu needs PyTorch, which {sys.executable} does not have: give make gpu GPU_PYTHON=PYTHON.", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print(f"make gpu needs a GPU, and PyTorch {torch.__version__} finds none.", file=sys.stderr)
        return 2
    about = describe()
    folder = ROOT / "runs" / time.strftime("gpu-%Y-%m-%d_%H-%M-%S")
    folder.mkdir(parents=True)
    print(*filter(None, about.values()), sep=", ", flush=True)
    outcomes = run_steps(STEPS, folder, find_packages(folder / "packages"))
    target = MEASUREMENTS / f"{about['date']}_{re.sub(r'[^a-z0-9]+', '-', about['device'].lower()).strip('-')}"
    write_measurements(outcomes, target, about)
    tables = subprocess.run([sys.executable, str(ROOT / "docs" / "tables.py")]).returncode
    failed = [outcome.step.name for outcome in outcomes if outcome.state != "passed"]
    print("python docs/plots.py draws the figures of the documentation again; it needs Matplotlib")
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} steps passed" + (f"; not: {', '.join(failed)}" if failed else ""))
    return 1 if failed or tables else 0


if __name__ == "__main__":
    sys.exit(main())
