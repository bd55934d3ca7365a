"""Forward of float32 in channels_last as a sum over the taps of a window, in two launches: the weights of all windows, and the sums.

The weights are stored in the order in which the sums read them. A *site* is the targets that share a window: those of a cell for an integer
factor of upsampling, and otherwise a single target. A program of the second launch computes STEP targets of every site of a rectangle, in
some channels. It loads a source once for all targets of a site and of the site beside it, keeps their sums in registers, and needs neither
shared memory nor matrix units.

In float32 this takes fewer instructions than products with a banded matrix (banded/forward.py): these also multiply the zeros outside the
windows, and each of them is three products in TF32. The sums serve any window and any border.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...geometry import PADDED_BORDERS, Spec
from ..common.blocks import addresses, align_sizes, align_strides, find_tile, image, load, split_group, store
from ..common.records import Features, Layout, Logits, Sizes, Window
from ..common.window import centre, normalize_tile, place_targets
from ..launch import INT32_MAX, Launch
from ..tiles.geometry import Halo, TileProblem, halo, power_of_two
from .taps import clamp

# bytes of the output from which the sums are taken: below it, a second launch costs more than they save
SMALLEST = 2**22
# most weights of a target over its channels: groups of few channels would need a multiple of the memory of the output
MOST_WEIGHTS = 2
# most targets of a site that a program computes
STEP = 4
# neighbouring sites in a row that share the sources of a thread
GROUP = 2
# most channels of a program of the sums, and sums of a thread for one target of its sites
CHANNELS, SUMS_OF_THREAD = 64, 8
# cost of the place of a site in a program, in sources read
PLACES = 4
WARPS, WARP_SIZE = 4, 32
# with more registers, a multiprocessor would hold too few programs; windows of 7 x 7 spill two or three values, outside the loop
MAX_REGISTERS = 128
# Triton 3.4 takes several sums of a loop for one if they differ only in which result of an operation they add, here of tl.split
MERGES_SUMS = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 5)
# weights of a program of the first launch, and the most of a thread
WEIGHTS, WEIGHTS_OF_THREAD = 1024, 32


class Sums(NamedTuple):
    """The division of the sums among programs. A constant."""

    subs: int  # targets of a site
    step: int  # those of a program
    steps: int  # programs that share a site
    group: int  # neighbouring sites in a row that share the sources of a thread
    rows: int  # of groups of a program
    cols: int
    block_c: int  # channels of a program
    whole: bool  # whether all programs have that many channels


@triton.jit
def count_sites(sizes: Sizes, WINDOW: tl.constexpr, SUMS: tl.constexpr):
    """Return the rows and columns of sites of a map."""
    if SUMS.subs == 1:
        return sizes.hq * WINDOW.up, sizes.wq * WINDOW.up
    else:
        return sizes.hq, sizes.wq


@triton.jit
def first_weight(weights_ptr, ng, rows, cols, site, WINDOW: tl.constexpr, SUMS: tl.constexpr):
    """Return the address of the first weight of a site, in a group counted over all images; those of a tap are next to each other."""
    PLACES: tl.constexpr = WINDOW.kernel_size * WINDOW.kernel_size * SUMS.step * SUMS.steps
    return weights_ptr + ng.to(tl.int64) * rows * cols * PLACES + site * PLACES


@triton.jit
def weigh_sites(
    sizes: Sizes,
    logits: Logits,  # [N, G * K * K, UP, UP, HQ, WQ]
    lse_ptr,  # [N, G, UP, UP, HQ, WQ]
    weights_ptr,  # [N * G, sites, K * K, STEPS * STEP]
    WINDOW: tl.constexpr,
    HALO: tl.constexpr,
    LAYOUT: tl.constexpr,
    SUMS: tl.constexpr,
    STORES: tl.constexpr,  # whether the log-sum-exp of every window is stored, where weights are normalized
):
    """Fill the weights, those of targets without output with zeros; one program computes those of a tile of cells."""
    K: tl.constexpr = WINDOW.kernel_size
    UP: tl.constexpr = WINDOW.up
    CELLS_H: tl.constexpr = HALO.rows // UP
    CELLS_W: tl.constexpr = HALO.cols // UP
    q0, r0, ng = find_tile(tl.program_id(0), tl.cdiv(sizes.hq, CELLS_H), tl.cdiv(sizes.wq, CELLS_W))
    q0 *= CELLS_H
    r0 *= CELLS_W
    n, g = split_group(ng, sizes)
    w = normalize_tile(sizes, logits, lse_ptr, ng, n, g, q0, r0, STORES, WINDOW, HALO, LAYOUT)

    m = tl.arange(0, HALO.m).to(LAYOUT.index)
    mi, mj, u, v, q, r = place_targets(m, HALO, WINDOW, LAYOUT)
    row, col, q, r = q0 * UP + mi, r0 * UP + mj, q0 + q, r0 + r
    exists = (m < HALO.rows * HALO.cols) & (q < sizes.hq) & (r < sizes.wq)
    t = tl.arange(0, HALO.t).to(LAYOUT.index)
    if WINDOW.border == "zero" or WINDOW.border == "renormalize":
        # the sums read a pixel of the map there
        i = (centre(row, WINDOW) - K // 2)[None, :] + (t // K)[:, None]
        j = (centre(col, WINDOW) - K // 2)[None, :] + (t % K)[:, None]
        w = tl.where((i >= 0) & (i < sizes.h) & (j >= 0) & (j < sizes.w), w, 0.0)
    w = tl.where(((row < sizes.ho) & (col < sizes.wo))[None, :], w, 0.0)
    rows, cols = count_sites(sizes, WINDOW, SUMS)
    if SUMS.subs == 1:
        site, sub = row * cols + col, tl.zeros_like(m)
    else:
        site, sub = q * cols + r, u * UP + v
    address = first_weight(weights_ptr, ng, rows, cols, site, WINDOW, SUMS)[None, :]
    address += (t * (SUMS.step * SUMS.steps))[:, None] + sub[None, :]
    tl.store(address, w, mask=(t < K * K)[:, None] & exists[None, :])


@triton.jit
def split_targets(weights):
    """Return the columns of the weights [M, 4] of four targets, each [M]."""
    even, odd = tl.split(tl.reshape(weights, (weights.shape[0], 2, 2)))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    return w0, w1, w2, w3


@triton.jit
def add_tap(s0, s1, s2, s3, source, w_ptr, SITE: tl.constexpr, KX: tl.constexpr, WINDOW: tl.constexpr, SUMS: tl.constexpr):
    """Add sources [M, C] to the sums of sites [M], SITE after those at `w_ptr`, if the sources are in column KX of their windows."""
    K: tl.constexpr = WINDOW.kernel_size
    if KX >= 0 and KX < K:
        # a constant, which is a part of the instruction that loads
        w_ptr += (SITE * K * K + KX) * (SUMS.step * SUMS.steps)
        if SUMS.step == 1:
            s0 += tl.load(w_ptr)[:, None] * source
        else:
            w0, w1, w2, w3 = split_targets(tl.load(w_ptr[:, None] + tl.arange(0, 4)[None, :]))
            s0 += w0[:, None] * source
            s1 += w1[:, None] * source
            s2 += w2[:, None] * source
            s3 += w3[:, None] * source
    return s0, s1, s2, s3


@triton.jit
def store_sums(y: Features, q, r, rows, cols, sub, c, s0, s1, s2, s3, sizes: Sizes, WINDOW: tl.constexpr, SUMS: tl.constexpr):
    """Store the targets of the sites (q, r)."""
    store_target(y, q, r, rows, cols, sub, c, s0, sizes, WINDOW, SUMS)
    if SUMS.step > 1:
        store_target(y, q, r, rows, cols, sub + 1, c, s1, sizes, WINDOW, SUMS)
        store_target(y, q, r, rows, cols, sub + 2, c, s2, sizes, WINDOW, SUMS)
        store_target(y, q, r, rows, cols, sub + 3, c, s3, sizes, WINDOW, SUMS)


@triton.jit
def store_target(y: Features, q, r, rows, cols, sub, c, block, sizes: Sizes, WINDOW: tl.constexpr, SUMS: tl.constexpr):
    """Store one target of every site, if it exists."""
    if SUMS.subs == 1:
        row, col = q, r
    else:
        row, col = q * WINDOW.up + sub // WINDOW.up, r * WINDOW.up + sub % WINDOW.up
    exists = (q < rows) & (r < cols) & (sub < SUMS.subs) & (row < sizes.ho) & (col < sizes.wo)
    store(y, row, col, exists, c, sizes.c, block, 0, 1)


@triton.jit
def sum_taps(
    sizes: Sizes,
    x: Features,  # [N, G * C, H, W]
    weights_ptr,  # [N * G, sites, K * K, STEPS * STEP]
    y: Features,  # [N, G * C, HO, WO]
    WINDOW: tl.constexpr,
    LAYOUT: tl.constexpr,
    SUMS: tl.constexpr,
):
    """Fill y from the weights; one program computes a block of channels of some targets of a rectangle of sites."""
    K: tl.constexpr = WINDOW.kernel_size
    DOWN: tl.constexpr = WINDOW.down
    M: tl.constexpr = SUMS.rows * SUMS.cols
    BLOCK_C: tl.constexpr = SUMS.block_c
    sizes = align_sizes(sizes, LAYOUT)
    x = align_strides(x, 0, LAYOUT.x_align)
    y = align_strides(y, 0, LAYOUT.y_align)
    rows, cols = count_sites(sizes, WINDOW, SUMS)
    pid = tl.program_id(0)
    parts = tl.cdiv(sizes.c, BLOCK_C)
    c = pid % parts * BLOCK_C + tl.arange(0, BLOCK_C).to(LAYOUT.index)
    pid = pid // parts
    sub = pid % SUMS.steps * SUMS.step
    q0, r0, ng = find_tile(pid // SUMS.steps, tl.cdiv(rows, SUMS.rows), tl.cdiv(cols, SUMS.cols * SUMS.group))
    n, g = split_group(ng, sizes)
    m = tl.arange(0, M).to(LAYOUT.index)
    q, r = q0 * SUMS.rows + m // SUMS.cols, (r0 * SUMS.cols + m % SUMS.cols) * SUMS.group
    # every source is a pixel of the map, so that only stores need masks
    near_q, near_r = tl.minimum(q, rows - 1), tl.minimum(r, cols - 1)
    if SUMS.subs == 1:
        ci, cj = centre(near_q, WINDOW), centre(near_r, WINDOW)
    else:
        ci, cj = near_q, near_r
    if WINDOW.border == "shift":
        ci, cj = clamp(ci, K // 2, sizes.h - 1 - K // 2), clamp(cj, K // 2, sizes.w - 1 - K // 2)
    x = image(x, n, g * sizes.c)
    y = image(y, n, g * sizes.c)
    # the second site of a group may be in the next row, or after the map: its sums are not stored
    weights_ptr = first_weight(weights_ptr, ng, rows, cols, near_q * cols + near_r, WINDOW, SUMS) + sub

    zero = tl.zeros([M, BLOCK_C], tl.float32)
    a0, a1, a2, a3 = zero, zero, zero, zero
    b0, b1, b2, b3 = zero, zero, zero, zero
    for ky in range(K):
        i = clamp(ci + ky - K // 2, 0, sizes.h - 1)
        w_ptr = weights_ptr + ky * (K * SUMS.step * SUMS.steps)
        for kx in tl.static_range(K + (SUMS.group - 1) * DOWN):
            j = clamp(cj + kx - K // 2, 0, sizes.w - 1)
            if SUMS.whole:
                source = tl.load(addresses(x, i, j, c, 0, 1))
            else:
                source = load(x, i, j, q < rows, c, sizes.c, 0, 1)
            a0, a1, a2, a3 = add_tap(a0, a1, a2, a3, source, w_ptr, 0, kx, WINDOW, SUMS)
            if SUMS.group > 1:
                b0, b1, b2, b3 = add_tap(b0, b1, b2, b3, source, w_ptr, 1, kx - DOWN, WINDOW, SUMS)
    store_sums(y, q, r, rows, cols, sub, c, a0, a1, a2, a3, sizes, WINDOW, SUMS)
    if SUMS.group > 1:
        store_sums(y, q, r + 1, rows, cols, sub, c, b0, b1, b2, b3, sizes, WINDOW, SUMS)


def target_bytes(problem: TileProblem) -> int:
    """Return the bytes of the output of a call, with the last cells whole."""
    return problem.batch * problem.channels * problem.height * problem.width * problem.spec.up**2 * problem.element_size


def has_room(problem: TileProblem) -> bool:
    """Return whether the weights of a call are not too large beside its output."""
    return problem.spec.taps <= MOST_WEIGHTS * problem.channels


def sums_taps(problem: TileProblem) -> bool:
    """Return whether forward sums over taps, and has no tile."""
    spec = problem.spec
    padded = spec.border in PADDED_BORDERS
    merged = MERGES_SUMS and spec.up > 1 and spec.down == 1
    served = problem.channels_last and problem.element_size == 4 and not merged
    return served and has_room(problem) and (padded or target_bytes(problem) >= SMALLEST)


def divide_sums(problem: TileProblem) -> Sums:
    """Return the division of the sums of a call among programs."""
    spec = problem.spec
    subs = spec.up**2 if spec.down == 1 else 1
    step = min(subs, STEP)
    scale = 1 if subs > 1 else spec.up
    block_c = min(CHANNELS, power_of_two(problem.channels))
    # windows at equal distances
    regular = (spec.up == 1 or spec.down == 1) and spec.border != "shift"
    group = GROUP if regular else 1
    # a thread would spill the addresses of as many sites that share no sources and have several sums each
    sums = SUMS_OF_THREAD if group > 1 or step == 1 else SUMS_OF_THREAD // 2
    groups = sums * WARPS * WARP_SIZE // block_c // group

    def cost(rows: int) -> int:
        """Return the sources that all programs read, and the places of sites."""
        cols = groups // rows * group
        read = math.prod((sites - 1) * spec.down // spec.up + spec.kernel_size for sites in (rows, cols))
        programs = triton.cdiv(problem.height * scale, rows) * triton.cdiv(problem.width * scale, cols)
        return programs * (read + PLACES * rows * cols)

    rows = min((1 << n for n in range(groups.bit_length())), key=cost)
    return Sums(subs, step, triton.cdiv(subs, step), group, rows, groups // rows, block_c, problem.channels % block_c == 0)


def tile_of_weights(spec: Spec) -> Halo:
    """Return the tile of cells of a program of the first launch."""
    cells = max(1, WEIGHTS // power_of_two(spec.taps + 1) // spec.up**2)
    cols = min(cells, 8)
    return halo(spec, cells // cols, cols)


def weigh_launch(arguments: dict[str, Any], problem: TileProblem, window: Window, layout: Layout, sums: Sums, *, stores: bool) -> Launch:
    """Return the launch that fills weights, its argument `weights_ptr`, and the log-sum-exp if `stores`."""
    spec = problem.spec
    sites = problem.batch * problem.height * problem.width * (1 if sums.subs > 1 else spec.up**2)
    # with places for the site after the last, which the last group may have
    size = (sites + sums.group - 1) * spec.taps * sums.step * sums.steps
    weights = torch.empty(size, dtype=torch.float32, device=arguments["x"].ptr.device)
    tile = tile_of_weights(spec)
    tiles = triton.cdiv(problem.height, tile.rows // spec.up) * triton.cdiv(problem.width, tile.cols // spec.up)
    given = {name: arguments[name] for name in ("sizes", "logits", "lse_ptr")} | {"weights_ptr": weights}
    constants = {"WINDOW": window, "HALO": tile, "LAYOUT": layout, "SUMS": sums, "STORES": stores}
    warps = min(32, max(WARPS, tile.t * tile.m // WEIGHTS_OF_THREAD // WARP_SIZE))
    return Launch(weigh_sites, (problem.batch * tiles, 1, 1), given, constants, warps, 1)


def tap_sum_launches(arguments: dict[str, Any], problem: TileProblem, window: Window, layout: Layout) -> list[Launch]:
    """Return the launches that fill y and the log-sum-exp; `arguments` are those of the operator, by name."""
    sums = divide_sums(problem)
    scale = 1 if sums.subs > 1 else problem.spec.up
    rows, cols = problem.height * scale, problem.width * scale
    if rows * cols * problem.spec.taps * sums.step * sums.steps > INT32_MAX:
        layout = layout._replace(index=tl.int64)
    first = weigh_launch(arguments, problem, window, layout, sums, stores=True)
    programs = triton.cdiv(rows, sums.rows) * triton.cdiv(cols, sums.cols * sums.group) * sums.steps
    programs *= problem.batch * triton.cdiv(problem.channels, sums.block_c)
    given = {"sizes": arguments["sizes"], "x": arguments["x"], "weights_ptr": first.arguments["weights_ptr"], "y": arguments["y"]}
    constants = {"WINDOW": window, "LAYOUT": layout, "SUMS": sums}
    return [first, Launch(sum_taps, (programs, 1, 1), given, constants, WARPS, 1, MAX_REGISTERS)]
