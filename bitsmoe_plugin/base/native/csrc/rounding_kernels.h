/* The parts of rounding that take the time, compiled once for each instruction set: included by
 * rounding_{avx512,avx2,portable}.c, which define ROUNDING, the name of the result. Vectors are GCC's (clang has
 * them too), which become what the instruction set has. */
#include "rounding.h"
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef float UnalignedFloats __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));

typedef struct {
  Floats x[BLOCK], root[BLOCK], metric[2][1 << (WINDOW - 1)];
  Bytes trace[BLOCK << (WINDOW - 1)];
} Search;

INLINE Integers smaller(Integers a, Integers b) {
#if defined(__AVX512F__) /* gcc 12 does not see that the rest is one instruction */
  return (Integers)_mm512_min_epi32((__m512i)a, (__m512i)b);
#else
  const Integers less = a < b;
  return (a & less) | (b & ~less);
#endif
}

/* A cost whose lowest bits are the branch. */
INLINE Integers marked(Floats cost, int branches, int branch) {
#if defined(__AVX512F__) /* nor this */
  const __m512i kept = _mm512_set1_epi32(~(branches - 1)), mark = _mm512_set1_epi32(branch);
  return (Integers)_mm512_ternarylogic_epi32((__m512i)cost, kept, mark, 0xea); /* cost & kept | mark */
#else
  return ((Integers)cost & ~(branches - 1)) | branch;
#endif
}

/* Run the trellis over `count` values from `first` on. `metric[*now]` holds the cost of the best path into
 * every state (the upper WINDOW - bits bits of the window before); `trace` gets the lower bits of the best
 * window. Costs are not negative, so they compare as integers, and the branch travels in their lowest bits. */
INLINE void advance(Search *s, const float *table, int bits, int first, int count, int *now) {
  const int states = 1 << (WINDOW - bits), branches = 1 << bits, groups = states / branches;
  for (int step = 0; step < count; step++) {
    const Floats x = s->x[first + step], root = s->root[first + step];
    Bytes *trace = s->trace + step * states;
    Floats *after = s->metric[*now ^ 1];
    for (int group = 0; group < groups; group++) {
      /* The states before are the same for all windows that differ in their highest bits. */
      const Floats *before = s->metric[*now] + group * branches;
      const float *values = table + group * branches;
#pragma GCC unroll 16
      for (int high = 0; high < branches; high++) {
        Integers best;
#pragma GCC unroll 16
        for (int branch = 0; branch < branches; branch++) {
          const Floats error = x - root * values[high * states + branch];
          const Integers cost = marked(error * error + before[branch], branches, branch);
          best = branch ? smaller(cost, best) : cost;
        }
        trace[high * groups + group] = __builtin_convertvector(best, Bytes) & (int8_t)(branches - 1);
        after[high * groups + group] = (Floats)(best & ~(branches - 1));
      }
    }
    *now ^= 1;
  }
}

/* Follow the best paths of all lanes back from `state`, over the whole block. */
INLINE void trace_back(const Search *s, int bits, int32_t state[LANES], uint8_t codes[BLOCK][LANES]) {
  const int states = 1 << (WINDOW - bits);
  for (int step = BLOCK - 1; step >= 0; step--)
    for (int lane = 0; lane < LANES; lane++) {
      const int window = state[lane] << bits | ((const uint8_t *)(s->trace + step * states + state[lane]))[lane];
      codes[step][lane] = (uint8_t)(window >> (WINDOW - bits));
      state[lane] = window & (states - 1);
    }
}

INLINE void load_lanes(Search *s, const Block *const *blocks, int used) {
  memset(s->x, 0, sizeof s->x);
  memset(s->root, 0, sizeof s->root);
  for (int lane = 0; lane < used; lane++) {
    const Block *b = blocks[lane];
    for (int i = 0; i < b->n; i++) {
      ((float *)&s->root[i])[lane] = b->root[i];
      ((float *)&s->x[i])[lane] = b->x[i] * b->factor * b->root[i];
    }
  }
}

INLINE void store_codes(const Block *const *blocks, int lane, uint8_t codes[BLOCK][LANES]) {
  for (int i = 0; i < BLOCK; i++) blocks[lane]->codes[i] = codes[i][lane];
}

/* Codes of up to LANES blocks whose ring is closed in one pass: begun WARM values before the seam, the best
 * path tells the state at the seam, and the best path that ends in this state mostly began in it, too. Where
 * it did not, the seam's state is put down in `seams`; returns the lanes where it did, as bits. */
INLINE unsigned open_search(Search *s, const Block *const *blocks, int used, const float *table, int bits,
                            int32_t seams[LANES]) {
  const int states = 1 << (WINDOW - bits);
  uint8_t codes[BLOCK][LANES];
  int32_t state[LANES] = {0};
  int now = 0;
  load_lanes(s, blocks, used);
  memset(s->metric[0], 0, states * sizeof(Floats));
  advance(s, table, bits, BLOCK - WARM, WARM, &now);
  advance(s, table, bits, 0, BLOCK, &now);
  Integers best = (Integers)s->metric[now][0], where = {0};
  for (int i = 1; i < states; i++) {
    const Integers cost = (Integers)s->metric[now][i], better = cost < best;
    best = smaller(cost, best);
    where = (where & ~better) | (better & i);
  }
  memcpy(state, &where, sizeof state);
  trace_back(s, bits, state, codes);
  memcpy(seams, state, sizeof state);
  trace_back(s, bits, state, codes);
  unsigned closed = 0;
  for (int lane = 0; lane < used; lane++)
    if (state[lane] == seams[lane]) {
      closed |= 1u << lane;
      store_codes(blocks, lane, codes);
    }
  return closed;
}

/* Codes of up to LANES blocks that are bound to begin and end in given states. */
INLINE void bound_search(Search *s, const Block *const *blocks, int used, const float *table, int bits,
                         const int32_t seams[LANES]) {
  uint8_t codes[BLOCK][LANES];
  int32_t state[LANES];
  int now = 0;
  load_lanes(s, blocks, used);
  for (int i = 0; i < 1 << (WINDOW - bits); i++)
    for (int lane = 0; lane < LANES; lane++) ((float *)&s->metric[0][i])[lane] = i == seams[lane] ? 0.f : 1e30f;
  advance(s, table, bits, 0, BLOCK, &now);
  memcpy(state, seams, sizeof state);
  trace_back(s, bits, state, codes);
  for (int lane = 0; lane < used; lane++) store_codes(blocks, lane, codes);
}

INLINE void search_width(Search *s, const Block *blocks, int64_t count, const float *table, int bits) {
  const Block *group[LANES], *open[2 * LANES];
  int32_t seams[LANES], unclosed[2 * LANES];
  int waiting = 0;
  for (int64_t start = 0; start < count; start += LANES) {
    const int used = count - start < LANES ? (int)(count - start) : LANES;
    for (int lane = 0; lane < used; lane++) group[lane] = blocks + start + lane;
    const unsigned closed = open_search(s, group, used, table, bits, seams);
    for (int lane = 0; lane < used; lane++)
      if (!(closed >> lane & 1)) {
        open[waiting] = group[lane];
        unclosed[waiting++] = seams[lane];
      }
    const int last = start + LANES >= count;
    while (waiting >= LANES || (last && waiting)) {
      const int now = waiting < LANES ? waiting : LANES;
      for (int lane = now; lane < LANES; lane++) unclosed[lane] = 0;
      bound_search(s, open, now, table, bits, unclosed);
      waiting -= now;
      memmove(open, open + now, waiting * sizeof *open);
      memmove(unclosed, unclosed + now, waiting * sizeof *unclosed);
    }
  }
}

static void search_blocks(void *memory, const Block *blocks, int64_t count, const float *table, int bits) {
  Search *s = memory;
  switch (bits) { /* constants, so that the loops over states unroll */
    case 1: search_width(s, blocks, count, table, 1); break;
    case 2: search_width(s, blocks, count, table, 2); break;
    case 3: search_width(s, blocks, count, table, 3); break;
    case 4: search_width(s, blocks, count, table, 4); break;
  }
}

#include "rounding_coupled.h"

/* Square roots of weights [size], each block's largest being 1: only their ratios within a block matter. */
static void root_weights(const float *weights, int size, float *root) {
  for (int first = 0; first < size; first += BLOCK) {
    const int n = size - first < BLOCK ? size - first : BLOCK;
    float largest = 1.17549435e-38f;
    for (int i = 0; i < n; i++) largest = weights[first + i] > largest ? weights[first + i] : largest;
    for (int i = 0; i < n; i++) root[first + i] = sqrtf(weights[first + i] / largest);
  }
}

/* Values rounded half to even; |v| < 2^22. */
INLINE float nearest(float v) { return (v + 12582912.f) - 12582912.f; }

/* Weighted squared error of a row on the uniform grid of this step. */
INLINE float grid_error(const float *row, const float *weights, int size, float step, int bits) {
  const float top = (float)((1 << bits) - 1), half = top / 2, inverse = 1.f / fmaxf(step, 1.17549435e-38f);
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < size; i++) {
    float code = row[i] * inverse + half;
    code = code < 0 ? 0 : code;
    code = nearest(code > top ? top : code);
    const float error = (code - half) * step - row[i];
    sum += weights[i] * error * error;
  }
  return sum;
}

static void best_scale(const float *row, const float *weights, int size, int bits, float unit, float *scale,
                              float *distortion) {
  float energy = 0, largest = 0, weighted = 0;
#pragma omp simd reduction(+ : energy, weighted) reduction(max : largest)
  for (int i = 0; i < size; i++) {
    energy += row[i] * row[i];
    weighted += weights[i] * row[i] * row[i];
    largest = fabsf(row[i]) > largest ? fabsf(row[i]) : largest;
  }
  *scale = 0;
  *distortion = weighted;
  if (bits == 0) return;
  const float tiny = 1.17549435e-38f;
  const float high = fmaxf(largest / ((float)((1 << bits) - 1) / 2 * unit), tiny);
  const float low = fmaxf(fminf(0.6f * sqrtf(energy / size), high), tiny);
  *distortion = INFINITY;
  for (int c = 0; c < CANDIDATES; c++) {
    const float candidate = exp2f(log2f(low) + (log2f(high) - log2f(low)) * ((float)c / (CANDIDATES - 1)));
    const float error = grid_error(row, weights, size, candidate * unit, bits);
    if (error < *distortion) {
      *distortion = error;
      *scale = candidate;
    }
  }
}

/* The code near `start` whose scale exp2(low + code * step) suits a row best, on the uniform grid. */
static int choose_scale(const float *row, const float *weights, int size, int bits, float unit, float start,
                               float low, float step) {
  float least = INFINITY;
  int best = (int)fminf(fmaxf(start - NEARBY, 0), LEVELS - 1);
  for (int offset = -NEARBY; offset <= NEARBY; offset++) {
    const float code = fminf(fmaxf(start + offset, 0), LEVELS - 1);
    const float error = grid_error(row, weights, size, exp2f(low + code * step) * unit, bits);
    if (error < least) {
      least = error;
      best = (int)code;
    }
  }
  return best;
}

/* Codes of a uniform row; its values follow from them. */
static void uniform_codes(const float *row, int size, float step, int bits, int32_t *codes) {
  const float top = (float)((1 << bits) - 1), inverse = 1.f / fmaxf(step, 1.17549435e-38f);
#pragma omp simd
  for (int i = 0; i < size; i++) {
    float code = row[i] * inverse + top / 2;
    code = code < 0 ? 0 : code;
    codes[i] = (int32_t)nearest(code > top ? top : code);
  }
}

/* What a row's error does to the rows after it in this call; returns what is left of its own target. */
static float pass_on(float *work, const float *value, float *target, const float *weights, int size,
                            const float *unit, int rows) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < size; i++) {
    const float left = target[i] - value[i];
    sum += weights[i] * left * left;
    work[i] -= value[i];
  }
  for (int row = 1; row < rows; row++) {
    float *later = target + (int64_t)row * size;
    const float share = unit[row];
#pragma omp simd
    for (int i = 0; i < size; i++) later[i] += share * work[i];
  }
  return sum;
}

const Rounding ROUNDING = {
    sizeof(Search), search_blocks, sizeof(Coupled), search_coupled, root_weights, best_scale, choose_scale, uniform_codes, pass_on,
};
