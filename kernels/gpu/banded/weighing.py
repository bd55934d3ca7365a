"""The launch that computes the weights of features in NCHW before the gradient to the features, in the order in which it reads them.

A tile of that gradient reads a weight for every pair of a source and a target. Neighbouring sources read a target by different taps, whose
logits lie in different planes in NCHW: every pair takes a line of memory. The weights of a window are next to each other instead, in
channels_last at the resolution of the output, and none is computed twice.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.blocks import along_rows, split_group
from ..common.records import Logits, Sizes, Window, offset_type
from ..common.window import group_logits, logit_offset, lse_address, split_target, store_weights, weight
from ..launch import Launch
from ..tiles.geometry import power_of_two

# rows and columns of targets of a program, and its most taps
BLOCKS = {"BLOCK_H": 4, "BLOCK_W": 32}
MOST_TAPS = 32
NUM_WARPS = 4


@triton.jit
def weigh(
    sizes: Sizes,
    logits: Logits,  # [N, G * K * K, UP, UP, HQ, WQ]
    lse_ptr,  # [N, G, UP, UP, HQ, WQ]
    weights: Logits,  # [N, G * K * K, UP, UP, HQ, WQ]
    WINDOW: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Fill the weights; one program computes those of some taps of a rectangle of targets in one group."""
    TAPS: tl.constexpr = WINDOW.kernel_size * WINDOW.kernel_size
    PARTS: tl.constexpr = (TAPS + BLOCK_T - 1) // BLOCK_T
    rows, cols = sizes.hq * WINDOW.up, sizes.wq * WINDOW.up
    across, down = tl.cdiv(cols, BLOCK_W), tl.cdiv(rows, BLOCK_H)
    pid = tl.program_id(0)
    t = pid % PARTS * BLOCK_T + tl.arange(0, BLOCK_T).to(INDEX)
    pid = pid // PARTS
    m = tl.arange(0, BLOCK_H * BLOCK_W).to(INDEX)
    col = pid % across * BLOCK_W + m % BLOCK_W
    pid = pid // across
    row = pid % down * BLOCK_H + m // BLOCK_W
    pid = pid // down
    n, g = split_group(pid, sizes)
    u, v, q, r = split_target(row, col, WINDOW)
    exists = (row < rows) & (col < cols)
    mask = (t < TAPS)[:, None] & exists[None, :]
    logits = group_logits(logits, n, g, WINDOW)
    address = along_rows(logits.ptr + logit_offset(logits, u, v, q, r)[None, :], (t * logits.stride_c)[:, None])
    l = tl.load(address, mask=mask, other=0.0).to(tl.float32)
    lse = tl.zeros([BLOCK_H * BLOCK_W], tl.float32)
    if WINDOW.normalized:
        lse = tl.load(lse_address(lse_ptr, sizes, n * sizes.groups + g, u, v, q, r, WINDOW), mask=exists, other=0.0)
    weights = group_logits(weights, n, g, WINDOW)
    store_weights(weights, weight(l, lse[None, :], WINDOW), t, row, col, mask)


def empty_weights(logits: Tensor, dtype: torch.dtype) -> Logits:
    """Return memory for the weights of a data type, in the place of the logits."""
    n, channels, up, _, hq, wq = logits.shape
    weights = torch.empty((n, hq * up, wq * up, channels), dtype=dtype, device=logits.device)
    stride_n, stride_h, stride_w, stride_c = weights.stride()
    return Logits(weights, stride_n, stride_c, stride_h, stride_w, stride_h * up, stride_w * up)


def weighed_window(window: Window) -> Window:
    """Return the window in which weights are in the place of the logits."""
    return window._replace(normalizer="none", border="zero", normalized=False, weighed=True)


def weigh_launch(sizes: Sizes, logits: Logits, lse: Tensor, weights: Logits, window: Window) -> Launch:
    """Return the launch that fills the weights."""
    n, _, up, _, hq, wq = logits.ptr.shape
    arguments = {"sizes": sizes, "logits": logits, "lse_ptr": lse, "weights": weights}
    taps = window.kernel_size**2
    block_t = min(MOST_TAPS, power_of_two(taps))
    constants = {"WINDOW": window, "INDEX": offset_type(logits.ptr, weights.ptr), "BLOCK_T": block_t} | BLOCKS
    blocks = triton.cdiv(taps, block_t) * triton.cdiv(hq * up, BLOCKS["BLOCK_H"]) * triton.cdiv(wq * up, BLOCKS["BLOCK_W"])
    return Launch(weigh, (n * sizes.groups * blocks, 1, 1), arguments, constants, NUM_WARPS, 1)
