/* Rounding of factor rows: their scales, the search for trellis codes, and error feedback along the rank.
 *
 * What is computed is defined by bitsmoe_plugin/{grids,trellis,rounding}.py. Blocks of a trellis are searched
 * side by side in the lanes of vectors; a block's codes do not depend on what is beside it, so results do not
 * depend on the number of threads. */
#ifndef BITSMOE_ROUNDING_H
#define BITSMOE_ROUNDING_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "bitsmoe.h"

enum {
  WINDOW = 8,
  WARM = 24, /* values before a block's seam that settle its state there */
  CANDIDATES = 8, /* scales tried per row, as grids.SCALE_CANDIDATES */
  LEVELS = 32,    /* as scale_grid.SCALE_LEVELS */
  NEARBY = 2,     /* as scale_grid.NEARBY */
  TRELLIS_BITS = 4
};

/* How rows of every width are rounded. */
typedef struct {
  float step[17];                   /* of the uniform grid, by bits */
  const float *table[TRELLIS_BITS + 1]; /* [256] values of windows, NULL: uniform grid */
} Grids;

/* One block of 32 values to be coded. */
typedef struct {
  const float *x, *weights;
  float factor; /* values are multiplied with */
  int n;        /* of them, the others are zeros of weight zero */
  int32_t *codes;
} Block;

/* One block whose errors are passed on inside it, see trellis/coupled_search.py. */
typedef struct {
  const float *x;              /* [32] */
  const float *unit, *variance; /* [32, 32], [32] */
  int32_t *codes;              /* [32], found before; overwritten */
} CoupledBlock;

/* What depends on the instruction set; rounding_kernels.h says what each does. */
typedef struct {
  int64_t search_bytes;
  void (*search_blocks)(void *search, const Block *blocks, int64_t count, const float *table, int bits);
  int64_t coupled_bytes;
  void (*search_coupled)(void *search, const CoupledBlock *blocks, int64_t count, const float *table, int bits);
  void (*best_scale)(const float *row, const float *weights, int size, int bits, float unit, float *scale,
                     float *distortion);
  int (*choose_scale)(const float *row, const float *weights, int size, int bits, float unit, float start,
                      float low, float step);
  void (*uniform_codes)(const float *row, int size, float step, int bits, int32_t *codes);
  void (*decode)(const int32_t *codes, int size, const float *table, int bits, float scale, float *values);
  float (*pass_on)(float *work, const float *value, float *target, const float *weights, int size,
                   const float *unit, int rows);
} Rounding;

extern const Rounding bitsmoe_rounding_portable;
#if defined(__x86_64__)
extern const Rounding bitsmoe_rounding_avx2, bitsmoe_rounding_avx512;
#endif

#endif
