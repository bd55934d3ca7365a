// Vectors of lanes, storage types, and the functions of them that every kernel uses.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

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

// The first `count` lanes alone, none if it is negative and all if it is more than there are; those that are not loaded are zero.
template <class T, class S> inline Vector<T> load_part(const S* p, Index count) {
    if (count >= LANES<T>) return load(p);
    if (count <= 0) return Vector<T>{};
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<S, float>) return _mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p);
    if constexpr (std::is_same_v<S, double>) return _mm512_maskz_loadu_pd(__mmask8((1u << count) - 1), p);
#endif
    S lanes[LANES<T>] = {};
    std::memcpy(lanes, p, count * sizeof(S));
    return load(static_cast<const S*>(lanes));
}
template <class T, class S> inline void store_part(S* p, Vector<T> v, Index count) {
    if (count >= LANES<T>) return store(p, v);
    if (count <= 0) return;
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<S, float>) return _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), v);
    if constexpr (std::is_same_v<S, double>) return _mm512_mask_storeu_pd(p, __mmask8((1u << count) - 1), v);
#endif
    S lanes[LANES<T>];
    store(lanes, v);
    std::memcpy(p, lanes, count * sizeof(S));
}

// Lanes I of the two vectors laid end to end.
template <class T, int... I> inline Vector<T> shuffle(Vector<T> a, Vector<T> b) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, I...);
#else
    return __builtin_shuffle(a, b, typename Simd<T>::Mask{I...});
#endif
}

// exp(x), x <= 80, with about one unit in the last place: 2**n * exp(r), |r| <= ln(2) / 2, by Taylor's series; 0 below the normal numbers.
template <class T> inline Vector<T> exponential(Vector<T> x) {
    using Mask = typename Simd<T>::Mask;
    constexpr bool single = sizeof(T) == 4;
    constexpr int terms = single ? 7 : 13, mantissa = std::numeric_limits<T>::digits - 1;
    constexpr T low = single ? T(-87) : T(-708);
    // ln(2) in two parts, of which n times the first is exact
    constexpr T ln2 = single ? T(0x1.62e4p-1) : T(0x1.62e42feep-1);
    constexpr T rest = single ? T(0x1.7f7d1cf79abcap-20) : T(0x1.a39ef35793c76p-33);
    constexpr T rounder = T(3) * (typename Simd<T>::Int(1) << (mantissa - 1));
    const Vector<T> shifted = x * T(1.4426950408889634) + rounder;
    const Vector<T> n = shifted - rounder;
    const Vector<T> r = x - n * ln2 - n * rest;
    constexpr std::array<T, terms + 1> inverse_factorials = [] {
        std::array<T, terms + 1> c{};
        double factorial = 1;
        for (int i = 0; i <= terms; factorial *= ++i) c[i] = T(1 / factorial);
        return c;
    }();
    Vector<T> sum = splat(inverse_factorials[terms]);
#pragma GCC unroll 16
    for (int i = terms - 1; i >= 0; --i) sum = sum * r + inverse_factorials[i];
    const Mask exponent = bits<Mask>(shifted) << mantissa;
    return x < low ? Vector<T>{} : bits<Vector<T>>(bits<Mask>(sum) + exponent);
}
template <class T> inline Vector<T> maximum(Vector<T> a, Vector<T> b) { return a > b ? a : b; }
template <class T> inline Vector<T> minimum(Vector<T> a, T b) { return a > b ? splat(b) : a; }
template <class T> inline Vector<T> sigmoid(Vector<T> x) {
    Vector<T> e = exponential<T>(x > T(0) ? -x : x);
    return (x >= T(0) ? splat(T(1)) : e) / (e + T(1));
}

}  // namespace carafepp
