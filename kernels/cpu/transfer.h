// Copies between maps in memory and planes of a tile, one row at a time, with a prefetch of the map that comes later.
#pragma once

#include <algorithm>
#include <cstddef>
#include <type_traits>
#include <utility>

#include "call.h"
#include "index.h"
#include "storage.h"
#include "tiling.h"
#include "vectors.h"

namespace carafepp {

// Cell j of phase u is value j * U + u of a row. Lane `lane` of phase u takes it from the first `step + 1` of the vectors that hold the row.
template <int U, int LANES> struct Split {
    static constexpr int lane_from(int u, int step, int lane) {
        const int value = lane * U + u;
        return step == 1 ? value < 2 * LANES ? value : 0 : value / LANES == step ? LANES + value % LANES : lane;
    }
};
// The reverse: vector w of the row takes its lanes from the first `step + 1` of the phases.
template <int U, int LANES> struct Merge {
    static constexpr int lane_from(int w, int step, int lane) {
        const int cell = (w * LANES + lane) / U, u = (w * LANES + lane) % U;
        return u == step ? LANES + cell : step > 1 ? lane : u == 0 ? cell : 0;
    }
};
template <class T, class Order, int W, int STEP, std::size_t... I>
inline Vector<T> gather_step(Vector<T> a, Vector<T> b, std::index_sequence<I...>) {
    return shuffle<T, Order::lane_from(W, STEP, int(I))...>(a, b);
}
// Vector W of the result, from the U vectors v.
template <class T, class Order, int U, int W, int STEP = 1> inline Vector<T> gather(const Vector<T>* v, Vector<T> first) {
    if constexpr (STEP >= U) return first;
    else return gather<T, Order, U, W, STEP + 1>(v, gather_step<T, Order, W, STEP>(first, v[STEP], std::make_index_sequence<LANES<T>>{}));
}

// Copies `count` cells of U adjacent values each to U planes, and back.
template <int U, class S, class T, std::size_t... I>
inline void split_adjacent(const S* from, T* to, Index plane, Index count, std::index_sequence<I...>) {
    for (; count >= LANES<T>; count -= LANES<T>, from += U * LANES<T>, to += LANES<T>) {
        const Vector<T> v[U] = {load(from + I * LANES<T>)...};
        (store(to + I * plane, gather<T, Split<U, LANES<T>>, U, int(I)>(v, v[0])), ...);
    }
    if (count <= 0) return;
    const Vector<T> v[U] = {load_part<T>(from + I * LANES<T>, count * U - Index(I) * LANES<T>)...};
    (store_part<T>(to + I * plane, gather<T, Split<U, LANES<T>>, U, int(I)>(v, v[0]), count), ...);
}
template <int U, class S, class T, std::size_t... I>
inline void merge_adjacent(const T* from, Index plane, S* to, Index count, std::index_sequence<I...>) {
    for (; count >= LANES<T>; count -= LANES<T>, from += LANES<T>, to += U * LANES<T>) {
        const Vector<T> v[U] = {load(from + I * plane)...};
        (store(to + I * LANES<T>, gather<T, Merge<U, LANES<T>>, U, int(I)>(v, v[0])), ...);
    }
    if (count <= 0) return;
    const Vector<T> v[U] = {load(from + I * plane)...};
    (store_part<T>(to + I * LANES<T>, gather<T, Merge<U, LANES<T>>, U, int(I)>(v, v[0]), count * U - Index(I) * LANES<T>), ...);
}

// The same for values `stride` apart; U = 0 means any number of phases and any stride.
template <int U, class S, class T> inline void split_row(const S* from, Index stride, T* to, Index plane, Index phases, Index count) {
    if constexpr (U) return split_adjacent<U>(from, to, plane, count, std::make_index_sequence<U>{});
    for (Index u = 0; u < phases; ++u)
        for (Index j = 0; j < count; ++j) to[u * plane + j] = widen(from[(j * phases + u) * stride]);
}
template <int U, class S, class T> inline void merge_row(const T* from, Index plane, S* to, Index stride, Index phases, Index count) {
    if constexpr (U) return merge_adjacent<U>(from, plane, to, count, std::make_index_sequence<U>{});
    for (Index j = 0; j < count; ++j)
        for (Index u = 0; u < phases; ++u) to[(j * phases + u) * stride] = narrow<S>(from[u * plane + j]);
}

// to[column][row] = from[row][column] for a block of LANES / U rows and columns, or of fewer unless it is WHOLE; an element has U adjacent
// values. Prefetches rows below.
template <bool WHOLE, class T, int U, class From, class To>
inline void transpose_block(const From* from, Index from_stride, Index rows, Index columns, To* to, Index to_stride) {
    constexpr int side = LANES<T> / U;
    Vector<T> v[side];
#pragma GCC unroll 16
    for (int i = 0; i < side; ++i) {
        __builtin_prefetch(from + LANES<T> * from_stride);
        v[i] = WHOLE ? load(from) : load_part<T>(from, columns * U);
        // rows that do not exist repeat the last one
        if (WHOLE || i + 1 < rows) from += from_stride;
    }
    transpose<T, U>(v);
#pragma GCC unroll 16
    for (int i = 0; i < side; ++i, to += to_stride)
        if (WHOLE) store(to, v[i]);
        else if (i < columns) store_part<T>(to, v[i], rows * U);
}
// The same for a matrix of any size; the last blocks may repeat a part of those before them.
template <class T, int U = 1, class From, class To>
NOINLINE void transpose_matrix(const From* from, Index from_stride, Index rows, Index columns, To* to, Index to_stride) {
    constexpr Index side = LANES<T> / U;
    const Index high = std::min(rows, side), wide = std::min(columns, side);
    for (Index row = 0; row < rows; row += side)
        for (Index column = 0; column < columns; column += side) {
            const Index i = std::min(row, rows - high), j = std::min(column, columns - wide);
            const From* block = from + i * from_stride + j * U;
            To* target = to + j * to_stride + i * U;
            if (high == side && wide == side) transpose_block<true, T, U>(block, from_stride, high, wide, target, to_stride);
            else transpose_block<false, T, U>(block, from_stride, high, wide, target, to_stride);
        }
}

// Calls f(std::integral_constant<int, U>) with U = phases where values are adjacent and phases are few, else with 0.
template <class F> inline void with_phases(Index phases, Index stride, F&& f) {
    if (stride != 1 || phases > 4) f(std::integral_constant<int, 0>{});
    else if (phases == 1) f(std::integral_constant<int, 1>{});
    else if (phases == 2) f(std::integral_constant<int, 2>{});
    else if (phases == 3) f(std::integral_constant<int, 3>{});
    else f(std::integral_constant<int, 4>{});
}

// A map [height, width] of one channel, whose row q * phases + u belongs to cell q and phase u. The maps of the channels lie too far apart
// for the hardware prefetcher. While one is read or written, the same part of `next` is therefore prefetched.
template <class S> struct MapView {
    S *data, *next;
    Index row_stride, column_stride, height, width, phases;
};
template <int WRITE, class S> inline void fetch(const S* from, Index count) {
    constexpr Index line = 64 / sizeof(S);
    for (Index i = 0; i < count + line - 1; i += line) __builtin_prefetch(from + i, WRITE);
}

// Reads the cells of the task's tile and around it into planes [phases * phases], the first at `planes` and the others `plane` values
// apart; `fill` is the value outside the map.
template <int U, class S, class T>
NOINLINE void read_rows(const Task& task, const MapView<const S>& map, const Reach& reach, T fill, T* planes, Index plane) {
    const Tile& tile = task.tile;
    const Index phases = U ? U : map.phases, begin = std::max(-reach.side, -tile.column), end = tile.columns + reach.side;
    for (Index i = -reach.above; i < tile.rows + reach.below; ++i)
        for (Index v = 0; v < phases; ++v) {
            T* to = planes + v * phases * plane + i * task.grid.pitch;
            const Index row = (tile.row + i) * phases + v;
            const bool inside = 0 <= row && row < map.height;
            // end of the cells whose phases are all inside
            const Index whole = inside ? std::max(begin, std::min(end, map.width / phases - tile.column)) : begin;
            const Index from = inside ? row * map.row_stride + (tile.column + begin) * phases * map.column_stride : 0;
            if (U) fetch<0>(map.next + from, (whole - begin) * phases);
            for (Index u = 0; u < phases; ++u)
                for (Index j = -reach.side; j < begin; ++j) to[u * plane + j] = fill;
            split_row<U>(map.data + from, map.column_stride, to + begin, plane, phases, whole - begin);
            for (Index u = 0; u < phases; ++u)
                for (Index j = whole; j < end; ++j) {
                    const Index column = (tile.column + j) * phases + u;
                    to[u * plane + j] =
                        inside && column < map.width ? widen(map.data[row * map.row_stride + column * map.column_stride]) : fill;
                }
        }
}
template <class S, class T>
void read_map(const Task& task, const MapView<const S>& map, const Reach& reach, T fill, T* planes, Index plane) {
    with_phases(map.phases, map.column_stride, [&](auto adjacent) {
        read_rows<decltype(adjacent)::value>(task, map, reach, fill, planes, plane);
    });
}

// The reverse for the tile's own cells.
template <int U, class S, class T> NOINLINE void write_rows(const Task& task, const T* planes, Index plane, const MapView<S>& map) {
    const Tile& tile = task.tile;
    const Index phases = U ? U : map.phases;
    for (Index i = 0; i < tile.rows; ++i)
        for (Index v = 0; v < phases; ++v) {
            const T* from = planes + v * phases * plane + i * task.grid.pitch;
            const Index row = (tile.row + i) * phases + v;
            if (row >= map.height) continue;
            const Index whole = std::min(tile.columns, map.width / phases - tile.column);
            const Index to = row * map.row_stride + tile.column * phases * map.column_stride;
            if (U) fetch<1>(map.next + to, whole * phases);
            merge_row<U>(from, plane, map.data + to, map.column_stride, phases, whole);
            for (Index j = whole; j < tile.columns; ++j)
                for (Index u = 0; u < phases && (tile.column + j) * phases + u < map.width; ++u)
                    map.data[to + (j * phases + u) * map.column_stride] = narrow<S>(from[u * plane + j]);
        }
}
template <class S, class T> void write_map(const Task& task, const T* planes, Index plane, const MapView<S>& map) {
    with_phases(map.phases, map.column_stride, [&](auto adjacent) {
        write_rows<decltype(adjacent)::value>(task, planes, plane, map);
    });
}

// Distance, in channels, from a map to the map that is prefetched at the same time.
constexpr Index CHANNELS_AHEAD = 2, LOGITS_AHEAD = 8;

// x or dx, and y or dy: a channel of the task's group.
template <class S> MapView<S> view_source(const Task& task, const Tensor& x, Index channel) {
    const Problem& problem = task.problem;
    S* data = x.at<S>(task.image, task.first_channel() + channel);
    return {data, data + CHANNELS_AHEAD * x.strides[1], x.strides[2], x.strides[3], problem.height, problem.width, problem.down};
}
template <class S> MapView<S> view_output(const Task& task, const Tensor& y, Index channel) {
    const Problem& problem = task.problem;
    S* data = y.at<S>(task.image, task.first_channel() + channel);
    return {data, data + CHANNELS_AHEAD * y.strides[1], y.strides[2], y.strides[3], problem.output_rows, problem.output_columns, problem.up};
}
// Logits or their gradients, or lse (`taps` is 1): one tap and sub-pixel of the task's group.
template <class S> MapView<S> view_logits(const Task& task, const Tensor& logits, Index taps, Index tap, Index sub) {
    const Problem& problem = task.problem;
    S* data = logits.at<S>(task.image, task.group * taps + tap, sub / problem.up, sub % problem.up);
    S* next = data + LOGITS_AHEAD * logits.strides[problem.up > 1 ? 3 : 1];
    return {data, next, logits.strides[4], logits.strides[5], problem.cell_rows(), problem.cell_columns(), 1};
}

}  // namespace carafepp
