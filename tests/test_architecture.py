"""The folders keep their direction under one import name, and private names stay private.

The direction is kernels <- models <- integrations and tasks <- scripts.
"""

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import run_code

ROOT = Path(__file__).parent.parent
LAYERS = ["kernels", "models", "integrations", "tasks", "scripts"]
MODULES = [path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]


def package_of(path: Path) -> list[str]:
    """The package that a module is in, from carafepp on."""
    return ["carafepp", *path.relative_to(ROOT).parent.parts]


def nodes(tree: ast.AST, at_import: bool = False) -> Iterator[ast.AST]:
    """Yield every node of a tree; with `at_import`, only those that run when the module is imported."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        if not (at_import and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)):
            yield from nodes(child, at_import)


def imported(path: Path, at_import: bool = False) -> list[str]:
    """Absolute names of everything that a module of the package imports."""
    package = package_of(path)
    names = []
    for node in nodes(ast.parse(path.read_text()), at_import):
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
            assert rest[0] in LAYERS, f"{path.relative_to(ROOT)} imports {name} from the public face: say where it is defined"
            assert LAYERS.index(rest[0]) <= layer, f"{path.relative_to(ROOT)} must not import {name}"
            # what serves other people's networks is no part of ours
            assert rest[0] != "integrations" or LAYERS[layer] != "tasks", f"{path.relative_to(ROOT)} must not import {name}"


KERNELS = pytest.mark.parametrize("path", [p for p in MODULES if package_of(p)[1] == "kernels"], ids=lambda p: str(p.relative_to(ROOT)))


@KERNELS
def test_implementations_are_loaded_by_choice_only(path):
    """kernels/ holds the code that all backends share. The implementations import it, and not each other."""
    rooms = ("carafepp.kernels.cpu", "carafepp.kernels.gpu")
    room = ".".join(package_of(path)[:3])
    if room in rooms:
        agreed = ("carafepp.kernels.execution.", "carafepp.kernels.geometry.", "carafepp.kernels.reference.")
        for name in imported(path):
            assert not name.startswith("carafepp.") or name.startswith((f"{room}.", *agreed)), f"{path.relative_to(ROOT)} imports {name}"
    else:
        # backends.py imports the one that it has chosen
        names = imported(path, at_import=path.name == "backends.py")
        assert not [name for name in names if name.startswith(rooms)]


@KERNELS
def test_kernels_need_only_torch_and_triton(path):
    allowed = {"torch", "triton", "carafepp", "filelock", *sys.stdlib_module_names}
    assert {name.split(".")[0] for name in imported(path)} <= allowed


def is_private(name: object) -> bool:
    # the methods of a NamedTuple are public
    public = {"_asdict", "_fields", "_make", "_replace"}
    return isinstance(name, str) and name.startswith("_") and not name.startswith("__") and name not in public


def root_of(node: ast.AST) -> str | None:
    """The name that a chain of attributes starts with: a in a.b.c."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def foreign_private_names(path: Path) -> Iterator[str]:
    """Yield the private names of other modules of this project that a file imports, reads or patches."""
    tree = ast.parse(path.read_text())
    ours = set()  # names that are bound to something of this project
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            ours |= {(alias.asname or alias.name).split(".")[0] for alias in node.names if alias.name.split(".")[0] in OWN}
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] in OWN):
            ours |= {alias.asname or alias.name for alias in node.names}
            yield from (f"{node.module}.{alias.name}" for alias in node.names if is_private(alias.name))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and root_of(node) in ours:
            yield ast.unparse(node)
        elif isinstance(node, ast.Call) and len(node.args) > 1 and root_of(node.args[0]) in ours:
            # getattr, monkeypatch.setattr, mock.patch.object
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(name.value):
                yield f"{ast.unparse(node.args[0])}.{name.value}"


# modules of tests/support are imported by their bare names
OWN = {"carafepp", *(path.stem for path in (ROOT / "tests" / "support").iterdir())}
FILES = [*MODULES, ROOT / "carafepp" / "__init__.py", *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "examples").glob("*.py"))]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_private_names_are_used_at_home_only(path):
    assert list(foreign_private_names(path)) == []


PLANTED = """
from carafepp.kernels import registration, reference
from .registration import _forward
import torch
registration._backward, reference.normalize._cache, torch._C, registration.Options._fields
monkeypatch.setattr(registration, "_forward", None)
"""


def test_private_names_are_found(tmp_path):
    (tmp_path / "planted.py").write_text(PLANTED)
    expected = {"registration._forward", "registration._backward", "reference.normalize._cache"}
    assert set(foreign_private_names(tmp_path / "planted.py")) == expected


def test_no_bare_module_is_loaded():
    code = f"import sys, carafepp.scripts.train; print(*(m for m in {[*LAYERS, 'conf']} if m in sys.modules))"
    assert run_code(code, cwd=ROOT).stdout.split() == []


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
import carafepp.models.resnet, carafepp.models.upernet, carafepp.tasks.segmentation, carafepp.scripts.train
from carafepp.models.carafe import CARAFE
x, logits = torch.randn(1, 4, 5, 7, requires_grad=True), torch.randn(1, 100, 5, 7, requires_grad=True)
y = reassemble(x, logits, kernel_size=5, up=2)
torch.testing.assert_close(y, reassemble_reference(x, logits, kernel_size=5, up=2))
y.sum().backward()
y = CARAFE(8, up=2)(torch.rand(1, 8, 3, 4))
y.sum().backward()
assert y.shape == (1, 8, 6, 8)
try:
    reassemble(x, logits, kernel_size=5, up=2, backend="triton")
except ValueError as error:
    assert "triton" in str(error)
else:
    raise SystemExit("a missing triton must be reported")
print("computed")
"""
    assert run_code(code, cwd=ROOT).stdout.split() == ["computed"]
