// Shared by both CPU kernels: vectors, storage types, and tiles of cells held as planes.
//
// Over cells, reassembly is a sum of products of shifted planes. Let a plane hold one value per cell of a tile, rows laid end to end:
// the weights of one (tap, sub-pixel), the source pixels of one phase (row % down, column % down), the outputs of one sub-pixel. The
// source pixel that a tap of a sub-pixel reads then lies in one phase plane at one constant distance ("shift"), for every cell alike:
//     output[sub][f]       = sum over taps      weight[tap][sub][f] * source[phase][f + shift]
//     dweight[tap][sub][f] = sum over channels  doutput[sub][f] * source[phase][f + shift]
//     dsource[phase][f]    = sum over (tap, sub) weight[tap][sub][f - shift] * doutput[sub][f - shift]
// Up, down and rational scales, any kernel size and any layout differ only in the table of shifts and in how planes are read and written.
#pragma once

#include <vector>

#include "vectors.h"

namespace carafepp {

enum Normalizer { SOFTMAX, SIGMOID, SIGMOID_NORMALIZED, NONE };

struct Problem {
    std::int64_t dtype, normalizer, batch, channels, height, width, kernel, up, down, groups, threads;

    Index taps() const { return kernel * kernel; }
    Index subs() const { return up * up; }
    Index phases() const { return down * down; }
    Index cells_y() const { return (height + down - 1) / down; }
    Index cells_x() const { return (width + down - 1) / down; }
    Index output_y() const { return (height * up + down - 1) / down; }
    Index output_x() const { return (width * up + down - 1) / down; }
    Index group_channels() const { return channels / groups; }
};

struct Tensor {
    void* data;
    std::int64_t stride[6];  // in elements
};
template <class S> S* at(const Tensor& t, Index a, Index b, Index c = 0, Index d = 0) {
    return static_cast<S*>(t.data) + a * t.stride[0] + b * t.stride[1] + c * t.stride[2] + d * t.stride[3];
}

inline Index floor_div(Index a, Index b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }
inline Index ceil_div(Index a, Index b) { return (a + b - 1) / b; }

// One step of the sums above: what tap `tap` of sub-pixel `sub` reads.
struct Entry {
    Index tap, sub, sub_y, sub_x, phase, move_y, move_x;  // cells from the output's own to the one that holds the source pixel
};
// Cells whose sums take as long as what a row costs, however short.
constexpr Index ROW_COST = 24;

// Consecutive sub-pixels that share their window, at most SUBS.
struct Run {
    Index sub, count;
};

// Calls f(std::integral_constant<int, N>) for a number from 1 to MOST known at run time.
template <int MOST = SUBS, class F> inline void with_count(Index count, F&& f) {
    if constexpr (MOST > 1)
        if (count < MOST) return with_count<MOST - 1>(count, f);
    f(std::integral_constant<int, MOST>{});
}

// How far a plane is needed around the cells of a tile.
struct Reach {
    Index above, below, side;
};

// The tiling of one call, the same for all threads: tiles of which so many planes, bare and with a halo, fit into `budget` bytes. Results
// do not depend on it: every sum has one order, whatever the tile.
struct Grid {
    Index rows, columns;  // cells of a tile
    Index halo;           // cells around it that its planes hold as well
    Index pitch;
    Index plane, origin;                // values of a plane with the halo, and where its own first cell is
    Index inner;                        // values of a plane without
    bool weight_halo;  // the weights' planes have one where dsource is asked for
    Index weight_plane, weight_origin;
    Index tiles_y, tiles_x;
    std::vector<Entry> entries;  // [sub][tap]
    std::vector<Run> runs;

    template <class T> static Grid make(const Problem& p, bool weight_halo, Index bare, Index haloed, Index budget) {
        Grid g;
        const Index radius = p.kernel / 2, lanes = LANES<T>;
        g.halo = 0;
        for (Index sub = 0; sub < p.subs(); ++sub) {
            const Index y = sub / p.up, x = sub % p.up, offset_y = y * p.down / p.up - radius, offset_x = x * p.down / p.up - radius;
            for (Index tap = 0; tap < p.taps(); ++tap) {
                const Index a = offset_y + tap / p.kernel, b = offset_x + tap % p.kernel;
                const Index my = floor_div(a, p.down), mx = floor_div(b, p.down);
                g.entries.push_back({tap, sub, y, x, (a - my * p.down) * p.down + b - mx * p.down, my, mx});
                g.halo = std::max({g.halo, std::abs(my), std::abs(mx)});
            }
        }
        for (Index sub = 0, last; sub < p.subs(); sub = last) {
            for (last = sub + 1; last < p.subs() && g.shares_window(p, sub, last);) ++last;
            // of equal length, for a short one has few sums for its loads
            for (Index left = ceil_div(last - sub, SUBS); left; --left) {
                g.runs.push_back({sub, ceil_div(last - sub, left)});
                sub += g.runs.back().count;
            }
        }
        const Index margin = weight_halo ? 2 * g.halo : 0;
        double least = std::numeric_limits<double>::infinity();
        const Index most = ceil_div(p.cells_x(), lanes);
        for (Index cuts = 1; cuts <= most; ++cuts) {
            const Index columns = ceil_div(p.cells_x(), cuts), tiles_x = ceil_div(p.cells_x(), columns);
            // between whole rows one margin of zeros serves the row before and the row after it
            const Index pitch = columns + (tiles_x == 1 ? 1 : 2) * g.halo;
            const Index wanted = ceil_div(4 * p.threads, p.batch * p.groups * tiles_x);
            const Index fit = (budget / Index(sizeof(T)) / pitch - haloed * 2 * g.halo) / (bare + haloed);
            const Index rows = std::min(fit, std::max<Index>(1, p.cells_y() / wanted));
            // per cell: lanes that are margin, reading a row as long as so many cells take, and weights that are restored for a
            // neighbouring tile, a third of all work where there are none
            const double cost = double(pitch + ROW_COST) / columns * (2 + double(rows + margin) / rows);
            // if even the narrowest tile has more weights, so be it
            const bool only = std::isinf(least) && cuts == most;
            if ((rows < 1 || cost >= least) && !only) continue;
            least = cost;
            g.columns = columns, g.pitch = pitch, g.tiles_x = tiles_x, g.rows = std::max<Index>(1, rows);
        }
        g.tiles_y = ceil_div(p.cells_y(), g.rows);
        g.rows = ceil_div(p.cells_y(), g.tiles_y);
        g.origin = ceil_div(g.halo * g.pitch + g.halo, lanes) * lanes;
        // an odd number of vectors, so that the same cell of many planes does not fall into one cache set
        g.plane = ((ceil_div(g.origin + (g.rows + g.halo) * g.pitch + g.halo, lanes) + 1) | 1) * lanes;
        g.inner = (ceil_div(g.rows * g.pitch, lanes) | 1) * lanes;
        g.weight_halo = weight_halo;
        g.weight_plane = weight_halo ? g.plane : g.inner;
        g.weight_origin = weight_halo ? g.origin : 0;
        return g;
    }
    bool shares_window(const Problem& p, Index a, Index b) const {
        const Entry &first = entries[a * p.taps()], &second = entries[b * p.taps()];
        return first.phase == second.phase && first.move_y == second.move_y && first.move_x == second.move_x;
    }
    Reach around() const { return {halo, halo, halo}; }
    // dsource sums the weights of a tap where its output is, which lies on one side
    Reach weight_reach(const Problem& p, Index tap, Index sub) const {
        const Index move = entries[sub * p.taps() + tap].move_y;
        return weight_halo ? Reach{std::max<Index>(0, move), std::max<Index>(0, -move), halo} : Reach{};
    }
    Index shift(const Entry& e) const { return e.move_y * pitch + e.move_x; }
    Index tiles() const { return tiles_y * tiles_x; }
};

struct Tile {
    Index y, x, rows, columns;  // first cell and extent

    Tile(const Problem& p, const Grid& g, Index number)
        : y(number / g.tiles_x * g.rows), x(number % g.tiles_x * g.columns),
          rows(std::min(g.rows, p.cells_y() - y)), columns(std::min(g.columns, p.cells_x() - x)) {}
    // end of the tile's own cells when its rows are laid end to end
    Index end(const Grid& g) const { return (rows - 1) * g.pitch + columns; }
};

}  // namespace carafepp
