// What windows do at the border of the map. kernels/borders.py explains why "shift" is a padding, after the taps of the windows that move
// are rotated.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "call.h"
#include "index.h"
#include "scratch.h"
#include "storage.h"
#include "tiling.h"
#include "transfer.h"

namespace carafepp {

// The pixels that windows read at places outside the map, along one axis. The default reads zeros.
struct Padding {
    Border border = ZERO;
    Index kernel = 0;

    explicit operator bool() const { return border == REPLICATE || border == SHIFT; }
    // Returns the pixel that is read at a place of an axis of `size` pixels, or -1 for a zero.
    Index pixel(Index place, Index size) const {
        if (0 <= place && place < size) return place;
        if (border == REPLICATE) return place < 0 ? 0 : size - 1;
        if (border != SHIFT) return -1;
        const Index moved = place < 0 ? place + kernel : place - kernel;
        return 0 <= moved && moved < size ? moved : -1;
    }
    // Returns the places at which a pixel is read: its own first, then those outside the map, which are at most kernel / 2 away from it.
    std::vector<Index> places(Index pixel_number, Index size) const {
        std::vector<Index> found{pixel_number};
        if (*this)
            for (Index k = 1; k <= kernel / 2; ++k) {
                if (pixel(-k, size) == pixel_number) found.push_back(-k);
                if (pixel(size - 1 + k, size) == pixel_number) found.push_back(size - 1 + k);
            }
        return found;
    }
};
inline Padding padding(const Problem& problem) { return {problem.border, problem.kernel}; }

// Fills the places outside the map in the planes of a channel that has been read.
template <class S, class T>
void pad_planes(const Task& task, const MapView<const S>& map, const Reach& reach, T* planes, Index plane) {
    const Tile& tile = task.tile;
    const Index phases = map.phases, whole = map.width / phases - tile.column;
    const Padding pad = padding(task.problem);
    auto fill = [&](Index i, Index v, Index begin, Index end) {
        const Index row = pad.pixel((tile.row + i) * phases + v, map.height);
        if (row < 0) return;
        for (Index j = begin; j < end; ++j)
            for (Index u = 0; u < phases; ++u) {
                const Index column = pad.pixel((tile.column + j) * phases + u, map.width);
                if (column < 0) continue;
                planes[(v * phases + u) * plane + i * task.grid.pitch + j] =
                    widen(map.data[row * map.row_stride + column * map.column_stride]);
            }
    };
    const Index left = -reach.side, right = tile.columns + reach.side;
    for (Index i = -reach.above; i < tile.rows + reach.below; ++i)
        for (Index v = 0; v < phases; ++v) {
            const Index row = (tile.row + i) * phases + v;
            if (row < 0 || row >= map.height) {
                fill(i, v, left, right);
            } else {
                fill(i, v, left, std::min(-tile.column, right));
                fill(i, v, std::max(left, whole), right);
            }
        }
}

// Calls f(sub, place in a plane, row and column of the centre) for every window that may leave the map, of the cells of the tile and of
// those around it whose weights are held.
template <class F> void visit_border_windows(const Task& task, const Reach& reach, F&& f) {
    const Problem& problem = task.problem;
    const Tile& tile = task.tile;
    const Index up = problem.up, down = problem.down, halo = task.grid.halo;
    const Index begin = std::max(-reach.side, -tile.column);
    const Index end = std::min(tile.columns + reach.side, problem.cell_columns() - tile.column);
    // the cells of a row whose windows lie inside along the row
    const Index first = std::clamp(halo - tile.column, begin, end);
    const Index last = std::clamp(problem.width / down - halo - tile.column, first, end);
    for (Index i = std::max(-reach.above, -tile.row); i < std::min(tile.rows + reach.below, problem.cell_rows() - tile.row); ++i) {
        const Index row = tile.row + i;
        const bool inside = row >= halo && (row + halo + 1) * down <= problem.height;
        for (Index sub = 0; sub < problem.subs(); ++sub)
            for (Index j = begin; j < end; ++j) {
                if (inside && j == first) j = last;
                if (j >= end) break;
                f(sub, i * task.grid.pitch + j, row * down + sub / up * down / up,
                  (tile.column + j) * down + sub % up * down / up);
            }
    }
}

// Whether a tap at `place` is left out of a window centred on `centre`; a window that a rational scale cuts off has its centre outside.
inline bool is_left_out(Index place, Index centre, Index size) { return centre < size && (place < 0 || place >= size); }

template <class T> void mask_outside(const Task& task, const Reach& reach, const Planes<T>& logits) {
    const Problem& problem = task.problem;
    const Index kernel = problem.kernel, radius = kernel / 2;
    visit_border_windows(task, reach, [&](Index sub, Index f, Index row, Index column) {
        for (Index ky = 0; ky < kernel; ++ky)
            for (Index kx = 0; kx < kernel; ++kx)
                if (is_left_out(row - radius + ky, row, problem.height) || is_left_out(column - radius + kx, column, problem.width))
                    logits.at(ky * kernel + kx, sub)[f] = -std::numeric_limits<T>::infinity();
    });
}

// Rotates the taps of every window that moves into the map by the distance that it moves, or back.
template <class T> void rotate_windows(const Task& task, const Reach& reach, const Planes<T>& windows, Index direction) {
    const Problem& problem = task.problem;
    const Index kernel = problem.kernel, radius = kernel / 2;
    std::vector<T> taps(kernel * kernel);
    auto rotation = [&](Index centre, Index size) {
        const Index move = std::clamp(centre, radius, size - 1 - radius) - centre;
        return (direction * move % kernel + kernel) % kernel;
    };
    visit_border_windows(task, reach, [&](Index sub, Index f, Index row, Index column) {
        const Index down = rotation(row, problem.height), right = rotation(column, problem.width);
        if (!down && !right) return;
        for (Index tap = 0; tap < kernel * kernel; ++tap) taps[tap] = windows.at(tap, sub)[f];
        for (Index ky = 0; ky < kernel; ++ky)
            for (Index kx = 0; kx < kernel; ++kx)
                windows.at((ky + down) % kernel * kernel + (kx + right) % kernel, sub)[f] = taps[ky * kernel + kx];
    });
}

// Turns the logits that were read into those of windows that read the padded map.
template <class T> void arrange_windows(const Task& task, const Planes<T>& logits) {
    const Reach reach = task.reach(task.layout.weights);
    if (task.problem.border == RENORMALIZE) mask_outside(task, reach, logits);
    if (task.problem.border == SHIFT) rotate_windows(task, reach, logits, 1);
}
// The reverse for the tile's own cells.
template <class T> void restore_windows(const Task& task, const Planes<T>& windows) {
    if (task.problem.border == SHIFT) rotate_windows(task, Reach{}, windows, -1);
}

// Calls f(row, column, rows, columns) for every pixel of the tile that is also read at places outside the map; `rows` and `columns` are its
// places along each axis.
template <class F> void visit_padding_pixels(const Task& task, F&& f) {
    const Problem& problem = task.problem;
    const Tile& tile = task.tile;
    const Padding pad = padding(problem);
    if (!pad) return;
    const Index first_column = tile.column * problem.down;
    const Index columns = std::min(tile.columns * problem.down, problem.width - first_column);
    std::vector<std::vector<Index>> across(columns);
    for (Index j = 0; j < columns; ++j) across[j] = pad.places(first_column + j, problem.width);
    for (Index row = tile.row * problem.down; row < std::min((tile.row + tile.rows) * problem.down, problem.height); ++row) {
        const std::vector<Index> rows = pad.places(row, problem.height);
        for (Index j = 0; j < columns; ++j)
            if (rows.size() > 1 || across[j].size() > 1) f(row, first_column + j, rows, across[j]);
    }
}

// Calls f(tap and sub-pixel, cell row, cell column) for every weight of the map that a place is read with.
template <class F> void visit_reads(const Task& task, Index row, Index column, F&& f) {
    const Problem& problem = task.problem;
    const Index down = problem.down, cell_row = floor_div(row, down), cell_column = floor_div(column, down);
    const Index phase = (row - cell_row * down) * down + column - cell_column * down;
    for (const TapSource& from : task.windows.sources) {
        const Index i = cell_row - from.move_rows, j = cell_column - from.move_columns;
        if (from.phase == phase && 0 <= i && i < problem.cell_rows() && 0 <= j && j < problem.cell_columns()) f(from, i, j);
    }
}

}  // namespace carafepp
