"""Whole networks under torch.compile: one graph, also in training, and no more compilations than with PyTorch's own samplers."""

from functools import partial

import pytest
import torch
from carafepp.models.carafe import CARAFE
from carafepp.models.detection import FasterRCNN
from carafepp.models.fpn import FPN
from carafepp.models.global_local import GlobalLocal
from carafepp.models.guided_samplers import FADE
from carafepp.models.partial_conv import PartialGlobalLocal
from carafepp.models.psanet import PSANet
from carafepp.models.pspnet import PSPNet
from carafepp.models.resnet import ResNet
from carafepp.models.upernet import UperNet
from networks import DOWN, UP
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_leaves

# two levels: a compilation takes as long as a network has layers
backbone = partial(ResNet, (1, 1), width=4)
decoder = {"fpn_dim": 8, "ppm_dim": 4, "pool_scales": (1, 2)}
# by name: the network, and a backend that also differentiates the graph, or one that only takes it
NETWORKS = {
    "resnet": (lambda: backbone(downsample=DOWN, num_classes=3), "aot_eager"),
    "upernet": (lambda: UperNet(backbone(), 3, ppm=UP, fpn=FADE, fuse=UP, **decoder), "aot_eager"),
    "pyramid": (lambda: FasterRCNN(3, backbone=backbone(downsample=DOWN), fpn=UP, fpn_dim=8, head_dim=8).backbone, "aot_eager"),
    "pspnet": (lambda: PSPNet(backbone(output_stride=8), 3, ppm=UP, dim=8, ppm_dim=4, pool_scales=(1, 2)), "eager"),
    "psanet": (lambda: PSANet(backbone(output_stride=8), 3, dim=8, mask_size=3), "eager"),
    "generator": (lambda: GlobalLocal(4, downsample=DOWN, upsample=UP), "eager"),
    "partial generator": (lambda: PartialGlobalLocal(4, downsample=DOWN, upsample=UP), "eager"),
}


def draw(name, height=32, width=48):
    """Draw what a network takes: images, and for a generator masks."""
    x = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    return (x, (x[:, :1] < 0.3).float()) if "generator" in name else (x,)


def train(network, arguments, function):
    """Return the outputs of `function`, which runs the network, and the gradients of the parameters."""
    network.zero_grad()
    # for dropout
    torch.manual_seed(0)
    outputs = tree_leaves(function(*arguments))
    sum(y.float().square().mean() for y in outputs).backward()
    return [y.detach() for y in outputs], [parameter.grad.clone() for parameter in network.parameters()]


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_train_in_one_graph(name):
    torch.compiler.reset()
    torch.manual_seed(0)
    make, backend = NETWORKS[name]
    network, arguments = make(), draw(name)
    expected = train(network, arguments, network)
    compiled = torch.compile(network, fullgraph=True, backend=backend)
    torch.testing.assert_close(train(network, arguments, compiled), expected, rtol=1e-4, atol=1e-5)


def test_inductor_trains_a_network():
    torch.compiler.reset()
    torch.manual_seed(0)
    # the other networks have downsamplers; a kernel of inductor takes a second of a C++ compiler
    network = nn.Sequential(nn.Conv2d(3, 8, 3), CARAFE(8, up=2, kernel_size=3), nn.Sigmoid())
    arguments = draw("", 13, 10)
    compiled = torch.compile(network, fullgraph=True)
    torch.testing.assert_close(train(network, arguments, compiled), train(network, arguments, network))


class TwoLevels(nn.Module):
    """A pyramid of an image and the map of a downsampler."""

    def __init__(self, up, down):
        super().__init__()
        self.down = down
        self.fpn = FPN([3, 3], 8, upsample=up)

    def forward(self, x):
        return self.fpn({"0": x, "1": self.down(x)})["0"]


def count_compilations(network, sizes):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(network, fullgraph=True, backend=counter)
    for n, height, width in sizes:
        compiled(torch.rand(n, 3, height, width)).sum().backward()
    return counter.frame_count


def test_other_sizes_compile_no_more_often_than_with_pytorchs_samplers():
    sizes = [(2, 16, 16), (2, 24, 40), (3, 17, 51), (2, 9, 1), (2, 16, 16)]
    carafe = TwoLevels(UP, CARAFE(3, down=2, kernel_size=3, compressed_channels=2))
    # max_pool2d and interpolate
    plain = TwoLevels(None, nn.MaxPool2d(3, 2, 1))
    assert count_compilations(carafe, sizes) <= count_compilations(plain, sizes)
