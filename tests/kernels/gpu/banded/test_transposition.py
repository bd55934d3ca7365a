"""Kernels that read a channels_last copy of features in NCHW: the copy, results on the emulator, the choice, and the memory of a call."""

import math

import pytest
import torch
from carafepp.kernels.geometry import LSE_NORMALIZERS, Spec

pytest.importorskip("triton")

from carafepp.kernels.gpu import backend, operator_launches
from carafepp.kernels.gpu import launch as launching
from carafepp.kernels.gpu.banded.transposition import transpose_launch
from carafepp.kernels.gpu.operator_launches import INTERPRETED, backward_launches, forward_launches
from carafepp.kernels.gpu.tiles import tables
from carafepp.kernels.gpu.tiles.geometry import Tile
from carafepp.kernels.gpu.training_step import build_training_step
from carafepp.kernels.reassembly import reassemble
from carafepp.kernels.reference import reassemble_reference
from commands import run_in_interpreter
from operator_cases import TRITON_TOLERANCES, arrange, differentiate, random_inputs, relative_error
from ptx_step import emulate

HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("size", "dtype", "view", "rows"),
    [
        ((2, 72, 6, 11), HALF, lambda x: x, 1),
        ((3, 40, 5, 8), FLOAT, lambda x: x[:, 3:], 1),
        # rows that do not follow one another, in vectors and without
        ((2, 8, 9, 88), HALF, lambda x: x[..., 8:80], 9),
        ((2, 8, 9, 13), FLOAT, lambda x: x[..., 1:], 9),
        ((1, 8, 9, 13), HALF, lambda x: x.transpose(2, 3), 13),
        ((1, 1, 9, 13), HALF, lambda x: x.expand(2, 5, 9, 13), 1),
    ],
)
def test_a_copy_holds_the_features_of_any_layout(size, dtype, view, rows):
    features = view(torch.randn(size).to(dtype))
    launch, copy = transpose_launch(features)
    assert launch.arguments["sizes"].h == rows
    emulate(launch)
    assert torch.equal(copy, features)


SLOW = pytest.mark.slow
UP, GROUPS, DOWN = Spec(5, up=2), Spec(5, up=2, groups=2), Spec(5, down=2)
RATIONAL = Spec(3, up=3, down=2, normalizer="sigmoid")
# tiles of 1 x 8, 4 x 4 and 2 x 2 cells; what is not said is one split, four warps and two stages
WIDE, SQUARE, SMALL = Tile(1, 8, 1, 64, 1, 4, 2), Tile(4, 4, 1, 32, 1, 4, 2), Tile(2, 2, 1, 32, 1, 4, 2)


@pytest.mark.parametrize(
    ("size", "spec", "dtype", "layout", "tiles", "capability"),
    [
        ((1, 20, 9, 12), DOWN, HALF, "sliced", (SQUARE._replace(num_warps=2), SQUARE), 80),
        pytest.param((1, 72, 9, 10), UP, HALF, "contiguous", (WIDE, WIDE), 90, marks=SLOW),
        pytest.param((2, 40, 6, 8), GROUPS, BF16, "contiguous", (SQUARE, SQUARE._replace(num_stages=3)), 90, marks=SLOW),
        pytest.param((1, 70, 6, 11), UP, FLOAT, "contiguous", (WIDE, WIDE._replace(block_c=32)), 90, marks=SLOW),
        pytest.param((1, 64, 9, 12), DOWN, FLOAT, "contiguous", (WIDE._replace(cells_w=4), SQUARE), 90, marks=SLOW),
        pytest.param((1, 5, 5, 7), RATIONAL, HALF, "contiguous", (SMALL._replace(num_warps=2), SMALL), 80, marks=SLOW),
    ],
)
def test_results_match_float64(size, spec, dtype, layout, tiles, capability):
    x, logits, dy = random_inputs(*size, spec, dtype, layout)
    cells = logits.unflatten(1, (spec.groups * spec.taps, spec.up, spec.up))
    lse = torch.full((size[0], spec.groups, *cells.shape[2:]), math.nan) if spec.normalizer in LSE_NORMALIZERS else torch.empty(0)
    # what is not written stays NaN
    y, dlogits = (arrange(torch.full(t.shape, math.nan, dtype=dtype), layout) for t in (dy, logits))
    dcells = dlogits.unflatten(1, cells.shape[1:4])
    pair = divmod(capability, 10)
    forward, logit_gradient = (tile._replace(transposed=1) for tile in tiles)
    launches = [
        *forward_launches(x, cells, y, lse, spec, tile=forward, capability=pair),
        *backward_launches(dy, x, cells, lse, None, dcells, spec, tile=logit_gradient, capability=pair),
    ]
    assert [launch.kernel.__name__ for launch in launches[::2]] == ["transpose"] * 2
    for launch in launches:
        if INTERPRETED:
            launch.interpret()
        else:
            emulate(launch, capability)
    expected = differentiate(reassemble_reference, x.double(), logits.double(), dy.double(), **spec._asdict())
    for name, result in {"y": y, "dlogits": dlogits}.items():
        assert relative_error(result, expected[name]) < TRITON_TOLERANCES[dtype], name


# minutes of compiled code, step by step
@pytest.mark.slow
def test_results_in_the_interpreter():
    assert "6 passed" in run_in_interpreter(__file__, "test_results_match_float64")


class Compiled:
    """Code that only notes with which arguments it is started."""

    def __init__(self, launch, started):
        self.launch, self.started = launch, started

    def __getitem__(self, grid):
        return lambda *values: self.started.append((self.launch.kernel.__name__, dict(zip(self.launch.arguments, values, strict=False))))


def test_the_plan_of_a_call_does_not_keep_its_copy(monkeypatch):
    started = []
    monkeypatch.setattr(launching, "compile_for_current_device", lambda launch: Compiled(launch, started))
    monkeypatch.setattr(backend, "INTERPRETED", False)
    monkeypatch.setattr(backend, "check_device", lambda _: None)
    monkeypatch.setattr(backend, "plans", launching.Plans(4))
    monkeypatch.setattr(tables, "list_tiles", lambda *_: [])
    monkeypatch.setattr(operator_launches, "choose_tile", lambda *_: Tile(1, 8, 1, 64, 1, 4, 2, transposed=1))
    monkeypatch.setattr(operator_launches, "choose_backward", lambda *_: ("logit_gradient", "source_gradient"))
    step = build_training_step(2, 64, 8, 16, Spec(5, up=2), HALF, torch.contiguous_format, "cpu")
    dx, dlogits = torch.empty_like(step.x), torch.empty_like(step.logits)
    for _ in range(2):
        backend.forward(step.x, step.logits, step.y, step.lse, step.spec)
        backend.backward(step.y, step.x, step.logits, step.lse, dx, dlogits, step.spec)
    # the launch that reads the copy writes the weights
    copy, weights = (2 * values * 8 * 16 * 2 for values in (64, 100))
    assert [(plan.own_bytes, plan.offsets) for plan in backend.plans.values()] == [(copy, (0,)), (copy + weights, (0, copy))]
    names = ["transpose", "banded_forward", "transpose", "banded_backward", "banded_backward"]
    assert [name for name, _ in started] == 2 * names
    for (_, copied), (_, read) in zip(started[::5] + started[2::5], started[1::5] + started[3::5], strict=True):
        assert copied["source"][0] == step.x.data_ptr() != copied["copy"][0] == read["x"][0]
    for (_, weighed), (_, read) in zip(started[3::5], started[4::5], strict=True):
        assert weighed["logits"][0] == step.logits.data_ptr() != weighed["weights"][0] == read["logits"][0]
        # the gradient to the features reads dy, and fills dx, where they are
        assert read["dy"][0] == step.y.data_ptr()
        assert read["dx"][0] == dx.data_ptr()


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", [HALF, FLOAT])
def test_gpu_results_in_a_graph_are_those_outside_and_memory_is_free_afterwards(dtype):
    spec = Spec(5, up=2)
    x, logits, dy = random_inputs(8, 256, 64, 64, spec, dtype, device="cuda")
    x, logits = x.requires_grad_(), logits.requires_grad_()

    def run():
        y = reassemble(x, logits, kernel_size=5, up=2)
        return (y, *torch.autograd.grad(y, (x, logits), dy))

    run()
    used = torch.cuda.memory_allocated()
    results = run()
    assert torch.cuda.memory_allocated() <= used + sum(t.numel() * t.element_size() + 512 for t in results)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = run()
    graph.replay()
    # bit by bit: nothing depends on the order of programs
    assert all(map(torch.equal, recorded, results))
