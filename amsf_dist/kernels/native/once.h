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

// Whether every block's gradient was finite; one whose is not stays as it is.
inline bool step_tile(const Piece& piece, const Tile& tile) {
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
    move_tile(piece, tile);
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
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t tile = 0; tile < total; ++tile)
    tiles.take(tile, [&](const Piece& piece, const Tile& here) {
      if (!step_tile(piece, here)) all = false;
    });
  return all;
}

}  // namespace amsf
