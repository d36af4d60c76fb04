/* Search for the codes of blocks whose errors are passed on inside them; defined by trellis/coupled_search.py.
 * Included by rounding_kernels.h, which has the vectors. States of one block are searched side by side. */

enum { STATES = 1 << (WINDOW - 1) };

typedef struct {
  float metric[STATES], error[STATES], before[STATES] __attribute__((aligned(64)));
  float passed[2][STATES][BLOCK] __attribute__((aligned(64)));     /* of a state's path, to every value */
  float values[1 << WINDOW] __attribute__((aligned(64)));          /* [branch][state] of windows state << bits | branch */
  int32_t branch[STATES] __attribute__((aligned(64)));
  uint8_t trace[BLOCK][STATES];
} Coupled;

/* Of every state what the states before have, in the order that vectors of states take branch after branch:
 * out[branch][max(states / branches, LANES)]. State s comes by branch j from state (s << bits | j) % states. */
INLINE void by_branch(const float *of_state, int bits, float *out) {
  const int states = 1 << (WINDOW - bits), branches = 1 << bits, apart = states >> bits;
  const int length = apart > LANES ? apart : LANES;
  for (int j = 0; j < branches; j++)
    for (int s = 0; s < length; s++) out[j * length + s] = of_state[(s % apart) << bits | j];
}

/* One value: the best way into every state, its branch, and its error. */
INLINE void coupled_step(Coupled *s, int bits, float x, float variance, const float *base, const float *metric) {
  const int states = 1 << (WINDOW - bits), branches = 1 << bits, apart = states >> bits;
  const int length = apart > LANES ? apart : LANES;
  for (int first = 0; first < states; first += LANES) {
    Floats least, value;
    Integers pick;
    for (int j = 0; j < branches; j++) {
      const int at = j * length + first % length;
      const Floats found = *(const Floats *)(s->values + j * states + first);
      const Floats left = *(const Floats *)(base + at) - found;
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
    *(Integers *)(s->branch + first) = pick;
  }
}

/* The best path from `seam` to it. Returns its cost. */
INLINE float coupled_path(Coupled *s, const CoupledBlock *b, int bits, int seam, uint8_t codes[BLOCK]) {
  const int states = 1 << (WINDOW - bits);
  float base[LANES << TRELLIS_BITS] __attribute__((aligned(64))), metric[LANES << TRELLIS_BITS] __attribute__((aligned(64)));
  memset(s->passed[0], 0, states * sizeof *s->passed[0]);
  for (int i = 0; i < states; i++) s->metric[i] = i == seam ? 0.f : 1e30f;
  for (int k = 0; k < BLOCK; k++) {
    float(*from)[BLOCK] = s->passed[k % 2], (*to)[BLOCK] = s->passed[k % 2 ^ 1];
    for (int i = 0; i < states; i++) s->before[i] = b->x[k] + from[i][k];
    by_branch(s->before, bits, base);
    by_branch(s->metric, bits, metric);
    coupled_step(s, bits, b->x[k], b->variance[k], base, metric);
    const float *unit = b->unit + k * BLOCK;
    for (int i = 0; i < states; i++) {
      const float *came = from[(i << bits | s->branch[i]) & (states - 1)], error = s->error[i];
      s->trace[k][i] = (uint8_t)s->branch[i];
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
