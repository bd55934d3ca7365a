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
#include "index.h"
#include "scratch.h"
#include "storage.h"
#include "tiling.h"
#include "vectors.h"
#include "windows.h"

namespace carafepp {

// Number of channel vectors that are summed together, and number of taps whose gradients are summed together.
constexpr int CHANNEL_VECTORS = 4, GRADIENT_TAPS = 5;

// The terms of outputs, or of source gradients, that are summed together: pixels, each with one weight per result.
template <class S, class T> struct Terms {
    std::vector<const S*> pixels;
    std::vector<T> weights;  // [pixel][result]
};

// result[s][c] = sum over terms of weight[term][s] * pixel[term][c], for N results and V vectors of channels from c.
template <int N, int V, class S, class T> inline void sum_terms(const Terms<S, T>& terms, Index c, S* const* results) {
    Vector<T> total[N][V] = {};
    const T* weight = terms.weights.data();
    for (const S* pixel : terms.pixels) {
        Vector<T> v[V];
#pragma GCC unroll 8
        for (int i = 0; i < V; ++i) v[i] = load(pixel + c + i * LANES<T>);
#pragma GCC unroll 8
        for (int s = 0; s < N; ++s, ++weight)
#pragma GCC unroll 8
            for (int i = 0; i < V; ++i) total[s][i] += *weight * v[i];
    }
#pragma GCC unroll 8
    for (int s = 0; s < N; ++s)
#pragma GCC unroll 8
        for (int i = 0; i < V; ++i) store(results[s] + c + i * LANES<T>, total[s][i]);
}

// The same for all channels; the last vector may repeat channels of the one before it.
template <int N, class S, class T> inline void sum_all_channels(const Terms<S, T>& terms, Index channels, S* const* results) {
    constexpr Index block = CHANNEL_VECTORS * LANES<T>;
    Index c = 0;
    for (; c + block <= channels; c += block) sum_terms<N, CHANNEL_VECTORS>(terms, c, results);
    for (; c + LANES<T> <= channels; c += LANES<T>) sum_terms<N, 1>(terms, c, results);
    if (c < channels) sum_terms<N, 1>(terms, channels - LANES<T>, results);
}

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

// A map of which every cell owns factor * factor pixels; a pixel is the channels of the task's group, adjacent in memory.
template <class S> struct PixelMap {
    S* data;
    Index row_stride, column_stride, height, width, factor;
    Padding padding;

    // null for a zero outside the map
    S* pixel(Index row, Index column) const {
        row = padding.pixel(row, height), column = padding.pixel(column, width);
        return row < 0 || column < 0 ? nullptr : data + row * row_stride + column * column_stride;
    }
    // whether the cells within `halo` of a cell own no pixel outside the map
    bool inside(Index row, Index column, Index halo) const {
        return row >= halo && column >= halo && (row + halo + 1) * factor <= height && (column + halo + 1) * factor <= width;
    }
};
template <class S> PixelMap<S> source_pixels(const Task& task, const Tensor& x, const Padding& padding) {
    const Problem& problem = task.problem;
    S* data = x.at<S>(task.image, task.first_channel());
    return {data, x.strides[2], x.strides[3], problem.height, problem.width, problem.down, padding};
}
template <class S> PixelMap<S> output_pixels(const Task& task, const Tensor& y) {
    const Problem& problem = task.problem;
    S* data = y.at<S>(task.image, task.first_channel());
    return {data, y.strides[2], y.strides[3], problem.output_rows, problem.output_columns, problem.up, Padding{}};
}

// The step from the first pixel of a cell to a pixel that it sums, and the plane of the weight.
struct Step {
    Index rows, columns, offset, weight;
};
template <class S> Step make_step(const PixelMap<S>& map, Index rows, Index columns, Index weight) {
    return {rows, columns, rows * map.row_stride + columns * map.column_stride, weight};
}

// Finds the pixels that a cell sums. `zeros` replaces zeros outside the map; a cell that is `inside` has none.
template <class S>
inline void find_pixels(const std::vector<Step>& steps, const PixelMap<S>& map, Index cell_row, Index cell_column, bool inside,
                        S* zeros, S** pixels) {
    const Index row = cell_row * map.factor, column = cell_column * map.factor;
    if (inside) {
        S* first = map.data + row * map.row_stride + column * map.column_stride;
        for (const Step& step : steps) *pixels++ = first + step.offset;
        return;
    }
    for (const Step& step : steps) {
        S* pixel = map.pixel(row + step.rows, column + step.columns);
        *pixels++ = pixel ? pixel : zeros;
    }
}

// The source pixels of the taps of every run, and the planes of the weights of its first sub-pixel.
template <class S, class T>
std::vector<std::vector<Step>> source_steps(const Task& task, const PixelMap<S>& source, const Planes<T>& weights) {
    const Index down = task.problem.down;
    std::vector<std::vector<Step>> steps(task.windows.runs.size());
    for (std::size_t r = 0; r < steps.size(); ++r)
        for (Index tap = 0; tap < task.problem.taps(); ++tap) {
            const TapSource& from = task.windows.source(task.windows.runs[r].first, tap);
            steps[r].push_back(make_step(source, from.move_rows * down + from.phase / down, from.move_columns * down + from.phase % down,
                                         tap * weights.set + from.sub * weights.plane));
        }
    return steps;
}

// Finds the output pixels of a run; `absent` replaces those that a rational scale cuts off the last cell.
template <class S>
inline void find_outputs(const PixelMap<S>& output, Index cell_row, Index cell_column, const SubRun& run, S* absent, S** outputs) {
    for (Index s = 0; s < run.count; ++s) {
        const Index sub = run.first + s;
        outputs[s] = output.pixel(cell_row * output.factor + sub / output.factor, cell_column * output.factor + sub % output.factor);
        if (!outputs[s]) outputs[s] = absent;
    }
}

template <class S, class T> void channels_last_forward(const Task& task, const Scratch<T>& scratch) {
    const Tile& tile = task.tile;
    const Planes<T>& weights = scratch.weights;
    const Index taps = task.problem.taps(), channels = task.problem.group_channels(), halo = task.grid.halo, pitch = task.grid.pitch;
    const PixelMap<const S> source = source_pixels<const S>(task, task.call.x, padding(task.problem));
    const PixelMap<S> output = output_pixels<S>(task, task.call.y);
    const std::vector<std::vector<Step>> steps = source_steps(task, source, weights);
    const std::vector<S> zeros(channels);
    std::vector<S> unused(channels);
    Terms<S, T> terms;
    terms.pixels.resize(taps);
    for (Index i = 0; i < tile.rows; ++i)
        for (Index j = 0; j < tile.columns; ++j)
            for (std::size_t r = 0; r < steps.size(); ++r) {
                const Index row = tile.row + i, column = tile.column + j;
                const SubRun& run = task.windows.runs[r];
                find_pixels(steps[r], source, row, column, source.inside(row, column, halo), zeros.data(), terms.pixels.data());
                S* outputs[SUBS];
                find_outputs(output, row, column, run, unused.data(), outputs);
                with_count(run.count, [&](auto subs) {
                    constexpr int N = decltype(subs)::value;
                    terms.weights.resize(taps * N);
                    T* to = terms.weights.data();
                    for (const Step& step : steps[r])
                        for (int s = 0; s < N; ++s) *to++ = weights.data[step.weight + s * weights.plane + i * pitch + j];
                    sum_all_channels<N, S, T>(terms, channels, outputs);
                });
            }
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
    std::vector<Step> steps;
    Terms<S, T> terms;
    for (Index phase = 0; phase < problem.phases(); ++phase) {
        steps.clear();
        for (const auto& [place, planes] : shared[phase]) steps.push_back(make_step(output, place.first, place.second, 0));
        terms.pixels.resize(steps.size());
        terms.weights.resize(steps.size() * NEIGHBOURS);
        for (Index i = 0; i < tile.rows; ++i)
            for (Index j = 0; j < tile.columns; j += NEIGHBOURS) {
                const Index row = tile.row + i, column = tile.column + j;
                const bool inside = output.inside(row, column, halo) && output.inside(row, column + NEIGHBOURS - 1, halo);
                find_pixels(steps, output, row, column, inside, zeros.data(), terms.pixels.data());
                T* to = terms.weights.data();
                for (const auto& [place, planes] : shared[phase])
                    for (Index plane : planes) *to++ = plane == ABSENT ? T(0) : weights.data[plane + i * pitch + j];
                S* pixels[NEIGHBOURS];
                for (int k = 0; k < NEIGHBOURS; ++k) {
                    pixels[k] = source.pixel(row * problem.down + phase / problem.down, (column + k) * problem.down + phase % problem.down);
                    if (!pixels[k] || j + k >= tile.columns) pixels[k] = unused.data();
                }
                sum_all_channels<NEIGHBOURS, S, T>(terms, channels, pixels);
            }
    }
    // pixels that are also read at places outside the map: all of their terms again, so that the result is rounded once
    visit_padding_pixels(task, [&](Index row, Index column, const std::vector<Index>& rows, const std::vector<Index>& columns) {
        terms.pixels.clear(), terms.weights.clear();
        for (Index place_row : rows)
            for (Index place_column : columns)
                visit_reads(task, place_row, place_column, [&](const TapSource& from, Index i, Index j) {
                    const S* pixel = output.pixel(i * problem.up + from.sub_row, j * problem.up + from.sub_column);
                    if (!pixel) return;
                    terms.pixels.push_back(pixel);
                    terms.weights.push_back(weights.at(from.tap, from.sub)[(i - tile.row) * pitch + j - tile.column]);
                });
        S* pixel = source.pixel(row, column);
        sum_all_channels<1, S, T>(terms, channels, &pixel);
    });
}

template <class S, class T> void channels_last_dweights(const Task& task, const Scratch<T>& scratch) {
    const Tile& tile = task.tile;
    const Planes<T>& dweights = scratch.dweights;
    const Index taps = task.problem.taps(), channels = task.problem.group_channels(), halo = task.grid.halo, pitch = task.grid.pitch;
    const PixelMap<const S> source = source_pixels<const S>(task, task.call.x, padding(task.problem));
    const PixelMap<const S> output = output_pixels<const S>(task, task.call.dy);
    const std::vector<std::vector<Step>> steps = source_steps(task, source, scratch.weights);
    const std::vector<S> zeros(channels);
    std::vector<const S*> pixels(taps);
    std::vector<Vector<T>> sums(taps * SUBS + LANES<T>);
    for (Index i = 0; i < tile.rows; ++i)
        for (Index j = 0; j < tile.columns; ++j)
            for (std::size_t r = 0; r < steps.size(); ++r) {
                const Index row = tile.row + i, column = tile.column + j;
                const SubRun& run = task.windows.runs[r];
                find_pixels(steps[r], source, row, column, source.inside(row, column, halo), zeros.data(), pixels.data());
                const S* outputs[SUBS];
                find_outputs(output, row, column, run, zeros.data(), outputs);
                with_count(run.count, [&](auto subs) {
                    constexpr int N = decltype(subs)::value;
                    Index tap = 0;
                    for (; tap + GRADIENT_TAPS <= taps; tap += GRADIENT_TAPS)
                        multiply_channels<N, GRADIENT_TAPS, S, T>(outputs, &pixels[tap], channels, &sums[tap * N]);
                    for (; tap < taps; ++tap) multiply_channels<N, 1, S, T>(outputs, &pixels[tap], channels, &sums[tap * N]);
                    for (Index first = 0; first < taps * N; first += LANES<T>) {
                        T lanes[LANES<T>];
                        store(lanes, lane_sums<T>(&sums[first]));
                        for (Index k = first; k < std::min<Index>(first + LANES<T>, taps * N); ++k)
                            dweights.at(k / N, run.first + k % N)[i * pitch + j] = lanes[k - first];
                    }
                });
            }
}

}  // namespace carafepp
