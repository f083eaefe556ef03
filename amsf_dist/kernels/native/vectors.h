// Sixteen numbers at once, for processors with AVX-512: what compilers make of loops over mixed
// sizes (8, 16 and 32 bits) is several times as many instructions, most of them shuffles.
#pragma once

#include "storages.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && \
    defined(__AVX512VL__) && defined(__FMA__)
#define AMSF_VECTORS 1
#include <immintrin.h>

namespace amsf {

constexpr int LANES = 16;

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint64_t Longs __attribute__((vector_size(64)));

template <typename Vector> inline Vector loaded(const void* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

template <typename Vector> inline void stored(const Vector& vector, void* to) {
  std::memcpy(to, &vector, sizeof vector);
}

inline Floats all(float value) { return (Floats)_mm512_set1_ps(value); }
inline Ints all(int32_t value) { return (Ints)_mm512_set1_epi32(value); }

inline Ints halves(const void* from) {  // 16 bits each, without a sign
  return (Ints)_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(from)));
}
inline Ints bytes(const void* from) {
  return (Ints)_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from)));
}
inline void store_halves(Ints values, void* to) {
  _mm256_storeu_si256(static_cast<__m256i*>(to), _mm512_cvtepi32_epi16((__m512i)values));
}
inline void store_bytes(Ints values, void* to) {
  _mm_storeu_si128(static_cast<__m128i*>(to), _mm512_cvtepi32_epi8((__m512i)values));
}

inline Floats floats(Ints values) { return (Floats)_mm512_cvtepi32_ps((__m512i)values); }
inline Ints truncated(Floats values) { return (Ints)_mm512_cvttps_epi32((__m512)values); }
inline Floats root(Floats values) { return (Floats)_mm512_sqrt_ps((__m512)values); }
inline Floats magnitude(Floats values) {
  return (Floats)((Ints)values & all(static_cast<int32_t>(MAGNITUDE)));
}
inline Ints larger(Ints a, Ints b) { return (Ints)_mm512_max_epi32((__m512i)a, (__m512i)b); }
inline int32_t largest(Ints values) { return _mm512_reduce_max_epi32((__m512i)values); }

// a * b + c, rounded once.
inline Floats once(Floats a, Floats b, Floats c) {
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}

inline Longs mixed(Longs z) {
  z = (z ^ (z >> 33)) * 0x62A9D9ED799705F5u;
  return (z ^ (z >> 28)) * 0xCB24D0A5C88C35B3u;
}

// `drawn`, of numbers [i, i + 16) behind `word`.
inline Ints drawn_at(uint64_t word, int i) {
  const Longs first = (Longs)_mm512_set1_epi64(static_cast<int64_t>(word));
  const Longs low = mixed(first + loaded<Longs>(MULTIPLES.of_gamma + i));
  const Longs high = mixed(first + loaded<Longs>(MULTIPLES.of_gamma + i + LANES / 2));
  const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  return (Ints)_mm512_permutex2var_epi32((__m512i)low, odd, (__m512i)high);
}

}  // namespace amsf
#endif
