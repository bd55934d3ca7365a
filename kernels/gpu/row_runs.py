"""The runs of targets that the sums over rows in NCHW share: their places, their loads and stores, and their division among programs.

A *run* is the targets of a thread: a row of neighbouring targets, whose windows share most of their sources. Neighbouring threads have
neighbouring runs, so that a warp reads and writes rows of pixels.

Loads of sources need no masks. A window that begins above the map, or ends below it, reads rows that are moved into the map, with the
weights of the taps that they belong to. A column outside the map is replaced by one inside it, with a weight of zero.
"""

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..geometry import Spec
from .blocks import aligned, find_tile
from .launch import Launch
from .records import Features, Logits, Sizes
from .tap_sums import MERGES_SUMS, has_room, target_bytes
from .taps import clamp
from .tile_geometry import KernelName, TileProblem, multiple, share_in_map, source_bytes
from .vectors import as_offset, load_vector

# bytes of the larger map from which on there are enough programs for a device
SMALLEST = 2**26
# share of the places of threads that have targets; with fewer, products take fewer instructions
LEAST_FILLED = 0.6
# most weights of a thread; more do not fit into its registers
MOST_WEIGHTS = 100
MAX_REGISTERS = 128
WARPS, WARP_SIZE = 4, 32
# bytes of a line of memory
LINE = 128
# programs that a multiprocessor holds with this number of registers
RESIDENT = 4


class Runs(NamedTuple):
    """The division of the targets among threads and programs. A constant."""

    cells: int  # neighbouring cells of a thread
    steps: int  # sub-rows of a program: all of them, or one
    rows: int  # of cells of a program
    cols: int  # of runs
    lead: int  # columns of x before the first window of a run, a multiple of the vector
    vectors: int  # loads of a row of x
    x_vector: int  # pixels of such a load
    y_vector: int  # pixels of y, or of its gradient
    align: int  # every row of logits begins at a multiple of this number of elements
    split: int  # programs of forward that share a run, each for its channels
    parts: int  # warps of a program of the gradient to the logits that do


@triton.jit
def find_runs(m, sizes: Sizes, WINDOW: tl.constexpr, RUNS: tl.constexpr):
    """Return the group of this program counted over all images, its part of the channels, and the sub-row and the first cell of runs m."""
    PROGRAMS: tl.constexpr = WINDOW.up // RUNS.steps
    pid = tl.program_id(0)
    part = pid % RUNS.split
    pid = pid // RUNS.split
    # the threads of a warp share sources
    u = pid % PROGRAMS * RUNS.steps + m // RUNS.cols % RUNS.steps
    q0, r0, ng = find_tile(pid // PROGRAMS, tl.cdiv(sizes.hq, RUNS.rows), tl.cdiv(sizes.wq, RUNS.cols * RUNS.cells))
    q, r = q0 * RUNS.rows + m // (RUNS.cols * RUNS.steps), (r0 * RUNS.cols + m % RUNS.cols) * RUNS.cells
    return ng, part, u, q, r


@triton.jit
def find_first_row(q, sizes: Sizes, WINDOW: tl.constexpr):
    """Return the first row of sources that runs in row q of cells read, and by how many taps it is moved to lie in the map."""
    above = tl.minimum(q, sizes.hq - 1) * WINDOW.down - WINDOW.kernel_size // 2
    first = clamp(above, 0, sizes.h - WINDOW.kernel_size)
    return first, first - above


@triton.jit
def find_sources(q, r, sizes: Sizes, x: Features, c, WINDOW: tl.constexpr, RUNS: tl.constexpr):
    """Return the offsets of the first row of sources of runs in channel c, one for each vector, and by how many taps this row is moved."""
    DOWN: tl.constexpr = WINDOW.down
    VECTOR: tl.constexpr = RUNS.x_vector
    VECTORS: tl.constexpr = RUNS.vectors
    first, moved = find_first_row(q, sizes, WINDOW)
    places = ()
    for p in tl.static_range(VECTORS):
        col = clamp((r * DOWN - RUNS.lead) // VECTOR + p, 0, sizes.w // VECTOR - 1) * VECTOR
        places = places + (as_offset(c * x.stride_c + first * x.stride_h + col * x.stride_w),)
    return places, moved


@triton.jit
def load_sources(ptr, places, RUNS: tl.constexpr):
    """Return the sources of runs in a row; `ptr` is the address of this row in the first runs of the map."""
    VECTORS: tl.constexpr = RUNS.vectors
    sources = ()
    for p in tl.static_range(VECTORS):
        sources = sources + load_vector(ptr + places[p], RUNS.x_vector)
    return sources


@triton.jit
def align_cells(sizes: Sizes, ALIGN: tl.constexpr):
    """Tell the compiler that rows of cells end at a multiple of ALIGN."""
    return Sizes(sizes.groups, sizes.c, sizes.h, sizes.w, sizes.ho, sizes.wo, sizes.hq, aligned(sizes.wq, ALIGN))


@triton.jit
def align_rows(logits: Logits, ALIGN: tl.constexpr):
    """Tell the compiler at what multiples rows of logits begin, which the host has found."""
    n, c, u, v = (
        aligned(logits.stride_n, ALIGN),
        aligned(logits.stride_c, ALIGN),
        aligned(logits.stride_u, ALIGN),
        aligned(logits.stride_v, ALIGN),
    )
    return Logits(logits.ptr, n, c, u, v, aligned(logits.stride_h, ALIGN), logits.stride_w)


@triton.jit
def load_cells(ptr, offset, stride_w, q, r, sizes: Sizes, CELLS: tl.constexpr):
    """Return what lies at each offset and in the neighbouring cells, in float32; zeros where a cell does not exist."""
    if CELLS == 1:
        return (tl.load(ptr + as_offset(offset), mask=(q < sizes.hq) & (r < sizes.wq), other=0.0).to(tl.float32),)
    else:
        cell = tl.arange(0, 2)[None, :]
        exists = (q < sizes.hq)[:, None] & (r[:, None] + cell < sizes.wq)
        a, b = tl.split(tl.load(ptr + as_offset(offset[:, None] + cell * stride_w), mask=exists, other=0.0).to(tl.float32))
        return a, b


@triton.jit
def store_cells(ptr, offset, stride_w, q, r, values, sizes: Sizes, CELLS: tl.constexpr):
    """Store values of neighbouring cells, if they exist."""
    if CELLS == 1:
        tl.store(ptr + as_offset(offset), values[0].to(ptr.dtype.element_ty), mask=(q < sizes.hq) & (r < sizes.wq))
    else:
        cell = tl.arange(0, 2)[None, :]
        exists = (q < sizes.hq)[:, None] & (r[:, None] + cell < sizes.wq)
        tl.store(ptr + as_offset(offset[:, None] + cell * stride_w), tl.join(values[0], values[1]).to(ptr.dtype.element_ty), mask=exists)


def larger_bytes(problem: TileProblem) -> int:
    """Return the bytes of the larger map of a call."""
    return max(source_bytes(problem), target_bytes(problem))


def sums_rows(kernel: KernelName, problem: TileProblem) -> bool:
    """Return whether forward or the gradient to the logits sums over rows, and has no tile."""
    spec = problem.spec
    whole = (spec.up == 1 or spec.down == 1) and spec.border in ("zero", "renormalize") and spec.up * spec.taps <= MOST_WEIGHTS
    # a window has as many rows in the map
    fits = (problem.height - 1) * spec.down + 1 >= spec.kernel_size
    # in 16 bits, products with matrix units take fewer instructions unless they are few
    wins = problem.element_size == 4 or (spec.down > 1 and kernel == "logit_gradient" and has_room(problem))
    if not (whole and fits and wins) or MERGES_SUMS or problem.channels_last or larger_bytes(problem) < SMALLEST:
        return False
    rows, cols = divide_threads(problem)
    return share_in_map(problem, rows, cols * count_cells(spec)) >= LEAST_FILLED


def count_cells(spec: Spec) -> int:
    """Return the neighbouring cells of a thread."""
    return 2 if 2 * max(spec.up, spec.down) <= 4 and 2 * spec.up * spec.taps <= MOST_WEIGHTS else 1


def count_steps(spec: Spec) -> int:
    """Return the sub-rows of a program, whose number of threads is a power of two."""
    return spec.up if spec.up & (spec.up - 1) == 0 else 1


def divide_threads(problem: TileProblem) -> tuple[int, int]:
    """Return the rows of cells of a program, and the runs in each of them."""
    cells, steps = count_cells(problem.spec), count_steps(problem.spec)
    threads = WARPS * WARP_SIZE // steps
    width = cells * problem.spec.down * problem.element_size

    def count_lines(cols: int) -> float:
        """Return the lines of memory that a load of x touches in all warps."""
        programs = triton.cdiv(problem.height, threads // cols) * triton.cdiv(problem.width, cols * cells)
        return programs * max(1, WARP_SIZE // steps // cols) * (1 + min(cols, WARP_SIZE) * width / LINE)

    cols = min((cols for cols in (8, 16, 32) if cols <= threads), key=count_lines)
    return threads // cols, cols


def find_row_alignment(problem: TileProblem, logits: tuple[Logits, ...]) -> int:
    """Return the elements, at most two, at whose multiples every row of logits begins and ends."""
    steps = [step for record in logits for step in record[1:-1]] if all(record.stride_w == 1 for record in logits) else [1]
    return math.gcd(2, problem.width, *steps)


def divide_runs(problem: TileProblem, logits: tuple[Logits, ...]) -> Runs:
    """Return the division of a call among threads and programs, none of which share channels."""
    spec = problem.spec
    cells, (rows, cols) = count_cells(spec), divide_threads(problem)
    x_vector, y_vector = math.gcd(problem.x_align, cells * spec.down, 4), math.gcd(problem.y_align, cells * spec.up, 4)
    align = find_row_alignment(problem, logits)
    lead = multiple(spec.kernel_size // 2, x_vector)
    vectors = (lead + (cells - 1) * spec.down + spec.kernel_size // 2) // x_vector + 1
    return Runs(cells, count_steps(spec), rows, cols, lead, vectors, x_vector, y_vector, align, 1, 1)


def count_programs(problem: TileProblem, runs: Runs) -> int:
    """Return the programs of a launch without shared channels."""
    tiles = triton.cdiv(problem.height, runs.rows) * triton.cdiv(problem.width, runs.cols * runs.cells)
    return problem.batch * tiles * (problem.spec.up // runs.steps)


def build_launch(kernel: triton.JITFunction, arguments: dict[str, Any], programs: int, constants: dict[str, Any]) -> Launch:
    """Return a launch of a kernel that sums, whose arguments are among those of the operator, by name."""
    given = {name: arguments[name] for name in kernel.arg_names if name in arguments}
    return Launch(kernel, (programs, 1, 1), given, constants, WARPS, 1, MAX_REGISTERS)
