"""CARAFE with gradients, in half precision on a GPU: planned launches give what the layers give, and only where nobody observes them."""

import functools
from collections.abc import Callable
from copy import deepcopy
from typing import NamedTuple

import layer_changes
import pytest
import torch
import torch.nn.functional as F
from commands import run_in_interpreter
from torch import nn
from torch.utils.checkpoint import checkpoint

triton = pytest.importorskip("triton")

from carafepp.kernels.cpu import backend as cpu  # noqa: E402
from carafepp.kernels.gpu import inference as launching  # noqa: E402
from carafepp.kernels.gpu import training as kernels  # noqa: E402
from carafepp.kernels.gpu.launch import Plans  # noqa: E402
from carafepp.models import training  # noqa: E402
from carafepp.models.carafe import CARAFE  # noqa: E402

from carafepp import reassemble  # noqa: E402

INTERPRETED = launching.INTERPRETED
ON_GPU = torch.cuda.is_available() and not INTERPRETED
NORM = {"down": 2, "kernel_size": 3, "compressor_norm": True, "compressed_channels": 6}
OPTIONS = [
    {"up": 2, "kernel_size": 3, "groups": 2, "encoder_dilation": 2, "border": "renormalize", "compressed_channels": 6},
    {"down": 2, "kernel_size": 3, "compressed_channels": None, "normalizer": "sigmoid"},
    NORM,
    # two blocks of columns of the features
    {"down": 2, "kernel_size": 3, "encoder_kernel": 1, "compressed_channels": 144},
]
# the paper's, which take long in the interpreter
PUBLISHED = [{"up": 2}, {"down": 2, "compressor_norm": True}, {"up": 3, "down": 2, "encoder_kernel": 5}]


def make(channels=8, *, device="cpu", **options):
    """Return a module whose kernels are far from a box blur, and whose norm is far from the identity."""
    torch.manual_seed(0)
    module = CARAFE(channels, **options)
    nn.init.normal_(module.content_encoder.weight, std=0.1)
    for layer in (module.channel_compressor, module.content_encoder):
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.bias)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
                nn.init.uniform_(tensor, 0.5, 2)
    return module.to(device)


def draw(channels=8, *, n=2, height=8, width=6, dtype=torch.float16, device="cpu"):
    x = torch.randn(n, channels, height, width, generator=torch.Generator().manual_seed(1))
    return x.to(device, dtype, memory_format=torch.channels_last)


def call_layers(module):
    """Return a copy of a module whose layers are called."""
    observed = deepcopy(module)
    observed.content_encoder.register_forward_hook(lambda *_: None)
    return observed


def run(module, x, *, dtype=torch.float16, function=None):
    """Return the output, the gradients of everything that needs one for a loss whose gradient differs everywhere, and the buffers."""
    x = x.clone().requires_grad_()
    with torch.autocast(x.device.type, dtype, enabled=x.element_size() < 8):
        y = (module if function is None else function)(x)
    loss = (y.double() * torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=y.device).view_as(y)).sum()
    gradients = torch.autograd.grad(loss, [x, *(p for p in module.parameters() if p.requires_grad)])
    return [y.detach(), *gradients, *(buffer.clone() for buffer in module.buffers())]


def relative_error(value, exact):
    # the gradient of a bias before a norm is 0
    return ((value.double() - exact.double()).norm() / max(exact.double().norm(), 0.05)).item()


@pytest.fixture
def trained(monkeypatch):
    """Take channels_last maps in half precision on a CPU for those of a GPU; list the calls, whose memory is full of NaN before they run.

    Without an interpreter, PyTorch's functions compute what the launches would.
    """
    calls = []
    forward, backward = kernels.Training.forward, kernels.Training.backward

    def poison(allocate):
        def allocate_poisoned(*arguments, **options):
            t = allocate(*arguments, **options)
            return t.fill_(torch.nan) if t.is_floating_point() else t

        return allocate_poisoned

    def run_poisoned(function, *arguments):
        with monkeypatch.context() as patch:
            for name in ("new_empty", "new_empty_strided"):
                patch.setattr(torch.Tensor, name, poison(getattr(torch.Tensor, name)))
            return function(*arguments)

    def note_forward(self, x, given, addresses):
        calls.append("forward")
        if INTERPRETED or x.is_cuda:
            return run_poisoned(forward, self, x, given, addresses)
        if self.layers.batch:
            given[8].add_(1)
        return training.compute_layers(self, x, given[:8]), x.new_empty(0)

    def note_backward(self, dy, x, kept, given, needs):
        calls.append("backward")
        if not INTERPRETED and not x.is_cuda:
            return training.differentiate(self, dy, x, given, needs)
        return run_poisoned(backward, self, dy, x, kept, given, needs)

    def suits(x):
        return type(x) is torch.Tensor and x.element_size() == 2 and x.is_contiguous(memory_format=torch.channels_last)

    monkeypatch.setattr("carafepp.models.carafe.suits_matrix_units", suits)
    monkeypatch.setattr(launching, "runs_on", lambda *_: True)
    monkeypatch.setattr(kernels.Training, "forward", note_forward)
    monkeypatch.setattr(kernels.Training, "backward", note_backward)
    monkeypatch.setattr(launching, "plans", Plans(16))
    return calls


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


def mean_of_squares(y):
    return y.float().square().mean()


def test_it_is_one_node(trained):
    y = run_autocast(make(**NORM), draw().requires_grad_())
    nodes = {name for node, _ in y.grad_fn.next_functions if node is not None for name in [type(node).__name__]}
    assert nodes == {"AccumulateGrad"}
    assert len(launching.plans) == 1


def test_second_derivatives(trained):
    module, x = make(**NORM), draw(dtype=torch.bfloat16).requires_grad_()
    results = []
    for model in (module, call_layers(module)):
        inputs = [x, *model.parameters()]
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        gradients = torch.autograd.grad(mean_of_squares(y), inputs, create_graph=True)
        # that of the bias before the norm is rounding
        penalty = sum(mean_of_squares(g) for g in (gradients[0], *gradients[3:]))
        results.append(torch.autograd.grad(penalty, [x, *list(model.parameters())[2:]]))
    # the gradient of the gradient reaches the output
    assert trained == ["forward", "backward"]
    for value, expected in zip(*results, strict=True):
        assert relative_error(value, expected) < 0.1
    # the running statistics are of one batch
    assert module.compressor_norm[0].num_batches_tracked == 1


def test_hooks_see_one_gradient_of_every_parameter(trained):
    module, x = make(**NORM), draw()
    seen = []
    for name, parameter in module.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: seen.append(name))
    for passes in (1, 2):
        with torch.autocast("cpu", torch.float16):
            mean_of_squares(module(x)).backward()
        assert sorted(seen) == sorted(passes * [name for name, _ in module.named_parameters()])
    layers = call_layers(module)
    expected = torch.autograd.grad(mean_of_squares(run_autocast(layers, x)), list(layers.parameters()))
    for parameter, gradient in zip(module.parameters(), expected, strict=True):
        assert relative_error(parameter.grad, 2 * gradient) < 0.02


def run_autocast(module, x):
    with torch.autocast("cpu", torch.float16):
        return module(x)


def test_several_calls_in_one_graph(trained):
    module, x = make(kernel_size=3, compressed_channels=6), draw().requires_grad_()
    gradients = []
    for model in (module, call_layers(module)):
        y = run_autocast(model, run_autocast(model, x))
        gradients.append(torch.autograd.grad(mean_of_squares(y), [x, *model.parameters()]))
    assert trained == 2 * ["forward"] + 2 * ["backward"]
    for value, expected in zip(*gradients, strict=True):
        assert relative_error(value, expected) < 0.02


# a reentrant checkpoint has no gradients when it is called first
@pytest.mark.parametrize(
    ("reentrant", "calls"), [(False, ["forward", "forward", "backward"]), (True, ["forward", "backward"])], ids=["plain", "reentrant"]
)
def test_checkpoints(reentrant, calls, trained):
    module, x = make(**NORM), draw().requires_grad_()
    gradients = []
    for function in (module, lambda x: checkpoint(module, x, use_reentrant=reentrant)):
        mean_of_squares(run_autocast(function, x)).backward()
        gradients.append([t.grad for t in (x, *module.parameters())])
        x.grad = None
        module.zero_grad()
    torch.testing.assert_close(*gradients)
    assert trained == ["forward", "backward", *calls]


def test_saved_tensors_may_come_back_in_other_layouts(trained):
    """As after `torch.autograd.graph.save_on_cpu(pin_memory=True)`."""
    module, x = make(**NORM), draw()

    def call(x):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous(), lambda t: t):
            return module(x)

    expected = run(call_layers(module), x)
    # without the running statistics, which no launch updates here
    own = len(expected) - len([*module.buffers()])
    for value, layers in zip(run(module, x, function=call)[:own], expected[:own], strict=True):
        assert relative_error(value, layers) < 0.02
    assert trained == ["forward"]


class Compiled:
    """Code that only notes with which values it is started."""

    def __init__(self, started):
        self.started = started

    def __getitem__(self, grid):
        return lambda *values: self.started.append(values)


def test_the_gradient_of_the_output_may_be_the_input(monkeypatch):
    """A plan that is made for such a call serves others."""
    started = []
    monkeypatch.setattr("carafepp.kernels.gpu.launch.compile_for_current_device", lambda _: Compiled(started))
    monkeypatch.setattr("carafepp.models.carafe.suits_matrix_units", lambda x: x.element_size() == 2)
    monkeypatch.setattr(launching, "runs_on", lambda *_: True)
    monkeypatch.setattr(launching, "plans", Plans(2))
    module, x = make(kernel_size=3, compressed_channels=6), draw().requires_grad_()
    for dy in (x, draw()):
        with torch.autocast("cpu", torch.float16):
            y = module(x)
        started.clear()
        torch.autograd.grad(y, x, dy)
        # the first launch is that of the gradient to the logits, or of both
        addresses = [value[0] for value in started[0] if isinstance(value, tuple) and len(value) == 5]
        assert dy.data_ptr() in addresses
        assert x.data_ptr() in addresses


def test_changed_parameters_are_reported(trained):
    module, x = make(**NORM), draw().requires_grad_()
    y = run_autocast(module, x)
    with torch.no_grad():
        module.content_encoder.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        mean_of_squares(y).backward()


def test_several_gradients_at_a_time(trained):
    module, x = make(kernel_size=3, compressed_channels=6), draw().requires_grad_()
    y = run_autocast(module, x)
    stacked = torch.stack([torch.ones_like(y), y.detach()])
    together = torch.autograd.grad(y, [x, *module.parameters()], stacked, retain_graph=True, is_grads_batched=True)
    assert trained == ["forward"]
    for number, dy in enumerate(stacked):
        for value, expected in zip(together, torch.autograd.grad(y, [x, *module.parameters()], dy, retain_graph=True), strict=True):
            assert relative_error(value[number], expected) < 0.02


def test_the_mode_of_the_norm_is_that_of_the_forward_pass(trained):
    gradients = []
    for changed in (False, True):
        module, x = make(**NORM), draw()
        y = run_autocast(module, x)
        module.train(not changed)
        gradients.append(torch.autograd.grad(mean_of_squares(y), list(module.parameters())))
    assert trained == 2 * ["forward", "backward"]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("inference", [False, True])
def test_nothing_is_kept_where_nothing_needs_a_gradient(inference, trained, monkeypatch):
    inferred = []
    monkeypatch.setattr(launching.Inference, "run", lambda self, x, *_: inferred.append(self) or x.new_zeros(self.layouts.y_shape))
    monkeypatch.setattr(launching, "Plan", lambda *_: None)
    module = make(**NORM).requires_grad_(False).eval()
    with torch.inference_mode(inference):
        x = draw()
    assert not run_autocast(module, x).requires_grad
    assert inferred
    assert not trained


def average_all_batches(module):
    module.compressor_norm[0].momentum = None


def train_a_frozen_norm(module):
    module.compressor_norm.eval()


def synchronise(module):
    module.compressor_norm[0] = nn.SyncBatchNorm(6)


@pytest.mark.parametrize(
    "change",
    [*layer_changes.CHANGES, *layer_changes.CHANGES_OF_NORM, average_all_batches, train_a_frozen_norm, synchronise],
    ids=lambda change: change.__name__,
)
def test_other_layers_are_called(change, trained):
    module, x = make(**layer_changes.OPTIONS), draw()
    change(module)
    y = run_autocast(module, x)
    mean_of_squares(y).backward()
    assert not trained
    # a copy of the module would share layers whose methods are replaced
    expected = reassemble(x, run_autocast(module.logits, x), **module.spec._asdict())
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("owner", "name"), [*layer_changes.METHODS, *layer_changes.METHODS_OF_NORM])
def test_patched_classes_are_called(owner, name, trained):
    module, x = make(**layer_changes.OPTIONS), draw()
    with layer_changes.patched(owner, name) as seen:
        run_autocast(module, x)
    assert seen
    assert not trained
    run_autocast(module, x)
    assert trained == ["forward"]


def test_statistics_of_one_pixel_are_refused(trained):
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        run_autocast(make(**NORM), draw(n=1, height=1, width=1))
    assert not trained


def test_sizes_and_empty_batches(trained):
    module, x = make(up=2, kernel_size=3, compressed_channels=6), draw()
    assert run_autocast(lambda x: module(x, size=(15, 12)), x).shape == (2, 8, 15, 12)
    assert trained == ["forward"]
    # the last row is repeated
    assert run_autocast(lambda x: module(x, size=(17, 12)), x).shape == (2, 8, 17, 12)
    run_autocast(module, draw(n=0)).sum().backward()
    assert trained == ["forward"]


def test_plans_of_layouts(trained):
    module = make(**NORM)
    for x in (draw(), draw(), draw(height=9)):
        run(module, x)
    assert len(launching.plans) == 2
    run_autocast(module.eval().requires_grad_(False), draw().requires_grad_())
    with torch.no_grad():
        run_autocast(module, draw(n=0))
    assert len(launching.plans) == 4
