// The usual settings in one loop, without stages through arrays: Schedule-Free, a factor per block,
// and one per column where factored, gradients of the weights' dtype, gaps in int8 or bf16. The
// same arithmetic as in move.h and storages.h, to the bit.
//
// What is rare goes back to the stages: a batch that is not whole, whose groups are cut by blocks,
// or that begins within eight numbers that share a random word; a new gap that is not finite. So the
// loops here have no branches.
#pragma once

#include "gaps.h"
#include "weights.h"

namespace amsf {

// Of the gradients of a batch: one for each group, and one for each number where factored.
struct Factors {
  float blocks[BATCH / GROUP];
  const float* columns[BATCH / GROUP];
};

// Of a whole batch, the factors of each group; false where a group is cut by a block or by the tile.
inline bool factors_of(const Piece& p, const Tile& tile, int64_t at, Factors& factors) {
  if (tile.first_shared >= 0 && at == tile.start) return false;
  if (tile.last_shared >= 0 && at + BATCH == tile.stop) return false;
  const int64_t numel = (tile.stop - tile.start) / tile.num_blocks;
  int64_t block = (at - tile.start) / numel, inside = (at - tile.start) % numel;
  for (int g = 0; g < BATCH / GROUP; ++g) {
    if (inside == numel) ++block, inside = 0;
    factors.blocks[g] = p.scale[tile.first_block + block];
    if (p.column_scale) factors.columns[g] = p.column_scale + tile.column + inside;
    inside += GROUP;
    if (inside > numel) return false;
  }
  return true;
}

#ifdef AMSF_VECTORS

// A batch whose weights are stored, and whose gaps will be while the next one moves: a core that
// waits for the one, for a root or for a largest number, works on the other.
struct Waiting {
  alignas(64) float gaps[BATCH] = {};
  Scales scales = {};
  int64_t at = 0, group = 0, place = 0;
  unsigned rare = 0;  // groups that are stored apart, a bit for each
  bool any = false;
};

struct Pipeline {
  Waiting batches[2];
  alignas(64) char nowhere[BATCH * 2];
  bool turn = false;
  Later* later = nullptr;

  Waiting& now() { return batches[turn]; }
  Waiting& before() { return batches[!turn]; }
};

// `move` takes batches of a tile from `at` on, and tells where it has stopped; `finish` comes last.
struct Fused {
  int64_t (*move)(const Piece&, const Tile&, int64_t at, const Draws&, Pipeline&);
  void (*finish)(const Piece&, const Draws&, Pipeline&);
};

template <typename Line>
inline void store_group(char* to, const Waiting& batch, int g, uint64_t key,
                        const typename Line::Constants& constants) {
  Line::store(to + g * GROUP * Line::SIZE, batch.scales, g, batch.gaps + g * GROUP,
              word_at(key, batch.place + g * GROUP), constants);
}

template <typename Line> inline char* memory_of(const Piece& p, Pipeline& pipeline) {
  const Waiting& batch = pipeline.before();
  return batch.any ? static_cast<char*>(p.line) + batch.at * Line::SIZE : pipeline.nowhere;
}

// Groups that `Storage::store` cannot take: no call within a loop, for which constants would leave
// their registers.
template <typename Storage>
void store_rare(const Piece& p, const Waiting& batch, unsigned rare, const float* values,
                uint64_t key) {
  for (int g = 0; g < GROUPS; ++g) {
    if (!(rare >> g & 1)) continue;
    float sorted[GROUP];
    typename Storage::RareBits drawn;
    in_line(values + g * GROUP, sorted);
    const auto* bits = drawn.at(key, batch.place + g * GROUP, GROUP);
    Storage::store_rare(p, batch.at + g * GROUP, batch.group + g, sorted, bits);
  }
}

// What still waits at the end.
template <typename Line> void finish(const Piece& p, const Draws& draws, Pipeline& pipeline) {
  Waiting& batch = pipeline.before();
  if (!batch.any) return;
  const typename Line::Constants constants;
  char* to = memory_of<Line>(p, pipeline);
  for (int g = 0; g < GROUPS; ++g) store_group<Line>(to, batch, g, draws.line, constants);
  store_rare<Line>(p, batch, batch.rare, batch.gaps, draws.line);
  batch.any = false;
}

// Memory of the group that is so far ahead.
template <int SIZE> inline void fetch_group(const void* memory, int64_t at) {
  fetch(static_cast<const char*>(memory) + (at + 2 * BATCH) * SIZE, GROUP * SIZE);
}

// Schedule-Free, as `schedule_free` has it.
template <typename Weight, typename Line, bool DECAYS, bool COLUMNS> struct Mover {
  const Piece& p;
  const Draws& draws;
  const Floats average = all(p.b), direct = all(p.c), keep = all(p.d), decay = all(p.e);
  const typename Weight::Constants for_weights = {};
  const typename Line::Constants for_lines = {};

  // Moves a batch, and stores the gaps of the one before.
  __attribute__((always_inline)) void batch(const Factors& factors, Waiting& now,
                                            const Waiting& before, char* to,
                                            const char* later) const {
    const Scales scales = Line::scales_before(p, now.group);
    Ints tops[GROUPS];
    unsigned rare = 0;
    alignas(64) float aside[BATCH];
    for (int g = 0; g < GROUPS; ++g) {
      const int64_t at = now.at + g * GROUP;
      // a little in every turn: a processor waits when it is asked for more than it can look for
      fetch_group<Weight::SIZE>(p.gradient, at);
      fetch_group<Weight::SIZE>(p.weight, at);
      fetch_group<Weight::ERROR_SIZE>(p.error, at);
      fetch_group<Line::SIZE>(p.line, at);
      fetch<3>(later + g * GROUP * Weight::SIZE, GROUP * Weight::SIZE);
      const float lr = p.a, scale = factors.blocks[g];
      const Floats both = all(lr * scale);
      Floats weights[QUARTERS], gaps[QUARTERS];
      const auto moved = [&](int k, Floats weight, Floats gradient, Floats gap, Floats factor) {
        Floats update = gradient * factor;
        if (DECAYS) update = update + decay * weight;
        gap = gap + update;
        weight = weight - average * gap;
        weights[k] = weight - direct * update;
        gaps[k] = keep * gap;
        stored(gaps[k], now.gaps + g * GROUP + k * PAIRS);
      };
#pragma GCC unroll 2  // what is indexed by k lives in registers then
      for (int k = 0; k < QUARTERS; k += 2) {
        const int64_t here = at + k * PAIRS;
        const Two weight = Weight::load(p, here), gap = Line::load(p, here, scales, g),
                  gradient = Weight::gradient(p, here);
        Two factor = {both, both};
        if (COLUMNS) {
          const Two column = parted(factors.columns[g] + k * PAIRS);
          factor = {lr * (scale * column.even), lr * (scale * column.odd)};
        }
        moved(k, weight.even, gradient.even, gap.even, factor.even);
        moved(k + 1, weight.odd, gradient.odd, gap.odd, factor.odd);
      }
      tops[g] = (Ints)farthest(gaps);
      const uint64_t word = word_at(draws.weight, now.place + g * GROUP);
      const bool odd = Weight::store(p, at, weights, word, aside + g * GROUP, for_weights);
      rare |= static_cast<unsigned>(odd) << g;
      store_group<Line>(to, before, g, draws.line, for_lines);
    }
    if (__builtin_expect(rare, 0)) store_rare<Weight>(p, now, rare, aside, draws.weight);
    const __m128i together = largest(tops);
    now.scales = Line::scales_of(p, now.group, together);
    now.rare = rare | _mm_cmpgt_epi32_mask(together, _mm_set1_epi32(Line::STORABLE));
  }

  __attribute__((always_inline)) int64_t batches(const Tile& tile, int64_t at,
                                                 Pipeline& pipeline) const {
    if ((draws.place + at - tile.start) % 8) return at;
    for (; at + BATCH <= tile.stop; at += BATCH) {
      Factors factors;
      if (!factors_of(p, tile, at, factors)) return at;
      Waiting &now = pipeline.now(), &before = pipeline.before();
      now.at = at, now.any = true;
      now.group = tile.first_group + (at - tile.start + tile.phase) / GROUP;
      now.place = draws.place + at - tile.start;
      const char* later = pipeline.later->next(BATCH * Weight::SIZE, pipeline.nowhere);
      batch(factors, now, before, memory_of<Line>(p, pipeline), later);
      if (__builtin_expect(before.any && before.rare, 0))
        store_rare<Line>(p, before, before.rare, before.gaps, draws.line);
      before.any = false;
      pipeline.turn = !pipeline.turn;
    }
    return at;
  }
};

template <typename Weight, typename Line, bool DECAYS, bool COLUMNS>
int64_t move_batches(const Piece& p, const Tile& tile, int64_t at, const Draws& draws,
                     Pipeline& pipeline) {
  return Mover<Weight, Line, DECAYS, COLUMNS>{p, draws}.batches(tile, at, pipeline);
}

template <typename Weight, typename Line> inline Fused with_decay(const Piece& p) {
  if (p.column_scale && p.decays) return {move_batches<Weight, Line, true, true>, finish<Line>};
  if (p.column_scale) return {move_batches<Weight, Line, false, true>, finish<Line>};
  if (p.decays) return {move_batches<Weight, Line, true, false>, finish<Line>};
  return {move_batches<Weight, Line, false, false>, finish<Line>};
}

template <typename Weight> inline Fused with_line(const Piece& p) {
  if (p.line_kind == LINE_INT8) return with_decay<Weight, Gap<LINE_INT8>>(p);
  if (p.line_kind == LINE_BF16) return with_decay<Weight, Gap<LINE_BF16>>(p);
  return {};
}

inline Fused fused_for(const Piece& p) {
  if (p.rule != 0 || p.elementwise || p.scales_gradient || p.gradient_format != p.weight_format)
    return {};
  if (p.weight_format == FP32) return with_line<PlainWeight>(p);
  if (p.weight_format != BF16) return {};
  if (p.weight_kind == STOCHASTIC) return with_line<StochasticWeight>(p);
  if (p.weight_kind != SPLIT) return {};
  return p.error_bits == 8 ? with_line<SplitWeight<8>>(p) : with_line<SplitWeight<16>>(p);
}

#else  // AMSF_VECTORS

struct Pipeline {
  Later* later = nullptr;
};
struct Fused {
  int64_t (*move)(const Piece&, const Tile&, int64_t, const Draws&, Pipeline&);
  void (*finish)(const Piece&, const Draws&, Pipeline&);
};
inline Fused fused_for(const Piece&) { return {}; }

#endif

}  // namespace amsf
