/* Vectors as wide as the registers (GCC makes scalars of wider ones) and what is done with them. Included by
 * rounding_kernels.h. */

#if defined(__AVX512F__)
enum { LANES = 16 };
#elif defined(__AVX2__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif

typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef float UnalignedFloats __attribute__((vector_size(4 * LANES), aligned(4)));

INLINE Integers picked(Integers which, Integers a, Integers b) { return (a & which) | (b & ~which); }

/* The smaller and the larger; the second if one is NaN. */
INLINE Floats lower(Floats a, Floats b) { return (Floats)picked(a < b, (Integers)a, (Integers)b); }
INLINE Floats higher(Floats a, Floats b) { return (Floats)picked(a > b, (Integers)a, (Integers)b); }
INLINE Floats size_of(Floats a) { return (Floats)((Integers)a & 0x7fffffff); }

/* The low 16 bits of the one, then those of the other. */
INLINE Integers pair(Integers low, Integers high) { return (low & 0xffff) | high << 16; }

#if defined(__AVX512F__)
INLINE Integers least(Integers a, Integers b) { return (Integers)_mm512_min_epi32((__m512i)a, (__m512i)b); }

INLINE Integers nearest_integers(Floats a) { return (Integers)_mm512_cvtps_epi32((__m512)a); }

/* sum + product of two pairs. GCC 12 copies and spills sums around the intrinsic. */
INLINE Integers with_product(Integers sum, Integers a, const int32_t *b) {
  __asm__("vpdpwssd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(a), "m"(*b));
  return sum;
}

/* a whose lowest bits are the mark */
INLINE Integers marked(Integers a, int lowest, int mark) {
  return (Integers)_mm512_ternarylogic_epi32((__m512i)a, _mm512_set1_epi32(~lowest), _mm512_set1_epi32(mark), 0xea);
}

/* b where a bit of the state is set, otherwise a. */
INLINE Integers either(Integers state, int bit, Integers a, Integers b) {
  const __mmask16 set = _mm512_test_epi32_mask((__m512i)state, _mm512_set1_epi32(bit));
  return (Integers)_mm512_mask_mov_epi32((__m512i)a, set, (__m512i)b);
}

/* The lowest bits of `last` become the highest of a word, those before make room. */
INLINE Integers appended(Integers word, Integers last, int bits) {
  return (Integers)_mm512_shrdi_epi32((__m512i)word, (__m512i)last, bits);
}

INLINE void transpose(const Integers *in, Integers *out) {
  __m512i a[LANES], b[LANES];
#pragma GCC unroll 8
  for (int i = 0; i < LANES; i += 2) {
    a[i] = _mm512_unpacklo_epi32((__m512i)in[i], (__m512i)in[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32((__m512i)in[i], (__m512i)in[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < LANES; i += 4)
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
    out[k] = (Integers)_mm512_shuffle_i32x4(even, evens, 0x88);
    out[4 + k] = (Integers)_mm512_shuffle_i32x4(odd, odds, 0x88);
    out[8 + k] = (Integers)_mm512_shuffle_i32x4(even, evens, 0xdd);
    out[12 + k] = (Integers)_mm512_shuffle_i32x4(odd, odds, 0xdd);
  }
}
#else
#if defined(__AVX2__)
INLINE Integers least(Integers a, Integers b) { return (Integers)_mm256_min_epi32((__m256i)a, (__m256i)b); }

INLINE Integers nearest_integers(Floats a) { return (Integers)_mm256_cvtps_epi32((__m256)a); }

INLINE Integers with_product(Integers sum, Integers a, const int32_t *b) {
  return sum + (Integers)_mm256_madd_epi16((__m256i)a, _mm256_set1_epi32(*b));
}
#else
INLINE Integers least(Integers a, Integers b) { return picked(a < b, a, b); }

/* Half to even; |a| < 2^22. */
INLINE Integers nearest_integers(Floats a) { return __builtin_convertvector((a + 12582912.f) - 12582912.f, Integers); }

INLINE Integers with_product(Integers sum, Integers a, const int32_t *b) {
  return sum + (a << 16 >> 16) * (int16_t)*b + (a >> 16) * (*b >> 16);
}
#endif

INLINE Integers marked(Integers a, int lowest, int mark) { return (a & ~lowest) | mark; }

INLINE Integers either(Integers state, int bit, Integers a, Integers b) { return picked((state & bit) != 0, b, a); }

INLINE Integers appended(Integers word, Integers last, int bits) {
  return (word >> bits & ((1 << (32 - bits)) - 1)) | last << (32 - bits);
}

INLINE void transpose(const Integers *in, Integers *out) {
  for (int i = 0; i < LANES; i++)
    for (int j = 0; j < LANES; j++) out[i][j] = in[j][i];
}
#endif
