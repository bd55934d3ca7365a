"""COCO's format: targets are what pycocotools reads, damage is found before a training, and scores are pycocotools' to the last digit."""

import contextlib
import io
import json
import logging

import numpy as np
import pytest
import torch
from carafepp.tasks.coco import COCO
from carafepp.tasks.coco_check import CONSEQUENCES, FATAL, RULES, UNMASKED, check_annotations, check_images, read_annotations
from carafepp.tasks.coco_eval import SCORES, average_precision, format_results, read_ground_truth
from carafepp.tasks.coco_masks import read_mask
from carafepp.tasks.data import TrainBatches
from carafepp.tasks.layouts import run_lengths
from carafepp.tasks.scenes import Scenes
from coco_files import NAMES, SIZES, content, disc, write
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as rle
from pycocotools.coco import COCO as Reader
from pycocotools.cocoeval import COCOeval
from torchvision.transforms import v2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("coco") / "root")


def load(folder, split="train", names=NAMES, **options):
    annotations = folder / "annotations" / f"instances_{split}2017.json"
    return COCO(annotations, folder / f"{split}2017", names, train=split == "train", **options)


def by_hand(function, *arguments):
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*arguments)


def test_targets_are_what_pycocotools_reads(folder):
    data = load(folder, "val")
    reader = by_hand(Reader, str(data.annotations))
    assert [data[i][1]["image_id"] for i in range(len(data))] == list(SIZES)
    for index, image_id in enumerate(SIZES):
        image, target = data[index]
        found = [a for a in reader.loadAnns(reader.getAnnIds(image_id)) if not a["iscrowd"]]
        assert tuple(image.shape) == (3, *SIZES[image_id][::-1])
        assert image.dtype == torch.float32
        assert image.max() <= 1
        # categories 3, 17 and 90 are labels 1, 2 and 3
        assert target["labels"].tolist() == [{3: 1, 17: 2, 90: 3}[a["category_id"]] for a in found]
        assert target["boxes"].tolist() == [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in found)]
        assert target["masks"].shape == (len(found), *image.shape[1:])
        for mask, annotation in zip(target["masks"], found, strict=True):
            assert mask.any()
            np.testing.assert_array_equal(mask, reader.annToMask(annotation))


def test_training_leaves_out_images_without_an_object_of_their_own(folder):
    data = load(folder)
    assert [data[i][1]["image_id"] for i in range(len(data))] == [139, 285]
    assert [len(data[i][1]["labels"]) for i in range(2)] == [2, 2]
    assert data.groups == [0, 1]


def test_flip_takes_boxes_and_masks_along(folder):
    data = load(folder, transforms=v2.RandomHorizontalFlip(), seed=5)
    flips = set()
    for epoch in range(8):
        (image, target), (plain, plainly) = data[epoch, 0], load(folder)[0]
        flipped = not torch.equal(image, plain)
        flips.add(flipped)
        assert torch.equal(image, data[epoch, 0][0])
        assert torch.equal(target["masks"], plainly["masks"].flip(-1) if flipped else plainly["masks"])
        left = 80 - plainly["boxes"][:, 2] if flipped else plainly["boxes"][:, 0]
        assert torch.equal(target["boxes"][:, 0], left)
    assert flips == {True, False}


def change(annotation=None, **values):
    def apply(made):
        entry = made["images"][1] if annotation is None else next(a for a in made["annotations"] if a["id"] == annotation)
        entry.update(values)

    return apply


# a change to the file, and the image, the annotation and the rule that the problem must name
def make_fractions(made):
    for annotation in made["annotations"]:
        annotation["bbox"] = [value / 100 for value in annotation["bbox"]]


DAMAGE = [
    (change(813, category_id=4), 285, 813, "unknown category"),
    (change(813, bbox=[70.0, 50.0, 11.0, 11.0]), 285, 813, "box outside the image"),
    (change(813, bbox=[55.0, 50.0, 11.0, 11.0]), 285, 813, "box outside the image"),
    (change(813, bbox=[-30.0, 50.0, 11.0, 11.0]), 285, 813, "box outside the image"),
    (change(813, bbox=[40.0, 50.0, 0.0, 11.0]), 285, 813, "zero area"),
    (change(813, bbox=[40.0, 50.0, 11.0, -2.0]), 285, 813, "zero area"),
    (change(813, area=0), 285, 813, "zero area"),
    (change(813, bbox=[1, 2, 3]), 285, 813, "bbox or area is not made of finite numbers"),
    (change(813, bbox=[1, 2, 3, float("nan")]), 285, 813, "bbox or area is not made of finite numbers"),
    (change(813, bbox=None), 285, 813, "bbox or area is not made of finite numbers"),
    (change(813, area="large"), 285, 813, "bbox or area is not made of finite numbers"),
    (change(813, bbox=[1, 2, 10**400, 3]), 285, 813, "bbox or area is not made of finite numbers"),
    (change(813, iscrowd=None), 285, 813, "iscrowd is neither 0 nor 1"),
    (change(813, iscrowd="0"), 285, 813, "iscrowd is neither 0 nor 1"),
    (change(813, segmentation=[[1, 2, 3, 4]]), 285, 813, "segmentation cannot be decoded"),
    (change(813, segmentation=[[1, 2, 3, 4, 5, "six"]]), 285, 813, "segmentation cannot be decoded"),
    (change(813, segmentation=[1, 2, 30, 4, 5, 60]), 285, 813, "segmentation cannot be decoded"),
    (change(813, segmentation=[[1, 2, 3, 4, 5, None]]), 285, 813, "segmentation cannot be decoded"),
    (change(813, segmentation=[[1, 2, 3, 4, 5, float("nan")]]), 285, 813, "segmentation cannot be decoded"),
    (change(813, segmentation=[[1, 2, 3, 4, 5, 10**400]]), 285, 813, "segmentation cannot be decoded"),
    (change(813, segmentation=[[1, 2, 1e9, 4, 5, 6]]), 285, 813, "segmentation cannot be decoded"),
    (change(813, segmentation=[[1, 2, 1e300, 4, 5, 6]]), 285, 813, "segmentation cannot be decoded"),
    (change(813, segmentation=[[-1e9, 2, 3, 4, 5, 6]]), 285, 813, "segmentation cannot be decoded"),
    (change(813, segmentation=[[0, 0, 50, 0, 50, 70] * 100000]), 285, 813, "segmentation cannot be decoded"),
    (change(813, segmentation="polygon"), 285, 813, "segmentation cannot be decoded"),
    (change(813, segmentation=[{"size": [80, 60], "counts": [4800]}]), 285, 813, "segmentation cannot be decoded"),
    (change(813, segmentation={"size": [80, 60], "counts": "X" * 10**6}), 285, 813, "segmentation cannot be decoded"),
    (change(813, segmentation={"size": [80, 60], "counts": None}), 285, 813, "segmentation cannot be decoded"),
    (change(813, segmentation={"size": [80, 60], "counts": [4799.5, 0.5]}), 285, 813, "segmentation cannot be decoded"),
    (change(813, segmentation={"size": [80, 60], "counts": [4800]}), 285, 813, "segmentation without a pixel in the image"),
    (change(813, segmentation={"size": [80, 60], "counts": [4800, 0]}), 285, 813, "segmentation without a pixel in the image"),
    (change(813, segmentation=[[100, 10, 120, 10, 120, 30]]), 285, 813, "segmentation without a pixel in the image"),
    (change(813, segmentation=[[10, 10, 20, 20, 30, 30]]), 285, 813, "segmentation without a pixel in the image"),
    (change(813, segmentation=None), 285, 813, "segmentation missing, others have one"),
    (change(813, segmentation=[[]]), 285, 813, "segmentation missing, others have one"),
    (change(813, segmentation={"size": [60, 80], "counts": [4800]}), 285, 813, "segmentation cannot be decoded"),
    (change(813, segmentation={"size": 80, "counts": [4800]}), 285, 813, "segmentation cannot be decoded"),
    (change(813, segmentation={"size": [80, 60], "counts": [10, 20]}), 285, 813, "segmentation cannot be decoded"),
    (change(813, segmentation={"size": [80, 60], "counts": "junk"}), 285, 813, "segmentation cannot be decoded"),
    (change(813, segmentation=[]), 285, 813, "segmentation missing, others have one"),
    (change(813, id=812), 285, 812, "annotation id used before"),
    (change(813, id=0), 285, 0, "annotation id 0, which pycocotools takes for no match"),
    (change(813, id=None), 285, None, "annotation without id, image_id or category_id"),
    (change(813, image_id=None), None, 813, "annotation without id, image_id or category_id"),
    (change(813, id="813"), 285, "813", "annotation without id, image_id or category_id"),
    (change(813, id=True), 285, True, "annotation without id, image_id or category_id"),
    (change(813, id=10**30), 285, 10**30, "annotation without id, image_id or category_id"),
    (change(813, image_id=285.5), 285.5, 813, "annotation without id, image_id or category_id"),
    (change(813, image_id=1), 1, 813, "annotation of an unknown image"),
    (change(813, bbox=[1e9, 50.0, 1e300, 11.0]), 285, 813, "box outside the image"),
    (make_fractions, 139, 7001, "boxes are fractions of the image instead of pixels"),
    (change(file_name="gone.jpg"), 285, None, "image file missing"),
    (change(file_name="a" * 5000), 285, None, "image file missing"),
    (change(file_name="a\0b"), 285, None, "image file missing"),
    (change(file_name="\ud800.jpg"), 285, None, "image file missing"),
    (change(file_name="../val2017/000000000285.jpg"), 285, None, "file_name leaves the image folder"),
    (change(file_name="a/../../secret.jpg"), 285, None, "file_name leaves the image folder"),
    (change(file_name="/etc/secret.jpg"), 285, None, "file_name leaves the image folder"),
    (change(file_name="./000000000139.jpg"), 285, None, "image file used before"),
    (change(id=139), 139, None, "image id used before"),
    (change(width="60"), 285, None, "image without id, file_name, width or height"),
    (change(width=60.5), 285, None, "image without id, file_name, width or height"),
    (change(width=10**6, height=10**6), 285, None, "image without id, file_name, width or height"),
    (change(file_name=285), 285, None, "image without id, file_name, width or height"),
    (change(width=None), 285, None, "image without id, file_name, width or height"),
    (change(width=61), 285, None, "image file of another size"),
]


@pytest.mark.parametrize(("damage", "image_id", "annotation_id", "rule"), DAMAGE)
def test_damage_is_named_and_never_met_in_training(tmp_path, caplog, damage, image_id, annotation_id, rule):
    made = content()
    damage(made)
    folder = write(tmp_path / "root", made)
    annotations, images = folder / "annotations" / "instances_train2017.json", folder / "train2017"
    read = read_annotations(annotations)
    problems = [*check_annotations(read, images), *check_images(read, images)]
    assert (image_id, annotation_id, rule) in {problem[:3] for problem in problems}
    if RULES[rule] == FATAL:
        with pytest.raises(ValueError, match=f"image {image_id}, annotation {annotation_id}: {rule}"):
            load(folder, "val")
        return
    with caplog.at_level(logging.WARNING):
        data, val = load(folder), load(folder, "val")
    assert f"1 x {rule}: {CONSEQUENCES[RULES[rule]]}" in caplog.text
    targets = [data[i][1] for i in range(len(data))]
    if RULES[rule] == UNMASKED:
        assert [len(target["labels"]) for target in targets] == [2, 2]
        assert [target["masks"].flatten(1).any(1).tolist() for target in targets] == [[True, True], [True, False]]
    else:
        assert sum(len(target["labels"]) for target in targets) == 3
    # pycocotools can use the remaining annotations
    assert average_precision(read_ground_truth(val, NAMES), [], "segm")["AP"] == 0


def test_one_box_of_one_pixel_is_no_fraction(tmp_path):
    made = content()
    made["annotations"] = [made["annotations"][0] | {"bbox": [0, 0, 1, 1], "segmentation": []}]
    assert len(load(write(tmp_path / "root", made))) == 1


def test_ids_of_any_kind_are_named(tmp_path):
    made = content()
    made["images"][1]["id"], made["annotations"][0]["id"] = [285], {"of": 7001}
    folder = write(tmp_path / "root", made)
    read = read_annotations(folder / "annotations" / "instances_train2017.json")
    found = [problem[:3] for problem in [*check_annotations(read, folder / "train2017"), *check_images(read, folder / "train2017")]]
    assert ([285], None, "image without id, file_name, width or height") in found
    assert (139, {"of": 7001}, "annotation without id, image_id or category_id") in found
    assert (285, 812, "annotation of an unknown image") in found


def test_undamaged_files_have_no_problem(folder):
    for split in ("train2017", "val2017"):
        made = read_annotations(folder / "annotations" / f"instances_{split}.json")
        assert [*check_annotations(made, folder / split), *check_images(made, folder / split)] == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [{"id": 139, "fi', "is not valid JSON"),
        ("[1, 2]", "must hold an object"),
        ('{"images": [], "categories": []}', "lists no images"),
        ('{"images": [{"id": 1}], "annotations": 5, "categories": []}', "list of objects 'annotations'"),
        ('{"images": [{"id": 1}], "categories": [{"name": "car"}]}', "integer id"),
        ('{"images": [{"id": 1}], "categories": [{"id": 7}]}', r"every category a name, .* ids \[7\]"),
        ('{"images": [{"id": 1}], "categories": [{"id": 7, "name": ["car"]}]}', r"every category a name, .* ids \[7\]"),
        (
            '{"images": [{"id": 1}], "categories": [{"id": 0, "name": "car"}, {"id": 4, "name": "car"}]}',
            r"a name of its own, got 'car' for ids \[0, 4\]",
        ),
    ],
)
def test_file_that_is_no_annotation_file_is_an_error(tmp_path, text, message):
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"broken.json.*{message}"):
        read_annotations(path)


def test_other_categories_are_an_error(folder):
    with pytest.raises(ValueError, match="3 car, 17 cat, 90 brush, got car, brush, cat"):
        load(folder, names=["car", "brush", "cat"])
    with pytest.raises(ValueError, match="3 car, 17 cat, 90 brush, got 0, 1"):
        load(folder, names=[0, 1])


def test_names_that_a_command_line_takes_for_numbers_are_names(tmp_path):
    # by their ids: 1, 2, 0
    made = content()
    made["categories"] = [category | {"name": f"{number}"} for number, category in enumerate(made["categories"])]
    assert len(load(write(tmp_path / "root", made), names=[1, 2, 0])) == 2


def test_damaged_image_is_replaced_in_training_and_refused_in_validation(tmp_path, caplog):
    folder = write(tmp_path / "root")
    for split in ("train2017", "val2017"):
        path = folder / split / "000000000139.jpg"
        path.write_bytes(path.read_bytes()[:900])
    with caplog.at_level(logging.WARNING):
        assert load(folder)[0][1]["image_id"] == 285
    assert "000000000139.jpg" in caplog.text
    with pytest.raises(ValueError, match="image 139, annotation None: image file unreadable"):
        load(folder, "val")


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_run_lengths_are_checked_as_pycocotools_decodes_them(height, width, data):
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))).reshape(height, width)
    counts = rle.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    for shape in ({"size": [height, width], "counts": counts}, run_lengths(mask)):
        assert read_mask(shape, (height, width)) == (shape, None, mask.any())
    assert read_mask({"size": [height, width], "counts": counts[:-1]}, (height, width)).fault


def detections(found: dict, generator: np.random.Generator) -> list[dict]:
    """Detections near the objects of a file, with some of wrong class and some elsewhere."""
    sizes = {image["id"]: (image["width"], image["height"]) for image in found["images"]}
    made = []
    for annotation in [*found["annotations"]] * 3:
        width, height = sizes[annotation["image_id"]]
        box = torch.tensor(annotation["bbox"]) + torch.from_numpy(generator.normal(0, 2, 4)).float()
        x, y, w, h = box.tolist()
        label = 1 + int(generator.integers(3)) if generator.random() < 0.2 else {3: 1, 17: 2, 90: 3}[annotation["category_id"]]
        tensors = {
            "boxes": torch.tensor([[x, y, x + abs(w), y + abs(h)]]),
            "labels": torch.tensor([label]),
            "scores": torch.tensor([generator.random()]).float(),
            "masks": torch.from_numpy(disc((width, height), x + w / 2, y + h / 2, min(abs(w), abs(h)) / 2))[None, None].float(),
        }
        made.append((annotation["image_id"], tensors))
    return made


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_scores_are_those_of_pycocotools_by_hand_on_the_written_file(folder, tmp_path, kind):
    data = load(folder, "val")
    entries = [
        entry
        for image_id, tensors in detections(read_annotations(data.annotations), np.random.default_rng(1))
        for entry in format_results(tensors, image_id, [3, 17, 90])[kind]
    ]
    (tmp_path / "detections.json").write_text(json.dumps(entries))
    reader = by_hand(Reader, str(data.annotations))
    evaluation = COCOeval(reader, by_hand(reader.loadRes, str(tmp_path / "detections.json")), kind)
    for step in (evaluation.evaluate, evaluation.accumulate, evaluation.summarize):
        by_hand(step)
    expected = {name: score for name, score in zip(SCORES, evaluation.stats, strict=False) if score > -1}
    scores = average_precision(read_ground_truth(data, NAMES), entries, kind)
    assert scores == expected
    assert 0 < scores["AP"] < 1
    # the file has no large object
    assert "APl" not in scores


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_objects_of_a_file_are_perfect_detections(folder, kind):
    data = load(folder, "val")
    entries = []
    for _, target in (data[i] for i in range(len(data))):
        found = target | {"masks": target["masks"][:, None].float(), "scores": torch.ones(len(target["labels"]))}
        entries += format_results(found, target["image_id"], [3, 17, 90])[kind]
    assert average_precision(read_ground_truth(data, NAMES), entries, kind)["AP"] == pytest.approx(1)


def test_scenes_are_evaluated_by_their_masks():
    scenes = Scenes("val", 6, 64, view="detection")
    truth = read_ground_truth(scenes, "0123456789")
    perfect = {"bbox": [], "segm": []}
    for image, target in (scenes[i] for i in range(6)):
        assert image.shape == (3, 64, 64)
        target = target | {"masks": target["masks"][:, None].float(), "scores": torch.ones(len(target["labels"]))}
        for kind, entries in format_results(target, target["image_id"], range(1, 11)).items():
            perfect[kind] += entries
    assert average_precision(truth, perfect["bbox"], "bbox")["AP"] == average_precision(truth, perfect["segm"], "segm")["AP"] == 1
    seen = average_precision(truth, [e for e in perfect["bbox"] if e["image_id"] < 3], "bbox", image_ids=[0, 1, 2])
    assert seen["AP"] == pytest.approx(1)
    assert "APl" not in seen
    assert "APl" in average_precision(truth, perfect["bbox"], "bbox", sides=(8, 16))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.lists(st.integers(0, 1), min_size=24, max_size=80), st.integers(1, 4), st.integers(1, 3))
def test_batches_of_one_orientation(groups, world, pairs):
    """Devices get pairs of one group, except the last odd ones; one process has the same steps; an epoch repeats no image."""
    size = 2 * pairs * world
    streams = [list(TrainBatches(len(groups), size, epochs=2, seed=1, groups=groups, rank=r, world_size=world)) for r in range(world)]
    alone = list(TrainBatches(len(groups), size, epochs=2, seed=1, groups=groups))
    assert [[key for part in parts for key in part] for parts in zip(*streams, strict=True)] == alone
    assert len(alone) == 2 * (len(groups) // size)
    mixed = [[len({groups[index] for _, index in part}) > 1 for part in parts] for parts in zip(*streams, strict=True)]
    assert all(sum(parts) <= 1 for parts in mixed)
    if pairs == 1:
        assert sum(map(sum, mixed)) <= 2
    for epoch in (0, 1):
        indices = [index for batch in alone for e, index in batch if e == epoch]
        assert len(set(indices)) == len(indices) == size * (len(groups) // size)
