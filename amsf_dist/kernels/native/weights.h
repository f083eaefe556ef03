// Weights for fused.h: what storages.h does, for a group at a time.
#pragma once

#include "groups.h"

#ifdef AMSF_VECTORS

namespace amsf {

// Whether there is a NaN. A comparison of two vectors finds it in either.
inline bool any_nan(const Floats (&weights)[QUARTERS]) {
  return _mm512_cmp_ps_mask((__m512)weights[0], (__m512)weights[1], _CMP_UNORD_Q) |
         _mm512_cmp_ps_mask((__m512)weights[2], (__m512)weights[3], _CMP_UNORD_Q);
}

// Makes of it what the weight's format has, and tells.
inline bool make_known(Floats (&weights)[QUARTERS]) {
  const bool found = any_nan(weights);
  if (__builtin_expect(found, 0))
    for (int k = 0; k < QUARTERS; ++k)
      weights[k] = weights[k] == weights[k] ? weights[k] : (Floats)all(QUIET_NAN[BF16]);
  return found;
}

// Weights, and gradients of the same dtype. `store` tells whether something was rare: a NaN, which a
// gap that is one makes of its weight too, or weights that `store_rare` has to store, put aside.
struct PlainWeight {
  struct Constants {};
  static constexpr int SIZE = 4, ERROR_SIZE = 0;
  using RareBits = Drawn16;
  static void store_rare(const Piece&, int64_t, int64_t, const float*, const uint16_t*) {}
  static Two gradient(const Piece& p, int64_t at) {
    return parted(static_cast<const float*>(p.gradient) + at);
  }
  static Two load(const Piece& p, int64_t at) {
    return parted(static_cast<const float*>(p.weight) + at);
  }
  static bool store(const Piece& p, int64_t at, const Floats (&weights)[QUARTERS], uint64_t, float*,
                    const Constants&) {
    float* to = static_cast<float*>(p.weight) + at;
    store_joined(weights[0], weights[1], to);
    store_joined(weights[2], weights[3], to + GROUP / 2);
    return any_nan(weights);
  }
};

struct Weight16 {
  static constexpr int SIZE = 2, ERROR_SIZE = 0;
  using RareBits = Drawn16;
  static void store_rare(const Piece&, int64_t, int64_t, const float*, const uint16_t*) {}
  static Two gradient(const Piece& p, int64_t at) {
    return widened(static_cast<const uint16_t*>(p.gradient) + at);
  }
};

template <int KEPT> struct SplitWeight;

template <> struct SplitWeight<8> : Weight16 {
  struct Constants {
    SecondBytes bytes;
  };
  static constexpr int ERROR_SIZE = 1;
  static Two load(const Piece& p, int64_t at) {
    const Shorts error = bytes(static_cast<const int8_t*>(p.error) + at);
    const Ints both = loaded<Ints>(static_cast<const uint16_t*>(p.weight) + at);
    return {(Floats)plus_products(both << 16, error, all(0x00000100)),
            (Floats)plus_products(both & UPPER, error, all(0x01000000))};
  }
  static bool store(const Piece& p, int64_t at, Floats (&weights)[QUARTERS], uint64_t, float*,
                    const Constants& constants) {
    const bool nan = make_known(weights);
    // Rounded to even at the last byte, and 0x8000 more: what a signed byte takes away or adds is a
    // carry from its highest bit, which is then the other one.
    Ints sums[QUARTERS];
    for (int k = 0; k < QUARTERS; ++k) {
      const __m512i weight = (__m512i)weights[k];
      const __mmask16 odd = _mm512_test_epi32_mask(weight, (__m512i)all(0x100));
      const __m512i down = _mm512_add_epi32(weight, (__m512i)all(0x807F));
      sums[k] = (Ints)_mm512_mask_add_epi32(down, odd, weight, (__m512i)all(0x8080));
    }
    const __m512i error = _mm512_xor_si512(constants.bytes(sums), _mm512_set1_epi8(-128));
    stored(error, static_cast<int8_t*>(p.error) + at);
    uint16_t* to = static_cast<uint16_t*>(p.weight) + at;
    store_upper(sums[0], sums[1], to);
    store_upper(sums[2], sums[3], to + GROUP / 2);
    return nan;
  }
};

// The upper halves of 32 numbers, from which a negative error takes one.
inline Ints less_borrow(const uint16_t* weights, Shorts error) {
  return (Ints)_mm512_add_epi16(loaded<__m512i>(weights), (__m512i)(error >> 15));
}

template <> struct SplitWeight<16> : Weight16 {
  struct Constants {};
  static constexpr int ERROR_SIZE = 2;
  static Two load(const Piece& p, int64_t at) {
    const Shorts error = loaded<Shorts>(static_cast<const int16_t*>(p.error) + at);
    const Ints upper = less_borrow(static_cast<const uint16_t*>(p.weight) + at, error);
    return {(Floats)((upper << 16) | ((Ints)error & 0xFFFF)),
            (Floats)((upper & UPPER) | (Ints)_mm512_srli_epi32((__m512i)error, 16))};
  }
  static bool store(const Piece& p, int64_t at, Floats (&weights)[QUARTERS], uint64_t, float*,
                    const Constants&) {
    const bool nan = make_known(weights);
    for (int k = 0; k < QUARTERS; k += 2, at += GROUP / 2) {
      const Ints even = (Ints)weights[k], odd = (Ints)weights[k + 1];
      stored((even & 0xFFFF) | (odd << 16), static_cast<int16_t*>(p.error) + at);
      store_upper(even + 0x8000, odd + 0x8000, static_cast<uint16_t*>(p.weight) + at);
    }
    return nan;
  }
};

struct StochasticWeight : Weight16 {
  struct Constants {
    Drawn drawn;
  };
  static Two load(const Piece& p, int64_t at) { return widened(memory(p, at)); }
  static bool store(const Piece& p, int64_t at, const Floats (&weights)[QUARTERS], uint64_t word,
                    float* aside, const Constants& constants) {
    const Ints top = (Ints)farthest(weights);
    const __mmask16 large = _mm512_cmpgt_epi32_mask((__m512i)top, (__m512i)all(STORABLE_BF16));
    const bool rare = any_nan(weights) | large;
    if (__builtin_expect(rare, 0))
      for (int k = 0; k < QUARTERS; ++k) stored(weights[k], aside + k * PAIRS);
    store_drawn(weights, constants.drawn(word), memory(p, at));
    return rare;
  }
  static void store_rare(const Piece& p, int64_t at, int64_t, const float* values,
                         const uint16_t* bits) {
    store_at_random<BF16>(values, bits, GROUP, memory(p, at));
  }

 private:
  static uint16_t* memory(const Piece& p, int64_t at) {
    return static_cast<uint16_t*>(p.weight) + at;
  }
};

}  // namespace amsf
#endif
