"""Your own data, as the pages docs/own_*.md print it: from a folder in each layout to scores, pictures and files for other programs."""

import json
import shutil
from pathlib import Path

import coco_files
import numpy as np
import pytest
from carafepp.scripts.common.own_data import fill, make_paths_absolute, read_own_data
from carafepp.tasks.coco import COCO
from carafepp.tasks.label_maps import LabelMapFolders
from carafepp.tasks.own_data import describe_class_folders, describe_coco, describe_label_maps
from carafepp.tasks.splits import take_share
from commands import call
from configurations import compose_config
from omegaconf import OmegaConf
from pages import read_blocks, read_commands
from PIL import Image
from training import ON_CPU, read_result

# small sizes in the place of those of the settings
DETECTOR = ["model.min_size=64", "model.max_size=64", "model.fpn_dim=8", "model.head_dim=8", "model.mask_dim=8", "data.batch_size=2"]

QUIET = ["trainer.enable_progress_bar=false"]


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
    run_page("own_detection.md", {"scenes": ["train=4", "val=2", "size=64"], "train": train, "eval": QUIET})
    result = read_result(tmp_path / "runs" / "carafe")
    assert result["steps"] == 2
    assert "val/mask_AP" in result["metrics"]
    config = OmegaConf.load(tmp_path / "runs" / "mine" / "config.yaml")
    assert config.class_names == [str(digit) for digit in range(10)]
    assert "own_data" not in config
    assert sorted(path.name for path in (tmp_path / "predictions").glob("*.jpg.png")) == [f"{i:012d}.jpg.png" for i in (1, 2)]
    assert all(line.startswith("00000000000") for line in run_code_of("own_detection.md", capsys))
    # from another folder, after a run from a relative path
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    call("eval", f"checkpoint={tmp_path}/runs/mine/best.ckpt", *QUIET)


def run_code_of(page: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Run the Python block of a page, and return the lines that it prints."""
    capsys.readouterr()
    (code,) = read_blocks(page, "python")
    exec(code, {})
    return capsys.readouterr().out.splitlines()


def test_segmentation_from_a_folder_to_a_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    crop = ["data.train.transforms.transforms.1.size=32", "data.train.transforms.transforms.0.min_size=[32]"]
    train = [*crop, "task.inference_resize.size=32", "decoder.dim=8", "decoder.ppm_dim=4", "data.batch_size=2", "data.epochs=1", *ON_CPU]
    run_page("own_segmentation.md", {"scenes": ["train=4", "val=2", "size=64"], "train": train, "eval": QUIET})
    assert read_result(tmp_path / "runs" / "carafe")["steps"] == 2
    config = OmegaConf.load(tmp_path / "runs" / "mine" / "config.yaml")
    assert config.class_names == ["background", *(str(digit) for digit in range(10))]
    lines = run_code_of("own_segmentation.md", capsys)
    assert len(lines) == len(list((tmp_path / "predictions").glob("*.jpg.png"))) == 2
    labels = np.asarray(Image.open(next((tmp_path / "predictions" / "labels").glob("*.png"))))
    assert labels.shape == (64, 64), "not at the size of the image"
    assert labels.max() <= 10


def test_classification_from_a_folder_to_a_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sizes = ["data.train.transforms.transforms.0.size=32", "single_crop.transforms.0.size=36", "single_crop.transforms.1.size=32"]
    train = [*sizes, "data.batch_size=8", "data.epochs=0.2", *ON_CPU]
    run_page("own_classification.md", {"scenes": ["train=100", "val=40", "size=40"], "train": train, "eval": QUIET})
    assert read_result(tmp_path / "runs" / "carafe")["steps"] == 2
    config = OmegaConf.load(tmp_path / "runs" / "mine" / "config.yaml")
    assert config.task.class_names == [str(digit) for digit in range(10)]
    assert len(run_code_of("own_classification.md", capsys)) == len(list((tmp_path / "FOLDER" / "val" / "3").iterdir()))


def test_inpainting_from_a_folder_to_a_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = read_blocks("own_inpainting.md", "python")
    exec(code, {})
    crops = [f"data.{part}.images.transforms.transforms.{i}.size=32" for part in ("train", "val") for i in (0, 1)]
    train = [*crops, "holes.width=[2,5]", "model.width=4", "task.discriminator.width=4", "data.epochs=1", *ON_CPU]
    run_page("own_inpainting.md", {"scenes": ["train=4", "val=2"], "train": train, "eval": QUIET, "predict": ["max_side=40"]})
    assert read_result(tmp_path / "runs" / "carafe")["steps"] == 1
    assert "carafepp-predict checkpoint=runs/mine/best.ckpt images=PHOTOGRAPHS masks=MASKS\n" in capsys.readouterr().out
    filled, photograph = (sorted((tmp_path / name).iterdir())[0] for name in ("predictions/filled", "FOLDER/val"))
    pixels, before = (np.asarray(Image.open(path), int) for path in (filled, photograph))
    hole = np.asarray(Image.open("mask.png")) > 0
    assert (pixels[~hole] == before[~hole]).all()
    assert (pixels[hole] != before[hole]).any()


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


def test_files_from_any_place_are_taken(tmp_path):
    made = coco_files.write(tmp_path / "made")
    (made / "annotations" / "instances_val2017.json").rename(tmp_path / "odd.json")
    (made / "val2017").rename(tmp_path / "photographs")
    with pytest.raises(FileNotFoundError, match=r"give data.val.images=FOLDER"):
        describe_coco(made, {"train": None, "val": str(tmp_path / "odd.json")})
    found = describe_coco(made, {"val": str(tmp_path / "odd.json")}, {"train": None, "val": str(tmp_path / "photographs")})
    assert found["class_names"] == coco_files.NAMES
    assert found["data"]["val"] == {"annotations": str(tmp_path / "odd.json"), "images": str(tmp_path / "photographs")}
    assert found["data"]["train"]["images"] == str(made / "train2017")


def test_a_folder_without_a_part_is_answered_with_the_layouts(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data.root=nowhere is not a folder"):
        describe_coco("nowhere")
    for name in ("cats.json", "dogs.json"):
        (tmp_path / name).write_text(json.dumps(coco_files.content()))
    with pytest.raises(
        FileNotFoundError, match=r"no annotations of the train part; it should hold train.json.*folder: cats.json, dogs.json"
    ):
        describe_coco(tmp_path)
    (tmp_path / "cats.json").rename(tmp_path / "train.json")
    with pytest.raises(FileNotFoundError, match=r"000000000139.jpg, is in none of the folders \., train, "):
        describe_coco(tmp_path)


SINGLE = {
    "result.json of Label Studio": ("result.json", "images"),
    "CVAT": ("annotations/instances_default.json", "images/default"),
    "roboflow without valid/": ("train/_annotations.coco.json", "train"),
    "train.json": ("train.json", "train"),
}


@pytest.mark.parametrize("layout", SINGLE)
def test_a_single_annotation_file_is_divided_and_a_warning_says_so(tmp_path, layout, caplog):
    made, root = coco_files.write(tmp_path / "made"), tmp_path / "root"
    annotations, images = (root / name for name in SINGLE[layout])
    shutil.copytree(made / "train2017", images)
    annotations.parent.mkdir(exist_ok=True)
    shutil.copy(made / "annotations" / "instances_train2017.json", annotations)
    found = describe_coco(root, val_share=0.5)
    assert f"{annotations} is the only annotation file" in caplog.text
    assert "own_data.val_share=0.5" in caplog.text
    assert found["data"]["train"] == {"annotations": str(annotations), "images": str(images), "share": [0, 0.5]}
    assert found["data"]["val"] == {"annotations": str(annotations), "images": str(images), "share": [0.5, 1]}
    parts = [COCO(class_names=coco_files.NAMES, **found["data"][part]) for part in ("train", "val")]
    ids = [{image["id"] for image in part.ground_truth()["images"]} for part in parts]
    assert [len(part) for part in parts] == [len(part) for part in ids] == [2, 2]
    assert ids[0] | ids[1] == {*coco_files.SIZES}
    for part, images_of_part in zip(parts, ids, strict=True):
        assert {annotation["image_id"] for annotation in part.ground_truth()["annotations"]} <= images_of_part
        assert {part[i][1]["image_id"] for i in range(2)} == images_of_part
    assert "2 of its images are the validation set" in caplog.text
    for val_share in (0, 0.9, 1):
        with pytest.raises(ValueError, match=rf"own_data.val_share={val_share} leaves a part of the 4 images of .* empty"):
            describe_coco(root, val_share=val_share)


def test_a_single_file_of_the_validation_part_is_not_divided(tmp_path):
    (tmp_path / "val.json").write_text(json.dumps(coco_files.content()))
    with pytest.raises(FileNotFoundError, match=r"no annotations of the train part"):
        describe_coco(tmp_path)


def test_shares_do_not_depend_on_the_order_in_the_file_and_cover_all_images():
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in range(10)]
    content = {"images": images, "annotations": [{"image_id": number} for number in [*range(10), None, [1]]], "categories": []}
    first, rest = take_share(content, [0, 0.7]), take_share(content, [0.7, 1])
    assert [len(part["images"]) for part in (first, rest)] == [7, 3]
    assert sorted(image["id"] for part in (first, rest) for image in part["images"]) == list(range(10))
    assert {image["id"] for image in take_share({**content, "images": images[::-1]}, [0, 0.7])["images"]} == {
        image["id"] for image in first["images"]
    }
    assert [image["id"] for image in first["images"]] != list(range(7)), "the frames of a video in their order"
    # checks report annotations of unknown images
    assert [annotation["image_id"] for annotation in rest["annotations"]][-2:] == [None, [1]]
    for share in ([0.5, 0.5], [0.5], [0, 1.5], [0.8, 0.2]):
        with pytest.raises(ValueError, match="share must be two ascending fractions"):
            take_share(content, share)
    with pytest.raises(ValueError, match=r"share=\[0, 0.05\] of 10 images holds no image"):
        take_share(content, [0, 0.05])


def write_maps(root: Path, images: str, maps: str, values: list[int]) -> None:
    """Write an image and a label map with these values into two folders."""
    for folder in (images, maps):
        (root / folder).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (len(values), 1)).save(root / images / "a.jpg")
    Image.fromarray(np.array([values], np.uint8)).save(root / maps / "a.png")


@pytest.mark.parametrize(
    ("values", "names", "expected"),
    [
        ([0, 255], None, {0: 0, 255: 1}),
        ([0, 3, 7, 255], None, {0: 0, 3: 1, 7: 2, 255: 255}),
        ([0, 2], "background\ncrack\nstain\n", {0: 0, 1: 1, 2: 2, 255: 255}),
        ([10, 20], "road\nsky\n", {10: 0, 20: 1, 255: 255}),
        ([0, 255], "background\ncrack", {0: 0, 255: 1}),
    ],
)
@pytest.mark.parametrize("folders", ["images/{part}:masks/{part}", "{part}/images:{part}/labels"])
def test_classes_are_read_from_label_maps(tmp_path, values, names, expected, folders):
    for part in ("train", "valid"):
        write_maps(tmp_path, *folders.format(part=part).split(":"), values)
    if names is not None:
        (tmp_path / "classes.txt").write_text(names)
    found = describe_label_maps(tmp_path)
    assert found["data"]["train"]["labels"] == found["data"]["val"]["labels"] == expected
    assert found["class_names"] == (names.split() if names else [str(label) for label, number in expected.items() if number != 255])
    assert Path(found["data"]["val"]["images"]).is_dir()
    assert "valid" in found["data"]["val"]["annotations"]


@pytest.mark.parametrize("mode", ["RGB", "P"])
def test_colours_of_classes_are_read_from_a_table(tmp_path, mode):
    colours = [[0, 0, 0], [128, 64, 128], [255, 255, 255]]
    for part in ("train", "val"):
        write_maps(tmp_path, f"images/{part}", f"masks/{part}", [0, 1, 2])
        colored = Image.fromarray(np.array([colours], np.uint8))
        if mode == "P":
            colored = Image.fromarray(np.array([[0, 1, 2]], np.uint8))
            colored.putpalette([value for colour in colours for value in colour])
        colored.save(tmp_path / "masks" / part / "a.png")
    # as CVAT writes it
    table = tmp_path / "labelmap.txt"
    table.write_text("# label:color_rgb:parts:actions\nbackground:0,0,0::\nvoid:255,255,255::\nroad: 128, 64, 128\n")
    found = describe_label_maps(tmp_path)
    assert found["class_names"] == ["background", "road"]
    assert found["data"]["train"]["labels"] == {0: 0, 1: 255, 2: 1}
    data = LabelMapFolders(**found["data"]["val"])
    assert data.num_classes == 2
    assert data[0][1].tolist() == [[0, 1, 255]]
    cfg = compose_config("train", "setting=segmentation_own", f"data.root={tmp_path}")
    OmegaConf.set_struct(cfg, False)
    read_own_data(cfg)
    assert cfg.data.train.palette == [colours[0], colours[2], colours[1]]
    for line in ("road", "road:1,2", "road:1,2,256", "road:1,2,red", ":1,2,3", "background:1,2,3"):
        table.write_text(f"background:0,0,0\n{line}\n")
        with pytest.raises(ValueError, match=rf"labelmap.txt must have one line NAME:RED,GREEN,BLUE .* got '{line}'"):
            describe_label_maps(tmp_path)
    table.write_text("background:0,0,0\nvoid:1,1,1")
    with pytest.raises(ValueError, match=r"labelmap.txt must name two classes or more, got background, void"):
        describe_label_maps(tmp_path)


def test_folders_that_do_not_fit_are_answered(tmp_path):
    write_maps(tmp_path, "images/train", "masks/train", [0, 1, 9])
    with pytest.raises(FileNotFoundError, match=r"has none of the folders images/val, val/images, .* for its val part"):
        describe_label_maps(tmp_path)
    write_maps(tmp_path, "images/val", "masks/val", [0, 1, 9])
    (tmp_path / "classes.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match=r"classes.txt must name the classes of labels 0, 1, 9, got 2 names"):
        describe_label_maps(tmp_path)
    Image.new("RGB", (3, 1)).save(tmp_path / "masks" / "val" / "a.png")
    with pytest.raises(ValueError, match=r"a.png must be an 8-bit grey or indexed PNG, got mode RGB"):
        describe_label_maps(tmp_path)
    (tmp_path / "classes.txt").write_text("a\nb\nb\n")
    write_maps(tmp_path, "images/val", "masks/val", [0, 1, 9])
    with pytest.raises(ValueError, match=r"classes.txt must name each class once, got b 2 times"):
        describe_label_maps(tmp_path)
    write_maps(tmp_path, "images/val", "masks/val", [255])
    with pytest.raises(ValueError, match=r"the label maps in .*masks/val hold only 255, for pixels to ignore"):
        describe_label_maps(tmp_path)
    for part in ("train", "val"):
        write_maps(tmp_path, f"images/{part}", f"masks/{part}", [0, 0])
    with pytest.raises(ValueError, match=r"must hold two labels or more, besides 255 for pixels to ignore, got \[0\]"):
        describe_label_maps(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"should hold train/ and val/, each with a folder for each class"):
        describe_class_folders(tmp_path)
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"train must hold folders of two classes or more, got cat"):
        describe_class_folders(tmp_path)


def test_a_label_that_is_never_trained_is_named(tmp_path, caplog):
    write_maps(tmp_path, "images/train", "masks/train", [0, 1, 4])
    write_maps(tmp_path, "images/val", "masks/val", [0, 3])
    assert describe_label_maps(tmp_path)["class_names"] == ["0", "1", "3", "4"]
    (record,) = caplog.records
    assert record.getMessage() == f"no training map in {tmp_path}/masks/train has the labels 3, which other maps have"


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
