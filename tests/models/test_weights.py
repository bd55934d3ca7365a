"""Trained weights that a backbone starts from: torchvision's, a classifier's, a segmentation network's."""

from urllib.error import URLError

import pytest
import torch
import torchvision
from carafepp.models.resnet import resnet50, tiny
from carafepp.models.weights import load_weights, read_state
from networks import NORMED_CARAFE
from torchvision.models import get_weight


def test_torchvisions_weights_load_into_the_shared_layers(tmp_path):
    theirs = torchvision.models.resnet50()
    torch.save(theirs.state_dict(), tmp_path / "resnet50.pth")
    net = resnet50(downsample=NORMED_CARAFE, deformable=(2, 3, 4))
    report = load_weights(net, tmp_path / "resnet50.pth")
    own = {".sampler", ".shortcut_sampler", ".conv_offset", "maxpool."}
    assert set(report.loaded) == set(theirs.state_dict()) - {"fc.weight", "fc.bias"}
    assert report.unused == ["fc.weight", "fc.bias"]
    assert report.initialised
    assert all(any(part in name for part in own) for name in report.initialised)
    for name in report.loaded:
        assert torch.equal(net.state_dict()[name], theirs.state_dict()[name]), name


def test_classifier_gives_its_weights_to_a_backbone_and_to_other_classes(tmp_path):
    trained = tiny(num_classes=10, downsample=NORMED_CARAFE)
    torch.save({"state_dict": {f"model.{name}": tensor for name, tensor in trained.state_dict().items()}}, tmp_path / "best.ckpt")
    backbone = tiny(downsample=NORMED_CARAFE, weights=tmp_path / "best.ckpt")
    assert all(torch.equal(tensor, trained.state_dict()[name]) for name, tensor in backbone.state_dict().items())
    finer = tiny(num_classes=7, downsample=NORMED_CARAFE)
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
    name, tensor = next(iter(tiny().state_dict().items()))
    torch.save({name: tensor.to_sparse()}, tmp_path / "sparse.pth")
    with pytest.raises(ValueError, match=r"(?s)sparse\.pth does not fit the network: .*conv1\.weight"):
        tiny(weights=tmp_path / "sparse.pth")
    torch.save(tiny(deep_stem=True).state_dict(), tmp_path / "deep.pth")
    with pytest.raises(ValueError, match=r"deep\.pth belongs to another network: .* conv1\.weight is \[16, 3, 3, 3\] there"):
        tiny(weights=tmp_path / "deep.pth")


def test_a_changed_bit_of_a_weight_is_found(tmp_path):
    path = tmp_path / "resnet.pth"
    torch.save(tiny().state_dict(), path)
    content = bytearray(path.read_bytes())
    weights = tiny(weights=path).state_dict()["layer4.0.conv2.weight"]
    content[content.index(weights.numpy().tobytes()) + 7] ^= 64
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"resnet\.pth is damaged: a part does not have its checksum"):
        tiny(weights=path)


def test_the_format_without_checksums_is_read(tmp_path):
    torch.save(tiny().state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert not load_weights(tiny(), tmp_path / "old.pth").initialised


def test_weights_are_read_by_the_name_that_torchvision_gives_them(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    name = "ResNet50_Weights.IMAGENET1K_V1"
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    # in the cache of torch.hub, as after a download
    torch.save({"fc.bias": torch.arange(3.0)}, tmp_path / "hub" / "checkpoints" / get_weight(name).url.rpartition("/")[2])
    assert read_state(name)["fc.bias"].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match=r"weights=ResNet50_Weights.V9 is not a name of torchvision's weights"):
        read_state("ResNet50_Weights.V9")

    def refuse(*arguments, **options):
        raise URLError("offline")

    monkeypatch.setattr("torch.hub.urlopen", refuse)
    with pytest.raises(
        FileNotFoundError, match=r"ResNet101_Weights.IMAGENET1K_V2 cannot be downloaded from https://.*offline.*give a file"
    ):
        read_state("ResNet101_Weights.IMAGENET1K_V2")
