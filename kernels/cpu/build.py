"""Compilation of the CPU kernel at first use: once per machine and source, even if many processes start at the same time."""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from filelock import FileLock

FOLDER = Path(__file__).parent
SOURCE = FOLDER / "kernel.cpp"
HEADERS = tuple(sorted(FOLDER.glob("*.h")))
COMPILERS = ("c++", "g++", "clang++")
# no -ffast-math: infinities and NaN keep their meaning
FLAGS = ("-std=c++17", "-O2", "-ftree-vectorize", "-ffp-contract=fast", "-fPIC", "-fvisibility=hidden", "-shared", "-pthread")

# tried in this order: a compiler may not know the processor, or may not have the flag for the architecture
TUNINGS = (("-march=native",), ("-mcpu=native",), ())


class BuildError(RuntimeError):
    """The kernel could not be compiled; the message says what to install or change."""


def cache_directory() -> Path:
    """Return the folder of compiled kernels: $XDG_CACHE_HOME/carafepp, else ~/.cache/carafepp."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "carafepp"


def _processor() -> str:
    """Describe the processor, which determines the instructions of -march=native: machines that share a home folder may differ."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        return "\n".join(line for line in first if line.startswith(("model name", "flags", "Features", "CPU part")))
    except OSError:
        return platform.processor()


def _compile(compiler: str, source: Path, target: Path) -> None:
    """Compile to `target`, which appears only when it is complete."""
    failure = ""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as folder:
        library = Path(folder) / target.name
        for tuning in TUNINGS:
            command = [compiler, *FLAGS, *tuning, str(source), "-o", str(library)]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode == 0:
                os.replace(library, target)
                return
            failure = f"{' '.join(command)} failed with\n{result.stderr.strip()[-2000:]}"
    raise BuildError(f"{failure}\nA C++17 compiler is needed: GCC 9, Clang 12 or newer.")


def build() -> Path:
    """Return the path of the compiled kernel, which is compiled first if the cache of this machine lacks it.

    Raises:
        BuildError: there is no compiler, the compiler failed, or the cache folder is not writable.
    """
    key = hashlib.sha256(repr((FLAGS, TUNINGS, platform.machine(), _processor())).encode())
    for path in (SOURCE, *HEADERS):
        key.update(path.read_bytes())
    cache = cache_directory()
    target = cache / f"cpu-{key.hexdigest()[:24]}.so"
    if target.exists():
        return target
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise BuildError(
            "there is no C++ compiler. Install g++ or clang++ (Debian and Ubuntu: apt install g++, macOS: xcode-select --install)"
        )
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_suffix(".lock")):
            if not target.exists():
                _compile(compiler, SOURCE, target)
    except OSError as error:
        raise BuildError(f"the folder {cache} is not writable ({error}). Set XDG_CACHE_HOME to a writable folder.") from error
    return target
