"""The operator under the transforms of torch.func and in forward mode, compared with the definition under the same transforms."""

import functools
import warnings

import pytest
import torch
from carafepp.kernels import reassemble, reassemble_reference
from carafepp.kernels.geometry import Spec
from operator_cases import random_inputs
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

SPECS = [
    Spec(3, up=2),
    Spec(3, up=3, down=2, groups=2, normalizer="sigmoid_normalized"),
    Spec(3, down=2, normalizer="sigmoid"),
    Spec(1, up=2, normalizer="none"),
]
BOTH = (0, 1)


def loss(function):
    return lambda x, logits: function(x, logits).sin().sum()


def push_duals(function, x, logits):
    """Tangents of the output, and of the gradients, that forward mode gives without torch.func."""
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t.detach().requires_grad_(), t.cos()) for t in (x, logits)]
        with torch.no_grad():
            y = function(*duals)
        gradients = torch.autograd.grad(loss(function)(*duals), duals, create_graph=True)
        return [forward_ad.unpack_dual(t).tangent for t in (y, *gradients)]


# by name: what is computed from a function of (x, logits) at the stacks xs [3, 1, C, H, W] and ls [3, 1, G * K * K * up**2, Hq, Wq]
TRANSFORMS = {
    "grad": lambda f, xs, ls: grad(loss(f), BOTH)(xs[0], ls[0]),
    "vjp": lambda f, xs, ls: vjp(f, xs[0], ls[0])[1](f(xs[1], ls[1])),
    "jvp": lambda f, xs, ls: jvp(f, (xs[0], ls[0]), (xs[1], ls[1])),
    "jvp of x": lambda f, xs, ls: jvp(lambda x: f(x, ls[0]), (xs[0],), (xs[1],)),
    "jvp of logits": lambda f, xs, ls: jvp(lambda logits: f(xs[0], logits), (ls[0],), (ls[1],)),
    "jacrev": lambda f, xs, ls: jacrev(f, BOTH)(xs[0], ls[0]),
    "jacfwd": lambda f, xs, ls: jacfwd(f, BOTH)(xs[0], ls[0]),
    "hessian": lambda f, xs, ls: hessian(loss(f), BOTH)(xs[0], ls[0]),
    "hessian of logits": lambda f, xs, ls: hessian(lambda logits: loss(f)(xs[0], logits))(ls[0]),
    "reverse over reverse": lambda f, xs, ls: jacrev(grad(loss(f), BOTH), BOTH)(xs[0], ls[0]),
    "forward over forward": lambda f, xs, ls: jacfwd(jacfwd(loss(f), BOTH), BOTH)(xs[0], ls[0]),
    "reverse over forward": lambda f, xs, ls: jacrev(jacfwd(loss(f), BOTH), BOTH)(xs[0], ls[0]),
    "jvp of grad": lambda f, xs, ls: jvp(grad(loss(f), BOTH), (xs[0], ls[0]), (xs[1], ls[1])),
    "vmap": lambda f, xs, ls: vmap(f)(xs, ls),
    "vmap over x": lambda f, xs, ls: vmap(f, (0, None))(xs, ls[0]),
    "vmap over logits": lambda f, xs, ls: vmap(f, (None, 0))(xs[0], ls),
    "vmap of vmap": lambda f, xs, ls: vmap(vmap(f, (0, None)), (None, 0))(xs, ls),
    "vmap along other dimensions": lambda f, xs, ls: vmap(f, (2, 4), 1)(xs.movedim(0, 2), ls.movedim(0, 4)),
    "gradients per sample": lambda f, xs, ls: vmap(grad(loss(f), BOTH))(xs, ls),
    "gradients per sample, shared logits": lambda f, xs, ls: vmap(grad(loss(f), BOTH), (0, None))(xs, ls[0]),
    "gradients per sample, shared x": lambda f, xs, ls: vmap(grad(loss(f), BOTH), (None, 0))(xs[0], ls),
    "grad of vmap": lambda f, xs, ls: grad(loss(lambda x, logits: vmap(f, (0, None))(x, logits)), BOTH)(xs, ls[0]),
    "vmap of hessian": lambda f, xs, ls: vmap(hessian(loss(f)))(xs, ls),
    "forward mode": lambda f, xs, ls: push_duals(f, xs[0], ls[0]),
}


def draw_stacks(spec):
    stacks = [random_inputs(1, 2, 3, 2, spec, torch.float64, seed=seed)[:2] for seed in range(3)]
    return [torch.stack(tensors) for tensors in zip(*stacks, strict=True)]


@functools.cache
def transform_definition(transform, spec):
    return TRANSFORMS[transform](functools.partial(reassemble_reference, **spec._asdict()), *draw_stacks(spec))


@pytest.mark.parametrize("backend", ["torch", "cpu"], indirect=True)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"up{spec.up}-down{spec.down}-{spec.normalizer}")
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_give_what_they_give_for_the_definition(transform, spec, backend):
    expected = transform_definition(transform, spec)
    with warnings.catch_warnings():
        # PyTorch warns of a slow fall-back where an op has no batching rule
        warnings.filterwarnings("error", message=".*performance drop")
        actual = TRANSFORMS[transform](functools.partial(reassemble, backend=backend, **spec._asdict()), *draw_stacks(spec))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", ["torch", "cpu"], indirect=True)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"up{spec.up}-down{spec.down}-{spec.normalizer}")
@pytest.mark.parametrize("transform", [name for name in TRANSFORMS if name != "forward mode"])
def test_transforms_do_not_depend_on_the_mode_of_autograd(transform, spec, backend):
    """Without gradients outside, the backward of an inner level is not recorded, and an outer level differentiates it all the same."""
    with torch.no_grad():
        actual = TRANSFORMS[transform](functools.partial(reassemble, backend=backend, **spec._asdict()), *draw_stacks(spec))
    torch.testing.assert_close(actual, transform_definition(transform, spec), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_traced_gradients_can_be_differentiated(spec):
    """A graph of gradients that were not recorded holds the op of the gradients with the normalizer of the call."""
    x, logits = (t.requires_grad_() for t in random_inputs(1, 2, 3, 2, spec, torch.float64)[:2])
    call, define = (functools.partial(function, **spec._asdict()) for function in (reassemble, reassemble_reference))
    gradients = make_fx(lambda *inputs: torch.autograd.grad(loss(call)(*inputs), inputs))(x, logits)
    actual = torch.autograd.grad([g.sin().sum() for g in gradients(x, logits)], (x, logits))
    expected = grad(lambda *inputs: sum(g.sin().sum() for g in grad(loss(define), BOTH)(*inputs)), BOTH)(x, logits)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def push_compiled_duals(function, x, logits):
    """Compute the tangent of the output in forward mode without torch.func."""
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, x.cos()), logits)).tangent


@pytest.mark.parametrize("recorded", [True, False], ids=["gradients", "no gradients"])
@pytest.mark.parametrize("transform", ["jvp", "jvp of logits", "jacfwd", "hessian of logits", "jvp of grad", "forward mode"])
def test_compiled_graphs_have_forward_mode(transform, recorded):
    """A compiled graph enters forward mode without PyTorch's variable of Python that says so."""
    spec = SPECS[1]
    function = functools.partial(reassemble, **spec._asdict())
    run = TRANSFORMS[transform] if transform != "forward mode" else lambda f, xs, ls: push_compiled_duals(f, xs[0], ls[0])
    torch.compiler.reset()
    # slices of one tensor have different offsets, which AOTAutograd refuses for a primal and its tangent
    samples = [[sample.clone() for sample in stack] for stack in draw_stacks(spec)]
    with torch.set_grad_enabled(recorded):
        actual = torch.compile(functools.partial(run, function), backend="aot_eager", fullgraph=True)(*samples)
    expected = run(functools.partial(reassemble_reference, **spec._asdict()), *samples)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("in_dims", [(0, 0), (3, 0), (0, None), (None, 2)], ids=str)
def test_an_empty_batch_of_vmap(in_dims):
    shapes = (2, 4, 3, 5), (2, 36, 3, 5)
    stacks = [shape if dim is None else (*shape[:dim], 0, *shape[dim:]) for shape, dim in zip(shapes, in_dims, strict=True)]
    x, logits = map(torch.rand, stacks)
    function = functools.partial(reassemble, kernel_size=3, up=2)
    assert vmap(function, in_dims)(x, logits).shape == (0, 2, 4, 6, 10)
    gradients = vmap(grad(loss(function), BOTH), in_dims)(x, logits)
    assert [g.shape for g in gradients] == [(0, *shape) for shape in shapes]


@pytest.mark.parametrize("spec", SPECS[:2], ids=str)
def test_jacobians_of_stacked_gradients(spec):
    """`is_grads_batched` hides the gradients of the output in one tensor, whose memory no kernel can read."""
    x, logits, _ = random_inputs(1, 4, 3, 2, spec, torch.float64)
    options = spec._asdict() | {"backend": "torch"}
    result, expected = (
        torch.autograd.functional.jacobian(lambda x, logits: reassemble(x, logits, **options), (x, logits), vectorize=vectorize)
        for vectorize in (True, False)
    )
    torch.testing.assert_close(result, expected)
