// A group of 64 numbers in four vectors, for fused.h.
#pragma once

#include "tensors.h"
#include "vectors.h"

#ifdef AMSF_VECTORS

namespace amsf {

// Four vectors of a group: numbers at even and odd places of its first half, then of its second.
constexpr int QUARTERS = 4;

constexpr int GROUPS = BATCH / GROUP;

// Where rounding could carry to infinity, or would make one of a NaN.
constexpr int32_t STORABLE_BF16 = 0x7F7F0000;

// The order in which numbers lie in memory.
inline void in_line(const float* quarters, float* to) {
  for (int i = 0; i < GROUP; ++i) to[i] = quarters[i / 32 * 32 + i % 2 * PAIRS + i % 32 / 2];
}

inline Floats farthest(const Floats (&values)[QUARTERS]) {
  return farther(farther(values[0], values[1]), farther(values[2], values[3]));
}

// Numbers of a group, rounded to bf16 at random.
inline void store_drawn(const Floats (&values)[QUARTERS], const GroupWords& words,
                        uint16_t* to) {
  for (int k = 0; k < QUARTERS; k += 2, to += GROUP / 2) {
    const Bits bits = words.half(k / 2);
    store_upper((Ints)values[k] + bits.even(), (Ints)values[k + 1] + bits.odd(), to);
  }
}

}  // namespace amsf
#endif
