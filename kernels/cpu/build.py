"""Compilation of the CPU kernel at first use: once per machine and source, even if many processes start at the same time."""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

from filelock import FileLock

FOLDER = Path(__file__).parent
SOURCE = FOLDER / "kernel.cpp"
HEADERS = tuple(sorted(FOLDER.glob("*.h")))
# tried in turn after $CXX
COMPILERS = ("c++", "g++", "clang++")
FUNCTIONS = ("carafepp_forward", "carafepp_backward")
# the permission of group and others to write
OTHERS = stat.S_IWGRP | stat.S_IWOTH
# no -ffast-math: infinities and NaN keep their meaning
FLAGS = ("-std=c++17", "-O2", "-ftree-vectorize", "-ffp-contract=fast", "-fPIC", "-fvisibility=hidden", "-shared", "-pthread")

# tried in this order: a compiler may not know the processor, or may not have the flag for the architecture
TUNINGS = (("-march=native",), ("-mcpu=native",), ())


class BuildError(RuntimeError):
    """The kernel could not be compiled; the message says what to install or change."""


def cache_directory() -> Path:
    """Return the folder of compiled kernels: $XDG_CACHE_HOME/carafepp, else ~/.cache/carafepp, else, for a user without a home, in /tmp."""
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]).absolute() / "carafepp"
    try:
        return Path.home() / ".cache" / "carafepp"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"carafepp-{os.geteuid()}"


def _processor() -> str:
    """Describe the processor, which determines the instructions of -march=native: machines that share a home folder may differ."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        return "\n".join(line for line in first if line.startswith(("model name", "flags", "Features", "CPU part")))
    except OSError:
        return platform.processor()


def _list_compilers() -> list[list[str]]:
    """List the commands of the compilers that exist, $CXX first."""
    try:
        wanted = [shlex.split(os.environ.get("CXX", "")), *([name] for name in COMPILERS)]
    except ValueError as error:
        raise BuildError(f"CXX={os.environ['CXX']} is not the command of a compiler: {error}") from error
    return [command for command in wanted if command and shutil.which(command[0])]


def _is_safe(status: os.stat_result) -> bool:
    """Return whether only this user, or root, can have written a file or folder."""
    return _is_own(status) and not status.st_mode & OTHERS


def _is_own(status: os.stat_result) -> bool:
    return status.st_uid in (os.geteuid(), 0)


def _protect(folder: Path) -> None:
    """Create the cache folder, or take the right to write in it from others.

    Raises:
        BuildError: the folder belongs to another user, who could put any code there.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid == os.geteuid() and not _is_safe(status):
        folder.chmod(stat.S_IMODE(status.st_mode) & ~OTHERS)
    # whoever owns a link can point it elsewhere
    if not _is_safe(folder.stat()) or not _is_own(folder.lstat()):
        raise BuildError(f"other users can write in the folder {folder}. Set XDG_CACHE_HOME to a folder of your own.")


def _find(folder: Path, stem: str) -> Path | None:
    """Find a whole library that nobody else can have written; the end of its name is the hash of its bytes."""
    for path in folder.glob(f"{stem}-*.so"):
        status = path.lstat()
        # a cut library would end the process by SIGBUS when it is opened
        if stat.S_ISREG(status.st_mode) and _is_safe(status) and path.name == f"{stem}-{_hash(path)}.so":
            return path
    return None


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def _explain_library(library: Path) -> str:
    """Open a library, and return what is wrong with it, or nothing."""
    try:
        loaded = ctypes.CDLL(str(library))
    except OSError as error:
        return f"made a library that cannot be loaded: {error}"
    missing = [name for name in FUNCTIONS if not hasattr(loaded, name)]
    return f"made a library without {', '.join(missing)}" if missing else ""


def _compile(folder: Path, stem: str) -> Path:
    """Compile with the first compiler that works; the library appears in `folder` whole or not at all.

    Raises:
        BuildError: there is no compiler, or none works.
    """
    compilers = _list_compilers()
    if not compilers:
        raise BuildError(
            "there is no C++ compiler. Install g++ or clang++ (Debian and Ubuntu: apt install g++, macOS: xcode-select --install)"
        )
    failures = []
    with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as temporary:
        for compiler in compilers:
            failure = ""
            # names differ, because a process opens a library of the same name and place once only
            for number, tuning in enumerate(TUNINGS):
                library = Path(temporary) / f"{len(failures)}-{number}.so"
                command = [*compiler, *FLAGS, *tuning, str(SOURCE), "-o", str(library)]
                result = subprocess.run(command, capture_output=True, text=True, errors="replace")
                problem = f"failed with\n{result.stderr.strip()[-2000:]}" if result.returncode else _explain_library(library)
                if not problem:
                    return _keep(library, folder, stem)
                failure = f"{' '.join(command)} {problem}"
            failures.append(failure)
    raise BuildError("\n".join([*failures, "A C++17 compiler is needed: GCC 9, Clang 12 or newer."]))


def _keep(library: Path, folder: Path, stem: str) -> Path:
    """Move a library to its place, so that even a power cut leaves all of it or nothing."""
    library.chmod(0o755)
    target = folder / f"{stem}-{_hash(library)}.so"
    _flush(library)
    os.replace(library, target)
    _flush(folder)
    return target


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def build() -> Path:
    """Return the path of the compiled kernel; compile it if the cache has none, or a damaged one, for this machine, source and $CXX.

    Raises:
        BuildError: there is no compiler, none works, or the cache folder cannot be written or belongs to somebody else.
    """
    key = hashlib.sha256(repr((FLAGS, TUNINGS, platform.machine(), _processor(), os.environ.get("CXX", ""))).encode())
    for path in (SOURCE, *HEADERS):
        key.update(path.read_bytes())
    cache, stem = cache_directory(), f"cpu-{key.hexdigest()[:24]}"
    try:
        _protect(cache)
        if found := _find(cache, stem):
            return found
        with FileLock(cache / f"{stem}.lock"):
            return _find(cache, stem) or _compile(cache, stem)
    except OSError as error:
        raise BuildError(f"the folder {cache} cannot be written ({error}). Set XDG_CACHE_HOME to one that can.") from error
