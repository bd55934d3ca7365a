// The step from logits to weights, and from gradients of weights to gradients of logits, on the planes of a task.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "call.h"
#include "index.h"
#include "scratch.h"
#include "storage.h"
#include "tiling.h"
#include "transfer.h"
#include "vectors.h"
#include "windows.h"

namespace carafepp {

// exp(score - reference), where the score is the logit for softmax, and log(sigmoid(logit)) otherwise. sigmoid(l) = exp(min(l, 0)) / (1 +
// exp(-|l|)) avoids overflow and logarithms.
template <class T> inline Vector<T> exp_score(Vector<T> logit, Vector<T> reference, Normalizer normalizer) {
    if (normalizer == SOFTMAX) return exponential<T>(logit - reference);
    return exponential<T>(minimum(logit, T(0)) - reference) / (exponential<T>(logit > T(0) ? -logit : logit) + T(1));
}

// Restricts a map of a sub-pixel to the cells where it has an output: a rational scale cuts the last cell.
template <class S> inline MapView<S> cut_map(MapView<S> map, const Problem& problem, Index sub) {
    map.height = ceil_div(std::max<Index>(0, problem.output_rows - sub / problem.up), problem.up);
    map.width = ceil_div(std::max<Index>(0, problem.output_columns - sub % problem.up), problem.up);
    return map;
}

// Returns the number of sub-pixels whose logits are adjacent in memory for a cell, in the order of the planes: all of them in the
// encoder's channels_last logits, 1 if only the taps of each are adjacent, 0 otherwise.
inline Index adjacent_subs(const Problem& problem, const Tensor& logits) {
    const Index up = problem.up, *strides = logits.strides;
    if (strides[1] == up * up && (up == 1 || (strides[2] == up && strides[3] == 1))) return up * up;
    return strides[1] == 1;
}
// Calls f(logits of the first cell of a row of the map, their first plane, their number, values from a plane to the next) for all of them.
template <class S, class T, class F> void visit_adjacent(const Task& task, const Tensor& logits, const Planes<T>& planes, Index row, F&& f) {
    const Index taps = task.problem.taps(), subs = task.problem.subs(), together = adjacent_subs(task.problem, logits);
    for (Index sub = 0; sub < subs; sub += together) {
        S* first = logits.at<S>(task.image, task.group * taps, sub / task.problem.up, sub % task.problem.up) + row * logits.strides[4];
        f(first, planes.at(0, sub), taps * together, together == subs ? planes.plane : planes.set);
    }
}

// Reads adjacent logits of the tile's cells and of those around it whose weights are held.
template <class S, class T> void read_adjacent(const Task& task, const Planes<T>& weights, T fill) {
    const Tile& tile = task.tile;
    const Problem& problem = task.problem;
    const Reach reach = task.reach(task.layout.weights);
    const Index stride = task.call.logits.strides[5], width = problem.cell_columns() - tile.column;
    const Index left = -reach.side, right = tile.columns + reach.side;
    for (Index i = -reach.above; i < tile.rows + reach.below; ++i) {
        const Index row = tile.row + i;
        const bool inside = 0 <= row && row < problem.cell_rows();
        const Index begin = inside ? std::max(left, -tile.column) : right, end = inside ? std::min(right, width) : right;
        visit_adjacent<const S>(task, task.call.logits, weights, inside ? row : 0, [&](const S* cells, T* planes, Index count, Index step) {
            planes += i * task.grid.pitch;
            const bool outside = begin > left || end < right;
            for (Index k = 0; outside && k < count; ++k) {
                std::fill(planes + k * step + left, planes + k * step + begin, fill);
                std::fill(planes + k * step + end, planes + k * step + right, fill);
            }
            transpose_matrix<T>(cells + (tile.column + begin) * stride, stride, end - begin, count, planes + begin, step);
        });
    }
}

// Reads the logits of the tile's cells, and those of the cells around it whose weights dsource sums. With `cut`, sub-pixels without an
// output get weight 0.
template <class S, class T> void read_logits(const Task& task, const Planes<T>& weights, bool cut) {
    const Problem& problem = task.problem;
    // the logit of a cell outside the map, which becomes a weight of 0
    const T fill = problem.normalizer == NONE ? T(0) : -std::numeric_limits<T>::infinity();
    const bool whole = problem.cell_rows() * problem.up == problem.output_rows && problem.cell_columns() * problem.up == problem.output_columns;
    if (adjacent_subs(problem, task.call.logits) && (whole || !cut)) return read_adjacent<S>(task, weights, fill);
    for (Index tap = 0; tap < problem.taps(); ++tap)
        for (Index sub = 0; sub < problem.subs(); ++sub) {
            const MapView<const S> all = view_logits<const S>(task, task.call.logits, problem.taps(), tap, sub);
            read_map(task, cut ? cut_map(all, problem, sub) : all, task.weight_reach(sub, tap), fill, weights.at(tap, sub), weights.plane);
        }
}

// Number of cell vectors normalised together, so that their chains of maxima and sums run in parallel.
constexpr int ABREAST = 4;

// Normalises the windows of one sub-pixel of V vectors of cells in place, and stores their log-sum-exp unless `lse` is null. A NaN in a
// window makes its sum NaN, and therefore all its weights.
template <int V, class T> inline void softmax(const Problem& problem, T* weights, Index tap_stride, T* lse) {
    const Normalizer normalizer = problem.normalizer;
    const Index taps = problem.taps();
    Vector<T> top[V], total[V] = {};
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) top[v] = load(weights + v * LANES<T>);
    const T* from = weights + tap_stride;
    for (Index tap = 1; tap < taps; ++tap, from += tap_stride)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) top[v] = maximum<T>(load(from + v * LANES<T>), top[v]);
    if (normalizer == SIGMOID_NORMALIZED)
        for (int v = 0; v < V; ++v) top[v] = minimum(top[v], T(0));
    T* to = weights;
    for (Index tap = 0; tap < taps; ++tap, to += tap_stride)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            const Vector<T> e = exp_score<T>(load(to + v * LANES<T>), top[v], normalizer);
            store(to + v * LANES<T>, e);
            total[v] += e;
        }
    for (int v = 0; v < V; ++v) {
        T sums[LANES<T>];
        store(sums, total[v]);
        for (int i = 0; lse && i < LANES<T>; ++i) lse[v * LANES<T> + i] = top[v][i] + std::log(sums[i]);
        total[v] = T(1) / total[v];
    }
    to = weights;
    for (Index tap = 0; tap < taps; ++tap, to += tap_stride)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) store(to + v * LANES<T>, load(to + v * LANES<T>) * total[v]);
}

// Turns logits into weights in place and fills the planes of lse, if there are any.
template <class T> void normalize(const Task& task, const Scratch<T>& scratch) {
    const Problem& problem = task.problem;
    const Planes<T>&weights = scratch.weights, &lse = scratch.lse;
    const Index end = task.tile.end;
    if (problem.normalizer == NONE) return;
    if (problem.normalizer == SIGMOID) {
        for (Index tap = 0; tap < problem.taps(); ++tap)
            for (Index sub = 0; sub < problem.subs(); ++sub) {
                T* plane = weights.at(tap, sub);
                for (Index f = 0; f < end; f += LANES<T>) store(plane + f, sigmoid<T>(load(plane + f)));
            }
        return;
    }
    for (Index sub = 0; sub < problem.subs(); ++sub)
        for (Index f = 0; f < end; f += ABREAST * LANES<T>)
            with_count<ABREAST>(ceil_div(end - f, LANES<T>), [&](auto vectors) {
                softmax<decltype(vectors)::value>(problem, weights.at(0, sub) + f, weights.set,
                                                     task.layout.lse.sets ? lse.at(0, sub) + f : nullptr);
            });
}

// Turns all logits that were read into the weights of the forward pass, with the stored lse.
template <class T> void restore_weights(const Task& task, const Scratch<T>& scratch) {
    const Problem& problem = task.problem;
    const Normalizer normalizer = problem.normalizer;
    if (normalizer == NONE) return;
    for (Index tap = 0; tap < problem.taps(); ++tap)
        for (Index sub = 0; sub < problem.subs(); ++sub) {
            const Reach reach = task.weight_reach(sub, tap);
            const Index begin = -reach.above * task.grid.pitch - reach.side;
            const Index end = task.tile.end + reach.below * task.grid.pitch + reach.side;
            T* weights = scratch.weights.at(tap, sub);
            const T* lse = scratch.lse.at(0, sub);
            for (Index f = begin; f < end; f += LANES<T>)
                if (normalizer == SIGMOID) store(weights + f, sigmoid<T>(load(weights + f)));
                else store(weights + f, exp_score<T>(load(weights + f), load(lse + f), normalizer));
        }
}

// Turns the gradients of the weights into gradients of the logits in place.
template <class S, class T> void normalize_backward(const Task& task, const Scratch<T>& scratch) {
    const Problem& problem = task.problem;
    const Normalizer normalizer = problem.normalizer;
    const Planes<T>&weights = scratch.weights, &dweights = scratch.dweights;
    const Index taps = problem.taps(), end = task.tile.end;
    if (normalizer == NONE) return;
    for (Index sub = 0; sub < problem.subs(); ++sub)
        for (Index f = 0; f < end; f += LANES<T>) {
            Vector<T> product{};  // of the window's weights and their gradients
            if (normalizer != SIGMOID)
                for (Index tap = 0; tap < taps; ++tap) product += load(weights.at(tap, sub) + f) * load(dweights.at(tap, sub) + f);
            for (Index tap = 0; tap < taps; ++tap) {
                const Vector<T> a = load(weights.at(tap, sub) + f), da = load(dweights.at(tap, sub) + f);
                store(dweights.at(tap, sub) + f, normalizer == SIGMOID ? a * (T(1) - a) * da : a * (da - product));
            }
        }
    if (normalizer != SIGMOID_NORMALIZED) return;
    T* logits = scratch.spare.data;
    for (Index tap = 0; tap < taps; ++tap)
        for (Index sub = 0; sub < problem.subs(); ++sub) {
            const MapView<const S> map = cut_map(view_logits<const S>(task, task.call.logits, taps, tap, sub), problem, sub);
            read_map(task, map, Reach{}, T(0), logits, scratch.spare.plane);
            T* gradients = dweights.at(tap, sub);
            for (Index f = 0; f < end; f += LANES<T>) store(gradients + f, load(gradients + f) * sigmoid<T>(-load(logits + f)));
        }
}

// Moves the log-sum-exp between its tensor and its planes.
template <class T> void write_lse(const Task& task, const Planes<T>& lse) {
    for (Index sub = 0; sub < task.problem.subs(); ++sub)
        write_map(task, lse.at(0, sub), lse.plane, view_logits<T>(task, task.call.lse, 1, 0, sub));
}
// A NaN of a sub-pixel without an output must not reach dx through a weight that is otherwise 0.
template <class T> void read_lse(const Task& task, const Planes<T>& lse) {
    const Reach reach = task.reach(task.layout.lse);
    for (Index sub = 0; sub < task.problem.subs(); ++sub) {
        const MapView<const T> map = cut_map(view_logits<const T>(task, task.call.lse, 1, 0, sub), task.problem, sub);
        read_map(task, map, reach, T(0), lse.at(0, sub), lse.plane);
    }
}

// Writes dlogits.
template <class S, class T> void write_dlogits(const Task& task, const Planes<T>& dlogits) {
    const Problem& problem = task.problem;
    const Tile& tile = task.tile;
    const Tensor& target = task.call.dlogits;
    if (adjacent_subs(problem, target)) {
        for (Index i = 0; i < tile.rows; ++i)
            visit_adjacent<S>(task, target, dlogits, tile.row + i, [&](S* cells, const T* planes, Index count, Index step) {
                transpose_matrix<T>(planes + i * task.grid.pitch, step, count, tile.columns, cells + tile.column * target.strides[5],
                                    target.strides[5]);
            });
        return;
    }
    for (Index tap = 0; tap < problem.taps(); ++tap)
        for (Index sub = 0; sub < problem.subs(); ++sub)
            write_map(task, dlogits.at(tap, sub), dlogits.plane, view_logits<S>(task, target, problem.taps(), tap, sub));
}

}  // namespace carafepp
