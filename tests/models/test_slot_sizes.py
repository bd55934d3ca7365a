"""A sampler in a slot takes levels of its ratio, rounded up or down; other levels are refused, because the features would move."""

from functools import partial

import pytest
import torch
from carafepp.models.attenders import LocalAttender
from carafepp.models.carafe import CARAFE
from carafepp.models.detection import FasterRCNN, MaskRCNN
from carafepp.models.fpn import FPN
from carafepp.models.freq_fusion import FreqFusion
from carafepp.models.global_local import GlobalLocal
from carafepp.models.guided_samplers import A2U, FADE, GUM, SAPA, IndexNet
from carafepp.models.jbu import JBU
from carafepp.models.learned_samplers import Deconv, NearestConv, PixelShuffle
from carafepp.models.partial_conv import PartialGlobalLocal
from carafepp.models.point_samplers import DySample
from carafepp.models.pspnet import PSPNet
from carafepp.models.resfu import ReSFU
from carafepp.models.resnet import ResNet
from carafepp.models.samplers import Bilinear, Nearest, resize
from carafepp.models.upernet import UperNet
from networks import UP, dilated_resnet, small_resnet

GUIDED = [GUM, IndexNet, A2U, SAPA, FADE, FreqFusion, LocalAttender, JBU, ReSFU]
SAMPLERS = [UP, Nearest, Bilinear, NearestConv, Deconv, PixelShuffle, DySample, *GUIDED]


def sizes(fine: tuple[int, int], coarse: tuple[int, int]) -> str:
    """The part of the message that names both maps, as a pattern."""
    maps = rf"turns {coarse[0]} x {coarse[1]} into .* pixels, but the finer map has {fine[0]} x {fine[1]}"
    return rf"{maps}: leave this slot empty.*output_stride"


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: getattr(sampler, "__name__", "CARAFE"))
@pytest.mark.parametrize(
    ("fine", "coarse"),
    [
        pytest.param((16, 16), (16, 16), id="same size"),
        pytest.param((15, 15), (16, 16), id="smaller"),
        pytest.param((16, 8), (8, 8), id="one axis"),
        pytest.param((28, 26), (13, 13), id="a cell more"),
        pytest.param((27, 28), (13, 13), id="a row and two columns more"),
        pytest.param((24, 26), (13, 13), id="a cell less"),
        pytest.param((16, 16), (4, 4), id="ratio 4"),
        pytest.param((2, 2), (2, 2), id="tiny"),
    ],
)
def test_levels_of_another_ratio_are_refused(sampler, fine, coarse):
    module = sampler(8)
    with pytest.raises(ValueError, match="sampler in slot fpn .*" + sizes(fine, coarse)):
        resize(torch.rand(1, 8, *coarse), fine, module, torch.rand(1, 8, *fine), slot="fpn")


def test_a_corner_impulse_is_not_stretched():
    x = torch.zeros(1, 1, 16, 16)
    x[..., -1, -1] = 1
    with pytest.raises(ValueError, match=sizes((16, 16), (16, 16))):
        resize(x, (16, 16), CARAFE(1, up=2, compressed_channels=None))


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: getattr(sampler, "__name__", "CARAFE"))
@pytest.mark.parametrize("fine", [(26, 14), (25, 14), (26, 13), (25, 13), (3, 1)], ids=str)
def test_odd_levels_are_cropped(sampler, fine):
    """A backbone rounds up: a map of 25 rows has a coarser one of 13, of which 26 become."""
    module, guide = sampler(8).eval(), torch.rand(1, 8, *fine)
    x = torch.rand(1, 8, *(-(-side // 2) for side in fine))
    whole = module(x, guide) if sampler in GUIDED else module(x)
    assert torch.equal(resize(x, fine, module, guide), whole[..., : fine[0], : fine[1]])


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: getattr(sampler, "__name__", "CARAFE"))
@pytest.mark.parametrize("fine", [(27, 14), (26, 15), (27, 15), (25, 15)], ids=str)
def test_levels_that_are_rounded_down_are_lengthened(sampler, fine):
    """A backbone without padding rounds down: a map of 27 rows has a coarser one of 13, of which 26 become."""
    module, guide, x = sampler(8).eval(), torch.rand(1, 8, *fine), torch.rand(1, 8, 13, 7)
    y = resize(x, fine, module, guide)
    assert y.shape[2:] == fine
    if sampler not in GUIDED:
        whole = module(x)
        rows, columns = (torch.arange(side).clamp(max=last - 1) for side, last in zip(fine, whole.shape[2:], strict=True))
        assert torch.equal(y, whole[..., rows[:, None], columns])


def test_samplers_of_another_ratio_fit_levels_of_that_ratio():
    x = torch.rand(1, 8, 4, 4)
    four = CARAFE(8, up=4)
    assert torch.equal(resize(x, (16, 13), four), four(x)[..., :16, :13])
    assert torch.equal(resize(x, (19, 16), four), four(x)[..., [*range(16), 15, 15, 15], :])
    for fine in ((16, 12), (16, 20)):
        with pytest.raises(ValueError, match=sizes(fine, (4, 4))):
            resize(x, fine, four)
    rational = CARAFE(8, up=3, down=2)
    assert resize(x, (6, 5), rational).shape == (1, 8, 6, 5)
    with pytest.raises(ValueError, match=sizes((6, 4), (4, 4))):
        resize(x, (6, 4), rational)


@pytest.mark.parametrize("sampler", [UP, FADE], ids=["carafe", "fade"])
@pytest.mark.parametrize("slot", ["fpn", "fuse"])
@pytest.mark.parametrize(("stride", "coarse", "fine"), [(8, 8, 8), (16, 4, 4)])
def test_upernet_refuses_the_levels_of_a_dilated_backbone(slot, stride, coarse, fine, sampler):
    backbone = ResNet((1, 1, 1, 1), width=4, output_stride=stride)
    net = UperNet(backbone, 3, fpn_dim=8, ppm_dim=4, **{slot: sampler})
    with pytest.raises(ValueError, match=f"slot {slot} .*" + sizes((fine, fine), (coarse, coarse))):
        net(torch.randn(2, 3, 64, 64))


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_upernet_trains_every_parameter_where_the_slot_fits(stride):
    backbone = ResNet((1, 1, 1, 1), width=4, output_stride=stride)
    slots = {"ppm": UP} if stride < 32 else {"ppm": UP, "fpn": UP, "fuse": UP}
    net = UperNet(backbone, 3, fpn_dim=8, ppm_dim=4, **slots)
    net(torch.randn(2, 3, 63, 97)).logsumexp(1).mean().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


@pytest.mark.parametrize("size", [(1, 1), (31, 33), (63, 97), (101, 224)], ids=str)
def test_every_image_fits_a_backbone_of_stride_32(size):
    net = UperNet(small_resnet(), 3, ppm=UP, fpn=UP, fuse=UP, fpn_dim=8, ppm_dim=4).eval()
    assert net(torch.randn(1, 3, *size)).shape[2:] == tuple(-(-side // 4) for side in size)


def test_pspnet_refuses_a_sampler_that_does_not_double():
    with pytest.raises(ValueError, match=r"slot ppm .*finer map has 8 x 8"):
        PSPNet(dilated_resnet(), 3, ppm=partial(CARAFE, up=3), dim=8, ppm_dim=4)(torch.randn(2, 3, 64, 64))


@pytest.mark.parametrize("sampler", [UP, FADE], ids=["carafe", "fade"])
def test_pyramid_refuses_levels_of_one_size_and_of_ratio_4(sampler):
    pyramid = FPN([4, 8], 8, upsample=sampler)
    for fine, coarse in (((8, 8), (8, 8)), ((28, 26), (13, 13)), ((16, 16), (4, 4))):
        with pytest.raises(ValueError, match="slot fpn .*" + sizes(fine, coarse)):
            pyramid({"0": torch.rand(1, 4, *fine), "1": torch.rand(1, 8, *coarse)})


def test_detector_refuses_the_levels_of_a_dilated_backbone():
    options = {"fpn_dim": 8, "head_dim": 8, "min_size": 64, "max_size": 64}
    net = FasterRCNN(3, backbone=dilated_resnet(), fpn=UP, **options).eval()
    with pytest.raises(ValueError, match="slot fpn .*" + sizes((8, 8), (8, 8))):
        net([torch.rand(3, 64, 64)])
    FasterRCNN(3, backbone=dilated_resnet(), **options).eval()([torch.rand(3, 64, 64)])


def test_mask_head_takes_any_ratio():
    """Masks are compared and pasted at their own size, so that nothing is cropped."""
    options = {"fpn_dim": 8, "head_dim": 8, "min_size": 64, "max_size": 64, "mask_dim": 8, "mask_convs": 1}
    for sampler, side in ((UP, 28), (FADE, 28), (partial(CARAFE, up=3), 42)):
        net = MaskRCNN(3, backbone=small_resnet(), mask_head=sampler, **options)
        assert net.roi_heads.mask_predictor(torch.rand(2, 8, 14, 14)).shape == (2, 3, side, side)


@pytest.mark.parametrize("generator", [GlobalLocal, PartialGlobalLocal])
@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ({"downsample": partial(CARAFE, down=3), "upsample": UP}, "turns 2 x 2 into 4 x 4 pixels, but the finer map has 6 x 6"),
        ({"downsample": partial(CARAFE, down=2), "upsample": partial(CARAFE, up=3)}, "turns 4 x 4 into 12 x 12 pixels, but .* 8 x 8"),
        ({"upsample": partial(CARAFE, up=3)}, "turns 4 x 4 into 12 x 12 pixels, but .* 8 x 8"),
        ({"downsample": partial(CARAFE, down=3)}, "turns 2 x 2 into 4 x 4 pixels, but the finer map has 6 x 6"),
    ],
    ids=["down 3", "up 3", "up 3 alone", "down 3 alone"],
)
def test_generators_refuse_upsamplers_that_do_not_undo_their_downsamplers(generator, slots, message):
    with pytest.raises(ValueError, match=f"slot upsample {message}"):
        generator(4, **slots)(torch.rand(2, 3, 16, 16), torch.zeros(2, 1, 16, 16))
