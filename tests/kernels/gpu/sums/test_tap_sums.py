"""Forward as a sum over taps: results on the emulator and in the interpreter, the choice, the code, and the memory of a call."""

import math

import pytest
import torch
from carafepp.kernels.geometry import BORDERS, LSE_NORMALIZERS, NORMALIZERS, Spec
from torch import Tensor

pytest.importorskip("triton")

from carafepp.kernels.gpu import backend
from carafepp.kernels.gpu import launch as launching
from carafepp.kernels.gpu.assembly import compile_launch, read_assembly
from carafepp.kernels.gpu.operator_launches import INTERPRETED, backward_launches, forward_launches
from carafepp.kernels.gpu.sums import tap_sums
from carafepp.kernels.gpu.sums.tap_sums import MAX_REGISTERS, SMALLEST, sums_taps
from carafepp.kernels.gpu.training_step import build_training_step
from carafepp.kernels.reassembly import reassemble
from carafepp.kernels.reference import reassemble_reference
from commands import run_in_interpreter
from operator_cases import TRITON_TOLERANCES, arrange, differentiate, log_sum_exp, random_inputs, relative_error
from ptx_step import emulate, fill_scratch

NHWC = torch.channels_last
HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32
NAMES = ["weigh_sites", "sum_taps"]


@pytest.fixture
def sums(monkeypatch):
    """Sum over taps in small maps as well, and of few channels."""
    monkeypatch.setattr(tap_sums, "SMALLEST", 0)
    monkeypatch.setattr(tap_sums, "MOST_WEIGHTS", 1000)


def run(launches, capability=80):
    for launch in launches:
        if INTERPRETED:
            launch.interpret()
        else:
            emulate(launch, capability)


def sum_forward(x: Tensor, logits: Tensor, spec: Spec, *, size=None, capability=80) -> tuple[Tensor, Tensor, Tensor]:
    """Return y in channels_last, the logits as cells, and the log-sum-exp; what is not written stays NaN."""
    n, c, h, w = x.shape
    cells = logits.unflatten(1, (spec.groups * spec.taps, spec.up, spec.up))
    lse = torch.full((n, spec.groups, *cells.shape[2:]) if spec.normalizer in LSE_NORMALIZERS else (0,), math.nan)
    y = arrange(torch.full((n, c, *(size or (spec.output_size(h), spec.output_size(w)))), math.nan), "channels_last")
    launches = forward_launches(x, cells, y, lse, spec, capability=divmod(capability, 10))
    assert [launch.kernel.__name__ for launch in launches] == NAMES
    fill_scratch(launches)
    run(launches, capability)
    return y, cells, lse


def channels_of_more(x: Tensor) -> Tensor:
    """Return the same features as channels 1 to C of a larger map, so that no run of them is aligned."""
    larger = torch.full((x.shape[0], x.shape[1] + 2, *x.shape[2:]), math.nan).contiguous(memory_format=NHWC)
    return larger[:, 1:-1].copy_(x)


def columns_of_more(x: Tensor) -> Tensor:
    """Return the same features as columns of a wider map."""
    wider = torch.full((*x.shape[:3], x.shape[3] + 3), math.nan).contiguous(memory_format=NHWC)
    return wider[..., 2:-1].copy_(x)


# n, c, h, w, options: sizes that no block divides, and channels that do not fill one, or more than one. A map of one pixel or one channel
# is no map in channels_last.
CASES = [
    (1, 64, 6, 11, Spec(5, up=2)),
    (1, 2, 7, 5, Spec(3, up=2, groups=2, normalizer="none")),
    (1, 70, 3, 2, Spec(7, up=2, normalizer="sigmoid")),
    (1, 20, 1, 2, Spec(5, up=2, border="renormalize")),
    (2, 12, 5, 7, Spec(3, up=3, groups=2, normalizer="sigmoid_normalized")),
    (1, 16, 3, 4, Spec(3, up=4, border="replicate")),
    (1, 20, 7, 11, Spec(5, down=2, border="renormalize")),
    (1, 64, 13, 9, Spec(3, down=3, normalizer="sigmoid")),
    (1, 130, 5, 3, Spec(3)),
    (1, 8, 3, 5, Spec(1, up=2)),
    (1, 6, 7, 5, Spec(5, up=3, down=2, groups=3)),
    (1, 4, 7, 5, Spec(3, up=2, down=3, border="renormalize")),
    (1, 8, 7, 5, Spec(3, up=2, border="shift", normalizer="sigmoid_normalized")),
    (1, 6, 7, 9, Spec(5, down=2, border="shift", normalizer="none")),
    (1, 4, 7, 5, Spec(3, up=3, down=2, border="replicate", normalizer="sigmoid")),
    (1, 4, 2, 1, Spec(3, up=5, groups=2)),
]


@pytest.mark.usefixtures("sums")
@pytest.mark.parametrize(("case", "capability"), [(case, (80, 90)[i % 2]) for i, case in enumerate(CASES)], ids=str)
def test_results_match_float64(case, capability):
    *size, spec = case
    x, logits, _ = random_inputs(*size, spec, FLOAT, "channels_last")
    y, _, lse = sum_forward(x, logits, spec, capability=capability)
    expected = reassemble_reference(x.double(), logits.double(), **spec._asdict())
    assert relative_error(y, expected) < TRITON_TOLERANCES[FLOAT]
    if spec.normalizer in LSE_NORMALIZERS:
        assert relative_error(lse, log_sum_exp(logits.double(), spec, *size[2:])) < TRITON_TOLERANCES[FLOAT]


def test_the_cases_have_every_option():
    specs = [case[-1] for case in CASES]
    assert {spec.normalizer for spec in specs} == set(NORMALIZERS)
    assert {spec.border for spec in specs} == set(BORDERS)


@pytest.mark.usefixtures("sums")
@pytest.mark.parametrize(
    ("view", "logit_layout", "spec", "shorter", "capability"),
    [
        (channels_of_more, "channels_last", Spec(3, up=2), 0, 80),
        (columns_of_more, "contiguous", Spec(3, down=2), 0, 90),
        # as in a pyramid whose finer map has an odd number of rows
        (lambda x: x, "contiguous", Spec(5, up=2, groups=2), 1, 90),
        (lambda x: x, "sliced", Spec(3, up=3, border="renormalize"), 2, 80),
    ],
)
def test_features_and_logits_of_any_layout(view, logit_layout, spec, shorter, capability):
    x, logits, _ = random_inputs(1, 20, 7, 6, spec, FLOAT, ("channels_last", logit_layout, "channels_last"))
    size = spec.output_size(7) - shorter, spec.output_size(6)
    y, *_ = sum_forward(view(x), logits, spec, size=size, capability=capability)
    expected = reassemble_reference(x.double(), logits.double(), **spec._asdict(), size=size)
    assert relative_error(y, expected) < TRITON_TOLERANCES[FLOAT]


@pytest.mark.usefixtures("sums")
@pytest.mark.parametrize(
    ("spec", "value"),
    [
        (Spec(3, up=2), math.nan),
        (Spec(5, down=2), math.inf),
        (Spec(3, up=3, down=2, border="renormalize"), math.inf),
        (Spec(5, up=2, border="replicate"), math.nan),
        (Spec(3, down=2, border="shift"), math.inf),
    ],
    ids=str,
)
def test_a_pixel_that_is_not_finite_spoils_the_windows_that_contain_it(spec, value):
    """Taps outside the map are weighed 0 and read its nearest pixel, which the window contains as well."""
    x, logits, _ = random_inputs(1, 4, 9, 7, spec, FLOAT, "channels_last")
    # a corner, and a pixel inside, in different channels
    x[0, 1, 0, 0] = x[0, 3, 5, 3] = value
    y, *_ = sum_forward(x, logits, spec)
    expected = reassemble_reference(x.double(), logits.double(), **spec._asdict())
    assert torch.equal(y.isfinite(), expected.isfinite())
    assert 0 < y.isfinite().sum() < y.numel()
    torch.testing.assert_close(y[y.isfinite()].double(), expected[y.isfinite()], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("sums")
@pytest.mark.parametrize("spec", [Spec(3, up=2), Spec(3, up=3, down=2, groups=2, normalizer="sigmoid_normalized", border="shift")], ids=str)
def test_gradients_read_the_log_sum_exp(spec):
    x, logits, dy = random_inputs(1, 8, 5, 4, spec, FLOAT, "channels_last")
    y, cells, lse = sum_forward(x, logits, spec)
    dx, dlogits = (torch.full_like(t, math.nan) for t in (x, logits))
    launches = backward_launches(dy, x, cells, lse, dx, dlogits.unflatten(1, cells.shape[1:4]), spec)
    fill_scratch(launches)
    run(launches)
    expected = differentiate(reassemble_reference, x.double(), logits.double(), dy.double(), **spec._asdict())
    for name, result in {"y": y, "dx": dx, "dlogits": dlogits}.items():
        assert relative_error(result, expected[name]) < TRITON_TOLERANCES[FLOAT], name


def test_results_in_the_interpreter():
    assert "2 passed" in run_in_interpreter(__file__, "gradients_read")


UP, DOWN = Spec(5, up=2), Spec(5, down=2)
# the smallest maps of 64 channels whose output has SMALLEST bytes
ROWS = SMALLEST // 4 // 64 // 64


@pytest.mark.parametrize(
    ("size", "spec", "dtype", "memory_format", "sums"),
    [
        ((1, 64, ROWS // 2, 32), UP, FLOAT, NHWC, True),
        ((1, 64, ROWS // 2 - 1, 32), UP, FLOAT, NHWC, False),
        ((1, 64, ROWS * 2, 128), DOWN, FLOAT, NHWC, True),
        ((1, 64, ROWS * 2 - 2, 128), DOWN, FLOAT, NHWC, False),
        # images and groups count
        ((4, 64, ROWS // 4, 16), UP._replace(groups=2), FLOAT, NHWC, True),
        ((2, 64, ROWS // 4, 16), UP._replace(groups=2), FLOAT, NHWC, False),
        # the weights would need several times the memory of the output
        ((4, 64, ROWS, 32), UP._replace(groups=16), FLOAT, NHWC, False),
        ((1, 64, 3, 3), UP._replace(border="replicate"), FLOAT, NHWC, True),
        ((1, 64, 3, 3), UP._replace(border="shift"), FLOAT, NHWC, True),
        ((1, 64, 3, 3), UP._replace(border="renormalize"), FLOAT, NHWC, False),
        ((4, 64, ROWS, 32), UP, FLOAT, torch.contiguous_format, False),
        ((1, 64, 3, 3), UP._replace(border="shift"), FLOAT, torch.contiguous_format, False),
        ((4, 64, ROWS, 32), UP, HALF, NHWC, False),
        ((4, 64, ROWS, 32), UP, BF16, NHWC, False),
        ((4, 64, ROWS, 32), UP._replace(border="replicate"), BF16, NHWC, False),
    ],
)
def test_large_maps_in_float32_and_channels_last_are_summed(size, spec, dtype, memory_format, sums):
    step = build_training_step(*size, spec, dtype, memory_format)
    assert sums_taps(step.problem()) is sums
    names = [launch.kernel.__name__ for launch in step.build_launches("forward")]
    assert (names == NAMES) is sums
    assert sums or not {*names} & {*NAMES}


def test_a_compiler_that_merges_sums_gets_one_for_each_site(monkeypatch):
    monkeypatch.setattr(tap_sums, "MERGES_SUMS", True)
    for spec, sums in ((UP, False), (DOWN, True), (Spec(5, up=3, down=2), True), (UP._replace(border="shift"), False)):
        assert sums_taps(build_training_step(4, 64, ROWS * 2, 64, spec, FLOAT, NHWC).problem()) is sums


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("size", "spec"),
    [
        # sites of conf/sites/paper.yaml: fpn_p3, mask_head, resnet_224_stem, upernet_p3
        ((2, 256, 100, 168), UP),
        ((512, 256, 14, 14), UP),
        ((64, 64, 112, 112), DOWN),
        ((2, 512, 60, 76), UP),
        ((1, 128, 33, 47), Spec(7, up=3, groups=4)),
        ((1, 64, 128, 128), Spec(5, up=3, down=2)),
        ((2, 256, 100, 168), UP._replace(border="shift")),
    ],
    ids=str,
)
def test_assembly_spills_nothing(size, spec, capability):
    launches = build_training_step(*size, spec, FLOAT, NHWC).build_launches("forward", capability=divmod(capability, 10))
    assert [launch.kernel.__name__ for launch in launches] == NAMES
    for launch in launches:
        assembly = read_assembly(compile_launch(launch, capability))
        assert assembly.spills == 0
        assert assembly.registers <= MAX_REGISTERS
        assert assembly.blocks > 0
        assert not assembly.tensor_core


def test_the_plan_of_a_call_allocates_its_weights(monkeypatch):
    started = []

    class Compiled:
        """Code that only notes with which arguments it is started."""

        def __init__(self, launch):
            self.launch = launch

        def __getitem__(self, grid):
            return lambda *values: started.append((self.launch.kernel.__name__, dict(zip(self.launch.arguments, values, strict=False))))

    monkeypatch.setattr(launching, "compile_for_current_device", Compiled)
    monkeypatch.setattr(backend, "INTERPRETED", False)
    monkeypatch.setattr(backend, "check_device", lambda _: None)
    monkeypatch.setattr(backend, "plans", launching.Plans(4))
    step = build_training_step(2, 64, ROWS // 4, 32, UP, FLOAT, NHWC, "cpu")
    for _ in range(2):
        backend.forward(step.x, step.logits, step.y, step.lse, step.spec)
    # those of a site after the last one, which its neighbour in the row loads, are in memory of the call as well
    weights = (2 * ROWS // 4 * 32 + 1) * 25 * 4
    # a multiple of the alignment of tensors in it
    memory = -(-4 * weights // 256) * 256
    assert [(plan.own_bytes, plan.offsets, len(plan.launches)) for plan in backend.plans.values()] == [(memory, (0,), 2)]
    assert [name for name, _ in started] == 2 * NAMES
    for (_, weighed), (_, summed) in zip(started[::2], started[1::2], strict=True):
        assert weighed["logits"][0] == step.logits.data_ptr()
        assert weighed["weights_ptr"] == summed["weights_ptr"]
        assert (summed["x"][0], summed["y"][0]) == (step.x.data_ptr(), step.y.data_ptr())


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.gpu
@gpu
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    "spec", [UP, DOWN, Spec(3, up=3, down=2, groups=2), UP._replace(border="renormalize"), DOWN._replace(border="shift")], ids=str
)
def test_gpu_results_at_large_sizes(spec):
    x, logits, _ = random_inputs(2, 256, 96, 104, spec, FLOAT, "channels_last", device="cuda")
    options = spec._asdict()
    expected = reassemble_reference(x.double(), logits.double(), **options)
    assert relative_error(reassemble(x, logits, **options), expected) < TRITON_TOLERANCES[FLOAT]
