"""The providers that carafepp-bench compares: the operator, the same result in plain PyTorch, and interpolation or pooling."""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import reassemble
from ...kernels.geometry import Spec
from ...kernels.reference import reassembly_kernels, weighted_sum

# maps features x [N, C, H, W] and logits [N, G * K * K * up * up, Hq, Wq] to the output
Provider = Callable[[Tensor, Tensor], Tensor]


def unfold_output(x: Tensor, logits: Tensor, spec: Spec) -> Tensor:
    """Unfold the nearest-upsampled map into every window at output resolution, then sum with einsum."""
    n, c, _, _ = x.shape
    kernels = reassembly_kernels(logits, spec, *x.shape[2:])  # [N, G, K * K, Ho, Wo]
    larger = F.interpolate(x, scale_factor=spec.up, mode="nearest") if spec.up > 1 else x
    padding = spec.kernel_size // 2 * spec.up
    windows = F.unfold(larger, spec.kernel_size, dilation=spec.up, padding=padding, stride=spec.down)
    windows = windows.view(n, spec.groups, c // spec.groups, spec.taps, *kernels.shape[3:])
    return torch.einsum("ngkij,ngckij->ngcij", kernels, windows).flatten(1, 2)


def unfold_source(x: Tensor, logits: Tensor, spec: Spec) -> Tensor:
    """Unfold the map into every window at source resolution, then compute one matrix product for each cell."""
    n, c, _, _ = x.shape
    cells = logits.shape[2:]
    windows = F.unfold(x, spec.kernel_size, padding=spec.kernel_size // 2, stride=spec.down)
    windows = windows.view(n, spec.groups, c // spec.groups, spec.taps, -1).permute(0, 1, 4, 2, 3)  # [N, G, cells, C / G, K * K]
    kernels = logits.view(n, spec.groups, spec.taps, spec.up**2, -1).softmax(2).permute(0, 1, 4, 2, 3)  # [N, G, cells, K * K, up * up]
    y = (windows @ kernels).permute(0, 1, 3, 4, 2).reshape(n, c * spec.up**2, *cells)
    return F.pixel_shuffle(y, spec.up)


def sum_shifted_maps(x: Tensor, logits: Tensor, spec: Spec) -> Tensor:
    """Sum shifted maps at source resolution, the form for which torch.compile generates the fastest code of those tried."""
    n, c, _, _ = x.shape
    rows, columns = logits.shape[2:]
    kernels = logits.view(n, spec.groups, spec.taps, spec.up, spec.up, rows, columns).softmax(2).permute(0, 1, 2, 5, 3, 6, 4)
    padded = F.pad(x, (spec.kernel_size // 2,) * 4).unflatten(1, (spec.groups, c // spec.groups))
    y: Any = 0
    for tap in range(spec.taps):
        ky, kx = divmod(tap, spec.kernel_size)
        shifted = padded[..., ky : ky + rows * spec.down : spec.down, kx : kx + columns * spec.down : spec.down]
        y = y + kernels[:, :, None, tap] * shifted[..., :rows, None, :columns, None]  # [N, G, C / G, Hq, up, Wq, up]
    return y.reshape(n, c, rows * spec.up, columns * spec.up)


def sum_taps(x: Tensor, logits: Tensor, spec: Spec) -> Tensor:
    """Sum over taps at output resolution, as the definition does, for torch.compile to fuse."""
    return weighted_sum(x, reassembly_kernels(logits, spec, *x.shape[2:]), spec)


def list_providers(spec: Spec, shape: tuple[int, ...], device: str, max_bytes: float) -> dict[str, Provider | str]:
    """Return every provider by name, or the reason why it does not apply.

    Args:
        spec: the specification of the operator.
        shape: N, C, H, W of the features.
        device: the device of the tensors.
        max_bytes: the largest unfolded copy to make.
    """
    kind = torch.device(device).type
    n, c, h, w = shape
    options = spec._asdict()
    integer = spec.up == 1 or spec.down == 1
    only_up, only_down = spec.down == 1, spec.up == 1
    cells = n * c * spec.taps * spec.cells(h) * spec.cells(w) * 4

    def when(condition: bool, provider: Provider, reason: str) -> Provider | str:
        return provider if condition else reason

    def unfolded(provider: Callable[..., Tensor], size: float) -> Provider | str:
        if not integer or spec.normalizer != "softmax":
            return "supports only integer scales and softmax"
        if spec.border != "zero":
            return "supports only zeros outside the map"
        return when(size <= max_bytes, functools.partial(provider, spec=spec), f"its unfolded copy takes {size / 1e9:.1f} GB")

    interpolation = functools.partial(F.interpolate, scale_factor=spec.up)
    return {
        "cpu": when(kind == "cpu", lambda x, logits: reassemble(x, logits, **options, backend="cpu"), "needs device=cpu"),
        "triton": when(kind == "cuda", lambda x, logits: reassemble(x, logits, **options, backend="triton"), "needs device=cuda"),
        "fallback": when(kind == "cpu", lambda x, logits: reassemble(x, logits, **options, backend="torch"), "needs device=cpu"),
        "unfold": unfolded(unfold_output, cells * spec.up**2),
        "unfold_source": unfolded(unfold_source, cells),
        "compiled_definition": functools.partial(torch.compile(sum_taps, dynamic=False), spec=spec),
        "compiled_taps": unfolded(torch.compile(sum_shifted_maps, dynamic=False), 0),
        "nearest": when(only_up, lambda x, _: interpolation(x, mode="nearest"), "needs op.down=1"),
        "bilinear": when(only_up, lambda x, _: interpolation(x, mode="bilinear"), "needs op.down=1"),
        "avg_pool": when(only_down, lambda x, _: F.avg_pool2d(x, spec.kernel_size, spec.down, spec.kernel_size // 2), "needs op.up=1"),
        "mmcv": find_mmcv(spec, kind),
    }


def find_mmcv(spec: Spec, kind: str) -> Provider | str:
    """Return the operator of mmcv, or the reason why it does not apply on a device of this kind."""
    if kind != "cuda" or not importlib.util.find_spec("mmcv"):
        return "needs mmcv and device=cuda"
    if spec.down > 1 or spec.normalizer != "softmax" or spec.border != "zero":
        return "supports only upsampling with softmax and zeros outside the map"
    carafe = importlib.import_module("mmcv.ops").carafe

    def run(x: Tensor, logits: Tensor) -> Tensor:
        kernels = reassembly_kernels(logits, spec, *x.shape[2:]).flatten(1, 2).contiguous()
        return carafe(x.contiguous(), kernels, spec.kernel_size, spec.groups, spec.up)

    return run
