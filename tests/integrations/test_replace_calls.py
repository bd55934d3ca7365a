"""`replace` where a forward calls functions: the forward is rewritten, and everything else about its module stays."""

import copy
import inspect
import pickle
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from carafepp import CARAFE, replace

small_up, small_down = partial(CARAFE, up=2, compressed_channels=4), partial(CARAFE, down=2, compressed_channels=4)


class Decoder(nn.Module):
    """Functions in a forward, with sizes that only a forward tells."""

    def __init__(self):
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 1)
        self.unused = nn.Linear(2, 2)
        self.gain = nn.Parameter(torch.ones(4, 1, 1))
        self.register_buffer("shift", torch.zeros(4, 1, 1))
        self.register_buffer("temporary", torch.zeros(1), persistent=False)
        self.norm = nn.BatchNorm2d(4)
        self.merge = nn.Conv2d(10, 2, 1)
        self.out_channels = 2

    def forward(self, x, scale=1.0, *, mode="nearest"):
        a = self.norm(self.stem(x)) * self.gain + self.shift
        b = self.deep(F.max_pool2d(a, 2)) * scale
        c = F.interpolate(F.avg_pool2d(b, kernel_size=3, stride=2, padding=1), size=b.shape[-2:], mode=mode)
        y = self.merge(torch.cat([a, F.interpolate(b + c, a.shape[2:], mode="bilinear", align_corners=False)], 1))
        return F.interpolate(y, scale_factor=2)


X = torch.rand(2, 3, 17, 24, generator=torch.Generator().manual_seed(0))
CALLS = ["max_pool2d_0", "avg_pool2d_0", "interpolate_0", "interpolate_1", "interpolate_2"]


def test_forward_of_the_model_is_rewritten():
    model = Decoder()
    keys = list(model.state_dict())
    report = replace(model, up=small_up, down=small_down, example=X)
    assert [row.path for row in report.replaced] == CALLS
    # the object, its class and its methods stay
    assert report.model is model
    assert isinstance(model, Decoder)
    assert type(model).__name__ == "Decoder"
    assert str(inspect.signature(model.forward)) == "(x, scale=1.0, *, mode='nearest')"
    assert [key for key in report.model.state_dict() if not key.split(".")[0][-1].isdigit()] == keys
    for size in ((17, 24), (16, 21), (11, 13)):
        x = torch.rand(1, 3, *size)
        assert model(x).shape == Decoder()(x).shape == (1, 2, 2 * size[0], 2 * size[1])
    model(X).sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if not name.startswith("unused"))
    assert report.undo() is model
    assert type(model) is Decoder
    assert list(model.state_dict()) == keys
    assert vars(model).keys() == vars(Decoder()).keys()


def test_rewritten_forward_computes_the_same_beside_the_samplers():
    model = Decoder().eval()
    expected = model(X)
    # a sampler that does what the function did
    replace(model, up=lambda channels: nn.Upsample(scale_factor=2), where="interpolate_2", example=X)
    torch.testing.assert_close(model(X), expected, rtol=0, atol=0)


def test_arguments_are_fixed_as_in_the_example():
    model = replace(Decoder(), up=small_up, example=(X, 2.0)).model
    assert model(X, 2.0).shape == (2, 2, 34, 48)
    assert model(X, scale=2.0, mode="nearest").shape == (2, 2, 34, 48)
    with pytest.raises(ValueError, match=r"the forward of Decoder was rewritten for the argument 2\.0, got 1\.0"):
        model(X)


@pytest.mark.parametrize("other", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"])
def test_copies_of_rewritten_models(other):
    model = replace(Decoder(), up=small_up, down=small_down, example=X).model.eval()
    twin = other(model)
    torch.testing.assert_close(twin(X), model(X), rtol=0, atol=0)
    assert list(twin.state_dict()) == list(model.state_dict())
    # it is a model of its own
    assert not {id(p) for p in model.parameters()} & {id(p) for p in twin.parameters()}
    nn.init.ones_(twin.merge.bias)
    nn.init.zeros_(model.merge.bias)
    assert not torch.equal(twin(X), model(X))
    assert replace(twin, up=small_up, down=small_down, example=X).replaced == []


def test_state_dict_of_rewritten_models():
    first, second = (replace(Decoder(), up=small_up, down=small_down, example=X).model.eval() for _ in range(2))
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(second(X), first(X), rtol=0, atol=0)


def test_mode_and_hooks_of_the_rewritten_module():
    model = nn.Sequential(Decoder(), nn.ReLU())
    calls = []
    model[0].register_forward_hook(lambda module, args, y: calls.append(y.shape))
    decoder = model[0]
    report = replace(model, up=small_up, down=small_down, example=X)
    assert report.model is model
    assert model[0] is decoder
    assert all(module.training for module in model.modules())
    before = decoder.norm.running_mean.clone()
    calls.clear()
    model(X)
    assert len(calls) == 1
    assert not torch.equal(decoder.norm.running_mean, before)
    model.eval()
    assert not model[0].norm.training
    report.undo()
    assert model[0] is decoder


def test_second_call_replaces_the_rest():
    model = replace(Decoder(), up=small_up, example=X).model
    report = replace(model, down=small_down, example=X)
    assert [row.path for row in report.replaced] == CALLS[:2]
    again = replace(report.model, up=small_up, down=small_down, example=X)
    assert again.replaced == []
    assert again.model is report.model
    assert "samplers already: interpolate_0, interpolate_1, interpolate_2, max_pool2d_0, avg_pool2d_0" in str(again)
    assert again.model(X).shape == (2, 2, 34, 48)


def test_some_calls_of_one_forward():
    report = replace(Decoder(), up=small_up, where=["interpolate_1", "interpolate_2"], example=X)
    assert [row.path for row in report.replaced] == CALLS[3:]
    # a second replacement must not take the names of the first
    again = replace(report.model, up=small_up, example=X)
    assert [row.path for row in again.replaced] == ["interpolate_0"]
    assert report.model(X).shape == (2, 2, 34, 48)
    assert copy.deepcopy(report.model)(X).shape == (2, 2, 34, 48)
    again.undo()
    assert report.model(X).shape == (2, 2, 34, 48)
    report.undo()
    assert type(report.model) is Decoder


class Pyramid(nn.Module):
    """An FPN as torchvision's detectors use it: maps come and go in dictionaries."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in ((8, 4), (4, 6), (6, 8)))
        self.fpn = FeaturePyramidNetwork([4, 6, 8], 4, extra_blocks=LastLevelMaxPool())

    def forward(self, x):
        maps = {}
        for i, conv in enumerate(self.convs):
            maps[str(i)] = x = conv(x)
        return list(self.fpn(maps).values())


@pytest.mark.parametrize("size", [(32, 48), (31, 45)])
def test_torchvision_fpn(size):
    model = Pyramid()
    x = torch.rand(1, 8, *size)
    expected = [y.shape for y in model(x)]
    report = replace(model, up=small_up, down=small_down, where="fpn", example=x)
    assert [row.path for row in report.replaced] == ["fpn.interpolate_0", "fpn.interpolate_1", "fpn.extra_blocks_max_pool2d_0"]
    assert [y.shape for y in model(x)] == expected
    assert [y.shape for y in copy.deepcopy(model)(x)] == expected
    assert [y.shape for y in pickle.loads(pickle.dumps(model))(x)] == expected
    report.undo()
    assert type(model.fpn) is FeaturePyramidNetwork
    assert [y.shape for y in model(x)] == expected


class Branching(nn.Module):
    def forward(self, x):
        return F.interpolate(x, scale_factor=2) if x.sum() > 0 else x


class ByMode(nn.Module):
    def forward(self, x):
        y = F.interpolate(x, scale_factor=2)
        return y + 1 if self.training else y


class Repeated(nn.Module):
    def __init__(self):
        super().__init__()
        self.level, self.conv = Level(), nn.Conv2d(4, 6, 1)

    def forward(self, x):
        return self.level(self.conv(self.level(x)))


class Level(nn.Module):
    def forward(self, x):
        return F.interpolate(x, scale_factor=2)


CONTROL_FLOW = "symbolically traced variables cannot be used as inputs to control flow"


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Branching(), f"torch.fx cannot trace the forward of Branching: {CONTROL_FLOW}"),
        (ByMode(), "the forward of ByMode differs between training and evaluation, and torch.fx keeps only one"),
        (Repeated(), "it gets maps of different channels: 4, 6"),
    ],
    ids=["branch", "mode", "channels"],
)
def test_calls_that_are_left(model, reason):
    modes, names = model.training, set(vars(model))
    report = replace(model, up=small_up, example=torch.rand(1, 4, 3, 3), dry_run=True)
    assert [place.reason for place in report.left] == [reason]
    assert (model.training, set(vars(model))) == (modes, names)


class Switching(nn.Module):
    """Calls a module twice, with different arguments."""

    def __init__(self):
        super().__init__()
        self.decoder = Decoder()

    def forward(self, x):
        return self.decoder(x) + self.decoder(x, scale=2.0)


def test_module_that_is_called_with_different_arguments():
    report = replace(Switching(), up=small_up, example=X, dry_run=True)
    assert {place.reason for place in report.left} >= {"its module is called with different arguments"}
    assert report.replaced == []


class Outer(nn.Module):
    """Calls functions itself, beside a module that does."""

    def __init__(self):
        super().__init__()
        self.decoder = Decoder()

    def forward(self, x):
        return F.interpolate(self.decoder(F.max_pool2d(x, 2)), scale_factor=2)


def test_modules_within_rewritten_modules():
    model = Outer().eval()
    report = replace(model, up=small_up, down=small_down, example=X)
    assert [row.path for row in report.replaced] == ["max_pool2d_0", "interpolate_0", *(f"decoder.{name}" for name in CALLS)]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(X), model(X), rtol=0, atol=0)
    report.undo()
    assert type(model) is Outer
    assert type(model.decoder) is Decoder


class Constant(nn.Module):
    def forward(self, x):
        return F.interpolate(x, scale_factor=2) * torch.tensor([1.0, 2.0]).view(1, 2, 1, 1)


def test_constants_do_not_stay_in_the_original():
    model = Constant()
    names = set(vars(model))
    report = replace(model, up=small_up, example=torch.rand(1, 2, 3, 3))
    assert model(torch.rand(1, 2, 3, 3)).shape == copy.deepcopy(model)(torch.rand(1, 2, 3, 3)).shape == (1, 2, 6, 6)
    report.undo()
    assert set(vars(model)) == names


class Container(nn.Module):
    """Takes maps in a list, with optional arguments after it."""

    def forward(self, maps, flag=None, names=("a",)):
        y = F.interpolate(maps[-1], scale_factor=2)
        return maps[0] + y if flag is None else y


def test_optional_arguments_after_a_container():
    model = nn.Sequential(Container())
    maps = [torch.rand(1, 4, 6, 6), torch.rand(1, 4, 3, 3)]
    replace(model, up=small_up, example=[maps[0], maps[1]])
    assert model([maps[0], maps[1]]).shape == (1, 4, 6, 6)


def test_keyword_example():
    report = replace(Decoder(), up=small_up, example={"x": X, "mode": "nearest"})
    assert report.model(x=X, mode="nearest").shape == (2, 2, 34, 48)


class Alias(nn.Module):
    """Holds its layer a second time in a plain list."""

    def __init__(self):
        super().__init__()
        self.pool = nn.MaxPool2d(2)
        self.all = [self.pool]

    def forward(self, x):
        return self.all[0](x)


def test_layer_that_is_held_elsewhere():
    model = Alias()
    pool = model.pool
    with pytest.raises(RuntimeError, match="still calls what was at pool, which it must also hold outside its modules; it is as before"):
        replace(model, down=small_down, example=torch.rand(1, 4, 6, 6))
    assert model.pool is pool


class Helper(nn.Module):
    def double(self, x):
        return 2 * x

    def forward(self, x):
        return F.interpolate(x, scale_factor=2)


class CallsMethod(nn.Module):
    def __init__(self):
        super().__init__()
        self.helper = Helper()

    def forward(self, x):
        return self.helper.double(self.helper(x))


def test_methods_of_a_rewritten_module_stay():
    model = CallsMethod()
    replace(model, up=small_up, example=torch.rand(1, 4, 3, 3))
    assert model(torch.rand(1, 4, 3, 3)).shape == (1, 4, 6, 6)


def test_rewritten_models_are_traced_compiled_and_exported():
    model = replace(Decoder().eval(), up=small_up, down=small_down, example=X).model
    x = torch.rand(1, 3, 18, 22)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))
    exported = torch.export.export(model, (X[:1],), dynamic_shapes={"x": {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}})
    torch.testing.assert_close(exported.module()(x), model(x))


class Wide(nn.Module):
    """Every kind of parameter that a forward can have."""

    def forward(self, x, /, y=None, *more, gain=1.0, **options):
        return F.interpolate(x, scale_factor=2) * gain + (0 if y is None else y) + sum(more) + options["shift"]


def test_every_kind_of_parameter():
    model, x, y = Wide(), torch.rand(1, 4, 3, 3), torch.rand(1, 4, 6, 6)
    expected = model(x, y, y, y, gain=2.0, shift=y)
    holder = nn.ModuleDict({"wide": model})
    holder.forward = lambda x: holder["wide"](x, y, y, y, gain=2.0, shift=y)
    replace(holder, up=lambda channels: nn.Upsample(scale_factor=2), example=x)
    assert str(inspect.signature(model.forward)) == "(x, /, y=None, *more, gain=1.0, **options)"
    torch.testing.assert_close(model(x, y, y, y, gain=2.0, shift=y), expected)
    with pytest.raises(ValueError, match="the forward of Wide was rewritten for arguments of this structure"):
        model(x, y, shift=y)


class Paste(nn.Module):
    """Resizes to sizes of all kinds, as a detector does with its masks."""

    def forward(self, x):
        return [F.interpolate(x, size=(i, 1)) for i in range(1, 21)]


def test_many_calls_are_one_line_of_the_report():
    report = replace(Paste(), up=small_up, example=torch.rand(1, 2, 3, 3), dry_run=True)
    assert len(report.left) == 20
    text = " ".join(str(report).split())
    assert "interpolate_11, 8 more, interpolate to size: its output is not a whole number of times as large as its input" in text


class Sized(nn.Module):
    """A decoder block that gets the size of its output as numbers, or a factor."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x, rows, columns, skip=None, factor=None):
        if factor is not None:
            return self.conv(F.interpolate(x, scale_factor=factor))
        y = self.conv(F.interpolate(x, size=(rows, columns)))
        return y if skip is None else y + skip


def test_sizes_stay_free():
    x = torch.rand(1, 4, 5, 6)
    model = replace(Sized(), up=small_up, example=(x, 10, 12)).model
    assert model(x, rows=10, columns=12).shape == (1, 4, 10, 12)
    assert model(x[..., :4], 9, columns=8).shape == (1, 4, 9, 8)
    with pytest.raises(ValueError, match="30"):
        model(x, 30, 12)
    assert copy.deepcopy(model)(x[..., :4], 9, 8).shape == (1, 4, 9, 8)


def test_factors_are_fixed():
    x = torch.rand(1, 4, 5, 6)
    model = replace(Sized(), up=small_up, example={"x": x, "rows": 1, "columns": 1, "factor": 2}).model
    assert model(x, 1, 1, factor=2).shape == (1, 4, 10, 12)
    with pytest.raises(ValueError, match="rewritten for the argument 2, got 4"):
        model(x, 1, 1, factor=4)


class Computed(nn.Module):
    """Enlarges by a factor that it computes from the sizes of two maps, or to a square."""

    def __init__(self, square):
        super().__init__()
        self.square = square

    def forward(self, x, skip):
        if self.square:
            return F.interpolate(x, size=skip.shape[2]) + skip
        return F.interpolate(x, scale_factor=skip.shape[2] / x.shape[2]) + skip


def test_computed_factors_are_left():
    x, skip = torch.rand(1, 4, 5, 5), torch.rand(1, 4, 10, 10)
    report = replace(Computed(False), up=small_up, example=(x, skip), dry_run=True)
    assert "options that the forward computes" in report.left[0].reason
    model = replace(Computed(True), up=small_up, example=(x, skip)).model
    assert model(x[..., :4, :4], skip[..., :7, :7]).shape == (1, 4, 7, 7)


def test_a_single_cell_tells_no_scale():
    class Pooling(nn.Module):
        def forward(self, x):
            return F.interpolate(F.adaptive_avg_pool2d(x, 1), size=x.shape[2:])

    report = replace(nn.Sequential(Pooling()), up=small_up, example=torch.rand(1, 4, 2, 2), dry_run=True)
    assert [place.path for place in report.left] == ["0.interpolate_0"]
    assert "single cell" in report.left[0].reason
