"""torch.fx traces every sampler and every network, at sizes other than those of a trace, and quantises networks."""

import pickle
from functools import partial

import pytest
import torch
from carafepp.models.carafe import CARAFE
from carafepp.models.detection import FasterRCNN
from carafepp.models.global_local import GlobalLocal
from carafepp.models.guided_samplers import FADE, SAPA
from carafepp.models.partial_conv import PartialGlobalLocal
from carafepp.models.point_samplers import DySample
from carafepp.models.pooling import BlurPool
from carafepp.models.psanet import PSANet
from carafepp.models.pspnet import PSPNet
from carafepp.models.resnet import ResNet
from carafepp.models.upernet import UperNet
from configurations import choices, configured_sampler
from networks import DOWN, UP, dilated_resnet, small_resnet
from sampler_cases import CASES
from torch import nn
from torch.utils._pytree import tree_leaves
from torchvision.models.feature_extraction import create_feature_extractor


def upernet(sampler, backbone=small_resnet):
    return UperNet(backbone(), 3, ppm=sampler, fpn=sampler, fuse=sampler, fpn_dim=8, ppm_dim=4)


def pyramid(sampler):
    return FasterRCNN(3, backbone=small_resnet(), fpn=sampler, fpn_dim=8, head_dim=8).backbone


NETWORKS = {
    "resnet": lambda: small_resnet(downsample=DOWN),
    "resnet, blur pool": lambda: small_resnet(downsample=BlurPool, num_classes=3),
    "resnet, deformable": lambda: small_resnet(deformable=(2, 3)),
    "upernet": lambda: upernet(None),
    "upernet, carafe": lambda: upernet(UP, partial(small_resnet, downsample=DOWN)),
    "upernet, fade": lambda: upernet(FADE),
    "pspnet": lambda: PSPNet(dilated_resnet(), 3, dim=8, ppm_dim=4),
    "pspnet, carafe": lambda: PSPNet(dilated_resnet(), 3, ppm=UP, dim=8, ppm_dim=4),
    "psanet": lambda: PSANet(dilated_resnet(), 3, dim=8, mask_size=5),
    "pyramid": lambda: pyramid(None),
    "pyramid, carafe": lambda: pyramid(UP),
    "pyramid, dysample": lambda: pyramid(DySample),
    "generator": lambda: GlobalLocal(4),
    "generator, carafe": lambda: GlobalLocal(4, downsample=DOWN, upsample=UP),
    "partial generator": lambda: PartialGlobalLocal(4),
    "partial generator, carafe": lambda: PartialGlobalLocal(4, downsample=DOWN, upsample=UP),
}
# without the file for a single slot
NAMES = {group: [name for name in choices(group) if name != "shared"] for group in ("upsampler", "downsampler")}
every_network = pytest.mark.parametrize("name", NETWORKS)


def images(name: str, height: int, width: int) -> tuple[torch.Tensor, ...]:
    """Draw what a network takes: images, and for a generator masks."""
    x = torch.rand(1, 3, height, width)
    return (x, (torch.rand(1, 1, height, width) < 0.3).float()) if "generator" in name else (x,)


def assert_equal(traced, module, *arguments):
    for actual, expected in zip(tree_leaves(traced(*arguments)), tree_leaves(module(*arguments)), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.group}-{case.id}")
@torch.no_grad()
def test_samplers_are_traced_for_any_size_and_dtype(case):
    module = case.slot(8).eval()
    traced = pickle.loads(pickle.dumps(torch.fx.symbolic_trace(module)))
    for height, width, odd in ((5, 4, 1), (2, 3, 0), (1, 2, -1)):
        x = torch.randn(2, 8, height, width)
        assert_equal(traced, module, *((x, torch.randn(2, 8, 2 * height - odd, 2 * width)) if case.guided else (x,)))
    if case.guided:
        assert_equal(traced, module, x, None)
        with pytest.raises(ValueError, match="guide must have 8 channels and twice the size of x"):
            traced(x, torch.randn(2, 8, 5, 4))
    elif case.group == "upsampler":
        assert_equal(traced, module, x, (1, 5))
        with pytest.raises(ValueError, match="size must be at least 1 and differ by less than up=2"):
            traced(x, (4, 4))
    assert_equal(traced.bfloat16(), module.bfloat16(), torch.randn(1, 8, 3, 4).bfloat16())


@every_network
@torch.no_grad()
def test_networks_are_traced_for_any_size(name):
    network = NETWORKS[name]().eval()
    traced = pickle.loads(pickle.dumps(torch.fx.symbolic_trace(network)))
    for size in ((64, 96), (71, 45)):
        assert_equal(traced, network, *images(name, *size))


def test_traced_networks_train():
    network = upernet(UP)
    gradients = []
    for module in (network, torch.fx.symbolic_trace(network)):
        network.zero_grad()
        torch.manual_seed(0)
        module(torch.rand(2, 3, 64, 64)).logsumexp(1).mean().backward()
        gradients.append([parameter.grad.clone() for parameter in network.parameters()])
    for actual, expected in zip(*gradients, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", NAMES["upsampler"])
@torch.no_grad()
def test_features_are_extracted_from_decoders_with_every_upsampler(name):
    sampler = configured_sampler("upsampler", name)
    network = UperNet(ResNet((1, 1), width=4), 3, ppm=sampler, fpn=sampler, fuse=sampler, fpn_dim=8, ppm_dim=8, pool_scales=(1, 2)).eval()
    extractor, x = create_feature_extractor(network, {"conv_last": "logits"}), torch.rand(1, 3, 43, 30)
    assert torch.equal(extractor(x)["logits"], network(x))


@pytest.mark.parametrize("name", NAMES["downsampler"])
@torch.no_grad()
def test_features_are_extracted_from_backbones_with_every_downsampler(name):
    network = ResNet((1, 1), width=4, downsample=configured_sampler("downsampler", name)).eval()
    extractor, x = create_feature_extractor(network, ["layer1", "layer2"]), torch.rand(1, 3, 43, 30)
    assert_equal(lambda x: list(extractor(x).values()), network, x)


@torch.no_grad()
def test_features_are_extracted_after_a_sampler():
    network = upernet(UP).eval()
    extractor = create_feature_extractor(network, {"fpn_up.0": "p2", "conv_last": "logits"})
    x = torch.rand(1, 3, 71, 45)
    seen = []
    network.fpn_up[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    logits, features = network(x), extractor(x)
    assert torch.equal(features["p2"], seen[0])
    assert torch.equal(features["logits"], logits)


@pytest.mark.parametrize("sampler", [UP, FADE, lambda channels: nn.Upsample(scale_factor=2)], ids=["carafe", "fade", "own"])
def test_extracted_features_keep_the_checks_of_sizes(sampler):
    network = upernet(sampler, partial(small_resnet, output_stride=16)).eval()
    extractor = create_feature_extractor(network, ["conv_last"])
    with pytest.raises(ValueError, match=r"turns 4 x 4 into 8 x 8 pixels, but the finer map has 4 x 4|twice the size of x"):
        extractor(torch.rand(1, 3, 64, 64))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["resnet", "pspnet, carafe", "pyramid, carafe"])
@torch.no_grad()
def test_convolutions_are_quantised_and_the_operator_stays_in_float(name):
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    # quantisation errs differently in every random network
    torch.manual_seed(0)
    network, arguments = NETWORKS[name]().eval(), images(name, 64, 64)
    prepared = prepare_fx(network, get_default_qconfig_mapping(torch.backends.quantized.engine), arguments)
    prepared(*arguments)
    quantised = convert_fx(prepared)
    seen = []
    for node in quantised.graph.nodes:
        if node.op == "call_function" and node.target.__name__ == "reassemble":
            assert all(argument.target == "dequantize" for argument in node.args)
            seen.append(node)
    assert len(seen) == sum(isinstance(module, CARAFE) for module in network.modules())
    assert not [module for module in quantised.modules() if type(module) is nn.Conv2d]
    for actual, expected in zip(tree_leaves(quantised(*arguments)), tree_leaves(network(*arguments)), strict=True):
        assert (actual - expected).abs().max() < 0.15 * expected.abs().max()


def test_a_similarity_is_one_node():
    """The gradient of the operator, which SAPA uses in its forward pass, is inside a function that torch.fx calls as a whole."""
    names = [node.name for node in torch.fx.symbolic_trace(SAPA(8)).graph.nodes]
    assert "multiply_windows" in names
    assert "reassemble" in names
