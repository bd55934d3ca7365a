"""The names of `import carafepp` from a checkout, an editable install and a wheel, and the cost of the import."""

import importlib.metadata
import os
import shutil
import tomllib
from pathlib import Path

import pytest
from commands import run_after_torch, run_code

import carafepp

ROOT = Path(__file__).parent.parent
PACKAGES = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]

# an editable install adds the checkout to every interpreter of its environment
NOT_INSTALLED = 'import sys\nsys.meta_path = [f for f in sys.meta_path if "__editable__" not in getattr(f, "__module__", "")]\n'
USE = """
import pathlib
import carafepp, torch
from carafepp import CARAFE, convert_state_dict, reassemble, reassemble_weights
assert CARAFE(4, up=2)(torch.rand(1, 4, 3, 5)).shape == (1, 4, 6, 10)
assert not convert_state_dict(CARAFE(4).state_dict(), CARAFE(4)).missing
assert reassemble(torch.rand(1, 4, 3, 5), torch.rand(1, 9, 3, 5), kernel_size=3).shape == (1, 4, 3, 5)
assert reassemble_weights(torch.rand(1, 4, 3, 5), torch.rand(1, 9, 3, 5), kernel_size=3).shape == (1, 4, 3, 5)
from carafepp.kernels import reassembly
from carafepp.models import carafe
print(carafepp.__version__, *(pathlib.Path(module.__file__).resolve().parent for module in (carafepp, reassembly, carafe)))
"""


def run(code: str, path: tuple[Path, ...] = (ROOT,)):
    """Run `code` in an interpreter that has imported torch, and looks for modules in `path`."""
    return run_after_torch(NOT_INSTALLED + code, PYTHONPATH=os.pathsep.join(map(str, path)))


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the modules where the wheel installs them."""
    site = tmp_path_factory.mktemp("site")
    for name, folder in [("carafepp", "carafepp"), *PACKAGES.items()]:
        target = site / name.replace(".", "/")
        target.mkdir(exist_ok=True)
        for file in (ROOT / folder).iterdir():
            if file.is_file():
                shutil.copy(file, target)
    return site


@pytest.mark.parametrize("case", ["checkout", "installed", "checkout before installed", "checkout as current folder"])
def test_names_come_from_one_place(case, installed):
    found = {
        "checkout": lambda: run(USE),
        "installed": lambda: run(USE, path=(installed,)),
        "checkout before installed": lambda: run(USE, path=(ROOT, installed)),
        "checkout as current folder": lambda: run_code(NOT_INSTALLED + USE, isolated=False, cwd=ROOT, PYTHONPATH=str(installed)),
    }[case]()
    base = {"carafepp": ROOT, "kernels": ROOT, "models": ROOT}
    if case == "installed":
        base |= dict.fromkeys(("kernels", "models"), installed / "carafepp") | {"carafepp": installed}
    assert found.stdout.split() == ["0.1.0", *(str(folder / name) for name, folder in base.items())]


def test_version_is_that_of_the_metadata():
    assert carafepp.__version__ == importlib.metadata.version("carafepp")


def test_unknown_names_are_refused():
    assert {"CARAFE", "__version__", "convert_state_dict", "reassemble", "reassemble_weights"} <= set(dir(carafepp))
    with pytest.raises(AttributeError, match="module 'carafepp' has no attribute 'carafe'"):
        _ = carafepp.carafe


def test_import_alone_loads_no_torch():
    code = 'import carafepp; assert carafepp.__version__; assert not {"torch", "numpy"} & set(sys.modules)'
    run_code(NOT_INSTALLED + code, PYTHONPATH=str(ROOT))


FORBIDDEN = {"hydra", "lightning", "omegaconf", "torch._dynamo", "torch._inductor", "torch.utils.flop_counter", "torchvision", "triton"}
WITHOUT_HEAVY_MODULES = f"""
import subprocess
def refuse(*args, **kwargs):
    raise AssertionError(f"started {{args}}")
from carafepp import CARAFE
import torch
start, subprocess.Popen = subprocess.Popen, refuse
net = CARAFE(4, up=2)
net.to("meta")(torch.rand(1, 4, 3, 5, device="meta")).sum().backward()
subprocess.Popen = start
from carafepp import reassemble
x, logits = torch.rand(1, 4, 3, 5, requires_grad=True), torch.rand(1, 36, 3, 5, requires_grad=True)
for backend in (None, "torch"):
    reassemble(x, logits, kernel_size=3, up=2, backend=backend).sum().backward()
loaded = {FORBIDDEN!r} & set(sys.modules)
assert not loaded, loaded
"""


def test_using_the_module_loads_nothing_heavy_and_starts_no_compiler():
    run(WITHOUT_HEAVY_MODULES)


def test_import_takes_less_than_a_fifth_of_a_second_beyond_torch():
    code = """
import time
start = time.process_time()
import carafepp.models.carafe
from carafepp import CARAFE
print(time.process_time() - start)
"""
    # other processes slow a run down, nothing speeds it up
    assert min(float(run(code).stdout) for _ in range(3)) < 0.2


COUNT = """
with FlopCounterMode(display=False) as counter:
    y = reassemble(x, logits, kernel_size=3, up=2)
    y.sum().backward()
assert counter.get_total_flops() == 2 * 9 * y.numel() * 3, counter.get_total_flops()
assert not any(type(finder).__module__.startswith("carafepp") for finder in sys.meta_path)
"""
INPUTS = "import torch\nx, logits = torch.rand(1, 4, 3, 5, requires_grad=True), torch.rand(1, 36, 3, 5, requires_grad=True)\n"
FACE = "from carafepp import reassemble\n"
COUNTER = "from torch.utils.flop_counter import FlopCounterMode\n"


@pytest.mark.parametrize(
    "imports",
    [
        FACE + COUNTER,
        COUNTER + FACE,
        FACE + "reassemble(x, logits, kernel_size=3, up=2)\n" + COUNTER,
        FACE + 'import importlib.util; assert importlib.util.find_spec("torch.utils.flop_counter")\n' + COUNTER,
    ],
    ids=["after", "before", "after a call", "after a search"],
)
def test_flops_are_counted_whichever_is_imported_first(imports):
    run(INPUTS + imports + COUNT)
