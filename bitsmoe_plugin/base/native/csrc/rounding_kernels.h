/* The parts of rounding that take the time, compiled once for each instruction set: included by
 * rounding_{avx512,avx2,portable}.c, which define ROUNDING, the name of the result. Vectors are GCC's (clang has
 * them too), which become what the instruction set has. */
#include "rounding.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

#include "rounding_lanes.h"
#include "rounding_search.h"

INLINE void search_width(Search *s, const Block *blocks, int64_t count, int bits) {
  const Block *group[LANES], *open[2 * LANES];
  int32_t seams[LANES], unclosed[2 * LANES];
  int waiting = 0;
  for (int64_t start = 0; start < count; start += LANES) {
    const int used = count - start < LANES ? (int)(count - start) : LANES;
    for (int lane = 0; lane < used; lane++) group[lane] = blocks + start + lane;
    const unsigned closed = open_search(s, group, used, bits, seams);
    for (int lane = 0; lane < used; lane++)
      if (!(closed >> lane & 1)) {
        open[waiting] = group[lane];
        unclosed[waiting++] = seams[lane];
      }
    const int last = start + LANES >= count;
    while (waiting >= LANES || (last && waiting)) {
      const int now = waiting < LANES ? waiting : LANES;
      for (int lane = now; lane < LANES; lane++) unclosed[lane] = 0;
      bound_search(s, open, now, bits, unclosed);
      waiting -= now;
      memmove(open, open + now, waiting * sizeof *open);
      memmove(unclosed, unclosed + now, waiting * sizeof *unclosed);
    }
  }
}

static void search_blocks(void *memory, const Block *blocks, int64_t count, const float *table, int bits) {
  Search *s = memory;
  s->reach = window_pairs(table, bits, s->windows);
  switch (bits) { /* constants, so that the loops over states unroll */
    case 1: search_width(s, blocks, count, 1); break;
    case 2: search_width(s, blocks, count, 2); break;
    case 3: search_width(s, blocks, count, 3); break;
    case 4: search_width(s, blocks, count, 4); break;
  }
}

#include "rounding_coupled.h"

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

INLINE void decode_width(const int32_t *codes, int size, const float *table, int bits, float scale, float *values) {
  for (int first = 0; first < size; first += BLOCK, codes += BLOCK, values += BLOCK) {
    const int n = size - first < BLOCK ? size - first : BLOCK;
    unsigned window = 0; /* a block's first windows reach around its ring */
    for (int i = BLOCK - WINDOW; i < BLOCK; i++) window = window >> bits | (unsigned)codes[i] << (WINDOW - bits);
    for (int i = 0; i < WINDOW && i < n; i++) {
      window = window >> bits | (unsigned)codes[i] << (WINDOW - bits);
      values[i] = table[window] * scale;
    }
#pragma omp simd
    for (int i = WINDOW; i < n; i++) {
      int32_t found = 0;
#pragma GCC unroll 8
      for (int back = 0; back * bits < WINDOW; back++) {
        const int place = WINDOW - bits * (back + 1);
        found |= place >= 0 ? codes[i - back] << place : codes[i - back] >> -place;
      }
      values[i] = table[found] * scale;
    }
  }
}

/* Values of a trellis's codes. */
static void decode(const int32_t *codes, int size, const float *table, int bits, float scale, float *values) {
  switch (bits) {
    case 1: decode_width(codes, size, table, 1, scale, values); break;
    case 2: decode_width(codes, size, table, 2, scale, values); break;
    case 3: decode_width(codes, size, table, 3, scale, values); break;
    case 4: decode_width(codes, size, table, 4, scale, values); break;
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
    sizeof(Search), search_blocks, sizeof(Coupled), search_coupled, best_scale, choose_scale, uniform_codes, decode,
    pass_on,
};
