"""A launch as data: the properties that its code depends on, and repeated starts by a plan."""

import pytest
import torch
from carafepp.kernels.execution import Options, find_layouts, view_cells
from carafepp.kernels.geometry import Spec

triton = pytest.importorskip("triton")

from carafepp.kernels.gpu import backend, operator_launches  # noqa: E402
from carafepp.kernels.gpu import launch as launching  # noqa: E402
from carafepp.kernels.gpu.launch import Launch, Plan  # noqa: E402
from carafepp.kernels.gpu.tiles.geometry import DIRECTIONS  # noqa: E402
from carafepp.kernels.gpu.tiles.ranking import choose_tile  # noqa: E402
from carafepp.kernels.gpu.training_step import build_training_step  # noqa: E402

SPECS = (Spec(5, up=2), Spec(5, up=2, groups=2), Spec(3, up=12))
FORMATS = (torch.contiguous_format, torch.channels_last)


def launches(c, h, w, spec, memory_format=torch.contiguous_format, device="meta") -> list[Launch]:
    """The launches of a training step, with the tiles that are chosen for maps of 24 x 20."""
    first, step = (build_training_step(1, c, *size, spec, torch.float16, memory_format, device) for size in ((24, 20), (h, w)))
    tiles = {direction: choose_tile(direction, first.problem()) for direction in DIRECTIONS}
    return [launch for direction, tile in tiles.items() for launch in step.build_launches(direction, tile=tile)]


def code(*arguments) -> list[str]:
    return [launch.source().hash() for launch in launches(*arguments)]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_maps_of_any_size_share_their_code(spec, memory_format):
    # rows of all of them are multiples of a vector; some sizes are multiples of 16, and one is 1
    assert code(32, 24, 20, spec, memory_format) == code(32, 16, 32, spec, memory_format) == code(32, 1, 20, spec, memory_format)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_code_depends_on_channels_and_groups(memory_format):
    assert code(64, 24, 20, Spec(5, up=2), memory_format)[0] != code(72, 24, 20, Spec(5, up=2), memory_format)[0]
    assert code(64, 24, 20, Spec(5, up=2), memory_format)[0] != code(64, 24, 20, Spec(5, up=2, groups=2), memory_format)[0]


def test_a_stride_of_one_is_compiled_in():
    launch = launches(32, 24, 20, Spec(5, up=2))[0]
    sizes, x, logits, y, lse = launch.arguments.values()
    assert x.stride_w == y.stride_w == logits.stride_w == sizes.groups == 1
    passed = [*sizes[1:], *x[:-1], *logits[:-1], *y[:-1], lse]
    assert all(a is b if isinstance(b, torch.Tensor) else a == b for a, b in zip(launch.parameters(), passed, strict=True))


class Compiled:
    """Code that only notes how it is started."""

    def __init__(self):
        self.started = []

    def __getitem__(self, grid):
        return lambda *values: self.started.append((grid, values))


@pytest.mark.parametrize("spec", SPECS)
def test_a_plan_starts_its_kernel_with_the_tensors_of_the_call(spec, monkeypatch):
    compiled = Compiled()
    monkeypatch.setattr(launching, "compile_for_current_device", lambda _: compiled)
    for launch in launches(32, 24, 20, spec, device="cpu"):
        # the place of a tensor that a kernel does not touch is filled by another one of its tensors
        tensors = list({id(t): t for t in launch.parameters() if isinstance(t, torch.Tensor)}.values())
        plan = Plan(launch, tensors)
        for first in (16, 1600):
            given = range(first, first + len(tensors))
            plan.run(given)
            grid, values = compiled.started[-1]
            assert grid == launch.grid
            addresses = {id(tensor): address for tensor, address in zip(tensors, given, strict=True)}
            expected = [
                addresses[id(a)] if isinstance(a, torch.Tensor) else (addresses[id(a[0])], *a[1:]) if isinstance(a[0], torch.Tensor) else a
                for a in launch.arguments.values()
            ]
            assert values == (*expected, *launch.constants.values())


@pytest.fixture
def planned(monkeypatch):
    """The sources of the launches that are planned when the backend, outside the interpreter, runs on CPU tensors without a kernel."""
    sources = []

    def compile_nothing(launch):
        sources.append(launch.source().hash())
        return Compiled()

    monkeypatch.setattr(launching, "compile_for_current_device", compile_nothing)
    monkeypatch.setattr(backend, "INTERPRETED", False)
    monkeypatch.setattr(backend, "check_device", lambda _: None)
    monkeypatch.setattr(backend, "plans", launching.Plans(backend.plans.most))
    return sources


def call(height, width, *, offset=0):
    """Run both passes on maps of a size; the map of x begins `offset` elements after a multiple of 16 bytes."""
    spec = Spec(3, up=2)
    x = torch.empty(8 * height * width + 8, dtype=torch.float16)[offset:][: 8 * height * width].view(1, 8, height, width)
    logits, lse = torch.empty(1, 9, 2, 2, height, width, dtype=torch.float16), torch.empty(1, 1, 2, 2, height, width)
    y = torch.empty(1, 8, 2 * height, 2 * width, dtype=torch.float16)
    backend.forward(x, logits, y, lse, spec)
    backend.backward(y, x, logits, lse, x, logits, spec)


def test_code_is_planned_once_for_each_alignment(planned):
    for offset in (0, 1, 0, 1):
        call(6, 8, offset=offset)
    # forward and backward
    assert len(planned) == len(set(planned)) == 4


def test_a_call_with_one_tensor_in_two_places_plans_for_calls_with_two(planned, monkeypatch):
    """As `torch.autograd.grad(y, x, x)` does, where y is as large as x."""
    compiled, spec = Compiled(), Spec(3)
    monkeypatch.setattr(launching, "compile_for_current_device", lambda _: compiled)
    x, dy, dx = (torch.empty(1, 8, 4, 4) for _ in range(3))
    logits, lse = torch.empty(1, 9, 1, 1, 4, 4), torch.empty(1, 1, 1, 1, 4, 4)
    *_, launch = operator_launches.backward_launches(dy, x, logits, lse, dx, None, spec)
    for gradient in (x, dy):
        backend.backward(gradient, x, logits, lse, dx, None, spec)
        _, values = compiled.started[-1]
        given = dict(zip(launch.arguments, values, strict=False))
        assert (given["dy"][0], given["dx"][0]) == (gradient.data_ptr(), dx.data_ptr())
    # the launch of the weights, and that of the gradient
    assert len(compiled.started) == 4
    assert len(backend.plans) == 1


@pytest.mark.parametrize(
    ("channels", "spec"), [(36, Spec(3, up=2)), (48, Spec(3, up=2)), (50, Spec(5, down=2, groups=2, normalizer="none"))], ids=str
)
def test_logits_that_are_no_cells_start_the_same_launches(channels, spec, planned, monkeypatch):
    """Calls of the operator make no view of the logits, of which there may be more channels than are read."""
    compiled = Compiled()
    monkeypatch.setattr(launching, "compile_for_current_device", lambda _: compiled)
    options = Options((spec.output_size(6), spec.output_size(5)), *spec, False, "triton")
    for c, stored in ((8, torch.contiguous_format), (16, torch.contiguous_format), (8, torch.channels_last), (8, torch.contiguous_format)):
        x = torch.empty(2, c, 6, 5).contiguous(memory_format=torch.channels_last)
        layouts = find_layouts(x.shape, x.stride(), options)
        logits, dlogits = (torch.empty(2, channels, spec.cells(6), spec.cells(5)).contiguous(memory_format=stored) for _ in range(2))
        y, dx, lse = x.new_empty_strided(layouts.y_shape, layouts.y_strides), torch.empty_like(x), torch.empty(layouts.lse_shape)
        cells, dcells = view_cells(logits, layouts), view_cells(dlogits, layouts)
        for run, given, general, as_cells in (
            (backend.run_forward, (x, logits, y, lse), backend.forward, (x, cells, y, lse)),
            (backend.run_backward, (y, x, logits, lse, dx, dlogits), backend.backward, (y, x, cells, lse, dx, dcells)),
            (backend.run_backward, (y, x, logits, lse, None, dlogits), backend.backward, (y, x, cells, lse, None, dcells)),
            (backend.run_backward, (y, x, logits, lse, dx, None), backend.backward, (y, x, cells, lse, dx, None)),
        ):
            compiled.started.clear()
            run(*given, layouts)
            started = list(compiled.started)
            compiled.started.clear()
            general(*as_cells, spec)
            assert started == compiled.started != []
    # those of cells are others
    assert len(backend.plans) == 3 * 8


def test_every_size_of_images_is_planned_once(planned):
    sizes = [(height, width) for height in range(1, 26, 6) for width in range(1, 21)]
    for _ in range(2):
        for size in sizes:
            call(*size)
    assert len(planned) == len(backend.plans) == 2 * len(sizes)
    # those of 500 sizes
    assert backend.plans.most >= 1000
    # maps of all sizes whose rows have the same alignment share code, which is compiled once
    assert len(set(planned)) < 30


def test_the_oldest_plan_makes_room(planned, monkeypatch):
    monkeypatch.setattr(backend, "plans", launching.Plans(8))
    for width in range(1, 11):
        call(1, width)
        call(1, 10)
    assert len(backend.plans) == 8
    before = len(planned)
    call(1, 10)
    call(1, 8)
    assert len(planned) == before
    call(1, 1)
    assert len(planned) == before + 2
