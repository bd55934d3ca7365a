// Logits to weights and gradients of weights to gradients of logits, on the planes of a tile.
#pragma once

#include "cpu_tiles.h"

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
    for (Index tap = 0; tap < p.taps(); ++tap)
        for (Index y = 0; y < p.up; ++y)
            for (Index x = 0; x < p.up; ++x)
                read_planes(at<S>(logits, n, group * p.taps() + tap, y, x), logits.stride[4], logits.stride[5],
                            cut ? ceil_div(std::max<Index>(0, p.output_y() - y), p.up) : p.cells_y(),
                            cut ? ceil_div(std::max<Index>(0, p.output_x() - x), p.up) : p.cells_x(), 1, g, t, halo, fill,
                            weights + ((tap * p.up + y) * p.up + x) * g.weight_plane, g.weight_plane);
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
        for (Index f = 0; f < end; f += LANES<T>) {
            T* w = weights + sub * g.weight_plane + f;
            const Index step = p.subs() * g.weight_plane;
            Vector<T> top = load(w);
            for (Index tap = 1; tap < p.taps(); ++tap) {
                const Vector<T> l = load(w + tap * step);
                // the negated comparison lets a NaN through
                top = l <= top ? top : l;
            }
            if (p.normalizer == SIGMOID_NORMALIZED) top = minimum(top, T(0));
            Vector<T> total{};
            for (Index tap = 0; tap < p.taps(); ++tap) {
                const Vector<T> e = exp_score<T>(load(w + tap * step), top, p.normalizer);
                store(w + tap * step, e);
                total += e;
            }
            const Vector<T> share = T(1) / total;
            for (Index tap = 0; tap < p.taps(); ++tap) store(w + tap * step, load(w + tap * step) * share);
            T sums[LANES<T>];
            store(sums, total);
            for (int i = 0; i < LANES<T>; ++i) lse[sub * g.weight_plane + f + i] = top[i] + std::log(sums[i]);
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
        const Index tap = e / p.subs(), y = e % p.subs() / p.up, x = e % p.up;
        read_planes(at<S>(logits, n, group * p.taps() + tap, y, x), logits.stride[4], logits.stride[5], p.cells_y(), p.cells_x(), 1, g, t,
                    Index(0), T(0), scratch, g.inner);
        for (Index f = 0; f < end; f += LANES<T>) {
            T* d = gradients + e * g.inner + f;
            store(d, load(d) * sigmoid<T>(-load(scratch + f)));
        }
    }
}

}  // namespace carafepp
