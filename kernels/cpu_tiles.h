// Shared by both CPU kernels: vectors, storage types, and tiles of cells held as planes.
//
// Over cells, reassembly is a sum of products of shifted planes. Let a plane hold one value per cell of a tile, rows laid end to end:
// the weights of one (tap, sub-pixel), the source pixels of one phase (row % down, column % down), the outputs of one sub-pixel. The
// source pixel that a tap of a sub-pixel reads then lies in one phase plane at one constant distance ("shift"), for every cell alike:
//     output[sub][f]       = sum over taps      weight[tap][sub][f] * source[phase][f + shift]
//     dweight[tap][sub][f] = sum over channels  doutput[sub][f] * source[phase][f + shift]
//     dsource[phase][f]    = sum over (tap, sub) weight[tap][sub][f - shift] * doutput[sub][f - shift]
// Up, down and rational scales, any kernel size and any layout differ only in the table of shifts and in how planes are read and written.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

namespace carafepp {

using Index = std::ptrdiff_t;

// Bytes of a vector register, and the sub-pixels that share the loads of one source vector: 32 registers take more than 16.
#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, SUBS = 4;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32, SUBS = 2;
#else
constexpr int VECTOR_BYTES = 16, SUBS = 4;
#endif

template <class T> struct Simd {
    static constexpr int lanes = VECTOR_BYTES / sizeof(T);
    using Int = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;
    typedef T Vector __attribute__((vector_size(VECTOR_BYTES)));
    typedef Int Mask __attribute__((vector_size(VECTOR_BYTES)));
};
template <class T> using Vector = typename Simd<T>::Vector;
template <class T> constexpr int LANES = Simd<T>::lanes;

template <class To, class From> inline To bits(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}

template <class T> inline Vector<T> load(const T* p) {
    Vector<T> v;
    std::memcpy(&v, p, sizeof(v));
    return v;
}
// The same, kept in a register: compilers tend to fold a load into each of its uses, which then all wait for the cache.
template <class T> inline Vector<T> load_once(const T* p) {
    Vector<T> v = load(p);
#if defined(__x86_64__)
    asm("" : "+v"(v));
#endif
    return v;
}
template <class T> inline void store(T* p, Vector<T> v) { std::memcpy(p, &v, sizeof(v)); }
template <class T> inline Vector<T> splat(T value) { return Vector<T>{} + value; }

// Half precision is stored in 16 bits and computed in float. The conversions serve scalars and vectors of lanes alike.
struct BFloat16 { std::uint16_t bits; };
struct Float16 { std::uint16_t bits; };

template <class F, class U> inline F widen_bfloat16(U h) { return bits<F>(h << 16); }
template <class F, class U> inline U narrow_bfloat16(F value) {
    U u = bits<U>(value);
    return value != value ? (u | 0x00400000u) >> 16 : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
}
template <class F, class U> inline F widen_float16(U h) {
    F magnitude = bits<F>((h & 0x7fffu) << 13) * 0x1p112f;
    U u = bits<U>(magnitude);
    return bits<F>((magnitude >= 65536.0f ? u | 0x7f800000u : u) | (h & 0x8000u) << 16);
}
template <class F, class U> inline U narrow_float16(F value) {
    U u = bits<U>(value), sign = u & 0x80000000u;
    u ^= sign;
    F magnitude = bits<F>(u);
    U large = u > 0x7f800000u ? u * 0u + 0x7e00u : u * 0u + 0x7c00u;
    // adding 0.5 leaves the subnormal half, rounded to even, in the low bits
    U small = bits<U>(magnitude + 0.5f) - 0x3f000000u;
    U normal = (u - 0x37fff001u + ((u >> 13) & 1u)) >> 13;
    return (u >= 0x47800000u ? large : u < 0x38800000u ? small : normal) | sign >> 16;
}

template <class T> inline T widen(T v) { return v; }
inline float widen(BFloat16 v) { return widen_bfloat16<float>(std::uint32_t(v.bits)); }
inline float widen(Float16 v) { return widen_float16<float>(std::uint32_t(v.bits)); }
template <class S, class T> inline S narrow(T v) {
    if constexpr (std::is_same_v<S, BFloat16>) return S{std::uint16_t(narrow_bfloat16<float, std::uint32_t>(v))};
    else if constexpr (std::is_same_v<S, Float16>) return S{std::uint16_t(narrow_float16<float, std::uint32_t>(v))};
    else return v;
}
template <class S> using Compute = decltype(widen(S{}));

typedef std::uint16_t Halves __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef std::uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));
inline Words load_halves(const void* p) {
    Halves h;
    std::memcpy(&h, p, sizeof(h));
    return __builtin_convertvector(h, Words);
}
inline void store_halves(void* p, Words w) {
    Halves h = __builtin_convertvector(w, Halves);
    std::memcpy(p, &h, sizeof(h));
}
inline Vector<float> load(const BFloat16* p) { return widen_bfloat16<Vector<float>>(load_halves(p)); }
inline Vector<float> load(const Float16* p) { return widen_float16<Vector<float>>(load_halves(p)); }
inline void store(BFloat16* p, Vector<float> v) { store_halves(p, narrow_bfloat16<Vector<float>, Words>(v)); }
inline void store(Float16* p, Vector<float> v) { store_halves(p, narrow_float16<Vector<float>, Words>(v)); }

// exp with about one unit in the last place: 2**n * exp(r), |r| <= ln(2) / 2, by Taylor's series; 0 below the normal numbers.
template <class T> inline Vector<T> exponential(Vector<T> x) {
    using Mask = typename Simd<T>::Mask;
    constexpr bool single = sizeof(T) == 4;
    constexpr int terms = single ? 7 : 13, mantissa = std::numeric_limits<T>::digits - 1;
    constexpr T low = single ? T(-87) : T(-708), high = single ? T(88) : T(709);
    // ln(2) in two parts, of which n times the first is exact
    constexpr T ln2 = single ? T(0x1.62e4p-1) : T(0x1.62e42feep-1);
    constexpr T rest = single ? T(0x1.7f7d1cf79abcap-20) : T(0x1.a39ef35793c76p-33);
    constexpr T rounder = T(3) * (typename Simd<T>::Int(1) << (mantissa - 1));
    Vector<T> clamped = x < low ? splat(low) : x > high ? splat(high) : x;
    Vector<T> shifted = clamped * T(1.4426950408889634) + rounder;
    Vector<T> n = shifted - rounder;
    Vector<T> r = clamped - n * ln2 - n * rest;
    Vector<T> sum = splat(T(1));
#pragma GCC unroll 16
    for (int i = terms; i > 0; --i) sum = sum * (r * (T(1) / i)) + T(1);
    Mask exponent = bits<Mask>(shifted) << mantissa;
    Vector<T> result = bits<Vector<T>>(bits<Mask>(sum) + exponent);
    result = x < low ? Vector<T>{} : result;
    return x > high ? splat(std::numeric_limits<T>::infinity()) : result;
}
template <class T> inline Vector<T> minimum(Vector<T> a, T b) { return a > b ? splat(b) : a; }
template <class T> inline Vector<T> sigmoid(Vector<T> x) {
    Vector<T> e = exponential<T>(x > T(0) ? -x : x);
    return (x >= T(0) ? splat(T(1)) : e) / (e + T(1));
}

enum Normalizer { SOFTMAX, SIGMOID, SIGMOID_NORMALIZED, NONE };

struct Problem {
    std::int64_t dtype, normalizer, batch, channels, height, width, kernel, up, down, groups, threads;

    Index taps() const { return kernel * kernel; }
    Index subs() const { return up * up; }
    Index phases() const { return down * down; }
    Index cells_y() const { return (height + down - 1) / down; }
    Index cells_x() const { return (width + down - 1) / down; }
    Index output_y() const { return (height * up + down - 1) / down; }
    Index output_x() const { return (width * up + down - 1) / down; }
    Index group_channels() const { return channels / groups; }
};

struct Tensor {
    void* data;
    std::int64_t stride[6];  // in elements
};
template <class S> S* at(const Tensor& t, Index a, Index b, Index c = 0, Index d = 0) {
    return static_cast<S*>(t.data) + a * t.stride[0] + b * t.stride[1] + c * t.stride[2] + d * t.stride[3];
}

inline Index floor_div(Index a, Index b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }
inline Index ceil_div(Index a, Index b) { return (a + b - 1) / b; }

// One step of the sums above: what tap `tap` of sub-pixel `sub` reads.
struct Entry {
    Index tap, sub, sub_y, sub_x, phase, move_y, move_x;  // cells from the output's own to the one that holds the source pixel
};
// Cells whose sums take as long as what a row costs, however short.
constexpr Index ROW_COST = 24;

// Consecutive sub-pixels that share their window, at most SUBS.
struct Run {
    Index sub, count;
};

// The tiling of one call, the same for all threads. Results do not depend on it: every sum has one order, whatever the tile.
struct Grid {
    Index rows, columns;  // cells of a tile
    Index halo;           // cells around it that its planes hold as well
    Index pitch;
    Index plane, origin;                // values of a plane with the halo, and where its own first cell is
    Index inner;                        // values of a plane without
    Index weight_plane, weight_origin;  // the weights' planes have a halo where dsource is asked for
    Index tiles_y, tiles_x;
    std::vector<Entry> entries;  // [sub][tap]
    std::vector<Run> runs;

    template <class T> static Grid make(const Problem& p, bool weight_halo, Index budget) {
        Grid g;
        const Index radius = p.kernel / 2, lanes = LANES<T>;
        g.halo = 0;
        for (Index sub = 0; sub < p.subs(); ++sub) {
            const Index y = sub / p.up, x = sub % p.up, offset_y = y * p.down / p.up - radius, offset_x = x * p.down / p.up - radius;
            for (Index tap = 0; tap < p.taps(); ++tap) {
                const Index a = offset_y + tap / p.kernel, b = offset_x + tap % p.kernel;
                const Index my = floor_div(a, p.down), mx = floor_div(b, p.down);
                g.entries.push_back({tap, sub, y, x, (a - my * p.down) * p.down + b - mx * p.down, my, mx});
                g.halo = std::max({g.halo, std::abs(my), std::abs(mx)});
            }
            const bool joins = sub && g.runs.back().count < SUBS && g.shares_window(p, sub - 1, sub);
            if (joins) ++g.runs.back().count;
            else g.runs.push_back({sub, 1});
        }
        const Index per_cell = p.taps() * p.subs() * Index(sizeof(T)), margin = weight_halo ? 2 * g.halo : 0;
        double least = std::numeric_limits<double>::infinity();
        const Index most = ceil_div(p.cells_x(), lanes);
        for (Index cuts = 1; cuts <= most; ++cuts) {
            const Index columns = ceil_div(p.cells_x(), cuts), tiles_x = ceil_div(p.cells_x(), columns);
            // between whole rows one margin of zeros serves the row before and the row after it
            const Index pitch = columns + (tiles_x == 1 ? 1 : 2) * g.halo;
            const Index wanted = ceil_div(4 * p.threads, p.batch * p.groups * tiles_x);
            const Index rows = std::min(budget / (per_cell * pitch) - margin, std::max<Index>(1, p.cells_y() / wanted));
            // per cell: lanes that are margin, reading a row as long as so many cells take, and weights that are restored for a
            // neighbouring tile, a third of all work where there are none
            const double cost = double(pitch + ROW_COST) / columns * (2 + double(rows + margin) / rows);
            // if even the narrowest tile has more weights, so be it
            const bool only = std::isinf(least) && cuts == most;
            if ((rows < 1 || cost >= least) && !only) continue;
            least = cost;
            g.columns = columns, g.pitch = pitch, g.tiles_x = tiles_x, g.rows = std::max<Index>(1, rows);
        }
        g.tiles_y = ceil_div(p.cells_y(), g.rows);
        g.rows = ceil_div(p.cells_y(), g.tiles_y);
        g.origin = ceil_div(g.halo * g.pitch + g.halo, lanes) * lanes;
        // an odd number of vectors, so that the same cell of many planes does not fall into one cache set
        g.plane = ((ceil_div(g.origin + (g.rows + g.halo) * g.pitch + g.halo, lanes) + 1) | 1) * lanes;
        g.inner = (ceil_div(g.rows * g.pitch, lanes) | 1) * lanes;
        g.weight_plane = weight_halo ? g.plane : g.inner;
        g.weight_origin = weight_halo ? g.origin : 0;
        return g;
    }
    bool shares_window(const Problem& p, Index a, Index b) const {
        const Entry &first = entries[a * p.taps()], &second = entries[b * p.taps()];
        return first.phase == second.phase && first.move_y == second.move_y && first.move_x == second.move_x;
    }
    Index shift(const Entry& e) const { return e.move_y * pitch + e.move_x; }
    Index tiles() const { return tiles_y * tiles_x; }
};

struct Tile {
    Index y, x, rows, columns;  // first cell and extent

    Tile(const Problem& p, const Grid& g, Index number)
        : y(number / g.tiles_x * g.rows), x(number % g.tiles_x * g.columns),
          rows(std::min(g.rows, p.cells_y() - y)), columns(std::min(g.columns, p.cells_x() - x)) {}
    // end of the tile's own cells when its rows are laid end to end
    Index end(const Grid& g) const { return (rows - 1) * g.pitch + columns; }
};

template <int U, class S, class T> void split_row(const S* from, Index stride, T* to, Index plane, Index phases, Index count) {
    const Index u_count = U ? U : phases;
    for (Index u = 0; u < u_count; ++u)
        for (Index j = 0; j < count; ++j) to[u * plane + j] = widen(from[(j * u_count + u) * stride]);
}

// Planes [phases * phases], `stride` apart, of the cells of a tile and `halo` around it, from a map [height, width] whose row q * phases + u belongs to
// cell q and phase u; `fill` where the map does not reach.
template <class S, class T>
void read_planes(const S* map, Index stride_y, Index stride_x, Index height, Index width, Index phases, const Grid& g, const Tile& t,
                 Index halo, T fill, T* planes, Index stride) {
    for (Index i = -halo; i < t.rows + halo; ++i)
        for (Index v = 0; v < phases; ++v) {
            T* row = planes + v * phases * stride + i * g.pitch;
            const Index y = (t.y + i) * phases + v;
            const Index begin = std::max(-halo, -t.x), end = t.columns + halo;
            const bool inside = 0 <= y && y < height;
            // cells all of whose phases are inside
            const Index whole = inside ? std::max(begin, std::min(end, width / phases - t.x)) : begin;
            const S* from = inside ? map + y * stride_y + (t.x + begin) * phases * stride_x : map;
            for (Index u = 0; u < phases; ++u) std::fill(row + u * stride - halo, row + u * stride + begin, fill);
            if (phases == 1 && stride_x == 1) split_row<1>(from, 1, row + begin, stride, 1, whole - begin);
            else if (phases == 2 && stride_x == 1) split_row<2>(from, 1, row + begin, stride, 2, whole - begin);
            else split_row<0>(from, stride_x, row + begin, stride, phases, whole - begin);
            for (Index u = 0; u < phases; ++u)
                for (Index j = whole; j < end; ++j) {
                    const Index x = (t.x + j) * phases + u;
                    row[u * stride + j] = inside && x < width ? widen(map[y * stride_y + x * stride_x]) : fill;
                }
        }
}

template <int U, class S, class T> void merge_row(const T* from, Index plane, S* to, Index stride, Index phases, Index count) {
    const Index u_count = U ? U : phases;
    for (Index j = 0; j < count; ++j)
        for (Index u = 0; u < u_count; ++u) to[(j * u_count + u) * stride] = narrow<S>(from[u * plane + j]);
}

// The reverse for the tile's own cells.
template <class S, class T>
void write_planes(const T* planes, Index stride, const Grid& g, const Tile& t, Index phases, Index height, Index width, S* map, Index stride_y, Index stride_x) {
    for (Index i = 0; i < t.rows; ++i)
        for (Index v = 0; v < phases; ++v) {
            const T* row = planes + v * phases * stride + i * g.pitch;
            const Index y = (t.y + i) * phases + v;
            if (y >= height) continue;
            const Index whole = std::min(t.columns, width / phases - t.x);
            S* to = map + y * stride_y + t.x * phases * stride_x;
            if (phases == 1 && stride_x == 1) merge_row<1>(row, stride, to, 1, 1, whole);
            else if (phases == 2 && stride_x == 1) merge_row<2>(row, stride, to, 1, 2, whole);
            else merge_row<0>(row, stride, to, stride_x, phases, whole);
            for (Index j = whole; j < t.columns; ++j)
                for (Index u = 0; u < phases && (t.x + j) * phases + u < width; ++u)
                    to[(j * phases + u) * stride_x] = narrow<S>(row[u * stride + j]);
        }
}

}  // namespace carafepp
