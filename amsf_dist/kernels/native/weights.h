// Weights for fused.h: what storages.h does, for a group at a time.
#pragma once

#include "groups.h"

#ifdef AMSF_VECTORS

namespace amsf {

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
  static constexpr int SIZE = 4, ERROR_SIZE = 0;
  static Two gradient(const Piece& p, int64_t at) {
    return parted(static_cast<const float*>(p.gradient) + at);
  }
  static Two load(const Piece& p, int64_t at) {
    return parted(static_cast<const float*>(p.weight) + at);
  }
  static void store(const Piece& p, int64_t at, const Floats (&weights)[QUARTERS], uint64_t, int64_t,
                    const Drawn&) {
    float* to = static_cast<float*>(p.weight) + at;
    store_joined(weights[0], weights[1], to);
    store_joined(weights[2], weights[3], to + GROUP / 2);
  }
};

struct Weight16 {
  static constexpr int SIZE = 2, ERROR_SIZE = 0;
  static Two gradient(const Piece& p, int64_t at) {
    return widened(static_cast<const uint16_t*>(p.gradient) + at);
  }
};

// The upper halves of 32 numbers, from which a negative error takes one.
inline Ints less_borrow(const uint16_t* weights, Shorts error) {
  return (Ints)_mm512_add_epi16(loaded<__m512i>(weights), (__m512i)(error >> 15));
}

template <int KEPT> struct SplitWeight;

template <> struct SplitWeight<8> : Weight16 {
  static constexpr int ERROR_SIZE = 1;
  static Two load(const Piece& p, int64_t at) {
    const Shorts error = bytes(static_cast<const int8_t*>(p.error) + at);
    const Ints upper = less_borrow(static_cast<const uint16_t*>(p.weight) + at, error);
    const __m512i lower = (__m512i)(error << 8);
    return {(Floats)((upper << 16) | ((Ints)lower & 0xFFFF)),
            (Floats)((upper & UPPER) | (Ints)_mm512_srli_epi32(lower, 16))};
  }
  static void store(const Piece& p, int64_t at, Floats (&weights)[QUARTERS], uint64_t, int64_t,
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
  static constexpr int ERROR_SIZE = 2;
  static Two load(const Piece& p, int64_t at) {
    const Shorts error = loaded<Shorts>(static_cast<const int16_t*>(p.error) + at);
    const Ints upper = less_borrow(static_cast<const uint16_t*>(p.weight) + at, error);
    return {(Floats)((upper << 16) | ((Ints)error & 0xFFFF)),
            (Floats)((upper & UPPER) | (Ints)_mm512_srli_epi32((__m512i)error, 16))};
  }
  static void store(const Piece& p, int64_t at, Floats (&weights)[QUARTERS], uint64_t, int64_t,
                    const Drawn&) {
    make_known(weights);
    for (int k = 0; k < QUARTERS; k += 2, at += GROUP / 2) {
      const Ints even = (Ints)weights[k], odd = (Ints)weights[k + 1];
      stored((even & 0xFFFF) | (odd << 16), static_cast<int16_t*>(p.error) + at);
      store_upper(even + 0x8000, odd + 0x8000, static_cast<uint16_t*>(p.weight) + at);
    }
  }
};

struct StochasticWeight : Weight16 {
  static Two load(const Piece& p, int64_t at) { return widened(memory(p, at)); }
  static void store(const Piece& p, int64_t at, const Floats (&weights)[QUARTERS], uint64_t key,
                    int64_t place, const Drawn& drawn) {
    Ints top = all(0);
    for (int k = 0; k < QUARTERS; ++k) top = larger(top, (Ints)magnitude(weights[k]));
    if (__builtin_expect(_mm512_cmpgt_epi32_mask((__m512i)top, (__m512i)all(STORABLE_BF16)), 0)) {
      float sorted[GROUP];
      Drawn16 rare;
      in_line(reinterpret_cast<const float*>(weights), sorted);
      return store_at_random<BF16>(sorted, rare.at(key, place, GROUP), GROUP, memory(p, at));
    }
    store_drawn(weights, all(word_at(key, place)), drawn, memory(p, at));
  }

 private:
  static uint16_t* memory(const Piece& p, int64_t at) {
    return static_cast<uint16_t*>(p.weight) + at;
  }
};

}  // namespace amsf
#endif
