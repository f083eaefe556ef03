// The rule's line for fused.h: what storages.h does, for a group at a time.
//
// `usual` says whether a batch can be read here, `STORABLE` is the largest magnitude's pattern that
// `store` takes; `store_rare` takes all.
#pragma once

#include "groups.h"

#ifdef AMSF_VECTORS

namespace amsf {

// What groups of 8 bits are stored with.
struct Scales {
  alignas(16) float unit[GROUPS], inverse[GROUPS], part[GROUPS], twice[GROUPS];
};

// A gap of 8 bits in groups, or of 16.
template <LineKind KIND> struct Gap;

template <> struct Gap<LINE_INT8> {
  static constexpr int SIZE = 1;
  static bool usual(const Piece& p, int64_t at) {  // no NaN, which is the code -128
    const __m512i nan = _mm512_set1_epi8(-128);
    __mmask64 found = 0;
    for (int i = 0; i < BATCH; i += GROUP)
      found |= _mm512_cmpeq_epi8_mask(_mm512_loadu_si512(codes(p, at + i)), nan);
    return !found;
  }
  static void find_units(const Piece& p, int64_t group, float (&units)[GROUPS]) {
    for (int g = 0; g < GROUPS; ++g)
      units[g] = number_of(static_cast<uint32_t>(p.scales_before[group + g]) << 16);
  }
  // Every product here is exact: 15 bits by 8, and no scale is so small that it would not be normal.
  struct Units {
    Floats unit, offset, high;
    explicit Units(float value)
        : unit(all(value)), offset(all(value * -(0x1p23f + 0x1p15f))), high(all(value * 0x1p-16f)) {}
  };
  static Two load(const Piece& p, int64_t at, const Units& units) {
    const Shorts code = bytes(codes(p, at));
    const Ints value = (Ints)(code * ((code < 0 ? -code : code) + 32));
    // a number at an even place is brought up by 2**23 + 2**15, its sign turned into bits
    constexpr int LOW_15_NOT_16TH = 0xA6;
    const Floats raised = (Floats)_mm512_ternarylogic_epi32(
        (__m512i)value, (__m512i)all(0xFFFF), (__m512i)all(ON_2_23 | 0x7FFF), LOW_15_NOT_16TH);
    return {once(raised, units.unit, units.offset), floats(value & UPPER) * units.high};
  }
  // Of `encode`, for groups that are all here.
  static Scales scales_of(const Piece& p, int64_t group, __m128i tops) {
    const __m128 smallest = _mm_set1_ps(0x1p-100f);
    const __m128 least =
        _mm_max_ps(_mm_div_ps(_mm_castsi128_ps(tops), _mm_set1_ps(20193.0f)), smallest);
    const __m128i found =
        _mm_srli_epi32(_mm_add_epi32(_mm_castps_si128(least), _mm_set1_epi32(0xFFFF)), 16);
    const __m128 unit = _mm_castsi128_ps(_mm_slli_epi32(found, 16));
    const __m128i halves = _mm_packus_epi32(found, found);
    std::memcpy(p.scales + group, &halves, GROUPS * sizeof(uint16_t));
    Scales scales;
    _mm_store_ps(scales.unit, unit);
    _mm_store_ps(scales.inverse, _mm_div_ps(_mm_set1_ps(1.0f), unit));
    _mm_store_ps(scales.part, _mm_mul_ps(unit, _mm_set1_ps(0x1p-16f)));
    _mm_store_ps(scales.twice, _mm_mul_ps(unit, _mm_set1_ps(0x1p-15f)));
    return scales;
  }
  struct Constants {
    Ints magnitude = held(all(static_cast<int32_t>(MAGNITUDE))), one = held(all(1));
    Drawn drawn;
  };
  // Of `encode`, for a whole group of finite numbers; see there for what is exact. The chance is
  // half of what it is there, the step twice: their product is the same, rounded once.
  static void store(void* to, const Scales& scales, int g, const float* values, uint64_t word,
                    const Constants& constants) {
    const Floats unit = all(scales.unit[g]), inverse = all(scales.inverse[g]),
                 part = all(scales.part[g]), twice = all(scales.twice[g]);
    const Longs first = all(word);
    Ints signs[QUARTERS], roots[QUARTERS];
    Bits bits{};
    for (int k = 0; k < QUARTERS; ++k) {
      if (k % 2 == 0) bits = constants.drawn(first, k / 2);
      const Ints value = loaded<Ints>(values + k * PAIRS);
      const Floats x = (Floats)(value & constants.magnitude);
      const Ints r = truncated(root(x * inverse + 256.0f));
      const Floats whole = floats(r);
      const Floats beyond = once(-once(whole, whole, all(-256.0f)), unit, x);
      const Floats step = once(whole, twice, part);
      const Floats chance = k % 2 ? bits.odd_chance() : bits.even_chance();
      const __mmask16 up = _mm512_cmp_ps_mask((__m512)beyond, (__m512)(chance * step), _CMP_GT_OQ);
      roots[k] = (Ints)_mm512_mask_add_epi32((__m512i)r, up, (__m512i)r, (__m512i)constants.one);
      signs[k] = value;
    }
    // codes may be negative only now: a sign is found in the same order as their bytes
    const __m512i code = _mm512_sub_epi8(packed<false>(roots), _mm512_set1_epi8(16));
    const __mmask64 negative = _mm512_movepi8_mask(packed<true>(signs));
    const __m512i zero = _mm512_setzero_si512();
    stored(packed_in_order(_mm512_mask_sub_epi8(code, negative, zero, code)), to);
  }
  static constexpr int32_t STORABLE = static_cast<int32_t>(INFINITE) - 1;
  static void store_rare(const Piece& p, int64_t at, int64_t group, const float* values,
                         const uint16_t* bits) {
    encode<GROUP>(values, bits, GROUP, 0.0f, codes(p, at), p.scales + group);
  }

 private:
  static int8_t* codes(const Piece& p, int64_t at) { return static_cast<int8_t*>(p.line) + at; }
};

template <> struct Gap<LINE_BF16> {
  static constexpr int SIZE = 2;
  static bool usual(const Piece&, int64_t) { return true; }
  static void find_units(const Piece&, int64_t, float (&)[GROUPS]) {}
  struct Units {
    explicit Units(float) {}
  };
  static Two load(const Piece& p, int64_t at, const Units&) { return widened(line(p, at)); }
  static Scales scales_of(const Piece&, int64_t, __m128i) { return {}; }
  struct Constants {
    Drawn drawn;
  };
  static void store(void* to, const Scales&, int, const float* values, uint64_t word,
                    const Constants& constants) {
    Floats four[QUARTERS];
    for (int k = 0; k < QUARTERS; ++k) four[k] = loaded<Floats>(values + k * PAIRS);
    store_drawn(four, all(word), constants.drawn, static_cast<uint16_t*>(to));
  }
  static constexpr int32_t STORABLE = STORABLE_BF16;
  static void store_rare(const Piece& p, int64_t at, int64_t, const float* values,
                         const uint16_t* bits) {
    store_at_random<BF16>(values, bits, GROUP, line(p, at));
  }

 private:
  static uint16_t* line(const Piece& p, int64_t at) { return static_cast<uint16_t*>(p.line) + at; }
};

}  // namespace amsf
#endif
