"""Compilation of the CPU kernel: once for all processes, with errors that say what to do, and the replacement without a compiler."""

import ctypes
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from carafepp.kernels.cpu import build as cpu_build
from commands import run_code

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
    run_code(WITHOUT_COMPILER, XDG_CACHE_HOME=str(tmp_path), PATH=str(tmp_path))
