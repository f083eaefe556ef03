// What Python hands over: one Piece for every parameter in a tensor, and its tiles. The layout of
// these structs is that of TILE and PIECE in table.py.
#pragma once

#include "storages.h"

namespace amsf {

// Of kernels/tiles.py.
struct Tile {
  int64_t start, stop;     // of the flat line
  int64_t first_block;     // of the piece's blocks
  int64_t num_blocks;      // that share the numbers equally
  int64_t place;           // in the parameter's line of the first number; those after it follow
  int64_t first_group;     // of the tensor's scales
  int64_t column;          // factored: of the piece's columns
  int32_t phase;           // numbers of the first group before the tile
  int32_t first_shared;    // index of the first group's peak, -1: none
  int32_t last_shared;
  int32_t unused;
};

struct Piece {
  const Tile* tiles;
  int64_t num_tiles;
  int64_t num_blocks;
  int64_t num_columns;            // factored, else 0
  void* weight;
  void* error;                    // of the weight's storage
  const void* gradient;
  void* line;
  uint16_t* scales;               // of groups
  const uint16_t* scales_before;  // to read with
  const float* peaks;
  float* moments;                 // [num_blocks], of elements [numel]
  float* sums;                    // [num_blocks], of elements [1]
  float* column_sums;             // factored: [num_columns], else null
  float* whole_sum;               // factored: [1]
  float* column_moments;          // factored: [num_columns]
  float* whole_moment;            // factored: [1]
  float* scale;                   // [num_blocks] factor of the gradient
  float* column_scale;            // factored: [num_columns], else null
  uint64_t weight_family, line_family;
  int64_t step;
  // coefficients of the rule, in the order of its fields that `move` uses
  float a, b, c, d, e;
  float carry2, fresh2, inverse_correction2, eps;
  float block_numel, column_numel, whole_numel, factor;
  Format gradient_format, weight_format;
  WeightKind weight_kind;
  int32_t error_bits;
  LineKind line_kind;
  int32_t rule;           // 0 schedule_free, 1 ema
  int32_t decays, clips_blocks, elementwise, scaled, scales_gradient;
};

// What the number at a place of the parameter's line is rounded with, and those behind it.
struct Draws {
  uint64_t weight, line;  // keys of this step
  int64_t place;

  Draws ahead(int64_t numbers) const { return {weight, line, place + numbers}; }
};

inline Draws draws_of(const Piece& p, const Tile& tile) {
  return {key_of(p.weight_family, p.step), key_of(p.line_family, p.step), tile.place};
}

// No more threads than there is work for: waking one takes as long as some 10,000 numbers.
inline int threads_for(const Piece* pieces, int64_t count, int64_t most) {
  int64_t numel = 0;
  for (int64_t p = 0; p < count; ++p)
    if (pieces[p].num_tiles)
      numel += pieces[p].tiles[pieces[p].num_tiles - 1].stop - pieces[p].tiles[0].start;
  const int64_t enough = 1 + numel / 32768;
  return static_cast<int>(most < enough ? most : enough);
}

}  // namespace amsf
