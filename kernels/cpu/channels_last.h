// The three sums of layout.h with channels in the lanes: maps whose channels are adjacent are read and written in place.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <limits>
#include <map>
#include <utility>
#include <vector>

#include "borders.h"
#include "call.h"
#include "cell_weights.h"
#include "channel_sums.h"
#include "index.h"
#include "pixels.h"
#include "scratch.h"
#include "storage.h"
#include "tiling.h"
#include "transfer.h"
#include "vectors.h"
#include "windows.h"

namespace carafepp {

// Number of taps whose gradients are summed together.
constexpr int GRADIENT_TAPS = 5;

// Lane i of the result is the sum of the lanes of v[i]. Neighbours are added and packed, log2(LANES) times; v is overwritten.
template <class T, std::size_t... I> inline Vector<T> add_neighbours(Vector<T> a, Vector<T> b, std::index_sequence<I...>) {
    return shuffle<T, int(2 * I)...>(a, b) + shuffle<T, int(2 * I + 1)...>(a, b);
}
template <class T> inline Vector<T> lane_sums(Vector<T>* v) {
#pragma GCC unroll 4
    for (int count = LANES<T>; count > 1; count /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < count / 2; ++i) v[i] = add_neighbours<T>(v[2 * i], v[2 * i + 1], std::make_index_sequence<LANES<T>>{});
    return v[0];
}

// The lanes of sums[k][s] add up to the sum over channels of doutput[s][c] * source[k][c], for N outputs and K source pixels.
template <int N, int K, class S, class T>
inline void multiply_channels(const S* const* doutput, const S* const* source, Index channels, Vector<T>* sums) {
    Vector<T> total[K][N] = {};
    auto add = [&](Index c, auto keep) {
        Vector<T> d[N];
#pragma GCC unroll 8
        for (int s = 0; s < N; ++s) d[s] = keep(load(doutput[s] + c));
#pragma GCC unroll 8
        for (int k = 0; k < K; ++k) {
            const Vector<T> v = load(source[k] + c);
#pragma GCC unroll 8
            for (int s = 0; s < N; ++s) total[k][s] += d[s] * v;
        }
    };
    Index c = 0;
    for (; c + LANES<T> <= channels; c += LANES<T>) add(c, [](Vector<T> v) { return v; });
    if (c < channels) {
        // the last vector begins with channels that have already been counted
        T counted[LANES<T>];
        const Index begin = channels - LANES<T>;
        for (Index i = 0; i < LANES<T>; ++i) counted[i] = T(begin + i < c);
        const Vector<T> done = load(counted);
        add(begin, [done](Vector<T> v) { return done > T(0) ? Vector<T>{} : v; });
    }
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k)
#pragma GCC unroll 8
        for (int s = 0; s < N; ++s) sums[k * N + s] = total[k][s];
}

// `weights` is PlaneWeights or CellWeights.
template <class S, class Weights> void channels_last_forward(const Task& task, Weights weights) {
    using T = Compute<S>;
    const Tile& tile = task.tile;
    const Problem& problem = task.problem;
    const Index channels = problem.group_channels(), down = problem.down, kernel = problem.kernel;
    const PixelMap<S> output = output_pixels<S>(task, task.call.y);
    const std::vector<RunPixels<S>> runs = output_runs(task, output);
    const Writing writing = choose_writing(problem, output, task.call.y);
    WindowPixels<S> source(task);
    const PixelMap<const S>& map = source.map;
    // zeros outside the map add nothing unless a weight is infinite or NaN
    const bool skips_zeros = !map.padding && problem.divides_by_sum();
    std::vector<S> unused(channels);
    // sums a run of the cells of a row from `column` on, one or more of those before `end`; returns the column of the next
    auto sum_run = [&](const RunPixels<S>& run, Index row, Index column, Index end, const T* first_weights) {
        const Index top = row * down + run.window_row, left = column * down + run.window_column;
        const Index above = std::max<Index>(0, -top), before = std::max<Index>(0, -left);
        const Index rows = std::min(kernel, map.height - top) - above, columns = std::min(kernel, map.width - left) - before;
        const bool in_rectangle = skips_zeros || (rows == kernel && columns == kernel);
        // cells that have all outputs, and cells before `last`, whose windows end inside the map
        const bool complete = (row + 1) * output.factor <= output.height && (column + 1) * output.factor <= output.width;
        const Index last = std::min(floor_div(map.width - kernel - run.window_column, down) + 1, output.width / output.factor);
        const bool several = complete && in_rectangle && columns == kernel;
        const Index cells = several ? std::min(end, last) - column : 1;
        std::array<S*, SUBS> outputs;
        run.find(output, row, column, unused.data(), outputs.data());
        // results past the caches are whole vectors of outputs that exist
        const bool streams = STREAMS && writing.streams && complete;
        const Index ahead = complete ? writing.ahead : 0;
        with_count(run.run.count, [&](auto count) {
            constexpr int N = decltype(count)::value;
            if (in_rectangle) {
                const S* pixel = map.data + (top + above) * map.row_stride + (left + before) * map.column_stride;
                const Index row_step = kernel * weights.tap_step;
                const Rectangle<S, T> terms{pixel, first_weights + above * row_step + before * weights.tap_step, rows, columns,
                                            map.column_stride, map.row_stride - columns * map.column_stride,
                                            weights.tap_step, row_step - columns * weights.tap_step};
                const auto sum = streams ? sum_cells<N, true, T, S> : sum_cells<N, false, T, S>;
                return sum(terms, down * map.column_stride, weights.cell_step, channels, outputs, output.factor * output.column_stride, ahead,
                           cells);
            }
            source.find(top, left);
            const Terms<S, T> terms{source.pixels.data(), Index(source.pixels.size()), first_weights, weights.tap_step};
            sum_all_channels<N, false, T>(terms, channels, outputs.data(), ahead);
        });
        return column + cells;
    };
    for (Index i = 0; i < tile.rows; ++i)
        for (Index j = 0; j < tile.columns; j += weights.cells) {
            const T* strip = weights.find(i, j);
            const Index begin = tile.column + j, end = tile.column + std::min(j + weights.cells, tile.columns);
            for (const RunPixels<S>& run : runs)
                for (Index column = begin; column < end;)
                    column = sum_run(run, tile.row + i, column, end, strip + (column - begin) * weights.cell_step + run.run.first);
        }
    if (writing.streams) end_streams();
}

// The planes of the weights with which NEIGHBOURS consecutive cells read one output; ABSENT for a cell that does not read it.
constexpr int NEIGHBOURS = SUBS;
constexpr Index ABSENT = std::numeric_limits<Index>::min();
using WeightPlanes = std::array<Index, NEIGHBOURS>;

template <class S, class T> void channels_last_dx(const Task& task, const Scratch<T>& scratch) {
    const Problem& problem = task.problem;
    const Tile& tile = task.tile;
    const Planes<T>& weights = scratch.weights;
    const Index channels = problem.group_channels(), halo = task.grid.halo, pitch = task.grid.pitch;
    const PixelMap<const S> output = output_pixels<const S>(task, task.call.dy);
    const PixelMap<S> source = source_pixels<S>(task, task.call.dx, Padding{});
    // by phase, then by the row and column of the output relative to the first output of the first cell
    std::vector<std::map<std::pair<Index, Index>, WeightPlanes>> shared(problem.phases());
    for (const TapSource& from : task.windows.sources)
        for (int i = 0; i < NEIGHBOURS; ++i) {
            WeightPlanes absent;
            absent.fill(ABSENT);
            const std::pair<Index, Index> place(from.sub_row - from.move_rows * problem.up,
                                                from.sub_column - (from.move_columns - i) * problem.up);
            WeightPlanes& planes = shared[from.phase].try_emplace(place, absent).first->second;
            planes[i] = from.tap * weights.set + from.sub * weights.plane - task.grid.shift(from) + i;
        }
    const std::vector<S> zeros(channels);
    std::vector<S> unused(channels);
    std::vector<const S*> pixels;
    std::vector<Index> planes;
    std::vector<T> factors;
    for (Index phase = 0; phase < problem.phases(); ++phase) {
        Steps steps;
        planes.clear();
        for (const auto& [place, of_neighbours] : shared[phase]) {
            steps.add(output, place.first, place.second);
            planes.insert(planes.end(), of_neighbours.begin(), of_neighbours.end());
        }
        pixels.resize(steps.offsets.size());
        factors.resize(planes.size());
        for (Index i = 0; i < tile.rows; ++i)
            for (Index j = 0; j < tile.columns; j += NEIGHBOURS) {
                const Index row = tile.row + i, column = tile.column + j;
                const bool inside = output.inside(row, column, halo) && output.inside(row, column + NEIGHBOURS - 1, halo);
                steps.find(output, row, column, inside, zeros.data(), pixels);
                T* to = factors.data();
                for (Index plane : planes) *to++ = plane == ABSENT ? T(0) : weights.data[plane + i * pitch + j];
                S* sources[NEIGHBOURS];
                for (int k = 0; k < NEIGHBOURS; ++k) {
                    sources[k] = source.pixel(row * problem.down + phase / problem.down, (column + k) * problem.down + phase % problem.down);
                    if (!sources[k] || j + k >= tile.columns) sources[k] = unused.data();
                }
                const Terms<S, T> terms{pixels.data(), Index(pixels.size()), factors.data(), NEIGHBOURS};
                sum_all_channels<NEIGHBOURS, false, T>(terms, channels, sources);
            }
    }
    // pixels that are also read at places outside the map: all of their terms again, so that the result is rounded once
    visit_padding_pixels(task, [&](Index row, Index column, const std::vector<Index>& rows, const std::vector<Index>& columns) {
        pixels.clear(), factors.clear();
        for (Index place_row : rows)
            for (Index place_column : columns)
                visit_reads(task, place_row, place_column, [&](const TapSource& from, Index i, Index j) {
                    const S* pixel = output.pixel(i * problem.up + from.sub_row, j * problem.up + from.sub_column);
                    if (!pixel) return;
                    pixels.push_back(pixel);
                    factors.push_back(weights.at(from.tap, from.sub)[(i - tile.row) * pitch + j - tile.column]);
                });
        S* pixel = source.pixel(row, column);
        sum_all_channels<1, false, T>(Terms<S, T>{pixels.data(), Index(pixels.size()), factors.data(), 1}, channels, &pixel);
    });
}

template <class S, class T> void channels_last_dweights(const Task& task, const Scratch<T>& scratch) {
    const Tile& tile = task.tile;
    const Problem& problem = task.problem;
    const Planes<T>& dweights = scratch.dweights;
    const Index taps = problem.taps(), subs = problem.subs(), windows = problem.windows(), channels = problem.group_channels();
    const Index down = problem.down, pitch = task.grid.pitch;
    const PixelMap<const S> output = output_pixels<const S>(task, task.call.dy);
    const std::vector<RunPixels<const S>> runs = output_runs(task, output);
    WindowPixels<S> source(task);
    std::vector<Vector<T>> sums(taps * SUBS + LANES<T>);
    // the gradients of the last cells, because those of one cell lie far apart in the planes
    std::vector<T> strip(LANES<T> * windows);  // [cell][tap][sub]
    for (Index i = 0; i < tile.rows; ++i)
        for (Index j = 0; j < tile.columns; ++j) {
            const Index cell = j % LANES<T>;
            for (const RunPixels<const S>& run : runs) {
                const Index row = tile.row + i, column = tile.column + j;
                source.find(row * down + run.window_row, column * down + run.window_column);
                const S* outputs[SUBS];
                run.find(output, row, column, source.zeros.data(), outputs);
                with_count(run.run.count, [&](auto count) {
                    constexpr int N = decltype(count)::value;
                    Index tap = 0;
                    for (; tap + GRADIENT_TAPS <= taps; tap += GRADIENT_TAPS)
                        multiply_channels<N, GRADIENT_TAPS, S, T>(outputs, &source.pixels[tap], channels, &sums[tap * N]);
                    for (; tap < taps; ++tap) multiply_channels<N, 1, S, T>(outputs, &source.pixels[tap], channels, &sums[tap * N]);
                    for (Index first = 0; first < taps * N; first += LANES<T>) {
                        T lanes[LANES<T>];
                        store(lanes, lane_sums<T>(&sums[first]));
                        for (Index k = first; k < std::min<Index>(first + LANES<T>, taps * N); ++k)
                            strip[cell * windows + k / N * subs + run.run.first + k % N] = lanes[k - first];
                    }
                });
            }
            if (cell + 1 == LANES<T> || j + 1 == tile.columns)
                transpose_matrix<T>(strip.data(), windows, cell + 1, windows, dweights.data + i * pitch + j - cell, dweights.plane);
        }
}

}  // namespace carafepp
