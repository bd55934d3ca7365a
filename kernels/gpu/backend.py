"""The operator on a GPU: which kernels to launch for given tensors, and the entry points behind the ops.

Forward saves one float32 log-sum-exp per window and group for backward, nothing else. No launch uses atomics or scratch memory: both
gradients are deterministic.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

from ..geometry import Spec, is_channels_last
from . import taps
from .banded_backward import banded_backward
from .banded_forward import banded_forward
from .launch import INT32_MAX, Launch, Plan, strides
from .tile_geometry import Tile, TileProblem
from .tile_limits import source_blocks
from .tile_ranking import choose_tile
from .tile_tables import measured_tile

TAP_BLOCKS = {"BLOCK_M": 32, "BLOCK_C": 32}
TAP_OPTIONS = {"num_warps": 4, "num_stages": 2}
# the capability that a launch is planned for where there is no device to ask
DEFAULT_CAPABILITY = (8, 0)


def forward(x: Tensor, logits: Tensor, y: Tensor, lse: Tensor, spec: Spec) -> None:
    """Fill y [N, C, Ho, Wo] and lse [N, G, up, up, Hq, Wq] from x and logits [N, G * K * K, up, up, Hq, Wq]."""
    _check_device(x)
    _run(forward_launches, (x, logits, y, lse), spec)


def backward(dy: Tensor, x: Tensor, logits: Tensor, lse: Tensor, dx: Tensor | None, dlogits: Tensor | None, spec: Spec) -> None:
    """Fill those of dx and dlogits that are asked for."""
    _check_device(x)
    _run(backward_launches, (dy, x, logits, lse, dx, dlogits), spec)


# what a call launches, by everything that it depends on: planning and looking up kernels takes the host longer than launching
_plans: dict[tuple, list[Plan]] = {}
MAX_PLANS = 4096


def _run(build: Callable[..., list[Launch]], tensors: tuple[Tensor | None, ...], spec: Spec) -> None:
    like = tensors[0]
    layouts = tuple(None if t is None else (t.shape, t.stride()) for t in tensors)
    key = (build, spec, layouts, like.dtype, like.device, _precision())
    if key not in _plans:
        if len(_plans) == MAX_PLANS:
            _plans.clear()
        _plans[key] = [Plan(launch, tensors) for launch in build(*tensors, spec)]
    with _device_guard(like):
        for plan in _plans[key]:
            plan.run(tensors)


def _device_guard(tensor: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, wherever the tensors are."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


def _check_device(x: Tensor) -> None:
    if x.device.type == "cpu" and isinstance(banded_forward, triton.JITFunction):
        raise ValueError("backend 'triton' takes CPU tensors only in Triton's interpreter (TRITON_INTERPRET=1); use backend 'cpu'")


def problem_of(x: Tensor, logits: Tensor, y: Tensor, spec: Spec, capability: tuple[int, int] | None = None) -> TileProblem:
    """What the choice of a tile depends on; `y` is the output or its gradient."""
    n, c, _, _ = x.shape
    capability = capability or (torch.cuda.get_device_capability(x.device) if x.is_cuda else DEFAULT_CAPABILITY)
    channels, last = c // spec.groups, is_channels_last(x)
    aligned = (_alignment(t, channels, last) for t in (x, y))
    return TileProblem(spec, channels, *logits.shape[4:], n * spec.groups, x.element_size(), last, *aligned, capability)


def _device_name(x: Tensor) -> str:
    return torch.cuda.get_device_name(x.device) if x.is_cuda else x.device.type


def _sizes(x: Tensor, logits: Tensor, spec: Spec) -> dict[str, int]:
    _, c, h, w = x.shape
    size = {"G": spec.groups, "C": c // spec.groups, "H": h, "W": w, "HO": spec.output_size(h), "WO": spec.output_size(w)}
    return size | {"HQ": logits.shape[4], "WQ": logits.shape[5]}


def _constants(x: Tensor, spec: Spec) -> dict[str, int | str]:
    axis = 0 if is_channels_last(x) else 1
    return {"K": spec.kernel_size, "UP": spec.up, "DOWN": spec.down, "NORMALIZER": spec.normalizer, "AXIS": axis}


def _alignment(features: Tensor, channels: int, channels_last: bool) -> int:
    """Elements, up to 16 bytes of them, at whose multiples every run along the fastest axis begins and ends."""
    fastest = 1 if channels_last else 3
    if features.stride(fastest) != 1:
        return 1
    steps = [step for axis, step in enumerate(features.stride()) if axis != fastest]
    return math.gcd(*steps, channels if channels_last else features.shape[3], 16 // features.element_size())


def _precision() -> str:
    """How a product of float32 tiles is computed: as torch computes float32 matrix products."""
    if not isinstance(banded_forward, triton.JITFunction):
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


def _is_wide(*tensors: Tensor) -> bool:
    """Whether an offset within one image exceeds 32 bits."""
    return any(sum((size - 1) * step for size, step in zip(t.shape[1:], t.stride()[1:], strict=True)) > INT32_MAX for t in tensors)


def _tap_grid(x: Tensor, locations: int, spec: Spec) -> tuple[int, int, int]:
    # one axis: only the first may exceed 65535 programs
    return (len(x) * spec.groups * triton.cdiv(locations, TAP_BLOCKS["BLOCK_M"]), 1, 1)


def _tile_grid(problem: TileProblem, tile: Tile, programs: int) -> tuple[int, int, int]:
    rows, cols = triton.cdiv(problem.height, tile.cells_h), triton.cdiv(problem.width, tile.cells_w)
    return (problem.batch * rows * cols * programs, 1, 1)


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
    """Launches that fill y and lse; arguments as for `forward`, on any device, "meta" included.

    `tile` replaces the measured or chosen one, `capability` that of the device.
    """
    constants = _constants(x, spec)
    steps = strides("x", x) | strides("l", logits) | strides("y", y)
    arguments = {"x_ptr": x, "logits_ptr": logits, "y_ptr": y, "lse_ptr": lse} | _sizes(x, logits, spec) | steps
    problem = problem_of(x, logits, y, spec, capability)
    tile = tile or measured_tile("forward", problem, _device_name(x)) or choose_tile("forward", problem)
    if tile is None:
        grid = _tap_grid(x, logits.shape[2:].numel(), spec)
        return [Launch(taps.tap_forward, grid, arguments, constants | TAP_BLOCKS, **TAP_OPTIONS)]
    constants |= {"CELLS_H": tile.cells_h, "CELLS_W": tile.cells_w, "BLOCK_C": tile.block_c, "SPLIT": tile.split, "PRECISION": _precision()}
    constants["X_ALIGN"] = problem.x_align if problem.channels_last else min(problem.x_align, tile.vector)
    constants["Y_ALIGN"] = problem.y_align
    # channels are the rows of the product where its tile has too few targets for the matrix units from capability 9.0 on
    constants["TALL"] = problem.capability >= (9, 0) and tile.cells_h * tile.cells_w * spec.up**2 < 64
    constants["WIDE"] = _is_wide(x, logits, y)
    return [Launch(banded_forward, _tile_grid(problem, tile, tile.split), arguments, constants, tile.num_warps, tile.num_stages)]


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
) -> list[Launch]:
    """Launches that fill those of dx and dlogits that are given; arguments as for `backward`, on any device, "meta" included.

    `tile` replaces the measured or chosen one, `capability` that of the device.
    """
    constants = _constants(x, spec)
    problem = problem_of(x, logits, dy, spec, capability)
    tile = tile or measured_tile("backward", problem, _device_name(x)) or choose_tile("backward", problem)
    if tile is None:
        return _tap_backward_launches(dy, x, logits, lse, dx, dlogits, spec)
    # a gradient that is not asked for is not touched: any tensor of its kind stands for it
    results = {"dx_ptr": x if dx is None else dx, "dlogits_ptr": logits if dlogits is None else dlogits}
    arguments = {"x_ptr": x, "logits_ptr": logits, "lse_ptr": lse, "dy_ptr": dy} | results | _sizes(x, logits, spec)
    arguments |= strides("x", x) | strides("l", logits) | strides("dy", dy)
    arguments |= strides("dx", results["dx_ptr"]) | strides("dl", results["dlogits_ptr"])
    constants |= {"CELLS_H": tile.cells_h, "CELLS_W": tile.cells_w, "BLOCK_L": tile.block_c, "SPLIT": tile.split}
    blocks = source_blocks(problem, tile)
    constants |= {"BLOCK_X": blocks.channels, "BLOCK_D": blocks.targets}
    constants |= {"NEED_DX": dx is not None, "NEED_DLOGITS": dlogits is not None, "PRECISION": _precision()}
    constants["X_ALIGN"] = math.gcd(problem.x_align, _alignment(results["dx_ptr"], problem.channels, problem.channels_last))
    constants["DY_ALIGN"] = problem.y_align
    if not problem.channels_last:
        constants["X_ALIGN"], constants["DY_ALIGN"] = min(constants["X_ALIGN"], tile.vector), min(problem.y_align, tile.vector)
    constants["WIDE"] = _is_wide(x, logits, dy, *results.values())
    programs = constants["NEED_DLOGITS"] + constants["NEED_DX"] * tile.split
    return [Launch(banded_backward, _tile_grid(problem, tile, programs), arguments, constants, tile.num_warps, tile.num_stages)]


def _tap_backward_launches(dy, x, logits, lse, dx, dlogits, spec) -> list[Launch]:
    constants = _constants(x, spec) | TAP_BLOCKS
    sizes = _sizes(x, logits, spec)
    given = {"logits_ptr": logits, "lse_ptr": lse, "dy_ptr": dy}
    steps = strides("l", logits) | strides("dy", dy)
    launches = []
    if dlogits is not None:
        arguments = {"x_ptr": x} | given | {"dlogits_ptr": dlogits} | sizes | strides("x", x) | steps
        arguments |= strides("dl", dlogits)
        grid = _tap_grid(x, logits.shape[2:].numel(), spec)
        launches.append(Launch(taps.tap_logit_gradient, grid, arguments, constants, **TAP_OPTIONS))
    if dx is not None:
        arguments = given | {"dx_ptr": dx} | sizes | steps | strides("dx", dx)
        grid = _tap_grid(x, x.shape[2:].numel(), spec)
        launches.append(Launch(taps.tap_source_gradient, grid, arguments, constants, **TAP_OPTIONS))
    return launches
