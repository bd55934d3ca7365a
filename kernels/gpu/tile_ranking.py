"""Which tile serves a problem: a pure function of its shape, data type, memory format and the capability of the device.

A model of the work of one multiprocessor ranks the tiles that fit: wavefronts of its load-store unit (lines of memory touched, passes over
shared memory, shuffles) plus a quarter of its instructions, since it issues four at a time. The model is coarse; a measured table
(tile_search.py) overrides it.
"""

from functools import lru_cache
from itertools import product

from .tile_geometry import Direction, Tile, TileProblem, halo, reach
from .tile_limits import source_blocks

# multiprocessors by capability; what is not listed is taken for the nearest below
MULTIPROCESSOR_COUNTS = {(7, 0): 80, (8, 0): 108, (8, 6): 84, (8, 9): 128, (9, 0): 132, (10, 0): 148}
SHARED_BYTES = 96 * 1024
LINE_BYTES = 128


def multiprocessors(capability: tuple[int, int]) -> int:
    """Multiprocessors of a device of this capability."""
    return MULTIPROCESSOR_COUNTS[max((known for known in MULTIPROCESSOR_COUNTS if known <= capability), default=(7, 0))]


def split_terms(element_size: int) -> int:
    """Terms that an operand of a product is split into to keep its precision."""
    return 1 if element_size == 2 else 2


def lines(rows: float, row_bytes: int) -> float:
    """Lines of memory that `rows` unaligned runs of `row_bytes` bytes touch."""
    return rows * (1 + row_bytes / LINE_BYTES)


def _features(problem: TileProblem, rows: int, cols: int, padded: int, vector: int) -> tuple[float, float, float]:
    """Lines, shared-memory wavefronts and instructions to bring rows x cols locations of all channels to a product."""
    size, channels = problem.element_size, problem.channels
    passes = padded * channels * size / LINE_BYTES
    if problem.channels_last:
        vector = problem.x_align
        touched = rows * cols * channels * size / LINE_BYTES
    else:
        touched = lines(rows * channels, cols * size)
    store = passes * max(1.0, 4 / (vector * size))
    loads = padded * channels / vector / 32
    return touched, store + passes * (1 if size == 2 else 3), 4 * loads


def _waves(problem: TileProblem, tiles: int, split: int, wavefronts: float, instructions: float) -> float:
    """Time in cycles of the busiest multiprocessor, were the work spread evenly over those in use."""
    return (wavefronts + instructions / 4) * tiles / min(multiprocessors(problem.capability), tiles * split)


def _tiles(problem: TileProblem, cells_h: int, cells_w: int) -> int:
    return -(-problem.height // cells_h) * -(-problem.width // cells_w) * problem.batch


def _forward_cost(problem: TileProblem, tile: Tile) -> float | None:
    """Cycles of the forward kernel, or None where the tile does not fit."""
    spec, size, channels = problem.spec, problem.element_size, problem.channels
    rows, cols, halo_h, halo_w, _, m, p, t = halo(spec, tile.cells_h, tile.cells_w, tile.vector)
    threads = 32 * tile.num_warps
    terms = split_terms(size)
    operands = m * p * size / 4 / 32 + (0 if tile.num_stages > 1 else p * tile.block_c * size / 4 / threads)
    registers = m * tile.block_c / threads + operands * terms
    shared = (p * tile.block_c + p * m) * size * terms
    # what compiles without spills, with less room where blocks of four warps multiply 64 channels
    limit = 136 * terms if tile.num_warps == 2 else 128 * terms
    if registers > limit or shared > SHARED_BYTES or t * m / threads > 64 or t * p / threads > 128:
        return None
    touched, passes, loads = _features(problem, halo_h, halo_w, p, tile.vector)
    blocks = -(-channels // (tile.block_c * tile.split))
    y_passes = m * channels * size / LINE_BYTES
    y_lines = rows * cols * channels * size / LINE_BYTES if problem.channels_last else lines(rows * channels, cols * size)
    logits = spec.taps * m / 4 if problem.channels_last else lines(spec.taps * spec.up**2 * tile.cells_h, tile.cells_w * size)
    band = p * m / 32 * (t / 32 + size / 4 * (1 + tile.num_warps * blocks) * (1 if size == 2 else 3)) + t * m / 16
    building = p * m / 32 * 12 + t * m / 32 * 16 + 150 * tile.num_warps
    products = m * p * channels / 2048 * (1 if size == 2 else 12) + m * channels / 32
    return _waves(
        problem,
        _tiles(problem, tile.cells_h, tile.cells_w),
        tile.split,
        touched + passes + y_lines + 2 * y_passes + tile.split * (logits + band),
        loads + products + tile.split * building,
    )


def _backward_cost(problem: TileProblem, tile: Tile) -> float | None:
    """Cycles of the backward kernel, or None where the tile does not fit."""
    spec, size, channels = problem.spec, problem.element_size, problem.channels
    x_vector = min(tile.vector, problem.x_align)
    rows, cols, halo_h, halo_w, _, m, p, t = halo(spec, tile.cells_h, tile.cells_w, x_vector)
    _, _, reach_h, reach_w, _, _, s = reach(spec, tile.cells_h, tile.cells_w, tile.vector)
    blocks = source_blocks(problem, tile)
    d = -(-reach_h * reach_w // blocks.targets) * blocks.targets
    threads = 32 * tile.num_warps
    # float32 products keep the leading and the remaining bits of both operands
    terms = split_terms(size)
    gathers = m * p / threads + (m + p) * tile.block_c * size / 4 / threads * terms
    scatters = s * blocks.channels / threads + blocks.targets * (blocks.channels / threads + s / 32) * size / 4 * terms
    shared = max((p + m) * tile.block_c, p * m * 4 / size, blocks.targets * (blocks.channels + s)) * size * terms
    large = m > 64 and (tile.cells_h, tile.cells_w) != CELLS[0]
    # what compiles without spills, with less room beside the newer matrix units
    limit = 108 if problem.capability >= ((9, 0) if terms == 2 else (10, 0)) else 128
    if large or max(gathers + 20 * (terms - 1), scatters) > limit or shared > SHARED_BYTES or t * m / threads > 32 or t * p / threads > 64:
        return None
    # the gradient to the logits
    x_lines, x_passes, x_loads = _features(problem, halo_h, halo_w, p, x_vector)
    y_lines, y_passes, y_loads = _features(problem, rows, cols, m, tile.vector)
    logits = spec.taps * m / 4 if problem.channels_last else lines(spec.taps * spec.up**2 * tile.cells_h, tile.cells_w * size)
    first = x_lines + 1.5 * x_passes + y_lines + 1.5 * y_passes + 2 * logits + p * m / 8 + t * m * p / 256
    first += (x_loads + y_loads + t * m + m * p * channels / 2048 * 6 ** (terms - 1)) / 2
    # the gradient to the features
    d_lines, d_passes, d_loads = _features(problem, reach_h, reach_w, d, tile.vector)
    band = s * d / 32 * (size / 4) * (1 + tile.num_warps) * terms
    gathered = spec.taps * tile.cells_h * tile.cells_w * spec.up**2 / (8 if problem.channels_last else 1)
    builds = tile.split * -(-channels // (tile.split * blocks.channels))
    second = d_lines + d_passes + 3 * s * channels * size / LINE_BYTES + builds * (band + gathered)
    second += (d_loads + builds * s * d / 32 * 14 + s * d * channels / 2048 * 6 ** (terms - 1)) / 2
    cost = _waves(problem, _tiles(problem, tile.cells_h, tile.cells_w), 1 + tile.split, first + second, 0)
    # a product of the matrix units from capability 9.0 on has 64 rows: with fewer it falls back to the older ones
    return cost * 1.5 if problem.capability >= (9, 0) and p < 64 else cost


# The cells of a tile: few, since each is compiled anew. Seven columns divide the maps of images of 224 and 800 x 1333 pixels.
CELLS = ((1, 1), (1, 2), (1, 4), (1, 8), (1, 14), (1, 16), (2, 2), (2, 4), (2, 7), (2, 8), (3, 4), (4, 4))


def _candidates(problem: TileProblem, align: int, num_warps: int):
    vectors = (1,) if problem.channels_last else tuple(v for v in (1, 2, 4) if align % v == 0)
    half = problem.element_size == 2
    # a product of the matrix units from capability 9.0 on has 64 rows, and theirs are the channels
    blocks = (64,) if problem.capability >= (9, 0) else (64, 32) if half else (32, 16)
    for cells, vector, split, block_c in product(CELLS, vectors, (1, 2, 4), blocks):
        if split == 1 or block_c * split <= problem.channels:
            yield Tile(*cells, vector, block_c, split, num_warps, 2 if half else 1)


@lru_cache(maxsize=4096)
def rank_tiles(direction: Direction, problem: TileProblem) -> tuple[Tile, ...]:
    """Tiles that fit a pass ("forward" or "backward"), the cheapest by the model first; none where a window is too large."""
    if direction == "forward":
        # two warps share more of what builds a band; the matrix units from capability 9.0 on take four together
        align, num_warps, cost = problem.x_align, 4 if problem.capability >= (9, 0) else 2, _forward_cost
    else:
        align, num_warps, cost = problem.y_align, 4, _backward_cost
    priced = ((cost(problem, tile), tile) for tile in _candidates(problem, align, num_warps))
    return tuple(tile for _, tile in sorted((price, tile) for price, tile in priced if price is not None))


def choose_tile(direction: Direction, problem: TileProblem) -> Tile | None:
    """Tile of the banded kernel of a pass, or None where a window is too large for it."""
    tiles = rank_tiles(direction, problem)
    return tiles[0] if tiles else None
