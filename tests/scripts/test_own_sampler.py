"""Your own sampler, as docs/own_sampler.md prints it: the file, the commands, and the row of a table."""

import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from carafepp.models.fpn import FPN
from carafepp.scripts import train as train_command
from carafepp.scripts.common.own_code import search_working_folder
from carafepp.scripts.running import train as training
from carafepp.tasks.scenes import Scenes
from commands import call, run_command
from omegaconf import OmegaConf
from pages import read_blocks, read_commands
from torchvision.utils import save_image
from training import SCENES, read_result

PAGE = "own_sampler.md"
# small sizes in the place of those of the small scale
SMALL = [*SCENES, "data.train.length=8", "data.epochs=1"]
SIZES = {"upernet": [*SMALL, "model.fpn_dim=8", "model.ppm_dim=4"], "detector": [*SMALL, "data.train.size=64", "model.head_dim=8"]}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder with the files of the page, in which jobs of a sweep train in this process."""
    monkeypatch.chdir(tmp_path)
    # the working folder is appended, and must not stay
    monkeypatch.setattr(sys, "path", [*sys.path])
    python, (yaml,) = read_blocks(PAGE, "python"), read_blocks(PAGE, "yaml")
    Path("my_module.py").write_text("\n\n".join(python))
    Path("conf/upsampler").mkdir(parents=True)
    Path("conf/upsampler/mine.yaml").write_text(yaml)
    monkeypatch.setattr(
        train_command, "train_in_subprocess", lambda folder, trust: training.train(train_command.read_config(folder, trust), folder)
    )
    yield tmp_path
    sys.modules.pop("my_module", None)


def run_as_printed(command: list[str], *more: str) -> None:
    """Run a command of the page with small sizes, and other values in the place of those in capitals."""
    name, *arguments = command
    call(name, *[argument.replace("seed=0,1,2", "seed=0").replace("PHOTOGRAPHS", "photographs") for argument in arguments], *more)


def test_the_guided_sampler_of_the_page_trains_in_a_pyramid_and_in_a_mask_head(folder):
    sys.path.append(str(folder))
    guided = import_module("my_module").Guided
    pyramid = FPN([4, 8], 8, upsample=guided)
    levels = {"0": torch.rand(1, 4, 9, 12), "1": torch.rand(1, 8, 5, 6)}
    sum(level.sum() for level in pyramid(levels).values()).backward()
    assert all(parameter.grad is not None for parameter in pyramid.parameters())
    assert guided(8)(torch.rand(1, 8, 14, 14)).shape == (1, 8, 28, 28)


def test_one_file_and_one_command(folder):
    printed = [command for command in read_commands(PAGE) if command[0] == "train" and "-m" not in command]
    arguments = [argument for argument in printed[0][1:] if argument != "scale=small"]
    done = run_command("train", *SIZES["upernet"], *arguments, "hydra.run.dir=runs/FOLDER", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "carafepp-predict checkpoint=runs/FOLDER/best.ckpt images=PHOTOGRAPHS trust=my_module.Sampler\n" in done.stdout
    weights = torch.load("runs/FOLDER/last.ckpt", weights_only=True)["state_dict"]
    own = {name.split(".")[1] for name, tensor in weights.items() if name.endswith(".up.weight") and tensor.shape[1] == 1}
    assert own == {"ppm_up", "fpn_up", "fuse_up"}, "not in every slot"
    Path("photographs").mkdir()
    save_image(Scenes("val", length=1, size=48, view="segmentation")[0][0], "photographs/a.png")
    later = [command for command in read_commands(PAGE) if "trust=my_module" in command]
    assert [command[0] for command in later] == ["eval", "predict", "train"]
    for command in later:
        run_as_printed(command, *(["trainer.enable_progress_bar=false"] if command[0] == "eval" else []))
    assert len(list(folder.glob("runs/predict-*/a.png.png"))) == 1
    assert read_result(folder / "runs" / "FOLDER")["steps"] == 2 * 20


@pytest.mark.parametrize(("argument", "slots"), [("model.fpn._target_=my_module.Sampler", ["fpn"]), ("+upsampler.kernel_size=2", [])])
def test_options_and_single_slots(folder, argument, slots, monkeypatch):
    assert argument in (Path(__file__).parents[2] / "docs" / PAGE).read_text()
    configs = []
    monkeypatch.setattr(training, "train", lambda cfg, folder: configs.append(cfg) or (folder / "result.json").write_text("{}"))
    monkeypatch.setattr(train_command, "is_finished", lambda folder: (folder / "result.json").exists())
    call("train", *SIZES["upernet"], argument, *([] if slots else ["upsampler._target_=my_module.Sampler"]))
    (cfg,) = configs
    if slots:
        assert cfg.model.fpn == {"_target_": "my_module.Sampler", "_partial_": True}
        assert cfg.model.fuse.slot == {"_target_": "carafepp.models.samplers.published"}
    else:
        assert cfg.model.fpn.slot == {"_target_": "my_module.Sampler", "kernel_size": 2, "_partial_": True}


def test_a_name_of_its_own(folder):
    (command,) = [command for command in read_commands(PAGE) if "--config-dir" in command]
    run_as_printed(command, *SIZES["upernet"][1:])
    results = [read_result(path) for path in sorted(folder.glob("runs/*/[0-9]"))]
    assert [result["choices"]["upsampler"] for result in results] == ["bilinear", "carafe", "mine"]
    assert OmegaConf.load(next(folder.glob("runs/*/2/config.yaml"))).model.fpn.slot._partial_ is True


def test_a_row_of_a_table(folder, capsys):
    commands = [command for command in read_commands(PAGE) if "experiment=table4" in command or command[0] == "report"]
    assert [command[0] for command in commands] == ["train", "train", "report", "train"]
    for command in commands[:3]:
        run_as_printed(command, *(SIZES["detector"][1:] if command[0] == "train" else []))
    rows = [line.partition("  ")[0].partition(",")[0] for line in capsys.readouterr().out.splitlines()]
    assert rows.index("carafe") < rows.index("upsampler._target_=my_module.Sampler")
    before = {*folder.rglob("result.json")}
    run_as_printed(commands[3], *SIZES["detector"][1:])
    (trained,) = {*folder.rglob("result.json")} - before
    assert read_result(trained.parent)["choices"]["row"] is None


@pytest.mark.parametrize(
    ("names", "searched"),
    [
        ([], False),
        (["torch.nn.ReLU", "json", "pipe:", "lightning.pytorch.loggers.WandbLogger"], False),
        (["my_module.Sampler"], True),
        (["package.deep.Sampler"], True),
        (["my_module2.Sampler", "../my_module"], False),
    ],
)
def test_the_working_folder_is_searched_only_for_a_module_in_it_that_the_command_line_names(folder, names, searched):
    Path("package").mkdir()
    # a folder from elsewhere, whose files have the names of modules that are installed
    for name in ("json", "torch", "lightning"):
        Path(f"{name}.py").write_text("raise AssertionError('imported')")
    search_working_folder(names)
    assert (str(folder) in sys.path) == searched
