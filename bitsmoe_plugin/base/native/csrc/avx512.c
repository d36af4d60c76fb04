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

#include "avx512_decoding.h"
#include "avx512_products.h"
#include "avx512_bases.h"

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

static void gather(const float *z, const int32_t *order, const float *scale, int n, float *out) {
  for (int i = 0; i < n; i += 16) {
    __mmask16 mask = n - i >= 16 ? 0xffff : (__mmask16)((1u << (n - i)) - 1);
    __m512 values = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, _mm512_maskz_loadu_epi32(mask, order + i), z, 4);
    _mm512_mask_storeu_ps(out + i, mask, _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, scale + i), values));
  }
}

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

static void quad_sums(const int16_t *q, int chunks, int32_t *out) {
  __m512i ones = _mm512_set1_epi8(1), zero = _mm512_setzero_si512();
  for (int c = 0; c < chunks; c++) {
    __m512i hi = _mm512_dpbusd_epi32(zero, ones, load_hi(q, c)), lo = _mm512_dpbusd_epi32(zero, ones, load_lo(q, c));
    _mm512_storeu_si512(out + c * CHUNK / 4, _mm512_add_epi32(_mm512_slli_epi32(hi, 8), lo));
  }
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

const Kernels bitsmoe_avx512 = {"avx512", row_scales, select_rows, gather, quantize, decode_tile, tile_dot, order_columns, decode_rows, rows_dot, quad_sums, decode_band, band_scales, band_dot, gate, half_dot, dots};
#endif
