"""A launch of one compiled kernel, as plain data.

The launchers of the operator build `Launch` values; a `Plan` runs one on a device. The same value tells an offline compiler
what the just-in-time compiler would specialise (`launch.source()`), and an emulator what to pass (`launch.parameters()`).
"""

import threading
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler import ASTSource, CompiledKernel

INT32_MAX = 2**31 - 1
# Kernels are compiled for any image: of their integers only the channels and groups, and a stride of one, change the code. What vectors
# need to know of the alignment of rows is among the constants.
SIZES = ("H", "W", "HO", "WO", "HQ", "WQ")
FEATURES = {"x": "nchw", "y": "nchw", "dy": "nchw", "dx": "nchw"}
LOGITS = {"l": "ncuvhw", "dl": "ncuvhw"}
STRIDES = tuple(f"stride_{name}{axis}" for name, axes in (FEATURES | LOGITS).items() for axis in axes)
SPECIALIZATION = {"do_not_specialize": SIZES, "do_not_specialize_on_alignment": STRIDES}
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


# ast.parse in two threads at a time fails now and then: CPython counts the depth of both together (python/cpython issue 106905)
PARSER = threading.Lock()


class Source(ASTSource):
    """A kernel to compile, in any thread."""

    def make_ir(self, *arguments, **options):
        """Parse and lower the Python code, one kernel at a time."""
        with PARSER:
            return super().make_ir(*arguments, **options)


class Launch(NamedTuple):
    """One kernel with everything that fixes its code and its work."""

    kernel: triton.JITFunction
    grid: tuple[int, int, int]  # programs in x, y, z
    arguments: dict[str, Tensor | int]  # by parameter name, in the order of the parameters
    constants: dict[str, int | str | bool]  # compile-time parameters
    num_warps: int
    num_stages: int

    def start(self, compiled: CompiledKernel) -> None:
        """Start what was compiled for this launch, or for one that differs by its tensors only."""
        values = self.arguments | self.constants
        compiled[self.grid](*(values[name] for name in self.kernel.arg_names))

    @property
    def options(self) -> dict[str, int]:
        """Compiler options."""
        # left alone, the assembler may spill a few bytes for the sake of one more block on a multiprocessor
        registers = {} if torch.version.hip else {"maxnreg": 255}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages} | registers

    def parameters(self) -> dict[str, Tensor | int]:
        """What the compiled code takes at run time, by name in its parameter order: but for sizes, a one is compiled in."""
        return {name: value for name, value in self.arguments.items() if isinstance(value, Tensor) or name in SIZES or value != 1}

    def source(self) -> Source:
        """What to compile, specialised as a real launch would be."""
        parameters = self.parameters()
        constants = {name: value for name, value in self.arguments.items() if name not in parameters} | self.constants
        names = self.kernel.arg_names
        signature = {name: _type(parameters[name]) if name in parameters else "constexpr" for name in names}
        aligned = [name for name, value in parameters.items() if name not in (*SIZES, *STRIDES) and _is_aligned(value)]
        attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
        return Source(fn=self.kernel, signature=signature, constexprs=constants, attrs=attributes)


class Plan:
    """A launch to be started again and again, with other tensors of the same layouts: a third of the host time of Triton's own call."""

    def __init__(self, launch: Launch, tensors: tuple[Tensor | None, ...]):
        places = {id(tensor): place for place, tensor in enumerate(tensors)}
        values = launch.arguments | launch.constants
        self.launch = launch._replace(arguments={})
        self.names = launch.kernel.arg_names
        self.places = [(index, places[id(values[name])]) for index, name in enumerate(self.names) if isinstance(values[name], Tensor)]
        self.values = [None if isinstance(values[name], Tensor) else values[name] for name in self.names]
        # by which tensors begin at a multiple of 16 bytes, which the code may rely on
        self.compiled: dict[tuple[bool, ...], CompiledKernel | None] = {}

    def run(self, tensors: tuple[Tensor | None, ...]) -> None:
        """Start the kernel on the current device, with `tensors` where those of the constructor were."""
        values = self.values.copy()
        for index, place in self.places:
            values[index] = tensors[place]
        aligned = tuple(values[index].data_ptr() % 16 == 0 for index, _ in self.places)
        compiled = self.compiled.get(aligned)
        if compiled is None:
            arguments = dict(zip(self.names, values, strict=True))
            self.compiled[aligned] = self.launch.kernel[self.launch.grid](**arguments, **self.launch.options)
        else:
            compiled[self.launch.grid](*values)


def _type(value: Tensor | int) -> str:
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    return "i32" if -INT32_MAX <= value <= INT32_MAX else "i64"


def _is_aligned(value: Tensor | int) -> bool:
    # the storage of a meta tensor lies nowhere: take what an allocator gives
    address = value if isinstance(value, int) else value.storage_offset() * value.element_size() if value.is_meta else value.data_ptr()
    return address % 16 == 0


def strides(name: str, tensor: Tensor) -> dict[str, int]:
    """Strides of `tensor` in elements as kernel arguments: `strides("x", x)` has stride_xn to stride_xw."""
    return {f"stride_{name}{axis}": stride for axis, stride in zip((FEATURES | LOGITS)[name], tensor.stride(), strict=True)}
