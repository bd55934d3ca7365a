"""The configuration composes and instantiates, and the error for a misspelt override lists the valid keys."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from carafepp.models.carafe import CARAFE
from carafepp.models.samplers import Bilinear
from carafepp.scripts.common.hints import find_hints
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

CONF = Path(__file__).parents[2] / "conf"


@pytest.fixture
def config():
    with initialize_config_module("carafepp.conf", version_base="1.3"):
        yield lambda *overrides, name="train": compose(name, overrides=list(overrides))


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.mark.parametrize("backbone", options("backbone"))
@pytest.mark.parametrize("samplers", options("samplers"))
def test_every_network_instantiates(config, backbone, samplers):
    with torch.device("meta"):
        task = instantiate(config("scale=small", f"backbone={backbone}", f"samplers={samplers}").task)
        assert task.model(torch.rand(1, 3, 65, 33)).shape == (1, 11, 17, 9)


def test_one_slot_can_differ_from_the_others(config):
    model = instantiate(config("scale=small", "upsampler=carafe", "upsampler.kernel_size=7", "upsampler@model.fpn=bilinear").model)
    assert model.keywords["fpn"].func is Bilinear
    assert model.keywords["ppm"].keywords["kernel_size"] == model.keywords["fuse"].keywords["kernel_size"] == 7
    model = instantiate(config("scale=small", "upsampler@model.fpn=carafe").model)
    assert model.keywords["fpn"].func is CARAFE
    assert model.keywords["ppm"] is model.keywords["fuse"] is None


@pytest.mark.parametrize(
    ("override", "answers"),
    [
        ("data.train.lenght=4", ["did you mean 'length'?", "size, split"]),
        ("upsampelr=carafe", ["did you mean 'upsampler'?", "groups (group=choice): backbone"]),
        ("task.optimiser.lr=1", ["did you mean 'optimizer'?"]),
        ("sead=1", ["did you mean 'seed'?"]),
    ],
)
def test_misspelt_key_is_answered_with_the_valid_ones(override, answers):
    text = "\n".join(find_hints("train", ["scale=small", "seed=1,2", override, "-m"]))
    for answer in answers:
        assert answer in text


def test_valid_overrides_give_no_hint():
    assert find_hints("train", ["scale=small", "seed=1", "upsampler=carafe,bilinear", "data.train.size=32", "-m"]) == []
    assert find_hints("train", ["data.root=FOLDER", "data.train.transforms.transforms.0.min_size=[40]"]) == []


def test_option_that_must_be_added_is_answered_with_how():
    assert "'task' has no keys; add it: +task.window=512" in "\n".join(find_hints("predict", ["task.window=512"]))


def test_misspelt_choice_is_answered_with_the_valid_ones():
    done = subprocess.run([sys.executable, "-P", "-m", "carafepp.scripts.train", "upsampler=carfe"], capture_output=True, text=True)
    assert done.returncode != 0
    assert "Available options in 'upsampler'" in done.stderr
    for option in options("upsampler"):
        assert option in done.stderr


def test_help_shows_the_choices():
    done = subprocess.run([sys.executable, "-P", "-m", "carafepp.scripts.train", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for group in ("upsampler", "downsampler", "backbone", "scale", "setting"):
        assert f"{group}: {', '.join(options(group))}" in done.stdout
