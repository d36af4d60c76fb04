/* The search for trellis codes; what it adds up is in rounding_costs.h. Included by rounding_kernels.h. */
#include "rounding_costs.h"

enum { MOST_WORDS = 4 };

typedef struct {
  Integers pairs[BLOCK];
  Integers metric[2][1 << (WINDOW - 1)];
  Integers trace[BLOCK][MOST_WORDS]; /* branches of the best windows, see words_of */
  Integers codes[BLOCK];
  int32_t windows[1 << WINDOW]; /* pairs */
  float reach;
} Search;

/* `trace` of one value: so many words of 32 bits, of branches of as many states as fit (8 if there are 3 bits for
 * each), in the order in which `advance` finds them. */
INLINE int words_of(int bits) { return bits == 4 ? 2 : 4; }

/* The states' branches in `trace`. */
INLINE Integers branch_of(const Integers *trace, int bits, Integers state) {
  const int highest = 1 << (WINDOW - bits - 1);
  Integers word = either(state, highest, trace[0], trace[words_of(bits) / 2]), place = state;
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
    const Integers factors = s->pairs[step];
    Integers *after = s->metric[*now ^ 1];
    for (int round = 0; round < rounds; round++) {
      Integers word[MOST_WORDS];
      for (int i = 0; i < words; i++) word[i] = (Integers){0};
      for (int start = round * groups / rounds; start < (round + 1) * groups / rounds; start += beside)
#pragma GCC unroll 4
        for (int group = start; group < start + beside; group++) {
          /* The states before are the same for all windows that differ in their highest bits. */
          const Integers *before = s->metric[*now] + group * branches;
          const int32_t *windows = s->windows + group * branches;
          __asm__("" : "+r"(windows)); /* or GCC keeps 256 addresses on the stack */
          Integers best[1 << TRELLIS_BITS];
#pragma GCC unroll 16
          for (int branch = 0; branch < branches; branch++)
#pragma GCC unroll 16
            for (int high = 0; high < branches; high++) {
              const Integers cost = with_product(before[branch], factors, windows + high * states + branch);
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
    if ((step + 1) % (16 >> bits) == 0) {
      const Integers reference = after[0];
      for (int state = 0; state < states; state++) after[state] -= reference;
    }
    *now ^= 1;
  }
}

/* Follow the best paths of all lanes back from `state`, over the whole block, to `codes`; returns where they begin. */
INLINE Integers trace_back(Search *s, int bits, Integers state) {
  const int states = 1 << (WINDOW - bits);
  for (int step = BLOCK - 1; step >= 0; step--) {
    const Integers window = state << bits | branch_of(s->trace[step], bits, state);
    s->codes[step] = window >> (WINDOW - bits);
    state = window & (states - 1);
  }
  return state;
}

/* Codes of those lanes' blocks. */
INLINE void store_codes(const Search *s, const Block *const *blocks, unsigned lanes) {
  for (int part = 0; part < BLOCK; part += LANES) {
    Integers rows[LANES];
    transpose(s->codes + part, rows);
#pragma GCC unroll 16
    for (int lane = 0; lane < LANES; lane++)
      if (lanes >> lane & 1) memcpy(blocks[lane]->codes + part, rows + lane, sizeof *rows);
  }
}

/* Codes of up to LANES blocks whose ring is closed in one pass: begun WARM values before the seam, the best
 * path tells the state at the seam, and the best path that ends in this state mostly began in it, too. Where
 * it did not, the seam's state is put down in `seams`; returns the lanes where it did, as bits. */
INLINE unsigned open_search(Search *s, const Block *const *blocks, int used, int bits, int32_t seams[LANES]) {
  const int states = 1 << (WINDOW - bits), branches = 1 << bits;
  int now = 0;
  block_pairs(blocks, used, s->reach, bits, s->pairs);
  for (int state = 0; state < states; state++) s->metric[0][state] = (Integers){0} + (state & (branches - 1));
  advance(s, bits, BLOCK - WARM, WARM, 0, &now);
  advance(s, bits, 0, BLOCK, 1, &now);
  Integers best = s->metric[now][0] & -branches, where = {0};
  for (int i = 1; i < states; i++) {
    const Integers cost = s->metric[now][i] & -branches, better = cost < best;
    best = least(cost, best);
    where = (where & ~better) | (better & i);
  }
  const Integers seam = trace_back(s, bits, where), begun = trace_back(s, bits, seam);
  unsigned closed = 0;
  memcpy(seams, &seam, sizeof seam);
  for (int lane = 0; lane < used; lane++) closed |= (unsigned)(begun[lane] == seam[lane]) << lane;
  store_codes(s, blocks, closed);
  return closed;
}

/* Codes of up to LANES blocks that are bound to begin and end in given states. */
INLINE void bound_search(Search *s, const Block *const *blocks, int used, int bits, const int32_t seams[LANES]) {
  const int states = 1 << (WINDOW - bits), branches = 1 << bits;
  Integers seam;
  int now = 0;
  memcpy(&seam, seams, sizeof seam);
  block_pairs(blocks, used, s->reach, bits, s->pairs);
  for (int i = 0; i < states; i++) {
    const Integers other = seam != i;
    s->metric[0][i] = (other & ROOM) + (i & (branches - 1));
  }
  advance(s, bits, 0, BLOCK, 1, &now);
  trace_back(s, bits, seam);
  store_codes(s, blocks, (1u << used) - 1);
}
