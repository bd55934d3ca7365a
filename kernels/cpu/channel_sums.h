// Weighted sums of pixels whose channels are adjacent, with channels in the lanes.
#pragma once

#include <array>
#include <cstdint>
#include <type_traits>

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
    template <class F> INLINED void visit(Index c, F&& f) const {
        const T* weight = weights;
        for (Index k = 0; k < count; ++k, weight += step) f(pixels[k] + c, weight);
    }
};

// The same for the pixels of a rectangle. A row's end is reached by counting down, so that few values are live beside the sums: compilers
// keep the others in vector registers, from where an address is known only after the sums before it.
template <class S, class T> struct Rectangle {
    const S* pixel;
    const T* weights;
    Index rows, columns;
    Index step, skip;                // values from a pixel to the next, and from the end of a row to the next row
    Index weight_step, weight_skip;  // the same for their weights

    template <class F> INLINED void visit(Index c, F&& f) const {
        const S* from = pixel + c;
        const T* weight = weights;
        for (Index i = rows; i > 0; --i, from += skip, weight += weight_skip)
            for (Index j = columns; j > 0; --j, from += step, weight += weight_step) f(from, weight);
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

// result[s][c] = sum over terms of weight[term][s] * pixel[term][c], for N results and V vectors of channels from c. Prefetches results at a
// distance of `ahead`, unless it is 0.
template <int N, int V, bool STREAM, class T, class Sum, class S>
NOINLINE void sum_terms(const Sum& terms, Index c, S* const* results, Index ahead) {
    // vectors that are loaded and stored together
    constexpr int PAIR = std::is_same_v<S, BFloat16> && V % 2 == 0 ? 2 : 1;
    if (ahead)
#pragma GCC unroll 8
        for (int s = 0; s < N; ++s)
#pragma GCC unroll 8
            for (int i = 0; i < V; ++i) __builtin_prefetch(results[s] + ahead + c + i * LANES<T>, 1);
    Vector<T> total[N][V] = {};
    terms.visit(c, [&](const S* pixel, const T* weight) {
        Vector<T> v[V];
#pragma GCC unroll 8
        for (int i = 0; i < V; i += PAIR)
            if constexpr (PAIR == 2) load_pair(pixel + i * LANES<T>, &v[i]);
            else v[i] = load_once(pixel + i * LANES<T>);
#pragma GCC unroll 8
        for (int s = 0; s < N; ++s)
#pragma GCC unroll 8
            for (int i = 0; i < V; ++i) total[s][i] += weight[s] * v[i];
    });
#pragma GCC unroll 8
    for (int s = 0; s < N; ++s)
#pragma GCC unroll 8
        for (int i = 0; i < V; i += PAIR) {
            S* to = results[s] + c + i * LANES<T>;
            if constexpr (PAIR == 2) STREAM ? stream_pair(to, &total[s][i]) : store_pair(to, &total[s][i]);
            else STREAM ? stream<T>(to, total[s][i]) : store(to, total[s][i]);
        }
}

// The same for all channels; the last vector may repeat channels of the one before it.
template <int N, bool STREAM, class T, class Sum, class S>
inline void sum_all_channels(const Sum& terms, Index channels, S* const* results, Index ahead = 0) {
    constexpr Index block = CHANNEL_VECTORS * LANES<T>;
    Index c = 0;
    for (; c + block <= channels; c += block) sum_terms<N, CHANNEL_VECTORS, STREAM, T>(terms, c, results, ahead);
    for (; c + LANES<T> <= channels; c += LANES<T>) sum_terms<N, 1, STREAM, T>(terms, c, results, ahead);
    if (c < channels) sum_terms<N, 1, STREAM, T>(terms, channels - LANES<T>, results, ahead);
}

// The same for consecutive cells of a row; the terms and results are those of the first.
template <int N, bool STREAM, class T, class S>
void sum_cells(Rectangle<S, T> terms, Index source_step, Index weight_step, Index channels, std::array<S*, SUBS> results, Index result_step,
               Index ahead, Index cells) {
    for (Index j = 0; j < cells; ++j) {
        sum_all_channels<N, STREAM, T>(terms, channels, results.data(), ahead);
        terms.pixel += source_step, terms.weights += weight_step;
        for (int s = 0; s < N; ++s) results[s] += result_step;
    }
}

}  // namespace carafepp
