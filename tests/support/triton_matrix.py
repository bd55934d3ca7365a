"""Compile, emulate and check kernels with the installed Triton: `python -P -m triton_matrix TARGET CASE ...`.

A case is one training step of the operator or the module, or the module without gradients. A JSON line on standard output for each case
says what came of it. docs/matrix.py (`make matrix`) calls this with every version of Triton. Code for AMD GPUs is only compiled, because no
emulator is at hand.
"""

import copy
import faulthandler
import json
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from carafepp.kernels.geometry import Spec
from carafepp.kernels.gpu.launch import Launch
from carafepp.kernels.gpu.tiles.geometry import DIRECTIONS, KernelName, Tile
from operator_cases import TRITON_TOLERANCES, relative_error
from torch import Tensor, nn

NCHW, NHWC = torch.contiguous_format, torch.channels_last


class Operator(NamedTuple):
    """A training step of the operator."""

    size: tuple[int, int, int, int]  # of the features
    spec: Spec
    dtype: torch.dtype
    layout: torch.memory_format
    tiles: dict[KernelName, Tile] | None = None  # in place of those that are chosen for many images
    walks: bool = False  # whether the tile of the gradient to the features is the first one that walks
    sums: bool = False  # whether the kernels take sums in the place of products, as in large maps


class Module(NamedTuple):
    """A call of CARAFE."""

    size: tuple[int, int, int, int]
    options: dict[str, Any]
    dtype: torch.dtype
    many: bool  # whether its blocks are those of many pixels
    trained: bool = False  # whether gradients are computed as well


# kernels that read a channels_last copy of the features
COPIES: dict[KernelName, Tile] = {
    "forward": Tile(1, 8, 1, 64, 1, 4, 2, 255, 1, 1),
    "logit_gradient": Tile(1, 8, 1, 64, 1, 4, 2, 255, 1, 1),
    "source_gradient": Tile(2, 4, 2, 64, 1, 4, 1, 128, 4),
}
# kernels that compute several tiles, and write weights for the next launch
STACKS: dict[KernelName, Tile] = COPIES | {
    "logit_gradient": Tile(2, 16, 1, 64, 1, 16, 1, 128, 2, 1),
    "source_gradient": Tile(2, 16, 4, 64, 1, 16, 1, 128, 4),
}
CASES: dict[str, Operator | Module] = {
    "up 2, k 5, float16, channels_last": Operator((1, 64, 12, 16), Spec(5, up=2), torch.float16, NHWC),
    "up 2, k 5, float16, NCHW": Operator((1, 64, 12, 16), Spec(5, up=2), torch.float16, NCHW),
    "up 2, k 5, float32, channels_last": Operator((1, 64, 12, 16), Spec(5, up=2), torch.float32, NHWC),
    "down 2, k 5, bfloat16, channels_last": Operator((1, 64, 14, 18), Spec(5, down=2), torch.bfloat16, NHWC),
    "down 2, k 5, float32, NCHW, odd width": Operator((1, 64, 13, 17), Spec(5, down=2), torch.float32, NCHW),
    "up 3, k 7, 4 groups, float16, NCHW": Operator((1, 128, 6, 8), Spec(7, up=3, groups=4), torch.float16, NCHW),
    "up 3 / 2, k 3, sigmoids, renormalized, bfloat16": Operator(
        (1, 20, 7, 9), Spec(3, up=3, down=2, normalizer="sigmoid_normalized", border="renormalize"), torch.bfloat16, NHWC
    ),
    # reads pixels outside the map, tap by tap
    "up 2, k 3, shifted windows, float32": Operator((1, 20, 7, 9), Spec(3, up=2, border="shift"), torch.float32, NCHW),
    # a window that is too large for a tile
    "down 16, k 3, 2 groups, float16, NCHW": Operator((1, 20, 35, 18), Spec(3, down=16, groups=2), torch.float16, NCHW),
    "up 2, k 5, float32, channels_last, walks": Operator((1, 256, 9, 14), Spec(5, up=2), torch.float32, NHWC, walks=True),
    "up 2, k 5, float16, channels_last, walks": Operator((1, 256, 9, 14), Spec(5, up=2), torch.float16, NHWC, walks=True),
    "up 2, k 5, float16, NCHW, walks": Operator((1, 256, 9, 14), Spec(5, up=2), torch.float16, NCHW, walks=True),
    "up 2, k 5, float16, NCHW, copies": Operator((1, 64, 9, 16), Spec(5, up=2), torch.float16, NCHW, COPIES),
    "up 2, k 5, float16, NCHW, stacks": Operator((1, 64, 9, 16), Spec(5, up=2), torch.float16, NCHW, STACKS),
    "up 2, k 5, float32, channels_last, sums": Operator((1, 64, 12, 16), Spec(5, up=2), torch.float32, NHWC, sums=True),
    "down 2, k 3, shifted windows, float32, channels_last, sums": Operator(
        (1, 20, 7, 9), Spec(3, down=2, border="shift"), torch.float32, NHWC, sums=True
    ),
    "down 2, k 3, float32, channels_last, sums": Operator((1, 64, 13, 18), Spec(3, down=2), torch.float32, NHWC, sums=True),
    "up 2, k 5, float32, NCHW, sums": Operator((1, 64, 12, 16), Spec(5, up=2), torch.float32, NCHW, sums=True),
    "up 3, k 7, 2 groups, float32, NCHW, sums": Operator((1, 16, 9, 11), Spec(7, up=3, groups=2), torch.float32, NCHW, sums=True),
    "down 2, k 3, float16, NCHW, odd width, sums": Operator((1, 20, 13, 17), Spec(3, down=2), torch.float16, NCHW, sums=True),
    "module up 2 without gradients, float16": Module((1, 64, 12, 16), {"up": 2}, torch.float16, many=True),
    "module down 2 with norm without gradients, bfloat16": Module(
        (1, 64, 9, 11), {"down": 2, "compressor_norm": True}, torch.bfloat16, many=False
    ),
    "module down 2 with norm, float16": Module(
        (1, 64, 9, 11), {"down": 2, "compressor_norm": True}, torch.float16, many=False, trained=True
    ),
}
# name -> capability for which PyTorch plans, lanes of a warp
NVIDIA = {"sm_80": (80, 32), "sm_90": (90, 32), "sm_100": (100, 32)}
AMD = {"gfx942": (94, 64), "gfx1100": (110, 32)}
# images that fill a device: their tiles are chosen, and one image is emulated
MANY = 64
# a compiler that takes longer is stuck
SECONDS = 600


class Row(NamedTuple):
    """What came of a case; numbers are None where compilation or emulation did not get to them."""

    case: str
    kernels: int = 0
    registers: int | None = None  # per thread, of the kernel with the most
    spills: int | None = None  # instructions on NVIDIA GPUs, registers on AMD GPUs
    shared: int | None = None  # bytes per block, of the kernel with the most
    sectors: int | None = None  # of 32 bytes, in all loads and stores of warps
    error: float | None = None  # of y, dx or dlogits: the largest difference from float64 over the largest value
    equal: bool | None = None  # whether the error is within the tolerance of the dtype
    problem: str = ""


def list_cases(target: str) -> tuple[str, ...]:
    """Return the names of the cases of a target. On AMD GPUs, the layers of the module are PyTorch's."""
    return tuple(name for name, case in CASES.items() if target in NVIDIA or isinstance(case, Operator))


def find_tiles(case: Operator, capability: tuple[int, int]) -> dict[KernelName, Tile] | None:
    """Return the tiles of forward and of the kernels of backward that differ from the choice for many images, or None."""
    from carafepp.kernels.gpu.tiles.ranking import SEPARATE, rank_tiles
    from carafepp.kernels.gpu.training_step import build_training_step

    if not case.walks:
        return case.tiles
    problem = build_training_step(MANY, *case.size[1:], *case[1:4]).problem(capability)
    return {
        kernel: next(tile for tile in rank_tiles(kernel, problem) if tile.steps > 1 or kernel != "source_gradient")
        for kernel in ("forward", *SEPARATE)
    }


@contextmanager
def choose_sums(case: Operator) -> Iterator[None]:
    """Let the kernels that have sums take them in maps of any size, or in none."""
    from carafepp.kernels.gpu.sums import cell_sums, row_runs, row_target_sums, tap_sums, target_sums

    smallest = 0 if case.sums else math.inf
    with ExitStack() as stack:
        for module in (cell_sums, row_runs, row_target_sums, tap_sums, target_sums):
            stack.enter_context(patch.object(module, "SMALLEST", smallest))
        stack.enter_context(patch.object(row_runs, "SMALLEST_SINGLE", smallest))
        for module in (row_runs, row_target_sums):
            stack.enter_context(patch.object(module, "LEAST_FILLED", 0))
        yield


def check_nvidia(name: str, capability: int) -> Row:
    """Compile a case for an NVIDIA GPU, read the machine code, and emulate the kernels."""
    from carafepp.kernels.gpu.assembly import compile_launch, read_assembly
    from ptx_step import emulate, training_step

    codes, counts = [], []

    def run(launch, capability):
        codes.append(read_assembly(compile_launch(launch, capability)))
        counts.append(emulate(launch, capability))
        return counts[-1]

    case = CASES[name]
    problem, error, equal = "", None, None
    try:
        if isinstance(case, Module) and case.trained:
            errors = train_module(case, lambda launch: run(launch, capability))
        elif isinstance(case, Module):
            launches, y, exact = build_module(case, divmod(capability, 10))
            for launch in launches:
                run(launch, capability)
            errors = {"y": relative_error(y, exact)}
        else:
            tiles = find_tiles(case, divmod(capability, 10))
            images = None if case.sums else MANY
            with choose_sums(case):
                errors = training_step(*case.size, *case[1:4], capability=capability, images=images, tiles=tiles, run=run).errors
        # a NaN is where nothing was written
        error = max(errors.values(), key=lambda value: (value != value, value))
        equal = error < TRITON_TOLERANCES[case.dtype]
    except Exception as exception:
        problem = describe(exception)
    figures = ([code.registers for code in codes], [code.spills for code in codes], [code.shared for code in codes])
    registers, spills, shared = figures if codes else ((None,), (0,), (None,))
    sectors = sum(found.get(f"global_{kind}_sectors", 0) for found in counts for kind in ("ld", "st"))
    total = (sum(spills), max(shared), sectors) if codes else (None,) * 3
    return Row(name, len(codes), max(registers), *total, error, equal, problem)


def train_module(case: Module, run: Callable[[Launch], Any]) -> dict[str, float]:
    """Run every launch of a training step of a module, and return the errors of the output and of all gradients."""
    from carafepp.kernels.gpu.layer import inference
    from carafepp.models.carafe import CARAFE
    from carafepp.models.inference import find_plan

    def start(key: object, like: Tensor, addresses: object, build: Callable[[], tuple[Any, list[Launch]]]) -> None:
        for launch in build()[1]:
            run(launch)

    torch.manual_seed(0)
    module = CARAFE(case.size[1], **case.options)
    nn.init.normal_(module.content_encoder.weight, std=0.1)
    x = torch.randn(case.size).to(case.dtype, memory_format=NHWC)
    layers = module.channel_compressor, module.compressor_norm, module.content_encoder
    exact, source = copy.deepcopy(module).double(), x.double().requires_grad_()
    with torch.autocast("cpu", case.dtype), patch.object(inference, "runs_on", lambda *_: True):
        planned, given, addresses, _ = find_plan(*layers, x, module.spec, None, trained=True)

    def poison(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *arguments, **options: allocate(*arguments, **options).fill_(math.nan)

    allocated = [patch.object(Tensor, name, poison(getattr(Tensor, name))) for name in ("new_empty", "new_empty_strided")]
    with patch.object(planned, "start", start), allocated[0], allocated[1]:
        y, kept = planned.forward(x, given, addresses)
        dy = torch.randn(y.shape).to(y)
        values = [y, *planned.backward(dy, x, kept, given[:8], [True] * 7)]
    expected = exact(source)
    names = ["y", "x", *(name for name, _ in module.named_parameters())]
    exacts = [expected, *torch.autograd.grad(expected, [source, *exact.parameters()], dy.double())]
    # the gradient of the bias before the norm is 0
    return {name: relative_error(a, b) for name, a, b in zip(names, values, exacts, strict=True) if name != "channel_compressor.bias"}


def build_module(case: Module, capability: tuple[int, int]) -> tuple[list[Launch], Tensor, Tensor]:
    """Return the launches of a module, its output, which is full of NaN as all maps between the launches are, and what it should become."""
    from carafepp.kernels.gpu.layer import encoder
    from carafepp.kernels.gpu.operator_launches import forward_launches
    from carafepp.models.carafe import CARAFE

    def empty(*size: int) -> Tensor:
        return torch.full(size, math.nan, dtype=case.dtype).contiguous(memory_format=NHWC)

    torch.manual_seed(0)
    module = CARAFE(case.size[1], **case.options).eval().requires_grad_(False)
    # kernels that are far from a box blur, and a norm that is far from the identity
    nn.init.normal_(module.content_encoder.weight, std=0.1)
    nn.init.normal_(module.channel_compressor.bias)
    statistics: list[Tensor | None] = [None] * 4
    if norm := next((layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)), None):
        statistics = [norm.running_mean, norm.running_var, norm.weight, norm.bias]
        for tensor in statistics:
            nn.init.uniform_(tensor, 0.5, 2)
    x = torch.randn(case.size).to(case.dtype, memory_format=NHWC)
    compressor, conv, spec = module.channel_compressor, module.content_encoder, module.spec
    outputs, row = conv.out_channels, -(-conv.out_channels // 16) * 16
    layers = encoder.Layers(
        *(True, norm is not None, norm is not None, norm.eps if norm else 0.0, compressor.out_channels, outputs, row),
        *(*conv.kernel_size, *conv.stride, *conv.padding, *conv.dilation),
    )
    parameters = encoder.Parameters(compressor.weight, compressor.bias, *statistics, conv.weight, conv.bias)
    n, c, h, w = case.size
    logits = empty(n, row, spec.cells(h), spec.cells(w))
    features, copied = empty(n, layers.width, h, w), torch.full((layers.copied,), math.nan, dtype=case.dtype)
    cells = logits[:, :outputs].unflatten(1, (spec.groups * spec.taps, spec.up, spec.up))
    y, lse = empty(n, c, spec.output_size(h), spec.output_size(w)), torch.full((n, spec.groups, *cells.shape[2:]), math.nan)
    with patch.object(encoder, "MANY_PIXELS", 1 if case.many else math.inf):
        launches = [encoder.compress_launch(x, features, copied, parameters, layers)]
        launches.append(encoder.encode_launch(features, copied, logits, parameters, layers))
    launches += forward_launches(x, cells, y, lse, spec, capability=capability)
    return launches, y, copy.deepcopy(module).double()(x.double())


def list_launches(name: str, capability: tuple[int, int]) -> list[Launch]:
    """Return the launches of a case."""
    from carafepp.kernels.gpu.training_step import build_training_step

    case = CASES[name]
    if isinstance(case, Module) and case.trained:
        launches: list[Launch] = []
        train_module(case, launches.append)
        return launches
    if isinstance(case, Module):
        return build_module(case, capability)[0]
    step = build_training_step(MANY, *case.size[1:], *case[1:4])
    tiles = find_tiles(case, capability) or dict.fromkeys(DIRECTIONS)
    with choose_sums(case):
        return [launch for kernel, tile in tiles.items() for launch in step.build_launches(kernel, tile=tile, capability=capability)]


def check_amd(name: str, target: str) -> Row:
    """Compile a case for an AMD GPU."""
    import triton
    from triton.backends.compiler import GPUTarget

    capability, lanes = AMD[target]
    codes, problem = [], ""
    try:
        for launch in list_launches(name, divmod(capability, 10)):
            code = triton.compile(launch.source(), target=GPUTarget("hip", target, lanes), options=launch.options)
            codes.append((*map(count_amd(code.asm["amdgcn"]), ("vgpr_count", "vgpr_spill_count")), code.metadata.shared))
            if not code.asm["hsaco"]:
                problem = "not linked: this Triton needs the linker of ROCm"
    except Exception as exception:
        problem = describe(exception)
    registers, spills, shared = zip(*codes, strict=True) if codes else ((None,), (0,), (None,))
    return Row(name, len(codes), max(registers), sum(spills) if codes else None, max(shared), problem=problem)


def count_amd(assembly: str):
    """Return a function that reads a figure of the compiler from its assembly."""
    return lambda name: int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])


def describe(exception: BaseException) -> str:
    """Name an exception and its first cause in one line."""
    while exception.__cause__ is not None:
        exception = exception.__cause__
    return f"{type(exception).__name__}: {' '.join(str(exception).split())}"[:300]


def main(target: str, cases: list[str]) -> None:
    """Print a line for every case."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if target in AMD:
        # the launches differ on ROCm
        torch.version.hip = torch.version.hip or "6.4"
    for case in cases:
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        row = check_amd(case, target) if target in AMD else check_nvidia(case, NVIDIA[target][0])
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(row._asdict()), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
