// Measure and move in one pass, for blocks that decide for themselves (docs/algorithm.md, "Non-finite
// gradients"): a tile is moved as soon as it is measured, with its gradients in a cache.
//
// Every block lies in one tile, and so does every group that shares a scale (kernels/native/table.py).
#pragma once

#include <atomic>

#include "measure.h"
#include "move.h"

namespace amsf {

// A tile's block as a tile of its own.
inline Tile block_of(const Tile& tile, int64_t block) {
  const int64_t numel = (tile.stop - tile.start) / tile.num_blocks, before = block * numel;
  Tile part = tile;
  part.start = tile.start + before, part.stop = part.start + numel;
  part.first_block = tile.first_block + block, part.num_blocks = 1;
  part.place = tile.place + before, part.first_group = tile.first_group + before / GROUP;
  return part;
}

// The gradients of a tile.
inline Later gradients_of(const Piece& piece, const Tile& tile) {
  const int64_t size = bytes_of(piece).gradient;
  const char* first = static_cast<const char*>(piece.gradient);
  return {first + tile.start * size, first + tile.stop * size};
}

// Whether every block's gradient was finite; one whose is not stays as it is.
inline bool step_tile(const Piece& piece, const Tile& tile, const Later& later) {
  Strip strip = {&piece, &tile - piece.tiles, &tile - piece.tiles + 1};
  measure_strip(strip, nullptr);
  if (tile.num_blocks == 1) piece.sums[tile.first_block] += static_cast<float>(strip.sum);
  const auto finite = [&](int64_t b) { return is_finite(piece.sums[tile.first_block + b]); };
  bool all = true;
  for (int64_t b = 0; b < tile.num_blocks; ++b) {
    if (finite(b)) scale_block(piece, tile.first_block + b);
    else all = false;
  }
  if (all) {
    move_tile(piece, tile, later);
  } else {
    for (int64_t b = 0; b < tile.num_blocks; ++b)
      if (finite(b)) move_tile(piece, block_of(tile, b));
  }
  return all;
}

inline bool step(const Piece* pieces, int64_t count, int threads) {
  const Tiles tiles(pieces, count);
  const int64_t total = tiles.count();
  std::atomic<bool> all{true};
  std::atomic<int64_t> next{0};
  // Every thread knows its next tile, and asks for its gradients while it moves the one before:
  // measuring waits for memory, moving for arithmetic.
#pragma omp parallel num_threads(threads)
  for (int64_t tile = next++, after; tile < total; tile = after) {
    after = next++;
    Later later;
    if (after < total)
      tiles.take(after, [&](const Piece& p, const Tile& t) { later = gradients_of(p, t); });
    tiles.take(tile, [&](const Piece& p, const Tile& t) {
      if (!step_tile(p, t, later)) all = false;
    });
  }
  return all;
}

}  // namespace amsf
