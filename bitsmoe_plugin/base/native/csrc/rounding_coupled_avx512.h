/* Steps of rounding_coupled.h, which includes this, with AVX-512: what paths pass on to a value lies side by side,
 * state after state, so that states take it from the states before by permutations of vectors. */

typedef struct {
  float metric[STATES], error[STATES] __attribute__((aligned(64)));
  float passed[2][BLOCK * STATES] __attribute__((aligned(64))); /* [value][state]: to a value, of a state's path */
  float values[1 << WINDOW] __attribute__((aligned(64))); /* [branch][state] of windows state << bits | branch */
  int32_t came[STATES] __attribute__((aligned(64)));               /* states before, as `from_states` counts them */
  uint8_t trace[BLOCK][STATES] __attribute__((aligned(64)));
} Coupled;

/* Of LANES states from `first` on the first of the states before, among those that `from_states` takes values from. */
INLINE Integers first_before(int bits) {
  const int span = bits == 4 ? 16 : bits == 2 ? 64 : 32;
  Integers before;
  for (int i = 0; i < LANES; i++) before[i] = i << bits & (span - 1);
  return before;
}

/* What the states before, `before`, have in vectors of all states, for LANES states from `first` on. */
INLINE Floats from_states(const Floats *all, int bits, int first, Integers before) {
  const Floats *from = all + (first << bits & ((1 << (WINDOW - bits)) - 1)) / LANES;
  const __m512i index = (__m512i)before;
  if (bits == 4) return (Floats)_mm512_permutexvar_ps(index, (__m512)from[0]);
  const __m512 low = _mm512_permutex2var_ps((__m512)from[0], index, (__m512)from[1]);
  if (bits != 2) return (Floats)low;
  const __m512 high = _mm512_permutex2var_ps((__m512)from[2], index, (__m512)from[3]);
  return (Floats)_mm512_mask_mov_ps(low, _mm512_test_epi32_mask(index, _mm512_set1_epi32(32)), high);
}

/* A way into LANES states. */
typedef struct {
  __m512 cost, value;
  __m512i branch;
} Way;

INLINE Way cheaper(Way a, Way b) { /* a where they cost the same */
  const __mmask16 better = _mm512_cmp_ps_mask(b.cost, a.cost, _CMP_LT_OQ);
  return (Way){_mm512_mask_mov_ps(a.cost, better, b.cost), _mm512_mask_mov_ps(a.value, better, b.value),
               _mm512_mask_mov_epi32(a.branch, better, b.branch)};
}

/* One value: the best way into every state, its branch, and its error. */
INLINE void coupled_step(Coupled *s, int bits, int k, float x, float variance) {
  const int states = 1 << (WINDOW - bits), branches = 1 << bits;
  const Floats *costs = (const Floats *)s->metric, *row = (const Floats *)(s->passed[k % 2] + k * states);
  const Integers before = first_before(bits);
  Floats metric[1 << TRELLIS_BITS], wanted[1 << TRELLIS_BITS], next[STATES / LANES];
#pragma GCC unroll 8
  for (int first = 0; first < states; first += LANES) {
    Way ways[1 << TRELLIS_BITS];
#pragma GCC unroll 16
    for (int j = 0; j < branches; j++) {
      if (first == 0 || bits == 1) { /* otherwise the states before are the same for all */
        metric[j] = from_states(costs, bits, first, before | j);
        wanted[j] = x + from_states(row, bits, first, before | j);
      }
      const Floats found = *(const Floats *)(s->values + j * states + first), left = wanted[j] - found;
      ways[j] = (Way){(__m512)(metric[j] + variance * left * left), (__m512)found, _mm512_set1_epi32(j)};
    }
#pragma GCC unroll 4
    for (int apart = 1; apart < branches; apart *= 2)
#pragma GCC unroll 8
      for (int j = 0; j < branches; j += 2 * apart) ways[j] = cheaper(ways[j], ways[j + apart]);
    next[first / LANES] = (Floats)ways[0].cost;
    *(Floats *)(s->error + first) = x - (Floats)ways[0].value;
    *(Integers *)(s->came + first) = before | (Integers)ways[0].branch;
    _mm_store_si128((__m128i *)(s->trace[k] + first), _mm512_cvtepi32_epi8(ways[0].branch));
  }
  memcpy(s->metric, next, states * sizeof(float));
}

/* What the errors of value k pass on to the values after it. */
INLINE void pass_errors(Coupled *s, int bits, int k, const float *unit) {
  const int states = 1 << (WINDOW - bits);
  Floats error[STATES / LANES];
  Integers before[STATES / LANES];
#pragma GCC unroll 8
  for (int i = 0; i < states / LANES; i++) {
    error[i] = *(const Floats *)(s->error + i * LANES);
    before[i] = *(const Integers *)(s->came + i * LANES);
  }
  for (int later = k + 1; later < BLOCK; later++) {
    const Floats *in = (const Floats *)(s->passed[k % 2] + later * states);
    Floats row[STATES / LANES], *out = (Floats *)(s->passed[k % 2 ^ 1] + later * states);
#pragma GCC unroll 8
    for (int i = 0; i < states / LANES; i++) row[i] = in[i]; /* before anything is stored that may be the same */
#pragma GCC unroll 8
    for (int i = 0; i < states / LANES; i++)
      out[i] = from_states(row, bits, i * LANES, before[i]) + error[i] * unit[later];
  }
}
