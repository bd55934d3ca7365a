"""Damaged COCO files: their scores are those of pycocotools on the file as it is, and no content of a file ends the program."""

import contextlib
import io
import json
import subprocess
import sys

import lightning as L
import pytest
import torch
from carafepp.models.detection import FasterRCNN, MaskRCNN
from carafepp.models.resnet import tiny
from carafepp.tasks.coco import COCO
from carafepp.tasks.coco_check import check_annotations, read_annotations
from carafepp.tasks.coco_eval import SCORES, average_precision, class_precision, evaluate_detections, read_scores
from carafepp.tasks.data import Data
from carafepp.tasks.detection import Detection, collate, with_masks
from coco_files import NAMES, SIZES, content, write
from pycocotools import mask as rle
from pycocotools.coco import COCO as Reader
from pycocotools.cocoeval import COCOeval
from torch.optim.lr_scheduler import PolynomialLR

SQUARE = [10, 10, 40, 10, 40, 40, 10, 40]


def damage(annotation=813, **values):
    """Return a file whose annotation 813, a car in an image of 60 x 80, has other values; None removes one."""
    made = content()
    entry = next(a for a in made["annotations"] if a["id"] == annotation)
    entry.update(values)
    for name in [name for name, value in entry.items() if value is ...]:
        del entry[name]
    return made


def boxes_only(segmentation=None):
    """Return a file whose objects have boxes alone, except one with the given segmentation."""
    made = content()
    for annotation in made["annotations"]:
        annotation["segmentation"] = segmentation if annotation["id"] == 813 and segmentation is not None else [[]]
    return made


# what is damaged, the file, and whether pycocotools can read its masks
FILES = {
    "second polygon of two points": (damage(segmentation=[SQUARE, [1, 2, 3, 4]]), True),
    "second polygon without points": (damage(segmentation=[SQUARE, []]), True),
    "odd number of coordinates": (damage(segmentation=[[*SQUARE, 7]]), True),
    "coordinate as string": (damage(segmentation=[[*SQUARE[:-1], "40"]]), True),
    "polygon outside the image": (damage(segmentation=[[100, 10, 120, 10, 120, 30]]), True),
    "polygon partly far outside": (damage(segmentation=[[10, 10, 5000, 10, 5000, 40, 10, 40]]), True),
    "polygon without an area": (damage(segmentation=[[10, 10, 20, 20, 30, 30]]), True),
    "run lengths without pixels": (damage(segmentation={"size": [80, 60], "counts": [4800]}), True),
    "run lengths of another size": (damage(segmentation={"size": [60, 80], "counts": [100, 4700]}), True),
    "zero area": (damage(area=0), True),
    "box outside the image": (damage(bbox=[70, 50, 11, 11]), True),
    "unknown category": (damage(category_id=4), True),
    "whole floats": (damage(image_id=285.0, category_id=3.0, id=813.0), True),
    "polygon of two points alone": (damage(segmentation=[[1, 2, 3, 4]]), False),
    "polygon of two points first": (damage(segmentation=[[1, 2, 3, 4], SQUARE]), False),
    "polygon without outer brackets": (damage(segmentation=SQUARE), False),
    "word for a coordinate": (damage(segmentation=[SQUARE, [1, 2, 3, "x", 5, 6]]), False),
    "no segmentation": (damage(segmentation=...), False),
    "segmentation null": (damage(segmentation=None), False),
    "empty polygon": (damage(segmentation=[[]]), False),
    "coordinate 1e9": (damage(segmentation=[[1, 2, 1e9, 4, 5, 6]]), False),
    "coordinate 1e300": (damage(segmentation=[[1, 2, 1e300, 4, 5, 6], SQUARE]), False),
    "coordinate -1e9": (damage(segmentation=[[-1e9, 2, 3, 4, 5, 6]]), False),
    "coordinate null": (damage(segmentation=[[1, 2, 3, 4, 5, None]]), False),
    "damaged run lengths": (damage(segmentation={"size": [80, 60], "counts": "junk"}), False),
    "boxes only": (boxes_only(), False),
    "boxes only, one undecodable": (boxes_only([[1, 2]]), False),
}


def quietly(function, *arguments):
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*arguments)


def score_by_pycocotools(annotations, found, kind):
    """Compute the scores of pycocotools alone, from the file."""
    reader = quietly(Reader, str(annotations))
    evaluation = COCOeval(reader, quietly(reader.loadRes, [dict(entry) for entry in found]), kind)
    for step in (evaluation.evaluate, evaluation.accumulate, evaluation.summarize):
        quietly(step)
    return {name: score for name, score in zip(SCORES, evaluation.stats, strict=False) if score > -1}


def detections(kind):
    """Return detections of all objects of the undamaged file, none of them exact; that of 813 has the mask SQUARE, moved."""
    moved = [12, *SQUARE[1:6], 12, 40]
    values = {"bbox": [41, 50, 11, 11]} if kind == "bbox" else {"segmentation": [moved]}
    made = [{"image_id": 285, "category_id": 3, "score": 0.95} | values]
    for number, annotation in enumerate(a for a in content()["annotations"] if a["id"] != 813 and not a["iscrowd"]):
        x, y, w, h = annotation["bbox"]
        head = {"image_id": annotation["image_id"], "category_id": annotation["category_id"], "score": 0.9 - 0.1 * number}
        box = {"bbox": [x + 1, y, w, h]}
        made.append(head | (box if kind == "bbox" else {"segmentation": annotation["segmentation"]}))
    # result files have masks as run lengths
    for entry in made:
        size = [*SIZES[entry["image_id"]][::-1]]
        if isinstance(entry.get("segmentation"), list):
            runs = rle.merge(rle.frPyObjects(entry["segmentation"], *size))
            entry["segmentation"] = {"size": size, "counts": runs["counts"].decode()}
    return made


def load(folder, split="val", **options):
    annotations = folder / "annotations" / f"instances_{split}2017.json"
    return COCO(annotations, folder / f"{split}2017", NAMES, train=split == "train", **options)


@pytest.mark.parametrize("name", FILES)
def test_scores_are_those_of_pycocotools_on_the_file_as_it_is(tmp_path, name):
    made, masks_readable = FILES[name]
    data = load(write(tmp_path / "root", made))
    for kind in ("bbox", "segm") if masks_readable else ("bbox",):
        expected = score_by_pycocotools(data.annotations, detections(kind), kind)
        scores = average_precision(data.ground_truth(), detections(kind), kind)
        print(f"{name}, {kind}: AP {scores['AP']:.4f} here, {expected['AP']:.4f} by pycocotools")
        assert scores == expected
        assert 0 < scores["AP"] < 1


@pytest.mark.parametrize("name", [name for name, (made, readable) in FILES.items() if not readable and "boxes" not in name])
def test_masks_that_pycocotools_cannot_read_count_without_their_damaged_parts(tmp_path, name):
    made, _ = FILES[name]
    data = load(write(tmp_path / "root", made))
    shape = made["annotations"][3].get("segmentation")
    rest = [SQUARE] if isinstance(shape, list) and SQUARE in shape else {"size": [80, 60], "counts": [4800]}
    (tmp_path / "repaired.json").write_text(json.dumps(damage(segmentation=rest)))
    expected = score_by_pycocotools(tmp_path / "repaired.json", detections("segm"), "segm")
    assert average_precision(data.ground_truth(), detections("segm"), "segm") == expected


def test_object_with_a_bad_polygon_stays_in_box_scores(tmp_path):
    made = content()
    made["images"] = made["images"][:1]
    made["annotations"] = made["annotations"][:2]
    made["annotations"][1] |= {"segmentation": [[1, 2]], "category_id": 3}
    data = load(write(tmp_path / "root", made))
    found = [{"image_id": 139, "category_id": 3, "bbox": made["annotations"][0]["bbox"], "score": 0.9}]
    scores = average_precision(data.ground_truth(), found, "bbox")
    assert scores == score_by_pycocotools(data.annotations, found, "bbox")
    assert scores["AP"] == pytest.approx(0.5, abs=0.01)


def test_boxes_only(tmp_path, caplog):
    """One undecodable segmentation in a file of boxes is the only problem, and `"segmentation": [[]]` is none."""
    assert check_annotations(boxes_only(), write(tmp_path / "clean") / "val2017") == []
    folder = write(tmp_path / "root", boxes_only([[1, 2]]))
    data = load(folder, "train")
    problems = check_annotations(read_annotations(data.annotations), folder / "train2017")
    assert [(problem.annotation_id, problem.rule) for problem in problems] == [(813, "segmentation cannot be decoded")]
    assert not data.masks
    assert [len(data[i][1]["labels"]) for i in range(len(data))] == [2, 2]
    assert "masks" not in data[0][1]


def network(builder, **options):
    settings = {"fpn_dim": 8, "head_dim": 16, "min_size": 64, "max_size": 64, "rpn_post_nms_top_n_train": 20}
    return lambda num_classes: builder(num_classes, backbone=tiny(), **settings, **options)


@pytest.mark.parametrize("masks", [False, True])
def test_training_on_objects_without_masks(tmp_path, masks):
    """Boxes are trained on without their masks; a mask head never learns from an empty mask."""
    data = load(write(tmp_path / "root", damage(segmentation=[[1, 2]])), "train")
    batch = collate([data[i] for i in range(len(data))])
    assert [len(target["labels"]) for target in batch[1]] == [2, 2]
    assert [len(with_masks(target)["labels"]) for target in batch[1]] == [2, 1]
    builder = network(MaskRCNN, mask_dim=8, mask_convs=1) if masks else network(FasterRCNN)
    task = Detection(builder, class_names=NAMES, optimizer=torch.optim.SGD, schedule=PolynomialLR)
    seen = []
    task.model.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[1]))
    task.log = task.log_dict = lambda *_, **__: None
    assert task.training_step(batch, 0).isfinite()
    assert [len(target["labels"]) for target in seen] == ([2, 1] if masks else [2, 2])


def test_training_on_images_without_objects(tmp_path):
    folder = write(tmp_path / "root")
    data = load(folder, "train", keep_empty=True)
    assert [data[i][1]["image_id"] for i in range(len(data))] == list(SIZES)
    _, target = data[3]
    assert target["boxes"].shape == (0, 4)
    assert target["masks"].shape == (0, 64, 64)
    task = Detection(network(FasterRCNN), class_names=NAMES, optimizer=torch.optim.SGD, schedule=PolynomialLR)
    task.log = task.log_dict = lambda *_, **__: None
    loss = task.training_step(collate([data[2], data[3]]), 0)
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in task.parameters())


def test_names_outside_the_folder_are_read_on_request(tmp_path):
    made = content()
    made["images"][0]["file_name"] = "../train2017/000000000139.jpg"
    folder = write(tmp_path / "root", made)
    with pytest.raises(ValueError, match=r"file_name leaves the image folder \('../train2017/000000000139.jpg'; allow_outside=true"):
        load(folder)
    assert load(folder, allow_outside=True)[0][0].shape == (3, 60, 80)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (damage(id="813"), "id must be an integer, got the string '813'"),
        (damage(image_id="285"), "image_id must be an integer, got the string '285'"),
        (damage(iscrowd="0"), "got the string '0'"),
        (damage(segmentation=SQUARE), "a polygon needs a list around it, [[x1, y1, x2, y2, ...]]"),
    ],
)
def test_messages_name_the_type_and_what_would_be_right(tmp_path, caplog, made, message):
    load(write(tmp_path / "root", made))
    assert message in caplog.text


def test_whole_floats_are_integers(tmp_path):
    made = content()
    for image in made["images"]:
        image |= {"id": float(image["id"]), "width": float(image["width"]), "height": float(image["height"])}
    for annotation in made["annotations"]:
        annotation |= {"image_id": float(annotation["image_id"]), "iscrowd": float(annotation["iscrowd"])}
        if isinstance(annotation["segmentation"], dict):
            annotation["segmentation"]["size"] = [float(side) for side in annotation["segmentation"]["size"]]
    made["categories"] = [category | {"id": float(category["id"])} for category in made["categories"]]
    folder = write(tmp_path / "root", made)
    assert read_annotations(folder / "annotations" / "instances_val2017.json") == content()
    assert load(folder)[1][1]["masks"].any()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"images": ' + '{"a":' * 100_000 + "1" + "}" * 100_000 + "}", "nested too deeply"),
        (b"\xff\xfe{}", "is not valid JSON"),
        ("1" * 5000, "is not valid JSON"),
    ],
)
def test_content_that_no_reader_takes(tmp_path, text, message):
    path = tmp_path / "deep.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ValueError, match=f"deep.json.*{message}"):
        read_annotations(path)


def test_deep_values_are_named(tmp_path):
    """Values nested as deep as the reader allows are shown shortened."""
    made = content()
    deep = 1
    for _ in range(400):
        deep = [deep]
    made["annotations"][3] |= {"segmentation": deep, "bbox": deep}
    made["annotations"][2]["id"] = made["images"][3]["id"] = made["images"][2]["file_name"] = deep
    problems = check_annotations(made, write(tmp_path / "root") / "val2017")
    assert len(problems) >= 4
    assert all(len(str(problem)) < 1500 for problem in problems)


def test_validate_names_what_would_end_pycocotools(tmp_path):
    """The command itself, since a crash would end the tests."""
    made = content()
    for annotation, value in zip(made["annotations"], (1e9, 1e300, -1e9, 2**31), strict=False):
        annotation["segmentation"] = [[1, 2, value, 4, 5, 6]]
    made["images"][3]["file_name"] = "\ud800\x1b[31m" + "a" * 5000
    folder = write(tmp_path / "root", made)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "carafepp.scripts.validate", f"data={folder}"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert "8 x segmentation cannot be decoded: annotation is used without a mask" in done.stdout
    assert "2 x image file missing: training does not begin" in done.stdout
    assert "Traceback" not in done.stderr
    assert "\x1b" not in done.stdout


def test_mask_network_on_a_batch_without_a_mask(tmp_path):
    made = content()
    for annotation in made["annotations"][1:]:
        annotation["segmentation"] = None
    data = load(write(tmp_path / "root", made), "train")
    task = Detection(network(MaskRCNN, mask_dim=8, mask_convs=1), class_names=NAMES, optimizer=torch.optim.SGD, schedule=PolynomialLR)
    task.log = task.log_dict = lambda *_, **__: None
    loss = task.training_step(collate([data[1]]), 0)
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in task.parameters())


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_scores_of_classes_are_those_of_pycocotools_on_one_category(tmp_path, kind):
    data = load(write(tmp_path / "root", damage(annotation=7003, category_id=17)))
    found = detections(kind)
    evaluation = evaluate_detections(data.ground_truth(), found, kind)
    scores = class_precision(evaluation)
    assert scores[90] is None
    for category in (3, 17):
        reader = quietly(Reader, str(data.annotations))
        alone = COCOeval(reader, quietly(reader.loadRes, [dict(entry) for entry in found]), kind)
        alone.params.catIds = [category]
        for step in (alone.evaluate, alone.accumulate, alone.summarize):
            quietly(step)
        assert scores[category] == pytest.approx(alone.stats[0], abs=1e-12)
    assert (scores[3] + scores[17]) / 2 == pytest.approx(read_scores(evaluation)["AP"])


def test_table_of_classes(tmp_path):
    """A validation leaves a row for each class, in the order of the labels."""
    folder = write(tmp_path / "root", damage(annotation=7003, category_id=17))
    data = Data(None, load(folder), batch_size=1, epochs=1, collate=collate)
    task = Detection(network(MaskRCNN, mask_dim=8, mask_convs=1), class_names=NAMES, optimizer=torch.optim.SGD, schedule=PolynomialLR)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path)
    scores = trainer.validate(task, data, verbose=False)[0]
    assert [(row["class"], row["objects"]) for row in task.per_class] == [("car", 2), ("cat", 2), ("brush", 0)]
    for kind in ("box_AP", "mask_AP"):
        values = [row[kind] for row in task.per_class]
        assert values[2] is None
        assert sum(values[:2]) / 2 == pytest.approx(scores[f"val/{kind}"])
