"""CARAFE without gradients, in half precision on a GPU: three launches give what the layers give, and only where nobody observes them."""

from copy import deepcopy

import layer_changes
import pytest
import torch
from carafepp.kernels.geometry import Spec
from commands import run_in_interpreter
from inference_calls import NORM, OPTIONS, PUBLISHED, draw, infer, make
from launches import LaunchCounter
from torch import nn
from torch.overrides import BaseTorchFunctionMode
from torchvision.ops import FrozenBatchNorm2d

triton = pytest.importorskip("triton")

from carafepp.kernels.gpu import launch as plans  # noqa: E402
from carafepp.kernels.gpu.layer import inference as launching  # noqa: E402
from carafepp.kernels.gpu.operator_launches import forward_launches  # noqa: E402
from carafepp.models.half_encoder import FORWARDS  # noqa: E402

from carafepp import reassemble  # noqa: E402

INTERPRETED = launching.INTERPRETED
ON_GPU = torch.cuda.is_available() and not INTERPRETED


def relative_error(value, exact):
    return ((value.double() - exact).norm() / exact.norm()).item()


@pytest.fixture
def inferred(monkeypatch):
    """Take channels_last maps in half precision on a CPU for those of a GPU; list the outputs that were computed in three launches."""
    outputs = []
    run = launching.Inference.run

    def note(self, x, parameters, addresses):
        y = run(self, x, parameters, addresses) if INTERPRETED or x.is_cuda else x.new_zeros(self.layouts.y_shape)
        outputs.append(y)
        return y

    def suits(x):
        return type(x) is torch.Tensor and x.element_size() == 2 and x.is_contiguous(memory_format=torch.channels_last)

    def plan(launch, tensors):
        return plans.Plan(launch, tensors) if tensors[0].is_cuda else None

    monkeypatch.setattr("carafepp.models.carafe.suits_matrix_units", suits)
    monkeypatch.setattr(launching, "runs_on", lambda *_: True)
    monkeypatch.setattr(launching, "Plan", plan)
    monkeypatch.setattr(launching.Inference, "run", note)
    monkeypatch.setattr(launching, "plans", plans.Plans(16))
    return outputs


def test_inference_in_the_interpreter():
    assert f"{len(OPTIONS) + 3} passed" in run_in_interpreter(__file__, "interpreter and not in_the")


PLACES = [pytest.param("cuda", marks=pytest.mark.gpu)] if ON_GPU else ["interpreter"] if INTERPRETED else []
PLACES = PLACES or [pytest.param("none", marks=pytest.mark.skip(reason="no GPU"))]
everywhere = pytest.mark.parametrize("place", PLACES)


@everywhere
@pytest.mark.parametrize("options", [*OPTIONS, *(PUBLISHED if ON_GPU else [])], ids=str)
def test_it_is_as_exact_as_the_layers(options, place, inferred):
    device = "cuda" if place == "cuda" else "cpu"
    module, x = make(16, **options).to(device), draw(n=1 if place == "interpreter" else 3, height=4, device=device)
    with torch.no_grad():
        exact = deepcopy(module).double()(x.double())
    y = infer(module, x)
    assert inferred.pop() is y
    module.content_encoder.register_forward_hook(lambda *_: None)
    layers = infer(module, x)
    assert not inferred
    assert y.stride() == layers.stride()
    assert relative_error(y, exact) < max(1.5 * relative_error(layers, exact), 1e-3)


@everywhere
def test_parameters_are_read_anew(place, inferred):
    device = "cuda" if place == "cuda" else "cpu"
    module, x = make(16, **NORM).to(device), draw(n=1, device=device)
    first = infer(module, x)
    for change in (*module.parameters(), module.compressor_norm[0].running_mean, module.compressor_norm[0].running_var):
        # this bypasses the version counter
        change.data.mul_(1.25)
        changed = infer(module, x)
        assert not torch.equal(first, changed)
        first = changed
    with torch.no_grad():
        assert relative_error(first, deepcopy(module).double()(x.double())) < 2e-3
    assert len(inferred) == 9
    assert len(launching.plans) == 1


@everywhere
def test_parameters_in_half_precision(place, inferred):
    device = "cuda" if place == "cuda" else "cpu"
    module, x = make(16, **NORM).to(device, torch.float16), draw(n=1, device=device)
    with torch.no_grad():
        y = module(x)
        exact = deepcopy(module).double()(x.double())
    assert inferred
    assert relative_error(y, exact) < 2e-3


@everywhere
def test_nan_stays_nan(place, inferred):
    device = "cuda" if place == "cuda" else "cpu"
    module, x = make(16, **NORM).to(device), draw(n=1, device=device)
    module.compressor_norm[0].bias.data[2] = torch.nan
    assert infer(module, x).isnan().all()
    assert inferred


def test_one_plan_for_each_layout(inferred):
    module = make(16, **NORM)
    for x in (draw(), draw(), draw(height=8), draw(n=1), draw()):
        infer(module, x)
    assert len(inferred) == 5
    assert len(launching.plans) == 3
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        module(draw())
    assert len(launching.plans) == 4
    infer(module.to(memory_format=torch.channels_last), draw())
    assert len(launching.plans) == 5


def test_plans_are_bounded(inferred, monkeypatch):
    monkeypatch.setattr(launching, "plans", plans.Plans(3))
    for height in range(5, 10):
        infer(make(16, up=2), draw(height=height))
    assert [planned.features_shape[1] for planned in launching.plans.values()] == [7, 8, 9]


def train_norm(module):
    module.compressor_norm.train()


@pytest.mark.parametrize("change", [*layer_changes.CHANGES, *layer_changes.CHANGES_OF_NORM, train_norm], ids=lambda change: change.__name__)
def test_other_layers_are_called(change, inferred):
    module, x = make(16, **layer_changes.OPTIONS), draw()
    change(module)
    y = infer(module, x)
    assert not inferred
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        expected = reassemble(x, module.logits(x), **module.spec._asdict())
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("freeze", layer_changes.FROZEN, ids=lambda freeze: freeze.__name__)
def test_every_frozen_norm_is_replaced(freeze, inferred):
    module = make(16, **NORM)
    freeze(module)
    infer(module, draw())
    assert len(inferred) == 1


@pytest.mark.parametrize("known", [False, True])
def test_patches_of_frozen_norms_are_called(known, inferred):
    if not known:
        FORWARDS.pop(FrozenBatchNorm2d, None)
    module = make(16, **NORM)
    layer_changes.freeze_norms(module)
    with layer_changes.patched(FrozenBatchNorm2d, "forward") as seen:
        infer(module, draw())
    assert seen
    assert not inferred
    infer(module, draw())
    assert inferred


@pytest.mark.parametrize(("owner", "name"), [*layer_changes.METHODS, *layer_changes.METHODS_OF_NORM])
def test_patched_classes_are_called(owner, name, inferred):
    module, x = make(16, **layer_changes.OPTIONS), draw()
    with layer_changes.patched(owner, name) as seen:
        infer(module, x)
    assert seen
    assert not inferred
    infer(module, x)
    assert inferred


def narrow_compressor(module):
    module.channel_compressor.weight = nn.Parameter(torch.zeros(5, 16, 1, 1))
    module.channel_compressor.bias = nn.Parameter(torch.zeros(5))


def narrow_input(module):
    module.channel_compressor.weight = nn.Parameter(torch.zeros(6, 8, 1, 1))


def shorten_bias(module):
    module.content_encoder.bias = nn.Parameter(torch.zeros(4))


def shorten_statistics(module):
    module.compressor_norm[0].running_mean = torch.zeros(5)


def flatten_weight(module):
    module.content_encoder.weight = nn.Parameter(torch.zeros(36 * 6 * 9))


@pytest.mark.parametrize("change", [narrow_compressor, narrow_input, shorten_bias, shorten_statistics, flatten_weight])
def test_parameters_that_do_not_fit_are_not_read(change, inferred):
    """The layers raise the error, because a kernel would read what follows the parameter in memory."""
    module = make(16, **NORM | {"kernel_size": 3})
    change(module)
    with pytest.raises(RuntimeError):
        infer(module, draw())
    assert not inferred


def leave_gaps(module):
    module.content_encoder.bias = nn.Parameter(torch.randn(50)[::2], requires_grad=False)


def write_integers(module):
    module.content_encoder.stride, module.content_encoder.padding = 2, [1, 1]


@pytest.mark.parametrize("change", [leave_gaps, write_integers])
def test_other_forms_of_parameters_go_to_the_layers(change, inferred):
    module, x = make(16, **NORM), draw()
    change(module)
    torch.testing.assert_close(infer(module, x), infer_layers(module, x))
    assert not inferred


def test_a_map_of_one_pixel_may_be_in_nchw(inferred):
    """A large one is read in a copy, which only the operator's own plan has."""
    x = torch.empty(8192, 512, 1, 1, dtype=torch.float16, device="meta")
    logits, y, lse = (x.new_empty(8192, *sizes) for sizes in ((9, 2, 2, 1, 1), (512, 2, 2), (1, 2, 2, 1, 1)))
    launches = forward_launches(x, logits, y, lse, Spec(3, 2))
    assert [launch.kernel.__name__ for launch in launches] == ["transpose", "banded_forward"]
    module = make(16, up=2)
    infer(module, torch.randn(2, 16, 1, 1).half())
    assert not inferred


def test_a_folded_norm_leaves_its_activation(inferred):
    module = make(16, **NORM)
    module.compressor_norm[0] = nn.Identity()
    infer(module, draw())
    assert inferred
    (planned,) = launching.plans.values()
    assert planned.layers.rectified
    assert not planned.layers.normalized


def test_observers_see_operations(inferred, monkeypatch):
    module, x = make(16, up=2), draw()
    with LaunchCounter() as counter:
        infer(module, x)
    assert counter.total
    assert not inferred
    monkeypatch.setattr("carafepp.models.carafe.train", lambda *_: None)
    with torch.autocast("cpu", torch.float16):
        module(x)
        module.requires_grad_()(x).sum().backward()
    assert not inferred


def test_modes_that_replace_functions_see_operations(inferred):
    module, x = make(16, up=2), draw()
    with torch.device("cpu"):
        infer(module, x)
    assert len(inferred) == 1
    with BaseTorchFunctionMode(), torch.device("cpu"):
        infer(module, x)
    assert len(inferred) == 1


def test_sizes(inferred):
    module, x = make(16, up=2), draw()
    assert infer_size(module, x, (9, 12)).shape == (2, 16, 9, 12)
    assert len(inferred) == 1
    # the last row is repeated, and a list cannot be a key
    assert infer_size(module, x, (11, 12)).shape == (2, 16, 11, 12)
    assert infer_size(module, x, [9, 12]).shape == (2, 16, 9, 12)
    assert infer_size(module, draw(n=0), None).shape == (0, 16, 10, 12)
    assert len(inferred) == 1
    assert infer_size(module, x, torch.Size((9, 12))).shape == (2, 16, 9, 12)
    assert len(inferred) == 2
    # it is equal to a key
    with pytest.raises(TypeError, match="size must be a pair of integers"):
        infer_size(module, x, (9.0, 12))
    for _ in range(2):
        with pytest.raises(ValueError, match="size must be at least 1"):
            infer_size(module, x, (100, 100))


def infer_size(module, x, size):
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        return module(x, size=size)


def test_logits_must_fit(inferred):
    module = make(16, up=2)
    module.content_encoder = nn.Conv2d(64, 99, 3, padding=1)
    with pytest.raises(ValueError, match=r"logits must have shape \(2, 100, 5, 6\)"):
        infer(module, draw())


def test_tensors_that_are_not_aligned(inferred):
    module, x = make(16, up=2), draw()
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].as_strided(x.shape, x.stride()).copy_(x)
    torch.testing.assert_close(infer(module, shifted), infer_layers(module, x))
    assert not inferred
    module.content_encoder.bias = nn.Parameter(torch.empty(101)[1:].copy_(module.content_encoder.bias), requires_grad=False)
    infer(module, x)
    assert not inferred


def infer_layers(module, x):
    observed = deepcopy(module)
    layer_changes.hook(observed.content_encoder)
    return infer(observed, x)


def test_replicas_of_data_parallel(inferred):
    module = make(16, up=2)
    replica = module._replicate_for_data_parallel()
    for name in ("channel_compressor", "content_encoder"):
        layer = getattr(module, name)
        copy = layer._replicate_for_data_parallel()
        copy._parameters = {}
        copy.weight, copy.bias = layer.weight.detach(), layer.bias.detach()
        replica._modules[name] = copy
    infer(replica, draw())
    assert len(inferred) == 1
