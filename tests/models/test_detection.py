"""Detectors: torchvision's results from torchvision's weights, samplers in every slot, frozen layers."""

from functools import partial

import lightning as L
import pytest
import torch
import torch.nn as nn
import torchvision
from carafepp.models.carafe import CARAFE
from carafepp.models.detection import FasterRCNN, FixedStatistics, MaskRCNN
from carafepp.models.resnet import resnet50, tiny
from carafepp.tasks.detection import Detection
from configurations import choices, compose_config, configured_sampler
from hydra.utils import instantiate

SMALL = {"fpn_dim": 16, "head_dim": 32, "anchor_sizes": [8, 16, 32, 48, 64], "min_size": 64, "max_size": 64}


def targets(masks: bool = True, size: int = 64) -> list[dict]:
    """One image with an object, one without."""
    found = [{"boxes": torch.tensor([[8.0, 8, 40, 48]]), "labels": torch.tensor([2])}]
    found.append({"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)})
    for target in found if masks else ():
        target["masks"] = torch.zeros(len(target["labels"]), size, size, dtype=torch.uint8)
        target["masks"][:, 8:48, 8:40] = 1
    return found


def trains(model: nn.Module) -> bool:
    """Return whether one step moves every trainable parameter, on an image with an object and one without."""
    losses = model.train()([torch.rand(3, 64, 64), torch.rand(3, 64, 64)], targets())
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    return all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@torch.no_grad()
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (FasterRCNN, torchvision.models.detection.fasterrcnn_resnet50_fpn),
        (MaskRCNN, torchvision.models.detection.maskrcnn_resnet50_fpn),
    ],
)
def test_torchvisions_weights_give_torchvisions_detections(ours, theirs):
    options = {"min_size": 100, "max_size": 150, "box_score_thresh": 0.0, "rpn_post_nms_top_n_test": 50, "box_detections_per_img": 20}
    torch.manual_seed(0)
    reference = theirs(weights=None, weights_backbone=None, num_classes=5, **options).eval()
    model = ours(5, backbone=resnet50(), frozen_norm=True, trainable_layers=3, **options).eval()
    model.load_state_dict(reference.state_dict())
    images = [torch.rand(3, 90, 130), torch.rand(3, 120, 71)]
    for found, expected in zip(model(images), reference(images), strict=True):
        assert found.keys() == expected.keys()
        assert len(found["labels"]) == 20
        for name, values in expected.items():
            torch.testing.assert_close(found[name], values, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in choices("upsampler") if name != "shared"])
def test_every_upsampler_trains_in_pyramid_and_mask_head(name):
    sampler = configured_sampler("upsampler", name)
    model = MaskRCNN(4, backbone=tiny(), fpn=sampler, mask_head=sampler, mask_dim=16, mask_convs=1, **SMALL)
    assert trains(model)
    # images without objects leave the mask head without RoIs
    nothing = [target | {key: value[:0] for key, value in target.items()} for target in targets()]
    losses = model([torch.rand(3, 64, 64), torch.rand(3, 64, 64)], nothing)
    assert all(loss.isfinite() for loss in losses.values())
    found = model.eval()([torch.rand(3, 50, 64)])[0]
    assert found["masks"].shape == (len(found["labels"]), 1, 50, 64)


@pytest.mark.parametrize("name", choices("downsampler"))
def test_every_downsampler_trains_in_the_backbone(name):
    model = FasterRCNN(4, backbone=tiny(downsample=configured_sampler("downsampler", name)), **SMALL)
    assert trains(model)
    sizes = [level.shape[2:] for level in model.backbone(torch.rand(1, 3, 75, 64)).values()]
    assert sizes == [(19, 16), (10, 8), (5, 4), (3, 2), (2, 1)]


def test_boxes_stay_exact_in_mixed_precision():
    model = MaskRCNN(4, backbone=tiny(), mask_dim=16, mask_convs=1, box_score_thresh=0.0, **SMALL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert trains(model)
        found = model.eval()([torch.rand(3, 64, 64)])[0]
    assert found["boxes"].dtype == torch.float32
    # bfloat16 would leave 8 bits
    assert not found["boxes"].equal(found["boxes"].bfloat16().float())


def test_frozen_parts_stay_as_pretrained():
    backbone = tiny(downsample=configured_sampler("downsampler", "carafe"))
    model = FasterRCNN(4, backbone=backbone, trainable_layers=3, frozen_norm=True, **SMALL)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    assert trains(model)
    optimizer.step()
    moved = {name.removeprefix("backbone.body.") for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert not any(name.startswith(("conv1", "bn1", "maxpool", "layer1")) for name in moved)
    assert not any("bn" in name or "compressor_norm" in name or "running" in name for name in moved)
    assert {"layer2.0.conv1.weight", "layer2.0.sampler.content_encoder.weight", "layer4.0.conv3.weight"} <= moved


@pytest.mark.parametrize(("trainable", "pretrained", "warns"), [(3, False, True), (3, True, False), (5, False, False)])
def test_training_warns_of_layers_frozen_at_random_weights(tmp_path, caplog, trainable, pretrained, warns):
    torch.save(tiny().state_dict(), tmp_path / "weights.pth")
    backbone = tiny(weights=tmp_path / "weights.pth" if pretrained else None)
    model = partial(FasterRCNN, backbone=backbone, trainable_layers=trainable, **SMALL)
    task = Detection(model, class_names=["a"], optimizer=torch.optim.SGD, schedule=torch.optim.lr_scheduler.PolynomialLR)
    task.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    task.on_fit_start()
    assert ("backbone.weights=FILE" in caplog.text) == warns


@pytest.mark.parametrize(
    ("trainable", "parts"),
    [
        (0, set()),
        (2, {"layer3", "layer4"}),
        (4, {"layer1", "layer2", "layer3", "layer4"}),
        (5, {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}),
    ],
)
def test_layers_are_frozen_from_the_first(trainable, parts):
    model = FasterRCNN(4, backbone=tiny(), trainable_layers=trainable, **SMALL)
    trained = {name.split(".")[0] for name, parameter in model.backbone.body.named_parameters() if parameter.requires_grad}
    assert trained == parts


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"trainable_layers": 6}, ValueError, "trainable_layers must be in 0..5, got 6"),
        ({"box_scores_thresh": 0.1, "mask_dim": 8}, TypeError, "FasterRCNN has no option box_scores_thresh, mask_dim"),
    ],
)
def test_wrong_options_are_errors(options, error, message):
    with pytest.raises(error, match=message):
        FasterRCNN(4, backbone=tiny(), **options)


def test_published_mask_head_has_a_relu_and_samplers_have_none():
    published, carafe = (MaskRCNN(4, backbone=tiny(), mask_head=head, **SMALL) for head in (None, partial(CARAFE, up=2)))
    assert isinstance(published.roi_heads.mask_predictor.conv5_mask, nn.ConvTranspose2d)
    assert isinstance(published.roi_heads.mask_predictor.relu, nn.ReLU)
    assert isinstance(carafe.roi_heads.mask_predictor.conv5_mask, CARAFE)
    assert isinstance(carafe.roi_heads.mask_predictor.relu, nn.Identity)


def test_fixed_statistics_train_scale_and_shift_alone():
    model = FasterRCNN(4, backbone=tiny(), trainable_layers=3, frozen_norm="statistics", **SMALL)
    before = {name: value.clone() for name, value in model.backbone.body.state_dict().items()}
    assert trains(model)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    moved = {name for name, value in model.backbone.body.state_dict().items() if not value.equal(before[name])}
    assert {"layer2.0.bn1.weight", "layer4.0.bn3.bias"} <= moved
    assert not any("running" in name or "num_batches" in name or name.startswith(("bn1", "layer1")) for name in moved)
    # the state dict is that of a backbone with plain norms
    assert before.keys() == tiny().state_dict().keys()
    with pytest.raises(ValueError, match="frozen_norm must be true, false or \"statistics\", got 'affine'"):
        FasterRCNN(4, backbone=tiny(), frozen_norm="affine", **SMALL)


def test_anchors_across_the_border_do_not_train_the_proposals():
    model = FasterRCNN(4, backbone=tiny(), allowed_border=0, **SMALL)
    plain = FasterRCNN(4, backbone=tiny(), **SMALL)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert trains(model)
    # inside, across the left border, and across the border of a smaller image in its padding
    anchors = torch.tensor([[0.0, 0, 31, 39], [-1, 0, 30, 39], [30, 30, 50, 40], [0, 0, 8, 8]])
    target = {"boxes": torch.tensor([[0.0, 0, 30, 40]])}
    model.rpn.sizes = [(64, 48)]
    (labels,), (boxes,) = model.rpn.assign_targets_to_anchors([anchors], [target])
    assert labels.tolist() == [1, -1, -1, 0]
    assert boxes[0].equal(target["boxes"][0])
    (everywhere,), _ = plain.rpn.assign_targets_to_anchors([anchors], [target])
    assert everywhere.tolist() == [1, 1, 0, 0]
    # a few pixels may be allowed
    model.rpn.allowed_border = 2
    assert model.rpn.assign_targets_to_anchors([anchors], [target])[0][0].tolist() == [1, 1, -1, 0]
    # an image smaller than every anchor trains nothing
    model.rpn.allowed_border, model.rpn.sizes = 0, [(4, 4)]
    assert model.rpn.assign_targets_to_anchors([anchors], [target])[0][0].tolist() == [-1] * 4


def test_protocol_of_mmdetection():
    config = compose_config("train", "experiment=table4", "row=table4/nearest", "data.root=FOLDER", "protocol=mmdet", "backbone=tiny")
    assert (config.trainer.gradient_clip_val, config.trainer.gradient_clip_algorithm) == (35, "norm")
    task = instantiate(config.task)
    assert task.model.rpn.allowed_border == 0
    assert isinstance(task.model.backbone.body.layer3[0].bn2, FixedStatistics)
    (group,) = task.parameter_groups()
    trained = [parameter for parameter in task.parameters() if parameter.requires_grad]
    assert len(group["params"]) == len(trained)
    assert any(parameter.ndim == 1 for parameter in group["params"])
    assert "weight_decay" not in group, "every parameter has the decay of the optimizer"
    assert task.optimizer.keywords["weight_decay"] == 0.0001
