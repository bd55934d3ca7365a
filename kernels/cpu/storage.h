// Storage types and compute types: in all headers, S is the type of a stored value and T = Compute<S> the type of the arithmetic.
// Half precision is stored in 16 bits and computed in float.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "index.h"
#include "vectors.h"

namespace carafepp {

struct BFloat16 { std::uint16_t bits; };
struct Float16 { std::uint16_t bits; };

// The conversions work on scalars and on vectors: Float is float or Vector<float>, Word the unsigned integer type of the same size.
template <class Float, class Word> inline Float widen_bfloat16(Word half) { return bits<Float>(half << 16); }
// The upper half of the result is the bfloat16.
template <class Float, class Word> inline Word round_bfloat16(Float value) {
    Word word = bits<Word>(value);
    return value != value ? word | 0x00400000u : word + 0x7fffu + ((word >> 16) & 1u);
}
template <class Float, class Word> inline Word narrow_bfloat16(Float value) { return round_bfloat16<Float, Word>(value) >> 16; }
template <class Float, class Word> inline Float widen_float16(Word half) {
    Float magnitude = bits<Float>((half & 0x7fffu) << 13) * 0x1p112f;
    Word word = bits<Word>(magnitude);
    return bits<Float>((magnitude >= 65536.0f ? word | 0x7f800000u : word) | (half & 0x8000u) << 16);
}
template <class Float, class Word> inline Word narrow_float16(Float value) {
    Word word = bits<Word>(value), sign = word & 0x80000000u;
    word ^= sign;
    Float magnitude = bits<Float>(word);
    Word large = word > 0x7f800000u ? word * 0u + 0x7e00u : word * 0u + 0x7c00u;
    // adding 0.5 leaves the subnormal half, rounded to even, in the low bits
    Word small = bits<Word>(magnitude + 0.5f) - 0x3f000000u;
    Word normal = (word - 0x37fff001u + ((word >> 13) & 1u)) >> 13;
    return (word >= 0x47800000u ? large : word < 0x38800000u ? small : normal) | sign >> 16;
}

template <class T> inline T widen(T value) { return value; }
inline float widen(BFloat16 value) { return widen_bfloat16<float>(std::uint32_t(value.bits)); }
inline float widen(Float16 value) { return widen_float16<float>(std::uint32_t(value.bits)); }
template <class S, class T> inline S narrow(T value) {
    if constexpr (std::is_same_v<S, BFloat16>) return S{std::uint16_t(narrow_bfloat16<float, std::uint32_t>(value))};
    else if constexpr (std::is_same_v<S, Float16>) return S{std::uint16_t(narrow_float16<float, std::uint32_t>(value))};
    else return value;
}
template <class S> using Compute = decltype(widen(S{}));

typedef std::uint16_t Halves __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef std::uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));
inline Words load_halves(const void* from) {
    Halves halves;
    std::memcpy(&halves, from, sizeof(halves));
    return __builtin_convertvector(halves, Words);
}
inline void store_halves(void* to, Words words) {
    Halves halves = __builtin_convertvector(words, Halves);
    std::memcpy(to, &halves, sizeof(halves));
}
inline Vector<float> load(const BFloat16* from) { return widen_bfloat16<Vector<float>>(load_halves(from)); }
inline void store(BFloat16* to, Vector<float> v) { store_halves(to, narrow_bfloat16<Vector<float>, Words>(v)); }
// Two vectors of adjacent values: those of even places in the first, those of odd places in the second. They are the halves of 32-bit words,
// which need not be taken apart.
inline void load_pair(const BFloat16* from, Vector<float>* v) {
    Words words;
    std::memcpy(&words, from, sizeof(words));
    v[0] = bits<Vector<float>>(words << 16), v[1] = bits<Vector<float>>(words & 0xffff0000u);
}
inline Words merge_pair(const Vector<float>* v) {
    return round_bfloat16<Vector<float>, Words>(v[0]) >> 16 | (round_bfloat16<Vector<float>, Words>(v[1]) & 0xffff0000u);
}
inline void store_pair(BFloat16* to, const Vector<float>* v) {
    const Words words = merge_pair(v);
    std::memcpy(to, &words, sizeof(words));
}
#if defined(__AVX512F__)
// the processor's own conversions give the same values
inline Vector<float> load(const Float16* from) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))); }
inline void store(Float16* to, Vector<float> v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
inline Vector<float> load(const Float16* from) { return widen_float16<Vector<float>>(load_halves(from)); }
inline void store(Float16* to, Vector<float> v) { store_halves(to, narrow_float16<Vector<float>, Words>(v)); }
#endif

// Whether stores can go past the caches, and such a store, to an address that is a multiple of the bytes stored. `end_streams` follows the
// last of them, before another thread may read what was stored.
#if defined(__AVX512F__)
constexpr bool STREAMS = true;
template <class T, class S> inline void stream(S* to, Vector<T> v) {
    S lanes[LANES<T>];
    store(lanes, v);
    if constexpr (sizeof(lanes) == 64) _mm512_stream_si512(reinterpret_cast<__m512i*>(to), bits<__m512i>(lanes));
    else _mm256_stream_si256(reinterpret_cast<__m256i*>(to), bits<__m256i>(lanes));
}
// each half by itself, because only that is a store of `stream`
inline void stream_pair(BFloat16* to, const Vector<float>* v) {
    const __m512i words = bits<__m512i>(merge_pair(v));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(words));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + LANES<float>), _mm512_extracti64x4_epi64(words, 1));
}
inline void end_streams() { _mm_sfence(); }
#else
constexpr bool STREAMS = false;
template <class T, class S> inline void stream(S* to, Vector<T> v) { store(to, v); }
inline void stream_pair(BFloat16* to, const Vector<float>* v) { store_pair(to, v); }
inline void end_streams() {}
#endif

// Loads only the first `count` lanes: none if it is negative, all if it exceeds their number. The other lanes are 0.
template <class T, class S> inline Vector<T> load_part(const S* from, Index count) {
    if (count >= LANES<T>) return load(from);
    if (count <= 0) return Vector<T>{};
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<S, float>) return _mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), from);
    if constexpr (std::is_same_v<S, double>) return _mm512_maskz_loadu_pd(__mmask8((1u << count) - 1), from);
#endif
    S lanes[LANES<T>] = {};
    std::memcpy(lanes, from, count * sizeof(S));
    return load(static_cast<const S*>(lanes));
}
template <class T, class S> inline void store_part(S* to, Vector<T> v, Index count) {
    if (count >= LANES<T>) return store(to, v);
    if (count <= 0) return;
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<S, float>) return _mm512_mask_storeu_ps(to, __mmask16((1u << count) - 1), v);
    if constexpr (std::is_same_v<S, double>) return _mm512_mask_storeu_pd(to, __mmask8((1u << count) - 1), v);
#endif
    S lanes[LANES<T>];
    store(lanes, v);
    std::memcpy(to, lanes, count * sizeof(S));
}

}  // namespace carafepp
