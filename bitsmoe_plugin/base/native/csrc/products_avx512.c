/* Products in 16-bit integers with AVX-512 VNNI; see products.h. */
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")
#include <immintrin.h>

#include "products.h"

#define INLINE static inline __attribute__((always_inline))

enum { LANES = 16, ROWS = 8, VECTORS = STRIPE / LANES };

INLINE __m512 load(const Source *s, int64_t row, int64_t column, __mmask16 used) {
  const int64_t at = (s->index ? s->index[row] : row) * s->stride + column;
  if (!s->bfloat16) return _mm512_maskz_loadu_ps(used, (const float *)s->values + at);
  const __m256i half = _mm256_maskz_loadu_epi16(used, (const uint16_t *)s->values + at);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

/* Largest absolute values as integers: those of NaN and infinity are above all others. */
INLINE __m512i larger(__m512i largest, __m512 v) {
  return _mm512_max_epi32(largest, _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff)));
}

/* Scales of stretches with these largest values; returns what their values are to be multiplied with. */
INLINE __m512 scales_of(__m512i largest, __m512 *scales) {
  const __m512 value = _mm512_castsi512_ps(largest);
  const __mmask16 finite = _mm512_cmplt_epi32_mask(largest, _mm512_set1_epi32(0x7f800000));
  const __mmask16 some = _mm512_mask_cmp_ps_mask(finite, value, _mm512_set1_ps(1e-34f), _CMP_GE_OQ);
  *scales = _mm512_maskz_mul_ps(some, value, _mm512_set1_ps(1.f / HIGHEST));
  *scales = _mm512_mask_blend_ps(finite, _mm512_set1_ps(NAN), *scales);
  return _mm512_maskz_div_ps(some, _mm512_set1_ps(HIGHEST), value);
}

INLINE __m512i rounded(__m512 v, __m512 factor) { return _mm512_cvtps_epi32(_mm512_mul_ps(v, factor)); }

static void pack_rows(const Source *s, int64_t first, int rows, int64_t begin, int count, int16_t *integers,
                      float *scales) {
  int32_t *pairs = (int32_t *)integers;
  for (int row = 0; row < STRIPE; row++) {
    __m512 part[STRETCH / LANES];
    __m512i largest = _mm512_setzero_si512();
    for (int i = 0; i < STRETCH / LANES; i++) {
      const int left = count - i * LANES;
      const __mmask16 used = row >= rows || left <= 0 ? 0 : left < LANES ? (1u << left) - 1 : 0xffff;
      part[i] = used ? load(s, first + row, begin + i * LANES, used) : _mm512_setzero_ps();
      largest = larger(largest, part[i]);
    }
    __m512 scale;
    const __m512 factor = scales_of(_mm512_set1_epi32(_mm512_reduce_max_epi32(largest)), &scale);
    scales[row] = _mm512_cvtss_f32(scale);
    int32_t both[PAIRS] __attribute__((aligned(64)));
    for (int i = 0; i < STRETCH / LANES; i++)
      _mm256_store_si256((__m256i *)both + i, _mm512_cvtsepi32_epi16(rounded(part[i], factor)));
    for (int pair = 0; pair < PAIRS; pair++) pairs[pair * STRIPE + row] = both[pair];
  }
}

INLINE __m512 weighted(const Source *s, const float *root, int64_t row, int64_t column, __mmask16 used) {
  const __m512 v = load(s, row, column, used);
  return root ? _mm512_mul_ps(v, _mm512_set1_ps(root[row])) : v;
}

static void pack_columns(const Source *s, const float *root, int64_t first, int rows, int64_t begin, int count,
                         int16_t *integers, float *scales) {
  for (int i = 0; i < VECTORS; i++) {
    const int left = rows - i * LANES;
    const __mmask16 used = left <= 0 ? 0 : left < LANES ? (1u << left) - 1 : 0xffff;
    const int64_t column = first + i * LANES;
    __m512i largest = _mm512_setzero_si512();
    for (int t = 0; t < count && used; t++) largest = larger(largest, weighted(s, root, begin + t, column, used));
    __m512 scale;
    const __m512 factor = scales_of(largest, &scale);
    _mm512_storeu_ps(scales + i * LANES, scale);
    for (int pair = 0; pair < PAIRS; pair++) {
      __m512i low = _mm512_setzero_si512(), high = low;
      const int t = 2 * pair;
      if (used && t < count) low = rounded(weighted(s, root, begin + t, column, used), factor);
      if (used && t + 1 < count) high = rounded(weighted(s, root, begin + t + 1, column, used), factor);
      const __m512i both = _mm512_mask_blend_epi16(0xaaaaaaaa, low, _mm512_slli_epi32(high, 16));
      _mm512_store_si512((int32_t *)integers + pair * STRIPE + i * LANES, both);
    }
  }
}

/* sum += products of pairs. GCC 12 copies and spills all sums around the intrinsic. */
INLINE void add_pairs(__m512i *sum, __m512i a, __m512i b) { __asm__("vpdpwssd %2, %1, %0" : "+v"(*sum) : "v"(a), "v"(b)); }

INLINE void add_rows(const int16_t *a, const float *a_scales, const int16_t *b, const float *b_scales, int pairs,
                     float *sums) {
  __m512i sum[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 3
    for (int v = 0; v < VECTORS; v++) sum[r][v] = _mm512_setzero_si512();
  for (int pair = 0; pair < pairs; pair++, a += 2 * STRIPE, b += 2 * STRIPE) {
    __m512i right[VECTORS];
#pragma GCC unroll 3
    for (int v = 0; v < VECTORS; v++) right[v] = _mm512_load_si512(b + 2 * LANES * v);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
      int32_t both;
      memcpy(&both, a + 2 * r, 4);
      const __m512i left = _mm512_set1_epi32(both);
#pragma GCC unroll 3
      for (int v = 0; v < VECTORS; v++) add_pairs(&sum[r][v], left, right[v]);
    }
  }
#pragma GCC unroll 3
  for (int v = 0; v < VECTORS; v++) {
    const __m512 scale = _mm512_loadu_ps(b_scales + LANES * v);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
      float *out = sums + r * STRIPE + LANES * v;
      const __m512 found = _mm512_mul_ps(_mm512_cvtepi32_ps(sum[r][v]), scale);
      _mm512_store_ps(out, _mm512_fmadd_ps(found, _mm512_set1_ps(a_scales[r]), _mm512_load_ps(out)));
    }
  }
}

static void add_products(const int16_t *a, const float *a_scales, const int16_t *b, const float *b_scales, int pairs,
                         float *sums) {
  for (int first = 0; first < STRIPE; first += ROWS)
    add_rows(a + 2 * first, a_scales + first, b, b_scales, pairs, sums + first * STRIPE);
}

const Products bitsmoe_products_avx512 = {pack_rows, pack_columns, add_products};
#endif
