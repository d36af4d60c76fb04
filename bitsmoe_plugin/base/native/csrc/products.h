/* Products of matrices in 16-bit integers, sums of which are exact: see bitsmoe_plugin/base/integer_products.py. */
#ifndef BITSMOE_PRODUCTS_H
#define BITSMOE_PRODUCTS_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum {
  STRIPE = 48,   /* rows that are packed together */
  STRETCH = 128, /* columns of a row that share a scale: so many products of two integers fit 32 bits */
  HIGHEST = 4095,
  PAIRS = STRETCH / 2,
  TASK = 2 * STRIPE /* rows of a result that a thread computes at a time */
};

/* Where the rows of a matrix stand: row i is row index[i], or i, of `values`, float32 or bfloat16. */
typedef struct {
  const void *values;
  const int64_t *index; /* or NULL */
  int64_t rows, columns, stride;
  int32_t bfloat16;
} Source;

/* Rows in stripes, the last filled up with zeros: integers [stripes, room, PAIRS, STRIPE, 2], and what they are to
 * be multiplied with [stripes, room, STRIPE], of which the first stretches are in use. NaN where a value of a stretch
 * is not finite. */
typedef struct {
  int16_t *integers;
  float *scales;
  int64_t rows, columns, room;
} Stripes;

static inline int64_t stripes_of(int64_t rows) { return (rows + STRIPE - 1) / STRIPE; }
static inline int64_t stretches_of(int64_t columns) { return (columns + STRETCH - 1) / STRETCH; }

typedef struct {
  /* One stretch of up to STRIPE rows of a source, from row `first` and column `begin` on, count columns of it. */
  void (*pack_rows)(const Source *s, int64_t first, int rows, int64_t begin, int count, int16_t *integers, float *scales);
  /* The same of the transposed source, row i of which is multiplied with root[i] unless root is NULL. */
  void (*pack_columns)(const Source *s, const float *root, int64_t first, int rows, int64_t begin, int count,
                       int16_t *integers, float *scales);
  /* sums [STRIPE, STRIPE] += products of a stretch of two stripes */
  void (*add_products)(const int16_t *a, const float *a_scales, const int16_t *b, const float *b_scales, int pairs,
                       float *sums);
} Products;

extern const Products bitsmoe_products_avx512;

#endif
