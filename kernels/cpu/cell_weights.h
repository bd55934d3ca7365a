// The weights of the cells of a row of a tile for the sums of channels_last.h, a few cells at a time, so that they stay in the first cache.
#pragma once

#include <algorithm>
#include <vector>

#include "call.h"
#include "index.h"
#include "normalizers.h"
#include "scratch.h"
#include "storage.h"
#include "tiling.h"
#include "transfer.h"
#include "vectors.h"
#include "windows.h"

namespace carafepp {

// Takes them from the planes of the tile.
template <class T> struct PlaneWeights {
    const Planes<T>& planes;
    Index pitch, windows;
    Index cells = LANES<T>;     // cells of a strip
    Index tap_step, cell_step;  // values from the weights of a tap, or of a cell, to those of the next
    std::vector<T> strip;       // [cell][tap][sub]

    PlaneWeights(const Task& task, const Scratch<T>& scratch)
        : planes(scratch.weights), pitch(task.grid.pitch), windows(task.problem.windows()), tap_step(task.problem.subs()), cell_step(windows),
          strip(LANES<T> * windows) {}
    // Returns the weights of the strip that begins with a cell of the tile.
    const T* find(Index i, Index j) {
        transpose_matrix<T>(planes.data + i * pitch + j, planes.plane, windows, LANES<T>, strip.data(), windows);
        return strip.data();
    }
};

// Whether CellWeights serves a problem: the logits of a cell are adjacent and fill whole lanes, and no window is changed at the border.
template <class T> bool fills_lanes(const Problem& problem, const Tensor& logits) {
    const bool unchanged = problem.border == ZERO || problem.border == REPLICATE;
    return unchanged && LANES<T> % problem.subs() == 0 && adjacent_subs(problem, logits) == problem.subs();
}

// Normalises adjacent logits with cells and their sub-pixels in the lanes.
template <class S, class T> struct CellWeights {
    const Task& task;
    Index subs, cells;          // cells of a strip
    Index tap_step, cell_step;  // values from the weights of a tap, or of a cell, to those of the next
    std::vector<T> strip;       // [tap][cell][sub]
    std::vector<T> lse;         // [cell][sub], if it is needed

    explicit CellWeights(const Task& task)
        : task(task), subs(task.problem.subs()), cells(ABREAST * LANES<T> / subs), tap_step(ABREAST * LANES<T>),
          cell_step(subs), strip(task.problem.taps() * tap_step), lse(task.call.lse ? tap_step : 0) {}
    const T* find(Index i, Index j) {
        fill(task.tile.row + i, task.tile.column + j, std::min(cells, task.tile.columns - j));
        return strip.data();
    }

private:
    NOINLINE void fill(Index row, Index column, Index count) {
        const Problem& problem = task.problem;
        const Index taps = problem.taps(), stride = task.call.logits.strides[5];
        const S* logits = task.call.logits.at<S>(task.image, task.group * taps) + row * task.call.logits.strides[4] + column * stride;
        if (subs == 1) transpose_matrix<T, 1>(logits, stride, count, taps, strip.data(), tap_step);
        if constexpr (LANES<T> >= 4)
            if (subs == 4) transpose_matrix<T, 4>(logits, stride, count, taps, strip.data(), tap_step);
        if constexpr (LANES<T> >= 16)
            if (subs == 16) transpose_matrix<T, 16>(logits, stride, count, taps, strip.data(), tap_step);
        with_count<ABREAST>(ceil_div(count * subs, LANES<T>), [&](auto vectors) { normalize<decltype(vectors)::value>(); });
        if (!lse.empty()) write_lse(row, column, count);
    }
    template <int V> void normalize() {
        const Problem& problem = task.problem;
        if (problem.normalizer == NONE) return;
        if (problem.normalizer != SIGMOID) return softmax<V>(problem, strip.data(), tap_step, lse.empty() ? nullptr : lse.data());
        for (Index first = 0; first < Index(strip.size()); first += tap_step)
            for (int v = 0; v < V; ++v) {
                T* weights = &strip[first + v * LANES<T>];
                store(weights, sigmoid<T>(load(weights)));
            }
    }
    void write_lse(Index row, Index column, Index count) const {
        const Tensor& target = task.call.lse;
        for (Index sub = 0; sub < subs; ++sub) {
            T* to = target.at<T>(task.image, task.group, sub / task.problem.up, sub % task.problem.up) + row * target.strides[4];
            for (Index cell = 0; cell < count; ++cell) to[(column + cell) * target.strides[5]] = lse[cell * subs + sub];
        }
    }
};

}  // namespace carafepp
