"""Upsamplers to any size that a pyramid needs: where a moving impulse arrives, what is refused, and networks that round sizes down."""

from functools import partial

import pytest
import torch
from carafepp.models.attenders import LocalAttender
from carafepp.models.carafe import CARAFE
from carafepp.models.fpn import FPN
from carafepp.models.freq_fusion import FreqFusion
from carafepp.models.global_local import GlobalLocal
from carafepp.models.guided_samplers import A2U, FADE, GUM, SAPA, IndexNet
from carafepp.models.partial_conv import PartialGlobalLocal
from carafepp.models.pspnet import PSPNet
from carafepp.models.samplers import Nearest, resize
from carafepp.models.upernet import UperNet
from networks import UP, FloorBackbone
from sampler_cases import CASES
from torch import nn

H, W = 7, 6
SIZES = [(2 * H + rows, 2 * W + columns) for rows in (-1, 0, 1) for columns in (-1, 0, 1)]
UNGUIDED = [case for case in CASES if case.group == "upsampler" and not case.guided]
GUIDED = [A2U, FADE, GUM, SAPA, IndexNet, LocalAttender]
unguided = pytest.mark.parametrize("case", UNGUIDED, ids=lambda case: case.id)


def with_fixed_kernel(case):
    """A sampler whose kernels are the same everywhere and symmetric around their centre."""
    module = case.slot(8).double().eval()
    for name, parameter in module.named_parameters():
        nn.init.zeros_(parameter)
        if case.name in ("nearest_conv", "bilinear_conv", "deconv", "pixel_shuffle") and name == "weight":
            parameter.data += torch.tensor([1.0, 2, 1])[:, None] * torch.tensor([1.0, 2, 1])
        if name == "content_encoder.bias":
            # "none" does not normalise
            nn.init.ones_(parameter)
    return module


def impulses(height, width):
    """An impulse at every pixel in turn, [height * width, 8, height, width]."""
    x = torch.eye(height * width).double().view(-1, 1, height, width)
    return x.expand(-1, 8, -1, -1)


# LDA-AQU aligns the corners of both maps, so that pixels are not where those of the other samplers are
@pytest.mark.parametrize("case", [case for case in UNGUIDED if case.name != "lda_aqu"], ids=lambda case: case.id)
@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.no_grad()
def test_a_moving_impulse_arrives_where_its_pixel_is(case, size):
    """Pixel i covers the rows 2 i and 2 i + 1 at any size. Kernels reach 3 pixels far, so that those of the last 4 meet the border."""
    height, width, border = H + 4, W + 4, 4
    rows, columns = size[0] + 8, size[1] + 8
    y = with_fixed_kernel(case)(impulses(height, width), size=(rows, columns))[:, 0]
    assert y.shape[1:] == (rows, columns)
    y = y.unflatten(0, (height, width))[border:-border, border:-border]
    mass = y.sum((2, 3))
    down = (y.sum(3) * torch.arange(rows)).sum(2) / mass
    across = (y.sum(2) * torch.arange(columns)).sum(2) / mass
    # the middle tap of a transposed convolution of stride 2 is on the even pixels
    shift = 0 if case.name == "deconv" else 0.5
    i, j = 2 * torch.arange(height).double() + shift, 2 * torch.arange(width).double() + shift
    torch.testing.assert_close(down, i[border:-border, None].expand_as(down))
    torch.testing.assert_close(across, j[border:-border].expand_as(across))


@unguided
@torch.no_grad()
def test_the_last_row_and_column_repeat(case):
    module, x = with_fixed_kernel(case), impulses(H, W)
    whole = module(x)
    for rows, columns in SIZES:
        i, j = torch.arange(rows).clamp(max=2 * H - 1), torch.arange(columns).clamp(max=2 * W - 1)
        assert torch.equal(module(x, size=(rows, columns)), whole[..., i[:, None], j])
    assert module(x, size=(2 * H + 1, 2 * W + 1))[-1, 0, -1, -1] > 0


@unguided
def test_gradients_of_other_sizes_are_those_of_the_cut_or_repeated_output(case):
    torch.manual_seed(0)
    module = case.slot(8).double()
    x = torch.randn(2, 8, H, W, dtype=torch.float64, requires_grad=True)
    parameters = [x, *module.parameters()]
    for rows, columns in ((2 * H + 1, 2 * W - 1), (2 * H - 1, 2 * W + 1)):
        weights = torch.randn(2, 8, rows, columns, dtype=torch.float64)
        i, j = torch.arange(rows).clamp(max=2 * H - 1), torch.arange(columns).clamp(max=2 * W - 1)
        found = torch.autograd.grad((module(x, (rows, columns)) * weights).sum(), parameters)
        expected = torch.autograd.grad((module(x)[..., i[:, None], j] * weights).sum(), parameters)
        torch.testing.assert_close(found, expected)


@unguided
@pytest.mark.parametrize("size", [(2 * H - 2, 2 * W), (2 * H, 2 * W + 2), (H, W), (4 * H, 4 * W)], ids=str)
def test_sizes_of_another_ratio_are_named(case, size):
    with pytest.raises(ValueError, match=rf"size must .* less than up=2 pixels from 14 x 12.* for 7 x 6 .*got {size[0]} x {size[1]}"):
        case.slot(8)(torch.rand(1, 8, H, W), size=size)


@unguided
@pytest.mark.parametrize("size", [14, (14,), (14.0, 12.0), torch.tensor([14, 12])], ids=str)
def test_sizes_that_are_no_pair_of_integers_are_named(case, size):
    with pytest.raises(TypeError, match="size must be a pair of integers"):
        case.slot(8)(torch.rand(1, 8, H, W), size=size)


def test_a_module_of_another_scale_takes_the_sizes_of_its_scale():
    x = torch.rand(1, 8, 5, 4)
    four = CARAFE(8, up=4)
    assert torch.equal(four(x, (23, 13)), four(x)[..., [*range(20), 19, 19, 19], :13])
    down = CARAFE(8, down=2)
    assert torch.equal(down(x, (3, 2)), down(x))
    with pytest.raises(ValueError, match=r"less than up=1 pixels from 3 x 2.*got 4 x 2"):
        down(x, (4, 2))


@unguided
@torch.no_grad()
def test_memory_format_and_dtype_stay(case):
    module = case.slot(8).bfloat16().to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, H, W).bfloat16().to(memory_format=torch.channels_last)
    y = module(x, size=(2 * H + 1, 2 * W + 1))
    assert y.dtype == torch.bfloat16
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert module(x[:0], size=(2 * H + 1, 2 * W - 1)).shape == (0, 8, 2 * H + 1, 2 * W - 1)


class FromLevels(nn.Module):
    """A sampler as a network calls it."""

    def __init__(self, sampler):
        super().__init__()
        self.sampler = sampler

    def forward(self, x, fine):
        return fine + resize(x, fine.shape[2:], self.sampler, fine)


@pytest.mark.parametrize("case", [case for case in UNGUIDED if not case.options], ids=lambda case: case.id)
@torch.no_grad()
def test_other_sizes_compile_and_export(case):
    torch.compiler.reset()
    module, levels = FromLevels(case.slot(8).eval()), (torch.rand(1, 8, H, W), torch.rand(1, 8, 2 * H + 1, 2 * W - 1))
    expected = module(*levels)
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(*levels), expected)
    torch.testing.assert_close(torch.export.export(module, levels).module()(*levels), expected)


@pytest.mark.parametrize("case", [case for case in UNGUIDED if case.name not in ("carafe", "dysample")], ids=lambda case: case.id)
def test_fx_follows_the_samplers_of_plain_layers(case):
    module, x = case.slot(8), torch.rand(1, 8, H, W)
    traced = torch.fx.symbolic_trace(module)
    for size in (None, (2 * H + 1, 2 * W - 1)):
        assert torch.equal(traced(x, size), module(x, size))


class Repeated(nn.Module):
    """A sampler of a user, which knows of no other size than its own."""

    def forward(self, x):
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


class Sized(Repeated):
    """A sampler of a user, which computes other sizes by itself."""

    def forward(self, x, size=None):
        y = super().forward(x)
        return y if size is None else y.new_full((*x.shape[:2], *size), 3.0)


class Doubled(CARAFE):
    """A subclass whose forward takes no size."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("sampler", [Nearest, lambda channels: Repeated(), UP, GUM], ids=["nearest", "own", "carafe", "gum"])
@torch.no_grad()
def test_an_exported_program_takes_levels_of_every_parity(sampler):
    module = FromLevels(sampler(8).eval())
    any_size = {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    program = torch.export.export(module, (torch.rand(1, 8, 6, 5), torch.rand(1, 8, 12, 10)), dynamic_shapes=(any_size, any_size)).module()
    for rows, columns in ((14, 12), (13, 11), (15, 13), (13, 13)):
        levels = torch.rand(1, 8, H, W), torch.rand(1, 8, rows, columns)
        torch.testing.assert_close(program(*levels), module(*levels))


class Skipped(nn.Module):
    """A skip connection around a coarser map."""

    def __init__(self):
        super().__init__()
        self.down, self.up = CARAFE(8, down=2), CARAFE(8, up=2)

    def forward(self, x):
        return x + self.up(self.down(x), size=x.shape[2:])


@pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])
@torch.no_grad()
def test_an_exported_program_takes_named_sizes_that_it_checks_when_it_runs(strict):
    module, (height, width) = Skipped().eval(), (torch.export.Dim(name, min=3, max=64) for name in ("height", "width"))
    program = torch.export.export(
        module,
        (torch.rand(1, 8, 12, 10),),
        dynamic_shapes=({2: height, 3: width},),
        strict=strict,
        prefer_deferred_runtime_asserts_over_guards=True,
    ).module()
    for size in ((12, 10), (7, 7), (13, 11)):
        x = torch.rand(1, 8, *size)
        torch.testing.assert_close(program(x), module(x))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_samplers_without_a_size_are_cut_or_repeated(size):
    x = torch.rand(1, 8, H, W)
    expected = Nearest(8)(x, size)
    doubled = Doubled(8, up=2)
    for sampler in (Repeated(), nn.Sequential(Repeated()), torch.fx.symbolic_trace(Repeated())):
        assert torch.equal(resize(x, size, sampler), expected)
    torch.testing.assert_close(resize(x, size, doubled), 2 * CARAFE.forward(doubled, x, size))
    assert resize(x, size, Sized()).eq(3).all()


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_a_sampler_without_a_signature_is_cut():
    x = torch.rand(1, 8, H, W)
    assert torch.equal(resize(x, (13, 11), torch.jit.trace(Repeated(), x)), Nearest(8)(x, (13, 11)))


@pytest.mark.parametrize(
    "sampler",
    [UP, lambda channels: Repeated(), partial(FreqFusion, groups=2), *GUIDED],
    ids=["carafe", "own", "FreqFusion", *(kind.__name__ for kind in GUIDED)],
)
@pytest.mark.parametrize("image", [(217, 219), (218, 230), (97, 131)], ids=str)
def test_networks_on_a_backbone_that_rounds_down(image, sampler):
    """217 rows become levels of 54, 27, 13 and 6 rows."""
    torch.manual_seed(0)
    net = UperNet(FloorBackbone(), 3, ppm=sampler, fpn=sampler, fuse=sampler, fpn_dim=8, ppm_dim=4)
    logits = net(torch.rand(2, 3, *image))
    assert logits.shape == (2, 3, *(side // 4 for side in image))
    logits.logsumexp(1).mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in net.parameters())


@pytest.mark.parametrize("sampler", [UP, FADE, lambda channels: Repeated()], ids=["carafe", "fade", "own"])
def test_pyramid_takes_levels_that_are_rounded_down(sampler):
    backbone = FloorBackbone()
    pyramid = FPN(backbone.out_channels, 8, upsample=sampler)
    levels = {str(i): level for i, level in enumerate(backbone(torch.rand(1, 3, 217, 219)))}
    assert [level.shape[2] for level in levels.values()] == [54, 27, 13, 6]
    outputs = pyramid(levels)
    assert [level.shape[2:] for level in outputs.values()] == [level.shape[2:] for level in levels.values()]
    sum(level.square().mean() for level in outputs.values()).backward()
    assert all(parameter.grad is not None for parameter in pyramid.parameters())


def test_pooled_cells_of_pspnet_keep_their_place():
    """Half of an odd side is rounded up, so that nothing is repeated there."""
    net = PSPNet(FloorBackbone(), 3, ppm=UP, dim=8, ppm_dim=4).eval()
    assert net(torch.rand(1, 3, 217, 219)).shape == (1, 3, 6, 6)


class Floor(nn.AvgPool2d):
    """A downsampler that rounds down."""

    def __init__(self, channels):
        super().__init__(2)


@pytest.mark.parametrize("image", [(23, 21), (26, 27)], ids=str)
def test_inpainting_undoes_a_downsampler_that_rounds_down(image):
    net = GlobalLocal(4, downsample=Floor, upsample=UP)
    y = net(torch.rand(2, 3, *image), torch.zeros(2, 1, *image))
    assert y.shape == (2, 3, *image)
    y.square().mean().backward()
    with pytest.raises(TypeError, match="propagates masks through"):
        PartialGlobalLocal(4, downsample=Floor)
