/* Products with the bases with AVX-512; see avx512.c, which includes this. */
#include <immintrin.h>

#include "bitsmoe.h"

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
  for (int i = 0; i < count; i++) sums[i] = _mm512_loadu_ps(out + (first + i) * stride);
  for (int start = 0, s = 0; start < b->columns; start += step, s++) {
    __m512i hi[MOST], lo[MOST], offset[MOST];
    const int16_t *q[MOST];
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
        for (int i = 0; i < count; i++) {
          hi[i] = _mm512_dpbusd_epi32(hi[i], u, broadcast(q[i], k));
          lo[i] = _mm512_dpbusd_epi32(lo[i], u, broadcast(q[i] + CHUNK / 2, k));
        }
      }
    __m512 scale = _mm512_loadu_ps(b->scales + (start >> shift) * BAND);
    for (int i = 0; i < count; i++) {
      __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(hi[i], 8), lo[i]);
      if (!doubled) sum = _mm512_add_epi32(_mm512_add_epi32(sum, sum), offset[i]);
      __m512 input_scale = _mm512_set1_ps(v->scale[(first + i) * v->scale_stride + start / CHUNK]);
      sums[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(scale, input_scale), sums[i]);
    }
  }
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
