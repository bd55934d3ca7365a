// Logits to weights and gradients of weights to gradients of logits, on the planes of a tile.
#pragma once

#include "planes.h"

namespace carafepp {

// sigmoid(l) is exp(min(l, 0)) / (1 + exp(-|l|)): with scores = log(sigmoid(l)) nothing overflows and no logarithm is taken.
template <class T> inline Vector<T> exp_score(Vector<T> l, Vector<T> reference, std::int64_t normalizer) {
    if (normalizer == SOFTMAX) return exponential<T>(l - reference);
    return exponential<T>(minimum(l, T(0)) - reference) / (exponential<T>(l > T(0) ? -l : l) + T(1));
}

// Logits of the tile's cells and of those around it that dsource asks for; `cut` leaves out sub-pixels beyond the output (a rational scale
// cuts the last cell).
template <class S, class T>
void read_logits(const Problem& p, const Grid& g, const Tile& t, const Tensor& logits, Index n, Index group, bool cut, T* weights) {
    // a weight outside the map is zero
    const T fill = p.normalizer == NONE ? T(0) : -std::numeric_limits<T>::infinity();
    each_plane(p, p.taps(), [&](Index e, Index tap, Index y, Index x) {
        Plane<const S> plane = logits_plane<const S>(p, logits, n, group * p.taps() + tap, y, x);
        if (cut) {
            plane.height = ceil_div(std::max<Index>(0, p.output_y() - y), p.up);
            plane.width = ceil_div(std::max<Index>(0, p.output_x() - x), p.up);
        }
        read_planes(plane, g, t, g.weight_reach(p, tap, y * p.up + x), fill, weights + e * g.weight_plane, g.weight_plane);
    });
}

// Vectors of cells normalised together, so that their chains of maxima and sums run side by side.
constexpr int ABREAST = 4;

// Weights of one sub-pixel from its scores, in place; a NaN in a window is in its sum, and so in all its weights.
template <int V, class T> inline void softmax(const Problem& p, const Grid& g, T* weights, T* lse) {
    const Index step = p.subs() * g.weight_plane;
    Vector<T> top[V], total[V] = {};
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) top[v] = load(weights + v * LANES<T>);
    const T* from = weights + step;
    for (Index tap = 1; tap < p.taps(); ++tap, from += step)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) top[v] = maximum<T>(load(from + v * LANES<T>), top[v]);
    if (p.normalizer == SIGMOID_NORMALIZED)
        for (int v = 0; v < V; ++v) top[v] = minimum(top[v], T(0));
    T* to = weights;
    for (Index tap = 0; tap < p.taps(); ++tap, to += step)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            const Vector<T> e = exp_score<T>(load(to + v * LANES<T>), top[v], p.normalizer);
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
    for (Index tap = 0; tap < p.taps(); ++tap, to += step)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) store(to + v * LANES<T>, load(to + v * LANES<T>) * total[v]);
}

// Weights from logits in place; `lse` planes [subs] receive the log-sum-exp of the scores.
template <class T> void normalize(const Problem& p, const Grid& g, const Tile& t, T* weights, T* lse) {
    const Index count = p.taps() * p.subs(), end = t.end(g);
    if (p.normalizer == NONE) return;
    if (p.normalizer == SIGMOID) {
        for (Index e = 0; e < count; ++e)
            for (Index f = 0; f < end; f += LANES<T>) store(weights + e * g.weight_plane + f, sigmoid<T>(load(weights + e * g.weight_plane + f)));
        return;
    }
    for (Index sub = 0; sub < p.subs(); ++sub)
        for (Index f = 0; f < end; f += ABREAST * LANES<T>)
            with_count<ABREAST>(ceil_div(end - f, LANES<T>), [&](auto vectors) {
                softmax<decltype(vectors)::value>(p, g, weights + sub * g.weight_plane + f, lse + sub * g.weight_plane + f);
            });
}

// The same weights from logits and the stored `lse`, wherever logits were read.
template <class T> void restore(const Problem& p, const Grid& g, const Tile& t, T* weights, const T* lse) {
    if (p.normalizer == NONE) return;
    for (Index tap = 0; tap < p.taps(); ++tap)
        for (Index sub = 0; sub < p.subs(); ++sub) {
            const Reach reach = g.weight_reach(p, tap, sub);
            T* plane = weights + (tap * p.subs() + sub) * g.weight_plane;
            for (Index f = -reach.above * g.pitch - reach.side; f < t.end(g) + reach.below * g.pitch + reach.side; f += LANES<T>)
                if (p.normalizer == SIGMOID) store(plane + f, sigmoid<T>(load(plane + f)));
                else store(plane + f, exp_score<T>(load(plane + f), load(lse + sub * g.weight_plane + f), p.normalizer));
        }
}

// Gradients of the weights to gradients of the logits, in place. `scratch` is one plane.
template <class S, class T>
void normalize_backward(const Problem& p, const Grid& g, const Tile& t, const Tensor& logits, Index n, Index group, const T* weights,
                        T* gradients, T* scratch) {
    if (p.normalizer == NONE) return;
    const Index step = p.subs() * g.weight_plane, gradient_step = p.subs() * g.inner, end = t.end(g);
    for (Index sub = 0; sub < p.subs(); ++sub)
        for (Index f = 0; f < end; f += LANES<T>) {
            const T* w = weights + sub * g.weight_plane + f;
            T* d = gradients + sub * g.inner + f;
            Vector<T> inner{};
            if (p.normalizer != SIGMOID)
                for (Index tap = 0; tap < p.taps(); ++tap) inner += load(w + tap * step) * load(d + tap * gradient_step);
            for (Index tap = 0; tap < p.taps(); ++tap) {
                const Vector<T> a = load(w + tap * step), da = load(d + tap * gradient_step);
                store(d + tap * gradient_step, p.normalizer == SIGMOID ? a * (T(1) - a) * da : a * (da - inner));
            }
        }
    if (p.normalizer != SIGMOID_NORMALIZED) return;
    each_plane(p, p.taps(), [&](Index e, Index tap, Index y, Index x) {
        read_planes(logits_plane<const S>(p, logits, n, group * p.taps() + tap, y, x), g, t, Reach{}, T(0), scratch, g.inner);
        for (Index f = 0; f < end; f += LANES<T>) {
            T* d = gradients + e * g.inner + f;
            store(d, load(d) * sigmoid<T>(-load(scratch + f)));
        }
    });
}

}  // namespace carafepp
