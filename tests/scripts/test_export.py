"""`carafepp-export`: files of every task and format agree with their network and hold what a program must know; a wrong one is not left."""

import importlib.util
import json
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from carafepp.scripts.common.checkpoints import load_task
from carafepp.scripts.exporting import formats
from carafepp.scripts.exporting.checks import TOLERANCES, compare, make_inputs, run_network
from carafepp.scripts.exporting.sizes import read_ranges
from carafepp.tasks.classification import Classification
from carafepp.tasks.exportable import Normalized
from carafepp.tasks.task import Task
from commands import call, run_after_torch, run_line
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from torch import nn
from training import TASKS, configure_run

UP = {"_target_": "carafepp.models.carafe.CARAFE", "_partial_": True, "up": 2, "kernel_size": 3}
# few samplers in each network: the time to export grows with the number of operators
SLOTS = {"segmentation": "fpn", "detection": "fpn", "inpainting": "upsample"}
RANGE = ["height=[65,160]", "width=[65,160]", "batch=[1,3]"]


def write_checkpoint(path: Path, task: str) -> Path:
    """Write a checkpoint as carafepp-train does, of random weights and statistics."""
    torch.manual_seed(0)
    cfg = configure_run(*TASKS[task])
    if task in SLOTS:
        cfg.task.model[SLOTS[task]] = UP
    if task == "classification":
        cfg.task.model = {"_target_": "networks.small_classifier", "_partial_": True}
    built = instantiate(cfg.task)
    for name, tensor in built.model.state_dict().items():
        if "running_var" in name:
            tensor.uniform_(0.5, 1.5)
        elif tensor.is_floating_point():
            tensor.add_(0.05 * torch.randn_like(tensor))
    torch.save({"config": OmegaConf.to_container(cfg), "state_dict": built.state_dict()}, path)
    return path


@dataclass
class Exported:
    """An exported file, and the network of its checkpoint."""

    task: Task
    path: Path
    report: dict

    @property
    def facts(self) -> dict:
        return self.report["facts"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Path of the checkpoint of a task."""
    folder, written = tmp_path_factory.mktemp("checkpoints"), {}

    def find(task: str) -> Path:
        if task not in written:
            written[task] = write_checkpoint(folder / f"{task}.ckpt", task)
        return written[task]

    return find


@pytest.fixture(scope="module")
def export(checkpoint, tmp_path_factory):
    """Run `carafepp-export` once for these arguments."""
    done = {}

    def run(task: str, *arguments: str) -> Exported:
        key = (task, *arguments)
        if key not in done:
            folder = tmp_path_factory.mktemp("export")
            call("export", f"checkpoint={checkpoint(task)}", "trust=networks", *arguments, f"hydra.run.dir={folder}")
            (path,) = folder.glob("network.*")
            done[key] = Exported(load_task(checkpoint(task), trust="networks")[0], path, json.loads((folder / "export.json").read_text()))
        return done[key]

    return run


def read_onnx(path: Path) -> dict:
    model = pytest.importorskip("onnx").load(str(path))
    return json.loads({entry.key: entry.value for entry in model.metadata_props}["carafepp"])


def read_program(path: Path) -> dict:
    extra = {"carafepp.json": ""}
    torch.export.load(str(path), extra_files=extra)
    return json.loads(extra["carafepp.json"])


def expect(exported: Exported, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Compute the outputs with the task itself."""
    with torch.no_grad():
        if exported.facts["task"] == "detection":
            images = torch.stack([exported.task.model.transform.normalize(image) for image in inputs[0]])
            return list(exported.task.model.backbone(images).values())
        return [exported.task(*inputs)]


INPUTS = {"inpainting": {"images": 3, "masks": 1}}
STRIDES = {
    "segmentation": {"logits": 4},
    "classification": {},
    "inpainting": {"filled": 1},
    "detection": {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64},
}


def assert_agrees(exported: Exported, read, tolerance: float, *sizes: tuple[int, int, int]) -> None:
    run = read(exported.path.read_bytes())
    for size in sizes:
        inputs = make_inputs(INPUTS.get(exported.facts["task"], {"images": 3}), size, seed=1)
        dtype = {"float32": torch.float32, "float16": torch.float16}[exported.facts["dtype"]]
        found = run([value.to(dtype) for value in inputs])
        for actual, expected in zip(found, expect(exported, inputs), strict=True):
            assert actual.shape == expected.shape
            assert (actual.double() - expected.double()).abs().max() <= tolerance * expected.abs().max()


def assert_facts(exported: Exported, found: dict, task: str) -> None:
    assert found == exported.facts
    assert found["task"] == task
    assert found["strides"] == STRIDES[task]
    assert found["versions"].keys() == {"carafepp", "torch"}
    assert len(found["configuration"]) == 64
    assert found["outputs"].keys() == (STRIDES[task] or {"logits": 0}).keys()
    if task != "inpainting":
        assert (found["mean"], found["std"]) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    if task in ("segmentation", "detection"):
        assert found["class_names"] == exported.task.class_names
    if task == "detection":
        assert found["part"] == "backbone and feature pyramid"
    if task == "classification":
        assert found["classes"] == 10


@pytest.mark.parametrize("task", TASKS)
def test_program_of_every_task_at_any_size(export, task):
    exported = export(task, "format=pt2", *RANGE)
    assert_facts(exported, read_program(exported.path), task)
    assert exported.facts["requires"] == ["carafepp.kernels"]
    checked = {(row["batch"], row["height"], row["width"]) for row in exported.report["differences"]}
    assert {(1, 65, 65), (3, 65, 65), (1, 160, 160)} < checked
    assert any(65 < height < 160 and 65 < width < 160 for _, height, width in checked)
    assert all(row["relative"] <= 1e-5 for row in exported.report["differences"])
    assert_agrees(exported, formats.FORMATS["pt2"].read, 1e-5, (2, 96, 128), (1, 71, 130))
    assert not list(exported.path.parent.glob(".*"))


BLOCKED = """
import sys
class Block:
    def find_spec(self, name, *rest):
        if name.split(".")[0] == "carafepp":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
import torch
run = torch.export.load(sys.argv[1]).module()
images, expected = torch.load(sys.argv[2])
difference = (run(images) - expected).abs().max() / expected.abs().max()
assert difference < 1e-5, difference
assert not [name for name in sys.modules if name.startswith("carafepp")]
"""


def test_decomposed_program_needs_no_carafepp(export, tmp_path):
    exported = export("classification", "format=pt2", "decompose=true", *RANGE)
    assert exported.facts["requires"] == []
    images = torch.rand(2, 3, 97, 130)
    torch.save((images, exported.task(images).detach()), tmp_path / "expected.pt")
    code = BLOCKED.replace("sys.argv[1]", repr(str(exported.path))).replace("sys.argv[2]", repr(str(tmp_path / "expected.pt")))
    run_after_torch(code)


def test_program_needs_the_import_that_the_command_names(export, capsys, checkpoint, tmp_path):
    call("export", f"checkpoint={checkpoint('classification')}", "trust=networks", "format=pt2", "size=64", f"hydra.run.dir={tmp_path}")
    assert "must first run: import carafepp.kernels" in capsys.readouterr().out
    path = tmp_path / "network.pt2"
    load = f"import torch\nprint(torch.export.load({str(path)!r}).module()(torch.rand(1, 3, 64, 64)).shape)"
    assert "torch.Size([1, 10])" in run_after_torch("import carafepp.kernels\n" + load).stdout
    with pytest.raises(AssertionError, match=r"failed to resolve torch\.ops\.carafepp"):
        run_after_torch("import carafepp\n" + load)


@pytest.mark.parametrize("task", TASKS)
def test_onnx_file_of_every_task(export, task):
    pytest.importorskip("onnxscript", reason="needs the extra `export`")
    pytest.importorskip("onnxruntime", reason="needs the extra `export`")
    sizes = RANGE if task == "classification" else ["size=[96,128]", "batch=1"]
    exported = export(task, "format=onnx", *sizes)
    assert_facts(exported, read_onnx(exported.path), task)
    others = [(2, 96, 128), (1, 71, 130)] if sizes is RANGE else [(1, 96, 128)]
    assert_agrees(exported, formats.FORMATS["onnx"].read, 1e-5, *others)


def test_half_precision_is_compared_with_the_network_of_the_checkpoint(export):
    pytest.importorskip("onnxscript", reason="needs the extra `export`")
    pytest.importorskip("onnxruntime", reason="needs the extra `export`")
    for form in ("onnx", "pt2"):
        exported = export("classification", f"format={form}", "dtype=float16", "size=64")
        (difference,) = {row["relative"] for row in exported.report["differences"] if row["batch"] == 1}
        assert 0 < difference <= 1e-2
        assert_agrees(exported, formats.FORMATS[form].read, TOLERANCES[torch.float16], (2, 64, 64))


@pytest.mark.parametrize(
    ("options", "batch", "height", "width"),
    [
        ({}, (1, 8), (128, 1024), (128, 1024)),
        ({"size": 512}, (1, 8), (512, 512), (512, 512)),
        ({"size": [512, 768], "batch": 1}, (1, 1), (512, 512), (768, 768)),
        ({"height": [256, 1024], "width": 300, "batch": [2, 4]}, (2, 4), (256, 1024), (300, 300)),
        ({"height": 7}, (1, 8), (7, 7), (128, 1024)),
    ],
)
def test_ranges_are_checked_at_their_ends_the_example_and_elsewhere(options, batch, height, width):
    ranges = read_ranges(**dict.fromkeys(("size", "height", "width", "batch")) | options)
    assert ranges == (batch, height, width)
    checked, example = ranges.checked(), ranges.example()
    assert {(batch[0], height[0], width[0]), (batch[1], height[0], width[0]), (batch[0], height[1], width[1]), example} <= {*checked}
    assert all(low <= side <= high for size in checked for side, (low, high) in zip(size, ranges, strict=True))
    assert len(checked) == len({*checked})
    assert ranges.dimensions().keys() == {axis for axis, (low, high) in zip((0, 2, 3), ranges, strict=True) if low < high}
    # torch.export takes sides of 1, and sides that are equal in the example, for the same in every file
    assert example[0] > 1 or batch == (1, 1)
    assert example[1] != example[2] or height == width == (512, 512)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "big"}, r"size must be one side or \[height,width\] in pixels, such as size=512 .*got 'big'"),
        ({"size": [1, 2, 3]}, "size must be one side"),
        ({"size": 0}, "size must be one side"),
        ({"size": 1.5}, "size must be one side"),
        ({"size": True}, "size must be one side"),
        ({"size": 64, "height": [64, 128]}, "size=64 fixes height and width: give size, or height and width, not both"),
        ({"height": [128, 64]}, r"height must be a number, such as height=4, or a range, such as height=\[1,8\], .*got \[128, 64\]"),
        ({"width": [64]}, "width must be a number"),
        ({"batch": 0}, "batch must be a number, .*of at least 1, got 0"),
        ({"batch": [1, None]}, "batch must be a number"),
        ({"batch": "1..8"}, "batch must be a number"),
    ],
)
def test_wrong_sizes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        read_ranges(**dict.fromkeys(("size", "height", "width", "batch")) | options)


SIZE, NAMES = (1, 6, 8), {"images": 3}
WANTED = {SIZE: [torch.tensor([1.0, -4.0]), torch.tensor([0.0])]}


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([torch.tensor([1.0, -4.0002]), torch.tensor([0.0])], None),
        (
            [torch.tensor([1.0, -4.001]), torch.tensor([0.0])],
            "output a .* by 0.001 at batch 1, 6 x 8, 0.00025 of .* tolerance for float32 is 0.0001",
        ),
        ([torch.tensor([1.0, -4.0]), torch.tensor([1e-3])], "the output b of the file differs"),
        ([torch.tensor([float("nan"), -4.0]), torch.tensor([0.0])], "the output a of the file differs from that of the network by nan"),
        ([torch.tensor([float("inf"), -4.0]), torch.tensor([0.0])], "the output a of the file differs from that of the network by inf"),
        (
            [torch.tensor([1.0]), torch.tensor([0.0])],
            r"outputs of shapes \[\(1,\), \(1,\)\] at batch 1, 6 x 8, the network \[\(2,\), \(1,\)\]",
        ),
        (RuntimeError("Expected 64 <= 6"), "the file does not run at batch 1, 6 x 8, which the network takes: Expected 64 <= 6"),
    ],
)
def test_comparison_finds_what_differs(found, message):
    def run(inputs):
        if isinstance(found, Exception):
            raise found
        return found

    if message is None:
        (difference,) = compare(run, WANTED, NAMES, ["a", "b"], torch.float32)
        assert (difference[:3], difference.output, round(difference.relative, 6)) == (SIZE, "a", 5e-5)
    else:
        with pytest.raises(ValueError, match=message):
            compare(run, WANTED, NAMES, ["a", "b"], torch.float32)


def test_a_size_that_the_network_does_not_take_is_named():
    network = nn.Conv2d(3, 1, 9)
    with pytest.raises(
        ValueError, match=r"the network does not take images of batch 1, 6 x 8 \(RuntimeError: .*give size=, or height= and"
    ):
        run_network(network, NAMES, [SIZE], "cpu")


def attempt(checkpoint, folder: Path, *arguments: str) -> None:
    call(
        "export",
        f"checkpoint={checkpoint('classification')}",
        "trust=networks",
        "size=32",
        "batch=1",
        *arguments,
        f"hydra.run.dir={folder}",
    )


def test_a_file_that_differs_is_not_left(checkpoint, tmp_path, monkeypatch):
    right = formats.FORMATS["pt2"]
    wrong = right._replace(read=lambda content: lambda inputs: [y + 0.1 for y in right.read(content)(inputs)])
    monkeypatch.setitem(formats.FORMATS, "pt2", wrong)
    (tmp_path / "network.pt2").write_text("an earlier file")
    with pytest.raises(ValueError, match=r"output logits of the file differs from that of the network by 0\.1"):
        attempt(checkpoint, tmp_path, "format=pt2")
    assert {path.name for path in tmp_path.iterdir()} <= {"network.pt2", "export.log", "error.txt"}
    assert (tmp_path / "network.pt2").read_text() == "an earlier file"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["format=tflite"], ValueError, "format must be among onnx, pt2, aoti, got 'tflite'"),
        (["format=pt2", "dtype=bfloat16"], ValueError, "dtype must be among float16, float32, got 'bfloat16'"),
        (["format=pt2", "height=64"], ValueError, "size=32 fixes height and width"),
        (["format=pt2", "checkpoint=missing.ckpt"], FileNotFoundError, "checkpoint=missing.ckpt does not exist"),
        (["format=pt2", "trust=[]"], ValueError, "names networks.small_classifier"),
    ],
)
def test_wrong_options_are_named(checkpoint, tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        attempt(checkpoint, tmp_path, *arguments)


def test_missing_packages_are_named(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, find=importlib.util.find_spec: None if name == "onnxscript" else find(name)
    )
    with pytest.raises(ModuleNotFoundError, match=r"format=onnx needs onnxscript: pip install '\.\[export\]' in a checkout"):
        attempt(checkpoint, tmp_path, "format=onnx")


def test_a_task_without_an_exportable_network_is_named(checkpoint, tmp_path, monkeypatch):
    monkeypatch.delattr(Classification, "exportable")
    with pytest.raises(ValueError, match="Classification cannot be exported: it does not implement the method exportable"):
        attempt(checkpoint, tmp_path, "format=pt2")


def test_a_range_that_begins_too_low_is_named(checkpoint, tmp_path):
    message = r"(?s)format=pt2 does not take all of height=\[32,96\], width=\[32,96\]: .*Give a range that begins later, or size=.*33 <= "
    with pytest.raises(ValueError, match=message):
        call(
            "export",
            *(f"checkpoint={checkpoint('segmentation')}", "format=pt2", "height=[32,96]", "width=[32,96]", "batch=1"),
            f"hydra.run.dir={tmp_path}",
        )
    assert not list(tmp_path.glob("*.pt2"))


def test_an_operator_that_cannot_be_traced_is_named(checkpoint, tmp_path, monkeypatch):
    def depend_on_values(self, images):
        return images[images > 0.5] if images.sum() > 3 else images

    monkeypatch.setattr(Normalized, "forward", depend_on_values)
    with pytest.raises(ValueError, match=r"(?s)format=pt2 does not take the network of checkpoint=.*classification\.ckpt: "):
        attempt(checkpoint, tmp_path, "format=pt2")
    assert not list(tmp_path.glob("*.pt2"))


def read_snippets(heading: str, language: str) -> list[str]:
    """Return the code of a section of docs/export.md."""
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    section = page.split(f"### {heading}\n")[1].split("\n### ")[0].split("\n## ")[0]
    return [code for name, code in re.findall(r"^```(\w*)\n(.*?)^```$", section, re.DOTALL | re.MULTILINE) if name == language]


def use(exported: Exported, folder: Path, code: str) -> str:
    """Run Python code of the documentation beside an exported file."""
    shutil.copy(exported.path, folder)
    return run_after_torch(code, cwd=folder).stdout


def test_documented_use_of_onnxruntime(export, tmp_path):
    pytest.importorskip("onnxscript", reason="needs the extra `export`")
    pytest.importorskip("onnxruntime", reason="needs the extra `export`")
    exported = export("segmentation", "format=onnx", "size=[96,128]", "batch=1")
    image = torch.randint(256, (3, 96, 128), dtype=torch.uint8)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "photo.jpg", format="PNG")
    (code,) = read_snippets("onnxruntime", "python")
    assert len(code.splitlines()) <= 11
    labels = use(exported, tmp_path, code + "print(json.dumps(labels.tolist()))")
    with torch.no_grad():
        expected = exported.task(image[None] / 255)[0].argmax(0)
    assert json.loads(labels) == [[exported.task.class_names[label] for label in row] for row in expected.tolist()]


def test_documented_use_of_a_program(export, tmp_path):
    exported = export("segmentation", "format=pt2", *RANGE)
    (code,) = read_snippets("torch.export", "python")
    found = use(exported, tmp_path, code.replace("256, 320", "70, 66") + "print(facts['task'], [*logits.shape])")
    assert found == "segmentation [1, 11, 18, 17]\n"


@pytest.mark.slow
def test_package_runs_from_python_and_from_cpp(export, tmp_path, compiler):
    exported = export("classification", "format=aoti", "size=[512,768]", "batch=1")
    assert exported.facts["requires"] == []
    run = formats.FORMATS["aoti"].read(exported.path.read_bytes())
    images = torch.rand(1, 3, 512, 768)
    torch.testing.assert_close(run([images])[0], exported.task(images).detach(), rtol=1e-5, atol=1e-5)

    (code,) = read_snippets("AOTInductor", "python")
    assert use(exported, tmp_path, code + "print(json.dumps(facts), [*outputs.shape])") == f"{json.dumps(exported.facts)} [1, 10]\n"

    if shutil.which("g++") is None:
        pytest.skip("no g++")
    (program,), (commands,) = read_snippets("AOTInductor", "cpp"), read_snippets("AOTInductor", "")
    (tmp_path / "run.cpp").write_text(program)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = run_line(["bash", "-ec", commands], cwd=tmp_path, PATH=path)
    assert done.returncode == 0, done.stderr
    facts, result = done.stdout.splitlines()
    assert json.loads(facts) == exported.facts
    expected = exported.task(torch.full((1, 3, 512, 768), 0.5)).sum().item()
    shape, total = result.rsplit(" ", 1)
    assert shape == "[1, 10]"
    assert float(total) == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert "libpython" not in run_line(["ldd", "run"], cwd=tmp_path).stdout
