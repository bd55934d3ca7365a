// The tiling of a call into tasks; a task is one tile of cells in one group of channels of one image.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "call.h"
#include "index.h"
#include "layout.h"
#include "vectors.h"
#include "windows.h"

namespace carafepp {

// The fixed cost of a row of any length, in cells whose sums take as long.
constexpr Index ROW_COST = 24;

// The number of cells around a tile for which a plane is needed.
struct Reach {
    Index above, below, side;
};

// The tiling of one call, the same for all threads. Results do not depend on it, because the order of every sum is the same for all tiles.
struct Grid {
    Index rows, columns;            // cells of a tile
    Index tile_rows, tile_columns;  // tiles of a map
    Index halo;                     // cells around a tile that a plane with a halo also holds
    Index pitch;                    // values from a row of a plane to the next
    Index haloed_plane, origin;     // values of a plane with a halo, and the place of the tile's own first cell in it
    Index bare_plane;               // values of a plane without a halo

    // Chooses tiles whose planes fit into `bytes`.
    template <class T> static Grid make(const Problem& problem, const Windows& windows, const Layout& layout, Index threads, Index bytes) {
        Grid grid{};
        grid.halo = windows.halo;
        const Index lanes = LANES<T>, haloed = layout.planes(true), bare = layout.planes(false);
        const Index rows = problem.cell_rows(), columns = problem.cell_columns(), margin = layout.weights.halo ? 2 * grid.halo : 0;
        double least = std::numeric_limits<double>::infinity();
        const Index most_cuts = ceil_div(columns, lanes);
        for (Index cuts = 1; cuts <= most_cuts; ++cuts) {
            const Index width = ceil_div(columns, cuts), tile_columns = ceil_div(columns, width);
            // between whole rows, one margin of zeros serves both the row before it and the row after it
            const bool shared = tile_columns == 1 && problem.border != REPLICATE && problem.border != SHIFT;
            const Index pitch = width + (shared ? 1 : 2) * grid.halo;
            const Index wanted = ceil_div(4 * threads, problem.batch * problem.groups * tile_columns);
            const Index fit = (bytes / Index(sizeof(T)) / pitch - haloed * 2 * grid.halo) / (bare + haloed);
            const Index height = std::min(fit, std::max<Index>(1, rows / wanted));
            // per cell: lanes of the margin, the fixed cost of a row, and weights; these are a third of the work, and more if they are
            // restored for cells of a neighbouring tile as well
            const double cost = double(pitch + ROW_COST) / width * (2 + double(height + margin) / height);
            // the narrowest tile is used even if it does not fit into `bytes`
            const bool only = std::isinf(least) && cuts == most_cuts;
            if ((height < 1 || cost >= least) && !only) continue;
            least = cost;
            grid.columns = width, grid.pitch = pitch, grid.tile_columns = tile_columns, grid.rows = std::max<Index>(1, height);
        }
        grid.tile_rows = ceil_div(rows, grid.rows);
        grid.rows = ceil_div(rows, grid.tile_rows);
        grid.origin = ceil_div(grid.halo * grid.pitch + grid.halo, lanes) * lanes;
        // an odd number of vectors, so that the same cell of different planes does not always map to the same cache set
        const Index haloed_values = grid.origin + (grid.rows + grid.halo) * grid.pitch + grid.halo;
        grid.haloed_plane = ((ceil_div(haloed_values, lanes) + 1) | 1) * lanes;
        grid.bare_plane = (ceil_div(grid.rows * grid.pitch, lanes) | 1) * lanes;
        return grid;
    }
    Index plane(bool halo) const { return halo ? haloed_plane : bare_plane; }
    Index shift(const TapSource& source) const { return source.move_rows * pitch + source.move_columns; }
    Index tiles() const { return tile_rows * tile_columns; }
};

struct Tile {
    Index row, column, rows, columns;  // first cell and extent
    Index end;                         // end of the tile's own cells when its rows are laid end to end

    Tile(const Problem& problem, const Grid& grid, Index number)
        : row(number / grid.tile_columns * grid.rows), column(number % grid.tile_columns * grid.columns),
          rows(std::min(grid.rows, problem.cell_rows() - row)), columns(std::min(grid.columns, problem.cell_columns() - column)),
          end((rows - 1) * grid.pitch + columns) {}
};

struct Task {
    const Call& call;
    const Problem& problem;
    const Windows& windows;
    const Layout& layout;
    const Grid& grid;
    Index image, group;
    Tile tile;

    static Index count(const Problem& problem, const Grid& grid) { return problem.batch * problem.groups * grid.tiles(); }
    Task(const Call& call, const Windows& windows, const Layout& layout, const Grid& grid, Index number)
        : call(call), problem(call.problem), windows(windows), layout(layout), grid(grid), image(number / grid.tiles() / problem.groups),
          group(number / grid.tiles() % problem.groups), tile(problem, grid, number % grid.tiles()) {}

    Index first_channel() const { return group * problem.group_channels(); }
    // The number of cells around the tile for which planes of a kind are filled.
    Reach reach(const PlaneSets& kind) const { return kind.halo ? Reach{grid.halo, grid.halo, grid.halo} : Reach{}; }
    // dsource sums the weights of a tap at its outputs, which lie on one side of the source pixel
    Reach weight_reach(Index sub, Index tap) const {
        if (!layout.weights.halo) return {};
        // a window that moves into the map may lie on the other side of its centre
        if (problem.border == SHIFT) return {grid.halo, grid.halo, grid.halo};
        const Index move = windows.source(sub, tap).move_rows;
        return {std::max<Index>(0, move), std::max<Index>(0, -move), grid.halo};
    }
};

}  // namespace carafepp
