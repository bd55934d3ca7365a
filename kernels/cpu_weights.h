// Logits to weights and gradients of weights to gradients of logits, on the planes of a tile.
#pragma once

#include "cpu_planes.h"

namespace carafepp {

// sigmoid(l) is exp(min(l, 0)) / (1 + exp(-|l|)): with scores = log(sigmoid(l)) nothing overflows and no logarithm is taken.
template <class T> inline Vector<T> exp_score(Vector<T> l, Vector<T> reference, std::int64_t normalizer) {
    if (normalizer == SOFTMAX) return exponential<T>(l - reference);
    return exponential<T>(minimum(l, T(0)) - reference) / (exponential<T>(l > T(0) ? -l : l) + T(1));
}

// Logits of the tile's cells and `halo` around them; `cut` leaves out sub-pixels beyond the output (a rational scale cuts the last cell).
template <class S, class T>
void read_logits(const Problem& p, const Grid& g, const Tile& t, const Tensor& logits, Index n, Index group, Index halo, bool cut, T* weights) {
    // a weight outside the map is zero
    const T fill = p.normalizer == NONE ? T(0) : -std::numeric_limits<T>::infinity();
    for (Index e = 0; e < p.taps() * p.subs(); ++e) {
        Plane<const S> plane = logits_plane<const S>(p, logits, n, group * p.taps(), e);
        if (cut) {
            plane.height = ceil_div(std::max<Index>(0, p.output_y() - e % p.subs() / p.up), p.up);
            plane.width = ceil_div(std::max<Index>(0, p.output_x() - e % p.up), p.up);
        }
        read_planes(plane, g, t, halo, fill, weights + e * g.weight_plane, g.weight_plane);
    }
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
        for (Index f = 0; f < end; f += ABREAST * LANES<T>) {
            const Index rest = ceil_div(end - f, LANES<T>);
            if (rest >= ABREAST) softmax<ABREAST>(p, g, weights + sub * g.weight_plane + f, lse + sub * g.weight_plane + f);
            else
                for (Index i = 0; i < rest * LANES<T>; i += LANES<T>)
                    softmax<1>(p, g, weights + sub * g.weight_plane + f + i, lse + sub * g.weight_plane + f + i);
        }
}

// The same weights from logits and the stored `lse`, over the tile and `halo` around it.
template <class T> void restore(const Problem& p, const Grid& g, const Tile& t, Index halo, T* weights, const T* lse) {
    const Index begin = -halo * g.pitch - halo, end = t.end(g) + halo * g.pitch + halo;
    if (p.normalizer == NONE) return;
    for (Index e = 0; e < p.taps() * p.subs(); ++e)
        for (Index f = begin; f < end; f += LANES<T>) {
            T* w = weights + e * g.weight_plane + f;
            if (p.normalizer == SIGMOID) store(w, sigmoid<T>(load(w)));
            else store(w, exp_score<T>(load(w), load(lse + e % p.subs() * g.weight_plane + f), p.normalizer));
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
    for (Index e = 0; e < p.taps() * p.subs(); ++e) {
        read_planes(logits_plane<const S>(p, logits, n, group * p.taps(), e), g, t, Index(0), T(0), scratch, g.inner);
        for (Index f = 0; f < end; f += LANES<T>) {
            T* d = gradients + e * g.inner + f;
            store(d, load(d) * sigmoid<T>(-load(scratch + f)));
        }
    }
}

}  // namespace carafepp
