"""The configuration composes and instantiates, and the error for a misspelt override lists the valid keys."""

import pytest
import torch
from carafepp.models.carafe import CARAFE
from carafepp.models.samplers import Bilinear
from carafepp.scripts.common.hints import find_hints
from commands import call, run_command
from configurations import choices, compose_config
from hydra.utils import instantiate


@pytest.mark.parametrize("backbone", choices("backbone"))
@pytest.mark.parametrize("samplers", choices("samplers"))
def test_every_network_instantiates(backbone, samplers):
    with torch.device("meta"):
        task = instantiate(compose_config("train", "scale=small", f"backbone={backbone}", f"samplers={samplers}").task)
        assert task.model(torch.rand(1, 3, 65, 33)).shape == (1, 11, 17, 9)


def test_one_slot_can_differ_from_the_others():
    model = instantiate(
        compose_config("train", "scale=small", "upsampler=carafe", "upsampler.kernel_size=7", "upsampler@model.fpn=bilinear").model
    )
    assert model.keywords["fpn"].func is Bilinear
    assert model.keywords["ppm"].keywords["kernel_size"] == model.keywords["fuse"].keywords["kernel_size"] == 7
    model = instantiate(compose_config("train", "scale=small", "upsampler@model.fpn=carafe").model)
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
    with pytest.raises(
        SystemExit, match=f"upsampler=carfe does not exist; did you mean 'carafe'.*\n  choices: {', '.join(choices('upsampler'))}$"
    ):
        call("train", "upsampler=carfe", raises=False)


def test_help_shows_the_choices():
    done = run_command("train", "--help")
    assert done.returncode == 0, done.stderr
    for group in ("upsampler", "downsampler", "backbone", "scale", "setting"):
        assert f"{group}: {', '.join(choices(group))}" in done.stdout
