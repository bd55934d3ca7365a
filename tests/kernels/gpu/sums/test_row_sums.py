"""Sums over rows in NCHW: results on the emulator and in the interpreter, the choice, the code, and the memory of a call."""

import math

import pytest
import torch
from carafepp.kernels.geometry import LSE_NORMALIZERS, NORMALIZERS, Spec
from torch import Tensor

pytest.importorskip("triton")

from carafepp.kernels.gpu.assembly import compile_launch, read_assembly
from carafepp.kernels.gpu.operator_launches import INTERPRETED, backward_launches, forward_launches
from carafepp.kernels.gpu.sums import row_gradients, row_runs, row_sums
from carafepp.kernels.gpu.sums.row_runs import MAX_REGISTERS, SMALLEST, sums_rows
from carafepp.kernels.gpu.training_step import build_training_step
from carafepp.kernels.reassembly import reassemble
from carafepp.kernels.reference import reassemble_reference
from commands import run_in_interpreter
from operator_cases import TRITON_TOLERANCES, differentiate, log_sum_exp, random_inputs, relative_error
from ptx_step import emulate, fill_scratch

NCHW = torch.contiguous_format
HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32
UP, DOWN = Spec(5, up=2), Spec(5, down=2)


@pytest.fixture
def sums(monkeypatch):
    """Sum over rows in small maps as well."""
    for limit in ("SMALLEST", "SMALLEST_SINGLE", "LEAST_FILLED"):
        monkeypatch.setattr(row_runs, limit, 0)


def run(launches, names, capability=80):
    assert [launch.kernel.__name__ for launch in launches] == names
    fill_scratch(launches)
    for launch in launches:
        if INTERPRETED:
            launch.interpret()
        else:
            emulate(launch, capability)


def sum_both(x: Tensor, logits: Tensor, dy: Tensor, spec: Spec, capability: int = 80) -> dict[str, Tensor]:
    """Return y, the log-sum-exp and the gradient to the logits; what is not written stays NaN."""
    n, groups, up = x.shape[0], spec.groups, spec.up
    cells = logits.unflatten(1, (groups * spec.taps, up, up))
    lse = torch.full((n, groups, *cells.shape[2:]) if spec.normalizer in LSE_NORMALIZERS else (0,), math.nan)
    y, dlogits = torch.full_like(dy, math.nan), torch.full_like(logits, math.nan)
    pair = divmod(capability, 10)
    if sums_rows("forward", build_training_step(*x.shape, spec, x.dtype, NCHW).problem(pair)):
        run(forward_launches(x, cells, y, lse, spec, capability=pair), ["sum_rows"], capability)
    else:
        y.copy_(reassemble_reference(x.float(), logits.float(), **spec._asdict()))
        lse.copy_(log_sum_exp(logits.double(), spec, *x.shape[2:]))
    if sums_rows("logit_gradient", build_training_step(*x.shape, spec, x.dtype, NCHW).problem(pair)):
        launches = backward_launches(dy, x, cells, lse, None, dlogits.unflatten(1, cells.shape[1:4]), spec, capability=pair)
        run(launches, ["sum_row_gradients", "normalize_gradients"], capability)
    else:
        expected = differentiate(reassemble_reference, x.float(), logits.float(), dy.float(), size=dy.shape[2:], **spec._asdict())
        dlogits.copy_(expected["dlogits"])
    return {"y": y, "lse": lse, "dlogits": dlogits}


def check(x: Tensor, logits: Tensor, dy: Tensor, spec: Spec, capability: int = 80) -> None:
    results = sum_both(x, logits, dy, spec, capability)
    expected = differentiate(reassemble_reference, x.double(), logits.double(), dy.double(), size=dy.shape[2:], **spec._asdict())
    for name in ("y", "dlogits"):
        assert relative_error(results[name], expected[name]) < TRITON_TOLERANCES[x.dtype], name
    if spec.normalizer in LSE_NORMALIZERS:
        assert relative_error(results["lse"], log_sum_exp(logits.double(), spec, *x.shape[2:])) < TRITON_TOLERANCES[FLOAT]


# n, c, h, w, options, data type: sizes that no block divides, vectors of one, two and four pixels, maps as high as the window and narrower
CASES = [
    (1, 3, 5, 12, UP, FLOAT),
    (2, 4, 4, 5, Spec(3, up=2, groups=2, normalizer="none"), FLOAT),
    (1, 3, 6, 1, Spec(3, up=2, border="renormalize"), FLOAT),
    (1, 5, 4, 38, Spec(3, up=2, border="renormalize", normalizer="sigmoid_normalized"), FLOAT),
    (2, 4, 5, 7, Spec(3, up=3, groups=2, normalizer="sigmoid_normalized"), FLOAT),
    (1, 3, 3, 4, Spec(3, up=4), FLOAT),
    (1, 3, 11, 20, Spec(3, down=2, border="renormalize"), FLOAT),
    (1, 2, 13, 9, Spec(3, down=3, normalizer="sigmoid"), FLOAT),
    (1, 3, 5, 3, Spec(3), FLOAT),
    (1, 1, 3, 5, Spec(1, up=2), FLOAT),
    # single sub-columns, whose runs are counted from row to row
    (1, 3, 9, 5, Spec(7, up=3), FLOAT),
    (2, 4, 7, 43, Spec(7, up=4, groups=2, border="renormalize", normalizer="sigmoid_normalized"), FLOAT),
    (1, 2, 11, 1, Spec(9, up=2, normalizer="none"), FLOAT),
    (1, 13, 12, 16, DOWN, HALF),
    (2, 10, 9, 10, Spec(3, down=2, groups=2, normalizer="sigmoid_normalized"), BF16),
]


@pytest.mark.usefixtures("sums")
@pytest.mark.parametrize(("case", "capability"), [(case, (80, 90)[i % 2]) for i, case in enumerate(CASES)], ids=str)
def test_results_match_float64(case, capability):
    *size, spec, dtype = case
    check(*random_inputs(*size, spec, dtype, "contiguous"), spec, capability)


def test_the_cases_have_every_option():
    specs = [case[-2] for case in CASES]
    assert {spec.normalizer for spec in specs} == set(NORMALIZERS)
    assert {spec.border for spec in specs} == {"zero", "renormalize"}


@pytest.mark.usefixtures("sums")
@pytest.mark.parametrize(("parts", "warps"), [(2, 4), (4, 4), (1, 8), (2, 8)])
def test_warps_that_share_runs_add_their_sums(monkeypatch, parts, warps):
    spec = Spec(3, up=2)
    monkeypatch.setattr(row_gradients, "share_runs", lambda _, runs: runs._replace(parts=parts, rows=runs.rows * warps // 4 // parts))
    check(*random_inputs(1, 8, 9, 20, spec, FLOAT, "contiguous"), spec, 90)


@pytest.mark.usefixtures("sums")
@pytest.mark.parametrize("split", [1, 3])
def test_programs_that_share_runs_compute_all_channels(monkeypatch, split):
    monkeypatch.setattr(row_sums, "split_channels", lambda _, runs: runs._replace(split=split))
    spec = Spec(3, up=2)
    check(*random_inputs(1, 7, 6, 10, spec, FLOAT, "contiguous"), spec)


def columns_of_more(x: Tensor) -> Tensor:
    """Return the same features as columns of a wider map."""
    wider = torch.full((*x.shape[:3], x.shape[3] + 3), math.nan)
    return wider[..., 2:-1].copy_(x)


@pytest.mark.usefixtures("sums")
@pytest.mark.parametrize(
    ("view", "logit_layout", "spec", "shorter"),
    [
        (columns_of_more, "contiguous", Spec(3, up=2), (0, 0)),
        (lambda x: x, "channels_last", Spec(3, down=2), (0, 0)),
        # as in a pyramid whose finer map has an odd number of rows
        (lambda x: x, "contiguous", Spec(3, up=2, groups=2), (1, 0)),
        (lambda x: x, "contiguous", Spec(3, up=2), (1, 1)),
        (lambda x: x, "sliced", Spec(3, up=3, border="renormalize"), (2, 0)),
        (columns_of_more, "channels_last", Spec(7, up=3, groups=2), (2, 1)),
    ],
)
def test_features_and_logits_of_any_layout(view, logit_layout, spec, shorter):
    x, logits, dy = random_inputs(1, 4, 7, 6, spec, FLOAT, ("contiguous", logit_layout, "contiguous"))
    check(view(x), logits, dy[:, :, : dy.shape[2] - shorter[0], : dy.shape[3] - shorter[1]], spec)


@pytest.mark.usefixtures("sums")
@pytest.mark.parametrize(("spec", "value"), [(Spec(3, up=2), math.nan), (Spec(3, down=2, border="renormalize"), math.inf)], ids=str)
def test_a_pixel_that_is_not_finite_spoils_the_windows_near_it(spec, value):
    """Taps outside the map are weighed 0 and read pixels near its border."""
    x, logits, dy = random_inputs(1, 4, 14, 16, spec, FLOAT, "contiguous")
    # inside, further from the border than a window
    x[0, 3, 6, 7] = value
    y = sum_both(x, logits, dy, spec)["y"]
    expected = reassemble_reference(x.double(), logits.double(), **spec._asdict())
    assert torch.equal(y.isfinite(), expected.isfinite())
    torch.testing.assert_close(y[y.isfinite()].double(), expected[y.isfinite()], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("sums")
def test_offsets_of_64_bits(monkeypatch):
    import triton.language as tl
    from carafepp.kernels.gpu import operator_launches

    monkeypatch.setattr(operator_launches, "offset_type", lambda *_: tl.int64)
    check(*random_inputs(1, 3, 6, 8, Spec(3, up=2), FLOAT, "contiguous"), Spec(3, up=2))


@pytest.mark.usefixtures("sums")
@pytest.mark.parametrize("spec", [Spec(3, up=2), Spec(3, down=2, groups=2, normalizer="sigmoid_normalized")], ids=str)
def test_the_interpreter_agrees(spec):
    check(*random_inputs(1, 4, 6, 7, spec, FLOAT, "contiguous"), spec)


def test_results_in_the_interpreter():
    assert "2 passed" in run_in_interpreter(__file__, "interpreter_agrees")


# the fewest rows of 64 channels and 64 columns of targets with SMALLEST bytes in float32
ROWS = SMALLEST // 4 // 64 // 64


@pytest.mark.parametrize(
    ("size", "spec", "dtype", "memory_format", "forward", "gradient"),
    [
        ((1, 64, ROWS // 2, 32), UP, FLOAT, NCHW, True, True),
        ((1, 64, ROWS // 2 - 1, 32), UP, FLOAT, NCHW, False, False),
        # features count where they are the larger map
        ((1, 64, ROWS, 64), DOWN, FLOAT, NCHW, True, True),
        ((4, 64, ROWS, 64), DOWN, HALF, NCHW, False, True),
        ((4, 64, ROWS, 64), UP, HALF, NCHW, False, False),
        ((4, 64, ROWS, 64), Spec(5), BF16, NCHW, False, False),
        # fewer rows than the window
        ((1, 64, 4, 2**18), UP, FLOAT, NCHW, False, False),
        # most threads would have no targets
        ((1, 64, 2**18, 4), UP, FLOAT, NCHW, False, False),
        ((2048, 256, 7, 7), UP, FLOAT, NCHW, False, False),
        ((512, 256, 14, 14), UP, FLOAT, NCHW, True, True),
        # the sums would need more memory than the features
        ((64, 12, 112, 112), DOWN._replace(groups=2), HALF, NCHW, False, False),
        # more weights than registers: a thread has a single target where a group has few channels
        ((1, 64, ROWS, 64), Spec(7, up=3), FLOAT, NCHW, False, False),
        ((1, 128, 33, 47), Spec(7, up=3, groups=4), FLOAT, NCHW, True, False),
        ((1, 128, 33, 47), Spec(7, up=3, groups=4), HALF, NCHW, False, False),
        ((1, 128, 20, 40), Spec(7, up=3, groups=4), FLOAT, NCHW, False, False),
        ((1, 128, 66, 66), Spec(11, up=3, groups=4), FLOAT, NCHW, False, False),
        ((1, 64, ROWS, 64), Spec(7, up=2), FLOAT, NCHW, True, True),
        ((1, 64, ROWS, 64), Spec(5, up=3, down=2), FLOAT, NCHW, False, False),
        ((1, 64, ROWS, 64), UP._replace(border="replicate"), FLOAT, NCHW, False, False),
        ((1, 64, ROWS, 64), UP, FLOAT, torch.channels_last, False, False),
    ],
)
def test_large_maps_in_nchw_are_summed(size, spec, dtype, memory_format, forward, gradient):
    step = build_training_step(*size, spec, dtype, memory_format)
    problem = step.problem()
    assert [sums_rows(kernel, problem) for kernel in ("forward", "logit_gradient")] == [forward, gradient]
    assert ([launch.kernel.__name__ for launch in step.build_launches("forward")] == ["sum_rows"]) is forward
    assert ("sum_row_gradients" in [launch.kernel.__name__ for launch in step.build_launches("backward")]) is gradient


def test_scales_whose_sub_rows_are_more_than_threads_of_a_program():
    step = build_training_step(1, 64, 16, 16, Spec(1, up=32), FLOAT, NCHW)
    (launch,) = step.build_launches("forward", capability=(9, 0))
    assert launch.kernel.__name__ == "sum_rows"
    assert launch.constants["RUNS"].steps == 1


def test_a_compiler_that_merges_sums_gets_none(monkeypatch):
    monkeypatch.setattr(row_runs, "MERGES_SUMS", True)
    assert not sums_rows("forward", build_training_step(4, 64, ROWS, 64, UP, FLOAT, NCHW).problem())


@pytest.mark.parametrize(
    ("size", "spec", "dtype", "capability"),
    [
        # sites of conf/sites/paper.yaml: fpn_p3, mask_head, resnet_224_stem
        ((2, 256, 100, 168), UP, FLOAT, 90),
        ((512, 256, 14, 14), UP, FLOAT, 80),
        ((64, 64, 112, 112), DOWN, FLOAT, 80),
        ((64, 64, 112, 112), DOWN, HALF, 90),
        ((4, 512, 64, 64), UP, FLOAT, 90),
        ((1, 128, 33, 47), Spec(7, up=3, groups=4), FLOAT, 90),
        ((2, 128, 64, 48), Spec(9, up=2, groups=4), FLOAT, 80),
    ],
    ids=str,
)
def test_assembly_spills_nothing(size, spec, dtype, capability):
    step = build_training_step(*size, spec, dtype, NCHW)
    pair = divmod(capability, 10)
    kernels = [kernel for kernel in ("forward", "logit_gradient") if sums_rows(kernel, step.problem(pair))]
    assert kernels
    for launch in (launch for kernel in kernels for launch in step.build_launches(kernel, capability=pair)):
        assembly = read_assembly(compile_launch(launch, capability))
        assert assembly.spills == 0
        assert assembly.registers <= MAX_REGISTERS
        assert assembly.blocks > 0


@pytest.mark.parametrize(
    ("size", "warps"),
    [
        ((512, 256, 14, 14), 8),
        ((2, 256, 100, 168), 8),
        # the last rows of programs of eight warps would be empty, or multiprocessors
        ((512, 256, 12, 28), 4),
        ((1, 1024, 64, 64), 4),
    ],
    ids=str,
)
def test_programs_of_the_gradient_to_the_logits_have_eight_warps_if_these_are_filled(size, warps):
    launch, _ = build_training_step(*size, UP, FLOAT, NCHW).build_launches("logit_gradient", capability=(9, 0))
    assert launch.num_warps == warps


def test_gradients_of_weights_are_in_the_memory_of_those_of_logits_in_float32():
    first, second = build_training_step(64, 64, 112, 112, DOWN, FLOAT, NCHW).build_launches("logit_gradient")
    assert first.arguments["gradients"].ptr is second.arguments["dlogits"].ptr
    first, second = build_training_step(64, 64, 112, 112, DOWN, HALF, NCHW).build_launches("logit_gradient")
    assert first.arguments["gradients"].ptr is second.arguments["gradients"].ptr
    assert first.arguments["gradients"].ptr.dtype == FLOAT


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.gpu
@gpu
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("spec", "dtype"), [(UP, FLOAT), (DOWN, FLOAT), (DOWN, HALF), (UP._replace(border="renormalize"), FLOAT)], ids=str)
def test_gpu_results_at_large_sizes(spec, dtype):
    x, logits, dy = random_inputs(2, 256, 96, 104, spec, dtype, "contiguous", device="cuda")
    options = spec._asdict()
    expected = differentiate(reassemble_reference, x.double(), logits.double(), dy.double(), **options)
    results = differentiate(reassemble, x, logits, dy, **options)
    for name, result in results.items():
        assert relative_error(result, expected[name]) < TRITON_TOLERANCES[dtype], name
