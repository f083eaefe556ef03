// Storages: memory to fp32 numbers and back, as the files of amsf_dist/storage/ have it, to the bit.
#pragma once

#include "numbers.h"

namespace amsf {

constexpr int BATCH = 256;  // numbers taken at once: a handful of arrays in the first-level cache
constexpr int GROUP = 64;   // storage/grouped.py

enum WeightKind : int32_t { PLAIN = 0, SPLIT = 1, KAHAN = 2, STOCHASTIC = 3 };
enum LineKind : int32_t { LINE_FP32 = 0, LINE_BF16 = 1, LINE_INT8 = 2 };

// Ask for memory before it is needed: a step waits for it, and hardware looks less far ahead. What is
// needed soon is asked for the outer caches (LOCALITY 1): of the few requests that the first level
// keeps open, none is taken. What is needed late did not arrive that way (3: all caches).
template <int LOCALITY = 1> inline void fetch(const void* from, int64_t bytes) {
  const char* first = static_cast<const char*>(from);
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(first + at, 0, LOCALITY);
}

// Memory that a thread will read when it is done with a tile, asked for bit by bit while it works.
struct Later {
  const char *at = nullptr, *stop = nullptr;

  // Where the next bytes are; somewhere known where there are no more.
  const char* next(int64_t bytes, const char* else_where) {
    if (at >= stop) return else_where;
    at += bytes;
    return at - bytes;
  }
};

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

// Of the eight numbers at this place, the first of them.
inline uint64_t word_at(uint64_t key, int64_t place) {
  return key + static_cast<uint64_t>(place >> 3) * GAMMA;
}

// Random bits of n neighbours from `place` on, 16 or 17 each, which are where the pointer returned
// points to.
template <int COUNT, typename Bits> struct DrawnBits {
  Bits bits[BATCH + 16];

  const Bits* at(uint64_t key, int64_t place, int n) {
    const int before = static_cast<int>(place & 7), words = (before + n + 7) / 8;
    const uint64_t first = word_at(key, place);
    for (int i = 0; i < words; ++i) {
      const uint64_t word = mix64(first + static_cast<uint64_t>(i) * GAMMA);
      const uint64_t rotated = word << 8 | word >> 56;
      for (int k = 0; k < 8; ++k) {
        const int shift = 16 * (k % 4) - (COUNT == 17 ? k % 2 : 0);
        bits[8 * i + k] = static_cast<Bits>((k < 4 ? word : rotated) >> shift & ((1u << COUNT) - 1u));
      }
    }
    return bits + before;
  }
};
using Drawn16 = DrawnBits<16, uint16_t>;
using Drawn17 = DrawnBits<17, uint32_t>;

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

constexpr int CUT_BITS = 17;
constexpr int32_t TOP_CODE = 127 << CUT_BITS;
constexpr int32_t LIMIT = 0x7F000000;           // 2**127
constexpr int32_t SMALLEST_SCALE = 0x0D800000;  // 2**-100
constexpr float THIRD = 1.0f / 3.0f;

// N: numbers of the group here, 0 when only known at run time.
template <int N>
inline void decode(const int8_t* __restrict codes, int numel, uint16_t scale, float* __restrict to) {
  const int n = N ? N : numel;
  const uint32_t first = static_cast<uint32_t>(scale) << 16;
  for (int i = 0; i < n; ++i) {
    const uint32_t code = static_cast<uint32_t>(static_cast<int32_t>(codes[i]));
    const uint32_t sign = code & ~MAGNITUDE;
    const uint32_t raised = ((code & 127u) << CUT_BITS) + first;
    to[i] = number_of(raised | sign) - number_of(first | sign);
  }
}

// Of the largest magnitude's pattern, below LIMIT, the scale's.
inline int32_t scale_of(int32_t top) {
  const float absmax = number_of(static_cast<uint32_t>(top));
  const int32_t third = static_cast<int32_t>(pattern_of(absmax * THIRD));
  const uint32_t above = static_cast<uint32_t>((third + ((2 << CUT_BITS) - 1)) >> CUT_BITS)
                         << CUT_BITS;
  const float reached = number_of(above + TOP_CODE) - number_of(above);
  const int32_t found = static_cast<int32_t>(above) + (reached < absmax ? 1 << CUT_BITS : 0);
  return found < SMALLEST_SCALE ? SMALLEST_SCALE : found;
}

template <int N>
inline void encode(const float* __restrict values, const uint32_t* __restrict bits, int numel,
                   float peak, int8_t* __restrict codes, uint16_t* __restrict scale) {
  const int n = N ? N : numel;
  int32_t top = static_cast<int32_t>(pattern_of(peak));
  for (int i = 0; i < n; ++i) {
    const int32_t magnitude = static_cast<int32_t>(pattern_of(values[i]) & MAGNITUDE);
    top = top > magnitude ? top : magnitude;
  }
  if (top >= LIMIT) {  // no scale serves
    *scale = 0x7FC0;
    std::memset(codes, 0, n);
    return;
  }
  const uint32_t first = static_cast<uint32_t>(scale_of(top));
  *scale = static_cast<uint16_t>(first >> 16);
  for (int i = 0; i < n; ++i) {
    const uint32_t sign = pattern_of(values[i]) & ~MAGNITUDE;
    const uint32_t place = pattern_of(values[i] + number_of(first | sign)) - first + bits[i];
    const int32_t code = static_cast<int32_t>(place >> CUT_BITS) & 127;
    codes[i] = static_cast<int8_t>(code ? code | static_cast<int32_t>(sign >> 24) : 0);
  }
}

}  // namespace amsf
