"""ONNX files of the operator, the module, samplers and networks agree with PyTorch at sizes other than that of the export."""

from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from operator_cases import relative_error
from torch import Tensor, nn

from carafepp import CARAFE

onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime, of the extra `export`")
pytest.importorskip("onnxscript", reason="needs onnxscript, of the extra `export`")
pytestmark = pytest.mark.filterwarnings("ignore:# The axis name:UserWarning")

# operators that TensorRT and OpenVINO also take
SUMS = {"Add", "Cast", "Conv", "Div", "Log", "Mul", "Relu", "Sigmoid", "Softmax", "Sub"}
MOVES = {"Concat", "DepthToSpace", "Pad", "Reshape", "Shape", "Slice", "Split", "Squeeze", "Unsqueeze"}
DIMS = {0: "batch", 2: "height", 3: "width"}


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
