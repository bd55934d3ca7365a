"""The decoders that UperNet is compared with: PSPNet and PSANet."""

import pytest
import torch
from carafepp.models.psanet import PSANet
from carafepp.models.pspnet import PSPNet
from carafepp.models.resnet import resnet50
from carafepp.models.samplers import Bilinear
from networks import dilated_resnet


def test_pyramid_pooling_holds_means_of_cells():
    torch.manual_seed(0)
    ppm = PSPNet(dilated_resnet(), 3, dim=8, ppm_dim=4, pool_scales=(1, 2)).eval().ppm
    x = torch.randn(2, 128, 6, 8)
    y = ppm(x)
    assert torch.equal(y[:, :128], x)
    conv = ppm.features[0][1:]
    torch.testing.assert_close(y[:, 128:132], conv(x.mean((2, 3), keepdim=True)).expand(-1, -1, 6, 8))
    # the four cells of the second branch lie in the corners
    cells = ppm.features[1][1:](x.unflatten(3, (2, 4)).unflatten(2, (2, 3)).mean((3, 5)))
    down, right = (torch.stack([1 - torch.linspace(0, 1, side), torch.linspace(0, 1, side)]) for side in (6, 8))
    torch.testing.assert_close(y[:, 132:], torch.einsum("ncij,ih,jw->nchw", cells, down, right))


@pytest.mark.parametrize(
    "make",
    [
        lambda: PSPNet(dilated_resnet(), 3, dim=8, ppm_dim=4),
        lambda: PSPNet(dilated_resnet(), 3, ppm=Bilinear, dim=8, ppm_dim=4),
        lambda: PSANet(dilated_resnet(), 3, dim=8, mask_size=5),
    ],
    ids=["pspnet", "pspnet_sampled", "psanet"],
)
@pytest.mark.parametrize("size", [(64, 64), (61, 39), (33, 90)], ids=str)
def test_compared_networks_train_at_any_size(make, size):
    net = make()
    logits, auxiliary = net(torch.randn(2, 3, *size))
    assert logits.shape == auxiliary.shape == (2, 3, -(-size[0] // 8), -(-size[1] // 8))
    (logits.logsumexp(1).mean() + auxiliary.logsumexp(1).mean()).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in net.parameters())
    assert isinstance(net.eval()(torch.randn(1, 3, *size)), torch.Tensor)


def test_compared_networks_have_the_authors_decoders():
    with torch.device("meta"):
        backbone = resnet50(output_stride=8)
        shapes = {
            name: {key: tuple(tensor.shape) for key, tensor in net.state_dict().items()}
            for name, net in {"pspnet": PSPNet(backbone, 150), "psanet": PSANet(backbone, 150)}.items()
        }
    common = {"cls.0.weight": (512, 4096, 3, 3), "cls.4.weight": (150, 512, 1, 1), "aux.0.weight": (256, 1024, 3, 3), "aux.4.bias": (150,)}
    own = {
        "pspnet": {"ppm.features.3.1.weight": (512, 2048, 1, 1), "ppm.features.3.2.bias": (512,)},
        "psanet": {
            "psa.reduce.0.weight": (512, 2048, 1, 1),
            "psa.reduce_p.1.weight": (512,),
            "psa.attention.0.weight": (512, 512, 1, 1),
            "psa.attention_p.3.weight": (59 * 59, 512, 1, 1),
            "psa.proj.0.weight": (2048, 1024, 1, 1),
        },
    }
    for name, expected in own.items():
        for key, shape in (common | expected).items():
            assert shapes[name][key] == shape, (name, key)


@pytest.mark.parametrize(
    "make", [lambda: PSPNet(dilated_resnet(), 3, dim=8, ppm_dim=4), lambda: PSANet(dilated_resnet(), 3, dim=8, mask_size=5)]
)
def test_compared_decoders_start_as_torch_initialises(make):
    """The authors leave the layers as they are; UperNet's set their own."""
    net = make()
    convolutions = [module for name, module in net.named_modules() if isinstance(module, torch.nn.Conv2d) and "backbone" not in name]
    assert len(convolutions) >= 8
    for convolution in convolutions:
        bound = convolution.weight[0].numel() ** -0.5
        assert 0.5 * bound < convolution.weight.abs().max() <= bound
    assert not any(module.bias.any() for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d))
