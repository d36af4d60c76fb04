/* The products of tiles.h in terms of six operations, TILE_CONFIGURE, TILE_RELEASE, TILE_ZERO, TILE_LOAD, TILE_STORE
 * and TILE_DOT (signed times unsigned bytes, in fours), defined by who includes this: by instructions, or by a model of
 * them. Tiles are numbered by literals. */
#include <immintrin.h>

#include "tiles.h"

/* What LDTILECFG reads. */
typedef struct {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
} TileConfig;

/* Vectors come in blocks of TILE_ROWS, the rest of them in tiles with fewer rows. */
#define HIGH_SUMS 0
#define LOW_SUMS 1
#define REST_HIGH_SUMS 2
#define REST_LOW_SUMS 3
#define HIGH_BYTES 4
#define LOW_BYTES 5
#define REST_BYTES 6 /* high ones, then low ones */
#define WEIGHTS 7

static void configure(int vectors, int bytes) {
  const uint8_t rest = (uint8_t)(vectors % TILE_ROWS);
  TileConfig config __attribute__((aligned(64))) = {.palette = 1};
  const uint8_t rows[8] = {TILE_ROWS, TILE_ROWS, rest, rest, TILE_ROWS, TILE_ROWS, rest, (uint8_t)(bytes / 4)};
  for (int i = 0; i < 8; i++) {
    if (!rows[i]) continue; /* a tile without rows has no columns, too */
    config.rows[i] = rows[i];
    config.bytes[i] = (uint16_t)(i >= HIGH_BYTES && i <= REST_BYTES ? bytes : TILE_BYTES);
  }
  TILE_CONFIGURE(&config);
}

static void release(void) { TILE_RELEASE(); }

#define INLINE static inline __attribute__((always_inline))

/* Of a block of vectors: sums of their high and low bytes' products. */
typedef struct {
  int32_t high[TILE_ROWS][LANES], low[TILE_ROWS][LANES];
} __attribute__((aligned(64))) Sums;

INLINE void zero_sums(int rest) {
  if (rest) {
    TILE_ZERO(REST_HIGH_SUMS);
    TILE_ZERO(REST_LOW_SUMS);
  } else {
    TILE_ZERO(HIGH_SUMS);
    TILE_ZERO(LOW_SUMS);
  }
}

/* A block's bytes, low ones CHUNK or whatever behind the high ones; those of the rest have but one tile. */
INLINE void load_vectors(const int8_t *high, const int8_t *low, int64_t stride, int rest) {
  if (rest) return;
  TILE_LOAD(HIGH_BYTES, high, stride);
  TILE_LOAD(LOW_BYTES, low, stride);
}

/* Times the tile of weights. */
INLINE void add_block(const int8_t *high, const int8_t *low, int64_t stride, int rest) {
  if (rest) {
    TILE_LOAD(REST_BYTES, high, stride);
    TILE_DOT(REST_HIGH_SUMS, REST_BYTES, WEIGHTS);
    TILE_LOAD(REST_BYTES, low, stride);
    TILE_DOT(REST_LOW_SUMS, REST_BYTES, WEIGHTS);
  } else {
    TILE_DOT(HIGH_SUMS, HIGH_BYTES, WEIGHTS);
    TILE_DOT(LOW_SUMS, LOW_BYTES, WEIGHTS);
  }
}

INLINE void store_sums(Sums *sums, int rest) {
  if (rest) {
    TILE_STORE(REST_HIGH_SUMS, sums->high, TILE_BYTES);
    TILE_STORE(REST_LOW_SUMS, sums->low, TILE_BYTES);
  } else {
    TILE_STORE(HIGH_SUMS, sums->high, TILE_BYTES);
    TILE_STORE(LOW_SUMS, sums->low, TILE_BYTES);
  }
}

/* Of vector m: 256 * high + low. */
INLINE __m512i sum_of(const Sums *sums, int m) {
  return _mm512_add_epi32(_mm512_slli_epi32(_mm512_load_si512(sums->high[m]), 8), _mm512_load_si512(sums->low[m]));
}

INLINE void tile_block(const uint8_t *tile, const Term *terms, int count, int column, int odd, int rest) {
  const int8_t *high = (const int8_t *)terms->q, *low = high + CHUNK;
  Sums sums;
  load_vectors(high, low, 2 * ROWS, rest);
  for (int p = 0; p < CHUNK / LANES; p++, column += LANES) {
    TILE_LOAD(WEIGHTS, tile + p * TILE_BYTES, QUAD * CHUNK);
    zero_sums(rest);
    add_block(high, low, 2 * ROWS, rest);
    store_sums(&sums, rest);
    for (int m = 0; m < count; m++) {
      __m512i sum = _mm512_add_epi32(sum_of(&sums, m), _mm512_set1_epi32((int32_t)terms[m].start));
      if (odd) sum = _mm512_sub_epi32(_mm512_add_epi32(sum, sum), _mm512_set1_epi32(terms[m].rest));
      __m512 factor = _mm512_set1_ps(odd ? terms[m].factor : 2 * terms[m].factor);
      float *out = terms[m].out + column;
      _mm512_storeu_ps(out, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), factor, _mm512_loadu_ps(out)));
    }
  }
}

static void tile_dot(const int16_t *tile, int rows, const Term *terms, int count, int column, int32_t offset2) {
  const uint8_t *bytes = (const uint8_t *)tile;
  (void)rows;
  for (; count >= TILE_ROWS; count -= TILE_ROWS, terms += TILE_ROWS)
    tile_block(bytes, terms, TILE_ROWS, column, offset2 % 2, 0);
  if (count) tile_block(bytes, terms, count, column, offset2 % 2, 1);
}

INLINE void band_block(const Band *b, const Vectors *v, int first, int count, float *out, int64_t stride, int rest) {
  const int step = b->group < CHUNK ? b->group : CHUNK;
  const uint8_t *weights = (const uint8_t *)b->values;
  Sums sums;
  __m512 totals[TILE_ROWS];
  for (int m = 0; m < count; m++) totals[m] = _mm512_loadu_ps(out + m * stride);
  for (int start = 0, s = 0; start < b->columns; start += step, s++) {
    const int8_t *high = (const int8_t *)(v->q + first * v->q_stride + start / CHUNK * CHUNK) + start % CHUNK;
    load_vectors(high, high + CHUNK, 2 * v->q_stride, rest);
    TILE_LOAD(WEIGHTS, weights + start / 4 * TILE_BYTES, TILE_BYTES);
    zero_sums(rest);
    add_block(high, high + CHUNK, 2 * v->q_stride, rest);
    store_sums(&sums, rest);
    const __m512 scale = _mm512_loadu_ps(b->scales + start / b->group * BAND);
    for (int m = 0; m < count; m++) {
      __m512i sum = sum_of(&sums, m);
      if (!b->doubled) sum = _mm512_add_epi32(sum, sum);
      sum = _mm512_add_epi32(sum, _mm512_set1_epi32(v->offset[(first + m) * v->offset_stride + s]));
      __m512 input_scale = _mm512_set1_ps(v->scale[(first + m) * v->scale_stride + start / CHUNK]);
      totals[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(scale, input_scale), totals[m]);
    }
  }
  for (int m = 0; m < count; m++) _mm512_storeu_ps(out + m * stride, totals[m]);
}

static void band_dot(const Band *b, const Vectors *v, float *out, int64_t stride) {
  int first = 0;
  for (; first + TILE_ROWS <= v->count; first += TILE_ROWS)
    band_block(b, v, first, TILE_ROWS, out + first * stride, stride, 0);
  if (first < v->count) band_block(b, v, first, v->count - first, out + first * stride, stride, 1);
}

/* Lanes first to first + 3 of `count` vectors, added up as avx512.c does; all: of how many. */
INLINE void four_lanes(const uint8_t *rows, const int8_t *lanes, int bytes, const Term *terms, int first, int count,
                       int all, int rest, __m512 *out) {
  Sums sums[4];
  const int64_t half = (int64_t)all * bytes;
  for (int i = 0; i < 4; i++) {
    const int8_t *high = lanes + (first + i) * 2 * half;
    zero_sums(rest);
    for (int b = 0; b < bytes; b += lane_step(bytes)) {
      load_vectors(high + b, high + half + b, bytes, rest);
      TILE_LOAD(WEIGHTS, rows + (b / 4 * LANES + first + i) * TILE_BYTES, LANES * TILE_BYTES);
      add_block(high + b, high + half + b, bytes, rest);
    }
    store_sums(&sums[i], rest);
  }
  for (int m = 0; m < count; m++) {
    __m512 v[4];
    for (int i = 0; i < 4; i++) {
      int64_t share = (terms[m].start >> 4) + (first + i ? 0 : terms[m].start & 15);
      v[i] = _mm512_cvtepi32_ps(_mm512_add_epi32(sum_of(&sums[i], m), _mm512_set1_epi32((int32_t)share)));
    }
    out[m] = _mm512_add_ps(_mm512_add_ps(v[0], v[2]), _mm512_add_ps(v[1], v[3]));
  }
}

INLINE void rows_block(const uint8_t *rows, const int8_t *lanes, int bytes, const Term *terms, int count, int all,
                       int odd, int rest) {
  __m512 parts[4][TILE_ROWS];
  for (int i = 0; i < 4; i++) four_lanes(rows, lanes, bytes, terms, 4 * i, count, all, rest, parts[i]);
  for (int m = 0; m < count; m++) {
    __m512 total = _mm512_add_ps(_mm512_add_ps(parts[0][m], parts[2][m]), _mm512_add_ps(parts[1][m], parts[3][m]));
    __m512 out = _mm512_fmadd_ps(total, _mm512_set1_ps(2 * terms[m].factor), _mm512_loadu_ps(terms[m].out));
    if (odd) out = _mm512_fnmadd_ps(_mm512_set1_ps((float)terms[m].rest), _mm512_set1_ps(terms[m].factor), out);
    _mm512_storeu_ps(terms[m].out, out);
  }
}

static void rows_dot(const uint8_t *rows, const int8_t *lanes, int bytes, const Term *terms, int count, int32_t offset2) {
  int m = 0;
  for (; m + TILE_ROWS <= count; m += TILE_ROWS)
    rows_block(rows, lanes + m * bytes, bytes, terms + m, TILE_ROWS, count, offset2 % 2, 0);
  if (m < count) rows_block(rows, lanes + m * bytes, bytes, terms + m, count - m, count, offset2 % 2, 1);
}
