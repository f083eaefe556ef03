// The usual 16-bit settings without stages: bf16 gradients, bf16 weights with error bits, gaps in
// int8 or bf16, a factor per block. The same arithmetic as in move.h and storages.h, to the bit.
//
// What is rare goes back to the stages: a batch that is not whole, a NaN in the stored gap, a gap
// that is not finite. So the loops here have no branches.
#pragma once

#include "tensors.h"
#include "vectors.h"

namespace amsf {

#ifdef AMSF_VECTORS

// Four vectors of a group: numbers at even and odd places of its first half, then of its second.
constexpr int QUARTERS = 4;

constexpr int GROUPS = BATCH / GROUP;

// Numbers of a group, rounded to bf16 at random; the lowest 16 bits drawn count.
inline void store_drawn(const Floats (&values)[QUARTERS], Longs word, const Drawn& drawn, uint16_t* to) {
  for (int k = 0; k < QUARTERS; k += 2, to += GROUP / 2)
    store_upper((Ints)values[k] + (drawn(word, k) & 0xFFFF),
                (Ints)values[k + 1] + (drawn(word, k + 1) & 0xFFFF), to);
}

// NaN as the weight's format has it. A comparison of two vectors finds it in either.
inline void make_known(Floats (&weights)[QUARTERS]) {
  const __mmask16 found =
      _mm512_cmp_ps_mask((__m512)weights[0], (__m512)weights[1], _CMP_UNORD_Q) |
      _mm512_cmp_ps_mask((__m512)weights[2], (__m512)weights[3], _CMP_UNORD_Q);
  if (__builtin_expect(found != 0, 0))
    for (int k = 0; k < QUARTERS; ++k)
      weights[k] = weights[k] == weights[k] ? weights[k] : (Floats)all(QUIET_NAN[BF16]);
}

// Weights, and gradients of the same dtype.
struct PlainWeight {
  static Two gradient(const Piece& p, int64_t at) {
    return parted(static_cast<const float*>(p.gradient) + at);
  }
  static Two load(const Piece& p, int64_t at) {
    return parted(static_cast<const float*>(p.weight) + at);
  }
  static void store(const Piece& p, int64_t at, const Floats (&weights)[QUARTERS], uint64_t,
                    const Drawn&) {
    float* to = static_cast<float*>(p.weight) + at;
    store_joined(weights[0], weights[1], to);
    store_joined(weights[2], weights[3], to + GROUP / 2);
  }
};

struct Weight16 {
  static Two gradient(const Piece& p, int64_t at) {
    return widened(static_cast<const uint16_t*>(p.gradient) + at);
  }
};

template <int KEPT> struct SplitWeight;

template <> struct SplitWeight<8> : Weight16 {
  static Two load(const Piece& p, int64_t at) {
    const Shorts error = bytes(static_cast<const int8_t*>(p.error) + at);
    // a negative error takes one from the half above it
    const Ints upper = (Ints)(loaded<Shorts>(static_cast<const uint16_t*>(p.weight) + at) + (error >> 15));
    const __m512i lower = (__m512i)(error << 8);
    return {(Floats)((upper << 16) | ((Ints)lower & 0xFFFF)),
            (Floats)((upper & UPPER) | (Ints)_mm512_srli_epi32(lower, 16))};
  }
  static void store(const Piece& p, int64_t at, Floats (&weights)[QUARTERS], uint64_t,
                    const Drawn&) {
    make_known(weights);
    Ints sums[QUARTERS];
    for (int k = 0; k < QUARTERS; ++k) {
      const Ints weight = (Ints)weights[k];
      sums[k] = weight + ((weight >> 8) & 1) + 0x7F;
    }
    stored(in_order(Bytes64().of<1>(sums)), static_cast<int8_t*>(p.error) + at);
    // what a signed byte takes away or adds is a carry from its highest bit
    uint16_t* to = static_cast<uint16_t*>(p.weight) + at;
    store_upper(sums[0] + 0x8000, sums[1] + 0x8000, to);
    store_upper(sums[2] + 0x8000, sums[3] + 0x8000, to + GROUP / 2);
  }
};

template <> struct SplitWeight<16> : Weight16 {
  static Two load(const Piece& p, int64_t at) {
    const Shorts error = loaded<Shorts>(static_cast<const int16_t*>(p.error) + at);
    const Ints upper = (Ints)(loaded<Shorts>(static_cast<const uint16_t*>(p.weight) + at) + (error >> 15));
    return {(Floats)((upper << 16) | ((Ints)error & 0xFFFF)),
            (Floats)((upper & UPPER) | (Ints)_mm512_srli_epi32((__m512i)error, 16))};
  }
  static void store(const Piece& p, int64_t at, Floats (&weights)[QUARTERS], uint64_t,
                    const Drawn&) {
    make_known(weights);
    for (int k = 0; k < QUARTERS; k += 2, at += GROUP / 2) {
      const Ints even = (Ints)weights[k], odd = (Ints)weights[k + 1];
      stored((even & 0xFFFF) | (odd << 16), static_cast<int16_t*>(p.error) + at);
      store_upper(even + 0x8000, odd + 0x8000, static_cast<uint16_t*>(p.weight) + at);
    }
  }
};

// Where rounding could carry to infinity, or would make one of a NaN.
constexpr int32_t STORABLE_BF16 = 0x7F7F0000;

// The order in which numbers lie in memory.
inline void in_line(const float* quarters, float* to) {
  for (int i = 0; i < GROUP; ++i) to[i] = quarters[i / 32 * 32 + i % 2 * PAIRS + i % 32 / 2];
}

struct StochasticWeight : Weight16 {
  static Two load(const Piece& p, int64_t at) { return widened(memory(p, at)); }
  static void store(const Piece& p, int64_t at, const Floats (&weights)[QUARTERS], uint64_t word,
                    const Drawn& drawn) {
    Ints top = all(0);
    for (int k = 0; k < QUARTERS; ++k) top = larger(top, (Ints)magnitude(weights[k]));
    if (__builtin_expect(_mm512_cmpgt_epi32_mask((__m512i)top, (__m512i)all(STORABLE_BF16)), 0)) {
      float sorted[GROUP];
      uint32_t bits[GROUP];
      in_line(reinterpret_cast<const float*>(weights), sorted);
      draw(word, GROUP, bits);
      return store_at_random<BF16>(sorted, bits, GROUP, memory(p, at));
    }
    store_drawn(weights, all(word), drawn, memory(p, at));
  }

 private:
  static uint16_t* memory(const Piece& p, int64_t at) {
    return static_cast<uint16_t*>(p.weight) + at;
  }
};

// A gap of 8 bits in groups, or of 16.
template <LineKind KIND> struct Gap;

template <> struct Gap<LINE_INT8> {
  static bool usual(const Piece& p, int64_t at) {  // no NaN, which is the code -128
    const __m512i nan = _mm512_set1_epi8(-128);
    __mmask64 found = 0;
    for (int i = 0; i < BATCH; i += GROUP)
      found |= _mm512_cmpeq_epi8_mask(_mm512_loadu_si512(codes(p, at + i)), nan);
    return !found;
  }
  // Codes are decoded 16 bits further up; no scale is so small that this would round.
  static void find_units(const Piece& p, int64_t group, float (&units)[GROUPS]) {
    for (int g = 0; g < GROUPS; ++g)
      units[g] = number_of(static_cast<uint32_t>(p.scales_before[group + g]) << 16) * 0x1p-16f;
  }
  static Two load(const Piece& p, int64_t at, Floats unit) {
    const Shorts code = bytes(codes(p, at));
    const Ints value = (Ints)(code * ((code < 0 ? -code : code) + 32));
    return {floats(value << 16) * unit, floats(value & UPPER) * unit};
  }
  struct Scales {
    alignas(16) float unit[GROUPS], inverse[GROUPS], part[GROUPS], twice[GROUPS];
  };
  // Of `encode`, for groups that are all here.
  static Scales scales_of(const Piece& p, int64_t group, __m128i tops) {
    const __m128 least =
        _mm_max_ps(_mm_div_ps(_mm_castsi128_ps(tops), _mm_set1_ps(20193.0f)), _mm_set1_ps(0x1p-100f));
    const __m128i found =
        _mm_srli_epi32(_mm_add_epi32(_mm_castps_si128(least), _mm_set1_epi32(0xFFFF)), 16);
    const __m128 unit = _mm_castsi128_ps(_mm_slli_epi32(found, 16));
    const __m128i halves = _mm_packus_epi32(found, found);
    std::memcpy(p.scales + group, &halves, GROUPS * sizeof(uint16_t));
    Scales scales;
    _mm_store_ps(scales.unit, unit);
    _mm_store_ps(scales.inverse, _mm_div_ps(_mm_set1_ps(1.0f), unit));
    _mm_store_ps(scales.part, _mm_mul_ps(unit, _mm_set1_ps(0x1p-24f)));
    _mm_store_ps(scales.twice, _mm_mul_ps(unit, _mm_set1_ps(0x1p-23f)));
    return scales;
  }
  // Of `encode`, for a whole group of finite numbers; see there for what is exact.
  struct Constants {
    Ints magnitude = held(all(static_cast<int32_t>(MAGNITUDE))), random = held(all(0xFFFFFF)),
         one = held(all(1));
    Drawn drawn;
    Bytes64 bytes;
  };
  static void store(const Piece& p, int64_t at, const Scales& scales, int g, const float* values,
                    uint64_t word, const Constants& constants) {
    const Floats unit = all(scales.unit[g]), inverse = all(scales.inverse[g]),
                 part = all(scales.part[g]), twice = all(scales.twice[g]);
    const Longs first = all(word);
    Ints signs[QUARTERS], roots[QUARTERS];
    for (int k = 0; k < QUARTERS; ++k) {
      const Ints value = loaded<Ints>(values + k * PAIRS);
      const Floats x = (Floats)(value & constants.magnitude);
      const Floats near = x * inverse;
      const Floats quotient = once(once(-near, unit, x), inverse, near);
      const Ints r = truncated(root(quotient + 256.0f));
      const Floats whole = floats(r);
      const Floats beyond = once(-once(whole, whole, all(-256.0f)), unit, x);
      const Floats step = once(whole, twice, part);
      const Floats chance = floats(constants.drawn(first, k) & constants.random);
      const __mmask16 up = _mm512_cmp_ps_mask((__m512)beyond, (__m512)(chance * step), _CMP_GT_OQ);
      roots[k] = (Ints)_mm512_mask_add_epi32((__m512i)r, up, (__m512i)r, (__m512i)constants.one);
      signs[k] = value;
    }
    const __m512i zero = _mm512_setzero_si512();
    const __m512i code = _mm512_sub_epi8(constants.bytes.of<0>(roots), _mm512_set1_epi8(16));
    const __mmask64 negative = _mm512_movepi8_mask(constants.bytes.of<3>(signs));
    stored(in_order(_mm512_mask_sub_epi8(code, negative, zero, code)), codes(p, at));
  }
  static constexpr int32_t STORABLE = static_cast<int32_t>(INFINITE) - 1;
  static void store_rare(const Piece& p, int64_t at, int64_t group, const float* values, uint64_t word) {
    encode<GROUP>(values, word, GROUP, 0.0f, codes(p, at), p.scales + group);
  }

 private:
  static int8_t* codes(const Piece& p, int64_t at) { return static_cast<int8_t*>(p.line) + at; }
};

template <> struct Gap<LINE_BF16> {
  static bool usual(const Piece&, int64_t) { return true; }
  static void find_units(const Piece&, int64_t, float (&)[GROUPS]) {}
  static Two load(const Piece& p, int64_t at, Floats) { return widened(line(p, at)); }
  struct Scales {};
  static Scales scales_of(const Piece&, int64_t, __m128i) { return {}; }
  struct Constants {
    Drawn drawn;
  };
  static void store(const Piece& p, int64_t at, const Scales&, int, const float* values,
                    uint64_t word, const Constants& constants) {
    Floats four[QUARTERS];
    for (int k = 0; k < QUARTERS; ++k) four[k] = loaded<Floats>(values + k * PAIRS);
    store_drawn(four, all(word), constants.drawn, line(p, at));
  }
  static constexpr int32_t STORABLE = STORABLE_BF16;
  static void store_rare(const Piece& p, int64_t at, int64_t, const float* values, uint64_t word) {
    uint32_t drawn[GROUP];
    draw(word, GROUP, drawn);
    store_at_random<BF16>(values, drawn, GROUP, line(p, at));
  }

 private:
  static uint16_t* line(const Piece& p, int64_t at) { return static_cast<uint16_t*>(p.line) + at; }
};

// Factors of the gradient: one for each group.
using FusedBatch = bool (*)(const Piece&, int64_t at, int64_t group, const float* factors,
                            const Draws& draws);

template <typename Line>
void store_rare(const Piece& p, int64_t at, int64_t group, const float* values, uint64_t word) {
  float sorted[GROUP];
  in_line(values, sorted);
  Line::store_rare(p, at, group, sorted, word);
}

// Schedule-Free, as `schedule_free` has it. False: not usual, and nothing done.
template <typename Weight, typename Line, bool DECAYS>
bool fused_batch(const Piece& p, int64_t at, int64_t group, const float* factors,
                 const Draws& draws) {
  if (!Line::usual(p, at)) return false;
  const Floats lr = all(p.a), average = all(p.b), direct = all(p.c), keep = all(p.d),
               decay = all(p.e);
  alignas(64) float gaps[BATCH];
  float units[GROUPS] = {};
  const typename Line::Constants constants;
  Line::find_units(p, group, units);
  Ints tops[GROUPS];
  for (int g = 0; g < GROUPS; ++g) {
    const Floats scale = all(factors[g]), unit = all(units[g]);
    const int64_t from = at + g * GROUP;
    Floats weights[QUARTERS];
    Ints top = all(0);
    const auto moved = [&](int k, Floats weight, Floats gradient, Floats gap) {
      Floats update = gradient * scale;
      if (DECAYS) update = update + decay * weight;
      gap = gap + lr * update;
      weight = weight - average * gap;
      weights[k] = weight - direct * update;
      gap = keep * gap;
      stored(gap, gaps + g * GROUP + k * PAIRS);
      top = larger(top, (Ints)magnitude(gap));
    };
    for (int k = 0; k < QUARTERS; k += 2) {
      const int64_t here = from + k * PAIRS;
      const Two weight = Weight::load(p, here), gap = Line::load(p, here, unit),
                gradient = Weight::gradient(p, here);
      moved(k, weight.even, gradient.even, gap.even);
      moved(k + 1, weight.odd, gradient.odd, gap.odd);
    }
    Weight::store(p, from, weights, draws.weight + g * GROUP * GAMMA, constants.drawn);
    tops[g] = top;
  }
  // apart, so that the way from the largest number to the scale is not waited for
  alignas(16) int32_t largest_here[GROUPS];
  const __m128i together = largest(tops);
  stored(together, largest_here);
  const auto scales = Line::scales_of(p, group, together);
  for (int g = 0; g < GROUPS; ++g) {
    const float* values = gaps + g * GROUP;
    const uint64_t first = draws.line + g * GROUP * GAMMA;
    if (__builtin_expect(largest_here[g] <= Line::STORABLE, 1))
      Line::store(p, at + g * GROUP, scales, g, values, first, constants);
    else
      store_rare<Line>(p, at + g * GROUP, group + g, values, first);
  }
  return true;
}

template <typename Weight, typename Line> inline FusedBatch with_decay(const Piece& p) {
  return p.decays ? fused_batch<Weight, Line, true> : fused_batch<Weight, Line, false>;
}

template <typename Weight> inline FusedBatch with_line(const Piece& p) {
  if (p.line_kind == LINE_INT8) return with_decay<Weight, Gap<LINE_INT8>>(p);
  return p.line_kind == LINE_BF16 ? with_decay<Weight, Gap<LINE_BF16>>(p) : nullptr;
}

inline FusedBatch fused_for(const Piece& p) {
  if (p.rule != 0 || p.elementwise || p.column_scale || p.scales_gradient ||
      p.gradient_format != p.weight_format)
    return nullptr;
  if (p.weight_format == FP32) return with_line<PlainWeight>(p);
  if (p.weight_format != BF16) return nullptr;
  if (p.weight_kind == STOCHASTIC) return with_line<StochasticWeight>(p);
  if (p.weight_kind != SPLIT) return nullptr;
  return p.error_bits == 8 ? with_line<SplitWeight<8>>(p) : with_line<SplitWeight<16>>(p);
}

#else

using FusedBatch = bool (*)(const Piece&, int64_t, int64_t, const float*, const Draws&);
inline FusedBatch fused_for(const Piece&) { return nullptr; }

#endif

}  // namespace amsf
