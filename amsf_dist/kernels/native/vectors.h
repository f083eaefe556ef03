// 32 numbers at once, for processors with AVX-512: those at even places in one vector, those at odd
// ones in another. Two numbers of 16 bits lie in each 32 bits of memory, so that a shift or a mask
// is all it takes to widen them; in their own order it is a shuffle, and compilers make several.
#pragma once

#include "storages.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && \
    defined(__AVX512VL__) && defined(__FMA__)
#define AMSF_VECTORS 1
#include <immintrin.h>

namespace amsf {

constexpr int PAIRS = 16;

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef int16_t Shorts __attribute__((vector_size(64)));
typedef uint64_t Longs __attribute__((vector_size(64)));

constexpr int32_t UPPER = -0x10000, SIGN = static_cast<int32_t>(0x80000000u);

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

// Numbers at even and at odd places.
struct Two {
  Floats even, odd;
};

// 32 bf16 as fp32; the upper halves of fp32 as bf16.
inline Two widened(const void* from) {
  const Ints both = loaded<Ints>(from);
  return {(Floats)(both << 16), (Floats)(both & UPPER)};
}
inline Ints upper_halves(Ints even, Ints odd) {
  const Ints low = (Ints)_mm512_srli_epi32((__m512i)even, 16);
  return low | (odd & UPPER);
}
inline void store_upper(Ints even, Ints odd, void* to) { stored(upper_halves(even, odd), to); }

// 32 fp32, which take a shuffle to part and to join again.
inline Two parted(const float* from) {
  const __m512 low = _mm512_loadu_ps(from), high = _mm512_loadu_ps(from + PAIRS);
  const __m512i even =
      _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  return {(Floats)_mm512_permutex2var_ps(low, even, high),
          (Floats)_mm512_permutex2var_ps(low, odd, high)};
}
inline void store_joined(Floats even, Floats odd, float* to) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  _mm512_storeu_ps(to, _mm512_permutex2var_ps((__m512)even, low, (__m512)odd));
  _mm512_storeu_ps(to + PAIRS, _mm512_permutex2var_ps((__m512)even, high, (__m512)odd));
}

inline Shorts bytes(const void* from) {
  return (Shorts)_mm512_cvtepi8_epi16(_mm256_loadu_si256(static_cast<const __m256i*>(from)));
}

// Eight bytes of a first half, eight of a second one, and so on: first the one, then the other.
inline __m512i halves_in_order(__m512i bytes) {
  return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), bytes);
}

// sum + a * b, added in pairs of 16 bits.
inline Ints plus_products(Ints sum, Shorts a, Ints b) {
#ifdef __AVX512VNNI__
  return (Ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#else
  return sum + (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#endif
}

// A constant that stays in its register: compilers would rather make it anew in every turn.
template <typename Vector> inline Vector held(Vector vector) {
  asm("" : "+v"(vector));
  return vector;
}

// The second bytes of 64 numbers, in their order.
struct SecondBytes {
  __mmask64 second = 0x00AA00AA00AA00AA, third = 0x5500550055005500, fourth = 0xAA00AA00AA00AA00;
  SecondBytes() { asm("" : "+k"(second), "+k"(third), "+k"(fourth)); }

  __m512i operator()(const Ints (&numbers)[4]) const {
    constexpr int LOW = 0x05050101, HIGH = 0x0D0D0909;
    const __m512i from = _mm512_set4_epi32(HIGH, LOW, HIGH, LOW);
    __m512i found = _mm512_shuffle_epi8((__m512i)numbers[0], from);
    found = _mm512_mask_shuffle_epi8(found, second, (__m512i)numbers[1], from);
    found = _mm512_mask_shuffle_epi8(found, third, (__m512i)numbers[2], from);
    found = _mm512_mask_shuffle_epi8(found, fourth, (__m512i)numbers[3], from);
    return halves_in_order(found);
  }
};


// The larger magnitude; of a number and a NaN, the number's.
inline Floats farther(Floats a, Floats b) {
  constexpr int LARGER_WITHOUT_SIGN = 0b1011;
  return (Floats)_mm512_range_ps((__m512)a, (__m512)b, LARGER_WITHOUT_SIGN);
}

// For the eight words of a group's numbers: a word of the first half beside one of the second.
struct Words {
  alignas(64) uint64_t gammas[8];
  // every word twice, the second time rotated by a byte
  alignas(64) int8_t of_half[2][64];
  Words() {
    for (int i = 0; i < 8; ++i) gammas[i] = static_cast<uint64_t>(i / 2 + i % 2 * 4) * GAMMA;
    for (int half = 0; half < 2; ++half)
      for (int i = 0; i < 64; ++i)
        of_half[half][i] = static_cast<int8_t>(half * 8 + (i % 16 < 8 ? i % 8 : (i + 7) % 8));
  }
};
static const Words WORDS;

inline Longs all(uint64_t word) { return (Longs)_mm512_set1_epi64(static_cast<int64_t>(word)); }

// Random bits of 32 numbers, 16 for each: those at even places lie in lower halves.
struct Bits {
  Ints both;
  Ints even() const { return both & 0xFFFF; }
  Ints odd() const { return (Ints)_mm512_srli_epi32((__m512i)both, 16); }
  // one bit more, which is the other one's too
  Ints even_17() const { return both & 0x1FFFF; }
  Ints odd_17() const { return (Ints)_mm512_srli_epi32((__m512i)both, 15); }
};

// The words of a group's 64 numbers.
struct GroupWords {
  __m512i words;
  Bits half(int number) const {
    return {(Ints)_mm512_shuffle_epi8(words, loaded<__m512i>(WORDS.of_half[number]))};
  }
};

// Draws; its constants stay in registers.
struct Drawn {
  Longs first = held(all(uint64_t{0xBF58476D1CE4E5B9u}));
  Longs second = held(all(uint64_t{0x94D049BB133111EBu}));

  // For a group whose first number's word is this.
  GroupWords operator()(uint64_t word) const {
    Longs z = all(word) + loaded<Longs>(WORDS.gammas);
    z = (z ^ (z >> 30)) * first;
    z = (z ^ (z >> 27)) * second;
    return {(__m512i)(z ^ (z >> 31))};
  }
};

// The largest number of each of four vectors.
inline __m128i largest(const Ints (&tops)[4]) {
  const __m512i a = (__m512i)tops[0], b = (__m512i)tops[1], c = (__m512i)tops[2],
                d = (__m512i)tops[3];
  const __m512i ab = _mm512_max_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_max_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  const __m512i abcd =
      _mm512_max_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half =
      _mm256_max_epi32(_mm512_castsi512_si256(abcd), _mm512_extracti64x4_epi64(abcd, 1));
  return _mm_max_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

}  // namespace amsf
#endif
