/* The kernels in plain C, for the compiler to vectorise. */
#include <math.h>

#include "dense_kernels.h"
#include "gating_kernels.h"
#include "lookup.h"

static void row_scales(const uint8_t *codes, const uint16_t *low, const uint16_t *step, int n, float *out) {
  for (int i = 0; i < n; i++) out[i] = exp2f(half_to_float(low[i]) + (codes[i] & 31) * half_to_float(step[i]));
}

static int select_rows(const uint8_t *codes, int width, const float *scales, int n, int32_t *order,
                       float *chosen) {
  int count = 0;
  for (int i = 0; i < n; i++) {
    order[count] = i;
    chosen[count] = scales[i];
    count += codes[i] >> 5 == width;
  }
  return count;
}

static float quantize(const float *a, int n, int padded, int16_t *q, int32_t *sum, float *rest) {
  float largest = 0, poison = 0;
  for (int i = 0; i < n; i++) {
    float size = fabsf(a[i]);
    largest = size > largest ? size : largest;
    poison += a[i] * 0.0f; /* NaN if a[i] is not finite */
  }
  float inverse = largest > 0x1p-100f && poison == 0 ? LIMIT / largest : 0;
  int32_t total = 0;
  for (int i = 0; i < n; i++) {
    q[i] = inverse ? (int16_t)lrintf(a[i] * inverse) : 0;
    total += q[i];
  }
  memset(q + n, 0, (padded - n) * sizeof(int16_t));
  *sum = total;
  float scale = largest / LIMIT + poison;
  for (int i = 0; rest && i < n; i++) rest[i] = a[i] - scale * q[i];
  return scale;
}

/* A block on a uniform grid. */
INLINE void fields_of(const uint32_t *words, int bits, int16_t *out) {
#pragma GCC unroll 32
  for (int i = 0; i < BLOCK; i++) {
    int word = i * bits / 32, next = word + 1 < bits ? word + 1 : word; /* the last field ends with its word */
    uint64_t pair = words[word] | (uint64_t)words[next] << 32;
    out[i] = (int16_t)(pair >> i * bits % 32 & ((1u << bits) - 1));
  }
}

static void decode_block(const Decoder *d, const uint32_t *words, int16_t *out) {
  uint8_t bytes[BLOCK];
  if (d->trellis) {
    lookup_blocks(d, words, 1, bytes);
    for (int i = 0; i < BLOCK; i++) out[i] = bytes[i];
  } else if (d->bits == 4) fields_of(words, 4, out);
  else if (d->bits == 8) fields_of(words, 8, out);
  else fields_of(words, d->bits, out);
}

static void decode_chunks(const Decoder *d, const uint32_t *words, int chunks, int tail, int16_t *out) {
  int blocks = 2 * chunks - tail;
  for (int b = 0; b < blocks; b++) decode_block(d, words + b * d->bits, out + b * BLOCK);
  memset(out + blocks * BLOCK, 0, (2 * chunks - blocks) * BLOCK * sizeof(int16_t));
}

static int decode_rows(const Decoder *d, const uint32_t *words, int64_t stride, int rows, int chunks, int tail,
                       int16_t *out, int64_t out_stride, const Term *terms, int count) {
  (void)terms, (void)count;
  prefetch(words, AHEAD, AHEAD + 4 * stride * rows);
  for (int r = 0; r < rows; r++) decode_chunks(d, words + r * stride, chunks, tail, out + r * out_stride);
  return 0;
}

static int decode_tile(const Decoder *d, const uint32_t *words, int64_t stride, int rows, int tail, const void *ahead,
                       int16_t *tile, const Term *terms, int count, int column) {
  (void)terms, (void)count, (void)column;
  prefetch(ahead, 0, (int64_t)8 * d->bits * rows);
  for (int r = 0; r < rows; r++) decode_chunks(d, words + r * stride, 1, tail, tile + r * CHUNK);
  return 0;
}

static void tile_dot(const int16_t *tile, int rows, const Term *terms, int count, int column, int32_t offset2) {
  (void)offset2;
  for (const Term *t = terms; t < terms + count; t++) {
    int32_t sums[CHUNK];
    for (int i = 0; i < CHUNK; i++) sums[i] = (int32_t)t->start;
    for (int r = 0; r < rows; r++)
      for (int i = 0; i < CHUNK; i++) sums[i] += t->q[r] * tile[r * CHUNK + i];
    for (int i = 0; i < CHUNK; i++) t->out[column + i] += t->factor * (float)(2 * sums[i] - t->rest);
  }
}

static void order_columns(float *out, int chunks) {
  (void)out, (void)chunks;
}

static void rows_dot(const int16_t *rows, int64_t stride, int chunks, const Term *terms, int count, int32_t offset2) {
  (void)offset2;
  for (const Term *t = terms; t < terms + count; t++)
    for (int r = 0; r < QUAD; r++) {
      float sum = 0;
      for (int c = 0; c < chunks; c++) { /* a chunk's sum fits 32 bits, a panel's need not */
        int32_t part = 0;
        for (int i = c * CHUNK; i < (c + 1) * CHUNK; i++) part += t->q[i] * rows[r * stride + i];
        sum += (float)part;
      }
      t->out[r] += t->factor * (2 * (sum + (float)t->start) - (float)t->rest);
    }
}

static void quad_sums(const int16_t *q, int chunks, int32_t *out) {
  for (int i = 0; i < chunks * CHUNK / 4; i++) out[i] = q[4 * i] + q[4 * i + 1] + q[4 * i + 2] + q[4 * i + 3];
}

/* Columns, of BAND rows each. */
static int decode_band(const Decoder *d, const uint32_t *words, int64_t stride, int chunks, int tail, int16_t *values) {
  for (int c = 0; c < chunks; c++, values += CHUNK * BAND)
    for (int r = 0; r < BAND; r++) {
      int16_t row[CHUNK];
      decode_chunks(d, words + r * stride + c * 2 * d->bits, 1, tail && c == chunks - 1, row);
      for (int i = 0; i < CHUNK; i++) values[i * BAND + r] = (int16_t)(2 * row[i]);
    }
  return 1;
}

static void band_scales(const uint16_t *scales, int64_t stride, int count, float factor, float *out) {
  for (int i = 0; i < count; i++)
    for (int r = 0; r < BAND; r++) out[i * BAND + r] = factor * half_to_float(scales[r * stride + i]);
}

static void band_dot(const Band *b, const Vectors *v, float *out, int64_t stride) {
  int step = b->group < CHUNK ? b->group : CHUNK;
  for (int i = 0; i < v->count; i++, out += stride)
    for (int start = 0; start < b->columns; start += step) {
      int32_t sums[BAND];
      for (int r = 0; r < BAND; r++) sums[r] = v->offset[i * v->offset_stride + start / step];
      for (int c = start; c < start + step; c++)
        for (int r = 0; r < BAND; r++) sums[r] += v->q[i * v->q_stride + c] * b->values[c * BAND + r];
      float input_scale = v->scale[i * v->scale_stride + start / CHUNK];
      const float *scales = b->scales + start / b->group * BAND;
      for (int r = 0; r < BAND; r++) out[r] += (float)sums[r] * (input_scale * scales[r]);
    }
}

static float half_dot(const uint16_t *row, const float *x, int n) {
  float sums[16] = {0}, total = 0;
  int i = 0;
  for (; i + 16 <= n; i += 16)
    for (int j = 0; j < 16; j++) sums[j] += half_to_float(row[i + j]) * x[i + j];
  for (; i < n; i++) total += half_to_float(row[i]) * x[i];
  for (int j = 0; j < 16; j++) total += sums[j];
  return total;
}

const Kernels bitsmoe_portable = {"portable", row_scales, select_rows, gather_in_turn, quantize, decode_tile, tile_dot, order_columns, decode_rows, rows_dot, quad_sums, decode_band, band_scales, band_dot, gate, half_dot, dots};
