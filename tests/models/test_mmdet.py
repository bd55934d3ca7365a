"""The detectors with CARAFE that mmdetection publishes, against its definitions."""

import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from carafepp.models import mmdet
from carafepp.models.mmdet import faster_rcnn_carafe, load, mask_rcnn_carafe, paste_masks
from carafepp.tasks.coco_eval import format_results
from carafepp.tasks.images import read_image
from coco_files import content, write
from commands import call
from configurations import compose_config
from mmdet_by_hand import MAX_SIZE, MIN_SIZE, PROPOSALS, detect, pasted, random_state
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return random_state(masks=True)


@pytest.fixture(scope="module")
def path(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("mmdet") / "mask_rcnn_r50_fpn_carafe_1x_coco.pth"
    # as in 2020, when files were not zip archives
    content = {"meta": {"CLASSES": ("person", "bicycle"), "epoch": 12, "iter": 87960, "config": "model = dict("}, "state_dict": state}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    yield path
    path.unlink()


def small(model):
    """Images of a size for CPUs, fewer proposals."""
    model.transform.min_size, model.transform.max_size = (MIN_SIZE,), MAX_SIZE
    model.rpn._post_nms_top_n["testing"] = PROPOSALS
    return model.eval()


@pytest.fixture
def image() -> Tensor:
    """A smooth image [3, 61, 130] in 8-bit steps, whose sides are not multiples of 64 after resizing."""
    coarse = torch.rand(1, 3, 5, 4, generator=torch.Generator().manual_seed(1))
    return F.interpolate(coarse, (61, 130), mode="bicubic")[0].clamp(0, 1).mul(255).round() / 255


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert len(expected["labels"].unique()) > 10
    assert found.keys() == expected.keys()
    assert found["labels"].tolist() == expected["labels"].tolist()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_mask_rcnn_is_mmdetections(state, path, image):
    found = small(mask_rcnn_carafe(weights=path))([image])[0]
    same(found, detect(state, image, masks=True))


@torch.no_grad()
def test_faster_rcnn_is_mmdetections(state, tmp_path, image):
    path = tmp_path / "faster.pth"
    torch.save({name: value for name, value in state.items() if "mask_head" not in name}, path)
    found = small(faster_rcnn_carafe(weights=path))([image])[0]
    path.unlink()
    same(found, detect(state, image, masks=False))


def test_test_configuration_is_the_published_one():
    with torch.device("meta"):
        model = mask_rcnn_carafe().eval()
    assert (model.rpn.pre_nms_top_n(), model.rpn.post_nms_top_n(), model.rpn.nms_thresh) == (1000, 1000, 0.7)
    assert (model.roi_heads.score_thresh, model.roi_heads.nms_thresh, model.roi_heads.detections_per_img) == (0.05, 0.5, 100)
    assert not any(parameter.requires_grad for parameter in model.backbone.body.layer1.parameters())


@pytest.mark.parametrize(
    ("size", "resized", "padded"),
    # 1066.67 and 1333.33 are rounded to the nearest
    [((480, 640), (800, 1067), (832, 1088)), ((500, 334), (1198, 800), (1216, 832)), ((100, 500), (267, 1333), (320, 1344))],
)
def test_images_are_resized_and_padded_as_published(size, resized, padded):
    with torch.device("meta"):
        transform = mask_rcnn_carafe().transform.eval()
        images, _ = transform([torch.rand(3, *size)])
    assert images.image_sizes == [resized]
    assert images.tensors.shape == (1, 3, *padded)


@torch.no_grad()
def test_every_tensor_is_used_or_reported(state, tmp_path):
    path = tmp_path / "other.pth"
    torch.save(state | {"roi_head.mask_iou_head.fcs.0.weight": torch.zeros(2, 3)}, path)
    model = mask_rcnn_carafe()
    report = load(model, path)
    path.unlink()
    assert sorted(report.loaded) == sorted(model.state_dict())
    assert report.initialised == []
    unused = [name for name in report.unused if not name.endswith("num_batches_tracked")]
    assert unused == ["roi_head.mask_iou_head.fcs.0.weight"]
    assert len(report.unused) - len(unused) == sum(name.endswith("num_batches_tracked") for name in state)


def test_another_network_is_an_error(state, tmp_path):
    path = tmp_path / "faster.pth"
    torch.save({name: value for name, value in state.items() if "mask_head" not in name}, path)
    with pytest.raises(ValueError, match=r"faster.pth belongs to another network: it lacks 14 tensors, .*mask_head"):
        mask_rcnn_carafe(weights=path)
    plain = {name: value for name, value in state.items() if "upsample" not in name}
    torch.save(plain, path)
    with pytest.raises(ValueError, match=r"lacks .*upsample"):
        faster_rcnn_carafe(weights=path)
    path.unlink()


def test_masks_are_pasted_between_the_centres_of_cells():
    masks, size = torch.rand(4, 1, 28, 28), (37, 53)
    boxes = torch.tensor([[3.2, 5.1, 30.7, 31.0], [-4.0, -2.5, 60.0, 40.0], [10.0, 10.0, 10.5, 11.0], [20.3, 0.0, 53.0, 37.0]])
    torch.testing.assert_close(paste_masks(masks, boxes, size), pasted(masks, boxes, size), atol=1e-4, rtol=1e-4)
    assert paste_masks(masks[:0], boxes[:0], size).shape == (0, 1, *size)


def test_detectors_train_on_images_of_several_sizes():
    model = mask_rcnn_carafe(num_classes=4).train()
    model.transform.min_size, model.transform.max_size = (64,), 100
    target = {"boxes": torch.tensor([[4.0, 4, 30, 30]]), "labels": torch.tensor([3]), "masks": torch.ones(1, 40, 50, dtype=torch.uint8)}
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long), "masks": torch.zeros(0, 60, 40, dtype=torch.uint8)}
    losses = model([torch.rand(3, 40, 50), torch.rand(3, 60, 40)], [target, nothing])
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(module.content_encoder.weight.grad.abs().sum() > 0 for module in model.backbone.fpn.upsample)


@torch.no_grad()
def test_one_command_evaluates_the_published_file(path, tmp_path, monkeypatch):
    names = compose_config("train", "task=detection").class_names
    ids = [*range(1, 80), 90]
    made = content() | {"categories": [{"id": i, "name": name} for i, name in zip(ids, names, strict=True)]}
    root = write(tmp_path / "coco", made)
    monkeypatch.setattr(mmdet, "Transform", partial(mmdet.Transform, MIN_SIZE, MAX_SIZE))
    options = [
        f"checkpoint={path}",
        f"+data.root={root}",
        "+data.workers=0",
        "trainer.accelerator=cpu",
        "trainer.enable_progress_bar=false",
    ]
    call("eval", "published=mmdet_mask_rcnn_carafe", f"hydra.run.dir={tmp_path}/eval", *options)
    scores = json.loads((tmp_path / "eval" / "eval.json").read_text())["metrics"]
    assert {"val/box_AP", "val/box_APs", "val/mask_AP"} <= scores.keys()
    assert all(0 <= score <= 1 for score in scores.values())
    image = made["images"][0]
    pixels = pil_to_tensor(read_image(root / "val2017" / image["file_name"])).float() / 255
    expected = format_results(mask_rcnn_carafe(weights=path).eval()([pixels])[0], image["id"], ids)
    for kind, entries in expected.items():
        written = json.loads((tmp_path / "eval" / f"detections_{kind}.json").read_text())
        assert entries == [entry for entry in written if entry["image_id"] == image["id"]]
