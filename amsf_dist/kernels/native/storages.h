// Storages: memory to fp32 numbers and back, as the files of amsf_dist/storage/ have it, to the bit.
#pragma once

#include "numbers.h"

namespace amsf {

constexpr int BATCH = 256;  // numbers taken at once: a handful of arrays in the first-level cache
constexpr int GROUP = 64;   // storage/grouped.py

enum WeightKind : int32_t { PLAIN = 0, SPLIT = 1, KAHAN = 2, STOCHASTIC = 3 };
enum LineKind : int32_t { LINE_FP32 = 0, LINE_BF16 = 1, LINE_INT8 = 2 };

// Ask for memory before it is needed: a step waits for it, and hardware looks less far ahead. Into
// the second level of caches: of the few requests that the first level keeps open, none is taken.
inline void fetch(const void* from, int64_t bytes) {
  const char* first = static_cast<const char*>(from);
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(first + at, 0, 1);
}

// ---- draws: storage/noise.py -------------------------------------------------------------------

constexpr uint64_t GAMMA = 0x9E3779B97F4A7C15u;

inline uint64_t mix64(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

// What the words of one step begin with.
inline uint64_t key_of(uint64_t family, int64_t step) {
  return mix64(static_cast<uint64_t>(step) * GAMMA + family + GAMMA) + GAMMA;
}

// Of the four numbers at this place, the first of them.
inline uint64_t word_at(uint64_t key, int64_t place) {
  return key + static_cast<uint64_t>(place >> 2) * GAMMA;
}

// Random bits of n neighbours from `place` on, which are where the pointer returned points to.
struct Drawn16 {
  uint16_t bits[BATCH + 8];

  const uint16_t* at(uint64_t key, int64_t place, int n) {
    const int before = static_cast<int>(place & 3), words = (before + n + 3) / 4;
    const uint64_t first = word_at(key, place);
    for (int i = 0; i < words; ++i) {
      const uint64_t word = mix64(first + static_cast<uint64_t>(i) * GAMMA);
      for (int k = 0; k < 4; ++k) bits[4 * i + k] = static_cast<uint16_t>(word >> 16 * k);
    }
    return bits + before;
  }
};

// ---- plain -------------------------------------------------------------------------------------

template <Format F> inline void load_16(const uint16_t* __restrict from, int n, float* __restrict to) {
  for (int i = 0; i < n; ++i) to[i] = widen<F>(from[i]);
}

inline void load_plain(Format format, const void* from, int64_t at, int n, float* __restrict to) {
  if (format == FP32) {
    std::memcpy(to, static_cast<const float*>(from) + at, n * sizeof(float));
  } else if (format == BF16) {
    load_16<BF16>(static_cast<const uint16_t*>(from) + at, n, to);
  } else {
    load_16<FP16>(static_cast<const uint16_t*>(from) + at, n, to);
  }
}

template <Format F>
inline void store_16(const float* __restrict from, int n, uint16_t* __restrict to) {
  for (int i = 0; i < n; ++i) to[i] = narrow<F>(from[i]);
}

// ---- split: integer error bits -----------------------------------------------------------------

template <Format F, typename Error, int KEPT>
inline void load_split(const uint16_t* __restrict weight, const Error* __restrict error, int n,
                       float* __restrict to) {
  for (int i = 0; i < n; ++i) {
    int32_t wide = static_cast<int32_t>(static_cast<int16_t>(weight[i]));
    wide = wide * (1 << KEPT) + static_cast<int32_t>(error[i]);
    uint32_t all = static_cast<uint32_t>(wide) << (LOW_BITS[F] - KEPT);
    to[i] = from_wide<F>(static_cast<int32_t>(all));
  }
}

template <Format F, typename Error, int KEPT>
inline void store_split(const float* __restrict from, int n, uint16_t* __restrict weight,
                        Error* __restrict error) {
  constexpr int DROPPED = LOW_BITS[F] - KEPT;
  for (int i = 0; i < n; ++i) {
    int32_t wide = is_nan(from[i]) ? QUIET_NAN[F] : to_wide<F>(from[i]);
    if (DROPPED) {
      uint32_t odd = (static_cast<uint32_t>(wide) >> DROPPED) & 1u;
      uint32_t sum = static_cast<uint32_t>(wide) + odd + ((1u << DROPPED) / 2 - 1);
      wide = static_cast<int32_t>(sum) >> DROPPED;
    }
    int32_t low = static_cast<int32_t>(static_cast<uint32_t>(wide) << (32 - KEPT)) >> (32 - KEPT);
    uint32_t rest = static_cast<uint32_t>(wide) - static_cast<uint32_t>(low);
    error[i] = static_cast<Error>(low);
    weight[i] = static_cast<uint16_t>(rest >> KEPT);
  }
}

// ---- kahan: the same dtype beside it -----------------------------------------------------------

template <Format F>
inline void load_kahan(const uint16_t* __restrict weight, const uint16_t* __restrict lacking, int n,
                       float* __restrict to) {
  for (int i = 0; i < n; ++i) to[i] = widen<F>(weight[i]) + widen<F>(lacking[i]);
}

template <Format F>
inline void store_kahan(const float* __restrict from, int n, uint16_t* __restrict weight,
                        uint16_t* __restrict lacking) {
  for (int i = 0; i < n; ++i) {
    uint16_t rounded = narrow<F>(from[i]);
    float excess = widen<F>(rounded) - from[i];
    excess = is_finite(excess) ? excess : 0.0f;
    weight[i] = rounded;
    lacking[i] = narrow<F>(-excess);
  }
}

// ---- stochastic --------------------------------------------------------------------------------

template <Format F>
inline void store_at_random(const float* __restrict from, const uint16_t* __restrict bits, int n,
                            uint16_t* __restrict to) {
  const float largest = F == BF16 ? number_of(0x7F7F0000u) : 65504.0f;
  for (int i = 0; i < n; ++i) {
    uint32_t noise = bits[i] & ((1u << LOW_BITS[F]) - 1u);
    uint32_t wide = static_cast<uint32_t>(to_wide<F>(from[i])) + noise;
    uint16_t near = narrow<F>(from[i]);
    bool inside = std::fabs(from[i]) <= largest;
    to[i] = inside ? static_cast<uint16_t>(wide >> LOW_BITS[F]) : near;
  }
}

// ---- int8 in groups: storage/grouped.py --------------------------------------------------------

// N: numbers of the group here, 0 when only known at run time.
template <int N>
inline void decode(const int8_t* __restrict codes, int numel, uint16_t scale, float* __restrict to) {
  const int n = N ? N : numel;
  const float unit = number_of(static_cast<uint32_t>(scale) << 16);
  for (int i = 0; i < n; ++i) {
    int32_t c = codes[i];
    int32_t magnitude = c < 0 ? -c : c;
    float value = static_cast<float>(c * (magnitude + 32)) * unit;
    to[i] = c == -128 ? number_of(0x7FC00000u) : value;
  }
}

// a * b + c where the product needs no rounding: the same with and without the instruction.
inline float exactly(float a, float b, float c) {
#ifdef __FP_FAST_FMAF
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

template <int N>
inline void encode(const float* __restrict values, const uint16_t* __restrict bits, int numel,
                   float peak, int8_t* __restrict codes, uint16_t* __restrict scale) {
  const int n = N ? N : numel;
  int32_t top = 0;
  for (int i = 0; i < n; ++i) {
    const int32_t magnitude = static_cast<int32_t>(pattern_of(values[i]) & MAGNITUDE);
    top = top > magnitude ? top : magnitude;
  }
  const bool all_finite = top < static_cast<int32_t>(INFINITE);
  if (!all_finite) {
    top = 0;
    for (int i = 0; i < n; ++i) {
      const uint32_t magnitude = pattern_of(values[i]) & MAGNITUDE;
      const int32_t finite = static_cast<int32_t>(magnitude < INFINITE ? magnitude : 0u);
      top = top > finite ? top : finite;
    }
  }
  float absmax = number_of(static_cast<uint32_t>(top));
  absmax = absmax > peak ? absmax : peak;
  float least = absmax / 20193.0f;
  least = least < 0x1p-100f ? 0x1p-100f : least;
  const uint32_t found = (pattern_of(least) + 0xFFFFu) >> 16;
  const float unit = number_of(found << 16), inverse = 1.0f / unit, part = unit * 0x1p-17f;
  *scale = static_cast<uint16_t>(found);
  // With r = below + 16: below * (below + 32) = r * r - 256 and the step is (2 r + 1) scales. Both,
  // and their products with the scale, have 23 bits at most, so they are exact in any order.
  for (int i = 0; i < n; ++i) {
    const float x = std::fabs(values[i]);
    const int32_t r = static_cast<int32_t>(std::sqrt(x * inverse + 256.0f));
    const float root = static_cast<float>(r);
    const float beyond = exactly(-exactly(root, root, -256.0f), unit, x);
    const float step = exactly(root, 2.0f, 1.0f) * part;
    const float chance = static_cast<float>(2 * static_cast<int32_t>(bits[i]) + 1);
    int32_t c = r - 16 + (beyond > chance * step ? 1 : 0);
    c = static_cast<int32_t>(pattern_of(values[i])) < 0 ? -c : c;
    codes[i] = static_cast<int8_t>(c);
  }
  if (!all_finite)
    for (int i = 0; i < n; ++i)
      if (!is_finite(values[i])) codes[i] = -128;
}

}  // namespace amsf
