// Block sums of squares (docs/algorithm.md (2)): one read of the gradient.
#pragma once

#include <vector>

#include "squares.h"

namespace amsf {

// Tiles that are measured together: their sums of columns share a row of the scratch.
struct Strip {
  const Piece* piece;
  int64_t first, stop;     // tiles
  int64_t columns = 0, scratch = 0;
  double sum = 0.0;        // of the one block, where a tile has no more
  bool finite = true;

  // Elements' own sums are their squares: one tells whether all are finite.
  int64_t num_sums(const Tile& tile) const { return piece->elementwise ? 1 : tile.num_blocks; }
  void add(const Tile& tile, int64_t block, double squares) {
    if (num_sums(tile) > 1)
      finite &= is_finite(piece->sums[tile.first_block + block] += static_cast<float>(squares));
    else
      sum += squares;  // other tiles may have other parts of the block
  }
};

// Blocks of a tile one after another, each with its columns if there are any.
template <Format F> inline void measure_rows(Strip& strip, const Tile& tile, float* columns) {
  const Piece& piece = *strip.piece;
  const int64_t num_sums = strip.num_sums(tile), numel = (tile.stop - tile.start) / num_sums;
  for (int64_t b = 0; b < num_sums; ++b) {
    const int64_t at = tile.start + b * numel;
    double sum = 0.0;
    if constexpr (F != FP16) {
      sum = squares_of<F>(piece.gradient, at, numel, columns);
    } else {
      alignas(64) float widened[FLUSH];
      for (int64_t from = 0; from < numel; from += FLUSH) {
        const int part = static_cast<int>(numel - from < FLUSH ? numel - from : FLUSH);
        load_plain(FP16, piece.gradient, at + from, part, widened);
        sum += squares_of<FP32>(widened, 0, part, columns ? columns + from : nullptr);
      }
    }
    strip.add(tile, b, sum);
  }
}

// Blocks of a tile, four runs of its numbers at a time.
template <Format F> inline void measure_runs(Strip& strip, const Tile& tile) {
  const int64_t num_sums = strip.num_sums(tile), numel = (tile.stop - tile.start) / num_sums;
  const int64_t each = (numel + FLUSH - 1) / FLUSH;
  std::vector<Run> runs;
  runs.reserve(each * num_sums);
  for (int64_t at = tile.start; at < tile.stop; at += numel)
    for (int64_t from = at; from < at + numel; from += FLUSH)
      runs.push_back({from, at + numel - from < FLUSH ? at + numel : from + FLUSH});
  std::vector<double> totals(runs.size());
  squares_of_runs<F>(strip.piece->gradient, runs, totals.data());
  for (int64_t b = 0; b < num_sums; ++b) {
    double sum = 0.0;
    for (int64_t k = b * each; k < (b + 1) * each; ++k) sum += totals[k];
    strip.add(tile, b, sum);
  }
}

inline void measure_strip(Strip& strip, float* scratch) {
  const Piece& piece = *strip.piece;
  float* columns = strip.columns ? scratch + strip.scratch : nullptr;
  for (int64_t t = strip.first; t < strip.stop; ++t) {
    const Tile& tile = piece.tiles[t];
    if (piece.gradient_format == FP16)
      measure_rows<FP16>(strip, tile, columns);
    else if (piece.gradient_format == FP32)
      columns ? measure_rows<FP32>(strip, tile, columns) : measure_runs<FP32>(strip, tile);
    else
      columns ? measure_rows<BF16>(strip, tile, columns) : measure_runs<BF16>(strip, tile);
  }
}

// Whether every sum is finite.
inline bool measure(const Piece* pieces, int64_t count, int threads) {
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

  bool finite = true;
  for (const Strip& strip : strips) {  // what several strips add to, in their order
    finite &= strip.finite;
    const Piece& piece = *strip.piece;
    const Tile& tile = piece.tiles[strip.first];
    if (strip.columns) {
      double whole = 0.0;
      const float* columns = scratch.data() + strip.scratch;
      for (int64_t i = 0; i < strip.columns; ++i) {
        finite &= is_finite(piece.column_sums[tile.column + i] += columns[i]);
        whole += static_cast<double>(columns[i]);
      }
      finite &= is_finite(*piece.whole_sum += static_cast<float>(whole));
    }
    if (piece.elementwise || tile.num_blocks == 1) {
      float& sum = piece.sums[piece.elementwise ? 0 : tile.first_block];
      finite &= is_finite(sum += static_cast<float>(strip.sum));
    }
  }
  return finite;
}

}  // namespace amsf
