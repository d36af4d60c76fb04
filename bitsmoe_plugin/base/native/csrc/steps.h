/* The steps of a layer's forward pass, shared out over threads. Each returns 0, or -1 without memory. Inputs become
 * `planes` planes of integers, 1 or 2, see bitsmoe.h. */
#ifndef BITSMOE_STEPS_H
#define BITSMOE_STEPS_H

#include <stdlib.h>

#include "bitsmoe.h"

extern const Kernels *bitsmoe_kernels; /* of the instruction set in use */

static inline int least(int a, int b) { return a < b ? a : b; }
static inline int chunks_of(int columns) { return (columns + CHUNK - 1) / CHUNK; }
static inline int tail_of(int columns) { return (columns + BLOCK - 1) / BLOCK % 2; }

/* Vectors in 16-bit integers: plane j of vector i at q + (i * planes + j) * padded, for each panel a scale and the
 * sum. */
typedef struct {
  int padded, panels, panel, planes;
  int16_t *q; /* the others lie behind them */
  float *scale;
  int32_t *sum;
} Hidden;

static inline Hidden new_hidden(int64_t count, int size, int panel, int planes) {
  int padded = chunks_of(size) * CHUNK, panels = (padded + panel - 1) / panel;
  int64_t rows = count * planes;
  int16_t *q = malloc(rows * (padded * sizeof(int16_t) + panels * (sizeof(float) + sizeof(int32_t))) + 1);
  float *scale = q ? (float *)(q + rows * padded) : NULL;
  return (Hidden){padded, panels, panel, planes, q, scale, q ? (int32_t *)(scale + rows * panels) : NULL};
}

/* Panel `panel` of vector i, which has `size` values a. */
static inline void quantize_panel(const Hidden *h, int64_t i, int panel, const float *a, int size) {
  float rest[PANEL];
  int start = panel * h->panel, count = least(h->panel, size - start);
  for (int plane = 0; plane < h->planes; plane++) {
    int64_t row = i * h->planes + plane, at = row * h->panels + panel;
    h->scale[at] = bitsmoe_kernels->quantize(plane ? rest : a + start, count, least(h->panel, h->padded - start),
                                             h->q + row * h->padded + start, h->sum + at,
                                             plane + 1 < h->planes ? rest : NULL);
  }
}

#endif
