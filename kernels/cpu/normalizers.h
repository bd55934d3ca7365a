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

// Reads the logits of the tile's cells, and those of the cells around it whose weights dsource sums. With `cut`, sub-pixels without an
// output get weight 0.
template <class S, class T> void read_logits(const Task& task, const Planes<T>& weights, bool cut) {
    const Problem& problem = task.problem;
    // the logit of a cell outside the map, which becomes a weight of 0
    const T fill = problem.normalizer == NONE ? T(0) : -std::numeric_limits<T>::infinity();
    for (Index tap = 0; tap < problem.taps(); ++tap)
        for (Index sub = 0; sub < problem.subs(); ++sub) {
            const MapView<const S> whole = view_logits<const S>(task, task.call.logits, problem.taps(), tap, sub);
            const MapView<const S> map = cut ? cut_map(whole, problem, sub) : whole;
            read_map(task, map, task.weight_reach(sub, tap), fill, weights.at(tap, sub), weights.plane);
        }
}

// Number of cell vectors normalised together, so that their chains of maxima and sums run in parallel.
constexpr int ABREAST = 4;

// Normalises the windows of one sub-pixel of V vectors of cells in place. A NaN in a window makes its sum NaN, and therefore all its
// weights.
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
        for (int i = 0; i < LANES<T>; ++i) lse[v * LANES<T> + i] = top[v][i] + std::log(sums[i]);
        total[v] = T(1) / total[v];
    }
    to = weights;
    for (Index tap = 0; tap < taps; ++tap, to += tap_stride)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) store(to + v * LANES<T>, load(to + v * LANES<T>) * total[v]);
}

// Turns logits into weights in place and fills the planes of lse where the normalizer has one.
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
                softmax<decltype(vectors)::value>(problem, weights.at(0, sub) + f, weights.set, lse.at(0, sub) + f);
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
    for (Index tap = 0; tap < problem.taps(); ++tap)
        for (Index sub = 0; sub < problem.subs(); ++sub)
            write_map(task, dlogits.at(tap, sub), dlogits.plane, view_logits<S>(task, task.call.dlogits, problem.taps(), tap, sub));
}

}  // namespace carafepp
