"""Modules under torch.func and in forward mode: gradients per sample, ensembles, derivatives with respect to parameters."""

from functools import partial

import pytest
import torch
from carafepp.kernels import reassemble
from carafepp.models.carafe import CARAFE
from sampler_cases import CASES
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, replace_all_batch_norm_modules_, stack_module_state, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

# PyTorch scripts decompositions at the first use of forward mode
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning", "ignore:.*is deprecated:DeprecationWarning")

SAMPLES = 3


@pytest.fixture(autouse=True)
def no_loop_over_the_batch():
    """Make vmap fail where an op has no batching rule, instead of looping over the batch."""
    torch._C._functorch._set_vmap_fallback_enabled(False)
    yield
    torch._C._functorch._set_vmap_fallback_enabled(True)


class Forced(CARAFE):
    """CARAFE on a backend of choice."""

    def __init__(self, backend, channels, **options):
        super().__init__(channels, kernel_size=3, compressed_channels=2, **options)
        self.backend = backend

    def forward(self, x):
        return reassemble(x, self.logits(x), **self.spec._asdict(), backend=self.backend)


def make_network(backend, seed=0):
    """Make a network that resamples by 2, 1 / 2 and 3 / 2, with parameters of order 1."""
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1),
        Forced(backend, 2, up=2, groups=2),
        nn.Tanh(),
        Forced(backend, 2, down=2, normalizer="sigmoid_normalized"),
        Forced(backend, 2, up=3, down=2, normalizer="sigmoid"),
    ).double()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.4)
    return network


def draw_images():
    """Draw SAMPLES batches of one image, [SAMPLES, 1, 1, 3, 2]."""
    return torch.randn(SAMPLES, 1, 1, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def compute_loss(network, parameters, *arguments):
    return functional_call(network, parameters, arguments).sin().sum()


def push_duals(function, parameters, tangents):
    """Compute the tangent of the function in forward mode without torch.func."""
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(parameter, tangents[name]) for name, parameter in parameters.items()}
        return forward_ad.unpack_dual(function(duals)).tangent


# by name: what is computed from a network, its parameters, tangents of these, and images
TRANSFORMS = {
    "gradients per sample": lambda net, p, t, xs: vmap(grad(partial(compute_loss, net), (0, 1)), (None, 0))(p, xs),
    "jvp": lambda net, p, t, xs: jvp(lambda p: functional_call(net, p, xs[0]), (p,), (t,)),
    "jvp per sample": lambda net, p, t, xs: vmap(lambda x: jvp(lambda p: functional_call(net, p, x), (p,), (t,)))(xs),
    "forward mode": lambda net, p, t, xs: push_duals(lambda p: functional_call(net, p, xs[0]), p, t),
    "jacfwd": lambda net, p, t, xs: jacfwd(lambda p: functional_call(net, p, xs[0]))(p),
    "jacrev": lambda net, p, t, xs: jacrev(lambda p: functional_call(net, p, xs[0]))(p),
    "hessian": lambda net, p, t, xs: hessian(partial(compute_loss, net))({name: p[name] for name in list(p)[2:6]}, xs[0]),
    "hessian times vector": lambda net, p, t, xs: jvp(grad(lambda p: compute_loss(net, p, xs[0])), (p,), (t,)),
}


@pytest.mark.parametrize("backend", ["torch", "cpu"], indirect=True)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_a_network_give_what_they_give_for_the_definition(transform, backend):
    results = []
    for name in (backend, "reference"):
        network = make_network(name)
        parameters = {name: parameter.detach() for name, parameter in network.named_parameters()}
        tangents = {name: parameter.cos() for name, parameter in parameters.items()}
        results.append(TRANSFORMS[transform](network, parameters, tangents, draw_images()))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"], indirect=True)
def test_gradients_per_sample_are_those_of_a_loop(backend):
    network, xs = make_network(backend), draw_images()
    parameters = dict(network.named_parameters())
    gradients = vmap(grad(partial(compute_loss, network)), (None, 0))(parameters, xs)
    for i, x in enumerate(xs):
        expected = torch.autograd.grad(network(x).sin().sum(), list(parameters.values()))
        torch.testing.assert_close([gradients[name][i] for name in parameters], list(expected))


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"], indirect=True)
@pytest.mark.parametrize("shared", [True, False], ids=["same images", "images of their own"])
def test_ensembles_are_those_of_a_loop(shared, backend):
    networks, xs = [make_network(backend, seed) for seed in range(SAMPLES)], draw_images()
    parameters, buffers = stack_module_state(networks)

    def call(parameters, buffers, x):
        return functional_call(networks[0], (parameters, buffers), x)

    y = vmap(call, (0, 0, None if shared else 0))(parameters, buffers, xs[0] if shared else xs)
    expected = torch.stack([network(xs[0] if shared else x) for network, x in zip(networks, xs, strict=True)])
    torch.testing.assert_close(y, expected)
    leaves = list(parameters.values())
    actual = torch.autograd.grad(y.sin().sum(), leaves)
    expected = torch.autograd.grad(expected.sin().sum(), [p for network in networks for p in network.parameters()])
    torch.testing.assert_close(list(actual), [torch.stack(expected[i :: len(leaves)]) for i in range(len(leaves))])


class Recorder(TorchDispatchMode):
    """Keep the batch size N of every call of the ops."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "carafepp":
            self.batches.append(len(args[0]))
        return op(*args, **(kwargs or {}))


def test_the_batch_of_vmap_is_folded_into_one_call():
    network, xs = make_network("torch"), draw_images()
    with Recorder() as recorder:
        vmap(grad(partial(compute_loss, network)), (None, 0))(dict(network.named_parameters()), xs)
    # forward and backward of three modules
    assert recorder.batches == [SAMPLES] * 6


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.group}-{case.id}")
def test_samplers_give_gradients_per_sample(case):
    torch.manual_seed(0)
    module = case.slot(8).double().eval()
    maps = [torch.randn(SAMPLES, 1, 8, 4, 3, dtype=torch.float64)]
    maps += [torch.randn(SAMPLES, 1, 8, 8, 5, dtype=torch.float64)] if case.guided else []
    which = tuple(range(1 + len(maps)))
    differentiate = grad(partial(compute_loss, module), which)
    parameters = dict(module.named_parameters())
    gradients = vmap(differentiate, (None, *[0] * len(maps)))(parameters, *maps)
    for i in range(SAMPLES):
        torch.testing.assert_close(
            tree_map(lambda stack, i=i: stack[i], gradients), differentiate(parameters, *(stack[i] for stack in maps))
        )


def test_gradients_per_sample_in_training_need_norms_without_running_statistics():
    module, xs = CARAFE(8, down=2, compressor_norm=True), torch.randn(SAMPLES, 1, 8, 4, 6)
    differentiate = vmap(grad(partial(compute_loss, module)), (None, 0))
    with pytest.raises(RuntimeError, match="in-place operation"):
        differentiate(dict(module.named_parameters()), xs)
    replace_all_batch_norm_modules_(module)
    gradients = differentiate(dict(module.named_parameters()), xs)
    assert all(stack.isfinite().all() for stack in gradients.values())


@pytest.mark.parametrize("options", [dict(up=2), dict(down=2), dict(up=2, compressed_channels=None)], ids=str)
def test_autocast_below_vmap(options):
    """PyTorch leaves layers below vmap in float32; their input must then stay so, too."""
    module, xs = CARAFE(8, **options), torch.randn(SAMPLES, 1, 8, 4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = vmap(module)(xs), torch.stack([module(x) for x in xs])
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
