"""ONNX files of the operator, the module, samplers and networks agree with PyTorch at sizes other than that of the export."""

import importlib.util
import io
import warnings
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from carafepp.models.adaptive_pooling import CellPool
from carafepp.models.detection import MaskRCNN
from carafepp.models.upernet import UperNet
from commands import run_code
from networks import small_resnet
from operator_cases import relative_error
from sampler_cases import CASES
from torch import Tensor, nn

from carafepp import CARAFE, reassemble, reassemble_weights

onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime, of the extra `export`")
pytest.importorskip("onnxscript", reason="needs onnxscript, of the extra `export`")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:# The axis name:UserWarning")]

# operators that TensorRT and OpenVINO also take
SUMS = {"Add", "Cast", "Conv", "Div", "Log", "Mul", "Relu", "Sigmoid", "Softmax", "Sub"}
MOVES = {"Concat", "DepthToSpace", "Pad", "Reshape", "Shape", "Slice", "Split", "Squeeze", "Unsqueeze"}
DIMS = {0: "batch", 2: "height", 3: "width"}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def make_trained(module: nn.Module) -> nn.Module:
    """Draw parameters and statistics at random, so that nothing is zero or one as at the start of a training."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32).to(tensor.dtype)
            tensor.copy_(noise.abs() + 0.5 if "running_var" in name else tensor + 0.1 * noise)
    return module.eval()


def export(module: nn.Module, args: Sequence[Tensor], dims: Sequence[dict[int, str]] | None = None) -> bytes:
    """Return the ONNX file of a module whose inputs have any batch, height and width."""
    program = torch.onnx.export(module, tuple(args), dynamo=True, dynamic_shapes=tuple(dims or [DIMS] * len(args)), verbose=False)
    return program.model_proto.SerializeToString()


def count_operators(file: bytes) -> Counter[str]:
    """Count the nodes of an ONNX file by operator."""
    return Counter(node.op_type for node in pytest.importorskip("onnx").load_from_string(file).graph.node)


def export_traced(module: nn.Module, args: Sequence[Tensor], dims: Sequence[dict[int, str]]) -> bytes:
    """Return the ONNX file that the older exporter, which traces modules, makes for inputs of any batch, height and width."""
    file = io.BytesIO()
    names = [f"input{i}" for i in range(len(args))]
    with warnings.catch_warnings():
        # it is deprecated, and warns of every condition on a size
        warnings.simplefilter("ignore")
        torch.onnx.export(module, tuple(args), file, dynamo=False, input_names=names, dynamic_axes=dict(zip(names, dims, strict=True)))
    return file.getvalue()


# OpenVINO has half precision as its default on some processors. It runs in a process of its own, because it imports absl, whose log handler
# closes pytest's file of captured output.
OPENVINO = """
import numpy, openvino
core = openvino.Core()
model = core.compile_model(core.read_model("network.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
inputs = numpy.load("inputs.npz")
numpy.savez("outputs.npz", **{name: model([inputs[name]])[0] for name in inputs})
"""


def run_in_openvino(file: bytes, inputs: Sequence[tuple[Tensor]], folder: Path) -> list[Tensor]:
    """Run an ONNX file of one input and one output in OpenVINO on several inputs."""
    (folder / "network.onnx").write_bytes(file)
    np.savez(folder / "inputs.npz", **{str(i): x.numpy() for i, (x,) in enumerate(inputs)})
    run_code(OPENVINO, cwd=folder)
    outputs = np.load(folder / "outputs.npz")
    return [torch.from_numpy(outputs[str(i)]) for i in range(len(inputs))]


def assert_agrees(file: bytes, module: nn.Module, *inputs: Sequence[Tensor], tolerance: float = 4e-6) -> None:
    """Compare the file in onnxruntime with the module on several inputs."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for args in inputs:
        with torch.no_grad():
            expected = module(*args)
        feed = {node.name: arg.numpy() for node, arg in zip(session.get_inputs(), args, strict=True)}
        expected = [expected] if isinstance(expected, Tensor) else list(expected)
        for actual, result in zip(session.run(None, feed), expected, strict=True):
            assert actual.shape == tuple(result.shape)
            assert relative_error(torch.from_numpy(actual), result.double()) <= tolerance


def random_maps(*sizes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[tuple[Tensor]]:
    """Draw one map of every size."""
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(size, generator=generator).to(dtype),) for size in sizes]


@pytest.mark.parametrize(
    ("options", "nodes"),
    [
        ({"up": 2}, 102),
        ({"down": 2, "compressor_norm": True, "groups": 4, "normalizer": "sigmoid", "kernel_size": 3}, 80),
        ({"up": 3, "down": 2, "kernel_size": 3, "compressed_channels": None, "normalizer": "none"}, 180),
        ({"up": 2, "down": 3, "groups": 2, "kernel_size": 3, "normalizer": "sigmoid_normalized"}, 180),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else None,
)
def test_carafe_is_plain_operators_at_any_size(options, nodes):
    module = make_trained(CARAFE(8, **options))
    file = export(module, *random_maps((2, 8, 6, 8)))
    operators = count_operators(file)
    assert set(operators) <= SUMS | MOVES
    assert operators.total() <= nodes
    assert_agrees(file, module, *random_maps((2, 8, 6, 8), (1, 8, 7, 5), (3, 8, 1, 1), (1, 8, 33, 18)))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 4e-6), (torch.float16, 2e-3)])
def test_carafe_in_every_precision_and_runtime(dtype, tolerance, tmp_path):
    if importlib.util.find_spec("openvino") is None:
        pytest.skip("needs openvino, of the extra `export`")
    module = make_trained(CARAFE(8, up=2, kernel_size=3)).to(dtype)
    file = export(module, *random_maps((2, 8, 6, 8), dtype=dtype))
    inputs = random_maps((1, 8, 7, 5), (3, 8, 1, 1), (1, 8, 33, 18), dtype=dtype)
    assert_agrees(file, module, *inputs, tolerance=tolerance)
    for (x,), actual in zip(inputs, run_in_openvino(file, inputs, tmp_path), strict=True):
        with torch.no_grad():
            expected = module(x)
        assert actual.shape == expected.shape
        assert relative_error(actual.float(), expected.double()) <= tolerance


@pytest.mark.parametrize(
    "options",
    [
        {"up": 2},
        {"down": 2, "groups": 2, "normalizer": "sigmoid", "kernel_size": 3},
        {"up": 3, "down": 2, "kernel_size": 3, "normalizer": "none"},
        {"up": 2, "down": 3, "kernel_size": 3, "normalizer": "sigmoid_normalized"},
    ],
    ids=lambda options: ",".join(f"{k}={v}" for k, v in options.items()),
)
def test_older_exporter_and_tracer(options):
    module = make_trained(CARAFE(8, **options))
    (example,) = random_maps((2, 8, 6, 8))
    inputs = random_maps((1, 8, 7, 5), (3, 8, 1, 1), (1, 8, 33, 18))
    assert_agrees(export_traced(module, example, [DIMS]), module, *inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        program = torch.jit.trace(module, example)
    for args in inputs:
        torch.testing.assert_close(program(*args), module(*args), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("border", "nodes"), [("renormalize", 95), ("replicate", 61), ("shift", 150)])
def test_borders_at_any_size(border, nodes):
    module = make_trained(CARAFE(8, up=2, kernel_size=3, border=border))
    file = export(module, *random_maps((2, 8, 6, 8)))
    operators = count_operators(file)
    assert not {name for name in operators if name.startswith(("Gather", "Scatter", "GridSample"))}
    assert operators.total() <= nodes
    assert_agrees(file, module, *random_maps((1, 8, 7, 5), (3, 8, 33, 3)))


class BothOperators(nn.Module):
    """Both functions of the operator, with an output that is longer than the scale gives or ends within a cell."""

    options: ClassVar = {"kernel_size": 3, "up": 2, "groups": 2}

    def forward(self, x, logits, weights):
        rows, columns = weights.shape[2:]
        y = reassemble(x, logits, **self.options, size=(rows, columns))
        return y, reassemble_weights(x, weights, **self.options, normalizer="softmax", size=(rows, columns))


@pytest.mark.parametrize(
    ("dtype", "exporter"),
    [(torch.float32, export), (torch.float16, export), (torch.float32, export_traced)],
    ids=["float32", "float16", "older exporter"],
)
def test_operator_with_a_size_in_every_precision(dtype, exporter):
    def draw(n, h, w, rows, columns):
        return tuple(map_[0] for map_ in random_maps((n, 4, h, w), (n, 72, h, w), (n, 18, rows, columns), dtype=dtype))

    dims = [DIMS, DIMS, {0: "batch", 2: "rows", 3: "columns"}]
    file = exporter(BothOperators(), draw(2, 6, 8, 11, 16), dims)
    if exporter is export:
        assert set(count_operators(file)) <= SUMS | MOVES | {"Transpose"}
    inputs = [draw(2, 6, 8, 11, 16), draw(1, 7, 5, 14, 9), draw(3, 1, 2, 1, 4)]
    assert_agrees(file, BothOperators(), *inputs, tolerance=4e-6 if dtype == torch.float32 else 1e-3)


def test_pooled_cells_follow_the_size_of_the_map():
    module = CellPool(6)
    assert_agrees(export(module, *random_maps((2, 4, 12, 18))), module, *random_maps((1, 4, 13, 7), (3, 4, 5, 48)))
    sides = {axis: torch.export.Dim(name, min=7, max=99) for axis, name in ((2, "height"), (3, "width"))}
    program = torch.export.export(module, *random_maps((1, 4, 12, 18)), dynamic_shapes=(sides,))
    file = torch.onnx.export(program, dynamo=True, verbose=False).model_proto.SerializeToString()
    assert_agrees(file, module, *random_maps((1, 4, 13, 7), (1, 4, 9, 48)))


@pytest.mark.parametrize("name", ["dysample", "sapa"])
def test_sampler_at_any_size(name):
    case = next(case for case in CASES if case.id == name)
    module = make_trained(case.slot(8, guide_channels=8) if case.guided else case.slot(8))
    dims = [DIMS, {0: "batch", 2: "fine height", 3: "fine width"}][: 1 + case.guided]

    def draw(n, h, w, odd):
        maps = random_maps((n, 8, h, w), (n, 8, 2 * h - odd, 2 * w))
        return tuple(map_[0] for map_ in maps[: len(dims)])

    file = export(module, draw(2, 6, 8, 0), dims)
    assert_agrees(file, module, draw(1, 7, 5, 1), draw(3, 12, 9, 0))


def test_network_at_any_size():
    carafe = partial(CARAFE, up=2, kernel_size=3)
    module = make_trained(UperNet(small_resnet(), 5, ppm=carafe, fpn=carafe, fuse=None, fpn_dim=8, ppm_dim=8))
    file = export(module, *random_maps((2, 3, 64, 96)))
    assert_agrees(file, module, *random_maps((1, 3, 71, 90), (3, 3, 160, 129)), tolerance=2e-5)


def test_detector_at_any_size():
    carafe = partial(CARAFE, up=2, kernel_size=3)
    sizes = dict(fpn_dim=16, mask_dim=16, head_dim=32, min_size=64, max_size=128, rpn_post_nms_top_n_test=50, box_detections_per_img=20)
    module = make_trained(MaskRCNN(5, backbone=small_resnet(), fpn=carafe, mask_head=carafe, box_score_thresh=0.0, **sizes))
    for parameter in module.parameters():
        if parameter.dim() > 1:
            # boxes that are far from equal in score and overlap
            nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(parameter.shape[0]))
    image = torch.rand(3, 64, 96)
    session = onnxruntime.InferenceSession(export_traced(module, ([image],), [{1: "height", 2: "width"}]))
    for size in (3, 64, 64), (3, 80, 121), (3, 130, 65):
        ((image,),) = random_maps(size)
        with torch.no_grad():
            expected = module([image])[0]
        actual = session.run(None, {"input0": image.numpy()})
        for value, result in zip(actual, expected.values(), strict=True):
            torch.testing.assert_close(torch.from_numpy(value), result, rtol=1e-4, atol=1e-4)
