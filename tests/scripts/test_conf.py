"""The configuration composes and instantiates, and the error for a misspelt override lists the valid keys."""

import pytest
import torch
from carafepp.models.carafe import CARAFE
from carafepp.models.samplers import Bilinear
from carafepp.scripts.common.comments import list_groups, read_comments
from carafepp.scripts.common.hints import find_hints
from commands import call, run_code
from configurations import choices, compose_config
from hydra.utils import instantiate


@pytest.mark.parametrize("backbone", choices("backbone"))
@pytest.mark.parametrize("samplers", [name for name in choices("samplers") if name != "none"])
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


COMMANDS = ["train", "eval", "predict", "report", "report paper", "scenes", "validate", "inspect", "tune", "bench", "bench samplers"]
COMMANDS += ["bench models", "bench module", "bench growth", "export"]


def ask_for_help(capsys, command: str, *overrides: str) -> str:
    """Return what a command answers to --help, in one line."""
    name, *rest = command.split()
    call(name, *rest, *overrides, "--help")
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_a_command_does_and_what_its_keys_mean(command, capsys):
    text = ask_for_help(capsys, command)
    assert f"carafepp-{command}" in text[:200]
    assert "keys, their values and what they mean:" in text
    # no dump of a configuration
    assert "_target_" not in text
    assert "Powered by Hydra" not in text
    assert len(text) < 9000


@pytest.mark.parametrize("name", ["train", "bench", "bench_module"])
def test_every_group_that_help_shows_has_a_comment(name):
    comments = read_comments(name)
    assert [group for group in list_groups(name) if len(choices(group)) > 1 and f"defaults.{group}" not in comments] == []


def test_help_shows_the_choices_and_the_keys_with_their_comments(capsys):
    text = ask_for_help(capsys, "train")
    for group in ("upsampler", "downsampler", "backbone", "scale"):
        assert set(choices(group)) <= {*text.replace(",", "").split()}
    # the groups of other commands do not matter, and neither do 150 names of classes
    assert "op=" not in text
    assert "downsampler=published the sampler in every slot that halves features a2u_pool, avg_pool" in text
    assert "class_names=[wall,building,sky,...] (150 values)" in text
    assert "data.batch_size=16 two images on each of eight GPUs" in text
    assert "resume=... a run folder to continue" in text
    # the choices of the command line count
    text = ask_for_help(capsys, "train", "task=detection", "scale=small", "upsampler@model.fpn=carafe")
    assert "task.sides=[16,32]" in text or "task.sides=" in text
    assert "data.root=..." not in text


@pytest.mark.parametrize("name", ["train", "eval", "predict", "report", "scenes", "inspect", "tune", "bench", "export"])
def test_help_and_typos_are_answered_without_torch(name, tmp_path):
    code = f"""
import sys
from carafepp.scripts.{name} import main
for arguments in ["--help"], ["upsmpler=carafe"], ["scale=tiny"], ["data.root=x", "seed=y"]:
    try:
        main(arguments)
    except SystemExit as stop:
        print(stop.code)
print("LOADED", *({{"torch", "torchvision", "lightning", "matplotlib", "joblib", "submitit"}} & {{*sys.modules}}))
"""
    assert run_code(code, cwd=tmp_path).stdout.splitlines()[-1].split() == ["LOADED"]
    assert not list(tmp_path.iterdir())
