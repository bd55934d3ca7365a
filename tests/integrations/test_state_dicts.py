"""Weights of other implementations: outputs equal theirs in float64, every tensor is reported, and what differs is refused by name."""

from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
from carafe_ports import BlockPort, PlainPort, ProjectedPort, SequentialPort, SubPixelFirstBlockPort, UnnormalizedPort, randomise
from carafepp.integrations.signatures import CARAFEPack, ProjectedCARAFE, YoloCARAFE
from carafepp.integrations.state_dicts import Converted, convert_state_dict
from carafepp.models import mmdet
from carafepp.models.carafe import CARAFE
from carafepp.models.mmdet import FPNCarafe, faster_rcnn_carafe, mask_rcnn_carafe
from mmdet_by_hand import random_state
from torch import Tensor

RELU = dict(activation="ReLU", norm_eps=1e-5)
SILU = dict(activation="SiLU", norm_eps=1e-3)


def normed(**options) -> Callable[[int], CARAFE]:
    return lambda c: CARAFE(c, up=2, compressed_channels=4, compressor_norm=True, **options)


def plain(**options) -> Callable[[int], CARAFE]:
    return lambda c: CARAFE(c, compressed_channels=4, **({"up": 2} | options))


# the port, the module that takes its weights, and the facts that its state dict does not hold
PORTS = {
    "mmcv": (lambda c: PlainPort(c, "channel_compressor", "content_encoder"), lambda c: CARAFEPack(c, 2, compressed_channels=4), {}),
    "norms, ReLU": (lambda c: BlockPort(c, c_mid=4, act=nn.ReLU, eps=1e-5), normed(), RELU),
    "norms, ReLU, scale 3": (
        lambda c: BlockPort(c, 1, 3, 4, 3, act=nn.ReLU, eps=1e-5),
        lambda c: CARAFE(c, up=3, kernel_size=3, encoder_kernel=1, compressed_channels=4, compressor_norm=True),
        RELU,
    ),
    "norms, ReLU, kept": (
        lambda c: BlockPort(c, c_mid=4, act=nn.ReLU, eps=1e-5),
        lambda c: YoloCARAFE(c, c_mid=4, activation=nn.ReLU, eps=1e-5),
        RELU,
    ),
    "yolo": (lambda c: BlockPort(c, 3, 5, 4, 2), lambda c: YoloCARAFE(c, c, 3, 5, 4, 2), SILU),
    "sequential": (lambda c: SequentialPort(c, norm=False), normed(), RELU),
    "norm beside": (lambda c: SequentialPort(c, norm=True), normed(), RELU),
    "comp, enc": (lambda c: PlainPort(c, "comp", "enc"), plain(), {}),
    "compress_conv": (lambda c: PlainPort(c, "compress_conv", "encoder_conv"), plain(), {}),
    "down, encoder, out": (lambda c: ProjectedPort(c, c), lambda c: ProjectedCARAFE(c, c, compressed_channels=4), {}),
    "sub-pixels first, folded": (
        lambda c: SubPixelFirstBlockPort(c, c_mid=4, act=nn.ReLU, eps=1e-5),
        normed(),
        RELU | dict(sub_pixels_first=True),
    ),
    "sub-pixels first, kept": (
        lambda c: SubPixelFirstBlockPort(c, 1, 3, 4, 3),
        lambda c: YoloCARAFE(c, None, 1, 3, 4, 3),
        SILU | dict(sub_pixels_first=True),
    ),
    "fused, no activation": (lambda c: fuse(randomise(BlockPort(c, c_mid=4, act=nn.Identity))), plain(), dict(activation="none")),
    "sub-pixels first, not normalised": (
        lambda c: UnnormalizedPort(c, "comp", "content_encoder", 5, 3, 3),
        plain(up=3, kernel_size=3, encoder_kernel=5, normalizer="none"),
        dict(sub_pixels_first=True),
    ),
}


class Network(nn.Module):
    """A small network with two upsamplers."""

    def __init__(self, upsample: Callable[[int], nn.Module]):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.head = nn.ModuleDict({"ups": nn.Sequential(upsample(6), nn.ReLU(), upsample(6)), "last": nn.Conv2d(6, 2, 1)})

    def forward(self, x: Tensor) -> Tensor:
        return self.head["last"](self.head["ups"](self.stem(x)))


def load(network: nn.Module, converted: Converted, state: dict[str, Tensor]) -> None:
    """Load a conversion that is complete, and check that it reports every tensor once."""
    assert converted.missing == []
    network.load_state_dict(converted.state)
    assert sorted([*converted.used, *converted.renamed, *converted.folded, *converted.left]) == sorted(state)
    made = [*converted.used, *converted.renamed.values(), *converted.zeros]
    assert set(made) == set(converted.state) or converted.folded
    assert set(made) <= set(converted.state)
    lines = str(converted).splitlines()
    assert len(lines) == len(state) + len(converted.zeros)
    assert all(any(name in line for line in lines) for name in state)


@pytest.mark.parametrize("port", PORTS)
def test_outputs_are_those_of_the_port(port):
    make_theirs, make_ours, facts = PORTS[port]
    theirs, ours = randomise(Network(make_theirs)), Network(make_ours).double().eval()
    state = theirs.state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    converted = convert_state_dict(state, ours, **facts)
    load(ours, converted, state)
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-9)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())


def test_norms_of_yolo_train_as_in_the_port():
    theirs, ours = randomise(BlockPort(6, c_mid=4)).train(), YoloCARAFE(6, c_mid=4).double().train()
    ours.load_state_dict(convert_state_dict(theirs.state_dict(), ours, **SILU).state)
    x = torch.randn(3, 6, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours.encoder_norm.running_var, theirs.enc.bn.running_var)
    assert torch.equal(ours.encoder_norm.num_batches_tracked, theirs.enc.bn.num_batches_tracked)


def test_the_report_says_what_became_of_every_tensor():
    theirs = randomise(BlockPort(6, c_mid=4, act=nn.ReLU, eps=1e-5))
    state = {f"up.{name}": tensor for name, tensor in theirs.state_dict().items()} | {"later.weight": torch.zeros(1)}
    converted = convert_state_dict(state, CARAFE(6, up=2, compressed_channels=4, compressor_norm=True), **RELU)
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert converted.used == []
    assert converted.renamed == {
        "up.comp.conv.weight": "channel_compressor.weight",
        **{f"up.comp.bn.{name}": f"compressor_norm.0.{name}" for name in norm},
        "up.enc.conv.weight": "content_encoder.weight",
    }
    assert converted.folded == {f"up.enc.bn.{name}": "content_encoder.weight" for name in norm}
    assert converted.zeros == ["channel_compressor.bias"]
    assert converted.left == ["later.weight"]
    assert "renamed  up.comp.conv.weight -> channel_compressor.weight" in str(converted)
    assert {tensor.dtype for tensor in converted.state.values()} == {torch.float32, torch.int64}


@pytest.mark.parametrize("prefix", ["module.", "model.model.10."])
def test_a_prefix_of_the_whole_state_dict_is_found(prefix):
    theirs, ours = randomise(Network(PORTS["comp, enc"][0])), Network(PORTS["comp, enc"][1]).double()
    state = {prefix + name: tensor for name, tensor in theirs.state_dict().items()}
    converted = convert_state_dict(state, ours)
    load(ours, converted, state)
    assert converted.renamed[f"{prefix}stem.weight"] == "stem.weight"
    single = {f"{prefix}{name}": tensor for name, tensor in theirs.head["ups"][0].state_dict().items()}
    assert not convert_state_dict(single, PORTS["comp, enc"][1](6)).missing


def test_a_prefix_must_be_given_where_several_fit():
    module, state = PORTS["comp, enc"][1](6), Network(PORTS["comp, enc"][0]).state_dict()
    with pytest.raises(ValueError, match=r"prefix must be one of 'head\.ups\.0\.', 'head\.ups\.2\.'"):
        convert_state_dict(state, module)
    converted = convert_state_dict(state, module, prefix="head.ups.2.")
    assert torch.equal(converted.state["content_encoder.weight"], state["head.ups.2.enc.weight"])
    assert "head.ups.0.comp.weight" in converted.left
    with pytest.raises(ValueError, match=r"prefix='head\.': the state dict has no CARAFE at 'head\.'"):
        convert_state_dict(state, module, prefix="head.")


def test_weights_of_this_package_are_used_as_they_are():
    network = Network(lambda c: YoloCARAFE(c, c_mid=4))
    state = network.state_dict()
    converted = convert_state_dict(state, network)
    assert converted.used == list(state)
    bare = CARAFE(6, up=2, compressed_channels=None)
    assert not convert_state_dict(bare.state_dict(), CARAFE(6, up=2, compressed_channels=None)).missing


def test_layers_that_only_the_network_has_are_missing():
    network = Network(PORTS["comp, enc"][1])
    network.head["aux"] = nn.Conv2d(6, 2, 1)
    converted = convert_state_dict(Network(PORTS["comp, enc"][0]).state_dict(), network)
    assert converted.missing == ["head.aux.weight", "head.aux.bias"]
    assert "missing  head.aux.bias" in str(converted)


BLOCK = dict(c_mid=4, act=nn.ReLU, eps=1e-5)


class Extra(PlainPort):
    """A port with a norm `bn` of other channels than the encoder's."""

    def __init__(self, norm: nn.Module):
        super().__init__(6, "comp", "enc")
        self.bn = norm


class Deep(PlainPort):
    """A port whose compressor has two convolutions."""

    def __init__(self):
        super().__init__(6, "comp", "enc")
        self.comp = nn.Sequential(nn.Conv2d(6, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))


def fuse(port: BlockPort) -> nn.Module:
    """The port after its norms were fused into convolutions."""
    for block in (port.comp, port.enc):
        block.conv = nn.utils.fuse_conv_bn_eval(block.conv.eval(), block.bn.eval())
        block.bn = nn.Identity()
    return port


@pytest.mark.parametrize(
    ("theirs", "ours", "facts", "message"),
    [
        (BlockPort(6, **BLOCK), plain(), RELU, r"'comp\.bn', for which the network has no layer: YoloCARAFE has a norm"),
        (BlockPort(6, **BLOCK), normed(), dict(activation="ReLU"), r"give norm_eps, the eps of 'comp\.bn'.*1e-5.*1e-3"),
        (BlockPort(6, **BLOCK), normed(), dict(norm_eps=1e-5), r"give activation, the layer after 'comp\.bn'.*'SiLU'.*'ReLU'"),
        (BlockPort(6, **BLOCK), normed(), SILU, r"norm_eps=0\.001 for 'comp\.bn', and the norm of the network has eps=1e-05"),
        (BlockPort(6, c_mid=4), normed(), SILU | {"norm_eps": 1e-5}, r"activation='SiLU' at '', and the network has ReLU.*YoloCARAFE"),
        (PlainPort(6, "comp", "enc"), plain(), dict(activation="ReLU"), r"activation='ReLU' at '', and the network has none"),
        (fuse(BlockPort(6, **BLOCK)), plain(), {}, r"give activation, the layer after 'comp\.conv'"),
        (fuse(BlockPort(6, **BLOCK)), normed(), RELU, r"the layer 'compressor_norm\.0' at ''.*fused"),
        (SequentialPort(6, norm=False), lambda c: YoloCARAFE(c, c_mid=4, activation=nn.ReLU), RELU, r"'encoder_norm'.*only YoloCARAFE"),
        (ProjectedPort(6, 5), plain(kernel_size=3), {}, r"'out', for which the network has no layer: ProjectedCARAFE"),
        (
            PlainPort(6, "comp", "enc"),
            lambda c: ProjectedCARAFE(c, c),
            {},
            r"the layer 'out' at '', for which the state dict has no tensors",
        ),
        (PlainPort(6, "comp", "enc"), lambda c: CARAFE(c, up=2, compressed_channels=None), {}, r"'comp'.*compressed_channels=None"),
        (PlainPort(6, "comp", "enc"), plain(up=3), {}, r"'enc\.weight' is \[100, 4, 3, 3\].*'content_encoder\.weight' is \[225, 4, 3, 3\]"),
        (PlainPort(6, "comp", "enc"), plain(up=3), dict(sub_pixels_first=True), r"'enc\.weight' is \[100, 4, 3, 3\]"),
        (nn.Conv2d(3, 3, 1), plain(), {}, r"has no layers of CARAFE, and the network has them under ''.*get_submodule"),
        (Extra(nn.BatchNorm2d(6)), plain(), {}, r"'bn\.weight' belongs to a layer that CARAFE at '' does not have; if it is never called"),
        (Deep(), plain(), dict(activation="none"), r"'comp\.2\.weight' belongs to a layer"),
        # of other purpose: an autoencoder, linear layers
        (nn.ModuleDict(dict(down=nn.Conv2d(6, 4, 1), encoder=nn.Conv2d(6, 100, 3))), plain(), {}, r"has no layers of CARAFE"),
        (nn.ModuleDict(dict(down=nn.Linear(6, 4), encoder=nn.Linear(4, 100))), plain(), {}, r"has no layers of CARAFE"),
    ],
)
def test_what_cannot_be_converted_exactly_is_refused_by_name(theirs, ours, facts, message):
    with pytest.raises(ValueError, match=message):
        convert_state_dict(theirs.state_dict(), ours(6), **facts)


def test_wrong_arguments_are_named():
    state = PlainPort(6, "comp", "enc").state_dict()
    with pytest.raises(TypeError, match=r"state must map names to tensors, got OrderedDict for 'state_dict'"):
        convert_state_dict({"state_dict": state}, plain()(6))
    with pytest.raises(TypeError, match=r"state must map names to tensors, got PlainPort; of a module, give state_dict"):
        convert_state_dict(PlainPort(6, "comp", "enc"), plain()(6))
    with pytest.raises(ValueError, match="network must have modules of CARAFE"):
        convert_state_dict(state, nn.Conv2d(6, 6, 1))
    with pytest.raises(
        ValueError, match=r"has layers of CARAFE under the prefixes '', and the network has them under 'head\.ups\.0\.', 'head\.ups\.2\.'"
    ):
        convert_state_dict(state, Network(plain()))


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    return random_state(masks=True)


def test_mmdetections_detector_becomes_one_of_ours(published):
    with torch.device("meta"):
        network = mask_rcnn_carafe()
    converted = convert_state_dict(published, network)
    assert converted.missing == []
    assert converted.renamed["neck.upsample_modules.3.content_encoder.weight"] == "backbone.fpn.upsample.3.content_encoder.weight"
    assert converted.renamed["roi_head.mask_head.upsample.channel_compressor.bias"] == (
        "roi_heads.mask_predictor.conv5_mask.channel_compressor.bias"
    )
    assert {name.rpartition(".")[2] for name in converted.left} == {"num_batches_tracked"}
    expected = mmdet.convert(published)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in converted.state.items())


def test_mmdetections_mask_head_is_found_in_a_detector(published):
    with torch.device("meta"):
        head = mask_rcnn_carafe().roi_heads.mask_predictor
    converted = convert_state_dict(published, head)
    assert converted.missing == []
    assert converted.renamed["roi_head.mask_head.upsample.content_encoder.bias"] == "conv5_mask.content_encoder.bias"
    assert len(converted.renamed) == len(converted.state) == 6


def test_half_precision_is_converted_to_that_of_the_network():
    theirs, ours = randomise(BlockPort(6, **BLOCK)).half(), normed()(6).double().eval()
    ours.load_state_dict(convert_state_dict(theirs.state_dict(), ours, **RELU).state)
    x = torch.randn(1, 6, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs.double()(x), rtol=1e-9, atol=1e-9)


def test_mmdetections_pyramid_is_found_in_a_detector(published):
    pyramid = FPNCarafe([256, 512, 1024, 2048], 256)
    converted = convert_state_dict(published, pyramid)
    pyramid.load_state_dict(converted.state)
    assert len(converted.renamed) == len(converted.state) == 36
    assert torch.equal(pyramid.upsample[2].content_encoder.bias, published["neck.upsample_modules.2.content_encoder.bias"])
    with torch.device("meta"):
        boxes = faster_rcnn_carafe()
    converted = convert_state_dict(published, boxes)
    assert converted.missing == []
    assert "roi_head.mask_head.upsample.content_encoder.weight" in converted.left
