"""The networks of the rows of the paper's tables."""

import itertools

import pytest
import torch
import torch.nn as nn
import yaml
from carafepp.models.carafe import CARAFE
from carafepp.models.deform import DeformConv
from carafepp.models.detection import MaskRCNN
from carafepp.models.pooling import LIP, PairedLIP
from carafepp.tasks.runs import count_flops
from configurations import CONF, choices, compose_config
from hydra.utils import instantiate
from networks import count_parameters


def build(*overrides, classes=11):
    """Build the network that `carafepp-train` trains with these overrides."""
    return instantiate(compose_config("train", *overrides).model)(num_classes=classes)


def carafes(part):
    return sum(isinstance(module, CARAFE) for module in (part.modules() if part else ()))


@pytest.mark.parametrize("parts", list(itertools.product([False, True], repeat=4)), ids=lambda parts: "".join("-x"[part] for part in parts))
def test_each_part_of_upernet_has_its_own_override(parts):
    names = ["upsampler@model.ppm", "upsampler@model.fpn", "upsampler@model.fuse", "downsampler"]
    net = build("scale=small", *(f"{name}=carafe" for name, part in zip(names, parts, strict=True) if part))
    assert [carafes(part) for part in (net.ppm_up, net.fpn_up, net.fuse_up, net.backbone)] == [
        count * part for count, part in zip((4, 3, 3, 7), parts, strict=True)
    ]
    for size in ((61, 39), (33, 90)):
        logits = net.eval()(torch.randn(1, 3, *size))
        assert logits.shape == (1, 11, -(-size[0] // 4), -(-size[1] // 4))
        assert logits.isfinite().all()


def paper_rows(table):
    paper = yaml.safe_load((CONF / "paper.yaml").read_text())[table]
    return [row[0] for row in paper["rows"]]


def marked(row):
    """The parts of UperNet that the name of a row of Table IX says have CARAFE++."""
    return {part for part in ("ppm", "fpn", "fuse", "backbone") if part in row}


@pytest.mark.parametrize("row", choices("row/table9"))
def test_rows_of_table9_have_carafe_where_their_names_say(row):
    with torch.device("meta"):
        net = build("experiment=table9", f"row=table9/{row}", "scale=small")
    parts = {"ppm": net.ppm_up, "fpn": net.fpn_up, "fuse": net.fuse_up, "backbone": net.backbone}
    assert {name for name, part in parts.items() if carafes(part)} == marked(row)


def test_sweeps_have_the_rows_of_the_paper():
    for table, more in (("table8", set()), ("table9", {"published"})):
        swept = yaml.safe_load((CONF / "experiment" / f"{table}.yaml").read_text())["hydra"]["sweeper"]["params"]["row"]
        named = [row.strip().removeprefix(f"{table}/") for row in swept.split(",")]
        assert all((CONF / "row" / table / f"{row}.yaml").is_file() for row in named)
        assert [row for row in named if row not in more] == [row for row in paper_rows(table) if row not in more]


@pytest.mark.parametrize(("table", "row"), [(table, row) for table in ("table8", "table9") for row in paper_rows(table)])
def test_rows_are_networks_of_150_classes_at_450_pixels(table, row):
    with torch.device("meta"):
        net = build(f"experiment={table}", f"row={table}/{row}", "data.root=/nowhere", classes=150).eval()
        stride = 4 if "upernet" in row or table == "table9" else 8
        assert net(torch.rand(1, 3, 450, 599)).shape == (1, 150, -(-450 // stride), -(-599 // stride))


def test_carafe_costs_little_at_450_pixels():
    with torch.device("meta"):
        nets = [
            build("experiment=table8", f"row=table8/upernet_resnet50{row}", "data.root=/nowhere", classes=150) for row in ("", "_carafe")
        ]
        parameters = [count_parameters(net) for net in nets]
        flops = [count_flops(net, torch.rand(3, 450, 450)) for net in nets]
    assert parameters == [pytest.approx(64.22e6, rel=1e-3), pytest.approx(65.69e6, rel=1e-3)]
    assert flops == [pytest.approx(384.6e9, rel=1e-3), pytest.approx(389.3e9, rel=1e-3)]


@pytest.mark.parametrize(("size", "scale"), [(64, "scale=small"), (450, "data.root=/nowhere")])
def test_wider_decoders_cost_what_carafe_costs(size, scale):
    costs = {}
    for row in ("ppm_fpn_fuse_backbone", "same_flops", "same_parameters"):
        with torch.device("meta"):
            net = build("experiment=table9", f"row=table9/{row}", scale)
            costs[row] = {"parameters": count_parameters(net), "flops": count_flops(net, torch.rand(3, size, size))}
    carafe = costs["ppm_fpn_fuse_backbone"]
    assert costs["same_flops"]["flops"] == pytest.approx(carafe["flops"], rel=0.02)
    assert costs["same_parameters"]["parameters"] == pytest.approx(carafe["parameters"], rel=0.02)
    # the comparison never favours CARAFE++
    assert costs["same_flops"]["flops"] >= carafe["flops"]
    assert costs["same_parameters"]["parameters"] >= carafe["parameters"]


def network(row: str) -> nn.Module:
    """Build the network of a row of the paper's tables."""
    with torch.device("meta"):
        return instantiate(compose_config("train", f"experiment={row.split('/')[0]}", f"row={row}").task).model


@pytest.mark.parametrize("row", [f"table1/{name}" for name in choices("row/table1")])
def test_rows_of_the_first_table_are_what_they_are_called(row):
    model = network(row)
    assert isinstance(model, MaskRCNN) == ("mask_rcnn" in row)
    samplers = [*model.backbone.fpn.upsample, model.backbone.body.maxpool, model.backbone.body.layer4[0].shortcut_sampler]
    samplers += [model.roi_heads.mask_predictor.conv5_mask] if isinstance(model, MaskRCNN) else []
    assert all(isinstance(sampler, CARAFE) == row.endswith("_carafe") for sampler in samplers)
    deformed = sum(isinstance(module, DeformConv) for module in model.modules())
    # with CARAFE++, a plain convolution follows in the first block of each stage
    assert deformed == ("dcnv2" in row) * (4 + 23 + 3 - 3 * row.endswith("_carafe"))


def test_rows_add_the_parameters_of_their_samplers():
    names = ("table4/nearest", "table4/carafe", "table3/carafe", "table3/lip")
    baseline, upsampled, downsampled, lip = (network(name) for name in names)
    parameters = [count_parameters(model) for model in (baseline, upsampled, downsampled)]
    assert parameters[1] - parameters[0] == 3 * 74148
    # a frozen norm has no parameters: 2 * 16 less in each of seven places than the 69,743 of a classifier
    assert parameters[2] - parameters[0] == 69743 - 7 * 2 * 16
    body = lip.backbone.body
    # simplified logits in the stem, one bottleneck of 128 channels for both paths of each first block
    assert isinstance(body.maxpool, LIP)
    assert [isinstance(body.get_submodule(f"layer{i}")[0].pair_sampler, PairedLIP) for i in (1, 2, 3, 4)] == [False, True, True, True]
    assert body.layer4[0].pair_sampler.shared[0].weight.shape == (128, 1024, 1, 1)
    assert body.layer4[0].conv2.weight.shape == (512, 512, 1, 1)


@pytest.mark.parametrize(
    ("overrides", "millions"),
    [
        # torchvision's documentation
        (["row=table2/resnet50"], 25.6),
        (["row=table2/resnet101"], 44.5),
        # Gao et al., Table 4
        (["row=pretraining/resnet50_lip"], 23.9),
        (["row=pretraining/resnet50_lip", "backbone=resnet101"], 42.9),
    ],
)
def test_classifiers_have_the_published_number_of_parameters(overrides, millions):
    with torch.device("meta"):
        model = build("experiment=table2", *overrides, "data.root=FOLDER", classes=1000)
    assert round(count_parameters(model) / 1e6, 1) == millions
