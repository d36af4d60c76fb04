/* Steps of rounding_coupled.h, which includes this, with AVX-512: what paths pass on to a value lies side by side,
 * state after state, so that states take it from the states before by permutations of vectors. It is in 16-bit
 * integers, in steps of about 2^-14 of the largest error there may be; what codes cost is not. */

enum { NARROW = 2 * LANES };

typedef struct {
  float metric[STATES] __attribute__((aligned(64)));
  int16_t passed[2][BLOCK * STATES] __attribute__((aligned(64))); /* [value][state]: to a value, of a state's path */
  int16_t error[STATES], came[STATES] __attribute__((aligned(64))); /* states before, as `narrow_before` counts them */
  int16_t shares[BLOCK * BLOCK] __attribute__((aligned(64))); /* of unit, in the steps of unit_scale */
  float values[1 << WINDOW] __attribute__((aligned(64))); /* [branch][state] of windows state << bits | branch */
  uint8_t trace[BLOCK][STATES] __attribute__((aligned(64)));
  const float *unit; /* that shares are of */
  float largest, unit_scale, error_scale, step; /* of the table; of shares; of errors; of passed */
} Coupled;

typedef int16_t Narrow __attribute__((vector_size(2 * NARROW)));

/* Before blocks of a width. */
INLINE void begin_blocks(Coupled *s, const float *table) {
  s->unit = NULL; /* the same place may hold others than at the last call */
  s->largest = 0;
  for (int i = 0; i < 1 << WINDOW; i++) s->largest = fmaxf(s->largest, fabsf(table[i]));
}

/* Integers of 16 bits, saturated. */
INLINE __m256i narrowed(Floats values) { return _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32((__m512)values)); }

/* The largest power of two that takes values of up to `largest` to at most `most`. */
INLINE float power_of_two(float largest, float most) {
  int exponent;
  frexpf(most / fmaxf(largest, 1e-20f), &exponent);
  return ldexpf(1.f, exponent - 1);
}

static void take_unit(Coupled *s, const float *unit) {
  Floats most = {0};
  for (int k = 0; k < BLOCK - 1; k++)
    for (int later = k + 1; later < BLOCK; later++) most[0] = fmaxf(most[0], fabsf(unit[k * BLOCK + later]));
  s->unit = unit;
  s->unit_scale = power_of_two(most[0], 16383.f);
  for (int i = 0; i < BLOCK * BLOCK; i += LANES)
    *(__m256i *)(s->shares + i) = narrowed(*(const UnalignedFloats *)(unit + i) * s->unit_scale);
}

INLINE void begin_block(Coupled *s, const CoupledBlock *b, int bits) {
  const int states = 1 << (WINDOW - bits), room = states < NARROW ? NARROW : states;
  if (s->unit != b->unit) take_unit(s, b->unit);
  float most = 0;
  for (int k = 0; k < BLOCK; k++) most = fmaxf(most, fabsf(b->x[k]));
  s->error_scale = power_of_two(most + s->largest, 32767.f);
  s->step = 32768.f / (s->error_scale * s->unit_scale);
  memset(s->passed[0], 0, room * sizeof(int16_t)); /* to the first value; to others the first sets it */
}

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

/* Where `narrow_from` finds the states before `states`. */
INLINE Integers narrow_before(int bits, Integers states) {
  const int span = 1 << (WINDOW - bits);
  return states & ((span < 2 * NARROW ? span : 2 * NARROW) - 1);
}

/* What the states before have in 16 bits, for NARROW states from `first` on. */
INLINE Narrow narrow_from(const Narrow *all, int bits, int first, Narrow before) {
  const Narrow *from = all + (first << bits & ((1 << (WINDOW - bits)) - 1)) / NARROW;
  if (bits > 2) return (Narrow)_mm512_permutexvar_epi16((__m512i)before, (__m512i)from[0]);
  return (Narrow)_mm512_permutex2var_epi16((__m512i)from[0], (__m512i)before, (__m512i)from[1]);
}

/* One value: the best way into every state, its branch, and its error. */
INLINE void coupled_step(Coupled *s, int bits, int k, float x, float variance) {
  const int states = 1 << (WINDOW - bits), branches = 1 << bits, room = states < NARROW ? NARROW : states;
  const Floats *costs = (const Floats *)s->metric;
  const __m256i *passed = (const __m256i *)(s->passed[k % 2] + k * room);
  const Integers before = first_before(bits);
  Floats metric[1 << TRELLIS_BITS], wanted[1 << TRELLIS_BITS], next[STATES / LANES], row[STATES / LANES];
#pragma GCC unroll 8
  for (int i = 0; i < states / LANES; i++)
    row[i] = (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(passed[i])) * s->step;
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
    *(__m256i *)(s->error + first) = narrowed((x - (Floats)ways[0].value) * s->error_scale);
    Integers came;
    for (int i = 0; i < LANES; i++) came[i] = (first + i) << bits;
    came = narrow_before(bits, came | (Integers)ways[0].branch);
    *(__m256i *)(s->came + first) = _mm512_cvtepi32_epi16((__m512i)came);
    _mm_store_si128((__m128i *)(s->trace[k] + first), _mm512_cvtepi32_epi8(ways[0].branch));
  }
  memcpy(s->metric, next, states * sizeof(float));
}

/* What the errors of value k pass on to the values after it. */
INLINE void pass_errors(Coupled *s, const CoupledBlock *b, int bits, int k) {
  (void)b;
  const int states = 1 << (WINDOW - bits), room = states < NARROW ? NARROW : states;
  const int16_t *shares = s->shares + k * BLOCK;
  Narrow error[STATES / NARROW], before[STATES / NARROW];
#pragma GCC unroll 4
  for (int i = 0; i < room / NARROW; i++) {
    error[i] = *(const Narrow *)(s->error + i * NARROW);
    before[i] = *(const Narrow *)(s->came + i * NARROW);
  }
  for (int later = k + 1; later < BLOCK; later++) {
    const Narrow *in = (const Narrow *)(s->passed[k % 2] + later * room);
    Narrow row[STATES / NARROW], *out = (Narrow *)(s->passed[k % 2 ^ 1] + later * room);
    const __m512i share = _mm512_set1_epi16(shares[later]);
#pragma GCC unroll 4
    for (int i = 0; i < room / NARROW; i++) row[i] = k ? in[i] : (Narrow){0}; /* before `out`, which may be `in` */
#pragma GCC unroll 4
    for (int i = 0; i < room / NARROW; i++)
      out[i] = (Narrow)_mm512_adds_epi16((__m512i)narrow_from(row, bits, i * NARROW, before[i]),
                                         _mm512_mulhrs_epi16((__m512i)error[i], share));
  }
}
