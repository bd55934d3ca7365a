"""The formats of exported files: ONNX, programs of torch.export (pt2) and packages of AOTInductor (aoti)."""

import importlib.util
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._inductor
from torch import Tensor, nn
from torch._decomp import get_decompositions
from torch.export import Dim, ExportedProgram

from ...kernels import registration as registration  # registers the decompositions
from .checks import Run, list_outputs

# name of the facts in the file, with the suffix .json where it is the name of a file
FACTS = "carafepp"
# operators of PyTorch itself, and functions of Python in a program
BUILT_IN = {"aten", "prims", "prim", "_operator"}
# what registers the operators of a namespace
REGISTERED_BY = {"carafepp": "carafepp.kernels"}


class Tracing(NamedTuple):
    """What is traced into a file.

    Attributes:
        network: in evaluation mode, in the dtype of the file.
        examples: its inputs [N, C, H, W].
        inputs, outputs: their names.
        dimensions: the axes of every input that are not fixed.
        decompose: whether a program of torch.export has PyTorch's own operators only.
    """

    network: nn.Module
    examples: tuple[Tensor, ...]
    inputs: list[str]
    outputs: list[str]
    dimensions: dict[int, Dim]
    decompose: bool


class Format(NamedTuple):
    """A format of files.

    Attributes:
        suffix: of the name of a file.
        packages: what writing and checking a file needs in addition to the dependencies of carafepp.
        write: returns the content of a file for a network and its facts.
        read: returns a function that runs a file, for its content.
    """

    suffix: str
    packages: tuple[str, ...]
    write: Callable[[Tracing, dict[str, Any]], bytes]
    read: Callable[[bytes], Run]


def check_packages(name: str) -> None:
    """Check that the packages of a format are installed.

    Raises:
        ModuleNotFoundError: one is missing.
    """
    if missing := [package for package in FORMATS[name].packages if importlib.util.find_spec(package) is None]:
        raise ModuleNotFoundError(f"format={name} needs {', '.join(missing)}: pip install '.[export]' in a checkout")


def _write_onnx(tracing: Tracing, facts: dict[str, Any]) -> bytes:
    # a line for every node that they do not simplify
    for name in ("onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "# The axis name", UserWarning)
        program = torch.onnx.export(
            tracing.network,
            tracing.examples,
            dynamo=True,
            verbose=False,
            input_names=tracing.inputs,
            output_names=tracing.outputs,
            dynamic_shapes=tuple(tracing.dimensions for _ in tracing.examples),
        )
    assert program is not None
    program.model.metadata_props[FACTS] = json.dumps(facts)
    return program.model_proto.SerializeToString()


def _read_onnx(content: bytes) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    return lambda inputs: [torch.from_numpy(y) for y in session.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))]


def _trace(tracing: Tracing) -> ExportedProgram:
    """Trace a network, and replace the operators of carafepp if `decompose` is set."""
    program = torch.export.export(
        tracing.network,
        tracing.examples,
        dynamic_shapes=tuple(tracing.dimensions for _ in tracing.examples),
        # conditions on sizes, such as the ratio of two maps, are checked when the program runs
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    if tracing.decompose:
        operators = torch.ops.carafepp
        program = program.run_decompositions(get_decompositions([operators.reassemble, operators.reassemble_backward]))
        if "carafepp" in set(_list_namespaces(program)):
            raise ValueError(
                "a sampler of the network calls reassemble_backward in a way that cannot be written as PyTorch's own operators"
            )
    return program


def _list_namespaces(program: ExportedProgram) -> Iterator[str]:
    """Yield the namespace of every operator of a program."""
    return (node.target.namespace for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload))


def list_required(program: ExportedProgram) -> list[str]:
    """List the modules that a process must import before it loads a program."""
    return sorted({REGISTERED_BY.get(name, name) for name in _list_namespaces(program) if name not in BUILT_IN})


def _write_program(tracing: Tracing, facts: dict[str, Any]) -> bytes:
    program = _trace(tracing)
    facts["requires"] = list_required(program)
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={f"{FACTS}.json": json.dumps(facts)})
    return content.getvalue()


def _read_program(content: bytes) -> Run:
    network = torch.export.load(io.BytesIO(content)).module()
    return lambda inputs: list_outputs(network(*inputs))


def _write_package(tracing: Tracing, facts: dict[str, Any]) -> bytes:
    program = _trace(tracing._replace(decompose=True))
    facts["requires"] = list_required(program)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.pt2"
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(path), inductor_configs={"aot_inductor.metadata": {FACTS: json.dumps(facts)}}
        )
        return path.read_bytes()


def _read_package(content: bytes) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.pt2"
        path.write_bytes(content)
        network = torch._inductor.aoti_load_package(str(path))
    return lambda inputs: list_outputs(network(*inputs))


FORMATS = {
    "onnx": Format(".onnx", ("onnx", "onnxscript", "onnxruntime"), _write_onnx, _read_onnx),
    "pt2": Format(".pt2", (), _write_program, _read_program),
    "aoti": Format(".pt2", (), _write_package, _read_package),
}
