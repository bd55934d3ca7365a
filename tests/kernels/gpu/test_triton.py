"""The Triton backend: in the interpreter, compiled offline, and on a GPU if there is one."""

import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch

triton = pytest.importorskip("triton")

from carafepp.kernels import reassemble, reassemble_reference  # noqa: E402
from carafepp.kernels.geometry import NORMALIZERS, Spec  # noqa: E402
from carafepp.kernels.gpu import backend as triton_backend  # noqa: E402
from triton_cases import SIZES, TOLERANCES, check, random_inputs  # noqa: E402

FORMATS = (torch.contiguous_format, torch.channels_last)


def test_kernels_in_the_interpreter():
    folder = pathlib.Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "triton_interpreted.py"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 40
    assert "skipped" not in run.stdout


def test_cpu_tensors_need_the_interpreter():
    x, logits = random_inputs(1, 4, 3, 3, Spec(3), torch.float32, "cpu")
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        reassemble(x, logits, kernel_size=3, backend="triton")


def launches(n, c, h, w, spec, dtype=torch.float16, memory_format=torch.contiguous_format, device="meta"):
    """Every launch of a training step, and the tensors it is given."""
    x = torch.empty(n, c, h, w, dtype=dtype, device=device).to(memory_format=memory_format)
    logits = torch.empty(n, spec.groups * spec.taps * spec.up**2, spec.cells(h), spec.cells(w), dtype=dtype, device=device)
    cells = logits.to(memory_format=memory_format).unflatten(1, (spec.groups * spec.taps, spec.up, spec.up))
    y = x.new_empty(n, c, spec.output_size(h), spec.output_size(w)).to(memory_format=memory_format)
    lse = x.new_empty((n, spec.groups, *cells.shape[2:]), dtype=torch.float32)
    given = [x, cells, y, lse, torch.empty_like(y), torch.empty_like(x), torch.empty_like(cells)]
    x, cells, y, lse, dy, dx, dlogits = given
    steps = triton_backend.forward_launches(x, cells, y, lse, spec) + triton_backend.backward_launches(dy, x, cells, lse, dx, dlogits, spec)
    return steps, given


def test_a_training_step_takes_no_scratch_memory():
    for memory_format in FORMATS:
        steps, given = launches(1, 64, 25, 42, Spec(5, up=2), memory_format=memory_format)
        used = {id(value) for step in steps for value in step.parameters() if isinstance(value, torch.Tensor)}
        assert used == {id(t) for t in given}


def test_launches_stay_within_the_limits_of_a_device():
    for spec in (Spec(5, up=2), Spec(5, down=2), Spec(3, up=3, down=2), Spec(31)):
        for size in ((70000, 8, 16, 16), (1, 8, 70000, 16), (1, 8, 16, 70000), (2, 70000, 16, 16)):
            for step in launches(*size, spec)[0]:
                x, y, z = step.grid
                assert 1 <= x < 2**31
                assert max(y, z) <= 65535


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_gpu_matches_the_definition(size, dtype, memory_format):
    *shape, spec = size
    check(*random_inputs(*shape, spec, dtype, "cuda", memory_format), spec)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("scale", [{"up": 2}, {"down": 2}, {"up": 3, "down": 2}])
def test_gpu_at_real_sizes(normalizer, dtype, memory_format, scale):
    spec = Spec(5, **scale, groups=2, normalizer=normalizer)
    check(*random_inputs(2, 256, 25, 42, spec, dtype, "cuda", memory_format), spec)


@pytest.mark.gpu
@gpu
def test_gpu_starts_again_what_it_has_compiled():
    """The code serves other tensors of the same layouts, whether or not they are aligned to vectors."""
    spec = Spec(5, up=2)
    for seed, offset in enumerate((0, 0, 1, 1, 0)):
        x, logits = (
            torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[offset:][: t.numel()].view_as(t).copy_(t.roll(seed, dims=3))
            for t in random_inputs(1, 32, 24, 16, spec, torch.float16, "cuda")
        )
        check(x, logits, spec)


@pytest.mark.gpu
@gpu
def test_gpu_compiles_without_a_graph_break():
    spec = Spec(5, up=2)
    x, logits = (t.requires_grad_() for t in random_inputs(1, 64, 14, 14, spec, torch.float32, "cuda"))
    compiled = torch.compile(lambda x, logits: reassemble(x * 2, logits, kernel_size=5, up=2).relu(), fullgraph=True)
    y = compiled(x, logits)
    result = torch.autograd.grad(y.sum(), (x, logits))
    expected = torch.autograd.grad(reassemble_reference(x * 2, logits, kernel_size=5, up=2).relu().sum(), (x, logits))
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@gpu
def test_gpu_autocast_takes_half_precision():
    spec = Spec(5, up=2)
    x, logits = random_inputs(1, 64, 14, 14, spec, torch.float32, "cuda")
    with torch.autocast("cuda", torch.float16):
        y = reassemble(x, logits, kernel_size=5, up=2)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.float(), reassemble_reference(x, logits, kernel_size=5, up=2), rtol=5e-3, atol=5e-3)
