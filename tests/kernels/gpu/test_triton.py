"""The Triton backend: in the interpreter, compiled offline, and on a GPU if there is one."""

import re
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from carafepp.kernels import reassemble, reassemble_reference  # noqa: E402
from carafepp.kernels.geometry import NORMALIZERS, Spec  # noqa: E402
from carafepp.kernels.gpu.operator_launches import backward_launches, forward_launches  # noqa: E402
from carafepp.kernels.gpu.tiles.geometry import DIRECTIONS  # noqa: E402
from carafepp.kernels.gpu.training_step import build_training_step  # noqa: E402
from commands import run_in_interpreter  # noqa: E402
from operator_cases import AWKWARD, TRITON_TOLERANCES, assert_matches_definition, describe, random_inputs  # noqa: E402

LAYOUTS = ("contiguous", "channels_last")


@pytest.mark.parametrize(
    ("selection", "least"),
    [("awkward or every_normalizer", 28), ("not awkward and not every_normalizer", 60)],
    ids=["sizes and dtypes", "the rest"],
)
def test_kernels_in_the_interpreter(selection, least):
    """Run the tests that every backend has to pass in Triton's interpreter, which is chosen when Triton is imported."""
    tests = Path(__file__).parents[1] / "test_backends.py"
    printed = run_in_interpreter(str(tests), f"triton and ({selection})")
    assert int(re.search(r"(\d+) passed", printed)[1]) >= least
    assert "skipped" not in printed


def test_cpu_tensors_need_the_interpreter():
    x, logits, _ = random_inputs(1, 4, 3, 3, Spec(3))
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        reassemble(x, logits, kernel_size=3, backend="triton")


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_training_step_of_small_maps_takes_no_scratch_memory(memory_format):
    x, logits, y, lse, spec = build_training_step(1, 64, 25, 42, Spec(5, up=2), torch.float16, memory_format)
    dy, dx, dlogits = (torch.empty_like(t) for t in (y, x, logits))
    launches = [*forward_launches(x, logits, y, lse, spec), *backward_launches(dy, x, logits, lse, dx, dlogits, spec)]
    used = {id(value) for launch in launches for value in launch.parameters() if isinstance(value, torch.Tensor)}
    assert used == {id(t) for t in (x, logits, y, lse, dy, dx, dlogits)}


def test_launches_stay_within_the_limits_of_a_device():
    for spec in (Spec(5, up=2), Spec(5, down=2), Spec(3, up=3, down=2), Spec(31)):
        for size in ((70000, 8, 16, 16), (1, 8, 70000, 16), (1, 8, 16, 70000), (2, 70000, 16, 16)):
            step = build_training_step(*size, spec, torch.float16, torch.contiguous_format)
            for launch in (launch for direction in DIRECTIONS for launch in step.build_launches(direction)):
                x, y, z = launch.grid
                assert 1 <= x < 2**31
                assert max(y, z) <= 65535


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.gpu
@gpu
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", AWKWARD, ids=describe)
@pytest.mark.parametrize("dtype", TRITON_TOLERANCES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gpu_matches_the_definition(case, dtype, layout):
    assert_matches_definition("triton", *random_inputs(*case, dtype, layout, device="cuda"), case[-1])


@pytest.mark.gpu
@gpu
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", TRITON_TOLERANCES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("scale", [{"up": 2}, {"down": 2}, {"up": 3, "down": 2}])
def test_gpu_at_real_sizes(normalizer, dtype, layout, scale):
    spec = Spec(5, **scale, groups=2, normalizer=normalizer)
    assert_matches_definition("triton", *random_inputs(2, 256, 25, 42, spec, dtype, layout, device="cuda"), spec)


@pytest.mark.gpu
@gpu
@pytest.mark.usefixtures("poisoned_memory")
def test_gpu_starts_again_what_it_has_compiled():
    """The code serves other tensors of the same layouts, whether or not they are aligned to vectors."""
    spec = Spec(5, up=2)
    for seed, offset in enumerate((0, 0, 1, 1, 0)):
        x, logits, dy = (
            torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[offset:][: t.numel()].view_as(t).copy_(t)
            for t in random_inputs(1, 32, 24, 16, spec, torch.float16, device="cuda", seed=seed)
        )
        assert_matches_definition("triton", x, logits, dy, spec)


@pytest.mark.gpu
@gpu
def test_gpu_compiles_without_a_graph_break():
    spec = Spec(5, up=2)
    x, logits, _ = random_inputs(1, 64, 14, 14, spec, device="cuda")
    inputs = x.requires_grad_(), logits.requires_grad_()
    compiled = torch.compile(lambda x, logits: reassemble(x * 2, logits, kernel_size=5, up=2).relu(), fullgraph=True)
    result = torch.autograd.grad(compiled(x, logits).sum(), inputs)
    expected = torch.autograd.grad(reassemble_reference(x * 2, logits, kernel_size=5, up=2).relu().sum(), inputs)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@gpu
def test_gpu_autocast_takes_half_precision():
    x, logits, _ = random_inputs(1, 64, 14, 14, Spec(5, up=2), device="cuda")
    with torch.autocast("cuda", torch.float16):
        y = reassemble(x, logits, kernel_size=5, up=2)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.float(), reassemble_reference(x, logits, kernel_size=5, up=2), rtol=5e-3, atol=5e-3)
