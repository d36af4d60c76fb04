/* Codes become bytes with AVX-512, a chunk or QUAD of them at a time; see avx512.c, which includes this. */
#include <immintrin.h>

#include "bitsmoe.h"

#define INLINE static inline __attribute__((always_inline))

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

/* Where the bytes of a chunk come from. */
typedef enum { STORED, FIELDS, WINDOWS, QUADS_1, QUADS_2 } Way; /* decoded before, codes, and of trellises windows one row
                                                                   by one, or those of QUAD rows of 1 or 2 bits */
typedef struct {
  const Decoder *decoder;
  const uint32_t *words;
  int64_t stride;
  int rows, tail;
} Packed;

/* Bytes of four rows side by side, as VPDPBUSD adds them up: register p of a quad holds in its 128-bit
 * lane L columns 16 L + 4 p to 16 L + 4 p + 3. */
INLINE void side_by_side(const __m512i v[QUAD], __m512i out[QUAD]) {
  __m512i ab_low = _mm512_unpacklo_epi8(v[0], v[1]), ab_high = _mm512_unpackhi_epi8(v[0], v[1]);
  __m512i cd_low = _mm512_unpacklo_epi8(v[2], v[3]), cd_high = _mm512_unpackhi_epi8(v[2], v[3]);
  out[0] = _mm512_unpacklo_epi16(ab_low, cd_low);
  out[1] = _mm512_unpackhi_epi16(ab_low, cd_low);
  out[2] = _mm512_unpacklo_epi16(ab_high, cd_high);
  out[3] = _mm512_unpackhi_epi16(ab_high, cd_high);
}

/* Chunk `row` of QUAD, of 1 or 2 bits, beside the others. By assembler, since gcc loads first and then shuffles, where
 * permutations are what decoding waits for. */
INLINE __m512i add_chunk(__m512i chunks, const uint32_t *words, int row, int bits) {
  typedef struct { uint64_t values[2]; } __attribute__((packed, may_alias)) Pair;
  typedef uint64_t __attribute__((aligned(4), may_alias)) Single;
  if (bits == 1)
    __asm__("vpbroadcastq %1, %0 %{%2%}" : "+v"(chunks) : "m"(*(const Single *)words), "Yk"((__mmask8)(1 << row)));
  else
    __asm__("vbroadcasti32x4 %1, %0 %{%2%}" : "+v"(chunks) : "m"(*(const Pair *)words), "Yk"((__mmask16)(15 << 4 * row)));
  return chunks;
}

/* A chunk of QUAD rows from p->words on, which is moved to the next; left: rows from here on. Beyond the last row it is
 * that row again, whose q is zero. Whole chunks of 1 or 2 bits fit into one register for four rows, whose bytes are
 * permuted such that the windows come out side by side. */
INLINE void decode_quad(Packed *p, const Constants *c, __mmask64 bytes, int left, Way way, __m512i out[QUAD]) {
  __m512i chunks = _mm512_setzero_si512(), v[QUAD];
#pragma GCC unroll 4
  for (int i = 0; i < QUAD; i++) {
    if (way == QUADS_1 || way == QUADS_2) chunks = add_chunk(chunks, p->words, i, way == QUADS_1 ? 1 : 2);
    else v[i] = decode(c, p->words, bytes, way == WINDOWS);
    if (i + 1 < left) p->words += p->stride;
  }
  if (way == FIELDS || way == WINDOWS) side_by_side(v, out);
  else
#pragma GCC unroll 4
    for (int i = 0; i < QUAD; i++) {
      __m512i windows = _mm512_permutexvar_epi8(_mm512_loadu_si512(p->decoder->quad_perm[i]), chunks);
      out[i] = look_up(c, _mm512_multishift_epi64_epi8(_mm512_loadu_si512(p->decoder->quad_shift[i]), windows));
    }
}

INLINE Way way_of(const Decoder *d, int tail) {
  if (!d->trellis) return FIELDS;
  if (tail || d->bits > QUAD_BITS) return WINDOWS;
  return d->bits == 1 ? QUADS_1 : QUADS_2;
}
