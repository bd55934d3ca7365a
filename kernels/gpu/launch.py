"""A launch of one compiled kernel, as plain data.

The launchers of the operator build `Launch` values. A `Plan` starts one on a device, an offline compiler takes `launch.source()`, and an
emulator also takes `launch.parameters()`. All of them compile the same source.
"""

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor
from triton.compiler import ASTSource, CompiledKernel

INT32_MAX = 2**31 - 1
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
TYPES = POINTERS | {torch.int64: "*i64"}
# The same code serves maps of any size and any alignment, because the alignment of rows is among the constants.
# A value of 1 is compiled in as a constant, except in these fields.
SIZES_OF_MAPS = ("h", "w", "ho", "wo", "hq", "wq")
# These fields and pointers have separate code for multiples of 16.
DIVISIBLE = ("groups", "c")

# ast.parse sometimes fails in two threads at a time, because CPython counts their depths together (python/cpython issue 106905)
PARSER = threading.Lock()


P = TypeVar("P")


class Source(ASTSource):
    """A kernel to compile, in any thread."""

    def make_ir(self, *arguments: Any, **options: Any) -> Any:
        """Parse and lower the Python code of one kernel at a time."""
        with PARSER:
            return super().make_ir(*arguments, **options)


class Launch(NamedTuple):
    """One kernel, and everything that determines its code and its work."""

    kernel: Any  # triton.JITFunction, or the function that replaces it in the interpreter
    grid: tuple[int, int, int]  # programs in x, y, z
    arguments: dict[str, Any]  # tensors and records (common/records.py) by name, in the order of the parameters
    constants: dict[str, Any]  # compile-time parameters, in their order after the arguments
    num_warps: int
    num_stages: int
    max_registers: int = 255  # per thread

    @property
    def options(self) -> dict[str, int]:
        """Compiler options."""
        # without a limit, the assembler may spill a few bytes to fit one more block on a multiprocessor
        registers = {} if torch.version.hip else {"maxnreg": self.max_registers}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages} | registers

    def start(self, compiled: CompiledKernel) -> None:
        """Start code that was compiled for this launch, or for a launch that differs only in its tensors."""
        compiled[self.grid](*self.arguments.values(), *self.constants.values())

    def interpret(self) -> None:
        """Run the kernel in Triton's interpreter."""
        self.kernel[self.grid](*self.arguments.values(), *self.constants.values())

    def parameters(self) -> list[Tensor | int]:
        """Return the run-time arguments of the compiled code, in the order of its parameters."""
        return [value for _, name, value in self._fields_of_arguments() if _type(name, value) != "constexpr"]

    def source(self) -> Source:
        """Return the source to compile, specialised for these arguments."""
        names = self.kernel.arg_names
        types = {name: _types(name, argument) for name, argument in self.arguments.items()}
        fields = list(self._fields_of_arguments())
        return Source(
            fn=self.kernel,
            signature={name: types.get(name, "constexpr") for name in names},
            constexprs={path: value for path, name, value in fields if _type(name, value) == "constexpr"} | self.constants,
            attrs={path: attributes for path, name, value in fields if (attributes := _attributes(name, value))},
        )

    def _fields_of_arguments(self) -> Iterator[tuple[tuple[int, ...], str, Tensor | int]]:
        """Yield the path, the name and the value of every field of a record, and of every tensor outside records."""
        for name, argument in self.arguments.items():
            index = self.kernel.arg_names.index(name)
            if isinstance(argument, Tensor):
                yield (index,), name, argument
            else:
                yield from (((index, i), *field) for i, field in enumerate(argument._asdict().items()))


class Plan:
    """A launch that starts repeatedly, with other tensors of the same layouts, in a fraction of the host time of Triton's call.

    The tensors must have the alignment to 16 bytes of those of the constructor, on which the code may rely.

    Args:
        launch: its arguments are among `tensors`.
        tensors: those of a call, all of them different objects.
    """

    __slots__ = ("pointers", "start", "values")

    def __init__(self, launch: Launch, tensors: Sequence[Tensor | None]):
        places = {id(tensor): place for place, tensor in enumerate(tensors)}
        # arguments of the kernel; for every tensor: the place of its argument, its place among the tensors of a call, its strides
        self.values: list[Any] = [*launch.arguments.values(), *launch.constants.values()]
        self.pointers: list[tuple[int, int, tuple[int, ...]]] = []
        for at, argument in enumerate(launch.arguments.values()):
            tensor, *strides = argument if isinstance(argument, tuple) else (argument,)
            if isinstance(tensor, Tensor):
                self.pointers.append((at, places[id(tensor)], tuple(strides)))
                # a plan keeps no tensor alive
                self.values[at] = None
        self.start = compile_for_current_device(launch)[launch.grid]

    def run(self, addresses: Sequence[int]) -> None:
        """Start the kernel on the current device, with tensors at `addresses` in place of those of the constructor."""
        values = self.values.copy()
        for at, place, strides in self.pointers:
            values[at] = (addresses[place], *strides) if strides else addresses[place]
        self.start(*values)


def distinguish(tensors: Iterable[Tensor | None]) -> list[Any]:
    """Return the tensors as different objects, by which a `Plan` tells them apart: the call that it is made for may pass one twice."""
    return [None if tensor is None else tensor.detach() for tensor in tensors]


class Plans(dict[tuple, P]):
    """Plans by everything that they depend on, because planning takes more host time than starting; the oldest gives way to a new one."""

    def __init__(self, most: int):
        super().__init__()
        self.most = most
        self.lock = threading.Lock()

    def keep(self, key: tuple, plan: P) -> P:
        """Store a plan, and return it."""
        with self.lock:
            while len(self) >= self.most:
                del self[next(iter(self))]
            self[key] = plan
        return plan


def on_device_of(tensor: Tensor) -> AbstractContextManager:
    """Make the device of a tensor the current device, on which Triton launches."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


# compiled code by everything that it depends on: plans for maps of many sizes share it
_compiled: dict[tuple, CompiledKernel] = {}


def compile_for_current_device(launch: Launch) -> CompiledKernel:
    """Return the code of a launch, compiled once in a process for each device.

    Triton's own call of a kernel compiles again for other values of any number in a record, whatever the kernel requests.
    """
    source = launch.source()
    driver: Any = triton.runtime.driver.active
    key = (source.hash(), *launch.options.values(), driver.get_current_device())
    if key not in _compiled:
        _compiled[key] = triton.compile(source, options=launch.options)
    return _compiled[key]


def _types(name: str, argument: Any) -> str | tuple:
    """Return the type of an argument in Triton's notation; for a record, a record of types."""
    if isinstance(argument, Tensor):
        return _type(name, argument)
    return type(argument)(*map(_type, argument._fields, argument))


def _type(name: str, value: Tensor | int) -> str:
    if isinstance(value, Tensor):
        return TYPES[value.dtype]
    if value == 1 and name not in SIZES_OF_MAPS:
        return "constexpr"
    return "i32" if -INT32_MAX <= value <= INT32_MAX else "i64"


def _attributes(name: str, value: Tensor | int) -> list[list]:
    """Return what the compiler may assume of a value: that it is a multiple of 16, and how far offsets from a pointer reach."""
    if not isinstance(value, Tensor):
        return [["tt.divisibility", 16]] if name in DIVISIBLE and value % 16 == 0 else []
    # a meta tensor has no address; its storage is assumed to be aligned like that of an allocator
    address = value.storage_offset() * value.element_size() if value.is_meta else value.data_ptr()
    attributes = [["tt.divisibility", 16]] if address % 16 == 0 else []
    # buffer loads and stores on AMD GPUs have 32-bit offsets
    if torch.version.hip and value.untyped_storage().size() <= INT32_MAX:
        attributes.append(["tt.pointer_range", 32])
    return attributes
