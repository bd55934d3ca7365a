"""The runs of targets that the sums over rows in NCHW share: their places, their loads and stores, and their division among programs.

A *run* is the targets of a thread: a row of neighbouring targets, whose windows share most of their sources. It has all sub-columns of its
cells, or a single one where the weights of all do not fit into the registers of a thread. Neighbouring threads have neighbouring runs, so
that a warp reads and writes rows of pixels.

Loads of sources need no masks. A window that begins above the map, or ends below it, reads rows that are moved into the map, with the
weights of the taps that they belong to. A column outside the map is replaced by one inside it, with a weight of zero.
"""

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...geometry import Spec
from ..common.blocks import aligned, find_tile
from ..common.records import Features, Logits, Sizes
from ..common.vectors import as_offset, load_vector
from ..launch import Launch
from ..tiles.geometry import KernelName, TileProblem, multiple, source_bytes
from .tap_sums import MERGES_SUMS, has_room, target_bytes
from .taps import clamp

# bytes of the larger map from which on there are enough programs for a device, with runs of all sub-columns and of a single one
SMALLEST, SMALLEST_SINGLE = 2**26, 2**22
# share of the places of threads that have targets; with fewer, products take fewer instructions
LEAST_FILLED = 0.6
# most weights of a thread; more do not fit into its registers
MOST_WEIGHTS = 100
MAX_REGISTERS = 128
WARPS, WARP_SIZE = 4, 32
# most sub-rows of a program, with which a row of it has eight threads
MOST_STEPS = 16
# bytes of a line of memory
LINE = 128
# programs that a multiprocessor holds with this number of registers
RESIDENT = 4


class Runs(NamedTuple):
    """The division of the targets among threads and programs. A constant."""

    cells: int  # neighbouring cells of a thread
    subs: int  # sub-columns of a thread: all of them, or one
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
    """Return the group of this program counted over all images and its part of the channels, and of runs m what `split_target` returns."""
    PROGRAMS: tl.constexpr = WINDOW.up // RUNS.steps
    # runs of the same cells
    PARTS: tl.constexpr = WINDOW.up // RUNS.subs
    pid = tl.program_id(0)
    part = pid % RUNS.split
    pid = pid // RUNS.split
    # the threads of a warp share sources
    u = pid % PROGRAMS * RUNS.steps + m // RUNS.cols % RUNS.steps
    pid = pid // PROGRAMS
    if PARTS == 1:
        q0, r0, ng = find_tile(pid, tl.cdiv(sizes.hq, RUNS.rows), tl.cdiv(sizes.wq, RUNS.cols * RUNS.cells))
        q, r = q0 * RUNS.rows + m // (RUNS.cols * RUNS.steps), (r0 * RUNS.cols + m % RUNS.cols) * RUNS.cells
        return ng, part, u, 0, q, r
    else:
        # counted from row to row, so that the last program of a map alone has threads without a run
        width = sizes.wq.to(m.dtype) * PARTS
        programs = tl.cdiv(sizes.hq * width, RUNS.cols)
        ng = pid // programs
        run = (pid - ng * programs) * RUNS.cols + m
        return ng, part, u, run % width % PARTS, run // width, run % width // PARTS


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
    if MERGES_SUMS or problem.channels_last or spec.border not in ("zero", "renormalize") or min(spec.up, spec.down) > 1:
        return False
    # a window has as many rows in the map
    fits = count_subs(spec) * spec.taps <= MOST_WEIGHTS and (problem.height - 1) * spec.down + 1 >= spec.kernel_size
    single, half = count_subs(spec) < spec.up, problem.element_size == 2
    if single:
        # with more channels, products take fewer instructions, and in the gradient to the logits they always do
        wins = kernel == "forward" and not half and spec.taps > problem.channels
    else:
        # in 16 bits, products with matrix units take fewer instructions unless they are few
        wins = not half or (spec.down > 1 and kernel == "logit_gradient" and has_room(problem))
    large = larger_bytes(problem) >= (SMALLEST_SINGLE if single else SMALLEST)
    return fits and wins and large and share_of_places(problem) >= LEAST_FILLED


def count_subs(spec: Spec) -> int:
    """Return the sub-columns of a thread."""
    return spec.up if spec.up * spec.taps <= MOST_WEIGHTS else 1


def count_cells(spec: Spec) -> int:
    """Return the neighbouring cells of a thread."""
    return 2 if 2 * max(spec.up, spec.down) <= 4 and 2 * spec.up * spec.taps <= MOST_WEIGHTS else 1


def count_steps(spec: Spec) -> int:
    """Return the sub-rows of a program, whose number of threads is a power of two."""
    whole = spec.up & (spec.up - 1) == 0 and count_subs(spec) == spec.up
    return spec.up if whole and spec.up <= MOST_STEPS else 1


def count_runs(problem: TileProblem) -> tuple[int, int]:
    """Return the rows of runs of a map, and the runs of a row; those of single sub-columns are counted from row to row, as one."""
    spec = problem.spec
    if count_subs(spec) < spec.up:
        return 1, problem.height * problem.width * spec.up
    return problem.height, triton.cdiv(problem.width, count_cells(spec))


def divide_threads(problem: TileProblem) -> tuple[int, int]:
    """Return the rows of runs of a program, and the runs of a row."""
    steps, cells, (height, width) = count_steps(problem.spec), count_cells(problem.spec), count_runs(problem)
    threads = WARPS * WARP_SIZE // steps
    if height == 1:
        return 1, threads
    size = cells * problem.spec.down * problem.element_size

    def count_lines(cols: int) -> float:
        """Return the lines of memory that a load of x touches in all warps."""
        programs = triton.cdiv(height, threads // cols) * triton.cdiv(width, cols)
        return programs * max(1, WARP_SIZE // steps // cols) * (1 + min(cols, WARP_SIZE) * size / LINE)

    cols = min((cols for cols in (8, 16, 32) if cols <= threads), key=count_lines)
    return threads // cols, cols


def share_of_places(problem: TileProblem) -> float:
    """Return the share of the places of threads in rows and columns of cells that are in the map."""
    (height, width), (rows, cols), cells = count_runs(problem), divide_threads(problem), count_cells(problem.spec)
    return height / multiple(height, rows) * width / multiple(width, cols) * problem.width / multiple(problem.width, cells)


def find_row_alignment(problem: TileProblem, logits: tuple[Logits, ...]) -> int:
    """Return the elements, at most two, at whose multiples every row of logits begins and ends."""
    steps = [step for record in logits for step in record[1:-1]] if all(record.stride_w == 1 for record in logits) else [1]
    return math.gcd(2, problem.width, *steps)


def divide_runs(problem: TileProblem, logits: tuple[Logits, ...]) -> Runs:
    """Return the division of a call among threads and programs, none of which share channels."""
    spec = problem.spec
    cells, subs, (rows, cols) = count_cells(spec), count_subs(spec), divide_threads(problem)
    neighbours = cells * subs if subs == spec.up else subs
    x_vector, y_vector = math.gcd(problem.x_align, cells * spec.down, 4), math.gcd(problem.y_align, neighbours, 4)
    align = find_row_alignment(problem, logits)
    lead = multiple(spec.kernel_size // 2, x_vector)
    vectors = (lead + (cells - 1) * spec.down + spec.kernel_size // 2) // x_vector + 1
    return Runs(cells, subs, count_steps(spec), rows, cols, lead, vectors, x_vector, y_vector, align, 1, 1)


def count_programs(problem: TileProblem, runs: Runs) -> int:
    """Return the programs of a launch without shared channels."""
    height, width = count_runs(problem)
    tiles = triton.cdiv(height, runs.rows) * triton.cdiv(width, runs.cols)
    return problem.batch * tiles * (problem.spec.up // runs.steps)


def build_launch(kernel: triton.JITFunction, arguments: dict[str, Any], programs: int, constants: dict[str, Any]) -> Launch:
    """Return a launch of a kernel that sums, whose arguments are among those of the operator, by name."""
    given = {name: arguments[name] for name in kernel.arg_names if name in arguments}
    return Launch(kernel, (programs, 1, 1), given, constants, WARPS, 1, MAX_REGISTERS)
