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

template <int KEPT> struct SplitWeight;

template <> struct SplitWeight<8> {
  static Floats load(const Piece& p, int64_t at) {
    const Ints high = halves(static_cast<const uint16_t*>(p.weight) + at) << 16;
    return (Floats)(high + (bytes(static_cast<const int8_t*>(p.error) + at) << 8));
  }
  static void store(const Piece& p, int64_t at, Floats weight) {
    const Ints known = weight == weight ? (Ints)weight : all(QUIET_NAN[BF16]);
    const Ints sum = known + ((known >> 8) & 1) + 0x7F;
    store_bytes(sum >> 8, static_cast<int8_t*>(p.error) + at);
    // what the signed byte takes away or adds is a carry from its highest bit
    store_halves((sum + 0x8000) >> 16, static_cast<uint16_t*>(p.weight) + at);
  }
};

template <> struct SplitWeight<16> {
  static Floats load(const Piece& p, int64_t at) {
    const Ints high = halves(static_cast<const uint16_t*>(p.weight) + at) << 16;
    const Ints low = halves(static_cast<const int16_t*>(p.error) + at) << 16;
    return (Floats)(high + (low >> 16));
  }
  static void store(const Piece& p, int64_t at, Floats weight) {
    const Ints known = weight == weight ? (Ints)weight : all(QUIET_NAN[BF16]);
    store_halves(known, static_cast<int16_t*>(p.error) + at);
    store_halves((known + 0x8000) >> 16, static_cast<uint16_t*>(p.weight) + at);
  }
};

// A gap of 8 bits in groups, or of 16. `state` is of a group.
template <LineKind KIND> struct Gap;

template <> struct Gap<LINE_INT8> {
  static bool usual(const Piece& p, int64_t at) {  // no NaN, which is the code -128
    const __m512i nan = _mm512_set1_epi8(-128);
    __mmask64 found = 0;
    for (int i = 0; i < BATCH; i += GROUP)
      found |= _mm512_cmpeq_epi8_mask(_mm512_loadu_si512(codes(p, at + i)), nan);
    return !found;
  }
  static Floats unit(const Piece& p, int64_t group) {
    return all(number_of(static_cast<uint32_t>(p.scales_before[group]) << 16));
  }
  static Floats load(const Piece& p, int64_t at, Floats unit) {
    const Floats code = floats(bytes(codes(p, at)));
    return code * (magnitude(code) + 32.0f) * unit;  // exact in any order
  }
  // `encode` of a whole group that is all here; see there for what is exact.
  static void store(const Piece& p, int64_t at, int64_t group, const float* values, Ints tops,
                    uint64_t word) {
    const int32_t top = largest(tops);
    if (top >= static_cast<int32_t>(INFINITE))
      return encode<GROUP>(values, word, GROUP, 0.0f, codes(p, at), p.scales + group);
    float least = number_of(static_cast<uint32_t>(top)) / 20193.0f;
    least = least < 0x1p-100f ? 0x1p-100f : least;
    const uint32_t found = (pattern_of(least) + 0xFFFFu) >> 16;
    const float scale = number_of(found << 16);
    const Floats unit = all(scale), inverse = all(1.0f / scale), part = all(scale * 0x1p-24f);
    p.scales[group] = static_cast<uint16_t>(found);
    for (int i = 0; i < GROUP; i += LANES) {
      const Floats value = loaded<Floats>(values + i), x = magnitude(value);
      const Floats near = x * inverse;
      const Floats quotient = once(once(-near, unit, x), inverse, near);
      const Ints r = truncated(root(quotient + 256.0f));
      const Floats whole = floats(r);
      const Floats beyond = once(-once(whole, whole, all(-256.0f)), unit, x);
      const Floats step = once(whole, part + part, part);
      const Floats chance = floats(drawn_at(word, i) & 0xFFFFFF);
      const Ints c = r - 16 - (Ints)(beyond > chance * step);  // true is -1
      store_bytes((Ints)value < 0 ? -c : c, codes(p, at + i));
    }
  }

 private:
  static int8_t* codes(const Piece& p, int64_t at) { return static_cast<int8_t*>(p.line) + at; }
};

template <> struct Gap<LINE_BF16> {
  static bool usual(const Piece&, int64_t) { return true; }
  static Floats unit(const Piece&, int64_t) { return all(1.0f); }
  static Floats load(const Piece& p, int64_t at, Floats) {
    return (Floats)(halves(static_cast<const uint16_t*>(p.line) + at) << 16);
  }
  static void store(const Piece& p, int64_t at, int64_t, const float* values, Ints tops,
                    uint64_t word) {
    uint16_t* to = static_cast<uint16_t*>(p.line) + at;
    if (largest(tops) > 0x7F7F0000) {  // noise could carry it to infinity
      uint32_t drawn[GROUP];
      draw(word, GROUP, drawn);
      return store_at_random<BF16>(values, drawn, GROUP, to);
    }
    for (int i = 0; i < GROUP; i += LANES)
      store_halves((loaded<Ints>(values + i) + (drawn_at(word, i) & 0xFFFF)) >> 16, to + i);
  }
};

// Factors of the gradient: one for each group.
using FusedBatch = bool (*)(const Piece&, int64_t at, int64_t group, const float* factors,
                            uint64_t word);

// Schedule-Free, as `schedule_free` has it. False: not usual, and nothing done.
template <typename Weight, typename Line, bool DECAYS>
bool fused_batch(const Piece& p, int64_t at, int64_t group, const float* factors, uint64_t word) {
  if (!Line::usual(p, at)) return false;
  const Floats lr = all(p.a), average = all(p.b), direct = all(p.c), keep = all(p.d),
               decay = all(p.e);
  alignas(64) float gaps[BATCH];
  Ints tops[BATCH / GROUP];
  for (int g = 0; g < BATCH / GROUP; ++g) {
    const Floats scale = all(factors[g]), unit = Line::unit(p, group + g);
    Ints top = all(0);
    for (int i = g * GROUP; i < (g + 1) * GROUP; i += LANES) {
      Floats weight = Weight::load(p, at + i);
      Floats update = (Floats)(halves(static_cast<const uint16_t*>(p.gradient) + at + i) << 16);
      update = update * scale;
      if (DECAYS) update = update + decay * weight;
      const Floats gap = Line::load(p, at + i, unit) + lr * update;
      weight = weight - average * gap;
      Weight::store(p, at + i, weight - direct * update);
      const Floats kept = keep * gap;
      stored(kept, gaps + i);
      top = larger(top, (Ints)magnitude(kept));
    }
    tops[g] = top;
  }
  // apart, so that the way from the largest number to the scale is not waited for
  for (int g = 0; g < BATCH / GROUP; ++g)
    Line::store(p, at + g * GROUP, group + g, gaps + g * GROUP, tops[g], word + g * GROUP * GAMMA);
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
  if (p.rule != 0 || p.gradient_format != BF16 || p.weight_format != BF16 ||
      p.weight_kind != SPLIT || p.elementwise || p.column_scale || p.scales_gradient)
    return nullptr;
  return p.error_bits == 8 ? with_line<SplitWeight<8>>(p) : with_line<SplitWeight<16>>(p);
}

#else

using FusedBatch = bool (*)(const Piece&, int64_t, int64_t, const float*, uint64_t);
inline FusedBatch fused_for(const Piece&) { return nullptr; }

#endif

}  // namespace amsf
