"""The folders keep their direction: kernels <- models <- tasks <- scripts, under one import name."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ["kernels", "models", "tasks", "scripts"]
MODULES = [path for layer in LAYERS for path in sorted((ROOT / layer).glob("*.py"))]


def imported(path: Path) -> list[str]:
    """Absolute names of everything that a module of the package imports."""
    package = ["carafepp", path.parent.name]
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names += [f"{module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_imports_point_downwards(path):
    layer = LAYERS.index(path.parent.name)
    for name in imported(path):
        root, *rest = name.split(".")
        assert root not in [*LAYERS, "conf"], f"bare import of {name}: say carafepp.{name}"
        if root == "carafepp":
            assert LAYERS.index(rest[0]) <= layer, f"{path.parent.name} must not import {name}"


@pytest.mark.parametrize("path", [p for p in MODULES if p.parent.name == "kernels"], ids=lambda p: p.name)
def test_kernels_need_only_torch_and_triton(path):
    allowed = {"torch", "triton", "carafepp", "filelock", *sys.stdlib_module_names}
    assert {name.split(".")[0] for name in imported(path)} <= allowed


def test_no_bare_module_is_loaded():
    code = "import sys, carafepp.scripts.train; print(*(m for m in ('kernels', 'models', 'tasks', 'scripts', 'conf') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []


def test_packages_are_flat_and_listed():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert setuptools["packages"] == [f"carafepp.{folder}" for folder in [*LAYERS, "conf"]]
    nested = [path for layer in LAYERS for path in (ROOT / layer).rglob("*.py") if path.parent.name != layer]
    assert nested == []


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
