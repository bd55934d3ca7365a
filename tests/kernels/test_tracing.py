"""The operator in graphs: make_fx, AOTAutograd, checkpointing of activations, exported programs in another process."""

import functools

import pytest
import torch
from carafepp.kernels import reassemble
from carafepp.kernels.geometry import Spec
from commands import run_after_torch
from operator_cases import random_inputs
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

FORWARD = torch.ops.carafepp.reassemble.default
BACKWARD = torch.ops.carafepp.reassemble_backward.default
SPEC = Spec(3, up=3, down=2, groups=2)


def compute(x, logits):
    return reassemble(x.sin(), 2 * logits, **SPEC._asdict()).cos()


def compute_gradients(x, logits):
    """Compute the gradients in a form that make_fx can trace."""
    return torch.autograd.grad(compute(x, logits).square().sum(), (x, logits), create_graph=True)


def draw(h, w):
    return random_inputs(2, 4, h, w, SPEC)[:2]


def step(function, x, logits, dy):
    """Return y and the gradients that `backward` accumulates."""
    leaves = [t.detach().requires_grad_() for t in (x, logits)]
    y = function(*leaves)
    y.backward(dy)
    return y.detach(), *(t.grad for t in leaves)


def count(graph: torch.fx.GraphModule, op: torch._ops.OpOverload) -> int:
    return sum(node.target is op for node in graph.graph.nodes)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_keeps_the_ops(mode):
    inputs = [t.requires_grad_() for t in draw(5, 4)]
    traced = make_fx(compute, tracing_mode=mode)(*inputs)
    assert (count(traced, FORWARD), count(traced, BACKWARD)) == (1, 0)
    gradients = make_fx(compute_gradients, tracing_mode=mode)(*inputs)
    assert (count(gradients, FORWARD), count(gradients, BACKWARD)) == (1, 1)
    for size in [(5, 4)] if mode != "symbolic" else [(5, 4), (7, 6), (3, 9)]:
        inputs = [t.requires_grad_() for t in draw(*size)]
        torch.testing.assert_close(traced(*inputs), compute(*inputs))
        torch.testing.assert_close(gradients(*inputs), list(compute_gradients(*inputs)))


class Counter(TorchDispatchMode):
    """Count the calls of every op."""

    def __init__(self):
        super().__init__()
        self.calls = {FORWARD: 0, BACKWARD: 0}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op in self.calls:
            self.calls[op] += 1
        return op(*args, **(kwargs or {}))


def save_the_operator(context, op, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if op is FORWARD else CheckpointPolicy.PREFER_RECOMPUTE


def recompute_all(context, op, *args, **kwargs):
    return CheckpointPolicy.PREFER_RECOMPUTE


def checkpointed(policy=None, use_reentrant=False):
    """Return `compute` with checkpointed activations."""
    options = {"context_fn": functools.partial(create_selective_checkpoint_contexts, policy)} if policy else {}
    return lambda x, logits: checkpoint(compute, x, logits, use_reentrant=use_reentrant, **options)


@pytest.mark.parametrize(
    ("function", "forwards"),
    [
        (compute, 1),
        (checkpointed(use_reentrant=True), 2),
        (checkpointed(use_reentrant=False), 2),
        (checkpointed(recompute_all), 2),
        (checkpointed(save_the_operator), 1),
    ],
    ids=["no checkpoint", "reentrant", "not reentrant", "selective, recomputed", "selective, saved"],
)
def test_checkpointed_activations(function, forwards):
    x, logits, dy = random_inputs(2, 4, 5, 4, SPEC)
    expected = step(compute, x, logits, dy)
    with Counter() as counter:
        actual = step(function, x, logits, dy)
    assert counter.calls == {FORWARD: forwards, BACKWARD: 1}
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize(
    ("function", "recomputed"),
    [(compute, 0), (checkpointed(), 1), (checkpointed(recompute_all), 1), (checkpointed(save_the_operator), 0)],
    ids=["no checkpoint", "checkpoint", "selective, recomputed", "selective, saved"],
)
def test_the_min_cut_partition_computes_the_operator_again_only_if_told_to(function, recomputed):
    torch.compiler.reset()
    graphs = []

    def keep(graph, example):
        graphs.append(graph)
        return make_boxed_func(graph)

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
    inputs = random_inputs(2, 4, 5, 4, SPEC)
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    torch.testing.assert_close(step(compiled, *inputs), step(compute, *inputs))
    forward, backward = graphs
    assert (count(forward, FORWARD), count(backward, FORWARD), count(backward, BACKWARD)) == (1, recomputed, 1)


class Compute(nn.Module):
    """`compute` as a module."""

    def forward(self, x, logits):
        return compute(x, logits)


def test_programs_of_both_exporters_run_in_another_process(tmp_path):
    any_size = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    for strict in (True, False):
        program = torch.export.export(Compute(), draw(6, 8), dynamic_shapes=(any_size, any_size), strict=strict)
        assert count(program.graph_module, FORWARD) == 1
        torch.export.save(program, tmp_path / f"{strict}.pt2")
    inputs = draw(9, 5)
    torch.save((*inputs, compute(*inputs)), tmp_path / "expected.pt")
    run_after_torch(
        """if True:
        import torch
        import carafepp.kernels
        *inputs, expected = torch.load("expected.pt")
        for strict in (True, False):
            torch.testing.assert_close(torch.export.load(f"{strict}.pt2").module()(*inputs), expected)
        """,
        cwd=tmp_path,
    )


def test_compiled_autograd_takes_a_backward_pass():
    torch.compiler.reset()
    x, logits = draw(5, 4)
    dy = compute(x, logits).cos()
    expected = step(compute, x, logits, dy)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        torch.testing.assert_close(step(compute, x, logits, dy), expected)
