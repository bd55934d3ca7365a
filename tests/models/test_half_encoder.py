"""CARAFE in half precision on a GPU: its padded encoder gives the logits of the layers, and only where nobody observes them."""

from copy import deepcopy

import layer_changes
import pytest
import torch
from carafepp.integrations.signatures import YoloCARAFE
from carafepp.kernels.execution import compute_gradients
from carafepp.models import half_encoder
from carafepp.models.carafe import CARAFE
from launches import LaunchCounter
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from carafepp import reassemble

OPTIONS = [
    {"up": 2},
    {"down": 2, "compressor_norm": True},
    {"up": 2, "kernel_size": 3, "groups": 2, "encoder_dilation": 2, "border": "renormalize"},
    {"down": 2, "compressed_channels": None, "normalizer": "sigmoid"},
    {"up": 3, "down": 2, "encoder_kernel": 5},
]


@pytest.fixture
def encoded(monkeypatch):
    """Take channels_last maps of any device and dtype for those of a GPU in half precision; list the shapes of the wide logits."""
    shapes = []

    def encode(*arguments):
        result = half_encoder.encode(*arguments)
        if result is not None:
            shapes.append(tuple(result[1].shape))
        return result

    def suits(x):
        return type(x) is torch.Tensor and x.is_contiguous(memory_format=torch.channels_last)

    monkeypatch.setattr("carafepp.models.carafe.suits_matrix_units", suits)
    monkeypatch.setattr("carafepp.models.carafe.encode", encode)
    return shapes


def make(channels=4, *, dtype=torch.float64, **options):
    """Return a module whose kernels are far from a box blur."""
    torch.manual_seed(0)
    module = CARAFE(channels, **({"compressed_channels": 6} | options)).to(dtype)
    nn.init.normal_(module.content_encoder.weight, std=0.5)
    nn.init.normal_(module.content_encoder.bias)
    return module


def draw(n=2, channels=4, height=5, width=3, *, dtype=torch.float64):
    x = torch.randn(n, channels, height, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x.to(dtype, memory_format=torch.channels_last)


def run(module, x, *, function=None):
    """Return the output, and the gradients of x and of the parameters for a loss whose gradient differs everywhere."""
    x = x.clone().requires_grad_()
    y = (module if function is None else function)(x)
    loss = (y.double() * torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=y.device).view_as(y)).sum()
    return y.detach(), *torch.autograd.grad(loss, [x, *module.parameters()])


def relative_error(values, exact):
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(values, exact, strict=True))


@pytest.mark.parametrize(
    ("channels", "trained", "inferred"), [(9, 16, 16), (16, 16, 16), (25, 64, 32), (49, 64, 64), (64, 64, 64), (100, 112, 112)]
)
def test_widths(channels, trained, inferred):
    assert half_encoder.padded_channels(channels, trained=True) == trained
    with torch.no_grad():
        assert half_encoder.padded_channels(channels, trained=False) == inferred


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_encoder_equals_the_layers(options, memory_format, encoded):
    module, x = make(**options).to(memory_format=memory_format), draw()
    results = run(module, x)
    channels = module.content_encoder.out_channels
    assert [shape[1] for shape in encoded] == [half_encoder.padded_channels(channels, trained=True)] != [channels]
    # a hook turns to the layers
    module.content_encoder.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(results, run(module, x))
    assert len(encoded) == 1
    assert module.logits(x).shape[1] == channels


def store_transposed(parameter):
    """Store as TensorFlow and JAX do: output channels are the fastest axis."""
    return parameter.permute(*reversed(range(parameter.dim()))).contiguous().permute(*reversed(range(parameter.dim())))


def store_with_gaps(parameter):
    return torch.stack([parameter, parameter], -1)[..., 0]


def store_once(parameter):
    return parameter[:1].expand_as(parameter)


@pytest.mark.parametrize("store", [store_transposed, store_with_gaps, store_once])
def test_parameters_of_any_strides(store, encoded):
    module, x = make(up=2), draw()
    for layer in (module.channel_compressor, module.content_encoder):
        for name, parameter in list(layer.named_parameters()):
            setattr(layer, name, nn.Parameter(store(parameter.detach())))
    results = run(module, x)
    assert encoded
    module.content_encoder.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(results, run(module, x))
    assert len(encoded) == 1


@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
def test_autocast_is_as_exact_as_with_the_layers(options, encoded):
    module, x = make(16, dtype=torch.float32, **options), draw(2, 16, 12, 10, dtype=torch.float32)
    exact = run(deepcopy(module).double(), x.double())
    encoded.clear()
    with torch.autocast("cpu", torch.bfloat16):
        y, *gradients = results = run(module, x)
        assert y.dtype == torch.bfloat16
        assert all(gradient.dtype == torch.float32 for gradient in gradients)
        assert len(encoded) == 1
        module.content_encoder.register_forward_hook(lambda *_: None)
        layers = run(module, x)
    assert relative_error(results, exact) < 1.25 * relative_error(layers, exact)


def test_half_precision_without_autocast(encoded):
    module, x = make(16, dtype=torch.bfloat16, up=2), draw(2, 16, 12, 10, dtype=torch.bfloat16)
    exact = run(deepcopy(module).double(), x.double())
    results = run(module, x)
    assert len(encoded) == 2
    assert relative_error(results, exact) < 0.03


@pytest.mark.parametrize(
    ("options", "trained"),
    [*((OPTIONS[0], name) for name in ("x", "channel_compressor", "content_encoder", "bias")), (OPTIONS[3], "x"), (OPTIONS[3], "bias")],
    ids=str,
)
def test_frozen_inputs_take_no_gradients(options, trained, encoded, monkeypatch):
    module, x = make(**options), draw().requires_grad_(trained == "x")
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(trained in name)
    inputs = [t for t in (x, *module.parameters()) if t.requires_grad]
    needed = []
    monkeypatch.setattr(
        "carafepp.kernels.registration.compute_gradients",
        lambda *arguments: needed.append(arguments[-2]) or compute_gradients(*arguments),
    )
    gradients = torch.autograd.grad(module(x).square().sum(), inputs)
    assert needed == [trained == "x"]
    module.content_encoder.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(gradients, torch.autograd.grad(module(x).square().sum(), inputs))
    assert len(encoded) == 1


def test_replicas_of_data_parallel(encoded):
    module, x = make(up=2), draw()
    replica = module._replicate_for_data_parallel()
    for name in ("channel_compressor", "content_encoder"):
        layer = getattr(module, name)
        copy = layer._replicate_for_data_parallel()
        copy._parameters = {}
        copy.weight, copy.bias = (2 * layer.weight).detach(), (2 * layer.bias).detach()
        replica._modules[name] = copy
    expected = make(up=2)
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter.mul_(2)
    torch.testing.assert_close(replica(x), expected(x))
    assert len(encoded) == 2


def test_layers_that_need_no_copies(encoded):
    module, x = make(up=4, kernel_size=1), draw()
    results = run(module, x)
    assert encoded == [(2, 16, 5, 3)]
    module.content_encoder.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(results, run(module, x))


def test_second_derivatives(encoded):
    module, x = make(2, down=2, kernel_size=3, compressed_channels=2), draw(1, 2, 3, 3).requires_grad_()
    assert torch.autograd.gradgradcheck(module, x)
    assert encoded


@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
def test_one_graph(options, encoded):
    torch.compiler.reset()
    module, x = make(dtype=torch.float32, **options), draw(dtype=torch.float32)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        results = run(module, x, function=compiled)
        assert encoded
        assert relative_error(results, run(module, x)) < 0.01


def test_inductor_trains_it(encoded):
    torch.compiler.reset()
    module, x = make(dtype=torch.float32, up=2), draw(dtype=torch.float32)
    torch.testing.assert_close(run(module, x, function=torch.compile(module, fullgraph=True)), run(module, x))


def test_exported_programs_hold_the_layers(encoded):
    module, x = make(up=2, dtype=torch.float32).eval(), draw(dtype=torch.float32)
    program = torch.export.export(module, (x,))
    assert any("conv2d" in str(node.target) and node.meta["val"].shape[1] == 100 for node in program.graph.nodes)
    assert not encoded
    traced = torch.jit.trace(module, x, check_trace=False)
    assert "copy" not in str(traced.inlined_graph)
    assert torch.fx.symbolic_trace(module).get_submodule("content_encoder").out_channels == 100
    assert not encoded


def test_torch_func(encoded):
    module, x = make(up=2), draw()
    parameters = dict(module.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(module, parameters, (x,)).square().sum()

    gradients = torch.func.grad(loss)(parameters, x)
    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x[:, None])
    assert not encoded
    expected = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
    assert encoded
    torch.testing.assert_close(tuple(gradients.values()), expected)
    torch.testing.assert_close(tuple(gradient.sum(0) for gradient in per_sample.values()), expected)
    _, tangent = torch.func.jvp(module, (x,), (torch.ones_like(x),))
    assert tangent.isfinite().all()
    with torch.autograd.forward_ad.dual_level():
        y = module(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(y).tangent, tangent)


@pytest.mark.parametrize("change", layer_changes.CHANGES, ids=lambda change: change.__name__)
def test_changed_layers_are_called(change, encoded):
    module, x = make(dtype=torch.float32, **layer_changes.OPTIONS).eval(), draw(dtype=torch.float32)
    change(module)
    torch.testing.assert_close(module(x), carafe_of_logits(module, x))
    assert not encoded


@pytest.mark.parametrize(("owner", "name"), layer_changes.METHODS)
def test_patched_classes_are_called(owner, name, encoded):
    module, x = make(dtype=torch.float32, **layer_changes.OPTIONS).eval(), draw(dtype=torch.float32)
    with layer_changes.patched(owner, name) as seen:
        module(x)
    assert seen
    assert not encoded


def carafe_of_logits(module, x):
    return reassemble(x, module.logits(x), **module.spec._asdict())


@pytest.mark.parametrize("name", ["channel_compressor", "content_encoder"])
def test_an_observed_identity_is_called(name, encoded):
    module, seen = make(compressed_channels=None, up=2), []
    module.get_submodule(name).register_forward_hook(lambda *_: seen.append(name))
    run(module, draw())
    assert seen == [name]
    assert not encoded


@pytest.mark.parametrize("owner", ["module", "class"])
def test_patched_logits_are_called(owner, encoded, monkeypatch):
    module, own = make(up=2), CARAFE.logits
    if owner == "module":
        monkeypatch.setattr(module, "logits", lambda x: 2 * own(module, x))
    else:
        monkeypatch.setattr(CARAFE, "logits", lambda self, x: 2 * own(self, x))
    torch.testing.assert_close(module(draw()), reassemble(draw(), module.logits(draw()), **module.spec._asdict()))
    assert not encoded


def test_a_bias_that_does_not_fit_is_an_error(encoded):
    module = make(up=2)
    module.content_encoder.bias = nn.Parameter(torch.zeros(101, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="bias"):
        module(draw())
    assert not encoded


def test_own_logits_are_called(encoded):
    module, x = YoloCARAFE(4, c_mid=6).eval(), draw(dtype=torch.float32)
    torch.testing.assert_close(module(x), carafe_of_logits(module, x))
    assert not encoded


def test_wrong_inputs_have_the_errors_of_the_layers(encoded):
    module = make(up=2, dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"dtype|type"):
        module(draw(dtype=torch.float64))
    with pytest.raises(ValueError, match=r"x must have the shape \[N, 4, H, W\]"):
        module(draw(channels=5, dtype=torch.float32))
    with pytest.raises(ValueError, match="size must be at least 1"):
        module(draw(dtype=torch.float32), size=(100, 100))
    module.content_encoder = nn.Conv2d(6, 99, 3, padding=1)
    with pytest.raises(ValueError, match=r"logits must have shape \(2, 100, 5, 3\)"):
        module(draw(dtype=torch.float32))


def test_no_map_on_a_cpu_suits_matrix_units():
    for dtype in (torch.float32, torch.bfloat16):
        assert not half_encoder.suits_matrix_units(draw(dtype=dtype))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gpu_is_as_exact_as_with_the_layers(options, dtype):
    module, x = make(64, dtype=torch.float32, **options).cuda(), draw(2, 64, 24, 20, dtype=torch.float32).cuda()
    exact = run(deepcopy(module).double(), x.double())
    layers = module.channel_compressor, module.content_encoder, x.to(dtype)
    assert half_encoder.suits_matrix_units(x.to(dtype))
    # without autocast, parameters in float32 are an error of the layers
    assert half_encoder.find_parameters(*layers) is None
    with torch.autocast("cuda", dtype):
        assert half_encoder.find_parameters(*layers) is not None
        results = run(module, x)
        module.content_encoder.register_forward_hook(lambda *_: None)
        layers = run(module, x)
    assert relative_error(results, exact) < 1.25 * relative_error(layers, exact)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
def test_gpu_steps_without_waiting(options):
    module, x = make(64, dtype=torch.float32, **options).cuda(), draw(2, 64, 24, 20, dtype=torch.bfloat16).cuda().requires_grad_()

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            y = module(x)
        y.backward(dy if dy is not None else torch.ones_like(y))
        return y

    dy = None
    dy = torch.ones_like(step())
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_norm_folds_into_the_compressor():
    module, x = make(down=2, compressor_norm=True, compressed_channels=6).eval(), draw()
    nn.init.uniform_(module.compressor_norm[0].running_var, 0.5, 2)
    expected = module(x)
    module.channel_compressor = fuse_conv_bn_eval(module.channel_compressor, module.compressor_norm[0])
    module.compressor_norm[0] = nn.Identity()
    torch.testing.assert_close(module(x), expected)


def count_launches(options, shape, *, trained, layers):
    """Count the launches of a forward under autocast, those of its backward if it is trained, and the bytes of both."""
    module = make(shape[1], dtype=torch.float32, **options).train(trained).to(memory_format=torch.channels_last)
    if layers:
        module.content_encoder.register_forward_hook(lambda *_: None)
    x = draw(*shape, dtype=torch.bfloat16).requires_grad_(trained)
    with torch.set_grad_enabled(trained), LaunchCounter() as forward, torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    dy = torch.ones_like(y)
    with LaunchCounter() as backward:
        if trained:
            y.backward(dy)
    return (forward.total, backward.total), forward.bytes + backward.bytes


UP = {"up": 2, "compressed_channels": "auto"}, (1, 256, 25, 42)
DOWN = {"down": 2, "compressed_channels": "auto", "compressor_norm": True}, (1, 64, 56, 56)


@pytest.mark.parametrize(
    ("options", "shape", "trained", "before", "after", "share_of_bytes"),
    [
        (*UP, False, (10, 0), (5, 0), 0.8),
        (*UP, True, (10, 13), (5, 9), 0.76),
        (*DOWN, False, (12, 0), (7, 0), 0.84),
        (*DOWN, True, (15, 16), (10, 12), 0.88),
    ],
    ids=["up", "up trained", "down", "down trained"],
)
def test_launches_and_bytes(options, shape, trained, before, after, share_of_bytes, encoded):
    """docs/performance.md gives these counts."""
    launches, moved = count_launches(options, shape, trained=trained, layers=True)
    assert launches == before
    assert not encoded
    fewer_launches, less_moved = count_launches(options, shape, trained=trained, layers=False)
    assert fewer_launches == after
    assert less_moved < share_of_bytes * moved


def test_autocast_casts_float32_features_once(monkeypatch):
    module, x = make(16, dtype=torch.float32, up=2), draw(channels=16, dtype=torch.float32)
    with torch.no_grad(), LaunchCounter() as counter, torch.autocast("cpu", torch.bfloat16):
        module(x)
    assert counter.launches["_to_copy"] == 1 + len(list(module.parameters()))
