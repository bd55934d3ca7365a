"""Where features are reassembled from: weights that give the features back, through any path, and pictures of them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from carafepp.models.carafe import CARAFE
from carafepp.models.fpn import FPN
from carafepp.models.regions import trace_regions
from carafepp.models.resnet import tiny
from carafepp.scripts.running.predict import name_folders
from carafepp.tasks.region_pictures import OPACITY, SOURCE, TARGET, draw_regions
from carafepp.tasks.task import View
from commands import call
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from training import train_in

LOCATIONS = [(0.0, 0.0), (0.4, 0.7), (0.99, 0.99), (0.5, 0.0)]


def sampler(channels: int, seed: int, **options) -> CARAFE:
    """A CARAFE whose kernels differ from place to place."""
    torch.manual_seed(seed)
    module = CARAFE(channels, compressed_channels=4, **options).double()
    nn.init.normal_(module.content_encoder.weight)
    return module


class Cropped(nn.Module):
    """Upsamplers one after the other, each cropped as a network crops it to an odd lateral."""

    def __init__(self, *samplers: nn.Module):
        super().__init__()
        self.samplers = nn.ModuleList(samplers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for module in self.samplers:
            x = module(x)[..., :-1, :]
        return x


class Fitted(Cropped):
    """Upsamplers one after the other, each a row longer and a column shorter than its scale, as the laterals need it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for module in self.samplers:
            x = module(x, size=(2 * x.shape[2] + 1, 2 * x.shape[3] - 1))
        return x


def expected(features: torch.Tensor) -> torch.Tensor:
    """What a map [C, H, W] has at LOCATIONS -> [C, L]."""
    height, width = features.shape[1:]
    return torch.stack([features[:, int(down * height), int(across * width)] for down, across in LOCATIONS], dim=1)


STEPS = [{"up": 2}, {"down": 2}, {"up": 3}, {"up": 3, "down": 2}, {"up": 2, "kernel_size": 3}, {"up": 2, "border": "replicate"}]


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.sampled_from(STEPS), min_size=1, max_size=3),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.sampled_from(["softmax", "sigmoid"]),
)
def test_sum_of_every_map_under_its_weights_is_the_target(steps, size, normalizer):
    network = nn.Sequential(*(sampler(8, i, normalizer=normalizer, **step) for i, step in enumerate(steps)))
    x = torch.randn(1, 8, *size, dtype=torch.float64)
    regions = trace_regions(network, [x], "*", LOCATIONS)
    assert [region.module for region in regions] == [*(str(i) for i in range(len(steps))), ""]
    assert torch.equal(regions[0].features, x[0])
    for region in regions:
        torch.testing.assert_close(torch.einsum("chw,lhw->cl", region.features, region.weights), expected(network(x)[0]))


@pytest.mark.parametrize("border", ["renormalize", "replicate", "shift"])
def test_weights_sum_to_one_if_no_tap_is_lost(border):
    network = nn.Sequential(sampler(4, 0, up=2, border=border), sampler(4, 1, up=3, down=2, border=border))
    x = torch.randn(1, 4, 6, 5, dtype=torch.float64)
    for region in trace_regions(network, [x], "*", LOCATIONS):
        torch.testing.assert_close(torch.einsum("chw,lhw->cl", region.features, region.weights), expected(network(x)[0]))
        torch.testing.assert_close(region.weights.sum((1, 2)), torch.ones(len(LOCATIONS), dtype=torch.float64))


def test_what_a_network_crops_takes_no_part():
    network = Cropped(sampler(4, 0, up=2), sampler(4, 1, up=2, kernel_size=3))
    x = torch.randn(1, 4, 5, 6, dtype=torch.float64)
    regions = trace_regions(network, [x], ["samplers.0", "samplers.1"], LOCATIONS)
    assert [tuple(region.weights.shape) for region in regions] == [(4, 5, 6), (4, 9, 12), (4, 18, 24)]
    for region in regions:
        torch.testing.assert_close(torch.einsum("chw,lhw->cl", region.features, region.weights), expected(regions[-1].features))


def test_what_repeats_counts_for_the_last_row():
    network = Fitted(sampler(4, 0, up=2), sampler(4, 1, up=2, kernel_size=3))
    x = torch.randn(1, 4, 5, 6, dtype=torch.float64)
    regions = trace_regions(network, [x], "*", LOCATIONS)
    assert [tuple(region.weights.shape) for region in regions] == [(4, 5, 6), (4, 11, 11), (4, 23, 21)]
    for region in regions:
        torch.testing.assert_close(torch.einsum("chw,lhw->cl", region.features, region.weights), expected(regions[-1].features))


def test_weights_of_groups_are_averaged():
    network = sampler(4, 0, up=2, groups=2)
    x = torch.randn(1, 4, 3, 3, dtype=torch.float64)
    (region, output) = trace_regions(nn.Sequential(network), [x], "0", [(0.5, 0.5)])
    kernel = network.kernels(x)[0, :, :, :, 3, 3].mean(0)  # around source pixel (1, 1), of which 3 x 3 are on the map
    torch.testing.assert_close(region.weights[0], kernel[1:4, 1:4])
    assert output.weights.sum() == 1


def test_backbone_accumulates_from_its_last_stage_to_the_stem():
    network = tiny(downsample=lambda channels: CARAFE(channels, down=2, compressed_channels=4)).eval()
    regions = trace_regions(network, [torch.rand(1, 3, 97, 64)], ["maxpool", "layer?.0.shortcut_sampler"], [(0.5, 0.5)])
    assert [region.module for region in regions] == ["maxpool", *(f"layer{i}.0.shortcut_sampler" for i in (2, 3, 4)), ""]
    assert [tuple(region.weights.shape[1:]) for region in regions] == [(49, 32), (25, 16), (13, 8), (7, 4), (4, 2)]
    reach = [int((region.weights > 0).sum()) for region in regions]
    assert reach == sorted(reach, reverse=True)
    assert reach[-1] == 1


def test_paths_that_are_none_are_named():
    network = nn.Sequential(sampler(4, 0, up=2), nn.Conv2d(4, 4, 3, stride=2).double(), nn.ReLU(), sampler(4, 1, up=2))
    x = torch.randn(1, 4, 6, 6, dtype=torch.float64)
    for path, locations, message in (
        ("fpn.*", LOCATIONS, r"did not call a sampler named fpn\.\* for this input: it called the samplers 0, 1, 3"),
        (["0", "3"], LOCATIONS, r"the output of 0 is 12x12 and the input of 3, which runs next, is 5x5"),
        ("0", [(0.2, 1.0)], r"less than 1, got \(0.2, 1.0\)"),
    ):
        with pytest.raises(ValueError, match=message):
            trace_regions(network, [x], path, locations)
    with pytest.raises(ValueError, match="must see one map of the whole image, got 2"):
        trace_regions(network, [x.expand(2, -1, -1, -1)], "0", LOCATIONS)
    with pytest.raises(ValueError, match="it called the samplers none"):
        trace_regions(nn.Conv2d(4, 4, 1).double(), [x], "*", LOCATIONS)


# the sources of pixel (3, 2) of the output of each sampler, with their weights
OTHERS = {
    "nearest": (nn.Upsample(scale_factor=2), {(1, 1): 1}),
    "bilinear": (nn.Upsample(scale_factor=2, mode="bilinear"), {(1, 0): 3 / 16, (1, 1): 9 / 16, (2, 0): 1 / 16, (2, 1): 3 / 16}),
    "average": (nn.AvgPool2d(2), dict.fromkeys([(6, 4), (6, 5), (7, 4), (7, 5)], 1 / 4)),
    # the values of the input grow to the lower right
    "maximum": (nn.MaxPool2d(2), {(7, 5): 1}),
    "strided": (nn.Conv2d(4, 4, 1, stride=2), {(6, 4): 1}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_samplers_have_the_weights_of_their_definition(name):
    module, sources = OTHERS[name]
    x = torch.arange(64.0).view(1, 1, 8, 8).expand(1, 4, -1, -1)
    size = module(x).shape[2]
    for path in ("0", "*"):
        (region, output) = trace_regions(nn.Sequential(module, nn.ReLU()), [x], path, [(3.5 / size, 2.5 / size)])
        found = {(i, j): region.weights[0, i, j].item() for i, j in region.weights[0].nonzero().tolist()}
        assert found == pytest.approx(sources)
        assert output.weights.sum() == 1


def test_weights_of_a_strided_convolution_do_not_cancel():
    module = nn.Conv2d(1, 2, 3, stride=2, padding=1, bias=False)
    module.weight.data[0], module.weight.data[1] = 1, -1
    (region, _) = trace_regions(nn.Sequential(module), [torch.rand(1, 1, 6, 6)], "0", [(0.5, 0.5)])
    torch.testing.assert_close(region.weights[0, 1:4, 1:4], torch.full((3, 3), 1 / 9))


def test_empty_slots_of_a_pyramid_are_traced_like_those_with_a_sampler():
    levels = {str(i): torch.rand(1, 4, side, side) for i, side in enumerate((17, 9, 5))}
    names = {}
    for path, slot in (("interpolate_*", None), ("upsample.*", lambda channels: CARAFE(channels, up=2, compressed_channels=4))):
        regions = trace_regions(FPN([4, 4, 4], 4, upsample=slot).eval(), [levels], path, [(0.5, 0.5)])
        names[path] = [region.module for region in regions]
        assert [tuple(region.weights.shape[1:]) for region in regions] == [(5, 5), (9, 9), (17, 17)]
        spread = [int((region.weights > 0).sum()) for region in regions]
        assert spread == [1, 1, 1] if slot is None else spread[0] >= spread[1] > spread[2] == 1
    assert names == {"interpolate_*": ["interpolate_0", "interpolate_1", ""], "upsample.*": ["upsample.1", "upsample.0", ""]}


def test_picture_shows_the_weights_where_the_picture_is():
    """The upper left of a padded map; one source, in the picture's second quarter from the left."""
    network = nn.Sequential(CARAFE(3, up=2, kernel_size=1, compressed_channels=None))
    picture = torch.zeros(3, 320, 320)
    view = View(network, (torch.rand(1, 3, 8, 16),), picture, covered=(0.5, 0.25))
    drawn = draw_regions(view, "0", [(0.1, 0.4)])
    # the source has nine tenths of its colour over the black picture
    source = (drawn - OPACITY * torch.tensor(SOURCE)[:, None, None] / 255).abs().amax(0) < 0.01
    rows, columns = source.any(1).nonzero().flatten(), source.any(0).nonzero().flatten()
    assert (rows.max() - rows.min(), columns.max() - columns.min()) == (79, 79)
    ring = (drawn - torch.tensor(TARGET)[:, None, None] / 255).abs().amax(0) < 0.01
    ys, xs = (found.float().mean() for found in ring[:, : columns.max() + 40].nonzero().T)
    # a tenth down and two fifths across a picture whose second quarter is the source
    assert (ys - rows.min(), xs - columns.min()) == (pytest.approx(32, abs=1.5), pytest.approx(128 - 80, abs=1.5))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of short trainings, by name."""
    folder = tmp_path_factory.mktemp("regions")
    short = ["scale=small", "data.epochs=1", "data.batch_size=8", "trainer.enable_progress_bar=false"]
    lengths = ["data.train.length=8", "data.val.length=4"]
    told = {
        "upernet": [*lengths, "samplers=carafe"],
        "published": [*lengths, "samplers=published"],
        "detector": [*lengths, "task=detection", "model=faster_rcnn", "upsampler=carafe"],
        "inpainting": ["experiment=table10", "row=table10/global_local_carafe", "data.train.images.length=8", "data.val.images.length=4"],
    }
    return {name: train_in(folder / name, *short, *overrides) for name, overrides in told.items()}


@pytest.fixture
def photograph(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (75, 118, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photograph.png")
    Image.fromarray(((pixels[..., 0] * 0 + np.arange(118)) > 90).astype(np.uint8) * 255).save(tmp_path / "mask.png")
    return tmp_path / "photograph.png"


@pytest.mark.parametrize(
    ("name", "path", "maps"),
    [
        ("upernet", "fpn_up.*", 3),
        ("upernet", "fuse_up.*", 3),
        ("upernet", "[backbone.maxpool,*.shortcut_sampler]", 4),
        ("detector", "fpn.upsample.*", 3),
        ("inpainting", "[stages.12.0,stages.14.0]", 2),
    ],
)
def test_predict_draws_regions(runs, photograph, tmp_path, name, path, maps):
    mask = [f"masks={tmp_path}/mask.png"] if name == "inpainting" else []
    call(
        "predict",
        f"hydra.run.dir={tmp_path / 'out'}",
        f"checkpoint={runs[name]}/last.ckpt",
        f"images={photograph}",
        f"regions={path}",
        *mask,
    )
    figure = np.asarray(Image.open(tmp_path / "out" / "photograph.png.png"))
    # the picture, one map for each module and the output side by side; one row for each of four locations
    width, height = 118 * 3, 75 * 3
    assert figure.shape[1] >= (maps + 2) * width
    assert figure.shape[0] >= 4 * height
    rings = (figure == TARGET).all(2)
    assert len(np.unique(rings.any(0).nonzero()[0] // width)) >= maps + 2


@pytest.mark.parametrize(
    ("checkpoints", "names"),
    [
        (["runs/a/best.ckpt", "runs/b/best.ckpt"], ["a", "b"]),
        (["runs/a/best.ckpt", "runs/a/last.ckpt"], ["a_best", "a_last"]),
        (["runs/a/1/best.ckpt", "runs/b/1/best.ckpt"], ["a_1", "b_1"]),
        (["a.ckpt", "b.ckpt"], ["here_a", "here_b"]),
        (["x/a.ckpt"], ["x"]),
        (["/x/a.ckpt", "/x_x/a.ckpt", "/x/x/a.ckpt"], ["1", "2", "3"]),
    ],
)
def test_predictions_of_several_networks_have_the_names_of_their_runs(checkpoints, names, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert name_folders(checkpoints) == names


def test_predict_sets_networks_side_by_side(runs, photograph, tmp_path):
    both = f"checkpoint=[{runs['published']}/last.ckpt,{runs['upernet']}/last.ckpt]"
    call("predict", f"hydra.run.dir={tmp_path / 'out'}", both, f"images={photograph}")
    figure = Image.open(tmp_path / "out" / "photograph.png.png")
    assert figure.width >= 3 * 320
    pixels, image = np.asarray(figure), np.asarray(Image.open(photograph)).repeat(3, 0).repeat(3, 1)
    places = ((y, x) for y in range(200) for x in range(60) if (pixels[y, x : x + 354] == image[0]).all())
    top, left = next(places)
    assert (pixels[top : top + 225, left : left + 354] == image).all(), "the first is the photograph, under its title"
    assert (pixels[:top] < 100).any(), "there are titles"
    # two checkpoints of one run are two networks
    call(
        "predict",
        f"hydra.run.dir={tmp_path / 'twice'}",
        *(f"checkpoint=[{runs['upernet']}/last.ckpt,{runs['upernet']}/best.ckpt]", f"images={photograph}"),
    )
    assert Image.open(tmp_path / "twice" / "photograph.png.png").width == figure.width
    name = Path(runs["upernet"]).name
    assert {path.parent.parent.name for path in tmp_path.glob("twice/*/labels/photograph.png")} == {f"{name}_last", f"{name}_best"}
    with pytest.raises(ValueError, match=r"checkpoint= must name each file once, got .*last.ckpt 2 times"):
        call("predict", "checkpoint=[{0},{0}]".format(f"{runs['upernet']}/last.ckpt"), f"images={photograph}")
    with pytest.raises(ValueError, match="takes a mask for every image: give masks="):
        call(
            "predict",
            f"hydra.run.dir={tmp_path / 'out'}",
            f"checkpoint=[{runs['upernet']}/last.ckpt,{runs['inpainting']}/last.ckpt]",
            f"images={photograph}",
        )
    with pytest.raises(ValueError, match=r"did not call a sampler named fuse_up\.\* for this input: it called the samplers backbone\."):
        call(
            "predict",
            f"hydra.run.dir={tmp_path / 'out'}",
            f"checkpoint={runs['published']}/last.ckpt",
            f"images={photograph}",
            "regions=fuse_up.*",
        )
