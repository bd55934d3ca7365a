"""The folders keep their direction: kernels <- models <- tasks <- scripts, under one import name."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ["kernels", "models", "tasks", "scripts"]
MODULES = [path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]


def package_of(path: Path) -> list[str]:
    """The package that a module is in, from carafepp on."""
    return ["carafepp", *path.relative_to(ROOT).parent.parts]


def imported(path: Path) -> list[str]:
    """Absolute names of everything that a module of the package imports."""
    package = package_of(path)
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names += [f"{module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path):
    layer = LAYERS.index(package_of(path)[1])
    for name in imported(path):
        root, *rest = name.split(".")
        assert root not in [*LAYERS, "conf"], f"bare import of {name}: say carafepp.{name}"
        if root == "carafepp":
            assert LAYERS.index(rest[0]) <= layer, f"{path.relative_to(ROOT)} must not import {name}"


@pytest.mark.parametrize("path", [p for p in MODULES if package_of(p)[1] == "kernels"], ids=lambda p: str(p.relative_to(ROOT)))
def test_kernels_need_only_torch_and_triton(path):
    allowed = {"torch", "triton", "carafepp", "filelock", *sys.stdlib_module_names}
    assert {name.split(".")[0] for name in imported(path)} <= allowed


def test_no_bare_module_is_loaded():
    code = "import sys, carafepp.scripts.train; print(*(m for m in ('kernels', 'models', 'tasks', 'scripts', 'conf') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []


def test_every_package_is_listed():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = [*sorted({path.parent.relative_to(ROOT) for path in MODULES}), Path("conf")]
    expected = {f"carafepp.{'.'.join(folder.parts)}": folder.as_posix() for folder in folders}
    assert setuptools["package-dir"] == expected
    assert set(setuptools["packages"]) == {"carafepp", *expected}


def test_package_imports_and_computes_where_triton_is_missing():
    code = """
import sys
sys.modules["triton"] = None  # import triton now raises ImportError, as on macOS and Windows
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "triton" else find_spec(name, package)
import torch
from carafepp.kernels import reassemble, reassemble_reference
import carafepp.models.upernet, carafepp.tasks.segmentation, carafepp.scripts.train
x, logits = torch.randn(1, 4, 5, 7, requires_grad=True), torch.randn(1, 100, 5, 7, requires_grad=True)
y = reassemble(x, logits, kernel_size=5, up=2)
torch.testing.assert_close(y, reassemble_reference(x, logits, kernel_size=5, up=2))
y.sum().backward()
try:
    reassemble(x, logits, kernel_size=5, up=2, backend="triton")
except ValueError as error:
    assert "triton" in str(error)
else:
    raise SystemExit("a missing triton must be reported")
print("computed")
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["computed"], done.stderr
