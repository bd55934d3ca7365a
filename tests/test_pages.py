"""Every command on a page of the documentation runs as printed, or says what it needs and composes; every snippet of Python runs.

A command is in one of these classes:

- It trains. It composes, and if it is on the small scale, its task is built; tests/tasks/test_runs.py and tests/scripts train on generated
  data. The page says with a word in capitals, such as COCO, which data it needs.
- It evaluates, predicts, reports, validates or generates scenes. It runs, with small files under the names that the page prints.
- It exports, measures, tunes or inspects, or it needs a GPU, a download or published weights. It composes; the tests of the command run it.
- A page of RUN_ELSEWHERE prints it, and another test runs the commands of this page.
- It is a command of make, pip, pytest or Python. Its target, extra or file exists.
"""

import ast
import json
import os
import re
import shutil
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import coco_files
import pytest
import torch
from carafepp.integrations.signatures import YoloCARAFE
from carafepp.models.carafe import CARAFE
from carafepp.scripts.common.arguments import name_empty_choices, parse_override
from commands import call, run_line
from configurations import CONF, choices, compose_config
from hydra.core.override_parser.types import Glob
from hydra.utils import instantiate
from omegaconf import OmegaConf
from pages import DOCS, ROOT, Command, find_blocks, list_pages, list_printed_commands
from PIL import Image
from torch import nn
from training import SCENES, TASKS, configure_run, train_in

# pages whose commands another test runs in order, except those that download weights
RUN_ELSEWHERE = {
    "docs/own_classification.md": "tests/scripts/test_own_data.py",
    "docs/own_detection.md": "tests/scripts/test_own_data.py",
    "docs/own_inpainting.md": "tests/scripts/test_own_data.py",
    "docs/own_sampler.md": "tests/scripts/test_own_sampler.py",
    "docs/own_segmentation.md": "tests/scripts/test_own_data.py",
}
# scripts of the shell, by their first word
SCRIPTS = {"torch=$(python": "tests/scripts/test_export.py", "g++": "tests/scripts/test_export.py", "./run": "tests/scripts/test_export.py"}
# words of the table "Words in capitals" that stand for data sets
DATA = {"COCO", "ADE20K", "IMAGENET", "PLACES365", "CITYSCAPES", "FOLDER", "FILE"}
TASK_OF_PAGE = {"docs/detection.md": "detection", "docs/data.md": "detection", "docs/figures.md": "detection"}
QUIET = "trainer.enable_progress_bar=false"


def is_run_elsewhere(command: Command) -> bool:
    return command.page in RUN_ELSEWHERE and not any("_Weights" in word for word in command.words)


# those that several pages print once for each task
COMMANDS = list({(c.words, TASK_OF_PAGE.get(c.page)): c for c in list_printed_commands() if not is_run_elsewhere(c)}.values())


def write_checkpoint(path: Path, *overrides: str) -> None:
    """Write a checkpoint of random weights."""
    cfg = configure_run(*overrides)
    torch.save({"config": OmegaConf.to_container(cfg), "state_dict": instantiate(cfg.task).state_dict()}, path)


def write_photographs(*places: Path) -> None:
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.linear_gradient("L").resize((40, 32)).convert("RGB").save(place, "PNG")


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    """A folder for each kind of command, with small files under the names that the pages print."""
    root = tmp_path_factory.mktemp("pages")
    found = {name: root / name for name in ("segmentation", "detection", "inpainting", "runs", "empty", "coco", "export")}
    for name, place in found.items():
        place.mkdir()
        if name in ("detection", "coco"):
            coco_files.write(place / "COCO")
    with pytest.MonkeyPatch.context() as patch:
        (found["runs"] / "runs").mkdir()
        small = ["model.fpn_dim=8", "model.ppm_dim=4", "data.train.length=4", "data.epochs=1", "checkpoint_every_n_steps=100"]
        patch.chdir(found["runs"])
        train_in(Path("runs") / "FOLDER", *SCENES, *small)
        os.symlink("runs", "FOLDER")
        os.symlink("COCO", found["coco"] / "FOLDER")
        patch.chdir(found["detection"])
        listed = json.loads(Path("COCO/annotations/instances_val2017.json").read_text())
        Path("COCO/annotations/image_info_test-dev2017.json").write_text(json.dumps({**listed, "annotations": []}))
        os.symlink("val2017", "COCO/test2017")
        names = f"class_names=[{','.join(coco_files.NAMES)}]"
        sizes = ["backbone=tiny", "model.fpn_dim=8", "model.head_dim=8", "model.min_size=64", "model.max_size=64", "samplers=carafe"]
        more = ["model.frozen_norm=false", "model.trainable_layers=5", "data.workers=0", "data.val_batch_size=4"]
        checkpoints = {
            "detection": ["task=detection", f"data.root={found['detection']}/COCO", names, *sizes, *more],
            "inpainting": TASKS["inpainting"],
            "segmentation": TASKS["segmentation"],
        }
        for task, overrides in checkpoints.items():
            patch.chdir(found[task])
            Path("runs/FOLDER").mkdir(parents=True)
            write_checkpoint(Path("runs/FOLDER/best.ckpt"), *overrides)
            for copy in ("runs/RUN", "runs/A", "runs/B"):
                shutil.copytree("runs/FOLDER", copy)
            for copy in ("A.ckpt", "B.ckpt", "BASELINE", "CARAFE"):
                shutil.copy("runs/FOLDER/best.ckpt", copy)
            write_photographs(*map(Path, ("PHOTOGRAPHS/a.png", "FOLDER/a.png", "PHOTOGRAPH", "PHOTOGRAPH.jpg")))
            Path("MASKS").mkdir()
            for mask in ("MASKS/a.png", "MASK", "MASK.png"):
                Image.new("L", (40, 32), 255).save(mask, "PNG")
    return found


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_printed_command(command, places, monkeypatch, capsys):
    # a page prints what a shell gives the command
    program = command.words[0]
    script = next((test for start, test in SCRIPTS.items() if program.startswith(start)), None)
    if script is not None:
        assert "run_line" in (ROOT / script).read_text()
        return
    assert program in CHECKS, f"{command} is in none of the classes of this test"
    CHECKS[program](command, places, monkeypatch)


def check_train(command: Command, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [name_empty_choices(argument) for argument in command.words[1:]]
    if arguments[:1] == ["paper"]:
        monkeypatch.chdir(places["empty"])
        call("train", *arguments, "plan=true")
        return
    if "--help" in arguments:
        call("train", *arguments)
        return
    if any(argument.startswith("resume=") for argument in arguments):
        monkeypatch.chdir(places["runs"])
        call("train", *arguments)
        return
    small = "scale=small" in arguments
    assert small or DATA & find_capitals(command) or "digits" in " ".join(arguments), "it needs data, and no word in capitals says so"
    check_gpu(command)
    for overrides in expand(arguments):
        cfg = compose_config("train", *overrides)
        OmegaConf.set_struct(cfg, False)
        del cfg.resume, cfg.trust
        OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
        # own_sampler.md shows this module, and its test trains with it
        if small and "my_module" not in str(command) and not cfg.weights_root:
            with torch.device("meta"):
                instantiate(cfg.task)


def expand(arguments: list[str]) -> Iterator[list[str]]:
    """Yield the overrides of some jobs of a sweep: every value of each argument occurs once, and only the first seed."""
    parsed = [parse_override(argument) for argument in arguments if argument != "-m"]
    assert None not in parsed, f"Hydra cannot read one of {arguments}"
    assert "-m" in arguments or not any(override.is_sweep_override() for override in parsed)
    values = []
    for override in parsed:
        swept = []
        if isinstance(override.value(), Glob):
            swept = choices(override.key_or_group)
        elif override.is_sweep_override():
            swept = list(override.sweep_string_iterator())
        told = [f"{override.get_key_element()}={value}" for value in swept] or [override.input_line]
        values.append(told[:1] if override.key_or_group == "seed" else told)
    first = [told[0] for told in values]
    yield first
    for position, told in enumerate(values):
        for choice in told[1:]:
            yield [*first[:position], choice, *first[position + 1 :]]


def find_capitals(command: Command) -> set[str]:
    """Find the words in capitals that stand for something of the reader."""
    return set(re.findall(r"(?<![\w.:])[A-Z][A-Z0-9]{3,}(?![\w:(])", " ".join(command.words[1:]).replace("IMAGENET1K", "")))


def check_gpu(command: Command) -> None:
    """Check that a command that needs a GPU or a download says so."""
    if "device=cuda" in command.words or command.words[0] == "carafepp-tune":
        assert "GPU" in command.comment, f"{command} needs a GPU, and no comment says so"
    if any("_Weights" in word or word.startswith("published=") for word in command.words):
        assert "needs" in command.comment, f"{command} needs files from elsewhere, and no comment says so"


def run_on_checkpoint(command: Command, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluate or predict with a checkpoint of the task of the page."""
    check_gpu(command)
    name, arguments = command.words[0].removeprefix("carafepp-"), command.words[1:]
    if any(argument.startswith("published=") for argument in arguments):
        compose_config(name, *arguments)
        return
    task = "inpainting" if any(argument.startswith("masks=") for argument in arguments) else TASK_OF_PAGE.get(command.page, "segmentation")
    monkeypatch.chdir(places[task])
    call(name, *arguments, *([QUIET] if name == "eval" else []))


def run_report(command: Command, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    if "runs=docs/results" in command.words:
        # tests/scripts/test_report.py compares these tables with the page
        compose_config("report", *command.words[1:])
        return
    monkeypatch.chdir(places["runs"])
    call("report", *command.words[1:])


def run_scenes(command: Command, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(places["empty"])
    (out,) = [argument for argument in command.words if argument.startswith("out=")]
    call("scenes", *command.words[1:], f"{out}/{abs(hash(command))}", "train=2", "val=2", "size=48")


def run_validate(command: Command, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(places["coco"])
    call("validate", *command.words[1:])


def compose_only(command: Command, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    check_gpu(command)
    program, *arguments = command.words
    config = program.removeprefix("carafepp-")
    # carafepp-bench models, for instance
    if arguments and arguments[0].isalpha():
        own = f"{config}_{arguments.pop(0)}"
        config = own if (CONF / f"{own}.yaml").exists() else config
    for overrides in expand(arguments):
        compose_config(config, *overrides)


def check_make(command: Command, *_: object) -> None:
    assert re.search(rf"^{command.words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def check_pip(command: Command, *_: object) -> None:
    assert command.words[1] == "install"
    (wanted,) = [word for word in command.words[2:] if word != "-e"]
    # nothing of this package is in a registry
    assert wanted.startswith(".")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"\w+", wanted)) <= extras.keys()


def check_files(command: Command, *_: object) -> None:
    """Check that the script, or the folder of tests, exists."""
    assert (ROOT / command.words[1]).exists()


def sort_images(command: Command, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the script that sorts the validation images of ImageNet."""
    monkeypatch.chdir(places["empty"])
    Path("LOC_val_solution.csv").write_text("ImageId,PredictionString\na,n01 1 2 3 4\nb,n02 1 2 3 4 n02 5 6 7 8\n")
    write_photographs(Path("val/a.JPEG"), Path("val/b.JPEG"))
    ((_, script),) = [block for block in find_blocks((ROOT / command.page).read_text()) if block[1].startswith("tail ")]
    assert run_line(["bash", "-ec", script]).returncode == 0
    assert sorted(map(str, Path("val").rglob("*.JPEG"))) == ["val/n01/a.JPEG", "val/n02/b.JPEG"]


CHECKS = {
    "carafepp-train": check_train,
    "carafepp-eval": run_on_checkpoint,
    "carafepp-predict": run_on_checkpoint,
    "carafepp-report": run_report,
    "carafepp-scenes": run_scenes,
    "carafepp-validate": run_validate,
    **dict.fromkeys(["carafepp-export", "carafepp-bench", "carafepp-tune", "carafepp-inspect"], compose_only),
    "make": check_make,
    "pip": check_pip,
    **dict.fromkeys(["python", ".venv/bin/python", ".venv/bin/pytest", "pytest"], check_files),
    "tail": sort_images,
}


# tests that run the snippets of other pages
SNIPPETS_ELSEWHERE = {
    **RUN_ELSEWHERE,
    "docs/export.md": "tests/scripts/test_export.py",
    "docs/recipes.md": "tests/recipes/test_recipes.py",
}


def list_snippets() -> dict[str, list[str]]:
    """Return the Python code of each page that has any, except those of other tests."""
    pages = {str(page.relative_to(ROOT)): find_blocks(page.read_text()) for page in list_pages()}
    # a test of the group gpu runs what needs one
    found = {page: [code for language, code in blocks if language == "python" and "cuda" not in code] for page, blocks in pages.items()}
    return {page: blocks for page, blocks in found.items() if blocks and page not in SNIPPETS_ELSEWHERE}


@pytest.mark.parametrize(("page", "blocks"), list_snippets().items(), ids=list_snippets())
def test_snippets_of_a_page_run_one_after_the_other(page, blocks, tmp_path, monkeypatch):
    """A comment such as [1, 64, 50, 86] behind a statement is the shape of its value."""
    monkeypatch.chdir(tmp_path)
    # what a page takes from the sentences before
    network = nn.Sequential(YoloCARAFE(8))
    torch.save(network.state_dict(), "yolo_carafe.pth")
    if "network.pt2" in "".join(blocks):
        torch.export.save(torch.export.export(CARAFE(4, up=2), (torch.rand(1, 4, 5, 6),)), "network.pt2")
    names: dict[str, Any] = {"__name__": "page", "torch": torch, "CARAFE": CARAFE, "network": network}
    names["module"] = CARAFE(8, up=2, compressor_norm=True).eval()
    # nothing is downloaded
    code = "".join(blocks).replace('fpn(weights="DEFAULT")', "fpn(weights_backbone=None)").replace('weights="DEFAULT"', "")
    lines = code.splitlines()
    for statement in ast.parse(code).body:
        exec(compile(ast.Module([statement], []), page, "exec"), names)
        shape = re.search(r"  # (\[[\d, ]+\])", lines[statement.end_lineno - 1])
        if shape and isinstance(statement, ast.Expr):
            value = eval(compile(ast.Expression(statement.value), page, "eval"), names)
        elif shape and isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            value = names[statement.targets[0].id]
        else:
            continue
        assert [*value.shape] == json.loads(shape[1]), lines[statement.end_lineno - 1]


def test_words_in_capitals_are_explained():
    table = (DOCS / "commands.md").read_text().split("## Words in capitals\n")[1].split("\n## ")[0]
    explained = {word for line in table.splitlines() if line.startswith("| `") for word in re.findall(r"`(\w+)`", line.split("|")[1])}
    assert explained >= DATA
    commands = [command for command in list_printed_commands() if command.words[0].startswith("carafepp-")]
    unknown = {f"{command.page}: {word}" for command in commands for word in find_capitals(command) - explained}
    assert not unknown


def test_diagrams_are_those_of_their_script(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    diagrams = import_module("diagrams")
    for name, draw in (("carafe", diagrams.draw_carafe), ("slots", diagrams.draw_slots)):
        draw().write(tmp_path / f"{name}.svg")
        assert (tmp_path / f"{name}.svg").read_text() == (DOCS / f"{name}.svg").read_text()
