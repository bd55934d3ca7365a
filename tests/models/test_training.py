"""CARAFE with gradients, in half precision on a GPU: planned launches give what the layers give."""

import functools
from collections.abc import Callable
from copy import deepcopy
from typing import NamedTuple

import layer_changes
import pytest
import torch
import torch.nn.functional as F
from commands import run_in_interpreter
from training_calls import NORM, call_layers, draw, make, relative_error, run

triton = pytest.importorskip("triton")

from carafepp.kernels.cpu import backend as cpu  # noqa: E402
from carafepp.kernels.gpu.layer import inference as launching  # noqa: E402
from carafepp.kernels.gpu.layer import training as kernels  # noqa: E402

INTERPRETED = launching.INTERPRETED
ON_GPU = torch.cuda.is_available() and not INTERPRETED
OPTIONS = [
    {"up": 2, "kernel_size": 3, "groups": 2, "encoder_dilation": 2, "border": "renormalize", "compressed_channels": 6},
    {"down": 2, "kernel_size": 3, "compressed_channels": None, "normalizer": "sigmoid"},
    NORM,
    # two blocks of columns of the features
    {"down": 2, "kernel_size": 3, "encoder_kernel": 1, "compressed_channels": 144},
]
# the paper's, which take long in the interpreter
PUBLISHED = [{"up": 2}, {"down": 2, "compressor_norm": True}, {"up": 3, "down": 2, "encoder_kernel": 5}]


class OnCPU(NamedTuple):
    """The operator by its kernels for a CPU, which take a hundredth of the interpreter's time."""

    function: Callable[..., None]
    arguments: tuple
    factors: tuple | None

    def interpret(self):
        self.function(*self.arguments)
        if self.factors is not None:
            features, matrix = (t.float() for t in self.factors)
            self.arguments[4].add_((features.permute(0, 2, 3, 1) @ matrix).permute(0, 3, 1, 2))


@pytest.fixture
def quick_operator(monkeypatch):
    if INTERPRETED:
        for name in ("forward", "backward"):
            launch = functools.partial(lambda f, *tensors, factors=None: [OnCPU(f, tensors, factors)], getattr(cpu, name))
            monkeypatch.setattr(kernels, f"{name}_launches", launch)


def test_training_in_the_interpreter():
    assert f"{len(OPTIONS) + 4} passed" in run_in_interpreter(__file__, "interpreter and not in_the")


PLACES = [pytest.param("cuda", marks=pytest.mark.gpu)] if ON_GPU else ["interpreter"] if INTERPRETED else []
PLACES = PLACES or [pytest.param("none", marks=pytest.mark.skip(reason="no GPU"))]
everywhere = pytest.mark.parametrize("place", PLACES)


def assert_as_exact(module, x, *, function=None):
    """Check that everything is as exact as with the layers."""
    exact, layers = (run(copy, data) for copy, data in ((deepcopy(module).double(), x.double()), (call_layers(module), x)))
    results = run(module, x, function=function)
    # gradients have the strides of their parameters, which autograd would otherwise copy
    alike = [layers[0], x, *(p for p in module.parameters() if p.requires_grad), *module.buffers()]
    for value, expected, other, like in zip(results, exact, layers, alike, strict=True):
        assert value.dtype == other.dtype
        assert value.stride() == like.stride()
        assert relative_error(value, expected) < max(2 * relative_error(other, expected), 2e-3)
    return results


@everywhere
@pytest.mark.parametrize("options", [*OPTIONS, *(PUBLISHED if ON_GPU else [])], ids=str)
def test_it_is_as_exact_as_the_layers(options, place, trained, quick_operator):
    device = "cuda" if place == "cuda" else "cpu"
    # in the interpreter, one has two blocks of pixels of the compressor, of which the norm merges the statistics
    sides = {} if options is NORM or place == "cuda" else {"height": 4, "width": 3}
    assert_as_exact(make(device=device, **options), draw(device=device, **sides))
    assert trained == ["forward", "backward"]


@everywhere
def test_a_frozen_norm(place, trained, quick_operator):
    module, x = make(device="cuda" if place == "cuda" else "cpu", **NORM), draw(device="cuda" if place == "cuda" else "cpu")
    layer_changes.take_statistics(module)
    assert_as_exact(module.to(memory_format=torch.channels_last), x)
    assert trained == ["forward", "backward"]


@pytest.mark.parametrize("freeze", layer_changes.FROZEN, ids=lambda freeze: freeze.__name__)
def test_every_frozen_norm_is_replaced(freeze, trained):
    module = make(**NORM)
    freeze(module)
    assert module.training
    assert_as_exact(module.to(memory_format=torch.channels_last), draw())
    assert trained == ["forward", "backward"]


@everywhere
def test_statistics_of_features_far_from_zero(place, trained, quick_operator):
    device = "cuda" if place == "cuda" else "cpu"
    module, x = make(device=device, **NORM), draw(device=device)
    with torch.no_grad():
        module.channel_compressor.bias.fill_(60)
    results = run(module, x)
    assert trained
    compressor = module.channel_compressor
    features = F.conv2d(x.double(), compressor.weight.half().double(), compressor.bias.double()).half().double()
    mean, variance, batches = results[-3:]
    before = make(device=device, **NORM).compressor_norm[0]
    assert relative_error(mean, 0.9 * before.running_mean.double() + 0.1 * features.mean((0, 2, 3))) < 1e-5
    assert relative_error(variance, 0.9 * before.running_var.double() + 0.1 * features.var((0, 2, 3))) < 1e-5
    assert batches == 1


@everywhere
def test_only_needed_gradients(place, trained, quick_operator):
    device = "cuda" if place == "cuda" else "cpu"
    module, x = make(device=device, down=2, kernel_size=1, compressor_norm=True, compressed_channels=2), draw(n=1, height=4, device=device)
    reference = call_layers(module)
    for names in (["x"], ["content_encoder.bias"], ["channel_compressor.weight"], ["compressor_norm.0.bias", "content_encoder.weight"]):
        gradients = []
        for model in (module, reference):
            inputs = {"x": x.clone(), **dict(model.named_parameters())}
            for name, tensor in inputs.items():
                tensor.requires_grad_(name in names)
            with torch.autocast(device, torch.float16):
                y = model(inputs["x"])
            # a gradient of x in the other memory format
            gradients.append(torch.autograd.grad(y.contiguous(), [inputs[name] for name in names], torch.ones_like(y).contiguous()))
        torch.testing.assert_close(*gradients, rtol=0.02, atol=0.02)
    assert len(trained) == 8


@everywhere
def test_parameters_in_half_precision(place, trained):
    module = make(device="cuda" if place == "cuda" else "cpu", down=2, kernel_size=1, compressed_channels=2).half()
    x = draw(n=1, height=4, device="cuda" if place == "cuda" else "cpu").requires_grad_()
    module(x).square().sum().backward()
    assert trained == ["forward", "backward"]
    assert all(p.grad.dtype == torch.float16 and p.grad.isfinite().all() for p in module.parameters())
