"""The classifier that a backbone starts from: found by the name of its row, refused if it is missing or ambiguous, loaded aloud."""

import json

import lightning as L
import pytest
import torch
from carafepp.models.resnet import tiny
from carafepp.tasks.pretrained import find_classifier
from carafepp.tasks.segmentation import Segmentation
from configurations import CONF, compose_config
from hydra.utils import instantiate
from networks import NORMED_CARAFE
from omegaconf import OmegaConf
from torch import nn


def write_classifier(folder, row, finished=True, seed=0, **options):
    """Write what a run of a classifier leaves that others need; return its network."""
    folder.mkdir(parents=True)
    network = tiny(num_classes=10, **options)
    torch.save({"state_dict": {f"model.{name}": tensor for name, tensor in network.state_dict().items()}}, folder / "best.ckpt")
    if finished:
        (folder / "result.json").write_text(json.dumps({"choices": {"row": row}, "seed": seed}))
    return network


def build_backbone(*overrides):
    """Build the backbone of a small run with these overrides, as a sweep would."""
    return instantiate(OmegaConf.to_container(compose_config("train", "scale=small", *overrides).backbone, resolve=True))


def test_every_row_of_a_sweep_starts_from_its_own_classifier(tmp_path):
    plain = write_classifier(tmp_path / "sweep" / "0", "table2/resnet50")
    carafe = write_classifier(tmp_path / "sweep" / "1", "table2/resnet50_carafe", downsample=NORMED_CARAFE)
    for row, classifier in {"published": plain, "fpn": plain, "backbone": carafe, "fpn_backbone": carafe}.items():
        backbone = build_backbone("experiment=table5", f"row=table5/{row}", f"weights_root={tmp_path}")
        expected = classifier.state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in backbone.state_dict().items())
        assert not backbone.untrained


@pytest.mark.parametrize("name", ["resnet50.pth", "resnet50-0676ba61.pth", "more/resnet50.ckpt"])
def test_files_are_found_by_the_name_of_the_row(tmp_path, name):
    for other in ("resnet50_carafe.pth", "resnet101-63fe2227.pth", "resnet50.txt", name):
        (tmp_path / other).parent.mkdir(exist_ok=True)
        torch.save(tiny().state_dict(), tmp_path / other)
    assert find_classifier(tmp_path, "table2/resnet50") == tmp_path / name


def test_missing_classifier_is_answered_with_the_command_that_trains_it(tmp_path):
    write_classifier(tmp_path / "unfinished", "table2/resnet50_carafe", finished=False)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "result.json").write_text("{")
    command = "carafepp-train experiment=table2 row=table2/resnet50_carafe data.root=IMAGENET"
    with pytest.raises(FileNotFoundError, match=f"no finished run of table2/resnet50_carafe and no file resnet50_carafe.pth.*{command}"):
        find_classifier(tmp_path, "table2/resnet50_carafe")
    with pytest.raises(Exception, match=command):
        build_backbone("experiment=table5", "row=table5/backbone", f"weights_root={tmp_path}")
    with pytest.raises(FileNotFoundError, match=r"weights_root=.*nowhere is not a folder"):
        find_classifier(tmp_path / "nowhere", "table2/resnet50")


def test_among_classifiers_of_several_seeds_a_run_starts_from_that_of_its_own(tmp_path):
    classifiers = [write_classifier(tmp_path / str(seed), "table2/resnet50", seed=seed) for seed in (0, 1)]
    for seed, classifier in enumerate(classifiers):
        backbone = build_backbone("experiment=table5", f"weights_root={tmp_path}", f"seed={seed}")
        assert torch.equal(backbone.conv1.weight, classifier.conv1.weight)
    # a single one serves every seed
    assert find_classifier(tmp_path / "0", "table2/resnet50", 7) == tmp_path / "0" / "best.ckpt"


def test_two_classifiers_of_one_row_are_refused(tmp_path):
    for name in "01":
        write_classifier(tmp_path / name, "table2/resnet50", seed=3)
    for seed, number in ((None, 0), (0, 0), (3, 2)):
        told = rf"holds 2 classifiers table2/resnet50, of which {number} have seed={seed}: .*0/best\.ckpt, .*1/best\.ckpt"
        with pytest.raises(ValueError, match=told):
            find_classifier(tmp_path, "table2/resnet50", seed)


def test_a_folder_without_a_row_is_refused(tmp_path):
    assert find_classifier(None, None) is find_classifier(None, "table2/resnet50") is None
    with pytest.raises(ValueError, match="needs pretraining=ROW"):
        find_classifier(tmp_path, None)


def test_a_file_replaces_the_folder(tmp_path):
    classifier = tiny(num_classes=10)
    torch.save(classifier.state_dict(), tmp_path / "mine.pth")
    backbone = build_backbone("experiment=table5", "row=table5/published", f"backbone.weights={tmp_path / 'mine.pth'}")
    assert torch.equal(backbone.conv1.weight, classifier.conv1.weight)


def test_rows_start_from_rows_that_exist():
    named = {str(OmegaConf.load(path).get("pretraining")) for group in ("row", "experiment") for path in (CONF / group).rglob("*.yaml")}
    found = {row for row in named if row != "None"}
    assert {"table2/resnet50", "table2/resnet101_carafe", "pretraining/resnet50_lip", "pretraining/resnet101_deep_carafe"} <= found
    assert all((CONF / "row" / f"{row}.yaml").is_file() for row in found)


@pytest.mark.parametrize("table", ["table1", "table3", "table5", "table7", "table8", "table9"])
def test_a_row_starts_from_a_classifier_of_its_own_backbone(table):
    for path in (CONF / "row" / table).glob("*.yaml"):
        config = compose_config("train", f"experiment={table}", f"row={table}/{path.stem}", "data.root=FOLDER")
        start = compose_config("train", f"experiment={config.pretraining.split('/')[0]}", f"row={config.pretraining}", "data.root=FOLDER")
        backbones = [OmegaConf.to_container(each.backbone, resolve=True) for each in (config, start)]
        for backbone in backbones:
            # the classifier trains without dilation and deformation, whose own weights start at zero
            for key in ("_partial_", "weights", "output_stride", "deformable", "zero_init_residual"):
                backbone.pop(key, None)
        assert backbones[0] == backbones[1], path.stem


def test_weights_without_the_samplers_are_loaded_with_a_warning(tmp_path, caplog):
    torch.save(tiny(num_classes=10).state_dict(), tmp_path / "plain.pth")
    tiny(weights=tmp_path / "plain.pth")
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    backbone = tiny(downsample=NORMED_CARAFE, weights=tmp_path / "plain.pth")
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "plain.pth has no weights for" in record.message
    for layer in ("maxpool.channel_compressor", "layer2.0.sampler.content_encoder", "layer4.0.shortcut_sampler.compressor_norm"):
        assert layer in record.message
    assert "maxpool.content_encoder.weight" in backbone.untrained


@pytest.mark.parametrize(("pretrained", "intended", "warns"), [(False, False, True), (True, False, False), (False, True, False)])
def test_segmentation_warns_of_a_random_backbone(tmp_path, caplog, pretrained, intended, warns):
    torch.save(tiny().state_dict(), tmp_path / "weights.pth")

    def model(num_classes: int) -> nn.Module:
        network = nn.Conv2d(3, num_classes, 1)
        network.backbone = tiny(weights=tmp_path / "weights.pth" if pretrained else None)
        return network

    task = Segmentation(model, class_names=["a", "b"], optimizer=torch.optim.SGD, schedule=None, from_scratch=intended)
    task.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    task.on_fit_start()
    assert ("weights_root=FOLDER or backbone.weights=FILE" in caplog.text) == warns


def test_detection_warns_of_frozen_samplers_that_no_file_gave(tmp_path, caplog):
    torch.save(tiny(num_classes=10).state_dict(), tmp_path / "resnet50.pth")
    overrides = ["experiment=table5", "row=table5/backbone", "scale=small", f"weights_root={tmp_path}", "pretraining=table2/resnet50"]
    task = instantiate(compose_config("train", *overrides, "model.trainable_layers=3").task)
    task.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    caplog.clear()
    task.on_fit_start()
    assert "layers of the backbone stay frozen at random weights (maxpool)" in caplog.text
