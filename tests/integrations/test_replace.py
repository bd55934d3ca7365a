"""`replace` on networks of every kind of layer: what comes where, with which sizes, and that everything else stays."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
import torch.nn as nn
from carafepp.integrations.adapters import SampledConv
from carafepp.models.pooling import BlurPool, SoftPool

from carafepp import CARAFE, replace

small_up, small_down = partial(CARAFE, up=2, compressed_channels=4), partial(CARAFE, down=2, compressed_channels=4)


class UNet(nn.Module):
    """A U-Net as people write it: pools, a strided convolution, an interpolation module and a transposed convolution."""

    def __init__(self):
        super().__init__()
        self.inc = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.pool = nn.MaxPool2d(2)
        self.mid = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU())
        self.down = nn.Conv2d(12, 16, 3, stride=2, padding=1)
        self.up1 = nn.ConvTranspose2d(16, 12, 2, stride=2)
        self.merge = nn.Conv2d(24, 8, 3, padding=1)
        self.up2 = nn.Upsample(scale_factor=2, mode="bilinear")
        self.out = nn.Conv2d(16, 2, 1)

    def forward(self, x):
        a = self.inc(x)
        b = self.mid(self.pool(a))
        c = self.merge(torch.cat([b, self.up1(self.down(b))], 1))
        return self.out(torch.cat([a, self.up2(c)], 1))


X = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_unet():
    model = UNet()
    weights = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    report = replace(model, up="carafe", down="carafe", example=X)
    assert report.model is model
    assert [(row.path, row.before, row.after) for row in report.replaced] == [
        ("pool", "MaxPool2d k2 s2", "CARAFE"),
        ("down", "Conv2d k3 s2", "CARAFE + Conv2d"),
        ("up1", "ConvTranspose2d k2 s2", "CARAFE after 1x1 Conv2d"),
        ("up2", "Upsample x2 bilinear", "CARAFE"),
    ]
    assert report.left == []
    # the convolution keeps its own weights
    assert model.down.conv.weight is weights["down.weight"][0]
    assert all(torch.equal(parameter, before) for parameter, before in weights.values())
    model(X).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model(X).shape == (2, 2, 16, 24)
    carafe_down = sum(p.numel() for p in CARAFE(8, down=2, compressor_norm=True).parameters())
    assert (report.replaced[0].parameters_before, report.replaced[0].parameters_after) == (0, carafe_down)
    # 2 multiply-adds of 8 x 12 x 9 taps for 6 x 4 pixels of 2 images
    assert report.replaced[1].flops_before == 2 * 12 * 16 * 9 * 4 * 6 * 2
    assert report.replaced[1].flops_after > report.replaced[1].flops_before


def test_undo_restores_the_objects():
    model = UNet()
    modules, state = dict(model.named_modules()), state_of(model)
    report = replace(model, up="carafe", down="carafe", example=X)
    assert dict(model.named_modules()) != modules
    assert report.undo() is model
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.down.stride == (2, 2)
    assert report.undo() is model


def test_dry_run_and_example_change_nothing():
    model = UNet()
    model.inc.eval()
    before, modules = state_of(model), dict(model.named_modules())
    modes = {name: module.training for name, module in modules.items()}
    rng = torch.get_rng_state()
    report = replace(model, up="carafe", down=small_down, example=X, dry_run=True)
    assert len(report.replaced) == 4
    assert "would be replaced" in str(report)
    assert torch.equal(torch.get_rng_state(), rng)
    assert dict(model.named_modules()) == modules
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    report.undo()


def test_without_example_only_layers_that_know_their_channels():
    report = replace(UNet(), up="carafe", down="carafe")
    assert [row.path for row in report.replaced] == ["down", "up1"]
    assert [(place.path, "example=" in place.reason) for place in report.left] == [("pool", True), ("up2", True)]
    assert report.replaced[0].flops_after is None
    assert "F.interpolate" in str(report)


def test_one_direction():
    model = UNet()
    assert [row.path for row in replace(model, up=small_up, example=X).replaced] == ["up1", "up2"]
    assert isinstance(model.pool, nn.MaxPool2d)
    report = replace(model, down=small_down, example=X)
    assert [row.path for row in report.replaced] == ["pool", "down"]
    assert "samplers already: up1, up2" in str(report)


@pytest.mark.parametrize(
    ("where", "paths"),
    [
        ("up*", ["up1", "up2"]),
        (["pool", "up?"], ["pool", "up1", "up2"]),
        ("inc", None),
        ("nothing*", None),
        (["pool", "down.conv"], None),
    ],
)
def test_where(where, paths):
    model = UNet()
    if paths is None:
        with pytest.raises(ValueError, match=r"matches no place; the places that resample are: pool, down, up1, up2"):
            replace(model, up=small_up, down=small_down, where=where, example=X)
        assert isinstance(model.pool, nn.MaxPool2d)
    else:
        assert [row.path for row in replace(model, up=small_up, down=small_down, where=where, example=X).replaced] == paths


def test_where_chooses_what_is_below_a_module():
    model = nn.Sequential(UNet(), nn.Sequential(nn.Conv2d(2, 4, 1), nn.AvgPool2d(2)))
    report = replace(model, down=small_down, where="1", example=X)
    assert [row.path for row in report.replaced] == ["1.1"]


DOWN = {
    "max pool 2": nn.MaxPool2d(2),
    "max pool 2, ceil": nn.MaxPool2d(2, ceil_mode=True),
    "max pool 3, padded": nn.MaxPool2d(3, 2, 1),
    "max pool 3": nn.MaxPool2d(3, 2),
    "max pool 3, ceil": nn.MaxPool2d(3, 2, ceil_mode=True),
    "avg pool 2": nn.AvgPool2d(2, 2),
    "avg pool of ResNet-D": nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False),
    "convolution 3": nn.Conv2d(6, 5, 3, 2, 1),
    "convolution 1": nn.Conv2d(6, 5, 1, 2, bias=False),
    "convolution 2": nn.Conv2d(6, 5, 2, 2),
    "convolution 3, no padding": nn.Conv2d(6, 5, 3, 2),
    "convolution 4": nn.Conv2d(6, 5, 4, 2, 1, padding_mode="reflect"),
    "convolution 3, dilated": nn.Conv2d(6, 6, 3, 2, 2, dilation=2, groups=6),
    "convolution 3x5": nn.Conv2d(6, 6, (3, 5), 2, (1, 2), padding_mode="circular"),
    "subsampling": nn.MaxPool2d(1, 2),
    "interpolation": nn.Upsample(scale_factor=0.5),
}
SIZES = [(8, 12), (9, 13), (8, 13), (9, 12)]


@pytest.mark.parametrize("layer", DOWN.values(), ids=DOWN.keys())
def test_downsamplers_keep_every_size(layer):
    model = nn.Sequential(nn.Identity(), copy.deepcopy(layer))
    report = replace(model, down=small_down, example=torch.rand(1, 6, 9, 12))
    assert [row.path for row in report.replaced] == ["1"]
    for size in SIZES:
        x = torch.rand(1, 6, *size)
        assert model(x).shape == layer(x).shape
    assert report.undo()[1].__class__ is layer.__class__


UP = {
    "nearest": nn.Upsample(scale_factor=2),
    "bilinear": nn.UpsamplingBilinear2d(scale_factor=2),
    "nearest, class": nn.UpsamplingNearest2d(scale_factor=(2, 2)),
    "size": nn.Upsample(size=(17, 24), mode="bicubic"),
    "deconvolution 2": nn.ConvTranspose2d(6, 6, 2, 2),
    "deconvolution 3": nn.ConvTranspose2d(6, 3, 3, 2, 1, output_padding=1, bias=False),
    "deconvolution 4": nn.ConvTranspose2d(6, 4, 4, 2, 1, groups=2),
    "deconvolution 3, shorter": nn.ConvTranspose2d(6, 6, 3, 2, 1),
    "deconvolution 3, longer": nn.ConvTranspose2d(6, 6, 3, 2),
}


@pytest.mark.parametrize("layer", UP.values(), ids=UP.keys())
def test_upsamplers_keep_every_size(layer):
    model = nn.Sequential(copy.deepcopy(layer))
    report = replace(model, up=small_up, example=torch.rand(1, 6, 9, 12))
    assert [row.path for row in report.replaced] == ["0"]
    for size in [(9, 12)] if getattr(layer, "size", None) else SIZES:
        x = torch.rand(1, 6, *size)
        assert model(x).shape == layer(x).shape


def test_deconvolution_starts_with_the_mean_of_its_weights():
    deconv = nn.ConvTranspose2d(6, 4, 4, stride=2, padding=1, groups=2).double()
    model = nn.Sequential(deconv)
    flat = torch.rand(1, 6, 1, 1, dtype=torch.float64).expand(1, 6, 12, 12)
    expected = deconv(flat)[..., 6:-6, 6:-6].mean((2, 3))
    replace(model, up="carafe", example=flat)
    # away from the border, where the window of CARAFE leaves the map
    torch.testing.assert_close(model(flat)[0, :, 12, 12], expected[0])


def test_deconvolution_takes_an_output_size():
    model = nn.Sequential(nn.ConvTranspose2d(4, 4, 2, stride=2))
    replace(model, up=small_up)
    assert model[0](torch.rand(1, 4, 3, 5), output_size=[7, 10]).shape == (1, 4, 7, 10)


LEFT = {
    "scale 4": (nn.Upsample(scale_factor=4), r"resizes by 4 and the sampler by 2; up=partial\(CARAFE, up=4\)"),
    "scale 1.5": (nn.Upsample(scale_factor=1.5), "resizes by 1.5, and not by an integer"),
    "two scales": (nn.Upsample(scale_factor=(2, 4)), "resizes by 2x4"),
    "rows only": (nn.MaxPool2d((2, 1)), "resizes by 2x1"),
    "indices": (nn.MaxPool2d(2, return_indices=True), "indices"),
    "wide deconvolution": (nn.ConvTranspose2d(4, 4, 4, 2), "2 pixels more"),
    "padded pool": (nn.AvgPool2d(2, 2, 1), "padding"),
    "wide pool": (nn.MaxPool2d(7, 2), "padding"),
    "image": (nn.Conv2d(4, 8, 3, 2, 1), "reads the image"),
    "same size": (nn.Upsample(size=(8, 8)), "keeps the size"),
    "divisor": (nn.AvgPool2d(2, divisor_override=1), "divisor"),
}


@pytest.mark.parametrize(("layer", "reason"), LEFT.values(), ids=LEFT.keys())
def test_what_is_left_has_a_reason(layer, reason):
    model = nn.Sequential(layer)
    report = replace(model, up=small_up, down=small_down, example=torch.rand(1, 4, 8, 8), dry_run=True)
    assert report.replaced == []
    [place] = report.left
    with pytest.raises(ValueError, match=reason):
        replace(model, up=small_up, down=small_down, example=torch.rand(1, 4, 8, 8))
    assert place.path == "0"
    assert model[0] is layer


def test_other_scales_take_a_sampler_of_this_scale():
    model = nn.Sequential(nn.Upsample(scale_factor=4), nn.Conv2d(6, 6, 4, 4))
    report = replace(model, up=partial(CARAFE, up=4), down=partial(CARAFE, down=4), example=torch.rand(1, 6, 3, 5))
    assert len(report.replaced) == 2
    assert model(torch.rand(1, 6, 3, 5)).shape == (1, 6, 3, 5)


def test_image_convolution_by_name():
    model = nn.Sequential(nn.Conv2d(3, 8, 7, 2, 3))
    replace(model, down=small_down, where="0")
    assert isinstance(model[0], SampledConv)


def test_sampler_that_does_not_take_the_channels():
    model = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(6, 8, 1), nn.Upsample(scale_factor=2))
    report = replace(model, up="dysample", example=torch.rand(1, 6, 3, 3))
    assert [row.path for row in report.replaced] == ["2"]
    assert "groups must divide channels, got groups=4 for channels=6" in report.left[0].reason


def test_every_name_replaces():
    from carafepp.integrations.choices import list_samplers, load_sampler, needs_guide

    for name in list_samplers("up"):
        if not needs_guide(load_sampler("up", name)):
            model = nn.Sequential(nn.Upsample(scale_factor=2))
            replace(model, up=name, example=torch.rand(1, 8, 3, 4))
            assert model(torch.rand(1, 8, 5, 4)).shape == (1, 8, 10, 8)
    for name in list_samplers("down"):
        model = nn.Sequential(nn.MaxPool2d(2))
        replace(model, down=name, example=torch.rand(1, 8, 3, 4))
        assert model(torch.rand(1, 8, 5, 6)).shape == (1, 8, 2, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_samplers_have_the_place_s_dtype_device_and_mode(dtype):
    model = UNet().to(dtype).eval()
    replace(model, up="carafe", down="carafe", example=X.to(dtype))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert not any(module.training for module in model.modules())
    meta = UNet().to("meta")
    replace(meta, up="carafe", down="carafe", example=X.to("meta"))
    assert {parameter.device.type for parameter in meta.parameters()} == {"meta"}


def test_hooks_and_frozen_weights_stay():
    model = UNet()
    calls = []
    model.down.register_forward_hook(lambda module, args, y: calls.append(tuple(y.shape)))
    model.down.weight.requires_grad_(False)
    replace(model, down=small_down, up=small_up, example=X)
    calls.clear()
    model(X)
    assert calls == [(2, 16, 4, 6)]
    assert not model.down.conv.weight.requires_grad
    assert model.down.sampler.content_encoder.weight.requires_grad


def test_parametrized_convolution():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 6, 3, 2, 1)))
    x = torch.rand(1, 6, 9, 9)
    replace(model, down=small_down, example=x)
    assert model(x).shape == (1, 6, 5, 5)
    model(x).sum().backward()
    assert model[0].conv.parametrizations.weight.original1.grad is not None


def test_state_dict_copy_and_pickle():
    model, again = UNet(), UNet()
    for network in (model, again):
        replace(network, up="carafe", down="carafe", example=X)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    model.eval(), again.eval()
    for other in (again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(X), model(X), rtol=0, atol=0)


def test_compile_export_and_fx():
    model = UNet().eval()
    replace(model, up=small_up, down=small_down, example=X)
    x = torch.rand(1, 3, 20, 24)
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(x), model(x))
    exported = torch.export.export(model, (X[:1],), dynamic_shapes=({2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO},))
    torch.testing.assert_close(exported.module()(torch.rand(1, 3, 16, 32)).shape, torch.Size([1, 2, 16, 32]))


class OneLayerManyPlaces(nn.Module):
    """One pool and one upsampling layer without parameters, called at every level."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in ((3, 4), (4, 6), (6, 4), (4, 2)))
        self.pool, self.up = nn.MaxPool2d(2), nn.Upsample(scale_factor=2)

    def forward(self, x):
        for conv in self.convs[:2]:
            x = self.pool(conv(x))
        for conv in self.convs[2:]:
            x = conv(self.up(x))
        return x


def test_layer_with_several_channels_gets_a_sampler_for_each_call():
    model = OneLayerManyPlaces()
    keys = set(model.state_dict())
    report = replace(model, up=small_up, down=small_down, example=X)
    assert [row.path for row in report.replaced] == ["pool_0", "pool_1", "up_0", "up_1"]
    assert report.model is model
    assert keys < set(report.model.state_dict())
    assert report.model(X).shape == (2, 2, 16, 24)
    assert report.model.pool_1.sampler.channel_compressor.in_channels == 6
    assert report.undo() is model
    assert [row.path for row in replace(model, up=small_up, down=small_down, where="up", example=X).replaced] == ["up_0", "up_1"]


def test_attributes_of_a_framework_stay():
    model = UNet()
    for i, layer in enumerate(model.children()):
        # as ultralytics numbers the layers of a network
        layer.i, layer.f, layer.type = i, -1, type(layer).__name__
    replace(model, up=small_up, down=small_down, example=X)
    assert [(layer.i, layer.f) for layer in model.children()] == [(i, -1) for i in range(8)]
    assert model.up2.type == "Upsample"
    assert not {"mode", "scale_factor", "stride"} & set(vars(model.up2))


def test_shared_module_gets_one_sampler():
    pool = nn.MaxPool2d(2)
    model = nn.ModuleDict({"a": nn.Sequential(pool), "b": nn.Sequential(pool)})
    model.forward = lambda x: model["b"](model["a"](x))
    report = replace(model, down=small_down, example=torch.rand(1, 4, 16, 16))
    [row] = report.replaced
    assert row.paths == ("a.0", "b.0")
    assert model["a"][0] is model["b"][0]
    assert "a.0, b.0" in str(report)
    report.undo()
    assert model["a"][0] is model["b"][0] is pool


def test_blur_pool_of_another_package():
    class BlurPool2D(nn.Module):
        def __init__(self):
            super().__init__()
            self.stride = 2
            self.pool = BlurPool(4)

        def forward(self, x):
            return self.pool(x)

    class BlurPoolWithWeights(BlurPool2D):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

    assert replace(nn.Sequential(BlurPoolWithWeights()), down=small_down, dry_run=True).left == []
    model = nn.Sequential(BlurPool2D())
    [row] = replace(model, down=small_down, example=torch.rand(1, 4, 9, 8)).replaced
    assert row.before == "BlurPool2D s2"


def test_model_that_is_a_layer_itself():
    layer = nn.Upsample(scale_factor=2)
    report = replace(layer, up=small_up, example=torch.rand(1, 4, 3, 3))
    assert report.model(torch.rand(1, 4, 5, 3)).shape == (1, 4, 10, 6)
    assert report.undo() is layer


def test_our_own_samplers_are_left_alone():
    class Derived(CARAFE):
        pass

    model = nn.Sequential(CARAFE(4, down=2), SoftPool(4), Derived(4, down=2), nn.MaxPool2d(2))
    report = replace(model, down=small_down, example=torch.rand(1, 4, 16, 16))
    assert [row.path for row in report.replaced] == ["3"]
    assert "samplers already: 0, 1, 2" in str(report)


def test_report_fits_a_page():
    model = nn.ModuleDict({"a_module_with_quite_a_long_name": nn.ModuleDict({"and_another_long_name_below_it": UNet()})})
    model.forward = lambda x: model["a_module_with_quite_a_long_name"]["and_another_long_name_below_it"](x)
    text = str(replace(model, up="carafe", example=X))
    assert max(map(len, text.splitlines())) <= 100
    assert "2 places" in text


def test_report_is_its_own_representation():
    report = replace(UNet(), up=small_up, example=X)
    assert repr(report) == str(report)
