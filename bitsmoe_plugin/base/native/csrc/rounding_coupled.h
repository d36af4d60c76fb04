/* Search for the codes of blocks whose errors are passed on inside them; defined by trellis/coupled_search.py.
 * Included by rounding_kernels.h, which has the vectors. States of one block are searched side by side. */

enum { STATES = 1 << (WINDOW - 1) };

#if defined(__AVX512F__)
#include "rounding_coupled_avx512.h"
#else
#include "rounding_coupled_generic.h"
#endif

/* The best path from `seam` to it. */
INLINE void coupled_path(Coupled *s, const CoupledBlock *b, int bits, int seam, int32_t codes[BLOCK]) {
  const int states = 1 << (WINDOW - bits);
  begin_block(s, b, bits);
  for (int i = 0; i < states; i++) s->metric[i] = i == seam ? 0.f : 1e30f;
  for (int k = 0; k < BLOCK; k++) {
    coupled_step(s, bits, k, b->x[k], b->variance[k]);
    pass_errors(s, b, bits, k);
  }
  for (int k = BLOCK - 1, state = seam; k >= 0; k--) {
    const int window = state << bits | s->trace[k][state];
    codes[k] = window >> (WINDOW - bits);
    state = window & (states - 1);
  }
}

/* What codes of a block cost, whose ring begins in state `seam`. */
INLINE float coupled_cost(const CoupledBlock *b, const int32_t *codes, const float *table, int bits, int seam) {
  enum { PARTS = BLOCK / LANES };
  Floats left[PARTS] = {{0}}, cost = {0};
  for (int k = 0, state = seam; k < BLOCK; k++) {
    const int window = codes[k] << (WINDOW - bits) | state;
    const float error = b->x[k] - table[window];
#pragma GCC unroll 8
    for (int i = 0; i < PARTS; i++) left[i] += error * *(const UnalignedFloats *)(b->unit + k * BLOCK + i * LANES);
    state = window >> bits;
  }
#pragma GCC unroll 8
  for (int i = 0; i < PARTS; i++) cost += *(const UnalignedFloats *)(b->variance + i * LANES) * left[i] * left[i];
  float sum = 0;
  for (int i = 0; i < LANES; i++) sum += cost[i];
  return sum;
}

INLINE void coupled_width(Coupled *s, const CoupledBlock *blocks, int64_t count, const float *table, int bits) {
  const int states = 1 << (WINDOW - bits);
  for (int window = 0; window < 1 << WINDOW; window++)
    s->values[(window & ((1 << bits) - 1)) * states + (window >> bits)] = table[window];
  begin_blocks(s, table);
  for (int64_t i = 0; i < count; i++) {
    const CoupledBlock *b = blocks + i;
    int32_t codes[BLOCK];
    unsigned seam = 0;
    for (int k = BLOCK - (WINDOW + bits - 1) / bits; k < BLOCK; k++)
      seam = ((unsigned)b->codes[k] << (WINDOW - bits) | seam) >> bits;
    coupled_path(s, b, bits, (int)seam, codes);
    if (coupled_cost(b, codes, table, bits, (int)seam) < coupled_cost(b, b->codes, table, bits, (int)seam))
      memcpy(b->codes, codes, sizeof codes);
  }
}

static void search_coupled(void *memory, const CoupledBlock *blocks, int64_t count, const float *table, int bits) {
  Coupled *s = memory;
  switch (bits) { /* constants, so that the loops over states unroll */
    case 1: coupled_width(s, blocks, count, table, 1); break;
    case 2: coupled_width(s, blocks, count, table, 2); break;
    case 3: coupled_width(s, blocks, count, table, 3); break;
    case 4: coupled_width(s, blocks, count, table, 4); break;
  }
}
