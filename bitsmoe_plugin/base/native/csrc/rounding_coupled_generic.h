/* Steps of rounding_coupled.h, which includes this: what a path passes on to later values lies side by side. */

typedef struct {
  float metric[STATES], error[STATES] __attribute__((aligned(64)));
  float passed[2][STATES][BLOCK] __attribute__((aligned(64))); /* of a state's path, to every value */
  float values[1 << WINDOW] __attribute__((aligned(64))); /* [branch][state] of windows state << bits | branch */
  int32_t came[STATES] __attribute__((aligned(64)));               /* states before */
  uint8_t trace[BLOCK][STATES] __attribute__((aligned(64)));
} Coupled;

/* Before blocks of a width. */
INLINE void begin_blocks(Coupled *s, const float *table) {
  (void)s;
  (void)table;
}

INLINE void begin_block(Coupled *s, const CoupledBlock *b, int bits) {
  (void)b;
  memset(s->passed[0], 0, ((size_t)1 << (WINDOW - bits)) * sizeof s->passed[0][0]);
}

/* Of every state what the states before have, in the order that vectors of states take branch after branch:
 * out[branch][max(states / branches, LANES)], STATES at most. State s comes by branch j from state
 * (s << bits | j) % states. */
INLINE void by_branch(const float *of_state, int stride, int bits, float *out) {
  const int states = 1 << (WINDOW - bits), branches = 1 << bits, apart = states >> bits;
  const int length = apart > LANES ? apart : LANES;
  for (int j = 0; j < branches; j++)
    for (int s = 0; s < length; s++) out[j * length + s] = of_state[((s % apart) << bits | j) * stride];
}

/* One value: the best way into every state, its branch, and its error. */
INLINE void coupled_step(Coupled *s, int bits, int k, float x, float variance) {
  const int states = 1 << (WINDOW - bits), branches = 1 << bits, apart = states >> bits;
  const int length = apart > LANES ? apart : LANES;
  float passed[STATES] __attribute__((aligned(64))), metric[STATES] __attribute__((aligned(64)));
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
      least = (Floats)picked(better, (Integers)cost, (Integers)least);
      value = (Floats)picked(better, (Integers)found, (Integers)value);
      pick = picked(better, (Integers){0} + j, pick);
    }
    *(Floats *)(s->metric + first) = least;
    *(Floats *)(s->error + first) = x - value;
    for (int i = 0; i < LANES; i++) came[i] = (first + i) << bits;
    *(Integers *)(s->came + first) = (came | pick) & (states - 1);
    for (int i = 0; i < LANES; i++) s->trace[k][first + i] = (uint8_t)pick[i];
  }
}

/* What the errors of value k pass on to the values after it. */
INLINE void pass_errors(Coupled *s, const CoupledBlock *b, int bits, int k) {
  const float *unit = b->unit + k * BLOCK;
  const float(*from)[BLOCK] = s->passed[k % 2];
  float(*to)[BLOCK] = s->passed[k % 2 ^ 1];
  for (int i = 0; i < 1 << (WINDOW - bits); i++) {
    const float *came = from[s->came[i]], error = s->error[i];
    for (int later = (k + 1) / LANES * LANES; later < BLOCK; later += LANES)
      *(Floats *)(to[i] + later) = *(const Floats *)(came + later) + error * *(const UnalignedFloats *)(unit + later);
  }
}
