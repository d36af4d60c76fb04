/* Vectors of one value of each of SIDE blocks that are searched side by side. Included by rounding_kernels.h. */

#if defined(__AVX512F__)
enum { SIDE = 16 };
#elif defined(__AVX2__)
enum { SIDE = 8 };
#else
enum { SIDE = 4 };
#endif

typedef int32_t Lanes __attribute__((vector_size(4 * SIDE)));
typedef float Reals __attribute__((vector_size(4 * SIDE)));

INLINE Lanes picked(Lanes which, Lanes a, Lanes b) { return (a & which) | (b & ~which); }

/* The smaller and the larger; the second if one is NaN. */
INLINE Reals lower(Reals a, Reals b) { return (Reals)picked(a < b, (Lanes)a, (Lanes)b); }
INLINE Reals higher(Reals a, Reals b) { return (Reals)picked(a > b, (Lanes)a, (Lanes)b); }
INLINE Reals size_of(Reals a) { return (Reals)((Lanes)a & 0x7fffffff); }

/* The low 16 bits of the one, then those of the other. */
INLINE Lanes pair(Lanes low, Lanes high) { return (low & 0xffff) | high << 16; }

#if defined(__AVX512F__)
INLINE Lanes least(Lanes a, Lanes b) { return (Lanes)_mm512_min_epi32((__m512i)a, (__m512i)b); }

INLINE Lanes nearest_integers(Reals a) { return (Lanes)_mm512_cvtps_epi32((__m512)a); }

/* sum + product of two pairs. GCC 12 copies and spills sums around the intrinsic. */
INLINE Lanes with_product(Lanes sum, Lanes a, const int32_t *b) {
  __asm__("vpdpwssd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(a), "m"(*b));
  return sum;
}

/* a whose lowest bits are the mark */
INLINE Lanes marked(Lanes a, int lowest, int mark) {
  return (Lanes)_mm512_ternarylogic_epi32((__m512i)a, _mm512_set1_epi32(~lowest), _mm512_set1_epi32(mark), 0xea);
}

/* b where a bit of the state is set, otherwise a. */
INLINE Lanes either(Lanes state, int bit, Lanes a, Lanes b) {
  const __mmask16 set = _mm512_test_epi32_mask((__m512i)state, _mm512_set1_epi32(bit));
  return (Lanes)_mm512_mask_mov_epi32((__m512i)a, set, (__m512i)b);
}

/* The lowest bits of `last` become the highest of a word, those before make room. */
INLINE Lanes appended(Lanes word, Lanes last, int bits) {
  return (Lanes)_mm512_shrdi_epi32((__m512i)word, (__m512i)last, bits);
}

INLINE void transpose(const Lanes *in, Lanes *out) {
  __m512i a[SIDE], b[SIDE];
#pragma GCC unroll 8
  for (int i = 0; i < SIDE; i += 2) {
    a[i] = _mm512_unpacklo_epi32((__m512i)in[i], (__m512i)in[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32((__m512i)in[i], (__m512i)in[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < SIDE; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      b[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + j + 2]);
      b[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + j + 2]);
    }
#pragma GCC unroll 4
  for (int k = 0; k < 4; k++) {
    const __m512i even = _mm512_shuffle_i32x4(b[k], b[4 + k], 0x88), odd = _mm512_shuffle_i32x4(b[k], b[4 + k], 0xdd);
    const __m512i evens = _mm512_shuffle_i32x4(b[8 + k], b[12 + k], 0x88);
    const __m512i odds = _mm512_shuffle_i32x4(b[8 + k], b[12 + k], 0xdd);
    out[k] = (Lanes)_mm512_shuffle_i32x4(even, evens, 0x88);
    out[4 + k] = (Lanes)_mm512_shuffle_i32x4(odd, odds, 0x88);
    out[8 + k] = (Lanes)_mm512_shuffle_i32x4(even, evens, 0xdd);
    out[12 + k] = (Lanes)_mm512_shuffle_i32x4(odd, odds, 0xdd);
  }
}
#else
#if defined(__AVX2__)
INLINE Lanes least(Lanes a, Lanes b) { return (Lanes)_mm256_min_epi32((__m256i)a, (__m256i)b); }

INLINE Lanes nearest_integers(Reals a) { return (Lanes)_mm256_cvtps_epi32((__m256)a); }

INLINE Lanes with_product(Lanes sum, Lanes a, const int32_t *b) {
  return sum + (Lanes)_mm256_madd_epi16((__m256i)a, _mm256_set1_epi32(*b));
}
#else
INLINE Lanes least(Lanes a, Lanes b) { return picked(a < b, a, b); }

/* Half to even; |a| < 2^22. */
INLINE Lanes nearest_integers(Reals a) { return __builtin_convertvector((a + 12582912.f) - 12582912.f, Lanes); }

INLINE Lanes with_product(Lanes sum, Lanes a, const int32_t *b) {
  return sum + (a << 16 >> 16) * (int16_t)*b + (a >> 16) * (*b >> 16);
}
#endif

INLINE Lanes marked(Lanes a, int lowest, int mark) { return (a & ~lowest) | mark; }

INLINE Lanes either(Lanes state, int bit, Lanes a, Lanes b) { return picked((state & bit) != 0, b, a); }

INLINE Lanes appended(Lanes word, Lanes last, int bits) {
  return (word >> bits & ((1 << (32 - bits)) - 1)) | last << (32 - bits);
}

INLINE void transpose(const Lanes *in, Lanes *out) {
  for (int i = 0; i < SIDE; i++)
    for (int j = 0; j < SIDE; j++) out[i][j] = in[j][i];
}
#endif
