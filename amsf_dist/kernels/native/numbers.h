// Numbers between their formats: amsf_dist/storage/wide.py, and the casts of torch, to the bit.
//
// Everything here is one number in, one number out, without branches, so that a compiler makes
// vectors of it and a number's result never depends on whether it lay in a vector or behind the last.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace amsf {

enum Format : int32_t { FP32 = 0, BF16 = 1, FP16 = 2 };

inline uint32_t pattern_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float number_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

constexpr uint32_t MAGNITUDE = 0x7FFFFFFFu;
constexpr uint32_t INFINITE = 0x7F800000u;

inline bool is_nan(float value) { return (pattern_of(value) & MAGNITUDE) > INFINITE; }
inline bool is_finite(float value) { return (pattern_of(value) & MAGNITUDE) < INFINITE; }

// Of fp16: 1-5-23 patterns, fp32's mantissa below fp16's exponent.
constexpr int32_t REBIAS = (127 - 15) << 23;
constexpr int32_t SMALLEST_NORMAL = 1 << 23;
constexpr int32_t WIDE_INFINITY = 31 << 23;
constexpr int32_t WIDE_SIGN = 1 << 28;

constexpr int LOW_BITS[3] = {0, 16, 13};
constexpr int32_t QUIET_NAN[3] = {0, 0x7FC0 << 16, 0x7E00 << 13};

template <Format F> inline int32_t to_wide(float value) {
  int32_t bits = static_cast<int32_t>(pattern_of(value));
  if (F == BF16) return bits;
  int32_t magnitude = bits & static_cast<int32_t>(MAGNITUDE);
  // 2**-14 is 2**23 of these units; what is larger is not asked for
  float units = std::fabs(value) * 0x1p37f;
  units = units < 0x1p24f ? units : 0x1p24f;
  int32_t fixed = static_cast<int32_t>(std::nearbyintf(units));
  int32_t normal = magnitude - REBIAS;
  normal = normal < WIDE_INFINITY ? normal : WIDE_INFINITY;
  magnitude = normal < SMALLEST_NORMAL ? fixed : normal;
  return magnitude | ((bits >> 3) & WIDE_SIGN);
}

template <Format F> inline float from_wide(int32_t wide) {
  if (F == BF16) return number_of(static_cast<uint32_t>(wide));
  int32_t magnitude = wide & (WIDE_SIGN - 1);
  int32_t fixed = static_cast<int32_t>(pattern_of(static_cast<float>(magnitude) * 0x1p-37f));
  int32_t normal = magnitude + REBIAS;
  normal = magnitude < WIDE_INFINITY ? normal : normal + REBIAS;
  int32_t bits = magnitude < SMALLEST_NORMAL ? fixed : normal;
  uint32_t sign = static_cast<uint32_t>(wide & WIDE_SIGN) << 3;
  return number_of(static_cast<uint32_t>(bits) | sign);
}

// As memory has it, to fp32: exact.
template <Format F> inline float widen(uint16_t bits) {
  return from_wide<F>(static_cast<int32_t>(static_cast<uint32_t>(bits) << LOW_BITS[F]));
}

// The nearest of the format, the even one of two: what `.to(dtype)` gives.
template <Format F> inline uint16_t narrow(float value) {
  uint32_t bits = pattern_of(value);
  if (F == BF16) {
    uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>(is_nan(value) ? 0x7FC0u : rounded);
  }
  // fp16's rounding is made to happen in an fp32 addition, subnormals included (Maratyszcza, FP16)
  float base = (std::fabs(value) * 0x1p112f) * 0x1p-110f;
  uint32_t twice = bits + bits;
  uint32_t bias = twice & 0xFF000000u;
  bias = bias < 0x71000000u ? 0x71000000u : bias;
  uint32_t sum = pattern_of(number_of((bias >> 1) + 0x07800000u) + base);
  uint32_t found = ((sum >> 13) & 0x7C00u) + (sum & 0x0FFFu);
  return static_cast<uint16_t>(((bits >> 16) & 0x8000u) | (twice > 0xFF000000u ? 0x7E00u : found));
}

}  // namespace amsf
