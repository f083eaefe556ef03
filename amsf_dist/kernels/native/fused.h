// The usual settings in one loop, without stages through arrays: Schedule-Free, a factor per block,
// and one per column where factored, gradients of the weights' dtype, gaps in int8 or bf16. The
// same arithmetic as in move.h and storages.h, to the bit.
//
// What is rare goes back to the stages: a batch that is not whole, whose groups are cut by blocks,
// or that begins within four numbers that share a random word; a NaN in the stored gap; a new gap
// that is not finite. So the loops here have no branches.
#pragma once

#include "gaps.h"
#include "weights.h"

namespace amsf {

// Of the gradients of a batch: one for each group, and one for each number where factored.
struct Factors {
  float blocks[BATCH / GROUP];
  const float* columns[BATCH / GROUP];
};

#ifdef AMSF_VECTORS

using FusedBatch = bool (*)(const Piece&, int64_t at, int64_t group, const Factors& factors,
                            const Draws& draws);

template <typename Line>
void store_rare(const Piece& p, int64_t at, int64_t group, const float* values, uint64_t key,
                int64_t place) {
  float sorted[GROUP];
  Drawn16 drawn;
  in_line(values, sorted);
  Line::store_rare(p, at, group, sorted, drawn.at(key, place, GROUP));
}

// Memory of the group that is so far ahead.
template <int SIZE> inline void fetch_group(const void* memory, int64_t at) {
  fetch(static_cast<const char*>(memory) + (at + 2 * BATCH) * SIZE, GROUP * SIZE);
}

// Schedule-Free, as `schedule_free` has it. False: not usual, and nothing done.
template <typename Weight, typename Line, bool DECAYS, bool COLUMNS>
bool fused_batch(const Piece& p, int64_t at, int64_t group, const Factors& factors,
                 const Draws& draws) {
  if (!Line::usual(p, at)) return false;
  const Floats lr = all(p.a), average = all(p.b), direct = all(p.c), keep = all(p.d),
               decay = all(p.e);
  alignas(64) float gaps[BATCH];
  float units[GROUPS] = {};
  const typename Weight::Constants for_weights;
  Line::find_units(p, group, units);
  Ints tops[GROUPS];
  for (int g = 0; g < GROUPS; ++g) {
    const Floats scale = all(factors.blocks[g]);
    const typename Line::Units unit(units[g]);
    const int64_t from = at + g * GROUP;
    // a little in every turn: a processor waits when it is asked for more than it can look for
    fetch_group<Weight::SIZE>(p.gradient, from);
    fetch_group<Weight::ERROR_SIZE>(p.error, from);
    Floats weights[QUARTERS];
    Ints top = all(0);
    const auto moved = [&](int k, Floats weight, Floats gradient, Floats gap, Floats factor) {
      Floats update = gradient * factor;
      if (DECAYS) update = update + decay * weight;
      gap = gap + lr * update;
      weight = weight - average * gap;
      weights[k] = weight - direct * update;
      gap = keep * gap;
      stored(gap, gaps + g * GROUP + k * PAIRS);
      top = larger(top, (Ints)magnitude(gap));
    };
    for (int k = 0; k < QUARTERS; k += 2) {
      const int64_t here = from + k * PAIRS;
      const Two weight = Weight::load(p, here), gap = Line::load(p, here, unit),
                gradient = Weight::gradient(p, here);
      Two factor = {scale, scale};
      if (COLUMNS) {
        const Two column = parted(factors.columns[g] + k * PAIRS);
        factor = {scale * column.even, scale * column.odd};
      }
      moved(k, weight.even, gradient.even, gap.even, factor.even);
      moved(k + 1, weight.odd, gradient.odd, gap.odd, factor.odd);
    }
    Weight::store(p, from, weights, draws.weight, draws.place + g * GROUP, for_weights);
    tops[g] = top;
  }
  // apart, so that the way from the largest number to the scale is not waited for
  const __m128i together = largest(tops);
  const auto scales = Line::scales_of(p, group, together);
  const typename Line::Constants for_lines;
  for (int g = 0; g < GROUPS; ++g) {
    fetch_group<Weight::SIZE>(p.weight, at + g * GROUP);
    fetch_group<Line::SIZE>(p.line, at + g * GROUP);
    const uint64_t word = word_at(draws.line, draws.place + g * GROUP);
    Line::store(p, at + g * GROUP, scales, g, gaps + g * GROUP, word, for_lines);
  }
  // no call in the loop: constants would leave their registers for it
  const unsigned rare = _mm_cmpgt_epi32_mask(together, _mm_set1_epi32(Line::STORABLE));
  if (__builtin_expect(rare, 0))
    for (int g = 0; g < GROUPS; ++g)
      if (rare >> g & 1)
        store_rare<Line>(p, at + g * GROUP, group + g, gaps + g * GROUP, draws.line,
                         draws.place + g * GROUP);
  return true;
}

template <typename Weight, typename Line> inline FusedBatch with_decay(const Piece& p) {
  if (p.column_scale)
    return p.decays ? fused_batch<Weight, Line, true, true> : fused_batch<Weight, Line, false, true>;
  return p.decays ? fused_batch<Weight, Line, true, false> : fused_batch<Weight, Line, false, false>;
}

template <typename Weight> inline FusedBatch with_line(const Piece& p) {
  if (p.line_kind == LINE_INT8) return with_decay<Weight, Gap<LINE_INT8>>(p);
  return p.line_kind == LINE_BF16 ? with_decay<Weight, Gap<LINE_BF16>>(p) : nullptr;
}

inline FusedBatch fused_for(const Piece& p) {
  if (p.rule != 0 || p.elementwise || p.scales_gradient ||
      p.gradient_format != p.weight_format)
    return nullptr;
  if (p.weight_format == FP32) return with_line<PlainWeight>(p);
  if (p.weight_format != BF16) return nullptr;
  if (p.weight_kind == STOCHASTIC) return with_line<StochasticWeight>(p);
  if (p.weight_kind != SPLIT) return nullptr;
  return p.error_bits == 8 ? with_line<SplitWeight<8>>(p) : with_line<SplitWeight<16>>(p);
}

#else  // AMSF_VECTORS

using FusedBatch = bool (*)(const Piece&, int64_t, int64_t, const Factors&, const Draws&);
inline FusedBatch fused_for(const Piece&) { return nullptr; }

#endif

}  // namespace amsf
