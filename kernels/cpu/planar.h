// The three sums of layout.h with cells in the lanes: maps of any memory format are read and written through planes.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "borders.h"
#include "call.h"
#include "index.h"
#include "layout.h"
#include "scratch.h"
#include "tiling.h"
#include "transfer.h"
#include "vectors.h"
#include "windows.h"

namespace carafepp {

// Number of channels whose planes are held at a time.
constexpr Index CHUNK = 16;
// Number of channels that share the load of one weight, for `subs` sub-pixels; the registers limit it.
constexpr int forward_channels(int subs) { return VECTOR_BYTES == 64 && subs < 4 ? 8 : 4; }
constexpr int BACKWARD_CHANNELS = 8, BACKWARD_TAPS = 5;

// The places of the factors of the sums, relative to the cell in the first lane.
struct PlanarTables {
    // from a weight of a cell to the output gradient that it multiplies
    struct Visit {
        Index weight, doutput;
    };
    std::vector<Index> shifts;               // [sub][tap], into the planes of a channel's source
    std::vector<std::vector<Visit>> visits;  // [phase], for dsource only

    PlanarTables() = default;
    PlanarTables(const Problem& problem, const Windows& windows, const Layout& layout, const Grid& grid) : visits(problem.phases()) {
        const Index plane = grid.plane(layout.weights.halo);
        shifts.reserve(windows.sources.size());
        for (const TapSource& source : windows.sources) {
            const Index shift = grid.shift(source);
            shifts.push_back(source.phase * grid.haloed_plane + shift);
            const Index weight = (source.tap * problem.subs() + source.sub) * plane;
            if (layout.dsource.sets) visits[source.phase].push_back({weight - shift, source.sub * plane - shift});
        }
    }
};

// The inner loops take pointers to the cell in the first lane and the strides of `scratch`; they are compiled once for all storage types.

// output[c][s] = sum over taps of weight[tap][s] * source[c][shift[tap]] for C channels and N sub-pixels.
template <int N, int C, class T>
NOINLINE void sum_taps(const Scratch<T>& scratch, const T* weight, const T* source, const Index* shifts, Index taps, T* output) {
    const Index weight_tap = scratch.weights.set, weight_sub = scratch.weights.plane, source_channel = scratch.source.set;
    const Index output_channel = scratch.output.set, output_sub = scratch.output.plane;
    Vector<T> total[N][C] = {};
    for (Index tap = 0; tap < taps; ++tap, weight += weight_tap) {
        const T* shifted = source + shifts[tap];
        Vector<T> v[C];
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) v[c] = load(shifted + c * source_channel);
#pragma GCC unroll 8
        for (int s = 0; s < N; ++s) {
            const Vector<T> w = load_once(weight + s * weight_sub);
#pragma GCC unroll 8
            for (int c = 0; c < C; ++c) total[s][c] += w * v[c];
        }
    }
#pragma GCC unroll 8
    for (int s = 0; s < N; ++s)
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) store(output + c * output_channel + s * output_sub, total[s][c]);
}

// dweight[tap][s] += sum over channels of doutput[channel][s] * source[channel][shift[tap]] for K taps and N sub-pixels.
template <int N, int K, class T>
NOINLINE void sum_channels(const Scratch<T>& scratch, const T* doutput, const T* source, const Index* shifts, Index channels, T* dweight) {
    const Index doutput_channel = scratch.doutput.set, doutput_sub = scratch.doutput.plane, source_channel = scratch.source.set;
    const Index dweight_tap = scratch.dweights.set, dweight_sub = scratch.dweights.plane;
    Vector<T> total[K][N];
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k)
#pragma GCC unroll 8
        for (int s = 0; s < N; ++s) total[k][s] = load(dweight + k * dweight_tap + s * dweight_sub);
    for (Index channel = 0; channel < channels; ++channel, source += source_channel, doutput += doutput_channel) {
        Vector<T> d[N];
#pragma GCC unroll 8
        for (int s = 0; s < N; ++s) d[s] = load(doutput + s * doutput_sub);
#pragma GCC unroll 8
        for (int k = 0; k < K; ++k) {
            const Vector<T> v = load_once(source + shifts[k]);
#pragma GCC unroll 8
            for (int s = 0; s < N; ++s) total[k][s] += d[s] * v;
        }
    }
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k)
#pragma GCC unroll 8
        for (int s = 0; s < N; ++s) store(dweight + k * dweight_tap + s * dweight_sub, total[k][s]);
}

// dsource[c] = sum over visits of weight * doutput[c] for C channels.
template <int C, class T>
NOINLINE void sum_visits(const Scratch<T>& scratch, const T* weight, const T* doutput, const std::vector<PlanarTables::Visit>& visits,
                         T* dsource) {
    const Index doutput_channel = scratch.doutput.set, dsource_channel = scratch.dsource.set;
    Vector<T> total[C] = {};
    for (const PlanarTables::Visit& visit : visits) {
        const Vector<T> w = load_once(weight + visit.weight);
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) total[c] += w * load(doutput + visit.doutput + c * doutput_channel);
    }
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) store(dsource + c * dsource_channel, total[c]);
}

// Calls f(std::integral_constant<int, STEP>, i) for i in steps of STEP below `count`, then f(std::integral_constant<int, 1>, i) for the rest.
template <int STEP, class F> inline void in_steps(Index count, F&& f) {
    Index i = 0;
    for (; i + STEP <= count; i += STEP) f(std::integral_constant<int, STEP>{}, i);
    for (; i < count; ++i) f(std::integral_constant<int, 1>{}, i);
}

// Reads the source planes of `count` channels from `first`.
template <class S, class T> void read_source(const Task& task, const Planes<T>& source, Index first, Index count) {
    const Reach reach = task.reach(task.layout.source);
    for (Index c = 0; c < count; ++c) {
        const MapView<const S> map = view_source<const S>(task, task.call.x, first + c);
        read_map(task, map, reach, T(0), source.at(c, 0), source.plane);
        if (padding(task.problem)) pad_planes(task, map, reach, source.at(c, 0), source.plane);
    }
}

// Adds the gradients of the places outside the map to those of the pixels that are read there.
template <class T> void add_padding(const Task& task, const Scratch<T>& scratch, Index count) {
    const Planes<T>&weights = scratch.weights, &doutput = scratch.doutput, &dsource = scratch.dsource;
    const Index down = task.problem.down;
    std::vector<T> totals(count);
    visit_padding_pixels(task, [&](Index row, Index column, const std::vector<Index>& rows, const std::vector<Index>& columns) {
        std::fill(totals.begin(), totals.end(), T(0));
        for (Index place_row : rows)
            for (Index place_column : columns) {
                if (place_row == row && place_column == column) continue;
                visit_reads(task, place_row, place_column, [&](const TapSource& from, Index i, Index j) {
                    const Index f = (i - task.tile.row) * task.grid.pitch + j - task.tile.column;
                    const T weight = weights.at(from.tap, from.sub)[f];
                    const T* gradient = doutput.at(0, from.sub) + f;
                    for (Index c = 0; c < count; ++c) totals[c] += weight * gradient[c * doutput.set];
                });
            }
        const Index f = (row / down - task.tile.row) * task.grid.pitch + column / down - task.tile.column;
        T* gradient = dsource.at(0, row % down * down + column % down) + f;
        for (Index c = 0; c < count; ++c) gradient[c * dsource.set] += totals[c];
    });
}

template <class S, class T> void planar_forward(const Task& task, const PlanarTables& tables, const Scratch<T>& scratch) {
    const Index taps = task.problem.taps(), channels = task.problem.group_channels(), end = task.tile.end;
    const Planes<T>&weights = scratch.weights, &source = scratch.source, &output = scratch.output;
    for (Index first = 0; first < channels; first += CHUNK) {
        const Index count = std::min(CHUNK, channels - first);
        read_source<S>(task, source, first, count);
        for (Index f = 0; f < end; f += LANES<T>)
            for (const SubRun& run : task.windows.runs)
                with_count(run.count, [&](auto subs) {
                    constexpr int N = decltype(subs)::value;
                    in_steps<forward_channels(N)>(count, [&](auto width, Index c) {
                        sum_taps<N, decltype(width)::value>(scratch, weights.at(0, run.first) + f, source.at(c, 0) + f,
                                                            &tables.shifts[run.first * taps], taps, output.at(c, run.first) + f);
                    });
                });
        for (Index c = 0; c < count; ++c)
            write_map(task, output.at(c, 0), output.plane, view_output<S>(task, task.call.y, first + c));
    }
}

// Fills dx, the planes of dweights, or both, in one pass over dy.
template <class S, class T> void planar_backward(const Task& task, const PlanarTables& tables, const Scratch<T>& scratch) {
    const Call& call = task.call;
    const Index taps = task.problem.taps(), phases = task.problem.phases(), channels = task.problem.group_channels(), end = task.tile.end;
    const Planes<T>&weights = scratch.weights, &source = scratch.source, &doutput = scratch.doutput;
    const Planes<T>&dweights = scratch.dweights, &dsource = scratch.dsource;
    const Reach reach = task.reach(task.layout.doutput);
    for (Index first = 0; first < channels; first += CHUNK) {
        const Index count = std::min(CHUNK, channels - first);
        for (Index c = 0; c < count; ++c)
            read_map(task, view_output<const S>(task, call.dy, first + c), reach, T(0), doutput.at(c, 0), doutput.plane);
        if (call.dlogits) {
            read_source<S>(task, source, first, count);
            for (Index f = 0; f < end; f += LANES<T>)
                for (const SubRun& run : task.windows.runs)
                    with_count(run.count, [&](auto subs) {
                        in_steps<BACKWARD_TAPS>(taps, [&](auto width, Index tap) {
                            sum_channels<decltype(subs)::value, decltype(width)::value>(
                                scratch, doutput.at(0, run.first) + f, source.data + f, &tables.shifts[run.first * taps + tap], count,
                                dweights.at(tap, run.first) + f);
                        });
                    });
        }
        if (!call.dx) continue;
        for (Index f = 0; f < end; f += LANES<T>)
            for (Index phase = 0; phase < phases; ++phase)
                in_steps<BACKWARD_CHANNELS>(count, [&](auto width, Index c) {
                    sum_visits<decltype(width)::value>(scratch, weights.data + f, doutput.at(c, 0) + f, tables.visits[phase],
                                                       dsource.at(c, phase) + f);
                });
        add_padding(task, scratch, count);
        for (Index c = 0; c < count; ++c) write_map(task, dsource.at(c, 0), dsource.plane, view_source<S>(task, call.dx, first + c));
    }
}

}  // namespace carafepp
