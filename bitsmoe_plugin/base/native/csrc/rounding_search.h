/* The search for trellis codes, in integers. Included by rounding_kernels.h.
 *
 * That a window of value v codes x with weight w costs w (x - v)^2: w v^2 - 2 w x v and something that is the
 * same for all windows. With a and b, which are w and -2 w x as 16-bit integers, that is the product of two pairs
 * of them, (a, b) and (v^2, v); what paths cost are sums in 32 bits, the same with every instruction set. All are
 * multiples of the number of branches, so that their lowest bits are free to tell a branch.
 *
 * No sum overflows. Values are below 4 in size, so that what windows cost differs by at most 16 a max(4, |x|), from
 * 0 too: call this a step. Every state is reached from every other in `reached` steps, so states differ by at most
 * so many; one state's cost is subtracted from all after `renewed` steps. All stay below reached + renewed steps,
 * which fit 31 bits. */

enum {
  ONE = 1 << 10,  /* v^2 = 1 */
  ONE_BITS = 8,   /* v = 1 is 2^8 times the branches */
  MOST = 4096,    /* a max(4, |x|) */
  FARTHEST = 256, /* |x|; half of it is what rounding of a can add to a max(4, |x|) */
  MOST_WORDS = 4
};

#if defined(__AVX512F__)
enum { SIDE = 16 };
#elif defined(__AVX2__)
enum { SIDE = 8 };
#else
enum { SIDE = 4 };
#endif

typedef int32_t Lanes __attribute__((vector_size(4 * SIDE))); /* one of each of SIDE blocks side by side */

/* Steps in which every state is reached, and no fewer that divide WARM and BLOCK. */
INLINE int reached(int bits) { return (WINDOW - 1) / bits; }
INLINE int renewed(int bits) { return bits == 1 ? 8 : bits == 2 ? 4 : bits == 3 ? 2 : 1; }

typedef struct {
  Lanes pairs[BLOCK]; /* (a, b) */
  Lanes metric[2][1 << (WINDOW - 1)];
  Lanes trace[BLOCK][MOST_WORDS]; /* branches of the best windows, see word_of */
  int32_t windows[1 << WINDOW]; /* (v^2, v) */
  Lanes codes[BLOCK];
} Search;

INLINE int32_t pair_of(int low, int high) { return (int32_t)((uint32_t)(uint16_t)low | (uint32_t)high << 16); }

INLINE void pair_windows(Search *s, const float *table, int bits) {
  for (int window = 0; window < 1 << WINDOW; window++) {
    const float v = table[window];
    s->windows[window] = pair_of((int)rintf(v * v * ONE), (int)rintf(v * (1 << ONE_BITS)) * (1 << bits));
  }
}

#if defined(__AVX512F__)
INLINE Lanes least(Lanes a, Lanes b) { return (Lanes)_mm512_min_epi32((__m512i)a, (__m512i)b); }
/* GCC 12 copies and spills sums around the intrinsic. */
INLINE Lanes with_cost(Lanes sum, Lanes pair, const int32_t *window) {
  __asm__("vpdpwssd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(pair), "m"(*window));
  return sum;
}
/* a whose lowest bits are the mark */
INLINE Lanes marked(Lanes a, int lowest, int mark) {
  return (Lanes)_mm512_ternarylogic_epi32((__m512i)a, _mm512_set1_epi32(~lowest), _mm512_set1_epi32(mark), 0xea);
}
#elif defined(__AVX2__)
INLINE Lanes least(Lanes a, Lanes b) { return (Lanes)_mm256_min_epi32((__m256i)a, (__m256i)b); }
INLINE Lanes with_cost(Lanes sum, Lanes pair, const int32_t *window) {
  return sum + (Lanes)_mm256_madd_epi16((__m256i)pair, _mm256_set1_epi32(*window));
}
#else
INLINE Lanes least(Lanes a, Lanes b) {
  const Lanes less = a < b;
  return (a & less) | (b & ~less);
}
INLINE Lanes with_cost(Lanes sum, Lanes pair, const int32_t *window) {
  return sum + (pair << 16 >> 16) * (int16_t)*window + (pair >> 16) * (*window >> 16);
}
#endif
#if !defined(__AVX512F__)
INLINE Lanes marked(Lanes a, int lowest, int mark) { return (a & ~lowest) | mark; }
#endif

/* `trace` of one value: so many words of 32 bits, of branches of as many states as fit (8 if there are 3 bits for
 * each), in the order in which `advance` finds them. */
INLINE int words_of(int bits) { return bits == 4 ? 2 : 4; }

/* b where a bit of the state is set, otherwise a. */
INLINE Lanes either(Lanes state, int bit, Lanes a, Lanes b) {
#if defined(__AVX512F__)
  return (Lanes)_mm512_mask_mov_epi32((__m512i)a, _mm512_test_epi32_mask((__m512i)state, _mm512_set1_epi32(bit)), (__m512i)b);
#else
  const Lanes other = (state & bit) != 0;
  return (a & ~other) | (b & other);
#endif
}

/* The branch that lies in the lowest bits of `best` becomes the highest of a word, those before make room. */
INLINE Lanes appended(Lanes word, Lanes best, int bits) {
#if defined(__AVX512VBMI2__)
  return (Lanes)_mm512_shrdi_epi32((__m512i)word, (__m512i)best, bits);
#else
  return (word >> bits & ((1 << (32 - bits)) - 1)) | best << (32 - bits);
#endif
}

/* The states' branches in `trace`. */
INLINE Lanes branch_of(const Lanes *trace, int bits, Lanes state) {
  const int highest = 1 << (WINDOW - bits - 1);
  Lanes word = either(state, highest, trace[0], trace[words_of(bits) / 2]), place = state;
  if (words_of(bits) == 4)
    word = either(state, highest / 2, word, either(state, highest, trace[1], trace[3]));
  if (bits == 3) place = (state & 3) << 1 | (state >> 2 & 1);
  place = bits == 3 ? 8 + 3 * place : (place & (32 / bits - 1)) * bits;
  return word >> place & ((1 << bits) - 1);
}

/* Run the trellis over `count` values from `first` on. `metric[*now]` holds the cost of the best path into
 * every state (the upper WINDOW - bits bits of the window before), with its lowest bits in the lowest bits;
 * `trace`, if `traced`, gets those of the best windows. */
INLINE void advance(Search *s, int bits, int first, int count, int traced, int *now) {
  const int states = 1 << (WINDOW - bits), branches = 1 << bits, groups = states / branches;
  const int words = bits == 1 ? 2 : words_of(bits), rounds = bits == 1 ? 2 : 1;
  const int beside = groups < 4 ? groups : 4;
  for (int step = first; step < first + count; step++) {
    const Lanes pair = s->pairs[step];
    Lanes *after = s->metric[*now ^ 1];
    for (int round = 0; round < rounds; round++) {
      Lanes word[MOST_WORDS];
      for (int i = 0; i < words; i++) word[i] = (Lanes){0};
      for (int start = round * groups / rounds; start < (round + 1) * groups / rounds; start += beside)
#pragma GCC unroll 4
        for (int group = start; group < start + beside; group++) {
          /* The states before are the same for all windows that differ in their highest bits. */
          const Lanes *before = s->metric[*now] + group * branches;
          const int32_t *windows = s->windows + group * branches;
          __asm__("" : "+r"(windows)); /* or GCC keeps 256 addresses on the stack */
          Lanes best[1 << TRELLIS_BITS];
#pragma GCC unroll 16
          for (int branch = 0; branch < branches; branch++)
#pragma GCC unroll 16
            for (int high = 0; high < branches; high++) {
              const Lanes cost = with_cost(before[branch], pair, windows + high * states + branch);
              best[high] = branch ? least(cost, best[high]) : cost;
            }
#pragma GCC unroll 16
          for (int high = 0; high < branches; high++) {
            const int at = high * words / branches, mark = (high * groups + group - start) & (branches - 1);
            if (traced) word[at] = appended(word[at], best[high], bits);
            after[high * groups + group] = marked(best[high], branches - 1, mark);
          }
        }
      for (int i = 0; traced && i < words; i++) s->trace[step][i * rounds + round] = word[i];
    }
    if ((step + 1) % renewed(bits) == 0) {
      const Lanes reference = after[0];
      for (int state = 0; state < states; state++) after[state] -= reference;
    }
    *now ^= 1;
  }
}

/* Follow the best paths of all lanes back from `state`, over the whole block, to `codes`; returns where they begin. */
INLINE Lanes trace_back(Search *s, int bits, Lanes state) {
  const int states = 1 << (WINDOW - bits);
  for (int step = BLOCK - 1; step >= 0; step--) {
    const Lanes window = state << bits | branch_of(s->trace[step], bits, state);
    s->codes[step] = window >> (WINDOW - bits);
    state = window & (states - 1);
  }
  return state;
}

/* A block's pairs. One scale for all weights, so that the dearest value makes use of the bits; a weight that is
 * not 0 does not become 0, and b follows from what a became, so that the best v stays x. */
INLINE void block_pairs(const Block *b, int32_t pairs[BLOCK]) {
  float x[BLOCK] = {0}, a[BLOCK] = {0}, largest = 1e-30f;
  if (b->n == BLOCK) {
    memcpy(x, b->x, sizeof x);
    memcpy(a, b->weights, sizeof a);
  } else {
    memcpy(x, b->x, b->n * sizeof *x);
    memcpy(a, b->weights, b->n * sizeof *a);
  }
#pragma omp simd reduction(max : largest)
  for (int i = 0; i < BLOCK; i++) {
    const float value = x[i] * b->factor, low = value < FARTHEST ? value : FARTHEST; /* NaN, too */
    x[i] = low > -FARTHEST ? low : -FARTHEST;
    const float far = fabsf(x[i]) > 4 ? fabsf(x[i]) : 4, dear = a[i] * far;
    largest = dear > largest ? dear : largest;
  }
  const float scale = (MOST - FARTHEST / 2 - 2) / largest;
#pragma omp simd
  for (int i = 0; i < BLOCK; i++) {
    const float wanted = a[i] * scale, some = wanted > 1 ? wanted : 1; /* NaN, too */
    const float rounded = rintf(a[i] > 0 ? some : 0);
    pairs[i] = pair_of((int)rounded, (int)rintf(rounded * -(2 * ONE >> ONE_BITS) * x[i]));
  }
}

INLINE void load_pairs(Search *s, const Block *const *blocks, int used, int bits) {
  memset(s->pairs, 0, sizeof s->pairs);
  for (int lane = 0; lane < used; lane++) {
    int32_t pairs[BLOCK];
    block_pairs(blocks[lane], pairs);
    for (int i = 0; i < BLOCK; i++) ((int32_t *)&s->pairs[i])[lane] = pair_of((pairs[i] & 0xffff) << bits, pairs[i] >> 16);
  }
}

INLINE void store_codes(const Search *s, const Block *block, int lane) {
  for (int i = 0; i < BLOCK; i++) block->codes[i] = s->codes[i][lane];
}

/* Codes of up to SIDE blocks whose ring is closed in one pass: begun WARM values before the seam, the best
 * path tells the state at the seam, and the best path that ends in this state mostly began in it, too. Where
 * it did not, the seam's state is put down in `seams`; returns the lanes where it did, as bits. */
INLINE unsigned open_search(Search *s, const Block *const *blocks, int used, int bits, int32_t seams[SIDE]) {
  const int states = 1 << (WINDOW - bits), branches = 1 << bits;
  int now = 0;
  load_pairs(s, blocks, used, bits);
  for (int state = 0; state < states; state++) s->metric[0][state] = (Lanes){0} + (state & (branches - 1));
  advance(s, bits, BLOCK - WARM, WARM, 0, &now);
  advance(s, bits, 0, BLOCK, 1, &now);
  Lanes best = s->metric[now][0] & -branches, where = {0};
  for (int i = 1; i < states; i++) {
    const Lanes cost = s->metric[now][i] & -branches, better = cost < best;
    best = least(cost, best);
    where = (where & ~better) | (better & i);
  }
  const Lanes seam = trace_back(s, bits, where), begun = trace_back(s, bits, seam);
  unsigned closed = 0;
  memcpy(seams, &seam, sizeof seam);
  for (int lane = 0; lane < used; lane++)
    if (begun[lane] == seam[lane]) {
      closed |= 1u << lane;
      store_codes(s, blocks[lane], lane);
    }
  return closed;
}

/* Codes of up to SIDE blocks that are bound to begin and end in given states. */
INLINE void bound_search(Search *s, const Block *const *blocks, int used, int bits, const int32_t seams[SIDE]) {
  const int states = 1 << (WINDOW - bits), branches = 1 << bits;
  Lanes seam;
  int now = 0;
  memcpy(&seam, seams, sizeof seam);
  load_pairs(s, blocks, used, bits);
  for (int i = 0; i < states; i++) {
    const Lanes other = seam != i;
    s->metric[0][i] = (other & reached(bits) * (16 * MOST * ONE << bits)) + (i & (branches - 1));
  }
  advance(s, bits, 0, BLOCK, 1, &now);
  trace_back(s, bits, seam);
  for (int lane = 0; lane < used; lane++) store_codes(s, blocks[lane], lane);
}
