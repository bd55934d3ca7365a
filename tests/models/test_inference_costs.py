"""What CARAFE without gradients costs in half precision on a GPU: launches, the bytes and memory that they take, and their addresses."""

from copy import deepcopy

import pytest
import torch
from inference_calls import NORM, OPTIONS, PUBLISHED, draw, infer, make
from torch import nn

pytest.importorskip("triton")

from carafepp.kernels.gpu import launch as plans
from carafepp.kernels.gpu.layer import inference as launching

ON_GPU = torch.cuda.is_available() and not launching.INTERPRETED


@pytest.fixture
def planned(monkeypatch):
    """Take channels_last maps in half precision on a CPU for those of a GPU."""
    monkeypatch.setattr("carafepp.models.carafe.suits_matrix_units", lambda x: x.element_size() == 2)
    monkeypatch.setattr(launching, "runs_on", lambda *_: True)
    monkeypatch.setattr(launching, "plans", plans.Plans(16))


@pytest.fixture
def listed(planned, monkeypatch):
    """Let a module return its launches, which do not start."""
    monkeypatch.setattr(launching, "Plan", lambda *_: None)
    monkeypatch.setattr(launching.Inference, "run", lambda self, x, parameters, _: self.launches(x, *self.allocate(x), parameters))


@pytest.fixture
def made(monkeypatch):
    """List the outputs and the scratch memory that are allocated."""
    pairs = []
    allocate = launching.Inference.allocate
    monkeypatch.setattr(launching.Inference, "allocate", lambda self, x: pairs.append(allocate(self, x)) or pairs[-1])
    return pairs


def test_three_launches_and_no_more_memory(listed, made):
    for options in PUBLISHED[:2]:
        module, x = make(256, **options), draw(256, height=24, width=20)
        with torch.no_grad():
            launches = infer(module, x)
        assert [launch.kernel.__name__ for launch in launches] == ["compress", "encode", "banded_forward"]
        # the features lie in the output; the layers and the operator allocate the rest as well
        (y, scratch), logits = made[-1], launches[1].arguments["logits_ptr"]
        assert y.shape == module(x.float()).shape
        assert scratch.numel() - logits.numel() - 2 * launches[2].arguments["lse_ptr"].numel() < 2 * 128


@pytest.mark.parametrize(
    ("shape", "options", "megabytes"),
    [
        ((1, 256, 100, 168), {"up": 2}, 17.3),
        ((4, 256, 25, 42), {"up": 2}, 4.8),
        ((1, 64, 112, 112), {"down": 2, "compressor_norm": True}, 2.6),
        ((4, 512, 28, 28), {"down": 2, "compressor_norm": True}, 3.5),
    ],
)
def test_bytes(shape, options, megabytes, listed):
    """docs/performance.md gives these counts of everything that the launches before the operator read and write once."""
    n, c, height, width = shape
    compress, encode, _ = infer(make(c, **options), draw(c, n=n, height=height, width=width))
    tensors = [t for launch in (compress, encode) for t in {id(t): t for t in launch.parameters() if isinstance(t, torch.Tensor)}.values()]
    assert round(sum(t.numel() * t.element_size() for t in tensors) / 1e6, 1) == megabytes


@pytest.mark.parametrize("options", [NORM | {"compressed_channels": 2}, NORM, *OPTIONS], ids=str)
def test_kernels_start_with_the_addresses_of_the_call(options, planned, made, monkeypatch):
    started = []

    class Compiled:
        def __getitem__(self, grid):
            return lambda *values: started.append((grid, values))

    monkeypatch.setattr(plans, "compile_for_current_device", lambda _: Compiled())
    module = make(16, **options)
    if "compressor_norm" in options:
        # the plan serves others, too
        tied = deepcopy(module)
        tied.compressor_norm[0].weight = tied.compressor_norm[0].bias = tied.channel_compressor.bias
        infer(tied, draw())
    for x in (draw(), draw()):
        started.clear()
        y = infer(module, x)
        (plan,) = launching.plans.values()
        assert y is made[-1][0]
        conv, given = module.content_encoder, [None] * 6
        if isinstance(module.channel_compressor, nn.Conv2d):
            given[:2] = module.channel_compressor.weight, module.channel_compressor.bias
        if isinstance(module.compressor_norm, nn.Sequential):
            norm = module.compressor_norm[0]
            given[2:] = norm.running_mean, norm.running_var, norm.weight, norm.bias
        given = [*given, conv.weight, conv.bias]
        expected = plan.launches(x, *made[-1], given)
        assert len(started) == len(expected) == 3
        for (grid, values), launch in zip(started, expected, strict=True):
            assert grid == launch.grid
            for value, argument in zip(values, [*launch.arguments.values(), *launch.constants.values()], strict=True):
                first, *rest = argument if isinstance(argument, tuple) else (argument,)
                # a log-sum-exp that the normalizer does not need
                if isinstance(first, torch.Tensor) and not first.numel():
                    continue
                if isinstance(first, torch.Tensor):
                    assert value == ((first.data_ptr(), *rest) if rest else first.data_ptr())
                else:
                    assert value == argument


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="no GPU")
@pytest.mark.parametrize("options", PUBLISHED[:2], ids=str)
def test_gpu_launches_three_kernels_without_waiting(options):
    module, x = make(64, **options).cuda(), draw(64, height=24, width=20, device="cuda")
    infer(module, x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        infer(module, x)
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert names == ["compress", "encode", "banded_forward"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        infer(module, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="no GPU")
@pytest.mark.parametrize("shape", [(4, 256, 25, 42), (1, 1024, 14, 14), (64, 128, 56, 56)], ids=str)
def test_gpu_takes_no_more_memory(shape, monkeypatch):
    n, c, height, width = shape
    module, x = make(c, down=2, compressor_norm=True).cuda(), draw(c, n=n, height=height, width=width, device="cuda")
    peaks, outputs = [], []
    for _ in range(2):
        infer(module, x)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outputs.append(infer(module, x))
        peaks.append(torch.cuda.max_memory_allocated() - before)
        # the second time in launches of PyTorch
        monkeypatch.setattr("carafepp.models.carafe.infer", lambda *_: None)
    torch.testing.assert_close(*outputs, rtol=0.02, atol=0.02)
    # blocks of the allocator may have 1 MiB that nobody uses
    assert peaks[0] <= peaks[1] + 2**20
