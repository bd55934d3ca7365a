"""Compilation of the CPU kernel: once for all processes, with errors that say what to do, and the replacement without a compiler."""

import ctypes
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from carafepp.kernels.cpu import build as cpu_build
from commands import run_after_torch

# loads build.py by its path, because importing PyTorch takes seconds in every process
BUILD = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("cpu_build", {cpu_build.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.build())
"""


def write_script(path: Path, body: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.slow
def test_many_processes_build_once(tmp_path, compiler):
    log = tmp_path / "log"
    write_script(tmp_path / "bin" / "c++", f'echo run >> "{log}"\nexec "{compiler}" "$@"')
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PATH": path}
    processes = [subprocess.Popen([sys.executable, "-c", BUILD], env=environment, stdout=subprocess.PIPE, text=True) for _ in range(6)]
    (built,) = {process.communicate(timeout=300)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0] * 6
    assert log.read_text().splitlines() == ["run"]
    assert ctypes.CDLL(built).carafepp_forward
    # no unfinished build remains
    assert {file.suffix for file in Path(built).parent.iterdir()} <= {".so", ".lock"}


def test_build_errors_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(cpu_build.BuildError, match=r"Install g\+\+ or clang\+\+"):
        cpu_build.build()
    write_script(tmp_path / "bin" / "c++", "echo cannot find 1>&2; exit 1")
    with pytest.raises(cpu_build.BuildError, match=r"(?s)cannot find.*C\+\+17"):
        cpu_build.build()
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(cpu_build.BuildError, match="Set XDG_CACHE_HOME"):
        cpu_build.build()


@pytest.fixture(scope="module")
def library(compiler):
    """The compiled library of this machine: its path and bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CXX", raising=False)
        built = cpu_build.build()
    return built, built.read_bytes()


def write_compiler(path: Path, library: tuple[Path, bytes], before: str = "") -> None:
    """Write a compiler that copies the library in place of half a minute's work."""
    write_script(path, f'{before}\nfor last; do :; done\ncp "{library[0]}" "$last"')


@pytest.fixture
def cache(tmp_path, monkeypatch, library):
    """An empty cache folder, with a quick compiler."""
    write_compiler(tmp_path / "bin" / "c++", library)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path / "cache" / "carafepp"


# runs in a process of its own, because a damaged library could end it
RUN = """
import torch
from carafepp.kernels import reassemble, reassemble_reference
x, logits = torch.randn(1, 4, 5, 6), torch.randn(1, 100, 5, 6)
y = reassemble(x, logits, kernel_size=5, up=2, backend="cpu")
torch.testing.assert_close(y, reassemble_reference(x, logits, kernel_size=5, up=2))
"""
DAMAGE = {
    "empty": lambda data: b"",
    "cut": lambda data: data[:4096],
    "cut at the end": lambda data: data[:-1],
    "a flipped bit": lambda data: data[:5000] + bytes([data[5000] ^ 1]) + data[5001:],
    "text": lambda data: b"text",
    "longer": lambda data: data + b"x",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_library_is_rebuilt(cache, library, damage):
    name, data = library[0].name, library[1]
    cache.mkdir(parents=True)
    (cache / name).write_bytes(DAMAGE[damage](data))
    (cache / name).chmod(0o755)
    assert cpu_build.build() == cache / name
    assert (cache / name).read_bytes() == data


@pytest.mark.parametrize("damage", ["cut", "another library"])
def test_the_operator_survives_a_damaged_library(cache, library, damage, compiler):
    name, data = library[0].name, library[1]
    cache.mkdir(parents=True)
    if damage == "cut":
        (cache / name).write_bytes(data[:4096])
    else:
        subprocess.run([compiler, "-shared", "-x", "c++", os.devnull, "-o", str(cache / name)], check=True)
    run_after_torch(RUN)
    assert (cache / name).read_bytes() == data


def test_a_library_that_others_can_write_is_rebuilt(cache, library, tmp_path):
    name, data = library[0].name, library[1]
    cache.mkdir(parents=True)
    path = cache / name
    for mode in (0o775, 0o757, 0o666):
        path.write_bytes(data)
        path.chmod(mode)
        before = path.stat().st_ino
        assert cpu_build.build() == path
        assert (path.stat().st_ino != before, stat.S_IMODE(path.stat().st_mode)) == (True, 0o755)
    (tmp_path / "elsewhere.so").write_bytes(data)
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere.so")
    assert cpu_build.build() == path
    assert not path.is_symlink()


def test_the_cache_folder_is_closed_to_others(cache):
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    cpu_build.build()
    assert stat.S_IMODE(cache.stat().st_mode) == 0o755


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files to others")
@pytest.mark.parametrize("what", ["folder", "library", "link"])
def test_what_belongs_to_another_user_is_not_opened(cache, library, tmp_path, what):
    name, data = library[0].name, library[1]
    cache.mkdir(parents=True)
    (cache / name).write_bytes(data)
    if what == "library":
        os.chown(cache / name, 12345, 12345)
        before = (cache / name).stat().st_ino
        cpu_build.build()
        assert ((cache / name).stat().st_ino != before, (cache / name).stat().st_uid) == (True, 0)
        return
    if what == "link":
        cache.rename(tmp_path / "mine")
        cache.symlink_to(tmp_path / "mine")
    os.chown(cache, 12345, 12345, follow_symlinks=False)
    with pytest.raises(cpu_build.BuildError, match=f"other users can write in the folder {cache}. Set XDG_CACHE_HOME"):
        cpu_build.build()


def test_cxx_is_honoured_and_the_next_compiler_tried(cache, tmp_path, monkeypatch, library):
    log = tmp_path / "log"
    write_compiler(tmp_path / "bin" / "my c++", library, f'echo "$1" >> "{log}"')
    monkeypatch.setenv("CXX", f"'{tmp_path}/bin/my c++' --own")
    assert cpu_build.build().exists()
    assert log.read_text() == "--own\n"
    broken = {"fails": "exit 1", "makes nothing": "exit 0", "makes an empty file": 'for last; do :; done; : > "$last"'}
    # another program that ends well, and one that does not exist
    for name, body in (broken | {"missing": None}).items():
        if body is not None:
            write_script(tmp_path / "bin" / name, body)
        monkeypatch.setenv("CXX", f"'{tmp_path}/bin/{name}'")
        assert ctypes.CDLL(str(cpu_build.build())).carafepp_backward
    monkeypatch.setenv("CXX", "g++ '")
    with pytest.raises(cpu_build.BuildError, match="CXX=g\\+\\+ ' is not the command of a compiler"):
        cpu_build.build()


def test_a_broken_first_compiler_is_not_the_end(cache, tmp_path, library):
    write_script(tmp_path / "bin" / "c++", "echo broken 1>&2; exit 1")
    write_compiler(tmp_path / "bin" / "g++", library)
    assert ctypes.CDLL(str(cpu_build.build())).carafepp_forward


def test_every_failure_is_told(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(cpu_build, "COMPILERS", ("c++", "g++"))
    write_script(tmp_path / "bin" / "c++", "exit 0")
    write_script(tmp_path / "bin" / "g++", "echo broken 1>&2; exit 1")
    with pytest.raises(cpu_build.BuildError, match=r"(?s)c\+\+ .* made a library that cannot be loaded.*g\+\+ .*broken.*C\+\+17"):
        cpu_build.build()
    assert {path.suffix for path in cache.iterdir()} <= {".lock"}


def test_no_home_is_needed(cache, tmp_path, monkeypatch):
    def no_entry(*arguments):
        raise KeyError("getpwuid(): uid not found")

    for name in ("HOME", "XDG_CACHE_HOME", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", no_entry)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    built = cpu_build.build()
    assert built.parent == tmp_path / f"carafepp-{os.geteuid()}"
    assert stat.S_IMODE(built.parent.stat().st_mode) == 0o700


WITHOUT_COMPILER = """
import warnings, torch
from carafepp.kernels import reassemble, reassemble_reference
x, logits = torch.randn(1, 4, 5, 6), torch.randn(1, 100, 5, 6)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        y = reassemble(x, logits, kernel_size=5, up=2)
torch.testing.assert_close(y, reassemble_reference(x, logits, kernel_size=5, up=2))
(warning,) = [w for w in caught if "carafepp" in str(w.message)]
assert "Install g++" in str(warning.message), warning
assert torch.equal(y, reassemble(x, logits, kernel_size=5, up=2, backend="torch"))
try:
    reassemble(x, logits, kernel_size=5, up=2, backend="cpu")
except RuntimeError as error:
    assert "Install g++" in str(error) and "'torch' runs without" in str(error), error
else:
    raise SystemExit("the forced kernel must not be replaced")
"""


def test_works_without_a_compiler_and_warns_once(tmp_path):
    run_after_torch(WITHOUT_COMPILER, XDG_CACHE_HOME=str(tmp_path), PATH=str(tmp_path))
