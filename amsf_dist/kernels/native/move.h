// Second moments, weights and lines (docs/algorithm.md (2), (3), (6) to (8), (10), (11), (14)): what
// kernels/move.py does, in batches that stay in the first-level cache. Every stage is a loop over
// a batch, in the order of operations of the reference, compiled without contraction. The usual
// settings take another way where they can: fused.h.
#pragma once

#include <algorithm>
#include <vector>

#include "fused.h"

namespace amsf {

struct alignas(64) Batch {
  float gradient[BATCH], scale[BATCH], weight[BATCH], line[BATCH];
  Drawn16 drawn;
  Drawn17 drawn17;
};

inline void block_scale(const Piece& p, float* moment, float mean_sq, float* scale) {
  *moment = p.carry2 * *moment + p.fresh2 * mean_sq;
  const float root = std::sqrt(*moment * p.inverse_correction2);
  *scale = 1.0f / (root + p.eps);
}

inline float clipped(float scale, float mean_sq) {
  const float limit = 1.0f / std::sqrt(mean_sq);
  return scale < limit ? scale : limit;
}

inline void scale_block(const Piece& piece, int64_t block) {
  const float mean_sq = piece.sums[block] / piece.block_numel;
  block_scale(piece, piece.moments + block, mean_sq, piece.scale + block);
  if (piece.clips_blocks) piece.scale[block] = clipped(piece.scale[block], mean_sq);
}

// Rows and columns, each with a factor: `factored.scales_`. The matrix is one block to clip.
inline void scale_matrix(const Piece& piece) {
  // without eps an all-zero row would be 0 times infinity
  const auto finite = [](float factor) { return is_finite(factor) ? factor : 0.0f; };
  const float mean_sq = *piece.whole_sum / piece.whole_numel;
  float mean, limit = 1.0f;
  block_scale(piece, piece.whole_moment, mean_sq, &mean);
  if (piece.clips_blocks) {
    limit = 1.0f / std::sqrt(mean_sq) / mean;
    if (limit > 1.0f) limit = 1.0f;
  }
  for (int64_t row = 0; row < piece.num_blocks; ++row) {
    float scale;
    block_scale(piece, piece.moments + row, piece.sums[row] / piece.block_numel, &scale);
    piece.scale[row] = finite(scale / mean);
  }
  for (int64_t column = 0; column < piece.num_columns; ++column) {
    float& scale = piece.column_scale[column];
    const float squares = piece.column_sums[column] / piece.column_numel;
    block_scale(piece, piece.column_moments + column, squares, &scale);
    if (piece.clips_blocks) scale *= limit;
    scale = finite(scale);
  }
}

// The factor of every number's gradient.
inline void spread_scale(const Piece& p, const Tile& tile, int64_t at, int n, Batch& batch) {
  if (p.elementwise) {
    float* __restrict moments = p.moments + tile.first_block + (at - tile.start);
    float* __restrict scale = batch.scale;
    for (int i = 0; i < n; ++i) {
      block_scale(p, moments + i, batch.gradient[i] * batch.gradient[i], scale + i);
    }
    if (p.clips_blocks)
      for (int i = 0; i < n; ++i)
        scale[i] = clipped(scale[i], batch.gradient[i] * batch.gradient[i]);
    return;
  }
  const int64_t numel = (tile.stop - tile.start) / tile.num_blocks;
  int64_t block = (at - tile.start) / numel, inside = (at - tile.start) % numel;
  for (int i = 0; i < n; ++block, inside = 0) {
    const int64_t left = numel - inside;
    const int end = left < n - i ? i + static_cast<int>(left) : n;
    const float scale = p.scale[tile.first_block + block];
    if (p.column_scale) {
      const float* __restrict columns = p.column_scale + tile.column + inside - i;
      for (int k = i; k < end; ++k) batch.scale[k] = scale * columns[k];
    } else {
      for (int k = i; k < end; ++k) batch.scale[k] = scale;
    }
    i = end;
  }
}

// (6) to (8): a lr, b average, c direct, d keep, e decay. `scale` may be a number or one for each.
template <bool DECAYS, typename Scale>
inline void schedule_free(const Piece& p, int64_t n, const float* __restrict gradient, Scale scale,
                          float* __restrict weights, float* __restrict gaps) {
  const float lr = p.a, average = p.b, direct = p.c, keep = p.d, decay = p.e;
  for (int64_t i = 0; i < n; ++i) {
    float weight = weights[i];
    float update = gradient[i] * (lr * scale(i));
    if (DECAYS) update = update + decay * weight;
    const float gap = gaps[i] + update;
    weight = weight - average * gap;
    weights[i] = weight - direct * update;
    gaps[i] = keep * gap;
  }
}

// (10), (11): a lr, b keep, c forget1, d fresh1.
template <bool DECAYS, typename Scale>
inline void ema(const Piece& p, int64_t n, const float* __restrict gradient, Scale scale,
                float* __restrict weights, float* __restrict lines) {
  const float lr = p.a, keep = p.b, forget1 = p.c, fresh1 = p.d;
  for (int64_t i = 0; i < n; ++i) {
    float weight = weights[i];
    const float line = lines[i] + (fresh1 * gradient[i] - forget1 * lines[i]);
    if (DECAYS) weight = keep * weight;
    weights[i] = weight - lr * (line * scale(i));
    lines[i] = line;
  }
}

template <typename Scale>
inline void move_numbers(const Piece& p, int64_t n, const float* gradient, Scale scale,
                         float* weights, float* lines) {
  if (p.rule == 0 && p.decays)
    schedule_free<true>(p, n, gradient, scale, weights, lines);
  else if (p.rule == 0)
    schedule_free<false>(p, n, gradient, scale, weights, lines);
  else if (p.decays)
    ema<true>(p, n, gradient, scale, weights, lines);
  else
    ema<false>(p, n, gradient, scale, weights, lines);
}

// All in fp32, a factor per block, and one per column where factored: one loop over the memory
// itself, which is then never waited for.
inline bool in_place(const Piece& p) {
  return p.gradient_format == FP32 && p.weight_format == FP32 && p.line_kind == LINE_FP32 &&
         !p.elementwise && !p.scales_gradient;
}

// Of the memory of one block.
struct Span {
  int64_t at, stop;
  float factor;
  const float* columns;
};

// The next numbers of a span.
inline void advance(const Piece& p, Span& span) {
  constexpr int64_t PART = 64, AHEAD = 256;  // numbers; the latter found by trial
  const int64_t at = span.at, n = span.stop - at < PART ? span.stop - at : PART;
  const float* gradients = static_cast<const float*>(p.gradient) + at;
  float* weights = static_cast<float*>(p.weight) + at;
  float* lines = static_cast<float*>(p.line) + at;
  fetch(gradients + AHEAD, PART * sizeof(float));
  fetch(weights + AHEAD, PART * sizeof(float));
  fetch(lines + AHEAD, PART * sizeof(float));
  const float factor = span.factor;
  if (const float* columns = span.columns) {
    const auto scale = [=](int64_t i) { return factor * columns[i]; };
    move_numbers(p, n, gradients, scale, weights, lines);
    span.columns += n;
  } else {
    const auto scale = [=](int64_t) { return factor; };
    move_numbers(p, n, gradients, scale, weights, lines);
  }
  span.at += n;
}

inline Span span_of(const Piece& p, const Tile& tile, int64_t block, int64_t numel) {
  const int64_t at = tile.start + block * numel;
  const float* columns = p.column_scale ? p.column_scale + tile.column : nullptr;
  return {at, at + numel, p.scale[tile.first_block + block], columns};
}

// Two blocks at a time, or two halves of one: half a tile apart, for which a processor looks further
// ahead than for neighbours.
inline void move_in_place(const Piece& p, const Tile& tile) {
  const int64_t numel = (tile.stop - tile.start) / tile.num_blocks, pairs = tile.num_blocks / 2;
  const int64_t apart = tile.num_blocks - pairs;
  for (int64_t b = 0; b < apart; ++b) {
    Span first = span_of(p, tile, b, numel), second = first;
    if (b < pairs) {
      second = span_of(p, tile, b + apart, numel);
    } else {
      first.stop = second.at = first.at + numel / 2;
      if (second.columns) second.columns += numel / 2;
    }
    while (first.at < first.stop || second.at < second.stop) {
      if (first.at < first.stop) advance(p, first);
      if (second.at < second.stop) advance(p, second);
    }
  }
}

template <Format F> inline void load_weight_16(const Piece& p, int64_t at, int n, float* to) {
  const uint16_t* weight = static_cast<const uint16_t*>(p.weight) + at;
  if (p.weight_kind == KAHAN) {
    load_kahan<F>(weight, static_cast<const uint16_t*>(p.error) + at, n, to);
  } else if (p.weight_kind == SPLIT && p.error_bits == 8) {
    load_split<F, int8_t, 8>(weight, static_cast<const int8_t*>(p.error) + at, n, to);
  } else if (p.weight_kind == SPLIT) {
    load_split<F, int16_t, LOW_BITS[F]>(weight, static_cast<const int16_t*>(p.error) + at, n, to);
  } else {
    load_16<F>(weight, n, to);
  }
}

template <Format F>
inline void store_weight_16(const Piece& p, int64_t at, int n, const Draws& draws, Batch& batch) {
  uint16_t* weight = static_cast<uint16_t*>(p.weight) + at;
  if (p.weight_kind == KAHAN) {
    store_kahan<F>(batch.weight, n, weight, static_cast<uint16_t*>(p.error) + at);
  } else if (p.weight_kind == SPLIT && p.error_bits == 8) {
    store_split<F, int8_t, 8>(batch.weight, n, weight, static_cast<int8_t*>(p.error) + at);
  } else if (p.weight_kind == SPLIT) {
    store_split<F, int16_t, LOW_BITS[F]>(batch.weight, n, weight,
                                         static_cast<int16_t*>(p.error) + at);
  } else if (p.weight_kind == STOCHASTIC) {
    store_at_random<F>(batch.weight, batch.drawn.at(draws.weight, draws.place, n), n, weight);
  } else {
    store_16<F>(batch.weight, n, weight);
  }
}

// Numbers [i, i + size) of the batch lie in one group.
template <typename Take>
inline void by_group(const Tile& tile, int64_t at, int n, Take take) {
  const int64_t before = at - tile.start + tile.phase;
  int64_t group = tile.first_group + before / GROUP;
  int size = GROUP - static_cast<int>(before % GROUP);
  for (int i = 0; i < n; i += size, ++group, size = GROUP) {
    if (size > n - i) size = n - i;
    take(i, size, group);
  }
}

inline void load_line(const Piece& p, const Tile& tile, int64_t at, int n, float* to) {
  if (p.line_kind == LINE_FP32) return load_plain(FP32, p.line, at, n, to);
  if (p.line_kind == LINE_BF16) return load_plain(BF16, p.line, at, n, to);
  const int8_t* codes = static_cast<const int8_t*>(p.line) + at;
  by_group(tile, at, n, [&](int i, int size, int64_t group) {
    if (size == GROUP)
      decode<GROUP>(codes + i, size, p.scales_before[group], to + i);
    else
      decode<0>(codes + i, size, p.scales_before[group], to + i);
  });
}

inline void store_line(const Piece& p, const Tile& tile, int64_t at, int n, const Draws& draws,
                       Batch& batch) {
  if (p.line_kind == LINE_FP32) {
    std::memcpy(static_cast<float*>(p.line) + at, batch.line, n * sizeof(float));
    return;
  }
  if (p.line_kind == LINE_BF16) {
    const uint16_t* bits = batch.drawn.at(draws.line, draws.place, n);
    store_at_random<BF16>(batch.line, bits, n, static_cast<uint16_t*>(p.line) + at);
    return;
  }
  const uint32_t* bits = batch.drawn17.at(draws.line, draws.place, n);
  int8_t* codes = static_cast<int8_t*>(p.line) + at;
  const int64_t last =
      tile.first_group + (tile.stop - tile.start + tile.phase - 1) / GROUP;
  by_group(tile, at, n, [&](int i, int size, int64_t group) {
    float peak = 0.0f;
    if (group == tile.first_group && tile.first_shared >= 0) peak = p.peaks[tile.first_shared];
    if (group == last && tile.last_shared >= 0 && p.peaks[tile.last_shared] > peak)
      peak = p.peaks[tile.last_shared];
    const float* values = batch.line + i;
    if (size == GROUP)
      encode<GROUP>(values, bits + i, size, peak, codes + i, p.scales + group);
    else
      encode<0>(values, bits + i, size, peak, codes + i, p.scales + group);
  });
}

// Of one number, in each of the memories that a step reads.
struct Bytes {
  int gradient, weight, error, line;
};

inline Bytes bytes_of(const Piece& p) {
  const int error = p.weight_kind == KAHAN ? 2 : p.weight_kind == SPLIT ? p.error_bits / 8 : 0;
  const int line = p.line_kind == LINE_FP32 ? 4 : p.line_kind == LINE_BF16 ? 2 : 1;
  return {p.gradient_format == FP32 ? 4 : 2, p.weight_format == FP32 ? 4 : 2, error, line};
}

inline void fetch_ahead(const Piece& p, int64_t at, const Bytes& bytes) {
  fetch(static_cast<const char*>(p.gradient) + at * bytes.gradient, BATCH * bytes.gradient);
  fetch(static_cast<const char*>(p.weight) + at * bytes.weight, BATCH * bytes.weight);
  if (bytes.error)
    fetch(static_cast<const char*>(p.error) + at * bytes.error, BATCH * bytes.error);
  fetch(static_cast<const char*>(p.line) + at * bytes.line, BATCH * bytes.line);
}

inline void move_stages(const Piece& p, const Tile& tile, int64_t at, int n, const Draws& draws,
                       Batch& batch) {
  load_plain(p.gradient_format, p.gradient, at, n, batch.gradient);
  if (p.scales_gradient)
    for (int i = 0; i < n; ++i) batch.gradient[i] *= p.factor;
  spread_scale(p, tile, at, n, batch);
  if (p.weight_format == FP32)
    load_plain(FP32, p.weight, at, n, batch.weight);
  else if (p.weight_format == BF16)
    load_weight_16<BF16>(p, at, n, batch.weight);
  else
    load_weight_16<FP16>(p, at, n, batch.weight);
  load_line(p, tile, at, n, batch.line);

  const float* scale = batch.scale;
  move_numbers(
      p, n, batch.gradient, [=](int64_t i) { return scale[i]; }, batch.weight, batch.line);

  if (p.weight_format == FP32)
    std::memcpy(static_cast<float*>(p.weight) + at, batch.weight, n * sizeof(float));
  else if (p.weight_format == BF16)
    store_weight_16<BF16>(p, at, n, draws, batch);
  else
    store_weight_16<FP16>(p, at, n, draws, batch);
  store_line(p, tile, at, n, draws, batch);
}

// `later`: what this thread measures next, if that can be known.
inline void move_tile(const Piece& p, const Tile& tile, Later later = {}) {
  if (in_place(p)) return move_in_place(p, tile);
  Batch batch;
  const Draws draws = draws_of(p, tile);
  const Bytes bytes = bytes_of(p);
  const Fused fused = fused_for(p);
  Pipeline pipeline;
  pipeline.later = &later;
  for (int64_t at = tile.start; at < tile.stop;) {
    const bool cut = at == tile.start && tile.phase;  // later batches begin where groups do
    if (fused.move && !cut) {
      at = fused.move(p, tile, at, draws, pipeline);
      if (at == tile.stop) break;
    }
    int n = cut ? BATCH - tile.phase : BATCH;
    if (tile.stop - at < n) n = static_cast<int>(tile.stop - at);
    fetch_ahead(p, at + 2 * BATCH, bytes);
    move_stages(p, tile, at, n, draws.ahead(at - tile.start), batch);
    at += n;
  }
  if (fused.finish) fused.finish(p, draws, pipeline);
}

// The tiles of all pieces, one after another.
struct Tiles {
  const Piece* pieces;
  std::vector<int64_t> ends;  // tiles up to and with every piece

  Tiles(const Piece* them, int64_t count) : pieces(them), ends(count) {
    int64_t total = 0;
    for (int64_t p = 0; p < count; ++p) ends[p] = total += pieces[p].num_tiles;
  }
  int64_t count() const { return ends.empty() ? 0 : ends.back(); }
  template <typename Take> void take(int64_t tile, Take with) const {
    const size_t p = std::upper_bound(ends.begin(), ends.end(), tile) - ends.begin();
    with(pieces[p], pieces[p].tiles[tile - (ends[p] - pieces[p].num_tiles)]);
  }
};

inline void move(const Piece* pieces, int64_t count, int threads) {
  const Tiles tiles(pieces, count);
  const int64_t total = tiles.count();
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic, 8)
    for (int64_t p = 0; p < count; ++p) {
      const Piece& piece = pieces[p];
      if (piece.elementwise || piece.scaled) continue;
      if (piece.num_columns)
        scale_matrix(piece);
      else
        for (int64_t b = 0; b < piece.num_blocks; ++b) scale_block(piece, b);
    }
    // from the end: the gradients that were measured last may still be in a cache
#pragma omp for schedule(dynamic, 1)
    for (int64_t job = 0; job < total; ++job) {
      tiles.take(total - 1 - job, [](const Piece& p, const Tile& tile) { move_tile(p, tile); });
    }
  }
}

}  // namespace amsf
