"""Detection: the paper's protocol on files in COCO's format, exact resumption, scores by several processes, pictures of any size."""

import contextlib
import csv
import io
import json
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from carafepp.models.detection import MaskRCNN
from carafepp.models.resnet import tiny
from carafepp.scripts.running.train import train
from carafepp.tasks.class_pictures import draw_scores
from carafepp.tasks.coco import COCO
from carafepp.tasks.coco_eval import SCORES
from carafepp.tasks.data import Data
from carafepp.tasks.detection import Detection, collate
from carafepp.tasks.optimization import stepped
from carafepp.tasks.pictures import draw_instances, pick_colors, write_note
from carafepp.tasks.runs import count_flops
from carafepp.tasks.scenes import Scenes
from carafepp.tasks.sheets import TILE
from coco_files import NAMES, SIZES, content, write
from omegaconf import OmegaConf
from PIL import Image
from pycocotools.coco import COCO as Reader
from pycocotools.cocoeval import COCOeval
from torch import nn
from torch.optim.lr_scheduler import PolynomialLR
from torchvision.transforms.v2.functional import pil_to_tensor
from training import read_result, train_in

TINY = ["task=detection", "model=mask_rcnn", "model.fpn_dim=8", "model.head_dim=16", "model.box_batch_size_per_image=8"]
TINY += ["model.rpn_post_nms_top_n_train=20", "model.rpn_post_nms_top_n_test=20", "log_every_n_steps=1"]
TINY += ["trainer.accelerator=cpu", "trainer.enable_progress_bar=false"]


def small_network(num_classes=11, **options):
    settings = {"fpn_dim": 8, "head_dim": 16, "mask_dim": 8, "mask_convs": 1, "min_size": 64, "max_size": 64}
    settings |= {"rpn_post_nms_top_n_test": 20, "box_detections_per_img": 5, "box_score_thresh": 0.0}
    return MaskRCNN(num_classes, backbone=tiny(), **(settings | options))


def detection(model=small_network, class_names="0123456789", **options):
    return Detection(model, class_names=list(class_names), optimizer=torch.optim.SGD, schedule=PolynomialLR, **options).eval()


class Oracle(nn.Module):
    """A detector that knows the scenes and finds their digits with a small offset."""

    def __init__(self, scenes: Scenes):
        super().__init__()
        self.targets = {image.sum().item(): target for image, target in (scenes[i] for i in range(len(scenes)))}
        self.roi_heads = SimpleNamespace(has_mask=lambda: True)

    def forward(self, images, targets=None):
        return [self.found(self.targets[image.sum().item()]) for image in images]

    def found(self, target):
        generator = torch.Generator().manual_seed(target["image_id"])
        noise = torch.randn(target["boxes"].shape, generator=generator)
        masks = target["masks"].roll(int(noise[0, 0] * 2), -1)[:, None].float()
        scores = torch.rand(len(noise), generator=generator) / 2 + 0.5
        return {"boxes": target["boxes"] + 2 * noise, "labels": target["labels"], "scores": scores, "masks": masks}


def trainer(folder, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False}
    return L.Trainer(accelerator="cpu", default_root_dir=folder, use_distributed_sampler=False, **quiet, **options)


def by_hand(annotations, detections, kind):
    """AP, AP50, ... of two files, computed by pycocotools."""
    with contextlib.redirect_stdout(io.StringIO()):
        reader = Reader(str(annotations))
        evaluation = COCOeval(reader, reader.loadRes(str(detections)), kind)
        for step in (evaluation.evaluate, evaluation.accumulate, evaluation.summarize):
            step()
    return {name: score for name, score in zip(SCORES, evaluation.stats, strict=False) if score > -1}


def test_protocol_runs_on_coco_files(tmp_path):
    root = write(tmp_path / "coco")
    folder = train_in(
        tmp_path / "run",
        *(*TINY, "backbone=tiny", "model.min_size=64", "model.max_size=96", f"data.root={root}", f"class_names=[{','.join(NAMES)}]"),
        *("data.batch_size=2", "data.epochs=2", "data.workers=0", "trainer.val_check_interval=1.0", "task.flops_size=[48,64]"),
        # an untrained network finds something
        "+model.box_score_thresh=0.0",
    )
    found = read_result(folder)
    assert found["steps"] == 2
    assert found["flops_input"] == [3, 48, 64]
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        expected = by_hand(root / "annotations" / "instances_val2017.json", folder / f"detections_{kind}.json", kind)
        expected = {f"val/{name}_{score}": value for score, value in expected.items()}
        scores = {key: value for key, value in found["metrics"].items() if key.startswith(f"val/{name}_")}
        assert scores == pytest.approx(expected, rel=1e-6)
    assert (folder / "pictures.png").exists()
    rows = list(csv.DictReader((folder / "per_class.csv").read_text().splitlines()))
    assert [(row["class"], row["objects"]) for row in rows] == [("car", "2"), ("cat", "1"), ("brush", "1")]
    for row in rows:
        row |= {"box_AP": float(row["box_AP"]), "mask_AP": float(row["mask_AP"]), "objects": int(row["objects"])}
    with Image.open(folder / "per_class.png") as picture:
        assert torch.equal(pil_to_tensor(picture), (255 * draw_scores(rows)).round().byte())


def test_training_that_was_cut_off_continues_bit_identically(tmp_path, monkeypatch):
    small = [*TINY, "scale=small", "data.train.length=16", "data.val.length=4", "data.batch_size=4", "data.epochs=2", "model.min_size=64"]
    small += ["checkpoint_every_n_steps=3", "trainer.val_check_interval=0.5", "model.max_size=64"]
    whole = train_in(tmp_path / "whole", *small)
    step = Detection.training_step

    def cut_off(self, batch, batch_idx):
        if batch_idx == 5:
            raise KeyError("the power fails")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Detection, "training_step", cut_off)
    with pytest.raises(KeyError):
        train_in(tmp_path / "cut", *small)
    monkeypatch.setattr(Detection, "training_step", step)
    folder = tmp_path / "cut"
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 4
    train(OmegaConf.load(folder / "config.yaml"), folder)
    assert read_result(folder)["weights_sha256"] == read_result(whole)["weights_sha256"]
    assert (folder / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()
    assert (folder / "detections_segm.json").read_text() == (whole / "detections_segm.json").read_text()


def test_two_processes_score_as_one(tmp_path):
    scenes = Scenes("val", 7, 64, view="detection")
    found, threads = [], torch.get_num_threads()
    # forked processes must not wait for their parent's threads
    torch.set_num_threads(1)
    for options in ({"devices": 1}, {"devices": 2, "strategy": "ddp_fork"}):
        folder = tmp_path / str(options["devices"])
        folder.mkdir()
        data = Data(None, scenes, batch_size=1, epochs=1, val_batch_size=2, collate=collate)
        scores = trainer(folder, **options).validate(detection(lambda num_classes: Oracle(scenes)), data, verbose=False)[0]
        entries = json.loads((folder / "detections_segm.json").read_text())
        found.append((scores, sorted(entries, key=lambda entry: (entry["image_id"], entry["score"]))))
    torch.set_num_threads(threads)
    assert found[0] == found[1]
    assert {entry["image_id"] for entry in found[0][1]} == set(range(7))
    assert 0.1 < found[0][0]["val/box_AP"] < 1
    assert 0.1 < found[0][0]["val/mask_AP"] < 1


def test_images_without_annotations_leave_a_file_to_submit(tmp_path):
    made = content()
    del made["annotations"]
    root = write(tmp_path / "coco", made)
    val = COCO(root / "annotations" / "instances_val2017.json", root / "val2017", NAMES)
    task = detection(class_names=NAMES)
    scores = trainer(tmp_path).validate(task, Data(None, val, batch_size=1, epochs=1, collate=collate), verbose=False)
    assert scores == [{}]
    entries = json.loads((tmp_path / "detections_bbox.json").read_text())
    assert {entry["image_id"] for entry in entries} == set(SIZES)
    assert {entry["category_id"] for entry in entries} <= {3, 17, 90}
    assert all(set(entry) == {"image_id", "category_id", "bbox", "score"} for entry in entries)
    assert all(
        set(e) == {"image_id", "category_id", "segmentation", "score"} for e in json.loads((tmp_path / "detections_segm.json").read_text())
    )


@pytest.mark.parametrize(
    ("lost", "message"),
    [("segmentation", "predicts masks, and the annotations have none"), ("object", "has no objects, so that detections cannot be scored")],
)
def test_what_a_training_needs_is_missed_before_it_begins(tmp_path, lost, message):
    bare = content()
    for annotation in bare["annotations"]:
        annotation |= {"segmentation": None} if lost == "segmentation" else {"iscrowd": 1}
    train, val = write(tmp_path / "train"), write(tmp_path / "val", bare)
    sets = (
        COCO(root / "annotations" / "instances_train2017.json", root / "train2017", NAMES, train=root is train) for root in (train, val)
    )
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path).fit(detection(class_names=NAMES), Data(*sets, batch_size=2, epochs=1, collate=collate))


@pytest.mark.parametrize("size", [(37, 53), (16, 16), (400, 31)])
def test_pictures_of_any_size(size):
    scenes = Scenes("val", 2, (64, 48), view="detection")
    task = detection(lambda num_classes: Oracle(scenes))
    image, target = scenes[1]
    pictures = task.pictures((image, target))
    # enlarged fivefold
    assert {name: tuple(picture.shape) for name, picture in pictures.items()} == dict.fromkeys(pictures, (3, TILE, 240))
    inside = target["masks"].any(0).repeat_interleave(5, 0).repeat_interleave(5, 1)
    assert ((pictures["truth"] - pictures["image"]).abs().amax(0)[inside] > 0.01).float().mean() > 0.9
    assert not torch.equal(pictures["prediction"], pictures["truth"])
    drawn = detection().draw(torch.rand(3, *size))
    assert max(drawn.shape) >= TILE
    assert drawn.shape[1] * size[1] == drawn.shape[2] * size[0]


def test_objects_have_the_colours_of_their_classes():
    names = ["cat", "dog", "car"]
    task = detection(class_names=names)
    boxes = torch.tensor([[0.0, 40, 30, 90], [40, 40, 70, 90], [80, 40, 110, 90]])
    masks = torch.zeros(3, 1, 100, 120)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[0, top:bottom, left:right] = 1
    found = {"boxes": boxes, "labels": torch.tensor([3, 1, 3]), "scores": torch.tensor([0.9, 0.8, 0.7]), "masks": masks}
    # enlarged threefold
    drawn = task.draw(torch.zeros(3, 100, 120), found | {"image_size": torch.tensor([100, 120])})
    colors = torch.tensor(pick_colors(3)) / 255
    for box, label in zip(boxes.int().tolist(), (2, 0, 2), strict=True):
        inside = drawn[:, 3 * box[1] + 30, 3 * box[0] + 40]
        torch.testing.assert_close(inside, 0.6 * colors[label], atol=0.01, rtol=0)
        # the outline is opaque
        torch.testing.assert_close(drawn[:, 3 * box[1] + 30, 3 * box[0] + 1], colors[label], atol=0.01, rtol=0)


def test_the_best_detection_is_drawn_on_top():
    masks = torch.zeros(2, 40, 60, dtype=torch.bool)
    masks[0, 20:30, 20:40] = masks[1, 20:38, 10:50] = True
    boxes = torch.tensor([[2.0, 18, 58, 39], [4, 19, 57, 38]])
    drawn = draw_instances(torch.full((3, 40, 60), 0.2), boxes, ["", ""], [(255, 0, 0), (0, 0, 255)], masks)
    assert drawn[:, 25, 30].tolist() == pytest.approx([0.68, 0.08, 0.08], abs=0.01)
    assert drawn[:, 34, 30].tolist() == pytest.approx([0.08, 0.08, 0.68], abs=0.01)
    named = draw_instances(torch.zeros(3, 80, 120), 2 * boxes[:1], ["long: 0.50"], [(255, 255, 0)])
    # the name is above its box and inside the picture
    assert named[0, :36].any(0).sum() > 80
    assert not named[0, 42:72, 12:108].any()


@pytest.mark.parametrize("scores", [[], [0.31, 0.2]], ids=["none", "low"])
def test_an_image_without_a_detection_to_draw_says_so(scores, monkeypatch):
    notes = []
    monkeypatch.setattr("carafepp.tasks.detection.write_note", lambda image, text: notes.append(text) or write_note(image, text))
    n = len(scores)
    found = {"boxes": torch.rand(n, 4), "labels": torch.ones(n, dtype=torch.long), "scores": torch.tensor(scores)}
    drawn = detection(class_names=["cat"]).draw(torch.zeros(3, 100, 120), found | {"image_size": torch.tensor([100, 120])})
    assert notes == ["no score >= 0.5, best 0.31" if scores else "no score >= 0.5"]
    assert drawn.shape == (3, 300, 360)
    # black on white in the corner, and the image elsewhere
    assert drawn[:, 0, 0].tolist() == [1, 1, 1]
    assert not drawn[:, 60:].any()


def test_flops_depend_on_the_network_alone():
    """FLOPs depend neither on the image, nor on the weights, nor on the number of objects that the network finds."""
    image = torch.rand(3, 64, 64)
    first, second = (count_flops(detection(), image) for _ in range(2))
    assert first == second == count_flops(detection(lambda num_classes: small_network(box_score_thresh=0.99)), torch.zeros(3, 64, 64))
    more = count_flops(detection(lambda num_classes: small_network(box_detections_per_img=6)), image)
    # a mask: one 3x3 convolution of 8 channels on 14 x 14, the deconvolution to 28 x 28 and its 11 classes
    assert more - first == 2 * (14**2 * 8 * 8 * 9 + 28**2 * 8 * 8 + 28**2 * 8 * 11)


def test_schedule_of_the_paper():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.02)
    schedule = stepped(optimizer, total_iters=24000)
    (factor,) = schedule.lr_lambdas
    rates = [factor(step) for step in (0, 250, 500, 15999, 16000, 21999, 22000, 24000)]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, 1, 0.1, 0.1, 0.01, 0.01])
