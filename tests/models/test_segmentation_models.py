"""The networks of Tables VIII and IX: PSANet and PSPNet by their definitions, and every combination of slots by its own overrides."""

import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from carafepp.models.carafe import CARAFE
from carafepp.models.psanet import PointwiseAttention, PSANet, align_masks
from carafepp.models.pspnet import PSPNet
from carafepp.models.resnet import ResNet, resnet50
from carafepp.models.samplers import Bilinear, MaxPool, Nearest
from carafepp.models.upernet import UperNet
from carafepp.tasks.runs import count_flops
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st

CONF = Path(__file__).parents[2] / "conf"


@pytest.fixture(scope="module")
def build():
    """Network of these overrides of carafepp-train."""
    with initialize_config_module("carafepp.conf", version_base="1.3"):
        yield lambda *overrides, classes=11: instantiate(compose("train", overrides=list(overrides)).model)(num_classes=classes)


def carafes(part):
    return sum(isinstance(module, CARAFE) for module in (part.modules() if part else ()))


def dilated(**options):
    return ResNet((1, 2, 2, 2), width=4, output_stride=8, **options)


def test_dilated_backbone_keeps_weights_and_stays_at_stride_8():
    net = dilated()
    net.load_state_dict(ResNet((1, 2, 2, 2), width=4).state_dict())
    assert [tuple(level.shape[2:]) for level in net(torch.randn(2, 3, 61, 39))] == [(16, 10), (8, 5), (8, 5), (8, 5)]
    dilations = {name: module.dilation[0] for name, module in net.named_modules() if name.endswith("conv2")}
    assert dilations == {f"layer{i}.{block}.conv2": max(1, 2 ** (i - 2)) for i in (1, 2, 3, 4) for block in range(1 if i == 1 else 2)}


def test_dilated_layers_have_no_samplers_and_may_be_deformable():
    net = dilated(downsample=MaxPool, deformable=(3, 4))
    assert [name for name, module in net.named_modules() if isinstance(module, MaxPool)] == [
        "maxpool",
        "layer2.0.sampler",
        "layer2.0.shortcut_sampler",
    ]
    plain = dilated(downsample=MaxPool)
    assert [level.shape for level in net(torch.randn(1, 3, 45, 33))] == [level.shape for level in plain(torch.randn(1, 3, 45, 33))]
    # a deformable convolution starts as half the plain one, dilated alike
    torch.manual_seed(0)
    x = torch.randn(1, 32, 9, 9)
    plain.layer4[1].conv2.load_state_dict({"weight": net.layer4[1].conv2.weight})
    torch.testing.assert_close(net.layer4[1].conv2(x), plain.layer4[1].conv2(x) / 2)


def test_output_stride_is_checked():
    with pytest.raises(ValueError, match="output_stride must be 8, 16 or 32, got 4"):
        ResNet((1, 1, 1, 1), width=4, output_stride=4)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.integers(1, 5), st.integers(1, 5), st.sampled_from([1, 3, 5, 9]))
def test_masks_of_relative_positions_are_laid_out(h, w, side):
    masks = torch.randn(2, side * side, h, w)
    scores = align_masks(masks)
    reach = side // 2
    for (yj, xj), (yi, xi) in itertools.product(itertools.product(range(h), range(w)), repeat=2):
        dy, dx = yj - yi, xj - xi
        expected = torch.full([2], float("-inf"))
        if abs(dy) <= reach and abs(dx) <= reach:
            expected = masks[:, (dy + reach) * side + dx + reach, yi, xi]
        assert torch.equal(scores[:, yj * w + xj, yi * w + xi], expected)


@pytest.mark.parametrize("shrink", [1, 2])
@pytest.mark.parametrize("mask_size", [3, 7])
def test_attention_collects_and_distributes(mask_size, shrink):
    """Section 3 of the PSANet paper, position by position: i collects x_j by the mask of i, and is given x_j by the mask of j."""
    torch.manual_seed(0)
    h, w, reach = 3, 4, mask_size // 2
    layer = PointwiseAttention(6, 5, mask_size=mask_size, shrink=shrink).double().eval()
    x = torch.randn(1, 6, (h - 1) * shrink + 1, (w - 1) * shrink + 1, dtype=torch.float64)
    # at these sizes every second pixel is left
    values = [reduce(x)[..., ::shrink, ::shrink] for reduce in (layer.reduce, layer.reduce_p)]
    masks = layer.attention(values[0]), layer.attention_p(values[1])

    def mask(of, at, to):
        """Score that the mask of position `at` has for position `to`."""
        dy, dx = to[0] - at[0], to[1] - at[1]
        if max(abs(dy), abs(dx)) > reach:
            return torch.tensor(float("-inf"), dtype=torch.float64)
        return of[0, (dy + reach) * mask_size + dx + reach, at[0], at[1]]

    positions = list(itertools.product(range(h), range(w)))
    collected, given = (torch.zeros(1, 5, h, w, dtype=torch.float64) for _ in range(2))
    for i in positions:
        wanted = torch.stack([mask(masks[0], i, j) for j in positions]).softmax(0)
        offered = torch.stack([mask(masks[1], j, i) for j in positions]).softmax(0)
        for a, b, j in zip(wanted, offered, positions, strict=True):
            collected[0, :, *i] += a * values[0][0, :, *j]
            given[0, :, *i] += b * values[1][0, :, *j]
    # projected first, then enlarged: what was left out is in the middle between its neighbours
    expected = torch.zeros_like(x)
    expected[..., ::shrink, ::shrink] = layer.proj(torch.cat([collected, given], 1))
    if shrink == 2:
        expected[..., 1::2, ::2] = (expected[..., :-2:2, ::2] + expected[..., 2::2, ::2]) / 2
        expected[..., 1::2] = (expected[..., :-2:2] + expected[..., 2::2]) / 2
    torch.testing.assert_close(layer(x), torch.cat([x, expected], 1))


def test_mask_of_even_size_is_refused():
    with pytest.raises(ValueError, match=r"mask_size must be odd.*got 8"):
        PointwiseAttention(4, 4, mask_size=8, shrink=2)


def test_pyramid_pooling_holds_means_of_cells():
    torch.manual_seed(0)
    ppm = PSPNet(dilated(), 3, dim=8, ppm_dim=4, pool_scales=(1, 2)).eval().ppm
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
        lambda: PSPNet(dilated(), 3, dim=8, ppm_dim=4),
        lambda: PSPNet(dilated(), 3, ppm=Bilinear, dim=8, ppm_dim=4),
        lambda: PSANet(dilated(), 3, dim=8, mask_size=5),
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


@pytest.mark.parametrize("make", [lambda: PSPNet(dilated(), 3, dim=8, ppm_dim=4), lambda: PSANet(dilated(), 3, dim=8, mask_size=5)])
def test_compared_decoders_start_as_torch_initialises(make):
    """The authors leave the layers as they are; UperNet's set their own."""
    net = make()
    convolutions = [module for name, module in net.named_modules() if isinstance(module, torch.nn.Conv2d) and "backbone" not in name]
    assert len(convolutions) >= 8
    for convolution in convolutions:
        bound = convolution.weight[0].numel() ** -0.5
        assert 0.5 * bound < convolution.weight.abs().max() <= bound
    assert not any(module.bias.any() for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d))


@pytest.mark.parametrize("slot", [None, Nearest])
def test_upernet_is_the_authors_and_with_samplers_the_papers(slot):
    """The authors' forward written out, and section 4.2's changes to it where there is a sampler, at odd sizes."""
    torch.manual_seed(0)
    net = UperNet(ResNet((1, 1, 1, 1), width=4), 3, ppm=slot, fpn=slot, fuse=slot, fpn_dim=8, ppm_dim=4).eval()
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


@pytest.mark.parametrize("parts", list(itertools.product([False, True], repeat=4)), ids=lambda parts: "".join("-x"[part] for part in parts))
def test_each_part_of_upernet_has_its_own_override(build, parts):
    names = ["upsampler@model.ppm", "upsampler@model.fpn", "upsampler@model.fuse", "downsampler"]
    net = build("scale=small", *(f"{name}=carafe" for name, part in zip(names, parts, strict=True) if part))
    assert [carafes(part) for part in (net.ppm_up, net.fpn_up, net.fuse_up, net.backbone)] == [
        count * part for count, part in zip((4, 3, 3, 7), parts, strict=True)
    ]
    for size in ((61, 39), (33, 90)):
        logits = net.eval()(torch.randn(1, 3, *size))
        assert logits.shape == (1, 11, -(-size[0] // 4), -(-size[1] // 4))
        assert logits.isfinite().all()


def rows(table):
    paper = yaml.safe_load((CONF / "paper.yaml").read_text())[table]
    return [row[0] for row in paper["rows"]]


def marked(row):
    """The parts of UperNet that the name of a row of Table IX says have CARAFE++."""
    return {part for part in ("ppm", "fpn", "fuse", "backbone") if part in row}


@pytest.mark.parametrize("row", [path.stem for path in sorted((CONF / "row" / "table9").glob("*.yaml"))])
def test_rows_of_table9_have_carafe_where_their_names_say(build, row):
    with torch.device("meta"):
        net = build("experiment=table9", f"row=table9/{row}", "scale=small")
    parts = {"ppm": net.ppm_up, "fpn": net.fpn_up, "fuse": net.fuse_up, "backbone": net.backbone}
    assert {name for name, part in parts.items() if carafes(part)} == marked(row)


def test_sweeps_have_the_rows_of_the_paper():
    for table, more in (("table8", set()), ("table9", {"published"})):
        swept = yaml.safe_load((CONF / "experiment" / f"{table}.yaml").read_text())["hydra"]["sweeper"]["params"]["row"].split(",")
        assert all((CONF / "row" / f"{row}.yaml").is_file() for row in swept)
        named = [row.removeprefix(f"{table}/") for row in swept]
        assert [row for row in named if row not in more] == [row for row in rows(table) if "resnet101" not in row and row not in more]


@pytest.mark.parametrize(("table", "row"), [(table, row) for table in ("table8", "table9") for row in rows(table)])
def test_rows_are_networks_of_150_classes_at_450_pixels(build, table, row):
    with torch.device("meta"):
        net = build(f"experiment={table}", f"row={table}/{row}", "data.root=/nowhere", classes=150).eval()
        stride = 4 if "upernet" in row or table == "table9" else 8
        assert net(torch.rand(1, 3, 450, 599)).shape == (1, 150, -(-450 // stride), -(-599 // stride))


def test_carafe_costs_little_at_450_pixels(build):
    with torch.device("meta"):
        nets = [
            build("experiment=table8", f"row=table8/upernet_resnet50{row}", "data.root=/nowhere", classes=150) for row in ("", "_carafe")
        ]
        parameters = [sum(p.numel() for p in net.parameters()) for net in nets]
        flops = [count_flops(net, torch.rand(3, 450, 450)) for net in nets]
    assert parameters == [pytest.approx(64.22e6, rel=1e-3), pytest.approx(65.69e6, rel=1e-3)]
    assert flops == [pytest.approx(384.6e9, rel=1e-3), pytest.approx(389.3e9, rel=1e-3)]
