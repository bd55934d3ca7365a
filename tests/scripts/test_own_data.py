"""Your own data, as the pages docs/own_*.md print it: from a folder in each layout to scores, pictures and files for other programs."""

import json
import shutil
from pathlib import Path

import coco_files
import pytest
from carafepp.scripts.common.own_data import fill, make_paths_absolute
from carafepp.tasks.own_data import describe_coco
from commands import call
from omegaconf import OmegaConf
from pages import read_blocks, read_commands
from training import ON_CPU, read_result

# small sizes in the place of those of the settings
DETECTOR = ["model.min_size=64", "model.max_size=64", "model.fpn_dim=8", "model.head_dim=8", "model.mask_dim=8", "data.batch_size=2"]


def run_page(page: str, sizes: dict[str, list[str]]) -> None:
    """Run the commands of a page, except those that download weights, with further arguments by the name of the command."""
    for name, *arguments in read_commands(page):
        if not any("_Weights" in argument for argument in arguments):
            more = [each for each in sizes.get(name, []) if not each.startswith("model.mask") or "model=mask_rcnn" in arguments]
            call(name, *arguments, *more)


def test_detection_from_a_folder_to_a_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train = [*DETECTOR, *ON_CPU, "data.epochs=1", "model.box_detections_per_img=3"]
    # arguments that are given twice: the last one counts
    run_page("own_detection.md", {"scenes": ["train=4", "val=2", "size=64"], "train": train, "eval": ["trainer.enable_progress_bar=false"]})
    result = read_result(tmp_path / "runs" / "carafe")
    assert result["steps"] == 2
    assert "val/mask_AP" in result["metrics"]
    config = OmegaConf.load(tmp_path / "runs" / "mine" / "config.yaml")
    assert config.class_names == [str(digit) for digit in range(10)]
    assert "own_data" not in config
    assert sorted(path.name for path in (tmp_path / "predictions").glob("*.png")) == [f"{i:012d}.jpg.png" for i in (1, 2)]
    capsys.readouterr()
    (code,) = read_blocks("own_detection.md", "python")
    exec(code, {})
    assert all(line.startswith("00000000000") for line in capsys.readouterr().out.splitlines())
    # from another folder, after a run from a relative path
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    call("eval", f"checkpoint={tmp_path}/runs/mine/best.ckpt", "trainer.enable_progress_bar=false")


LAYOUTS = {
    "flat": {"train.json": "train.json", "val.json": "val.json", "train": "train", "val": "val"},
    "annotations/NAME": {
        "train.json": "annotations/train.json",
        "val.json": "annotations/val.json",
        "train": "images/train",
        "val": "images/val",
    },
    "one folder": {
        "train.json": "annotations/instances_train.json",
        "val.json": "annotations/instances_val.json",
        "train": "images",
        "val": "images",
    },
    "roboflow": {
        **{"train": "train", "val": "valid"},
        **{"train.json": "train/_annotations.coco.json", "val.json": "valid/_annotations.coco.json"},
    },
    "coco": {
        **{"train": "train2017", "val": "val2017"},
        **{f"{part}.json": f"annotations/instances_{part}2017.json" for part in ("train", "val")},
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_coco_is_found(tmp_path, layout):
    made, root = coco_files.write(tmp_path / "made"), tmp_path / "root"
    for part in ("train", "val"):
        images, annotations = root / LAYOUTS[layout][part], root / LAYOUTS[layout][f"{part}.json"]
        shutil.copytree(made / f"{part}2017", images, dirs_exist_ok=True)
        annotations.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(made / "annotations" / f"instances_{part}2017.json", annotations)
    found = describe_coco(root)
    assert found["class_names"] == coco_files.NAMES
    for part in ("train", "val"):
        assert Path(found["data"][part]["annotations"]) == root / LAYOUTS[layout][f"{part}.json"]
        assert Path(found["data"][part]["images"]) == root / LAYOUTS[layout][part]


def test_a_folder_without_a_part_is_answered_with_the_layouts(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data.root=nowhere is not a folder"):
        describe_coco("nowhere")
    (tmp_path / "labels.json").write_text(json.dumps(coco_files.content()))
    with pytest.raises(FileNotFoundError, match=r"no annotations of the train part; it should hold train.json.*folder: labels.json"):
        describe_coco(tmp_path)
    (tmp_path / "labels.json").rename(tmp_path / "train.json")
    with pytest.raises(FileNotFoundError, match=r"000000000139.jpg, is in none of the folders \., train, "):
        describe_coco(tmp_path)


def test_what_is_given_is_kept():
    cfg = OmegaConf.create({"class_names": ["a"], "data": {"train": {"images": None, "annotations": "mine.json"}}})
    fill(cfg, {"class_names": ["x", "y"], "data": {"train": {"images": "found", "annotations": "found.json"}}})
    assert cfg == {"class_names": ["a"], "data": {"train": {"images": "found", "annotations": "mine.json"}}}


def test_paths_that_exist_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    cfg = OmegaConf.create(
        {"data": {"root": "folder", "parts": [{"images": "folder"}], "split": "folder", "annotations": "missing"}, "root": None}
    )
    make_paths_absolute(cfg)
    absolute = str(tmp_path / "folder")
    assert cfg == {"data": {"root": absolute, "parts": [{"images": absolute}], "split": "folder", "annotations": "missing"}, "root": None}
