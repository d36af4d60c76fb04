/* The kernels with AVX-512 (F, BW, VL, VBMI, VNNI: Intel from Ice Lake on, AMD from Zen 4 on).
 *
 * A window or code of up to 8 bits is any 8 bits of a 64-bit lane: one byte permutation brings the right
 * bytes into each lane, VPMULTISHIFTQB takes the fields out, and the 256-entry table is two VPERMI2B. */
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,avx2,fma,f16c")
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "dense_kernels.h"
#include "gating_kernels.h"
#include "tiles.h"

#define INLINE static inline __attribute__((always_inline))

/* exp2 to 1e-7: 2^round(x) times the Taylor series of exp at the remainder, within +-0.35. */
INLINE __m512 exp2_vector(__m512 x) {
  __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 t = _mm512_mul_ps(_mm512_sub_ps(x, whole), _mm512_set1_ps(0.69314718056f));
  __m512 p = _mm512_set1_ps(1.0f / 5040);
  static const float series[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1, 1};
  for (int i = 0; i < 7; i++) p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(series[i]));
  return _mm512_scalef_ps(p, whole);
}

static void row_scales(const uint8_t *codes, const uint16_t *low, const uint16_t *step, int n, float *out) {
  for (int i = 0; i < n; i += 16) {
    __mmask16 mask = n - i >= 16 ? 0xffff : (__mmask16)((1u << (n - i)) - 1);
    __m512 base = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, low + i));
    __m512 slope = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, step + i));
    __m512i code = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, codes + i));
    code = _mm512_and_si512(code, _mm512_set1_epi32(31));
    _mm512_mask_storeu_ps(out + i, mask, exp2_vector(_mm512_fmadd_ps(_mm512_cvtepi32_ps(code), slope, base)));
  }
}

static int select_rows(const uint8_t *codes, int width, const float *scales, int n, int32_t *order,
                       float *chosen) {
  __m512i wanted = _mm512_set1_epi8((char)(width << 5)), top = _mm512_set1_epi8((char)0xe0);
  __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  int count = 0;
  for (int i = 0; i < n; i += 64) {
    __mmask64 inside = n - i >= 64 ? ~(__mmask64)0 : ((__mmask64)1 << (n - i)) - 1;
    __m512i code = _mm512_maskz_loadu_epi8(inside, codes + i);
    __mmask64 found = _mm512_mask_cmpeq_epi8_mask(inside, _mm512_and_si512(code, top), wanted);
    for (int at = i; found; at += 16, found >>= 16) {
      __mmask16 here = (__mmask16)found;
      __m512i index = _mm512_add_epi32(lanes, _mm512_set1_epi32(at));
      _mm512_storeu_si512(order + count, _mm512_maskz_compress_epi32(here, index));
      _mm512_storeu_ps(chosen + count, _mm512_maskz_compress_ps(here, _mm512_maskz_loadu_ps(here, scales + at)));
      count += __builtin_popcount(here);
    }
  }
  return count;
}

/* q is 256 * hi + lo, both signed: a chunk of inputs is CHUNK bytes hi, then CHUNK bytes lo. */
INLINE int8_t *hi_of(int16_t *q, int i) { return (int8_t *)q + i / CHUNK * 2 * CHUNK + i % CHUNK; }
INLINE __m512i load_hi(const int16_t *q, int chunk) { return _mm512_loadu_si512(q + chunk * CHUNK); }
INLINE __m512i load_lo(const int16_t *q, int chunk) { return _mm512_loadu_si512(q + chunk * CHUNK + CHUNK / 2); }

static float quantize(const float *a, int n, int padded, int16_t *q, int32_t *sum, float *rest) {
  __m512 largest = _mm512_setzero_ps(), poison = _mm512_setzero_ps();
  for (int i = 0; i < n; i += 16) {
    __mmask16 mask = n - i >= 16 ? 0xffff : (__mmask16)((1u << (n - i)) - 1);
    __m512 v = _mm512_maskz_loadu_ps(mask, a + i);
    largest = _mm512_max_ps(_mm512_abs_ps(v), largest);
    poison = _mm512_fmadd_ps(v, _mm512_setzero_ps(), poison); /* NaN where v is not finite */
  }
  float top = _mm512_reduce_max_ps(largest), bad = _mm512_reduce_add_ps(poison);
  __m512 inverse = _mm512_set1_ps(top > 0x1p-100f && bad == 0 ? LIMIT / top : 0);
  float scale = top / LIMIT + bad;
  __m512i total = _mm512_setzero_si512();
  for (int i = 0; i < padded; i += 16) {
    int left = n - i;
    __mmask16 mask = left >= 16 ? 0xffff : left <= 0 ? 0 : (__mmask16)((1u << left) - 1);
    __m512 v = _mm512_maskz_loadu_ps(mask, a + i);
    __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(v, inverse));
    if (bad != 0) whole = _mm512_setzero_si512();
    if (rest) _mm512_mask_storeu_ps(rest + i, mask, _mm512_fnmadd_ps(_mm512_set1_ps(scale), _mm512_cvtepi32_ps(whole), v));
    total = _mm512_add_epi32(total, whole);
    __m512i low = _mm512_srai_epi32(_mm512_slli_epi32(whole, 24), 24);
    __m512i high = _mm512_srai_epi32(_mm512_sub_epi32(whole, low), 8);
    _mm_storeu_si128((__m128i *)hi_of(q, i), _mm512_cvtepi32_epi8(high));
    _mm_storeu_si128((__m128i *)(hi_of(q, i) + CHUNK), _mm512_cvtepi32_epi8(low));
  }
  *sum = _mm512_reduce_add_epi32(total);
  return scale;
}

typedef struct {
  __m512i perm, shift, tables[4], mask;
} Constants;

INLINE Constants constants_of(const Decoder *d) {
  Constants c;
  c.perm = _mm512_loadu_si512(d->perm);
  c.shift = _mm512_loadu_si512(d->shift);
  for (int i = 0; i < 4; i++) c.tables[i] = _mm512_loadu_si512(d->table + 64 * i);
  c.mask = _mm512_set1_epi8((char)((1 << d->bits) - 1));
  return c;
}

INLINE __m512i look_up(const Constants *c, __m512i windows) {
  __m512i low = _mm512_permutex2var_epi8(c->tables[0], windows, c->tables[1]);
  __m512i high = _mm512_permutex2var_epi8(c->tables[2], windows, c->tables[3]);
  return _mm512_mask_blend_epi8(_mm512_movepi8_mask(windows), low, high);
}

INLINE __m512i decode(const Constants *c, const void *words, __mmask64 bytes, int trellis) {
  __m512i fields = _mm512_permutexvar_epi8(c->perm, _mm512_maskz_loadu_epi8(bytes, words));
  fields = _mm512_multishift_epi64_epi8(c->shift, fields);
  return trellis ? look_up(c, fields) : _mm512_and_si512(fields, c->mask);
}

INLINE __mmask64 bytes_of(int blocks, int bits) {
  int bytes = 4 * blocks * bits;
  return bytes >= 64 ? ~(__mmask64)0 : ((__mmask64)1 << bytes) - 1;
}

INLINE void decode_row_of(const Decoder *d, const uint32_t *words, int chunks, int tail, int16_t *out,
                          int trellis) {
  Constants c = constants_of(d);
  __mmask64 bytes = bytes_of(2, d->bits);
  for (int i = 0; i < chunks; i++) {
    if (tail && i == chunks - 1) bytes = bytes_of(1, d->bits);
    __builtin_prefetch((const char *)(words + i * 2 * d->bits) + AHEAD);
    _mm512_storeu_si512(out + i * CHUNK, decode(&c, words + i * 2 * d->bits, bytes, trellis));
  }
}

static void decode_row(const Decoder *d, const uint32_t *words, int chunks, int tail, int16_t *out) {
  if (d->trellis) decode_row_of(d, words, chunks, tail, out, 1);
  else decode_row_of(d, words, chunks, tail, out, 0);
}

/* Bytes of four rows side by side, as VPDPBUSD adds them up: register p of a quad holds in its 128-bit
 * lane L columns 16 L + 4 p to 16 L + 4 p + 3. */
INLINE void decode_tile_of(const Decoder *d, const uint32_t *words, int64_t stride, int rows, int tail,
                           const char *ahead, uint8_t *tile, int trellis) {
  Constants c = constants_of(d);
  __mmask64 bytes = bytes_of(2 - tail, d->bits);
  for (int r = 0; r < rows; r += QUAD, tile += QUAD * CHUNK) {
    __builtin_prefetch(ahead);
    if (d->bits > 2) __builtin_prefetch(ahead + 64);
    ahead += 32 * d->bits;
    __m512i v[QUAD];
    for (int i = 0; i < QUAD; i++) {
      v[i] = decode(&c, words, bytes, trellis);
      if (r + i + 1 < rows) words += stride; /* beyond the last row: that row again, its q is zero */
    }
    __m512i ab_low = _mm512_unpacklo_epi8(v[0], v[1]), ab_high = _mm512_unpackhi_epi8(v[0], v[1]);
    __m512i cd_low = _mm512_unpacklo_epi8(v[2], v[3]), cd_high = _mm512_unpackhi_epi8(v[2], v[3]);
    _mm512_storeu_si512(tile, _mm512_unpacklo_epi16(ab_low, cd_low));
    _mm512_storeu_si512(tile + 64, _mm512_unpackhi_epi16(ab_low, cd_low));
    _mm512_storeu_si512(tile + 128, _mm512_unpacklo_epi16(ab_high, cd_high));
    _mm512_storeu_si512(tile + 192, _mm512_unpackhi_epi16(ab_high, cd_high));
  }
}

/* Chunk `row` of QUAD, of 1 or 2 bits, beside the others. */
INLINE __m512i add_chunk(__m512i chunks, const uint32_t *words, int row, int bits) {
  if (bits == 1) return _mm512_mask_broadcastq_epi64(chunks, (__mmask8)(1 << row), _mm_loadl_epi64((const __m128i *)words));
  return _mm512_mask_broadcast_i32x4(chunks, (__mmask16)(15 << 4 * row), _mm_loadu_si128((const __m128i *)words));
}

/* The same of whole chunks of trellises of 1 or 2 bits: those of four rows fit into a register, whose bytes are
 * permuted such that the windows come out side by side. */
INLINE void decode_quads_of(const Decoder *d, const uint32_t *words, int64_t stride, int rows, const char *ahead, uint8_t *tile, int bits) {
  Constants c = constants_of(d);
  for (int r = 0; r < rows; r += QUAD) {
    __builtin_prefetch(ahead);
    ahead += 32 * bits;
    __m512i chunks = _mm512_setzero_si512();
    for (int i = 0; i < QUAD; i++) {
      chunks = add_chunk(chunks, words, i, bits);
      if (r + i + 1 < rows) words += stride;
    }
    for (int p = 0; p < QUAD; p++, tile += CHUNK) {
      __m512i windows = _mm512_permutexvar_epi8(_mm512_loadu_si512(d->quad_perm[p]), chunks);
      windows = _mm512_multishift_epi64_epi8(_mm512_loadu_si512(d->quad_shift[p]), windows);
      _mm512_storeu_si512(tile, look_up(&c, windows));
    }
  }
}

static void decode_tile(const Decoder *d, const uint32_t *words, int64_t stride, int rows, int tail,
                        const void *ahead, int16_t *tile) {
  if (d->trellis && d->bits == 2 && !tail) decode_quads_of(d, words, stride, rows, ahead, (uint8_t *)tile, 2);
  else if (d->trellis && d->bits == 1 && !tail) decode_quads_of(d, words, stride, rows, ahead, (uint8_t *)tile, 1);
  else if (d->trellis) decode_tile_of(d, words, stride, rows, tail, ahead, (uint8_t *)tile, 1);
  else decode_tile_of(d, words, stride, rows, tail, ahead, (uint8_t *)tile, 0);
}

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

/* Columns of a chunk stand in the order of decode_tile's registers. */
INLINE void tile_dot_of(const uint8_t *tile, int rows, const Term *terms, int count, int column, int odd) {
  enum { MOST = 2 };
  __m512i hi[MOST][4], lo[MOST][4];
#pragma GCC unroll 4
  for (int m = 0; m < count; m++)
#pragma GCC unroll 4
    for (int p = 0; p < 4; p++) {
      hi[m][p] = _mm512_setzero_si512();
      lo[m][p] = _mm512_set1_epi32((int32_t)terms[m].start);
    }
  int quads = (rows + QUAD - 1) / QUAD;
  for (int i = 0; i < quads; i++, tile += QUAD * CHUNK)
#pragma GCC unroll 4
    for (int m = 0; m < count; m++) {
      __m512i high = broadcast(terms[m].q, i), low = broadcast(terms[m].q + CHUNK / 2, i);
#pragma GCC unroll 4
      for (int p = 0; p < 4; p++) {
        __m512i u = _mm512_loadu_si512(tile + 64 * p);
        hi[m][p] = add_products(hi[m][p], u, high);
        lo[m][p] = add_products(lo[m][p], u, low);
      }
    }
#pragma GCC unroll 4
  for (int m = 0; m < count; m++) {
    __m512 sums[4], factor = _mm512_set1_ps(odd ? terms[m].factor : 2 * terms[m].factor);
    combine(hi[m], lo[m], terms[m].rest, odd, 4, sums);
#pragma GCC unroll 4
    for (int p = 0; p < 4; p++) {
      float *out = terms[m].out + column + 16 * p;
      _mm512_storeu_ps(out, _mm512_fmadd_ps(sums[p], factor, _mm512_loadu_ps(out)));
    }
  }
}

INLINE void tile_dots(const uint8_t *tile, int rows, const Term *terms, int count, int column, int odd) {
  for (; count >= 2; count -= 2, terms += 2) tile_dot_of(tile, rows, terms, 2, column, odd);
  if (count) tile_dot_of(tile, rows, terms, 1, column, odd);
}

static void tile_dot(const int16_t *tile, int rows, const Term *terms, int count, int column, int32_t offset2) {
  if (offset2 % 2) tile_dots((const uint8_t *)tile, rows, terms, count, column, 1);
  else tile_dots((const uint8_t *)tile, rows, terms, count, column, 0);
}

/* A transposition of 4 x 4 lanes of 128 bits. */
static void order_columns(float *out, int chunks) {
  for (; chunks > 0; chunks--, out += CHUNK) {
    __m512 v[4];
    for (int p = 0; p < 4; p++) v[p] = _mm512_loadu_ps(out + 16 * p);
    __m512 a = _mm512_shuffle_f32x4(v[0], v[1], 0x44), b = _mm512_shuffle_f32x4(v[0], v[1], 0xee);
    __m512 c = _mm512_shuffle_f32x4(v[2], v[3], 0x44), d = _mm512_shuffle_f32x4(v[2], v[3], 0xee);
    _mm512_storeu_ps(out, _mm512_shuffle_f32x4(a, c, 0x88));
    _mm512_storeu_ps(out + 16, _mm512_shuffle_f32x4(a, c, 0xdd));
    _mm512_storeu_ps(out + 32, _mm512_shuffle_f32x4(b, d, 0x88));
    _mm512_storeu_ps(out + 48, _mm512_shuffle_f32x4(b, d, 0xdd));
  }
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

INLINE void rows_dot_of(const int16_t *rows, int64_t stride, int chunks, const Term *terms, int count, int odd) {
  enum { MOST = 2 };
  __m512i hi[MOST][QUAD], lo[MOST][QUAD];
#pragma GCC unroll 4
  for (int m = 0; m < count; m++) { /* a share of `start` in each of the lanes, which are added up */
    int64_t start = terms[m].start;
    __m512i share = _mm512_set1_epi32((int32_t)(start >> 4));
    share = _mm512_mask_add_epi32(share, 1, share, _mm512_set1_epi32((int32_t)(start & 15)));
#pragma GCC unroll 4
    for (int r = 0; r < QUAD; r++) {
      hi[m][r] = _mm512_setzero_si512();
      lo[m][r] = share;
    }
  }
  for (int c = 0; c < chunks; c++)
#pragma GCC unroll 4
    for (int m = 0; m < count; m++) {
      __m512i high = load_hi(terms[m].q, c), low = load_lo(terms[m].q, c);
#pragma GCC unroll 4
      for (int r = 0; r < QUAD; r++) {
        __m512i u = _mm512_loadu_si512(rows + r * stride + c * CHUNK);
        hi[m][r] = add_products(hi[m][r], u, high);
        lo[m][r] = add_products(lo[m][r], u, low);
      }
    }
#pragma GCC unroll 4
  for (int m = 0; m < count; m++) {
    __m512 sums[QUAD];
    combine(hi[m], lo[m], 0, 0, QUAD, sums);
    __m128 factor = _mm_set1_ps(2 * terms[m].factor);
    __m128 out = _mm_fmadd_ps(reduce4(sums), factor, _mm_loadu_ps(terms[m].out));
    if (odd) out = _mm_fnmadd_ps(_mm_set1_ps((float)terms[m].rest), _mm_set1_ps(terms[m].factor), out);
    _mm_storeu_ps(terms[m].out, out);
  }
}

INLINE void rows_dots(const int16_t *rows, int64_t stride, int chunks, const Term *terms, int count, int odd) {
  for (; count >= 2; count -= 2, terms += 2) rows_dot_of(rows, stride, chunks, terms, 2, odd);
  if (count) rows_dot_of(rows, stride, chunks, terms, 1, odd);
}

static void rows_dot(const int16_t *rows, int64_t stride, int chunks, const Term *terms, int count, int32_t offset2) {
  if (offset2 % 2) rows_dots(rows, stride, chunks, terms, count, 1);
  else rows_dots(rows, stride, chunks, terms, count, 0);
}

static void quad_sums(const int16_t *q, int chunks, int32_t *out) {
  __m512i ones = _mm512_set1_epi8(1), zero = _mm512_setzero_si512();
  for (int c = 0; c < chunks; c++) {
    __m512i hi = _mm512_dpbusd_epi32(zero, ones, load_hi(q, c)), lo = _mm512_dpbusd_epi32(zero, ones, load_lo(q, c));
    _mm512_storeu_si512(out + c * CHUNK / 4, _mm512_add_epi32(_mm512_slli_epi32(hi, 8), lo));
  }
}

/* v[i] lane j becomes v[j] lane i, 32-bit lanes. */
INLINE void transpose(__m512i v[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 4) {
    __m512i a = _mm512_unpacklo_epi32(v[i], v[i + 1]), b = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    __m512i c = _mm512_unpacklo_epi32(v[i + 2], v[i + 3]), d = _mm512_unpackhi_epi32(v[i + 2], v[i + 3]);
    t[i] = _mm512_unpacklo_epi64(a, c);
    t[i + 1] = _mm512_unpackhi_epi64(a, c);
    t[i + 2] = _mm512_unpacklo_epi64(b, d);
    t[i + 3] = _mm512_unpackhi_epi64(b, d);
  }
  for (int i = 0; i < 4; i++) {
    __m512i a = _mm512_shuffle_i32x4(t[i], t[i + 4], 0x88), b = _mm512_shuffle_i32x4(t[i], t[i + 4], 0xdd);
    __m512i c = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0x88), d = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0xdd);
    v[i] = _mm512_shuffle_i32x4(a, c, 0x88);
    v[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
    v[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
    v[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
}

/* Bytes; 32-bit lane r of vector c holds columns 4 c to 4 c + 3 of row r. */
INLINE void decode_lanes_of(const Decoder *d, const uint32_t *words, int64_t stride, int rows, int chunks, int tail,
                            uint8_t *values, int trellis, int doubled) {
  Constants c = constants_of(d);
  for (int chunk = 0; chunk < chunks; chunk++) {
    __mmask64 bytes = bytes_of(tail && chunk == chunks - 1 ? 1 : 2, d->bits);
    const uint32_t *from = words + chunk * 2 * d->bits;
    __m512i v[BAND];
    for (int r = 0; r < BAND; r++) {
      v[r] = decode(&c, from, bytes, trellis);
      if (r + 1 < rows) from += stride; /* beyond the last row: that row again */
    }
    transpose(v);
    for (int i = 0; i < BAND; i++)
      _mm512_storeu_si512(values + (chunk * BAND + i) * 64, doubled ? _mm512_add_epi8(v[i], v[i]) : v[i]);
  }
}

static int decode_band(const Decoder *d, const uint32_t *words, int64_t stride, int chunks, int tail, int16_t *values) {
  if (d->bits < 8) decode_lanes_of(d, words, stride, BAND, chunks, tail, (uint8_t *)values, 0, 1);
  else decode_lanes_of(d, words, stride, BAND, chunks, tail, (uint8_t *)values, 0, 0);
  return d->bits < 8;
}

void bitsmoe_decode_lanes(const Decoder *d, const uint32_t *words, int64_t stride, int rows, int chunks, int tail,
                          uint8_t *values) {
  if (d->trellis) decode_lanes_of(d, words, stride, rows, chunks, tail, values, 1, 0);
  else decode_lanes_of(d, words, stride, rows, chunks, tail, values, 0, 0);
}

static void band_scales(const uint16_t *scales, int64_t stride, int count, float factor, float *out) {
  for (int i = 0; i < count; i += 16) {
    __mmask16 mask = count - i >= 16 ? 0xffff : (__mmask16)((1u << (count - i)) - 1);
    __m512i v[16];
    for (int r = 0; r < BAND; r++)
      v[r] = _mm512_castps_si512(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, scales + r * stride + i)));
    transpose(v);
    for (int j = 0; j < 16 && i + j < count; j++)
      _mm512_storeu_ps(out + (i + j) * BAND, _mm512_mul_ps(_mm512_castsi512_ps(v[j]), _mm512_set1_ps(factor)));
  }
}

/* `count` vectors from number `first` on. */
INLINE void band_dot_of(const Band *b, const Vectors *v, int first, float *out, int64_t stride, int count, int doubled) {
  enum { MOST = 4 };
  __m512 sums[MOST];
  int step = b->group < CHUNK ? b->group : CHUNK, shift = __builtin_ctz(b->group);
#pragma GCC unroll 4
  for (int i = 0; i < count; i++) sums[i] = _mm512_loadu_ps(out + (first + i) * stride);
  for (int start = 0, s = 0; start < b->columns; start += step, s++) {
    __m512i hi[MOST], lo[MOST], offset[MOST];
    const int16_t *q[MOST];
#pragma GCC unroll 4
    for (int i = 0; i < count; i++) {
      hi[i] = lo[i] = _mm512_setzero_si512();
      offset[i] = _mm512_set1_epi32(v->offset[(first + i) * v->offset_stride + s]);
      if (doubled) lo[i] = offset[i];
      q[i] = v->q + (first + i) * v->q_stride + start / CHUNK * CHUNK + start % CHUNK / 2;
    }
    const uint8_t *values = (const uint8_t *)b->values + start / 4 * 64;
    for (int j = 0; j < step / 4; j += 4)
      for (int k = j; k < j + 4; k++) {
        __m512i u = _mm512_loadu_si512(values + k * 64);
#pragma GCC unroll 4
        for (int i = 0; i < count; i++) {
          hi[i] = add_products(hi[i], u, broadcast(q[i], k));
          lo[i] = add_products(lo[i], u, broadcast(q[i] + CHUNK / 2, k));
        }
      }
    __m512 scale = _mm512_loadu_ps(b->scales + (start >> shift) * BAND);
#pragma GCC unroll 4
    for (int i = 0; i < count; i++) {
      __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(hi[i], 8), lo[i]);
      if (!doubled) sum = _mm512_add_epi32(_mm512_add_epi32(sum, sum), offset[i]);
      __m512 input_scale = _mm512_set1_ps(v->scale[(first + i) * v->scale_stride + start / CHUNK]);
      sums[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(scale, input_scale), sums[i]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < count; i++) _mm512_storeu_ps(out + (first + i) * stride, sums[i]);
}

INLINE void band_dots(const Band *b, const Vectors *v, float *out, int64_t stride, int doubled) {
  int i = 0;
  for (; i + 4 <= v->count; i += 4) band_dot_of(b, v, i, out, stride, 4, doubled);
  for (; i < v->count; i++) band_dot_of(b, v, i, out, stride, 1, doubled);
}

static void band_dot(const Band *b, const Vectors *v, float *out, int64_t stride) {
  if (b->doubled) band_dots(b, v, out, stride, 1);
  else band_dots(b, v, out, stride, 0);
}

static float half_dot(const uint16_t *row, const float *x, int n) {
  __m512 sum = _mm512_setzero_ps();
  for (int i = 0; i < n; i += 16) {
    __mmask16 mask = n - i >= 16 ? 0xffff : (__mmask16)((1u << (n - i)) - 1);
    __m512 value = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, row + i));
    sum = _mm512_fmadd_ps(value, _mm512_maskz_loadu_ps(mask, x + i), sum);
  }
  return _mm512_reduce_add_ps(sum);
}

const Kernels bitsmoe_avx512 = {"avx512", row_scales, select_rows, quantize, decode_tile, tile_dot, order_columns, decode_row, rows_dot, quad_sums, decode_band, band_scales, band_dot, gate, half_dot, dots};
#endif
