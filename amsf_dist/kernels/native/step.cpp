// The CPU's step: measure and move of many tensors at once. See docs/speed.md.

#ifdef _OPENMP
#include <omp.h>
#endif

#include "once.h"

extern "C" {

// Sizes of the structs, so that a caller with another idea of them is told.
int64_t amsf_tile_bytes() { return sizeof(amsf::Tile); }
int64_t amsf_piece_bytes() { return sizeof(amsf::Piece); }

// Threads that OpenMP would use; 0 without it.
int64_t amsf_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 0;
#endif
}

// Whether every sum is finite.
int64_t amsf_measure(const amsf::Piece* pieces, int64_t count, int64_t threads) {
  return amsf::measure(pieces, count, amsf::threads_for(pieces, count, threads));
}

int64_t amsf_move(const amsf::Piece* pieces, int64_t count, int64_t threads) {
  amsf::move(pieces, count, amsf::threads_for(pieces, count, threads));
  return 0;
}

// Both at once. Whether every sum is finite.
int64_t amsf_step(const amsf::Piece* pieces, int64_t count, int64_t threads) {
  return amsf::step(pieces, count, amsf::threads_for(pieces, count, threads));
}
}
