"""The launches of the operator for given tensors, on any device: which kernels, with which tiles, and with what compiled in."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ..geometry import LSE_NORMALIZERS, PADDED_BORDERS, Spec, is_channels_last
from .banded.backward import banded_backward
from .banded.forward import banded_forward
from .banded.source_gradient import banded_source_gradient
from .banded.transposition import transpose_launch
from .banded.weighing import empty_weights, weigh_launch, weighed_window
from .common.records import Features, Layout, Logits, Sizes, Window, offset_type
from .launch import Launch
from .sums import taps
from .sums.cell_sums import cell_sum_launches, sums_cells
from .sums.padded_taps import padded_source_gradient
from .sums.row_gradients import row_gradient_launches
from .sums.row_runs import sums_rows
from .sums.row_sums import row_sum_launches
from .sums.row_target_sums import row_target_sum_launches, sums_row_targets
from .sums.tap_sums import sums_taps, tap_sum_launches
from .sums.target_sums import sums_targets, target_sum_launches
from .tiles.geometry import KernelName, Tile, TileProblem, as_read, halo, reach, run_alignments, run_vector
from .tiles.limits import is_tall, source_blocks
from .tiles.ranking import SEPARATE, TOGETHER, choose_backward, choose_tile
from .tiles.tables import find_in_tables, find_kernels
from .tiles.work import find_walk

TAP_BLOCKS = {"BLOCK_M": 32, "BLOCK_C": 32}
TAP_OPTIONS = {"num_warps": 4, "num_stages": 2}
# the capability for which a launch is planned if its tensors are not on a GPU
DEFAULT_CAPABILITY = (8, 0)
# from the arguments of the operator, by name
SumLaunches = Callable[[dict[str, Any], TileProblem, Window, Layout], list[Launch]]
INTERPRETED = not isinstance(banded_forward, triton.JITFunction)


def problem_of(x: Tensor, logits: Tensor, y: Tensor, spec: Spec, capability: tuple[int, int] | None = None) -> TileProblem:
    """Return the properties that the choice of a tile depends on; `y` is the output or its gradient."""
    n, c, _, _ = x.shape
    capability = capability or (torch.cuda.get_device_capability(x.device) if x.is_cuda else DEFAULT_CAPABILITY)
    channels, last = c // spec.groups, is_channels_last(x)
    x_align, y_align = (_alignment(t, channels, last) for t in (x, y))
    height, width = logits.shape[4:]
    return TileProblem(spec, channels, height, width, n * spec.groups, x.element_size(), last, x_align, y_align, capability)


def _device_name(x: Tensor) -> str:
    return torch.cuda.get_device_name(x.device) if x.is_cuda else x.device.type


def _sizes(x: Tensor, logits: Tensor, y: Tensor, spec: Spec) -> Sizes:
    _, c, h, w = x.shape
    return Sizes(spec.groups, c // spec.groups, h, w, *y.shape[2:], *logits.shape[4:])


def _alignment(features: Tensor, channels: int, channels_last: bool) -> int:
    """Return the elements, at most 16 bytes, at whose multiples every run along the fastest axis begins and ends."""
    fastest = 1 if channels_last else 3
    if features.stride(fastest) != 1:
        return 1
    steps = [step for axis, step in enumerate(features.stride()) if axis != fastest]
    return math.gcd(*steps, channels if channels_last else features.shape[3], 16 // features.element_size())


def choose_precision() -> str:
    """Return the precision of products of float32 blocks: plain TF32 only if torch uses it for float32 matrix products."""
    if INTERPRETED:
        return "widened"
    if torch.version.hip:
        # the matrix units of AMD GPUs take float32, and Triton refuses "tf32x3" for them
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


def _layout(problem: TileProblem, x_align: int, y_align: int, features: Sequence[Tensor], logits: Sequence[Tensor]) -> Layout:
    # pixels in NCHW are accessed in rows; a gradient may have another layout than its logits
    runs = [_cell_alignment(t) for t in logits] if problem.channels_last else [0]
    cell_align = math.gcd(*runs) if all(runs) else 0
    axes = 0 if problem.x_last else 1, 0 if problem.channels_last else 1
    return Layout(*axes, x_align, y_align, cell_align, offset_type(*features, *logits))


def _cell_alignment(logits: Tensor) -> int:
    """Return the elements, at most 16 bytes, at whose multiples the logits of a cell begin; 0 if they are not a run."""
    up = logits.shape[2]  # [N, G * K * K, UP, UP, HQ, WQ]
    if logits.stride()[1:4] != (up * up, up, 1):
        return 0
    return math.gcd(*logits.stride()[:2], *logits.stride()[4:], 16 // logits.element_size())


def _window(spec: Spec) -> Window:
    # without the groups, because a program works on one group and the same code serves any number of them
    return Window(spec.kernel_size, spec.up, spec.down, spec.normalizer, spec.border, spec.normalizer in LSE_NORMALIZERS, weighed=False)


def has_tiles(kernel: KernelName, problem: TileProblem) -> bool:
    """Return whether a kernel works in tiles; those that sum have none."""
    if kernel == "forward":
        return not (sums_taps(problem) or sums_rows(kernel, problem))
    if kernel == "logit_gradient":
        return not sums_rows(kernel, problem)
    return _find_sums(problem) is None


def _find_sums(problem: TileProblem) -> SumLaunches | None:
    """Return what builds the launches of the gradient to the features as a sum; None if it is a product."""
    choices = ((sums_targets, target_sum_launches), (sums_cells, cell_sum_launches), (sums_row_targets, row_target_sum_launches))
    return next((launches for sums, launches in choices if sums(problem)), None)


def _find_tile(kernel: KernelName, problem: TileProblem, x: Tensor) -> Tile | None:
    """Return the tile from a table or the ranking; None for the kernels that work tap by tap, which alone read pixels outside the map."""
    if problem.spec.border in PADDED_BORDERS:
        return None
    return find_in_tables(kernel, problem, _device_name(x)) or choose_tile(kernel, problem)


def _tile_launch(
    kernel: triton.JITFunction, arguments: dict[str, Any], constants: dict[str, Any], problem: TileProblem, tile: Tile, programs: int
) -> Launch:
    """Return a launch with a number of programs for each tile."""
    rows, cols = triton.cdiv(problem.height, tile.cells_h * tile.steps), triton.cdiv(problem.width, tile.cells_w)
    given = {name: arguments[name] for name in kernel.arg_names if name in arguments}
    grid = (problem.batch * rows * cols * programs, 1, 1)
    return Launch(kernel, grid, given, constants, tile.num_warps, tile.num_stages, tile.max_registers)


def _tap_launch(kernel: triton.JITFunction, arguments: dict[str, Tensor | tuple], problem: TileProblem, locations: int) -> Launch:
    given = {name: arguments[name] for name in kernel.arg_names if name in arguments}
    constants = {"WINDOW": _window(problem.spec), "AXIS": 0 if problem.channels_last else 1} | TAP_BLOCKS
    # only the first axis of a grid may exceed 65535 programs
    grid = (problem.batch * triton.cdiv(locations, TAP_BLOCKS["BLOCK_M"]), 1, 1)
    return Launch(kernel, grid, given, constants, **TAP_OPTIONS)


def forward_launches(
    x: Tensor,
    logits: Tensor,
    y: Tensor,
    lse: Tensor,
    spec: Spec,
    *,
    tile: Tile | None = None,
    capability: tuple[int, int] | None = None,
) -> list[Launch]:
    """Return the launches that fill y and lse; arguments as for `forward`, on any device, including "meta".

    `tile` replaces that of a table or of the ranking, and `capability` that of the device.
    """
    problem = problem_of(x, logits, y, spec, capability)
    arguments = {
        "sizes": _sizes(x, logits, y, spec),
        "x": Features(x, *x.stride()),
        "logits": Logits(logits, *logits.stride()),
        "y": Features(y, *y.stride()),
        "lse_ptr": lse,
    }
    if tile is None and sums_taps(problem):
        layout = _layout(problem, problem.x_align, problem.y_align, (x, y), (logits,))
        return tap_sum_launches(arguments, problem, _window(spec), layout)
    if tile is None and sums_rows("forward", problem):
        layout = _layout(problem, problem.x_align, problem.y_align, (x, y), (logits,))
        return row_sum_launches(arguments, problem, _window(spec), layout)
    tile = tile or _find_tile("forward", problem, x)
    if tile is None:
        return [_tap_launch(taps.tap_forward, arguments, problem, logits.shape[2:].numel())]
    problem = as_read("forward", problem, tile)
    before, arguments = _copy_source(problem, arguments)
    x = arguments["x"].ptr
    x_align, y_align = run_alignments(problem, tile)[0], problem.y_align
    window = halo(spec, tile.cells_h, tile.cells_w, run_vector(problem, tile, x_align))
    if not problem.x_last and window.p == window.m:
        # the compiler lays out blocks of one shape alike: with the wider vectors of y, a warp would load x in pieces that lie apart
        y_align = min(x_align, y_align)
    constants = {
        "WINDOW": _window(spec),
        "TILE": tile,
        "HALO": window,
        "LAYOUT": _layout(problem, x_align, y_align, (x, y), (logits,)),
        "PRECISION": choose_precision(),
        # the targets of a small tile are too few rows for the matrix units of capability 9.0 and later
        "TALL": problem.capability >= (9, 0) and tile.cells_h * tile.cells_w * spec.up**2 < 64,
    }
    return [*before, _tile_launch(banded_forward, arguments, constants, problem, tile, tile.split)]


def _copy_source(problem: TileProblem, arguments: dict[str, Any]) -> tuple[list[Launch], dict[str, Any]]:
    """Return the launch that fills the copy of x, if the kernel reads one, and the arguments with the copy in the place of x."""
    if not problem.copied:
        return [], arguments
    launch, copy = transpose_launch(arguments["x"].ptr)
    # the gradient to the logits does not touch that to x, which has the layout of x
    return [launch], arguments | dict.fromkeys(("x", "dx"), Features(copy, *copy.stride()))


def backward_launches(
    dy: Tensor,
    x: Tensor,
    logits: Tensor,
    lse: Tensor,
    dx: Tensor | None,
    dlogits: Tensor | None,
    spec: Spec,
    *,
    tile: Tile | None = None,
    capability: tuple[int, int] | None = None,
    factors: tuple[Tensor, Tensor] | None = None,
) -> list[Launch]:
    """Return the launches that fill dx and dlogits, unless they are None; arguments as for `backward`, on any device, including "meta".

    `tile` replaces those of tables or of the ranking, and `capability` that of the device. The product of `factors`, a map
    [N, width, H, W] in channels_last and a matrix [width, C], is added to dx, if `adds_product` and `dlogits` is None.
    """
    problem = problem_of(x, logits, dy, spec, capability)
    # a kernel does not touch a gradient that is None, so that the input can replace it
    to_x, to_logits = x if dx is None else dx, logits if dlogits is None else dlogits
    arguments = {
        "sizes": _sizes(x, logits, dy, spec),
        "x": Features(x, *x.stride()),
        "logits": Logits(logits, *logits.stride()),
        "lse_ptr": lse,
        "dy": Features(dy, *dy.stride()),
        "dx": Features(to_x, *to_x.stride()),
        "dlogits": Logits(to_logits, *to_logits.stride()),
    }
    kernels: tuple[KernelName, ...] = ()
    if dx is not None and dlogits is not None:
        kernels = TOGETHER if tile else _find_kernels(problem, x)
        if _shares_weights(kernels, problem, x):
            arguments["weights"] = empty_weights(logits, x.dtype)
    elif dlogits is not None:
        kernels = ("logit_gradient",)
    elif dx is not None:
        kernels = ("source_gradient",)
    return [launch for kernel in kernels for launch in _kernel_launches(kernel, arguments, problem, tile, factors)]


def _shares_weights(kernels: tuple[KernelName, ...], problem: TileProblem, x: Tensor) -> bool:
    """Return whether the launch of the gradient to the logits writes the weights that the launch of the gradient to the features reads."""
    if kernels != SEPARATE or problem.channels_last:
        return False
    return all(has_tiles(kernel, problem) and _find_tile(kernel, problem, x) for kernel in kernels)


def adds_product(dy: Tensor, x: Tensor, logits: Tensor, spec: Spec) -> bool:
    """Return whether the gradient to x has a launch of its own that should add a product, which another launch would add to it.

    That costs a second launch that reads dy where one launch could compute both gradients.
    """
    problem = problem_of(x, logits, dy, spec)
    if not problem.x_last or _find_tile("source_gradient", problem, x) is None:
        return False
    return dy.numel() < x.numel() or _find_kernels(problem, x) == SEPARATE


def _find_kernels(problem: TileProblem, x: Tensor) -> tuple[KernelName, ...]:
    """Return the kernels that compute both gradients: those that have tiles in tables, or else the fastest by the model."""
    if problem.spec.border not in PADDED_BORDERS and all(has_tiles(kernel, problem) for kernel in SEPARATE):
        return find_kernels((SEPARATE, TOGETHER), problem, _device_name(x)) or choose_backward(problem)
    return SEPARATE


def _kernel_launches(
    kernel: KernelName, arguments: dict[str, Any], problem: TileProblem, tile: Tile | None, factors: tuple[Tensor, Tensor] | None
) -> list[Launch]:
    """Return the launch of a kernel of backward, after that of the copy or of the weights that it reads, if it reads any."""
    x, logits = arguments["x"].ptr, arguments["logits"].ptr
    sums = _find_sums(problem) if kernel == "source_gradient" and tile is None and factors is None else None
    if sums is not None:
        dy, dx = arguments["dy"].ptr, arguments["dx"].ptr
        # the gradient to x may have other strides than x
        x_align = _alignment(dx, problem.channels, problem.channels_last)
        layout = _layout(problem, x_align, problem.y_align, (dy, dx), (logits,))
        return sums(arguments, problem, _window(problem.spec), layout)
    if kernel == "logit_gradient" and tile is None and sums_rows(kernel, problem):
        dy, dlogits = arguments["dy"].ptr, arguments["dlogits"].ptr
        layout = _layout(problem, problem.x_align, problem.y_align, (x, dy), (logits, dlogits))
        return row_gradient_launches(arguments, problem, _window(problem.spec), layout)
    tile = tile or _find_tile(kernel, problem, x)
    if tile is None:
        if kernel == "logit_gradient":
            return [_tap_launch(taps.tap_logit_gradient, arguments, problem, logits.shape[2:].numel())]
        gradient = padded_source_gradient if problem.spec.border in PADDED_BORDERS else taps.tap_source_gradient
        return [_tap_launch(gradient, arguments, problem, x.shape[2:].numel())]
    problem = as_read(kernel, problem, tile)
    before, arguments = _copy_source(problem, arguments)
    window = _window(problem.spec)
    if problem.weighed:
        if "weights" not in arguments:
            arguments = arguments | {"weights": empty_weights(arguments["logits"].ptr, x.dtype)}
            sizes, lse, weights = (arguments[name] for name in ("sizes", "lse_ptr", "weights"))
            before = [weigh_launch(sizes, arguments["logits"], lse, weights, window)]
        arguments, window = arguments | {"logits": arguments["weights"]}, weighed_window(window)
    return [*before, _banded_launch(kernel, arguments, window, problem, tile, factors)]


def _banded_launch(
    kernel: KernelName,
    arguments: dict[str, Any],
    window: Window,
    problem: TileProblem,
    tile: Tile,
    factors: tuple[Tensor, Tensor] | None,
) -> Launch:
    x, logits, dy, dx, dlogits = (arguments[name].ptr for name in ("x", "logits", "dy", "dx", "dlogits"))
    # the gradient to x may have other strides than x
    x_align = math.gcd(problem.x_align, _alignment(dx, problem.channels, problem.x_last))
    x_align, y_align = run_alignments(problem._replace(x_align=x_align), tile)
    weights = [arguments["weights"].ptr] if "weights" in arguments else []
    layout = _layout(problem, x_align, y_align, (x, dy, dx, *(factors or ())[:1], *weights), (logits, dlogits))
    added: dict[str, Any] = {"map_ptr": None, "matrix_ptr": None, "WIDTH": 0, "WINDOW": window}
    if factors is not None:
        arguments = arguments | dict(zip(("map_ptr", "matrix_ptr"), factors, strict=True))
        added = {"WIDTH": factors[0].shape[1], "WINDOW": window}
    if kernel == "source_gradient" and tile.steps > 1:
        return _walk_launch(arguments, added, layout, problem, tile)
    blocks = source_blocks(kernel, problem, tile)
    constants = added | {
        "TILE": tile,
        "HALO": halo(problem.spec, tile.cells_h, tile.cells_w, run_vector(problem, tile, x_align)),
        "REACH": reach(problem.spec, tile.cells_h, tile.cells_w, run_vector(problem, tile, y_align)),
        "BLOCKS": blocks,
        "LAYOUT": layout,
        "PRECISION": choose_precision(),
        "NEED_DX": kernel != "logit_gradient",
        "NEED_DLOGITS": kernel != "source_gradient",
        "NEED_WEIGHTS": kernel == "logit_gradient" and bool(weights),
        "TALL": is_tall(problem, tile, blocks.channels),
    }
    programs = constants["NEED_DLOGITS"] + constants["NEED_DX"] * tile.split
    # a kernel that stores no weights does not touch them
    arguments = {"weights": arguments["logits"]} | arguments
    return _tile_launch(banded_backward, arguments, constants, problem, tile, programs)


def _walk_launch(arguments: dict[str, Any], added: dict[str, Any], layout: Layout, problem: TileProblem, tile: Tile) -> Launch:
    """Return the launch of the gradient to the features by programs that walk, one for each walk and block of channels."""
    step, sizes, radius = find_walk(problem, tile), arguments["sizes"], problem.spec.kernel_size // 2
    walks = triton.cdiv(sizes.h + radius, tile.steps * step.rows) * triton.cdiv(sizes.w + radius, step.cols)
    grid = (problem.batch * walks * triton.cdiv(problem.channels, tile.block_c), 1, 1)
    given = {name: arguments[name] for name in banded_source_gradient.arg_names if name in arguments}
    tall = is_tall(problem, tile, tile.block_c)
    constants = added | {"TILE": tile, "WALK": step, "LAYOUT": layout, "PRECISION": choose_precision(), "TALL": tall}
    return Launch(banded_source_gradient, grid, given, constants, tile.num_warps, tile.num_stages, tile.max_registers)
