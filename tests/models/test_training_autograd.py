"""CARAFE with gradients, in half precision on a GPU: one node of the graph, and only where nobody observes the layers."""

import layer_changes
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from training_calls import NORM, call_layers, draw, make, relative_error, run

pytest.importorskip("triton")

from carafepp.kernels.gpu.launch import Plans
from carafepp.kernels.gpu.layer import inference as launching

from carafepp import reassemble


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
