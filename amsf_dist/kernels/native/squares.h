// Sums of squares of neighbours: one read of the gradient.
#pragma once

#include <vector>

#include "tensors.h"

namespace amsf {

typedef float Lanes __attribute__((vector_size(64)));
constexpr int WIDTH = 16;
constexpr int64_t FLUSH = 4096;  // numbers whose squares are added in fp32 before fp64 takes over

// [from, from + 16) as fp32, of fp32 and bf16: what fp16 takes is no single instruction.
template <Format F> inline Lanes widened(const void* numbers, int64_t from);
template <> inline Lanes widened<FP32>(const void* numbers, int64_t from) {
  Lanes x;
  std::memcpy(&x, static_cast<const float*>(numbers) + from, sizeof x);
  return x;
}
template <> inline Lanes widened<BF16>(const void* numbers, int64_t from) {
  alignas(64) float x[WIDTH];
  load_16<BF16>(static_cast<const uint16_t*>(numbers) + from, WIDTH, x);
  return widened<FP32>(x, 0);
}

template <Format F> inline float single(const void* numbers, int64_t i) {
  return F == FP32 ? static_cast<const float*>(numbers)[i]
                   : widen<BF16>(static_cast<const uint16_t*>(numbers)[i]);
}

// Where factored (COLUMNS), added to the sums of the columns as well.
template <Format F, bool COLUMNS>
inline Lanes square(const void* numbers, int64_t from, float* columns) {
  const Lanes x = widened<F>(numbers, from), squared = x * x;
  if (COLUMNS) {
    Lanes sums;
    std::memcpy(&sums, columns, sizeof sums);
    sums += squared;
    std::memcpy(columns, &sums, sizeof sums);
  }
  return squared;
}

// Squares added in 64 lanes, always the same ones for the same place in a run: no thread count, and
// no instruction set, changes a sum. Not an array: that would live in memory.
struct Sums {
  Lanes a = {}, b = {}, c = {}, d = {};
};

template <Format F, bool COLUMNS>
inline void add_64(const void* numbers, int64_t at, float* columns, Sums& sums) {
  constexpr int64_t SIZE = F == FP32 ? 4 : 2, AHEAD = 1024;  // bytes, the latter found by trial
  const auto column = [=](int i) { return COLUMNS ? columns + i * WIDTH : nullptr; };
  sums.a += square<F, COLUMNS>(numbers, at, column(0));
  sums.b += square<F, COLUMNS>(numbers, at + WIDTH, column(1));
  sums.c += square<F, COLUMNS>(numbers, at + 2 * WIDTH, column(2));
  sums.d += square<F, COLUMNS>(numbers, at + 3 * WIDTH, column(3));
  fetch(static_cast<const char*>(numbers) + at * SIZE + AHEAD, 4 * WIDTH * SIZE);
}

// At most FLUSH neighbours.
struct Run {
  int64_t at, stop;
};

// With the sums of what lies before the run. `columns` are those of its numbers.
template <Format F, bool COLUMNS>
inline double finished(const void* numbers, Run run, float* columns, Sums& sums) {
  int64_t at = run.at;
  const auto column = [&] { return COLUMNS ? columns + (at - run.at) : nullptr; };
  for (; at + 4 * WIDTH <= run.stop; at += 4 * WIDTH)
    add_64<F, COLUMNS>(numbers, at, column(), sums);
  for (; at + WIDTH <= run.stop; at += WIDTH)
    sums.a += square<F, COLUMNS>(numbers, at, column());
  float rest = 0.0f;
  for (; at < run.stop; ++at) {
    const float squared = single<F>(numbers, at) * single<F>(numbers, at);
    if (COLUMNS) *column() += squared;
    rest += squared;
  }
  const Lanes all = (sums.a + sums.b) + (sums.c + sums.d);
  float lanes[WIDTH];
  std::memcpy(lanes, &all, sizeof all);
  for (int half = WIDTH / 2; half; half /= 2)
    for (int k = 0; k < half; ++k) lanes[k] += lanes[k + half];
  return static_cast<double>(lanes[0] + rest);
}

// Sum of n squares; each is added to its column as well, if there are any.
template <Format F>
inline double squares_of(const void* numbers, int64_t at, int64_t n, float* columns) {
  double total = 0.0;
  for (int64_t from = at; from < at + n; from += FLUSH) {
    const Run run = {from, at + n - from < FLUSH ? at + n : from + FLUSH};
    Sums sums;
    total += columns ? finished<F, true>(numbers, run, columns + (from - at), sums)
                     : finished<F, false>(numbers, run, nullptr, sums);
  }
  return total;
}

// Four runs at a time, far apart: what looks ahead in a processor looks further for four streams
// than for one. The sums are those of each run alone.
template <Format F>
inline void squares_of_runs(const void* numbers, const std::vector<Run>& runs, double* totals) {
  const size_t count = runs.size(), quarter = count / 4;
  for (size_t r = 0; r < quarter; ++r) {
    Run run[4];
    int64_t together = FLUSH;
    for (int k = 0; k < 4; ++k) {
      run[k] = runs[r + k * quarter];
      const int64_t numel = run[k].stop - run[k].at;
      if (numel < together) together = numel;
    }
    together -= together % (4 * WIDTH);
    Sums a, b, c, d;
    for (int64_t i = 0; i < together; i += 4 * WIDTH) {
      add_64<F, false>(numbers, run[0].at + i, nullptr, a);
      add_64<F, false>(numbers, run[1].at + i, nullptr, b);
      add_64<F, false>(numbers, run[2].at + i, nullptr, c);
      add_64<F, false>(numbers, run[3].at + i, nullptr, d);
    }
    for (int k = 0; k < 4; ++k) run[k].at += together;
    totals[r] = finished<F, false>(numbers, run[0], nullptr, a);
    totals[r + quarter] = finished<F, false>(numbers, run[1], nullptr, b);
    totals[r + 2 * quarter] = finished<F, false>(numbers, run[2], nullptr, c);
    totals[r + 3 * quarter] = finished<F, false>(numbers, run[3], nullptr, d);
  }
  for (size_t r = 4 * quarter; r < count; ++r) {
    Sums sums;
    totals[r] = finished<F, false>(numbers, runs[r], nullptr, sums);
  }
}

}  // namespace amsf
