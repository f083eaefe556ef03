// The rule's line for fused.h: what storages.h does, for a group at a time.
//
// `STORABLE` is the largest magnitude's pattern that `store` takes; `store_rare` takes all.
#pragma once

#include "groups.h"

#ifdef AMSF_VECTORS

namespace amsf {

// Scales of a batch's groups: their patterns, and as two halves the upper ones of these.
struct Scales {
  alignas(16) int32_t patterns[GROUPS], halves[GROUPS];

  // `upper`: of the patterns.
  static Scales of(__m128i upper) {
    Scales scales;
    const __m128i patterns = _mm_slli_epi32(upper, 16);
    _mm_store_si128(reinterpret_cast<__m128i*>(scales.patterns), patterns);
    _mm_store_si128(reinterpret_cast<__m128i*>(scales.halves), _mm_or_si128(patterns, upper));
    return scales;
  }
};

// A gap of 8 bits in groups, or of 16.
template <LineKind KIND> struct Gap;

template <> struct Gap<LINE_INT8> {
  static constexpr int SIZE = 1;
  static Scales scales_before(const Piece& p, int64_t group) {
    return Scales::of(_mm_cvtepu16_epi32(
        _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p.scales_before + group))));
  }
  static Two load(const Piece& p, int64_t at, const Scales& scales, int g) {
    const Ints scale = all(scales.patterns[g]), halves = all(scales.halves[g]);
    const __m512i code = _mm512_and_si512((__m512i)(bytes(codes(p, at)) << 1), (__m512i)all(CODE));
    const Ints both = (Ints)_mm512_add_epi16(code, (__m512i)halves);
    const Ints even = both << 16, odd = both & UPPER;
    return {(Floats)even - with_sign(scale, even), (Floats)odd - with_sign(scale, odd)};
  }
  // `scale_of`, of four groups.
  static Scales scales_of(const Piece& p, int64_t group, __m128i tops) {
    const __m128 absmax = _mm_castsi128_ps(tops);
    const __m128i third = _mm_castps_si128(_mm_mul_ps(absmax, _mm_set1_ps(THIRD)));
    const __m128i beyond = _mm_add_epi32(third, _mm_set1_epi32((2 << CUT_BITS) - 1));
    const __m128i above = _mm_slli_epi32(_mm_srli_epi32(beyond, CUT_BITS), CUT_BITS);
    const __m128 highest = _mm_castsi128_ps(_mm_add_epi32(above, _mm_set1_epi32(TOP_CODE)));
    const __m128 reached = _mm_sub_ps(highest, _mm_castsi128_ps(above));
    const __m128i lacking = _mm_castps_si128(_mm_cmplt_ps(reached, absmax));
    const __m128i found = _mm_sub_epi32(above, _mm_slli_epi32(lacking, CUT_BITS));
    const __m128i upper =
        _mm_srli_epi32(_mm_max_epi32(found, _mm_set1_epi32(SMALLEST_SCALE)), 16);
    const __m128i packed = _mm_packus_epi32(upper, upper);
    std::memcpy(p.scales + group, &packed, GROUPS * sizeof(uint16_t));
    return Scales::of(upper);
  }
  struct Constants {
    Drawn drawn;
  };
  // `encode`, of a whole group.
  static void store(void* to, const Scales& scales, int g, const float* values, uint64_t word,
                    const Constants& constants) {
    const Ints scale = all(scales.patterns[g]), halves = all(scales.halves[g]);
    const GroupWords words = constants.drawn(word);
    __m512i parts[2];
    for (int k = 0; k < QUARTERS; k += 2) {
      const Bits bits = words.half(k / 2);
      const Floats even = loaded<Floats>(values + k * PAIRS);
      const Floats odd = loaded<Floats>(values + (k + 1) * PAIRS);
      const Ints even_place = (Ints)(even + with_sign(scale, (Ints)even)) + bits.even_17();
      const Ints odd_place = (Ints)(odd + with_sign(scale, (Ints)odd)) + bits.odd_17();
      const __m512i place =
          _mm512_sub_epi16((__m512i)upper_halves(even_place, odd_place), (__m512i)halves);
      constexpr int FIRST_WHERE_THIRD = 0xE4;  // else the second
      parts[k / 2] = _mm512_ternarylogic_epi32(_mm512_srli_epi16(place, 1),
                                               _mm512_srli_epi16(place, 8),
                                               _mm512_set1_epi16(127), FIRST_WHERE_THIRD);
    }
    const __m512i code = halves_in_order(_mm512_packus_epi16(parts[0], parts[1]));
    const __mmask64 something = _mm512_test_epi8_mask(code, _mm512_set1_epi8(127));
    stored(_mm512_maskz_mov_epi8(something, code), to);
  }
  static constexpr int32_t STORABLE = LIMIT - 1;
  using RareBits = Drawn17;
  static void store_rare(const Piece& p, int64_t at, int64_t group, const float* values,
                         const uint32_t* bits) {
    encode<GROUP>(values, bits, GROUP, 0.0f, codes(p, at), p.scales + group);
  }

 private:
  static constexpr int32_t CODE = static_cast<int32_t>(0x80FE80FEu);  // of both halves, shifted
  static Floats with_sign(Ints scale, Ints value) {
    constexpr int AND_OR = 0xEA;  // (a & b) | c
    return (Floats)_mm512_ternarylogic_epi32((__m512i)value, (__m512i)all(SIGN), (__m512i)scale,
                                             AND_OR);
  }
  static int8_t* codes(const Piece& p, int64_t at) { return static_cast<int8_t*>(p.line) + at; }
};

template <> struct Gap<LINE_BF16> {
  static constexpr int SIZE = 2;
  static Scales scales_before(const Piece&, int64_t) { return {}; }
  static Two load(const Piece& p, int64_t at, const Scales&, int) { return widened(line(p, at)); }
  static Scales scales_of(const Piece&, int64_t, __m128i) { return {}; }
  struct Constants {
    Drawn drawn;
  };
  static void store(void* to, const Scales&, int, const float* values, uint64_t word,
                    const Constants& constants) {
    Floats four[QUARTERS];
    for (int k = 0; k < QUARTERS; ++k) four[k] = loaded<Floats>(values + k * PAIRS);
    store_drawn(four, constants.drawn(word), static_cast<uint16_t*>(to));
  }
  static constexpr int32_t STORABLE = STORABLE_BF16;
  using RareBits = Drawn16;
  static void store_rare(const Piece& p, int64_t at, int64_t, const float* values,
                         const uint16_t* bits) {
    store_at_random<BF16>(values, bits, GROUP, line(p, at));
  }

 private:
  static uint16_t* line(const Piece& p, int64_t at) { return static_cast<uint16_t*>(p.line) + at; }
};

}  // namespace amsf
#endif
