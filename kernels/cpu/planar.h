// The three sums of tiles.h with cells in the lanes: any layout, read and written through planes.
#pragma once

#include "planes.h"

namespace carafepp {

// Channels whose planes are held at a time.
constexpr Index CHUNK = 16;
// Channels that share the loads of one weight, for a number of sub-pixels: as many as there are registers for.
constexpr int forward_channels(int subs) { return VECTOR_BYTES == 64 && subs < 4 ? 8 : 4; }
constexpr int BACKWARD_CHANNELS = 8, BACKWARD_TAPS = 5;

// one copy for all storage types
#define NOINLINE __attribute__((noinline))

// output[b][s] = sum over taps of weight[tap][s] * source[b][shift[tap]]; `w`, `x`, `y` point at the first of the cells in the lanes.
template <int S, int B, class T>
NOINLINE void sum_taps(const T* w, Index sub_stride, Index tap_stride, const T* x, Index x_stride, const Index* shift, Index taps, T* y,
                     Index y_stride) {
    Vector<T> total[S][B] = {};
    for (Index tap = 0; tap < taps; ++tap, w += tap_stride) {
        const T* source = x + shift[tap];
        Vector<T> v[B];
#pragma GCC unroll 8
        for (int b = 0; b < B; ++b) v[b] = load(source + b * x_stride);
#pragma GCC unroll 8
        for (int s = 0; s < S; ++s) {
            const Vector<T> weight = load_once(w + s * sub_stride);
#pragma GCC unroll 8
            for (int b = 0; b < B; ++b) total[s][b] += weight * v[b];
        }
    }
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s)
#pragma GCC unroll 8
        for (int b = 0; b < B; ++b) store(y + b * y_stride + s * sub_stride, total[s][b]);
}

// gradient[tap][s] += sum over channels of doutput[c][s] * source[c][shift[tap]].
template <int S, int K, class T>
NOINLINE void sum_channels(const T* dy, Index dy_stride, Index dy_sub, const T* x, Index x_stride, const Index* shift, Index channels, T* dw,
                           Index tap_stride, Index dw_sub) {
    Vector<T> total[K][S];
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k)
#pragma GCC unroll 8
        for (int s = 0; s < S; ++s) total[k][s] = load(dw + k * tap_stride + s * dw_sub);
    for (Index c = 0; c < channels; ++c, x += x_stride, dy += dy_stride) {
        Vector<T> d[S];
#pragma GCC unroll 8
        for (int s = 0; s < S; ++s) d[s] = load(dy + s * dy_sub);
#pragma GCC unroll 8
        for (int k = 0; k < K; ++k) {
            const Vector<T> v = load_once(x + shift[k]);
#pragma GCC unroll 8
            for (int s = 0; s < S; ++s) total[k][s] += d[s] * v;
        }
    }
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k)
#pragma GCC unroll 8
        for (int s = 0; s < S; ++s) store(dw + k * tap_stride + s * dw_sub, total[k][s]);
}

// Where dsource finds the weights and output gradients that it sums.
struct Visit {
    Index weight, doutput;
};

// dsource[b] = sum over visits of weight * doutput[b].
template <int B, class T>
NOINLINE void sum_visits(const T* w, const T* dy, Index dy_stride, const std::vector<Visit>& visits, T* dx, Index dx_stride) {
    Vector<T> total[B] = {};
    for (const Visit& visit : visits) {
        const Vector<T> weight = load_once(w + visit.weight);
#pragma GCC unroll 8
        for (int b = 0; b < B; ++b) total[b] += weight * load(dy + visit.doutput + b * dy_stride);
    }
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) store(dx + b * dx_stride, total[b]);
}

struct PlanarTables {
    std::vector<Index> shifts;                // [sub][tap]
    std::vector<std::vector<Visit>> visits;  // [phase]

    PlanarTables(const Problem& p, const Grid& g) : visits(p.phases()) {
        for (const Entry& e : g.entries) {
            shifts.push_back(e.phase * g.plane + g.shift(e));
            visits[e.phase].push_back({(e.tap * p.subs() + e.sub) * g.weight_plane - g.shift(e), e.sub * g.weight_plane - g.shift(e)});
        }
    }
};

template <class S, class T>
void planar_forward(const Problem& p, const Grid& g, const PlanarTables& tables, const Tile& t, const Tensor& x, const Tensor& y, Index n,
                    Index group, const T* weights, T* source, T* output) {
    const Index source_stride = p.phases() * g.plane, output_stride = p.subs() * g.weight_plane, channels = p.group_channels();
    for (Index first = 0; first < channels; first += CHUNK) {
        const Index count = std::min(CHUNK, channels - first), base = group * channels + first;
        for (Index c = 0; c < count; ++c)
            read_planes(source_plane<const S>(p, x, n, base + c), g, t, g.around(), T(0), source + c * source_stride, g.plane);
        for (Index f = 0; f < t.end(g); f += LANES<T>)
            for (const Run& run : g.runs)
                with_count(run.count, [&](auto subs) {
                    constexpr int S_COUNT = decltype(subs)::value;
                    auto sum = [&](auto width, Index c) {
                        sum_taps<S_COUNT, decltype(width)::value>(
                            weights + run.sub * g.weight_plane + f, g.weight_plane, p.subs() * g.weight_plane,
                            source + c * source_stride + f, source_stride, &tables.shifts[run.sub * p.taps()], p.taps(),
                            output + c * output_stride + run.sub * g.weight_plane + f, output_stride);
                    };
                    constexpr int CHANNELS = forward_channels(S_COUNT);
                    Index c = 0;
                    for (; c + CHANNELS <= count; c += CHANNELS) sum(std::integral_constant<int, CHANNELS>{}, c);
                    for (; c < count; ++c) sum(std::integral_constant<int, 1>{}, c);
                });
        for (Index c = 0; c < count; ++c)
            write_planes(output + c * output_stride, g.weight_plane, g, t, output_plane<S>(p, y, n, base + c));
    }
}

// Either of dx (null data: not asked for) and `gradients` (null) is filled, in one pass over dy.
template <class S, class T>
void planar_backward(const Problem& p, const Grid& g, const PlanarTables& tables, const Tile& t, const Tensor& dy, const Tensor& x,
                     const Tensor& dx, Index n, Index group, const T* weights, T* gradients, T* source, T* doutput, T* dsource) {
    const Index source_stride = p.phases() * g.plane, output_stride = p.subs() * g.weight_plane;
    const Index dsource_stride = p.phases() * g.inner, channels = p.group_channels();
    const Reach reach = dx.data ? g.around() : Reach{};
    for (Index first = 0; first < channels; first += CHUNK) {
        const Index count = std::min(CHUNK, channels - first), base = group * channels + first;
        for (Index c = 0; c < count; ++c)
            read_planes(output_plane<const S>(p, dy, n, base + c), g, t, reach, T(0), doutput + c * output_stride, g.weight_plane);
        if (gradients) {
            for (Index c = 0; c < count; ++c)
                read_planes(source_plane<const S>(p, x, n, base + c), g, t, g.around(), T(0), source + c * source_stride, g.plane);
            for (Index f = 0; f < t.end(g); f += LANES<T>)
                for (const Run& run : g.runs)
                    with_count(run.count, [&](auto subs) {
                        auto sum = [&](auto taps, Index tap) {
                            sum_channels<decltype(subs)::value, decltype(taps)::value>(
                                doutput + run.sub * g.weight_plane + f, output_stride, g.weight_plane, source + f, source_stride,
                                &tables.shifts[run.sub * p.taps() + tap], count, gradients + (tap * p.subs() + run.sub) * g.inner + f,
                                p.subs() * g.inner, g.inner);
                        };
                        Index tap = 0;
                        for (; tap + BACKWARD_TAPS <= p.taps(); tap += BACKWARD_TAPS) sum(std::integral_constant<int, BACKWARD_TAPS>{}, tap);
                        for (; tap < p.taps(); ++tap) sum(std::integral_constant<int, 1>{}, tap);
                    });
        }
        if (!dx.data) continue;
        for (Index f = 0; f < t.end(g); f += LANES<T>)
            for (Index phase = 0; phase < p.phases(); ++phase) {
                auto sum = [&](auto width, Index c) {
                    sum_visits<decltype(width)::value>(weights + f, doutput + c * output_stride + f, output_stride, tables.visits[phase],
                                                       dsource + c * dsource_stride + phase * g.inner + f, dsource_stride);
                };
                Index c = 0;
                for (; c + BACKWARD_CHANNELS <= count; c += BACKWARD_CHANNELS) sum(std::integral_constant<int, BACKWARD_CHANNELS>{}, c);
                for (; c < count; ++c) sum(std::integral_constant<int, 1>{}, c);
            }
        for (Index c = 0; c < count; ++c)
            write_planes(dsource + c * dsource_stride, g.inner, g, t, source_plane<S>(p, dx, n, base + c));
    }
}

}  // namespace carafepp
