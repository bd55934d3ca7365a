"""UperNet: the authors' network, and samplers in each of its slots."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import yaml
from carafepp.models.carafe import CARAFE
from carafepp.models.resnet import resnet50, tiny
from carafepp.models.samplers import Bilinear, Nearest
from carafepp.models.upernet import UperNet
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from networks import small_resnet


def test_samplers_keep_their_initialisation_inside_networks():
    net = UperNet(tiny(downsample=partial(CARAFE, down=2)), 3, fpn=partial(CARAFE, up=2), fpn_dim=8, ppm_dim=8)
    encoders = [module.content_encoder for module in net.modules() if isinstance(module, CARAFE)]
    assert len(encoders) == 7 + 3
    assert all(encoder.weight.std() < 0.0015 for encoder in encoders)


SLOTS = [None, Nearest, partial(CARAFE, up=2, compressed_channels=4)]


@pytest.mark.parametrize("fuse", SLOTS, ids=["published", "nearest", "carafe"])
@pytest.mark.parametrize("fpn", SLOTS, ids=["published", "nearest", "carafe"])
@pytest.mark.parametrize("ppm", SLOTS, ids=["published", "nearest", "carafe"])
def test_upernet_trains_with_every_combination_of_slots(ppm, fpn, fuse):
    net = UperNet(small_resnet(), 3, ppm=ppm, fpn=fpn, fuse=fuse, fpn_dim=4, ppm_dim=4)
    logits = net(torch.randn(2, 3, 69, 45))
    assert logits.shape == (2, 3, 18, 12)
    logits.logsumexp(1).mean().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_upernet_slots_get_the_channels_of_their_place():
    seen = {"ppm": [], "fpn": [], "fuse": []}
    slots = {name: lambda c, into=into: into.append(c) or Bilinear(c) for name, into in seen.items()}
    UperNet(small_resnet(), 3, fpn_dim=8, ppm_dim=4, **slots)
    assert seen == {"ppm": [128] * 4, "fpn": [8] * 3, "fuse": [8, 16, 24]}


def test_upernet_fpn_with_bilinear_is_the_published_one():
    """At sizes that are multiples of 32, twice as large bilinearly is what the published FPN does."""
    torch.manual_seed(0)
    published = UperNet(small_resnet(), 3, fpn_dim=8, ppm_dim=4).eval()
    sampled = UperNet(published.backbone, 3, fpn=Bilinear, fpn_dim=8, ppm_dim=4).eval()
    sampled.load_state_dict(published.state_dict())
    x = torch.randn(1, 3, 64, 96)
    torch.testing.assert_close(sampled(x), published(x))


def test_upernet_has_the_authors_decoder():
    """Keys and shapes of the decoder that the authors published weights for."""
    shapes = {name: tuple(tensor.shape) for name, tensor in UperNet(resnet50(), 150).state_dict().items()}
    for name, shape in {
        "ppm_conv.3.0.weight": (512, 2048, 1, 1),
        "ppm_last_conv.0.weight": (512, 4096, 3, 3),
        "fpn_in.0.0.weight": (512, 256, 1, 1),
        "fpn_in.2.0.weight": (512, 1024, 1, 1),
        "fpn_out.2.0.0.weight": (512, 512, 3, 3),
        "conv_last.0.0.weight": (512, 2048, 3, 3),
        "conv_last.1.weight": (150, 512, 1, 1),
        "conv_last.1.bias": (150,),
    }.items():
        assert shapes[name] == shape, name


@pytest.fixture
def primary(tmp_path):
    """A primary configuration that chooses a model and the source of its slots, on the search path of the package's groups."""
    (tmp_path / "primary.yaml").write_text(
        yaml.safe_dump(
            {
                "hydra": {"searchpath": ["pkg://carafepp.conf"]},
                "defaults": [
                    {"model": "upernet"},
                    {"backbone": "tiny"},
                    {"downsampler": "published"},
                    {"upsampler": "published"},
                    "_self_",
                ],
            }
        )
    )

    def build(*overrides):
        with initialize_config_dir(str(tmp_path), version_base=None):
            cfg = compose("primary", ["model.fpn_dim=8", "model.ppm_dim=8", *overrides])
        return instantiate(cfg.model)(num_classes=3)

    return build


def test_one_choice_fills_every_slot_with_its_options(primary):
    net = primary("upsampler=carafe", "upsampler.kernel_size=7", "downsampler=carafe", "downsampler.compressed_channels=8")
    up = [*net.ppm_up, *net.fpn_up, *net.fuse_up]
    assert [module.spec.kernel_size for module in up] == [7] * 10
    down = [module for module in net.backbone.modules() if isinstance(module, CARAFE)]
    assert [module.content_encoder.in_channels for module in down] == [8] * 7


def test_one_slot_alone(primary):
    net = primary("upsampler=carafe", "model.ppm=null", "model.fuse=null")
    assert list(net.ppm_up) == [None] * 4
    assert isinstance(net.fpn_up[0], CARAFE)
    assert net.fuse_up is None
    net = primary("upsampler@model.fpn=carafe", "upsampler@model.ppm=bilinear")
    assert net.fuse_up is None
    assert isinstance(net.ppm_up[0], Bilinear)
    assert isinstance(net.fpn_up[0], CARAFE)
    net = primary("upsampler=carafe", "upsampler@model.ppm=bilinear")
    assert isinstance(net.ppm_up[0], Bilinear)
    assert isinstance(net.fpn_up[0], CARAFE)


def test_published_leaves_slots_empty(primary):
    net = primary()
    assert net.fuse_up is None
    assert isinstance(net.backbone.maxpool, torch.nn.MaxPool2d)
    assert net.backbone.layer2[0].conv2.stride == (2, 2)


@pytest.mark.parametrize("slot", [None, Nearest])
def test_upernet_is_the_authors_and_with_samplers_the_papers(slot):
    """The authors' forward written out, and section 4.2's changes to it where there is a sampler, at odd sizes."""
    torch.manual_seed(0)
    net = UperNet(small_resnet(), 3, ppm=slot, fpn=slot, fuse=slot, fpn_dim=8, ppm_dim=4).eval()
    x = torch.randn(1, 3, 101, 143)
    levels = net.backbone(x)
    c5 = levels[3]

    def bilinear(y, size):
        return F.interpolate(y, tuple(size), mode="bilinear", align_corners=False)

    def up(y, like):
        height, width = like.shape[2:]
        return bilinear(y, (height, width)) if slot is None else y.repeat_interleave(2, 2).repeat_interleave(2, 3)[..., :height, :width]

    branches = [c5]
    for conv, cells in zip(net.ppm_conv, (1, 2, 3, 6), strict=True):
        pooled = F.adaptive_avg_pool2d(c5, cells)
        branches.append(conv(up(pooled if slot is None else bilinear(pooled, [math.ceil(side / 2) for side in c5.shape[2:]]), c5)))
    top = p5 = net.ppm_last_conv(torch.cat(branches, 1))
    pyramid = [p5]
    for level in (2, 1, 0):
        lateral = net.fpn_in[level](levels[level])
        top = lateral + up(top, lateral)
        pyramid.insert(0, net.fpn_out[level](top))
    p2, p3, p4, p5 = pyramid
    if slot is None:
        fused = torch.cat([p2, up(p3, p2), up(p4, p2), up(p5, p2)], 1)
    else:
        fused = torch.cat([p4, up(p5, p4)], 1)
        fused = torch.cat([p3, up(fused, p3)], 1)
        fused = torch.cat([p2, up(fused, p2)], 1)
    torch.testing.assert_close(net(x), net.conv_last(fused))
