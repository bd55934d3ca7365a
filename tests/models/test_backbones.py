"""What the samplers and deformable convolutions cost in a ResNet, and which trained weights one can start from."""

from functools import partial

import pytest
import torch
import torchvision
from carafepp.models.carafe import CARAFE
from carafepp.models.deform import DeformConv
from carafepp.models.resnet import ResNet, resnet50, resnet101, tiny
from carafepp.models.weights import load_weights
from carafepp.tasks.runs import count_flops

carafe = partial(CARAFE, down=2, compressor_norm=True)


def cost(build, **options) -> tuple[int, float]:
    """Parameters and multiply-adds at 224 x 224."""
    with torch.device("meta"):
        net = build(num_classes=1000, **options)
        return sum(p.numel() for p in net.parameters()), count_flops(net, torch.rand(3, 224, 224)) / 2


@pytest.mark.parametrize(("build", "parameters", "multiply_adds"), [(resnet50, 25_557_032, 4.089e9), (resnet101, 44_549_160, 7.801e9)])
def test_seven_carafe_add_little_at_224(build, parameters, multiply_adds):
    assert cost(build) == (parameters, pytest.approx(multiply_adds, rel=1e-3))
    sampled = cost(build, downsample=carafe)
    # 69,519 of compressors and encoders, and two for each of the 7 x 16 compressed channels of the norms
    assert sampled[0] - parameters == 69_519 + 2 * 7 * 16
    assert sampled[1] - cost(build)[1] == pytest.approx(83.5e6, rel=1e-3)


def test_deformable_convolutions_stand_where_the_paper_has_them():
    def deformed(net):
        return [name for name, module in net.named_modules() if isinstance(module, DeformConv)]

    every = [f"layer{layer}.{block}.conv2" for layer, depth in ((2, 4), (3, 6), (4, 3)) for block in range(depth)]
    with torch.device("meta"):
        assert deformed(resnet50(deformable=(2, 3, 4))) == every
        sampled = resnet50(deformable=(2, 3, 4), downsample=carafe)
    assert deformed(sampled) == [name for name in every if ".0." not in name]
    assert sampled.layer2[0].conv2.stride == (1, 1)
    assert isinstance(sampled.layer2[0].sampler, CARAFE)


def test_deformable_convolution_starts_as_half_a_plain_one_and_learns_offsets():
    torch.manual_seed(0)
    layer = DeformConv(4, 6, stride=2)
    x = torch.randn(2, 4, 7, 5)
    y = layer(x)
    torch.testing.assert_close(y, torch.nn.functional.conv2d(x, layer.weight, stride=2, padding=1) / 2)
    y.square().sum().backward()
    assert layer.conv_offset.weight.grad.abs().max() > 0


def test_deformable_convolution_counts_as_two_convolutions():
    layer = DeformConv(4, 6).to("meta")
    assert count_flops(layer, torch.rand(4, 8, 8, device="meta")) == 2 * 64 * 9 * 4 * (27 + 6)


def test_deformable_resnet_has_the_sizes_of_the_plain_one():
    x = torch.randn(2, 3, 61, 39)
    plain = ResNet((1, 1, 1, 1), width=4)(x)
    for sampler in (None, carafe):
        levels = ResNet((1, 1, 1, 1), width=4, downsample=sampler, deformable=(2, 3, 4))(x)
        assert [level.shape for level in levels] == [level.shape for level in plain]


def test_torchvisions_weights_load_into_the_shared_layers(tmp_path):
    theirs = torchvision.models.resnet50()
    torch.save(theirs.state_dict(), tmp_path / "resnet50.pth")
    net = resnet50(downsample=carafe, deformable=(2, 3, 4))
    report = load_weights(net, tmp_path / "resnet50.pth")
    own = {".sampler", ".shortcut_sampler", ".conv_offset", "maxpool."}
    assert set(report.loaded) == set(theirs.state_dict()) - {"fc.weight", "fc.bias"}
    assert report.unused == ["fc.weight", "fc.bias"]
    assert report.initialised
    assert all(any(part in name for part in own) for name in report.initialised)
    for name in report.loaded:
        assert torch.equal(net.state_dict()[name], theirs.state_dict()[name]), name


def test_classifier_gives_its_weights_to_a_backbone_and_to_other_classes(tmp_path):
    trained = tiny(num_classes=10, downsample=carafe)
    torch.save({"state_dict": {f"model.{name}": tensor for name, tensor in trained.state_dict().items()}}, tmp_path / "best.ckpt")
    backbone = tiny(downsample=carafe, weights=tmp_path / "best.ckpt")
    assert all(torch.equal(tensor, trained.state_dict()[name]) for name, tensor in backbone.state_dict().items())
    finer = tiny(num_classes=7, downsample=carafe)
    assert load_weights(finer, trained.state_dict()).initialised == ["fc.weight", "fc.bias"]


def test_a_segmentation_network_gives_its_backbone(tmp_path):
    trained = {f"model.backbone.{name}": tensor for name, tensor in tiny().state_dict().items()}
    torch.save({"state_dict": trained | {"model.conv_last.weight": torch.zeros(1)}}, tmp_path / "best.ckpt")
    assert not load_weights(tiny(), tmp_path / "best.ckpt").initialised


def test_wrong_weights_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"weights=.*nowhere\.pth does not exist"):
        tiny(weights=tmp_path / "nowhere.pth")
    (tmp_path / "broken.pth").write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(ValueError, match=r"broken\.pth cannot be read"):
        tiny(weights=tmp_path / "broken.pth")
    torch.save({"conv9.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth has no tensor in common with the network, which has conv1\.weight"):
        tiny(weights=tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"list\.pth does not hold a state dict"):
        tiny(weights=tmp_path / "list.pth")
    torch.save(tiny(deep_stem=True).state_dict(), tmp_path / "deep.pth")
    with pytest.raises(ValueError, match=r"deep\.pth is of another network: .* conv1\.weight is \[16, 3, 3, 3\] there"):
        tiny(weights=tmp_path / "deep.pth")
