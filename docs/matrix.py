"""make matrix: every supported version of Triton compiles the kernels of the operator, and an emulator checks the code, without a GPU.

The versions are the newest patches of all minor versions in the package index, from the oldest that pyproject.toml accepts. Each is
installed into a folder of build/matrix and used with the PyTorch of this environment. tests/support/triton_matrix.py says what is compiled
and checked. A second call continues where the first was stopped, unless the kernels or the emulator changed. The rows go to
docs/measurements/DATE_triton, from which docs/tables.py writes the table of docs/support.md.
"""

import csv
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "matrix"
CODE = (
    *("kernels/*.py", "kernels/gpu/**/*.py", "kernels/gpu/**/*.json"),
    *("tests/support/triton_matrix.py", "tests/support/ptx_step.py", "tests/support/ptx/*.py"),
)
sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT)]

Row = dict[str, Any]


class Job(NamedTuple):
    """The cases that one process compiles for a target with a version of Triton."""

    triton: str
    target: str
    cases: tuple[str, ...]


def choose_versions(versions: Iterable[str], oldest: str) -> list[str]:
    """Return the newest patch of every minor version from `oldest` on, in order; versions with letters are not released."""
    numbers = sorted(tuple(map(int, name.split("."))) for name in versions if re.fullmatch(r"\d+\.\d+\.\d+", name))
    newest = {number[:2]: number for number in numbers if number >= tuple(map(int, oldest.split(".")))}
    return [".".join(map(str, number)) for number in newest.values()]


def find_versions() -> list[str]:
    """Return the versions of Triton in the package index that pyproject.toml accepts, one for each minor version."""
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (oldest,) = re.findall(r"^triton>=([\d.]+)", "\n".join(requirements), re.M)
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "index", "versions", "triton", "--json"], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    return choose_versions(json.loads(listed)["versions"], oldest)


def install(name: str) -> str:
    """Install a version of Triton unless it is there; return why this failed, or nothing."""
    folder = BUILD / f"triton-{name}"
    if folder.exists():
        return ""
    unfinished = folder.with_suffix(".unfinished")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(unfinished), f"triton=={name}"]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if result.returncode:
        return next((line for line in result.stderr.splitlines() if line.startswith("ERROR")), "not installed")
    unfinished.rename(folder)
    return ""


def environment(name: str) -> dict[str, str]:
    """Return the environment in which Python imports a version of Triton and the kernels of this checkout."""
    paths = [BUILD / f"triton-{name}", ROOT, ROOT / "tests" / "support"]
    settings = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "TRITON_CACHE_DIR": str(BUILD / "cache"), "OMP_NUM_THREADS": "1"}
    # Triton 3.4 calls the linker of ROCm; without it, the code is compiled and not linked
    return {"TRITON_HIP_LLD_PATH": "/bin/true"} | os.environ | settings


def run_job(job: Job, processes: list[subprocess.Popen], stopped: threading.Event) -> Iterator[Row]:
    """Yield a row for every case. A process that dies takes one case with it, and another, which joins `processes`, goes on after it."""
    todo = list(job.cases)
    while todo and not stopped.is_set():
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "triton_matrix", job.target, *todo],
            env=environment(job.triton),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Ctrl-C would look like a crash of the compiler
            start_new_session=True,
        )
        processes.append(process)
        with process:
            for line in process.stdout or ():
                yield json.loads(line)
                todo.pop(0)
            errors = process.stderr.read().strip().splitlines() if process.stderr else []
        if todo and not stopped.is_set():
            end = f"the process ended with status {process.returncode}"
            yield {"case": todo.pop(0), "problem": f"{end}: {errors[-1][:200]}" if errors else end}


def digest_code() -> str:
    """Return a digest of everything that a result depends on, except for the version of Triton."""
    digest = hashlib.sha256(version("torch").encode())
    for path in sorted(path for pattern in CODE for path in ROOT.glob(pattern) if path.is_file()):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def read_rows(path: Path) -> dict[tuple[str, str, str], Row]:
    """Return the rows of earlier calls by version, target and case."""
    lines = path.read_text().splitlines() if path.exists() else []
    # the last line of a call that was killed may be half a line
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return {(row["triton"], row["target"], row["case"]): row for row in rows}


def run_jobs(jobs: Sequence[Job], path: Path) -> list[Row]:
    """Run the cases that have no row in a file, as many jobs at a time as there are processors, and return the rows of all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    done = read_rows(path)
    keys = [(job.triton, job.target, case) for job in jobs for case in job.cases]
    left = [job._replace(cases=tuple(case for case in job.cases if (job.triton, job.target, case) not in done)) for job in jobs]
    with path.open("a") as file, tqdm(total=len(keys), initial=sum(key in done for key in keys), unit="case") as bar:
        processes: list[subprocess.Popen] = []
        stopped = threading.Event()

        def run(job: Job) -> None:
            for found in run_job(job, processes, stopped):
                row = {"triton": job.triton, "target": job.target} | found
                done[job.triton, job.target, row["case"]] = row
                # on a line of its own, after half a line as well
                file.write(f"\n{json.dumps(row)}\n")
                file.flush()
                bar.set_postfix_str(f"{job.triton} {job.target}")
                bar.update()

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            try:
                list(pool.map(run, left))
            finally:
                stopped.set()
                for process in processes:
                    process.kill()
    return [done[key] for key in keys]


def write_rows(rows: Sequence[Row], target: Path, about: dict[str, str]) -> None:
    """Write the rows as a table of docs/measurements."""
    target.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with (target / "matrix.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    (target / "about.json").write_text(json.dumps(about, indent=2) + "\n")


def is_wrong(row: Row) -> bool:
    """Return whether a kernel does not compile, or the result of one for NVIDIA GPUs differs from float64."""
    return not row.get("equal") if row["target"].startswith("sm_") else row.get("registers") is None


def main() -> int:
    """Run the matrix, print and store its table; return the exit status."""
    from measure import name_commit
    from tables import tabulate_matrix
    from triton_matrix import AMD, NVIDIA, list_cases

    BUILD.mkdir(parents=True, exist_ok=True)
    versions = find_versions()
    print("Triton", *versions, flush=True)
    missing = {name: problem for name in versions if (problem := install(name))}
    jobs = [Job(name, target, list_cases(target)) for name in versions if name not in missing for target in (*NVIDIA, *AMD)]
    try:
        rows = run_jobs(jobs, BUILD / f"rows-{digest_code()}.jsonl")
    except KeyboardInterrupt:
        print("\nstopped; `make matrix` continues", file=sys.stderr)
        return 130
    today = date.today().isoformat()
    about = {"kind": "cpu", "date": today, "device": "Compiled and emulated on a CPU"}
    about |= {"torch": version("torch"), "python": platform.python_version(), "commit": name_commit()}
    write_rows(rows, ROOT / "docs" / "measurements" / f"{today}_triton", about)
    print(tabulate_matrix([{name: "" if value is None else str(value) for name, value in row.items()} for row in rows]))
    for row in filter(is_wrong, rows):
        print(json.dumps(row))
    for name, problem in missing.items():
        print(f"Triton {name}: {problem}")
    tables = subprocess.run([sys.executable, str(ROOT / "docs" / "tables.py")]).returncode
    return 1 if missing or tables or any(map(is_wrong, rows)) else 0


if __name__ == "__main__":
    sys.exit(main())
