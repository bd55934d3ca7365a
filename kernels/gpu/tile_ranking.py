"""The ranking of tiles by speed: a pure function of the shape, data type and memory format of a problem and the capability of the device.

A model of the work of one multiprocessor ranks the tiles that fit. It counts wavefronts of the load-store unit (lines of memory touched,
passes over shared memory, shuffles) and instructions, which are the bounds "lsu" and "issue" of the emulator in tests/support/ptx. The
model is coarse. Its factors count the operations in the code of the kernels, unless a comment names another source; docs/performance.md has
the emulated counts of the chosen tiles. A measured tile (tile_tables.py) takes precedence.

M, P, T: targets, halo and taps of a tile, rounded up to a power of two; S, D: its sources and the targets that read them.
"""

from dataclasses import dataclass
from functools import cache, lru_cache

from .tile_geometry import Direction, Halo, Tile, TileProblem, halo, reach
from .tile_limits import REGISTER_BYTES, WARP_SIZE, fitting_tiles, operand_terms, source_blocks

# multiprocessors of one device of each capability: V100, A100, A40, RTX 4090, H100, B200; others take the nearest capability below
MULTIPROCESSOR_COUNTS = {(7, 0): 80, (8, 0): 108, (8, 6): 84, (8, 9): 128, (9, 0): 132, (10, 0): 148}
# bytes of a line of memory, and of shared memory that one wavefront moves (CUDA programming guide)
LINE_BYTES = 128
# multiply-adds of one matrix instruction of a warp in 16 bits, m16n8k16 (PTX ISA)
PRODUCT_SIZE = 16 * 8 * 16

# cycles of an instruction: a multiprocessor issues four at a time; backward counts each twice
FORWARD_ISSUE, BACKWARD_ISSUE = 1 / 4, 2 / 4
# instructions of a vector load: address, mask, load, store to shared memory
LOAD_INSTRUCTIONS = 4
# times that a product reads an operand from shared memory, by element size: float32 has three products of split operands
OPERAND_READS = {2: 1, 4: 3}
# matrix instructions over those in 16 bits, by element size: three products in TF32, of half the depth, for float32; forward doubles them
FORWARD_PRODUCTS, BACKWARD_PRODUCTS = {2: 1, 4: 12}, {2: 1, 4: 6}
# passes of a result over shared memory on its way to whole lines of memory: one write, one read
RESULT_PASSES = 2
# logits of a tile in one line of memory, if channels_last
LOGITS_PER_LINE = 4
# wavefronts and instructions to normalize logits [T, M], per element
NORMALIZER_WAVEFRONTS, NORMALIZER_INSTRUCTIONS = 2, 16
# instructions of a warp of the forward kernel that do not depend on the tile
WARP_INSTRUCTIONS = 150
# instructions to build a band, per element: forward takes it from weights in registers, backward from logits in memory
FORWARD_BAND_INSTRUCTIONS, BACKWARD_BAND_INSTRUCTIONS = 12, 14
# wavefronts of the factors of the gradient to the logits over those of one read and one write
LOGIT_GRADIENT_PASSES = 1.5
# wavefronts to gather each window from the gradient of the band [P, M], per element, and per element and tap
WINDOW_WAVEFRONTS = 4
# logits that one wavefront gathers for the gradient to the sources, if channels_last; otherwise one
LOGITS_PER_GATHER = 8
# rows of a product of the matrix units from capability 9.0 on, and the factor of the time of the older ones, which serve a smaller halo
MATRIX_UNIT_ROWS, OLDER_UNITS_FACTOR = 64, 1.5


@dataclass(slots=True)
class Work:
    """The work of a multiprocessor."""

    wavefronts: float  # of the load-store unit
    instructions: float = 0.0  # of a warp

    def __add__(self, other: "Work") -> "Work":
        return Work(self.wavefronts + other.wavefronts, self.instructions + other.instructions)

    def __mul__(self, times: float) -> "Work":
        return Work(self.wavefronts * times, self.instructions * times)


@lru_cache(maxsize=4096)
def rank_tiles(direction: Direction, problem: TileProblem) -> tuple[Tile, ...]:
    """Return the tiles that fit a pass, the fastest by the model first; none if the window is too large."""
    cycles = forward_cycles if direction == "forward" else backward_cycles
    return tuple(tile for _, tile in sorted((cycles(problem, tile), tile) for tile in fitting_tiles(direction, problem)))


def choose_tile(direction: Direction, problem: TileProblem) -> Tile | None:
    """Return the first tile of the ranking, or None if the window is too large for the banded kernel."""
    tiles = rank_tiles(direction, problem)
    return tiles[0] if tiles else None


def forward_cycles(problem: TileProblem, tile: Tile) -> float:
    """Return the cycles that the busiest multiprocessor spends in the forward kernel."""
    window = halo(problem.spec, tile.cells_h, tile.cells_w, tile.vector)
    # every program that shares the channels of the tile builds the weights and the band
    built = _normalize_logits(problem, tile, window) + _build_forward_band(problem, tile, window)
    products = window.m * window.p * problem.channels / PRODUCT_SIZE * FORWARD_PRODUCTS[problem.element_size]
    work = _load_features(problem, window.height, window.width, window.p, tile.vector) + _store_output(problem, window)
    return _spread(problem, tile, tile.split, work + built * tile.split + Work(0, products), FORWARD_ISSUE)


def backward_cycles(problem: TileProblem, tile: Tile) -> float:
    """Return the cycles that the busiest multiprocessor spends in the backward kernel."""
    x_vector = min(tile.vector, problem.x_align)
    window = halo(problem.spec, tile.cells_h, tile.cells_w, x_vector)
    work = _logit_gradient(problem, tile, window, x_vector) + _source_gradient(problem, tile)
    cycles = _spread(problem, tile, 1 + tile.split, work, BACKWARD_ISSUE)
    older_units = problem.capability >= (9, 0) and window.p < MATRIX_UNIT_ROWS
    return cycles * OLDER_UNITS_FACTOR if older_units else cycles


@cache
def multiprocessor_count(capability: tuple[int, int]) -> int:
    """Return the multiprocessors of a device of this capability."""
    return MULTIPROCESSOR_COUNTS[max((known for known in MULTIPROCESSOR_COUNTS if known <= capability), default=(7, 0))]


def _spread(problem: TileProblem, tile: Tile, programs: int, work: Work, issue: float) -> float:
    """Return the cycles of the busiest multiprocessor if the `work` of a tile, in `programs` programs, is spread evenly."""
    tiles = -(-problem.height // tile.cells_h) * -(-problem.width // tile.cells_w) * problem.batch
    return (work.wavefronts + work.instructions * issue) * tiles / min(multiprocessor_count(problem.capability), tiles * programs)


def _unaligned_lines(runs: int, run_bytes: int) -> float:
    """Return the lines of memory that unaligned runs of bytes touch."""
    return runs * (1 + run_bytes / LINE_BYTES)


def _feature_lines(problem: TileProblem, rows: int, cols: int) -> float:
    """Return the lines of memory that all channels of rows x cols locations touch."""
    size, channels = problem.element_size, problem.channels
    return rows * cols * channels * size / LINE_BYTES if problem.channels_last else _unaligned_lines(rows * channels, cols * size)


def _logit_lines(problem: TileProblem, tile: Tile, window: Halo) -> float:
    """Return the lines of memory that the logits of a tile touch."""
    spec = problem.spec
    if problem.channels_last:
        return spec.taps * window.m / LOGITS_PER_LINE
    return _unaligned_lines(spec.taps * spec.up**2 * tile.cells_h, tile.cells_w * problem.element_size)


def _load_features(problem: TileProblem, rows: int, cols: int, padded: int, vector: int, passes: float = 1.0) -> Work:
    """Return the work to bring all channels of rows x cols locations, `padded` as an axis of a product, to the matrix units."""
    size = problem.element_size
    vector = problem.x_align if problem.channels_last else vector
    whole = padded * problem.channels * size / LINE_BYTES
    # a bank of shared memory is as wide as a register: a thread that stores less leaves the rest unused
    shared = whole * max(1.0, REGISTER_BYTES / (vector * size)) + whole * OPERAND_READS[size]
    loads = padded * problem.channels / vector / WARP_SIZE
    return Work(_feature_lines(problem, rows, cols) + passes * shared, LOAD_INSTRUCTIONS * loads)


def _store_output(problem: TileProblem, window: Halo) -> Work:
    """Return the work to store the output of a tile."""
    passes = RESULT_PASSES * window.m * problem.channels * problem.element_size / LINE_BYTES
    return Work(_feature_lines(problem, window.rows, window.cols) + passes, window.m * problem.channels / WARP_SIZE)


def _normalize_logits(problem: TileProblem, tile: Tile, window: Halo) -> Work:
    """Return the work to load the logits of a tile and turn them into weights."""
    elements = window.t * window.m / WARP_SIZE
    lines = _logit_lines(problem, tile, window)
    return Work(lines + NORMALIZER_WAVEFRONTS * elements, NORMALIZER_INSTRUCTIONS * elements + WARP_INSTRUCTIONS * tile.num_warps)


def _build_forward_band(problem: TileProblem, tile: Tile, window: Halo) -> Work:
    """Return the work to gather the band from the weights, which every warp then reads for every block of channels."""
    size, elements = problem.element_size, window.p * window.m / WARP_SIZE
    blocks = -(-problem.channels // (tile.block_c * tile.split))
    shuffles = window.t / WARP_SIZE
    shared = size / REGISTER_BYTES * (1 + tile.num_warps * blocks) * OPERAND_READS[size]
    return Work(elements * (shuffles + shared), FORWARD_BAND_INSTRUCTIONS * elements)


def _logit_gradient(problem: TileProblem, tile: Tile, window: Halo, x_vector: int) -> Work:
    """Return the work of the gradient to the logits: the product of features and gradients, from which every window takes its band."""
    features = _load_features(problem, window.height, window.width, window.p, x_vector, LOGIT_GRADIENT_PASSES)
    gradients = _load_features(problem, window.rows, window.cols, window.m, tile.vector, LOGIT_GRADIENT_PASSES)
    gather = WINDOW_WAVEFRONTS * window.p * window.m / WARP_SIZE * (1 + window.t / WARP_SIZE)
    products = window.m * window.p * problem.channels / PRODUCT_SIZE * BACKWARD_PRODUCTS[problem.element_size]
    # logits are read, and their gradient is written
    return features + gradients + Work(2 * _logit_lines(problem, tile, window) + gather, window.t * window.m + products)


def _source_gradient(problem: TileProblem, tile: Tile) -> Work:
    """Return the work of the gradient to the sources: for every block of channels, a band is built from the logits and multiplied."""
    spec, size, channels = problem.spec, problem.element_size, problem.channels
    reached, blocks = reach(spec, tile.cells_h, tile.cells_w, tile.vector), source_blocks(problem, tile)
    targets = -(-reached.height * reached.width // blocks.targets) * blocks.targets
    elements = reached.s * targets / WARP_SIZE
    band = elements * size / REGISTER_BYTES * (1 + tile.num_warps) * operand_terms(size)
    gathered = spec.taps * tile.cells_h * tile.cells_w * spec.up**2 / (LOGITS_PER_GATHER if problem.channels_last else 1)
    builds = tile.split * -(-channels // (tile.split * blocks.channels))
    stored = (1 + RESULT_PASSES) * reached.s * channels * size / LINE_BYTES
    products = reached.s * targets * channels / PRODUCT_SIZE * BACKWARD_PRODUCTS[size]
    gradients = _load_features(problem, reached.height, reached.width, targets, tile.vector)
    return gradients + Work(band + gathered, BACKWARD_BAND_INSTRUCTIONS * elements) * builds + Work(stored, products)
