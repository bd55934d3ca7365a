"""The tables of docs/support.md: every cell is tried, and a cell that does not say "yes" must fail."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from carafepp.kernels import backends
from carafepp.models.detection import FasterRCNN
from carafepp.models.dlu import DLU
from carafepp.models.freq_fusion import FreqFusion
from carafepp.models.global_local import GlobalLocal
from carafepp.models.guided_samplers import A2U, FADE, SAPA
from carafepp.models.jbu import JBU
from carafepp.models.local_attention import LDAAQU
from carafepp.models.partial_conv import PartialGlobalLocal
from carafepp.models.psanet import PSANet
from carafepp.models.pspnet import PSPNet
from carafepp.models.resfu import ReSFU
from carafepp.models.resnet import ResNet
from carafepp.models.samplers import takes_size
from carafepp.models.upernet import UperNet
from configurations import choices, configured_sampler
from networks import DOWN, UP
from operator_cases import relative_error
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.utils._pytree import tree_leaves

from carafepp import reassemble, reassemble_weights

PAGE = Path(__file__).parent.parent / "docs" / "support.md"
pytestmark = pytest.mark.filterwarnings("ignore")


def read_table(title: str) -> dict[str, dict[str, str]]:
    """Read the cells of the table below a heading of the page, by row and column."""
    section = PAGE.read_text().split(f"## {title}\n")[1].split("\n## ")[0]
    header, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")]
    return {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in lines}


class Row(NamedTuple):
    """A row of the table of features.

    Attributes:
        make: makes the module.
        draw: draws its arguments for a map, or an image, of a height and a width.
        trace: makes a smaller module with the same code, for the exporter of ONNX, which takes seconds for a window of 5 x 5.
    """

    make: Callable[[], nn.Module]
    draw: Callable[[int, int], tuple[Tensor, ...]]
    trace: Callable[[], nn.Module] | None = None


class Operator(nn.Module):
    """`reassemble` with upsampling by 2."""

    def forward(self, x, logits, size=None):
        return reassemble(x, logits, kernel_size=3, up=2, size=size)


class OperatorOfWeights(nn.Module):
    """`reassemble_weights` with upsampling by 2."""

    def forward(self, x, weights):
        return reassemble_weights(x, weights, kernel_size=3, up=2)


def draw_map(h, w):
    return (torch.rand(2, 8, h, w),)


def draw_guided(h, w):
    return torch.rand(2, 8, h, w), torch.rand(2, 8, 2 * h, 2 * w)


def draw_images(h, w):
    return (torch.rand(2, 3, 8 * h - 3, 8 * w - 1),)


def draw_holes(h, w):
    return torch.rand(2, 3, 2 * h + 1, 2 * w - 1), (torch.rand(2, 1, 2 * h + 1, 2 * w - 1) < 0.3).float()


def shrink(sampler: type[nn.Module], *, options: dict[str, bool] | None = None, **attributes: int) -> Callable[[], nn.Module]:
    """Make the sampler with smaller windows, and with options of its constructor."""
    return lambda: type(sampler.__name__, (sampler,), attributes)(8, **(options or {}))


def list_samplers(group: str) -> dict[str, Row]:
    """Make a row of every sampler of a configuration group except CARAFE, which has rows of its own."""
    smaller = {
        "a2u": shrink(A2U, kernel_size=1, filter_size=2),
        "sapa": shrink(SAPA, kernel_size=1),
        "fade": shrink(FADE, kernel_size=1),
        "dlu": lambda: DLU(8, kernel_size=1),
        "lda_aqu": lambda: LDAAQU(8, kernel_size=1),
        # `dysample` exports the sampling, and `jbu` the similarities
        "resfu": shrink(ReSFU, kernel_size=1),
        "jbu": shrink(JBU, radius=1),
        "freq_fusion": shrink(FreqFusion, options={"resample": False}, lowpass_size=1, highpass_size=1),
    }
    rows = {}
    for name in choices(group):
        slot = configured_sampler(group, name) if name not in ("carafe", "published", "shared") else None
        if slot is not None:
            draw = draw_guided if getattr(slot.func, "needs_guide", False) else draw_map
            rows[f"`{name}`"] = Row(lambda slot=slot: slot(8), draw, smaller.get(name))
    return rows


def make_backbone(**options):
    return ResNet((1, 1), width=4, **options)


OPERATORS = {
    "`reassemble`": Row(Operator, lambda h, w: (torch.rand(2, 8, h, w), torch.rand(2, 36, h, w))),
    "`reassemble_weights`": Row(OperatorOfWeights, lambda h, w: (torch.rand(2, 8, h, w), torch.rand(2, 9, 2 * h, 2 * w))),
    "`CARAFE(up=2)`": Row(lambda: UP(8), draw_map, lambda: UP(8, kernel_size=1)),
    "`CARAFE(down=2)`": Row(lambda: DOWN(8), draw_map, lambda: DOWN(8, kernel_size=1)),
}
SAMPLERS = list_samplers("upsampler") | list_samplers("downsampler")
NETWORKS = {
    "ResNet": Row(lambda: make_backbone(downsample=DOWN, num_classes=3), draw_images),
    "UperNet": Row(lambda: UperNet(make_backbone(), 3, ppm=UP, fpn=FADE, fuse=UP, fpn_dim=8, ppm_dim=4, pool_scales=(1, 2)), draw_images),
    "PSPNet": Row(lambda: PSPNet(make_backbone(output_stride=8), 3, ppm=UP, dim=8, ppm_dim=4, pool_scales=(1, 2)), draw_images),
    "PSANet": Row(lambda: PSANet(make_backbone(output_stride=8), 3, dim=8, mask_size=3), draw_images),
    "pyramid of a detector": Row(lambda: FasterRCNN(3, backbone=make_backbone(), fpn=UP, fpn_dim=8, head_dim=8).backbone, draw_images),
    "`GlobalLocal`": Row(lambda: GlobalLocal(4, downsample=DOWN, upsample=UP), draw_holes),
    "`PartialGlobalLocal`": Row(lambda: PartialGlobalLocal(4, downsample=DOWN, upsample=UP), draw_holes),
}
ROWS = OPERATORS | SAMPLERS | NETWORKS


def assert_equal(actual, expected, tolerance=1e-5):
    for a, e in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        assert a.shape == e.shape
        assert relative_error(a, e.double()) <= tolerance


def sum_outputs(module, parameters, *arguments):
    return sum(y.float().sin().sum() for y in tree_leaves(functional_call(module, parameters, arguments)))


def leaves_of(module, arguments):
    """Return what a gradient is asked for: parameters, or arguments of a module that has none."""
    return list(module.parameters()) or [argument.requires_grad_() for argument in arguments]


def try_any_size(row):
    module = row.make().eval()
    for h, w in ((5, 4), (3, 1), (2, 7)):
        arguments = row.draw(h, w)
        y = module(*arguments)
        assert all(t.isfinite().all() for t in tree_leaves(y))
        if takes_size(module) and tuple(y.shape[2:]) == (2 * h, 2 * w):
            for size in ((2 * h + 1, 2 * w - 1), (2 * h - 1, 2 * w + 1)):
                assert module(*arguments, size=size).shape[2:] == size


def try_channels_last(row):
    module, arguments = row.make().eval(), row.draw(4, 5)
    expected = module(*arguments)
    actual = module.to(memory_format=torch.channels_last)(*(t.contiguous(memory_format=torch.channels_last) for t in arguments))
    assert_equal(actual, expected)
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in tree_leaves(actual) if y.dim() == 4)


def try_autocast(row):
    module, arguments = row.make(), row.draw(4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = tree_leaves(module(*arguments))
    if leaves := [y for y in outputs if y.requires_grad]:
        sum(y.float().mean() for y in leaves).backward()
    assert all(y.isfinite().all() for y in outputs)
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


def try_double_backward(row):
    module, arguments = row.make().double(), tuple(t.double() for t in row.draw(4, 5))
    leaves = leaves_of(module, arguments)
    loss = sum(y.sin().sum() for y in tree_leaves(module(*arguments)))
    gradients = torch.autograd.grad(loss, leaves, create_graph=True)
    second = torch.autograd.grad(sum(gradient.square().sum() for gradient in gradients), leaves)
    assert all(gradient.isfinite().all() for gradient in second)


def try_torch_func(row):
    module = row.make().eval()
    parameters = dict(module.named_parameters())
    stacks = [torch.stack(maps) for maps in zip(row.draw(4, 5), row.draw(4, 5), strict=True)]
    which = tuple(range(len(stacks) + 1)) if parameters else tuple(range(1, len(stacks) + 1))
    compute = grad(lambda p, *arguments: sum_outputs(module, p, *arguments), which)
    torch._C._functorch._set_vmap_fallback_enabled(False)
    try:
        gradients = vmap(compute, (None, *[0] * len(stacks)))(parameters, *stacks)
    finally:
        torch._C._functorch._set_vmap_fallback_enabled(True)
    for i in range(2):
        expected = compute(parameters, *(stack[i] for stack in stacks))
        torch.testing.assert_close([t[i] for t in tree_leaves(gradients)], tree_leaves(expected), rtol=1e-3, atol=1e-3)


def try_forward_mode(row):
    module, arguments = row.make().eval().double(), tuple(t.double() for t in row.draw(4, 5))
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    tangents = {name: parameter.cos() for name, parameter in parameters.items()}
    directions = tuple(argument.cos() for argument in arguments)

    def compute(parameters, *arguments):
        return sum_outputs(module, parameters, *arguments).double()

    _, tangent = (
        jvp(compute, (parameters, *arguments), (tangents, *directions))
        if parameters
        else jvp(lambda *arguments: compute({}, *arguments), arguments, directions)
    )
    assert tangent.isfinite()


def try_fx(row):
    module = row.make().eval()
    traced = torch.fx.symbolic_trace(module)
    for size in ((4, 5), (3, 7)):
        arguments = row.draw(*size)
        assert_equal(traced(*arguments), module(*arguments))


def try_compile(row):
    torch.compiler.reset()
    module, arguments = row.make().eval(), row.draw(4, 5)
    assert_equal(torch.compile(module, fullgraph=True, backend="eager")(*arguments), module(*arguments))


def try_export(row):
    module, arguments = row.make().eval(), row.draw(4, 6)
    any_size = {axis: torch.export.Dim.AUTO for axis in (0, 2, 3)}
    program = torch.export.export(module, arguments, dynamic_shapes=[any_size] * len(arguments))
    arguments = row.draw(3, 5)
    assert_equal(program.module()(*arguments), module(*arguments))


def try_onnx(row):
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime, of the extra `export`")
    pytest.importorskip("onnxscript", reason="needs onnxscript, of the extra `export`")
    module, arguments = (row.trace or row.make)().eval(), row.draw(4, 6)
    # an axis has one name in arguments of one size
    names = {size: f"axis {i}" for i, size in enumerate({size for t in arguments for size in t.shape[2:]})}
    dims = tuple({0: "batch", 2: names[t.shape[2]], 3: names[t.shape[3]]} for t in arguments)
    program = torch.onnx.export(module, arguments, dynamo=True, dynamic_shapes=dims, verbose=False, optimize=False)
    session = runtime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    arguments = row.draw(3, 5)
    feed = {node.name: argument.numpy() for node, argument in zip(session.get_inputs(), arguments, strict=True)}
    with torch.no_grad():
        assert_equal([torch.from_numpy(y) for y in session.run(None, feed)], module(*arguments), tolerance=1e-4)


COLUMNS = {
    "any size": try_any_size,
    "channels_last": try_channels_last,
    "autocast": try_autocast,
    "double backward": try_double_backward,
    "torch.func": try_torch_func,
    "forward mode": try_forward_mode,
    "torch.fx": try_fx,
    "torch.compile": try_compile,
    "torch.export": try_export,
    "ONNX": try_onnx,
}


# tests/models/test_samplers.py compiles and exports every sampler, test_compile.py compiles the networks, and tests/test_onnx.py exports
# networks, which takes up to half a minute; the files of `a2u_pool` are those of `a2u` and of CARAFE(down=2)
ELSEWHERE = [(row, column) for row in SAMPLERS for column in ("torch.compile", "torch.export")]
ELSEWHERE += [(row, column) for row in NETWORKS for column in ("torch.compile", "ONNX") if (row, column) != ("PSANet", "ONNX")]
ELSEWHERE += [("`a2u_pool`", "ONNX")]
# conversion to ONNX takes most of the time
CELLS = [
    pytest.param(row, column, marks=pytest.mark.slow if column == "ONNX" else ())
    for row in ROWS
    for column in COLUMNS
    if (row, column) not in ELSEWHERE
]


def test_the_table_has_every_row_and_column():
    table = read_table("Features")
    assert all(table[row][column] == "yes" for row, column in ELSEWHERE)
    assert list(table) == list(ROWS)
    assert all(list(cells) == list(COLUMNS) for cells in table.values())
    page = PAGE.read_text()
    notes = {note for cells in table.values() for cell in cells.values() for note in re.findall(r"\[\^\w+\]", cell)}
    assert all(f"\n{note}: " in page for note in notes)


@pytest.mark.parametrize(("row", "column"), CELLS)
def test_a_cell_says_what_happens(row, column):
    torch.manual_seed(0)
    cell = read_table("Features")[row][column]
    if cell == "yes":
        COLUMNS[column](ROWS[row])
    else:
        assert re.fullmatch(r"no\[\^\w+\]", cell)
        with pytest.raises(Exception, match=r"."):
            COLUMNS[column](ROWS[row])


DEVICES = {
    "CPU with a C++ compiler": ("cpu", True),
    "NVIDIA or AMD GPU with Triton": ("cuda", True),
    "NVIDIA or AMD GPU without Triton": ("cuda", False),
    "MPS": ("mps", True),
    "XPU and other devices": ("xpu", True),
}
WITHOUT_COMPILER = "CPU without a C++ compiler"


def test_the_table_of_devices_names_the_backends(monkeypatch):
    table = read_table("Devices")
    assert set(table) == {*DEVICES, WITHOUT_COMPILER}
    # tests/kernels/cpu/test_build.py takes the compiler away
    assert table.pop(WITHOUT_COMPILER) == {str(dtype).removeprefix("torch."): "torch" for dtype in backends.DTYPES["torch"]}
    for row, cells in table.items():
        kind, has_triton = DEVICES[row]
        monkeypatch.setattr(backends, "HAS_TRITON", has_triton)
        for dtype, cell in cells.items():
            if not cell.startswith("none"):
                assert cell == backends.default_backend(kind, getattr(torch, dtype)), (row, dtype)


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"], indirect=True)
def test_the_op_of_a_graph_is_that_of_the_page(backend):
    class Module(nn.Module):
        def forward(self, x, logits):
            return reassemble(x, logits, kernel_size=3, up=2, backend=backend)

    arguments = torch.rand(2, 8, 4, 5), torch.rand(2, 36, 4, 5)
    program = torch.export.export(Module(), arguments)
    ops = {node.target.namespace for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
    assert ("carafepp" in ops) == (backend != "reference")
    torch.compiler.reset()
    assert_equal(torch.compile(Module(), fullgraph=True, backend="eager")(*arguments), Module()(*arguments))


def test_torch_jit_script_is_refused_by_name():
    for module in (UP(8), nn.Sequential(nn.ReLU(), DOWN(8))):
        with pytest.raises(TypeError, match=r"torch\.jit\.script cannot compile CARAFE.*torch\.export\.export or torch\.compile"):
            torch.jit.script(module)


def test_the_code_of_the_page_runs():
    names = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(code, names)
    assert names["gradients"]["0.content_encoder.weight"].shape == (16, 100, 64, 3, 3)
    assert names["quantised"](names["images"]).shape == names["y"].shape == (16, 8, 22, 18)
