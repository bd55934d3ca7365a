// Weighted sums of pixels whose channels are adjacent, with channels in the lanes.
#pragma once

#include <array>
#include <cstdint>

#include "call.h"
#include "index.h"
#include "pixels.h"
#include "storage.h"
#include "vectors.h"

namespace carafepp {

// Number of channel vectors that are summed together.
constexpr int CHANNEL_VECTORS = 4;

// The terms of outputs, or of source gradients, that are summed together: pixels, each with one weight per result.
template <class S, class T> struct Terms {
    const S* const* pixels;
    Index count;
    const T* weights;
    Index step;  // values from the weights of a pixel to those of the next

    // Calls f(channel c of a pixel, weights) for every term.
    template <class F> void visit(Index c, F&& f) const {
        const T* weight = weights;
        for (Index k = 0; k < count; ++k, weight += step) f(pixels[k] + c, weight);
    }
};

// The same for the pixels of a rectangle.
template <class S, class T> struct Rectangle {
    const S* pixel;
    Index rows, columns, row_stride, column_stride;
    const T* weights;
    Index row_step, step;  // values from the weights of a row, or of a pixel, to those of the next

    template <class F> void visit(Index c, F&& f) const {
        // few values, so that they and the sums stay in registers
        const Index row_skip = row_stride - columns * column_stride, weight_skip = row_step - columns * step;
        const S* from = pixel + c;
        const T* weight = weights;
        for (Index i = 0; i < rows; ++i, from += row_skip, weight += weight_skip)
            for (Index j = 0; j < columns; ++j, from += column_stride, weight += step) f(from, weight);
    }
};

// The way to results that do not fit into the caches: results at a distance of `ahead` are prefetched, or stores go past the caches.
struct Writing {
    Index ahead = 0;
    bool streams = false;
};

// Chooses how outputs are written. A store past the caches saves reading the line first, but the next layer then reads it from memory: for
// outputs that fill much of the caches, both together are faster. They are slower for the pages that glibc requests anew for every output of
// 32 MB or more, because the system has just filled these with zeros in the caches.
template <class S> Writing choose_writing(const Problem& problem, const PixelMap<S>& output, const Tensor& y) {
    constexpr Index prefetched = 2 << 20, streamed = 8 << 20, requested = 32 << 20;  // bytes
    constexpr Index lanes = LANES<Compute<S>>;
    const Index bytes = problem.batch * problem.channels * output.height * output.width * Index(sizeof(S));
    const bool aligned = reinterpret_cast<std::uintptr_t>(y.data) % (lanes * sizeof(S)) == 0 && y.strides[0] % lanes == 0 &&
                         output.row_stride % lanes == 0 && output.column_stride % lanes == 0 && problem.group_channels() % lanes == 0;
    if (STREAMS && bytes > streamed && bytes < requested && aligned) return {0, true};
    return {bytes > prefetched ? output.factor * output.column_stride : 0, false};
}

// result[s][c] = sum over terms of weight[term][s] * pixel[term][c], for N results and V vectors of channels from c.
template <int N, int V, class T, class Sum, class S>
inline void sum_terms(const Sum& terms, Index c, S* const* results, const Writing& writing) {
    if (writing.ahead)
#pragma GCC unroll 8
        for (int s = 0; s < N; ++s)
#pragma GCC unroll 8
            for (int i = 0; i < V; ++i) __builtin_prefetch(results[s] + writing.ahead + c + i * LANES<T>, 1);
    Vector<T> total[N][V] = {};
    terms.visit(c, [&](const S* pixel, const T* weight) {
        Vector<T> v[V];
#pragma GCC unroll 8
        for (int i = 0; i < V; ++i) v[i] = load_once(pixel + i * LANES<T>);
#pragma GCC unroll 8
        for (int s = 0; s < N; ++s)
#pragma GCC unroll 8
            for (int i = 0; i < V; ++i) total[s][i] += weight[s] * v[i];
    });
#pragma GCC unroll 8
    for (int s = 0; s < N; ++s)
#pragma GCC unroll 8
        for (int i = 0; i < V; ++i)
            if (STREAMS && writing.streams) stream<T>(results[s] + c + i * LANES<T>, total[s][i]);
            else store(results[s] + c + i * LANES<T>, total[s][i]);
}

// The same for all channels; the last vector may repeat channels of the one before it.
template <int N, class T, class Sum, class S>
inline void sum_all_channels(const Sum& terms, Index channels, S* const* results, const Writing& writing = {}) {
    constexpr Index block = CHANNEL_VECTORS * LANES<T>;
    Index c = 0;
    for (; c + block <= channels; c += block) sum_terms<N, CHANNEL_VECTORS, T>(terms, c, results, writing);
    for (; c + LANES<T> <= channels; c += LANES<T>) sum_terms<N, 1, T>(terms, c, results, writing);
    if (c < channels) sum_terms<N, 1, T>(terms, channels - LANES<T>, results, writing);
}

// The same for consecutive cells of a row; the terms and results are those of the first.
template <int N, class T, class S>
NOINLINE void sum_cells(Rectangle<S, T> terms, Index source_step, Index weight_step, Index channels, std::array<S*, SUBS> results,
                        Index result_step, const Writing& writing, Index cells) {
    for (Index j = 0; j < cells; ++j) {
        sum_all_channels<N, T>(terms, channels, results.data(), writing);
        terms.pixel += source_step, terms.weights += weight_step;
        for (int s = 0; s < N; ++s) results[s] += result_step;
    }
}

}  // namespace carafepp
