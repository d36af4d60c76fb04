/* Search for the codes of blocks whose errors are passed on inside them; defined by trellis/coupled_search.py.
 * Included by rounding_kernels.h, which has the vectors. States of one block are searched side by side. */

enum { STATES = 1 << (WINDOW - 1) };

typedef struct {
  float metric[STATES], error[STATES] __attribute__((aligned(64)));
  float passed[2][STATES][BLOCK] __attribute__((aligned(64)));     /* of a state's path, to every value */
  float values[1 << WINDOW] __attribute__((aligned(64)));          /* [branch][state] of windows state << bits | branch */
  int32_t came[STATES] __attribute__((aligned(64)));               /* states before */
  uint8_t trace[BLOCK][STATES] __attribute__((aligned(64)));
} Coupled;

/* Of every state what the states before have, in the order that vectors of states take branch after branch:
 * out[branch][max(states / branches, LANES)]. State s comes by branch j from state (s << bits | j) % states. */
INLINE void by_branch(const float *of_state, int stride, int bits, float *out) {
  const int states = 1 << (WINDOW - bits), branches = 1 << bits, apart = states >> bits;
  const int length = apart > LANES ? apart : LANES;
  for (int j = 0; j < branches; j++) {
#if defined(__AVX512F__)
    for (int first = 0; first < length && apart >= LANES; first += LANES) { /* with fewer a gather is slower */
      Integers from;
      for (int i = 0; i < LANES; i++) from[i] = ((first + i) << bits | j) * stride;
      _mm512_store_ps(out + j * length + first, _mm512_i32gather_ps((__m512i)from, of_state, 4));
    }
    if (apart >= LANES) continue;
#endif
    for (int s = 0; s < length; s++) out[j * length + s] = of_state[((s % apart) << bits | j) * stride];
  }
}

/* One value: the best way into every state, its branch, and its error. */
INLINE void coupled_step(Coupled *s, int bits, int k, float x, float variance) {
  const int states = 1 << (WINDOW - bits), branches = 1 << bits, apart = states >> bits;
  const int length = apart > LANES ? apart : LANES;
  float passed[LANES << TRELLIS_BITS] __attribute__((aligned(64))), metric[LANES << TRELLIS_BITS] __attribute__((aligned(64)));
  by_branch(s->passed[k % 2][0] + k, BLOCK, bits, passed);
  by_branch(s->metric, 1, bits, metric);
  for (int first = 0; first < states; first += LANES) {
    Floats least, value;
    Integers pick, came;
    for (int j = 0; j < branches; j++) {
      const int at = j * length + first % length;
      const Floats found = *(const Floats *)(s->values + j * states + first);
      const Floats left = (x + *(const Floats *)(passed + at)) - found;
      const Floats cost = *(const Floats *)(metric + at) + variance * left * left;
      if (j == 0) {
        least = cost;
        value = found;
        pick = (Integers){0};
        continue;
      }
      const Integers better = cost < least;
      least = (Floats)(((Integers)cost & better) | ((Integers)least & ~better));
      value = (Floats)(((Integers)found & better) | ((Integers)value & ~better));
      pick = (pick & ~better) | (j & better);
    }
    *(Floats *)(s->metric + first) = least;
    *(Floats *)(s->error + first) = x - value;
    for (int i = 0; i < LANES; i++) came[i] = (first + i) << bits;
    *(Integers *)(s->came + first) = (came | pick) & (states - 1);
    *(Bytes *)(s->trace[k] + first) = __builtin_convertvector(pick, Bytes);
  }
}

/* The best path from `seam` to it. Returns its cost. */
INLINE float coupled_path(Coupled *s, const CoupledBlock *b, int bits, int seam, uint8_t codes[BLOCK]) {
  const int states = 1 << (WINDOW - bits);
  memset(s->passed[0], 0, states * sizeof *s->passed[0]);
  for (int i = 0; i < states; i++) s->metric[i] = i == seam ? 0.f : 1e30f;
  for (int k = 0; k < BLOCK; k++) {
    const float(*from)[BLOCK] = s->passed[k % 2];
    float(*to)[BLOCK] = s->passed[k % 2 ^ 1];
    coupled_step(s, bits, k, b->x[k], b->variance[k]);
    const float *unit = b->unit + k * BLOCK;
    for (int i = 0; i < states; i++) {
      const float *came = from[s->came[i]], error = s->error[i];
      for (int later = k / LANES * LANES; later < BLOCK; later += LANES)
        *(Floats *)(to[i] + later) = *(const Floats *)(came + later) + error * *(const UnalignedFloats *)(unit + later);
    }
  }
  for (int k = BLOCK - 1, state = seam; k >= 0; k--) {
    const int window = state << bits | s->trace[k][state];
    codes[k] = (uint8_t)(window >> (WINDOW - bits));
    state = window & (states - 1);
  }
  return s->metric[seam];
}

/* What a block's codes cost, whose ring begins in state `seam`. */
INLINE float coupled_cost(const CoupledBlock *b, const float *table, int bits, int seam) {
  float passed[BLOCK] = {0}, cost = 0;
  for (int k = 0, state = seam; k < BLOCK; k++) {
    const int window = b->codes[k] << (WINDOW - bits) | state;
    const float error = b->x[k] - table[window], left = error + passed[k];
    cost += b->variance[k] * left * left;
    for (int later = k + 1; later < BLOCK; later++) passed[later] += error * b->unit[k * BLOCK + later];
    state = window >> bits;
  }
  return cost;
}

INLINE void coupled_width(Coupled *s, const CoupledBlock *blocks, int64_t count, const float *table, int bits) {
  const int states = 1 << (WINDOW - bits);
  for (int window = 0; window < 1 << WINDOW; window++)
    s->values[(window & ((1 << bits) - 1)) * states + (window >> bits)] = table[window];
  for (int64_t i = 0; i < count; i++) {
    const CoupledBlock *b = blocks + i;
    uint8_t codes[BLOCK];
    unsigned seam = 0;
    for (int k = BLOCK - (WINDOW + bits - 1) / bits; k < BLOCK; k++)
      seam = ((unsigned)b->codes[k] << (WINDOW - bits) | seam) >> bits;
    if (!(coupled_path(s, b, bits, (int)seam, codes) < coupled_cost(b, table, bits, (int)seam))) continue;
    for (int k = 0; k < BLOCK; k++) b->codes[k] = codes[k];
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
