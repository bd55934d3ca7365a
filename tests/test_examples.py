"""The scripts of examples/ run as they are, in a few steps, and stay short."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import onnxruntime
import pytest
import torch
from carafepp.models.carafe import CARAFE
from PIL import Image

FOLDER = Path(__file__).parent.parent / "examples"
LONGEST = 80


def load(name: str) -> ModuleType:
    """Import a script by the name of its file."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_scripts_are_short(path):
    assert len(path.read_text().splitlines()) <= LONGEST


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load("torchvision_segmentation")


def test_torchvision_segmentation_resamples_with_carafe_only(script, capsys):
    network = script.Network(num_classes=2)
    samplers = [name for name, module in network.named_modules() if isinstance(module, CARAFE)]
    backbone = [f"lraspp.backbone.{name}" for name in ("maxpool", "layer2.0.conv1.sampler", "layer2.0.downsample.0.sampler")]
    assert samplers == [*backbone, "lraspp.classifier.interpolate_0.sampler", "lraspp.interpolate_0.sampler"]
    reports = capsys.readouterr().out
    # the only place that is not replaced is the convolution that reads the image
    assert "not replaced: backbone.conv1" in reports.split("not replaced: interpolate_0")[1]
    assert network(torch.rand(2, 3, 64, 64)).shape == (2, 2, 64, 64)


# most of its time is the export
@pytest.mark.slow
def test_torchvision_segmentation_writes_its_files(script, tmp_path):
    script.main(steps=1, folder=tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["figure.png", "network.onnx"]
    figure = np.asarray(Image.open(tmp_path / "new" / "figure.png").convert("RGB"), dtype=int)
    # three rows of four tiles of 5 x 64 pixels under titles, with a legend below two of them
    assert figure.shape[0] > 3 * 320
    assert 4 * 320 < figure.shape[1] < 4 * 340
    sources = figure[:, 3 * figure.shape[1] // 4 :]
    # in each row, a dot of 3 x 3 pixels and its sources
    dots = (abs(sources - (76, 204, 255)) <= 1).all(2)
    assert dots.sum() == 3 * 15 * 15
    red, green, blue = sources.transpose(2, 0, 1)
    assert ((red - np.maximum(green, blue)) > 50).sum() > 3 * 15 * 15
    session = onnxruntime.InferenceSession(tmp_path / "new" / "network.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: np.zeros((1, 3, 64, 64), np.float32)})
    assert logits.shape == (1, 2, 64, 64)
