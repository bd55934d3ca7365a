// The source pixel that each tap of each sub-pixel reads, relative to the cell; it is the same for all cells.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <type_traits>
#include <vector>

#include "call.h"
#include "index.h"
#include "vectors.h"

namespace carafepp {

// The source of tap `tap` of sub-pixel `sub`: pixel `phase` of the cell `move_rows` below and `move_columns` right of the output's own.
struct TapSource {
    Index tap, sub, sub_row, sub_column, phase, move_rows, move_columns;
};

// Consecutive sub-pixels that share their window, at most SUBS.
struct SubRun {
    Index first, count;
};

// Calls f(std::integral_constant<int, N>) with N = count, a number from 1 to MOST known at run time.
template <int MOST = SUBS, class F> inline void with_count(Index count, F&& f) {
    if constexpr (MOST > 1)
        if (count < MOST) return with_count<MOST - 1>(count, f);
    f(std::integral_constant<int, MOST>{});
}

struct Windows {
    Index taps;
    Index halo = 0;  // cells, in any direction, from an output's own cell to the farthest cell that it reads
    std::vector<TapSource> sources;  // [sub][tap]
    std::vector<SubRun> runs;

    // `scattered` windows are also found from the pixels that they read
    Windows(const Problem& problem, bool scattered) : taps(problem.taps()) {
        const Index radius = problem.kernel / 2, up = problem.up, down = problem.down;
        sources.resize(problem.windows());
        TapSource* next = sources.data();
        for (Index sub = 0; sub < problem.subs(); ++sub) {
            const Index sub_row = sub / up, sub_column = sub % up;
            const Index first_row = sub_row * down / up - radius, first_column = sub_column * down / up - radius;
            for (Index i = 0, tap = 0; i < problem.kernel; ++i) {
                const Index row = first_row + i, move_rows = floor_div(row, down);
                halo = std::max(halo, std::abs(move_rows));
                for (Index j = 0; j < problem.kernel; ++j, ++tap) {
                    const Index column = first_column + j, move_columns = floor_div(column, down);
                    const Index phase = (row - move_rows * down) * down + column - move_columns * down;
                    *next++ = {tap, sub, sub_row, sub_column, phase, move_rows, move_columns};
                    halo = std::max(halo, std::abs(move_columns));
                }
            }
        }
        // a window that moves into the map reaches from its centre to the other end of the window
        if (problem.border == SHIFT && scattered) halo = std::max(halo, (problem.kernel - 1) / down + 1);
        for (Index sub = 0, end; sub < problem.subs(); sub = end) {
            for (end = sub + 1; end < problem.subs() && shares_window(sub, end);) ++end;
            // runs of equal length, because a short run has few sums for its loads
            for (Index left = ceil_div(end - sub, SUBS); left; --left) {
                runs.push_back({sub, ceil_div(end - sub, left)});
                sub += runs.back().count;
            }
        }
    }
    const TapSource& source(Index sub, Index tap) const { return sources[sub * taps + tap]; }

private:
    bool shares_window(Index a, Index b) const {
        const TapSource &first = source(a, 0), &second = source(b, 0);
        return first.phase == second.phase && first.move_rows == second.move_rows && first.move_columns == second.move_columns;
    }
};

}  // namespace carafepp
