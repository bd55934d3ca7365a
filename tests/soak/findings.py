"""What a soak has found so far. Every failure is written at once, so that ending the soak loses none."""

import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

# failures of this process, as they are printed at the end
failures: list[str] = []
KEPT = Path("build/soak")
# a forked process would inherit the locks of its thread
tqdm.monitor_interval = 0


def run_cases(part: str, minutes: float, seed: int) -> Iterator[int]:
    """Yield the seeds of the cases of a part, `seed` first, until the time is over; 0 minutes are one case."""
    end = time.monotonic() + 60 * minutes
    with tqdm(total=round(60 * minutes), desc=part, unit="s", disable=None) as progress:
        while True:
            yield seed
            seed += 1
            left = end - time.monotonic()
            progress.update(min(progress.total, round(60 * minutes - left)) - progress.n)
            progress.set_postfix(seed=seed, failures=len(failures))
            if left <= 0:
                return


def keep_failure(part: str, seed: int, what: str, folder: Path | None = None) -> None:
    """Record a failure of the case `seed`, print it with the command that repeats it, and copy its folder to build/soak."""
    text = f"{part}, seed {seed}: {what}\n  repeat it with: make soak PART={part} MINUTES=0 SEED={seed}"
    if folder is not None:
        kept = KEPT / f"{part}-{seed}-{len(failures)}"
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(folder, kept, symlinks=True, ignore=shutil.ignore_patterns("tmp"))
        text += f"\n  its files: {kept}"
    failures.append(text)
    KEPT.mkdir(parents=True, exist_ok=True)
    with open(KEPT / "failures.txt", "a") as file:
        file.write(f"{text}\n")
    tqdm.write(text, file=sys.stderr)
