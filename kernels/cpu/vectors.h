// Vectors of lanes, one register each: loads, stores, shuffles and elementary functions, with the vector extensions of GCC and Clang.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

// Keeps inner loops apart, so that each has the registers to itself.
#define NOINLINE __attribute__((noinline))
// Puts a loop into its caller, so that what the caller sums stays in registers.
#define INLINED __attribute__((always_inline)) inline

namespace carafepp {

// Bytes of a vector register, and the sub-pixels that share the load of one source vector: more with 32 registers than with 16.
#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, SUBS = 4;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32, SUBS = 2;
#else
constexpr int VECTOR_BYTES = 16, SUBS = 4;
#endif

template <class T, class Integer> struct SimdOf {
    static constexpr int lanes = VECTOR_BYTES / sizeof(T);
    using Int = Integer;
    typedef T Vector __attribute__((vector_size(VECTOR_BYTES)));
    typedef Int Mask __attribute__((vector_size(VECTOR_BYTES)));
};
// undefined for other types, so that they use the other overloads of load and store
template <class T> struct Simd;
template <> struct Simd<float> : SimdOf<float, std::int32_t> {};
template <> struct Simd<double> : SimdOf<double, std::int64_t> {};
template <class T> using Vector = typename Simd<T>::Vector;
template <class T> constexpr int LANES = Simd<T>::lanes;

template <class To, class From> inline To bits(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}

template <class T> inline Vector<T> load(const T* from) {
    Vector<T> v;
    std::memcpy(&v, from, sizeof(v));
    return v;
}
// Loads into a register. Compilers tend to fold a load into each of its uses, so that every use waits for the cache.
template <class S> inline auto load_once(const S* from) {
    auto v = load(from);
#if defined(__x86_64__)
    asm("" : "+v"(v));
#endif
    return v;
}
template <class T> inline void store(T* to, Vector<T> v) { std::memcpy(to, &v, sizeof(v)); }
template <class T> inline Vector<T> splat(T value) { return Vector<T>{} + value; }

// Lanes I of the two vectors laid end to end.
template <class T, int... I> inline Vector<T> shuffle(Vector<T> a, Vector<T> b) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, I...);
#else
    return __builtin_shuffle(a, b, typename Simd<T>::Mask{I...});
#endif
}

// Transposes a square matrix in place, whose rows are LANES / U vectors of elements of U values each: element j of vector i becomes element
// i of vector j. Every step interleaves the elements of the two halves.
template <class T, int U, std::size_t... I>
inline void interleave(const Vector<T>& a, const Vector<T>& b, Vector<T>* to, std::index_sequence<I...>) {
    constexpr int lanes = LANES<T>, side = lanes / U;
    to[0] = shuffle<T, (int(I) / U / 2 * U + int(I) % U + int(I) / U % 2 * lanes)...>(a, b);
    to[1] = shuffle<T, ((side + int(I) / U) / 2 * U + int(I) % U + int(I) / U % 2 * lanes)...>(a, b);
}
template <class T, int U = 1> inline void transpose(Vector<T>* v) {
    constexpr int side = LANES<T> / U;
    Vector<T> w[side];
#pragma GCC unroll 4
    for (int step = 1; step < side; step *= 2) {
#pragma GCC unroll 16
        for (int i = 0; i < side / 2; ++i) interleave<T, U>(v[i], v[i + side / 2], &w[2 * i], std::make_index_sequence<LANES<T>>{});
#pragma GCC unroll 16
        for (int i = 0; i < side; ++i) v[i] = w[i];
    }
}

// The coefficients of a polynomial p with p(0) = 1 that is 2**f for |f| <= 1/2.
template <class T> constexpr auto EXP2 = [] {
    // a Taylor series
    std::array<T, 14> c{};
    double term = 1;
    for (std::size_t i = 0; i < c.size(); term *= 0.6931471805599453 / double(++i)) c[i] = T(term);
    return c;
}();
// the smallest relative error for this degree, 9.1e-8
template <> constexpr std::array<float, 6> EXP2<float>{1, 0.69314698f, 0.24022242f, 0.055507338f, 0.0096715124f, 0.0013264712f};

// exp(x) for x <= 80; 0 below the normal numbers. The relative error is about 1.5e-7 + 1.3e-8 |x| in float, 1.5e-7 + 6e-8 |x| without fused
// multiply-adds, and of the order of roundings in double. It computes 2**n * 2**f, where n + f is x in units of ln(2).
template <class T> inline Vector<T> exponential(Vector<T> x) {
    using Mask = typename Simd<T>::Mask;
    constexpr bool single = sizeof(T) == 4;
    constexpr int mantissa = std::numeric_limits<T>::digits - 1;
    constexpr T low = single ? T(-87) : T(-708), units = T(1.4426950408889634);
    constexpr T rounder = T(3) * (typename Simd<T>::Int(1) << (mantissa - 1));
    const Vector<T> shifted = x * units + rounder;
    const Vector<T> f = x * units - (shifted - rounder);
    constexpr int degree = EXP2<T>.size() - 1;
    Vector<T> sum = splat(EXP2<T>[degree]);
#pragma GCC unroll 16
    for (int i = degree - 1; i >= 0; --i) sum = sum * f + EXP2<T>[i];
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
