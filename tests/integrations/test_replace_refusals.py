"""Wrong uses of `replace`, each with an error that says what would be right, and a network that is as before."""

import copy
from functools import partial

import pytest
import torch
import torch.nn as nn
from carafepp.models.guided_samplers import SAPA

from carafepp import CARAFE, replace

X = torch.rand(1, 4, 8, 8)


def make() -> nn.Sequential:
    return nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(4, 4, 1), nn.Upsample(scale_factor=2))


def wrap_distributed() -> nn.Module:
    # without the process group that its constructor wants
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = make()
    return wrapped


def compile_in_place() -> nn.Module:
    model = make()
    model.compile()
    return model


def quantise() -> nn.Module:
    conv = torch.ao.nn.quantized.Conv2d(4, 4, 1)
    return nn.Sequential(nn.MaxPool2d(2), conv)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ("resnet", TypeError, "model must be a torch.nn.Module, got str"),
        (make, TypeError, "model must be a torch.nn.Module, got function"),
        (
            nn.DataParallel(make()),
            ValueError,
            "model is a DataParallel: replace in the network inside it, then wrap it and build the optimizer",
        ),
        (wrap_distributed(), ValueError, "model is a DistributedDataParallel: replace in the network inside it"),
        (nn.Sequential(nn.DataParallel(make())), ValueError, "model.0 is a DataParallel"),
        (torch.compile(make()), ValueError, "model is compiled by torch.compile: replace in the network before compiling it"),
        (compile_in_place(), ValueError, "model is compiled by torch.compile"),
        (nn.Sequential(torch.compile(make())), ValueError, "model.0 is compiled by torch.compile"),
        (torch.jit.script(make()), TypeError, "model is a TorchScript module, .*: replace in the Python module, then script it"),
        (quantise(), ValueError, "model.1 is a quantised Conv2d: replace in the network before quantising it"),
        (nn.Sequential(nn.LazyConv2d(4, 3, 2)), ValueError, "model.0 is a LazyConv2d without a shape yet: run a forward of the model"),
    ],
    ids=lambda value: "" if isinstance(value, str | type) else type(value).__name__,
)
def test_models_that_are_refused(model, error, message):
    with pytest.raises(error, match=message):
        replace(model, up="carafe", down="carafe", example=X)


NO_MODULE = "up must return a torch.nn.Module for a number of channels, got int"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, 'give up=, down= or both: a callable that takes channels, or a name such as "carafe"'),
        ({"up": "caraffe"}, ValueError, "up must be a callable or one of a2u, bilinear, .*carafe, .*got 'caraffe'"),
        ({"down": "bilinear"}, ValueError, "down must be a callable or one of .*avg_pool, .*got 'bilinear'"),
        ({"up": "published"}, ValueError, "got 'published'"),
        ({"up": "../downsampler/carafe"}, ValueError, "up must be a callable or one of"),
        ({"up": 2}, TypeError, "up must be a callable that takes channels, or a name, got int"),
        ({"up": CARAFE(4, up=2)}, TypeError, "up must be a callable that takes channels, or a name, got CARAFE"),
        (
            {"up": "sapa"},
            ValueError,
            "up='sapa' needs the finer map as its guide, .*samplers without a guide: bilinear, bilinear_conv, carafe",
        ),
        ({"up": partial(SAPA, embedding=8)}, ValueError, "needs the finer map as its guide"),
        ({"up": lambda channels: SAPA(channels)}, ValueError, "needs the finer map as its guide"),
        ({"up": lambda channels: channels}, TypeError, NO_MODULE),
        ({"up": "carafe", "where": 3}, TypeError, "where must be a name, a glob pattern or a sequence of them, got 3"),
        ({"up": "carafe", "where": [2]}, TypeError, "where must be a name, a glob pattern or a sequence of them, got 2"),
        ({"up": "carafe", "where": "0"}, ValueError, "nothing can be replaced.*\n.*\n.*down= is not given"),
        ({"down": partial(CARAFE, up=2)}, ValueError, "it resizes by 2 and the sampler by 1"),
        (
            {"up": lambda channels: nn.Identity()},
            ValueError,
            r"turns maps of 4 x 4 x 4 into 4 x 8 x 8,\s+and\s+the\s+sampler",
        ),
        ({"up": lambda channels: nn.Linear(3, 4)}, RuntimeError, "shapes cannot be multiplied"),
    ],
)
def test_arguments_that_are_wrong(options, error, message):
    model = make()
    modules = dict(model.named_modules())
    with pytest.raises(error, match=message):
        replace(model, **options, example=X)
    assert dict(model.named_modules()) == modules


def test_nothing_found():
    with pytest.raises(ValueError, match="nothing can be replaced"):
        replace(nn.Sequential(nn.Conv2d(4, 4, 3)), up="carafe", down="carafe", example=X)
    with pytest.raises(ValueError, match=r"without example=, calls of functions such as F\.interpolate are not\s+found"):
        replace(nn.Sequential(nn.Conv2d(4, 4, 3)), up="carafe")
    report = replace(nn.Sequential(nn.Conv2d(4, 4, 3)), up="carafe", dry_run=True, example=X)
    assert str(report) == "nothing replaced"


def test_replaced_model_is_left():
    model = make()
    replace(model, up="carafe", down="carafe", example=X)
    modules = dict(model.named_modules())
    report = replace(model, up="carafe", down="carafe", example=X)
    assert report.replaced == []
    assert report.left == []
    assert str(report) == "nothing replaced\nsamplers already: 0, 2"
    assert dict(model.named_modules()) == modules
    assert replace(model, up="carafe", where="2", example=X).replaced == []
    assert replace(copy.deepcopy(model), up="carafe", down="carafe", example=X).replaced == []


def test_sampler_of_someone_else_is_left_by_a_second_call():
    model = make()
    replace(model, up=lambda channels: nn.Upsample(scale_factor=2), example=X)
    assert replace(model, up="carafe", example=X).replaced == []


def test_dry_run_without_samplers_lists_what_resamples():
    report = replace(make(), dry_run=True, example=X)
    assert [(place.path, place.what, place.reason) for place in report.left] == [
        ("0", "MaxPool2d k2 s2", "down= is not given"),
        ("2", "Upsample x2 nearest", "up= is not given"),
    ]


def test_error_of_the_example_leaves_the_model():
    model = make()
    model[1].eval()
    with pytest.raises(RuntimeError, match="expected input"):
        replace(model, up="carafe", example=torch.rand(1, 3, 8, 8))
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_scripted_part_is_left():
    model = nn.Sequential(torch.jit.script(nn.Sequential(nn.MaxPool2d(2))), nn.Upsample(scale_factor=2))
    report = replace(model, up="carafe", down="carafe", example=X)
    assert [row.path for row in report.replaced] == ["1"]
