// Block sums of squares (docs/algorithm.md (2)): one read of the gradient.
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

// Added in 64 lanes, always the same ones for the same place in [at, at + n): no thread count, and
// no instruction set, changes a sum.
template <Format F, bool COLUMNS>
inline double squares_of(const void* numbers, int64_t at, int64_t n, float* __restrict sums) {
  constexpr int64_t SIZE = F == FP32 ? 4 : 2;
  constexpr int64_t AHEAD = F == FP32 ? 1024 : 8192;  // bytes, of a prefetch: found by trial
  const auto columns = [=](int64_t i) { return COLUMNS ? sums + (i - at) : nullptr; };
  double total = 0.0;
  for (int64_t from = at; from < at + n; from += FLUSH) {
    const int64_t stop = at + n - from < FLUSH ? at + n : from + FLUSH;
    Lanes a = {}, b = {}, c = {}, d = {};  // not an array: that would live in memory
    int64_t i = from;
    for (; i + 4 * WIDTH <= stop; i += 4 * WIDTH) {
      a += square<F, COLUMNS>(numbers, i, columns(i));
      b += square<F, COLUMNS>(numbers, i + WIDTH, columns(i + WIDTH));
      c += square<F, COLUMNS>(numbers, i + 2 * WIDTH, columns(i + 2 * WIDTH));
      d += square<F, COLUMNS>(numbers, i + 3 * WIDTH, columns(i + 3 * WIDTH));
      fetch(static_cast<const char*>(numbers) + i * SIZE + AHEAD, 4 * WIDTH * SIZE);
    }
    for (; i + WIDTH <= stop; i += WIDTH) a += square<F, COLUMNS>(numbers, i, columns(i));
    float rest = 0.0f;
    for (; i < stop; ++i) {
      const float squared = single<F>(numbers, i) * single<F>(numbers, i);
      if (COLUMNS) *columns(i) += squared;
      rest += squared;
    }
    const Lanes all = (a + b) + (c + d);
    float lanes[WIDTH];
    std::memcpy(lanes, &all, sizeof all);
    for (int half = WIDTH / 2; half; half /= 2)
      for (int k = 0; k < half; ++k) lanes[k] += lanes[k + half];
    total += static_cast<double>(lanes[0] + rest);
  }
  return total;
}

template <Format F>
inline double squares_in(const void* numbers, int64_t at, int64_t n, float* columns) {
  return columns ? squares_of<F, true>(numbers, at, n, columns)
                 : squares_of<F, false>(numbers, at, n, nullptr);
}

// Sum of n squares; each is added to its column as well, if there are any.
inline double squares_at(const Piece& piece, int64_t at, int64_t n, float* columns) {
  if (piece.gradient_format == FP32) return squares_in<FP32>(piece.gradient, at, n, columns);
  if (piece.gradient_format == BF16) return squares_in<BF16>(piece.gradient, at, n, columns);
  alignas(64) float numbers[FLUSH];
  double total = 0.0;
  for (int64_t from = 0; from < n; from += FLUSH) {
    const int part = static_cast<int>(n - from < FLUSH ? n - from : FLUSH);
    load_plain(FP16, piece.gradient, at + from, part, numbers);
    total += squares_in<FP32>(numbers, 0, part, columns ? columns + from : nullptr);
  }
  return total;
}

// Tiles that are measured together: their sums of columns share a row of the scratch.
struct Strip {
  const Piece* piece;
  int64_t first, stop;     // tiles
  int64_t columns = 0, scratch = 0;
  double sum = 0.0;        // of the one block, where a tile has no more
};

inline void measure_strip(Strip& strip, float* scratch) {
  const Piece& piece = *strip.piece;
  for (int64_t t = strip.first; t < strip.stop; ++t) {
    const Tile& tile = piece.tiles[t];
    if (piece.elementwise) {
      strip.sum = squares_at(piece, tile.start, tile.stop - tile.start, nullptr);
      return;
    }
    const int64_t numel = (tile.stop - tile.start) / tile.num_blocks;
    for (int64_t b = 0; b < tile.num_blocks; ++b) {
      const int64_t at = tile.start + b * numel;
      const double sum =
          squares_at(piece, at, numel, strip.columns ? scratch + strip.scratch : nullptr);
      if (tile.num_blocks > 1)
        piece.sums[tile.first_block + b] += static_cast<float>(sum);
      else
        strip.sum = sum;  // other tiles may have other parts of the block
    }
  }
}

inline void measure(const Piece* pieces, int64_t count, int threads) {
  constexpr int64_t STRIP = 16;
  std::vector<Strip> strips;
  int64_t scratch_numel = 0;
  for (int64_t p = 0; p < count; ++p) {
    const Piece& piece = pieces[p];
    for (int64_t t = 0; t < piece.num_tiles;) {
      Strip strip;
      strip.piece = &piece, strip.first = t, strip.stop = t + 1;
      const Tile& tile = piece.tiles[t];
      if (piece.column_sums) {
        strip.columns = (tile.stop - tile.start) / tile.num_blocks;
        strip.scratch = scratch_numel;
        scratch_numel += strip.columns;
        for (; strip.stop < piece.num_tiles && strip.stop < t + STRIP; ++strip.stop) {
          const Tile& next = piece.tiles[strip.stop];
          const bool whole = tile.num_blocks > 1 && next.num_blocks > 1;
          const int64_t columns = (next.stop - next.start) / next.num_blocks;
          if (!whole || next.column != tile.column || columns != strip.columns) break;
        }
      }
      t = strip.stop;
      strips.push_back(strip);
    }
  }
  std::vector<float> scratch(scratch_numel);
  const int64_t num_strips = static_cast<int64_t>(strips.size());
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t s = 0; s < num_strips; ++s) measure_strip(strips[s], scratch.data());

  for (const Strip& strip : strips) {  // what several strips add to, in their order
    const Piece& piece = *strip.piece;
    const Tile& tile = piece.tiles[strip.first];
    if (strip.columns) {
      double whole = 0.0;
      const float* columns = scratch.data() + strip.scratch;
      for (int64_t i = 0; i < strip.columns; ++i) {
        piece.column_sums[tile.column + i] += columns[i];
        whole += static_cast<double>(columns[i]);
      }
      *piece.whole_sum += static_cast<float>(whole);
    }
    if (piece.elementwise || tile.num_blocks == 1) {
      piece.sums[piece.elementwise ? 0 : tile.first_block] += static_cast<float>(strip.sum);
    }
  }
}

}  // namespace amsf
