// Maps to planes and back, a row at a time, with the part of the map that comes later on its way from memory.
#pragma once

#include "tiles.h"

namespace carafepp {

// Cell j of phase u is value j * U + u of a row. Lane `lane` of phase u takes it from the first `step + 1` of the vectors that hold the row.
template <int U, int LANES> struct Split {
    static constexpr int pick(int u, int step, int lane) {
        const int value = lane * U + u;
        return step == 1 ? value < 2 * LANES ? value : 0 : value / LANES == step ? LANES + value % LANES : lane;
    }
};
// The reverse: vector w of the row takes its lanes from the first `step + 1` of the phases.
template <int U, int LANES> struct Merge {
    static constexpr int pick(int w, int step, int lane) {
        const int cell = (w * LANES + lane) / U, u = (w * LANES + lane) % U;
        return u == step ? LANES + cell : step > 1 ? lane : u == 0 ? cell : 0;
    }
};
template <class T, class Order, int W, int STEP, std::size_t... I>
inline Vector<T> pick(Vector<T> a, Vector<T> b, std::index_sequence<I...>) {
    return shuffle<T, Order::pick(W, STEP, int(I))...>(a, b);
}
template <class T, class Order, int U, int W, int STEP = 1> inline Vector<T> gather(const Vector<T>* v, Vector<T> first) {
    if constexpr (STEP >= U) return first;
    else return gather<T, Order, U, W, STEP + 1>(v, pick<T, Order, W, STEP>(first, v[STEP], std::make_index_sequence<LANES<T>>{}));
}

// `count` cells of U adjacent values each to U planes.
template <int U, class S, class T, std::size_t... I>
inline void split_row(const S* from, T* to, Index plane, Index count, std::index_sequence<I...>) {
    for (; count >= LANES<T>; count -= LANES<T>, from += U * LANES<T>, to += LANES<T>) {
        const Vector<T> v[U] = {load(from + I * LANES<T>)...};
        (store(to + I * plane, gather<T, Split<U, LANES<T>>, U, int(I)>(v, v[0])), ...);
    }
    if (count <= 0) return;
    const Vector<T> v[U] = {load_part<T>(from + I * LANES<T>, count * U - Index(I) * LANES<T>)...};
    (store_part<T>(to + I * plane, gather<T, Split<U, LANES<T>>, U, int(I)>(v, v[0]), count), ...);
}
template <int U, class S, class T, std::size_t... I>
inline void merge_row(const T* from, Index plane, S* to, Index count, std::index_sequence<I...>) {
    for (; count >= LANES<T>; count -= LANES<T>, from += LANES<T>, to += U * LANES<T>) {
        const Vector<T> v[U] = {load(from + I * plane)...};
        (store(to + I * LANES<T>, gather<T, Merge<U, LANES<T>>, U, int(I)>(v, v[0])), ...);
    }
    if (count <= 0) return;
    const Vector<T> v[U] = {load(from + I * plane)...};
    (store_part<T>(to + I * LANES<T>, gather<T, Merge<U, LANES<T>>, U, int(I)>(v, v[0]), count * U - Index(I) * LANES<T>), ...);
}

template <int U, class S, class T> inline void split_row(const S* from, Index stride, T* to, Index plane, Index phases, Index count) {
    if constexpr (U) return split_row<U>(from, to, plane, count, std::make_index_sequence<U>{});
    for (Index u = 0; u < phases; ++u)
        for (Index j = 0; j < count; ++j) to[u * plane + j] = widen(from[(j * phases + u) * stride]);
}
template <int U, class S, class T> inline void merge_row(const T* from, Index plane, S* to, Index stride, Index phases, Index count) {
    if constexpr (U) return merge_row<U>(from, plane, to, count, std::make_index_sequence<U>{});
    for (Index j = 0; j < count; ++j)
        for (Index u = 0; u < phases; ++u) to[(j * phases + u) * stride] = narrow<S>(from[u * plane + j]);
}

// Calls f(std::integral_constant<int, U>): the phases of a row of adjacent values if they are few, else 0.
template <class F> inline void with_phases(Index phases, Index stride, F&& f) {
    if (stride != 1 || phases > 4) f(std::integral_constant<int, 0>{});
    else if (phases == 1) f(std::integral_constant<int, 1>{});
    else if (phases == 2) f(std::integral_constant<int, 2>{});
    else if (phases == 3) f(std::integral_constant<int, 3>{});
    else f(std::integral_constant<int, 4>{});
}

// A map [height, width] of one channel, whose row q * phases + u belongs to cell q and phase u. Maps of many channels are visited in
// turn, far apart, too far for the processor to foresee: while one is read or written, the same part of `next` is fetched.
template <class S> struct Plane {
    S *data, *next;
    Index stride_y, stride_x, height, width, phases;
};
template <int WRITE, class S> inline void fetch(const S* p, Index count) {
    constexpr Index line = 64 / sizeof(S);
    for (Index i = 0; i < count + line - 1; i += line) __builtin_prefetch(p + i, WRITE);
}

// Planes [phases * phases], `stride` apart, of the cells of a tile and around it; `fill` where the map does not reach.
template <class S, class T>
void read_planes(const Plane<const S>& map, const Grid& g, const Tile& t, Reach reach, T fill, T* planes, Index stride) {
    with_phases(map.phases, map.stride_x, [&](auto adjacent) {
        constexpr int U = decltype(adjacent)::value;
        const Index phases = U ? U : map.phases, begin = std::max(-reach.side, -t.x), end = t.columns + reach.side;
        for (Index i = -reach.above; i < t.rows + reach.below; ++i)
            for (Index v = 0; v < phases; ++v) {
                T* row = planes + v * phases * stride + i * g.pitch;
                const Index y = (t.y + i) * phases + v;
                const bool inside = 0 <= y && y < map.height;
                // cells all of whose phases are inside
                const Index whole = inside ? std::max(begin, std::min(end, map.width / phases - t.x)) : begin;
                const Index from = inside ? y * map.stride_y + (t.x + begin) * phases * map.stride_x : 0;
                if (U) fetch<0>(map.next + from, (whole - begin) * phases);
                for (Index u = 0; u < phases; ++u)
                    for (Index j = -reach.side; j < begin; ++j) row[u * stride + j] = fill;
                split_row<U>(map.data + from, map.stride_x, row + begin, stride, phases, whole - begin);
                for (Index u = 0; u < phases; ++u)
                    for (Index j = whole; j < end; ++j) {
                        const Index x = (t.x + j) * phases + u;
                        row[u * stride + j] = inside && x < map.width ? widen(map.data[y * map.stride_y + x * map.stride_x]) : fill;
                    }
            }
    });
}

// The reverse for the tile's own cells.
template <class S, class T> void write_planes(const T* planes, Index stride, const Grid& g, const Tile& t, const Plane<S>& map) {
    with_phases(map.phases, map.stride_x, [&](auto adjacent) {
        constexpr int U = decltype(adjacent)::value;
        const Index phases = U ? U : map.phases;
        for (Index i = 0; i < t.rows; ++i)
            for (Index v = 0; v < phases; ++v) {
                const T* row = planes + v * phases * stride + i * g.pitch;
                const Index y = (t.y + i) * phases + v;
                if (y >= map.height) continue;
                const Index whole = std::min(t.columns, map.width / phases - t.x), to = y * map.stride_y + t.x * phases * map.stride_x;
                if (U) fetch<1>(map.next + to, whole * phases);
                merge_row<U>(row, stride, map.data + to, map.stride_x, phases, whole);
                for (Index j = whole; j < t.columns; ++j)
                    for (Index u = 0; u < phases && (t.x + j) * phases + u < map.width; ++u)
                        map.data[to + (j * phases + u) * map.stride_x] = narrow<S>(row[u * stride + j]);
            }
    });
}

// Channels from a map to the one that is fetched meanwhile.
constexpr Index CHANNELS_AHEAD = 2, LOGITS_AHEAD = 8;

template <class S> Plane<S> source_plane(const Problem& p, const Tensor& x, Index n, Index channel) {
    S* data = at<S>(x, n, channel);
    return {data, data + CHANNELS_AHEAD * x.stride[1], x.stride[2], x.stride[3], p.height, p.width, p.down};
}
template <class S> Plane<S> output_plane(const Problem& p, const Tensor& y, Index n, Index channel) {
    S* data = at<S>(y, n, channel);
    return {data, data + CHANNELS_AHEAD * y.stride[1], y.stride[2], y.stride[3], p.output_y(), p.output_x(), p.up};
}
// One tap and sub-pixel (y, x) of the logits, or one sub-pixel of the log-sum-exp.
template <class S> Plane<S> logits_plane(const Problem& p, const Tensor& logits, Index n, Index tap, Index y, Index x) {
    S* data = at<S>(logits, n, tap, y, x);
    return {data, data + LOGITS_AHEAD * logits.stride[p.up > 1 ? 3 : 1], logits.stride[4], logits.stride[5], p.cells_y(), p.cells_x(), 1};
}
// f(number, tap, y, x) for every plane of a group's logits, or of its log-sum-exp (one tap).
template <class F> void each_plane(const Problem& p, Index taps, F&& f) {
    Index number = 0;
    for (Index tap = 0; tap < taps; ++tap)
        for (Index y = 0; y < p.up; ++y)
            for (Index x = 0; x < p.up; ++x) f(number++, tap, y, x);
}

}  // namespace carafepp
