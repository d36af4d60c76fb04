/* Products of rows of codes and up to MOST vectors at a time with AVX-512; see avx512.c, which includes this. They are
 * made of the bytes that a decoder has in its registers where they can be: it waits for permutations meanwhile. */
#include <immintrin.h>

#include "bitsmoe.h"

enum { MOST = 2 };

/* q is 256 * hi + lo, both signed: a chunk of inputs is CHUNK bytes hi, then CHUNK bytes lo. */
INLINE int8_t *hi_of(int16_t *q, int i) { return (int8_t *)q + i / CHUNK * 2 * CHUNK + i % CHUNK; }
INLINE __m512i load_hi(const int16_t *q, int chunk) { return _mm512_loadu_si512(q + chunk * CHUNK); }
INLINE __m512i load_lo(const int16_t *q, int chunk) { return _mm512_loadu_si512(q + chunk * CHUNK + CHUNK / 2); }

INLINE __m512i broadcast(const int16_t *bytes, int i) {
  int32_t word;
  memcpy(&word, (const int8_t *)bytes + 4 * i, 4);
  return _mm512_set1_epi32(word);
}

/* sum + products of unsigned u and signed q, in fours. The empty statement keeps a sum that a loop adds up in one
 * register: gcc otherwise copies it at each step. */
INLINE __m512i add_products(__m512i sum, __m512i u, __m512i q) {
  sum = _mm512_dpbusd_epi32(sum, u, q);
  __asm__("" : "+v"(sum));
  return sum;
}

/* 256 * hi + lo, or, if odd, twice that - rest; count vectors. */
INLINE void combine(const __m512i *hi, const __m512i *lo, int32_t rest, int odd, int count, __m512 *out) {
  for (int i = 0; i < count; i++) {
    __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(hi[i], 8), lo[i]);
    if (odd) sum = _mm512_sub_epi32(_mm512_add_epi32(sum, sum), _mm512_set1_epi32(rest));
    out[i] = _mm512_cvtepi32_ps(sum);
  }
}

INLINE void add_columns(const Term *term, const __m512i hi[QUAD], const __m512i lo[QUAD], int odd, float *out) {
  __m512 sums[QUAD], factor = _mm512_set1_ps(odd ? term->factor : 2 * term->factor);
  combine(hi, lo, term->rest, odd, QUAD, sums);
#pragma GCC unroll 4
  for (int i = 0; i < QUAD; i++)
    _mm512_storeu_ps(out + 16 * i, _mm512_fmadd_ps(sums[i], factor, _mm512_loadu_ps(out + 16 * i)));
}

/* Decodes a tile to `tile`, unless it stands there, and multiplies it with `count` <= MOST terms. Columns of a chunk stand
 * in the order of decode_quad's registers. */
INLINE void tile_products(Packed p, Way way, const char *ahead, uint8_t *tile, const Term *terms, int count, int column,
                          int odd) {
  __m512i hi[MOST][QUAD], lo[MOST][QUAD], u[QUAD];
  Constants c;
  if (way != STORED) c = constants_of(p.decoder);
  __mmask64 bytes = way == STORED ? 0 : bytes_of(2 - p.tail, p.decoder->bits);
#pragma GCC unroll 2
  for (int m = 0; m < count; m++)
#pragma GCC unroll 4
    for (int i = 0; i < QUAD; i++) {
      hi[m][i] = _mm512_setzero_si512();
      lo[m][i] = _mm512_set1_epi32((int32_t)terms[m].start);
    }
  for (int r = 0; r < p.rows; r += QUAD, tile += QUAD * CHUNK) {
    if (way != STORED) {
      const int bytes_ahead = 32 * (way == QUADS_1 ? 1 : way == QUADS_2 ? 2 : p.decoder->bits);
      for (int at = 0; at < bytes_ahead; at += LINE) __builtin_prefetch(ahead + at);
      ahead += bytes_ahead;
      decode_quad(&p, &c, bytes, p.rows - r, way, u);
    }
#pragma GCC unroll 4
    for (int i = 0; i < QUAD; i++) {
      if (way == STORED) u[i] = _mm512_loadu_si512(tile + CHUNK * i);
      else _mm512_storeu_si512(tile + CHUNK * i, u[i]);
    }
#pragma GCC unroll 2
    for (int m = 0; m < count; m++) {
      __m512i high = broadcast(terms[m].q, r / QUAD), low = broadcast(terms[m].q + CHUNK / 2, r / QUAD);
#pragma GCC unroll 4
      for (int i = 0; i < QUAD; i++) {
        hi[m][i] = add_products(hi[m][i], u[i], high);
        lo[m][i] = add_products(lo[m][i], u[i], low);
      }
    }
  }
#pragma GCC unroll 2
  for (int m = 0; m < count; m++) add_columns(&terms[m], hi[m], lo[m], odd, terms[m].out + column);
}

INLINE void tile_products_of(const Packed *p, Way way, const char *ahead, uint8_t *tile, const Term *terms, int count,
                             int column, int odd) {
  if (count == 2) tile_products(*p, way, ahead, tile, terms, 2, column, odd);
  else if (count == 1) tile_products(*p, way, ahead, tile, terms, 1, column, odd);
  else tile_products(*p, way, ahead, tile, terms, 0, column, odd);
}

static int decode_tile(const Decoder *d, const uint32_t *words, int64_t stride, int rows, int tail, const void *ahead,
                       int16_t *tile, const Term *terms, int count, int column) {
  const Packed p = {d, words, stride, rows, tail};
  const int done = count < MOST ? count : MOST, odd = d->offset2 % 2;
  uint8_t *to = (uint8_t *)tile;
  switch (way_of(d, tail)) {
    case QUADS_2: tile_products_of(&p, QUADS_2, ahead, to, terms, done, column, odd); break;
    case QUADS_1: tile_products_of(&p, QUADS_1, ahead, to, terms, done, column, odd); break;
    case WINDOWS: tile_products_of(&p, WINDOWS, ahead, to, terms, done, column, odd); break;
    default: tile_products_of(&p, FIELDS, ahead, to, terms, done, column, odd);
  }
  return done;
}

static void tile_dot(const int16_t *tile, int rows, const Term *terms, int count, int column, int32_t offset2) {
  const Packed p = {.rows = rows};
  uint8_t *from = (uint8_t *)tile; /* which stays as it is */
  for (; count >= 2; count -= 2, terms += 2) tile_products(p, STORED, NULL, from, terms, 2, column, offset2 % 2);
  if (count) tile_products(p, STORED, NULL, from, terms, 1, column, offset2 % 2);
}

/* Sums of four vectors. */
INLINE __m128 reduce4(const __m512 v[4]) {
  __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
  __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
  __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  __m512 sums = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  __m256 half = _mm256_add_ps(_mm512_castps512_ps256(sums), _mm512_extractf32x8_ps(sums, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

/* A share of `start` for each of the lanes, which are added up. */
INLINE __m512i shares_of(int64_t start) {
  __m512i share = _mm512_set1_epi32((int32_t)(start >> 4));
  return _mm512_mask_add_epi32(share, 1, share, _mm512_set1_epi32((int32_t)(start & 15)));
}

INLINE void add_rows(const Term *term, const __m512i hi[QUAD], const __m512i lo[QUAD], int odd) {
  __m512 sums[QUAD];
  combine(hi, lo, 0, 0, QUAD, sums);
  __m128 out = _mm_fmadd_ps(reduce4(sums), _mm_set1_ps(2 * term->factor), _mm_loadu_ps(term->out));
  if (odd) out = _mm_fnmadd_ps(_mm_set1_ps((float)term->rest), _mm_set1_ps(term->factor), out);
  _mm_storeu_ps(term->out, out);
}

/* The same of QUAD rows, each at `rows` + its number times `to_stride`. */
INLINE void rows_products(const Packed *p, Way way, int16_t *rows, int64_t to_stride, int chunks, const Term *terms,
                          int count, int odd) {
  __m512i hi[MOST][QUAD], lo[MOST][QUAD];
  Constants c;
  if (way != STORED) c = constants_of(p->decoder);
  const int bits = way == STORED ? 0 : p->decoder->bits;
  const uint32_t *words[QUAD];
#pragma GCC unroll 4
  for (int r = 0; r < QUAD && way != STORED; r++) words[r] = p->words + (r < p->rows ? r : p->rows - 1) * p->stride;
#pragma GCC unroll 2
  for (int m = 0; m < count; m++)
#pragma GCC unroll 4
    for (int r = 0; r < QUAD; r++) {
      hi[m][r] = _mm512_setzero_si512();
      lo[m][r] = shares_of(terms[m].start);
    }
  for (int i = 0; i < chunks; i++) {
    __mmask64 bytes = way == STORED ? 0 : bytes_of(p->tail && i == chunks - 1 ? 1 : 2, bits);
    const char *ahead = way == STORED ? NULL : (const char *)p->words + AHEAD + (int64_t)i * 32 * bits;
    for (int at = 0; at < 32 * bits; at += LINE) __builtin_prefetch(ahead + at);
    __m512i u[QUAD];
#pragma GCC unroll 4
    for (int r = 0; r < QUAD; r++) {
      int16_t *at = rows + r * to_stride + i * CHUNK;
      if (way == STORED) u[r] = _mm512_loadu_si512(at);
      else {
        u[r] = decode(&c, words[r], bytes, way == WINDOWS);
        words[r] += 2 * bits;
        _mm512_storeu_si512(at, u[r]);
      }
    }
#pragma GCC unroll 2
    for (int m = 0; m < count; m++) {
      __m512i high = load_hi(terms[m].q, i), low = load_lo(terms[m].q, i);
#pragma GCC unroll 4
      for (int r = 0; r < QUAD; r++) {
        hi[m][r] = add_products(hi[m][r], u[r], high);
        lo[m][r] = add_products(lo[m][r], u[r], low);
      }
    }
  }
#pragma GCC unroll 2
  for (int m = 0; m < count; m++) add_rows(&terms[m], hi[m], lo[m], odd);
}

INLINE void rows_products_of(const Packed *p, Way way, int16_t *rows, int64_t to_stride, int chunks, const Term *terms,
                             int count, int odd) {
  if (count == 2) rows_products(p, way, rows, to_stride, chunks, terms, 2, odd);
  else if (count == 1) rows_products(p, way, rows, to_stride, chunks, terms, 1, odd);
  else rows_products(p, way, rows, to_stride, chunks, terms, 0, odd);
}

static int decode_rows(const Decoder *d, const uint32_t *words, int64_t stride, int rows, int chunks, int tail,
                       int16_t *out, int64_t out_stride, const Term *terms, int count) {
  const Packed p = {d, words, stride, rows, tail};
  const int done = count < MOST ? count : MOST, odd = d->offset2 % 2;
  if (d->trellis) rows_products_of(&p, WINDOWS, out, out_stride, chunks, terms, done, odd);
  else rows_products_of(&p, FIELDS, out, out_stride, chunks, terms, done, odd);
  return done;
}

static void rows_dot(const int16_t *rows, int64_t stride, int chunks, const Term *terms, int count, int32_t offset2) {
  const Packed p = {0};
  int16_t *from = (int16_t *)rows; /* which stay as they are */
  for (; count >= 2; count -= 2, terms += 2) rows_products(&p, STORED, from, stride, chunks, terms, 2, offset2 % 2);
  if (count) rows_products(&p, STORED, from, stride, chunks, terms, 1, offset2 % 2);
}
