/* What it costs that windows code values, in integers. Included by rounding_search.h.
 *
 * A window of value v that codes x with weight w costs w (x - v)^2: w v^2 - 2 w x v and something that is the same for
 * all windows. With a and b, which are w and -2 w x as 16-bit integers, that is the product of two pairs of them,
 * (a, b) and (v^2, v); what paths cost are sums in 32 bits, the same with every instruction set. All are multiples
 * of the number of branches, so that their lowest bits are free to tell a branch.
 *
 * No sum overflows. With |v| <= reach, windows' costs differ by at most a step, w (reach + |x|)^2 or, if |x| > reach,
 * 4 w reach |x|, from each other and from 0. Every state is reached from every other in 7, 3, 2 or 1 steps (of 1 to
 * 4 bits): by no more do the costs of states differ. One state's cost is subtracted from all after 8, 4, 2 or 1 steps.
 * So costs stay below 16, 8, 4 or 2 successive steps. These are kept below ROOM; of states that a search must not
 * begin in, costs begin with ROOM. */

enum {
  ONE = 1 << 10,   /* v^2 = 1; times the branches, which are in a, it is 1 of a cost */
  ROOM = 1 << 30,
  FARTHEST = 128,  /* |x|; values beyond are taken for it */
  PART_BITS = 20,  /* of the largest step in their sums */
  SPREAD = 1 << 12 /* over the branches: what a step may be of the geometric mean of a block's */
};

#define NO_WEIGHT 1e-30f /* of a weight of 1 */

/* v = 1: with 4 bits a finer b, with fewer a wider range of them. */
INLINE int one_v(int bits) { return bits == 4 ? 1 << 12 : 1 << 13; }

/* x and w of blocks side by side; zeros where there are none. A block's largest weight becomes about 1. */
INLINE void load_values(const Block *const *blocks, int used, Floats x[BLOCK], Floats weight[BLOCK]) {
  static const float none[BLOCK];
  float filled[2][LANES][BLOCK] __attribute__((aligned(64)));
  const float *from[2][LANES];
  Floats factor;
  for (int lane = 0; lane < LANES; lane++) {
    const Block *b = lane < used ? blocks[lane] : NULL;
    factor[lane] = b ? b->factor : 0;
    from[0][lane] = b ? b->x : none;
    from[1][lane] = b ? b->weights : none;
    for (int i = 0; b && b->n < BLOCK && i < 2; i++) {
      memset(filled[i][lane], 0, sizeof filled[i][lane]);
      from[i][lane] = memcpy(filled[i][lane], from[i][lane], b->n * sizeof(float));
    }
  }
  for (int i = 0; i < 2; i++)
    for (int part = 0; part < BLOCK; part += LANES) {
      Integers rows[LANES];
#pragma GCC unroll 16
      for (int lane = 0; lane < LANES; lane++) memcpy(rows + lane, from[i][lane] + part, sizeof *rows);
      transpose(rows, (Integers *)(i ? weight : x) + part);
    }
  Floats largest = {0};
  for (int i = 0; i < BLOCK; i++) {
    const Floats low = lower(x[i] * factor, (Floats){0} + FARTHEST); /* NaN, too */
    x[i] = higher(low, (Floats){0} - FARTHEST);
    weight[i] = higher(weight[i], (Floats){0});
    largest = higher(weight[i], largest);
  }
  const Integers exponent = (Integers)largest & 0x7f800000, most = (Integers){0} + (253 << 23);
  const Floats unit = (Floats)((254 << 23) - picked(exponent < most, exponent, most)); /* a power of 2 */
  for (int i = 0; i < BLOCK; i++) weight[i] *= unit;
}

/* Of every block the most that so many successive steps of its ring come to, steps below 2^PART_BITS. */
INLINE Integers most_of(Integers steps[BLOCK], int successive) {
  Integers most = {0};
  for (int apart = 1; apart < successive; apart *= 2) {
    Integers first[BLOCK / 4]; /* overwritten before the ring's end needs them */
    memcpy(first, steps, apart * sizeof *first);
    for (int i = 0; i < BLOCK; i++) steps[i] += i + apart < BLOCK ? steps[i + apart] : first[i + apart - BLOCK];
  }
  for (int i = 0; i < BLOCK; i++) most = picked(steps[i] > most, steps[i], most);
  return most;
}

/* Weights of blocks with steps far above their geometric mean are lowered, such that the others keep some bits;
 * steps become integers in proportion, 2^PART_BITS the largest, which is returned. */
INLINE Floats bounded_steps(const Floats x[BLOCK], Floats weight[BLOCK], float reach, int bits, Integers parts[BLOCK]) {
  Floats step[BLOCK], largest = (Floats){0} + NO_WEIGHT;
  Integers logarithms = {0}, count = {0};
  for (int i = 0; i < BLOCK; i++) {
    const Floats size = size_of(x[i]), both = reach + size;
    step[i] = (Floats)picked(size > reach, (Integers)(4 * reach * size), (Integers)(both * both));
    const Floats cost = weight[i] * step[i];
    const Integers some = (cost >= NO_WEIGHT) & (cost < INFINITY);
    logarithms += ((Integers)cost & some) / BLOCK;
    count -= some;
  }
  const Floats share = BLOCK / higher(__builtin_convertvector(count, Floats), (Floats){0} + 1);
  const Floats logarithm = lower(__builtin_convertvector(logarithms, Floats) * share, (Floats){0} + 0x7f000000);
  const Integers mean = __builtin_convertvector(logarithm, Integers);
  const Floats most = (Floats)mean * (float)(SPREAD >> bits);
  for (int i = 0; i < BLOCK; i++) {
    const Floats cost = weight[i] * step[i];
    weight[i] = (Floats)picked(cost > most, (Integers)(most / step[i]), (Integers)weight[i]);
    step[i] = lower(cost, most);
    largest = higher(step[i], largest);
  }
  const Floats part = (1 << PART_BITS) / largest;
  for (int i = 0; i < BLOCK; i++)
    parts[i] = __builtin_convertvector(lower(step[i] * part, (Floats){0} + (1 << PART_BITS)), Integers) + 1;
  return largest;
}

/* Pairs (a, b) of blocks side by side. One scale for a block's weights, so that the dearest values make use of the
 * bits; a weight that is not 0 does not become 0, and b follows from what a became, so that the best v stays x. */
INLINE void block_pairs(const Block *const *blocks, int used, float reach, int bits, Integers pairs[BLOCK]) {
  Floats x[BLOCK], weight[BLOCK], largest = (Floats){0} + NO_WEIGHT;
  Integers parts[BLOCK];
  load_values(blocks, used, x, weight);
  const Floats most = bounded_steps(x, weight, reach, bits, parts);
  /* A quarter of the room is left for what rounding adds, at most 1 to every a (4 with 1 bit, 2 with 2). */
  const float room = 0.75f * (ROOM / ONE >> bits) * (1 << PART_BITS);
  const Floats sums = room / __builtin_convertvector(most_of(parts, 32 >> bits), Floats) / most;
  for (int i = 0; i < BLOCK; i++) {
    const Floats size = higher(size_of(x[i]), (Floats){0} + 4);
    largest = higher(weight[i] * size, largest);
  }
  /* a << bits and b fit 16 bits. */
  const Floats scale = lower(sums, 32000.f * one_v(bits) / (2 * ONE << bits) / largest);
  for (int i = 0; i < BLOCK; i++) {
    const Floats some = higher(weight[i] * scale, (Floats){0} + (bits == 1 ? 4.f : bits == 2 ? 2.f : 1.f));
    const Integers a = nearest_integers(some) & (weight[i] > 0);
    const Floats twice = __builtin_convertvector(a, Floats) * (-2.f * ONE / one_v(bits) * (1 << bits));
    pairs[i] = pair(a << bits, nearest_integers(twice * x[i]));
  }
}

/* Pairs (v^2, v) of all windows; returns the reach of their values, below 4. */
INLINE float window_pairs(const float *table, int bits, int32_t pairs[1 << WINDOW]) {
  float reach = 0;
  for (int window = 0; window < 1 << WINDOW; window++) {
    const float v = table[window];
    const int square = (int)rintf(v * v * ONE), value = 16 * (int)rintf(v * (one_v(bits) / 16));
    pairs[window] = (int32_t)((uint32_t)(square & 0xffff) | (uint32_t)value << 16);
    reach = fabsf(v) > reach ? fabsf(v) : reach;
  }
  return reach;
}
