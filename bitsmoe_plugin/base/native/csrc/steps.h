/* The steps of a layer's forward pass, shared out over threads. Each returns 0, or -1 without memory. Inputs become
 * `planes` planes of integers, 1 or 2, see bitsmoe.h. */
#ifndef BITSMOE_STEPS_H
#define BITSMOE_STEPS_H

#include <stdlib.h>

#include "bitsmoe.h"

extern const Kernels *bitsmoe_kernels; /* of the instruction set in use */

/* At least one line, at the beginning of one; NULL without memory. */
static inline void *new_lines(size_t bytes) { return aligned_alloc(LINE, (bytes / LINE + 1) * LINE); }

static inline int least(int a, int b) { return a < b ? a : b; }
static inline int chunks_of(int columns) { return (columns + CHUNK - 1) / CHUNK; }
static inline int tail_of(int columns) { return (columns + BLOCK - 1) / BLOCK % 2; }

/* Value i of what is stored in a dtype of its own. */
static inline float stored_value(const void *stored, int dtype, int64_t i) {
  if (dtype == FLOAT32) return ((const float *)stored)[i];
  uint16_t half = ((const uint16_t *)stored)[i];
  if (dtype == FLOAT16) return half_to_float(half);
  uint32_t bits = (uint32_t)half << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

/* The stored rows of one factor of one expert, in the order of the payload. */
typedef struct {
  int count[MAX_WIDTHS]; /* by falling width */
  int stored;            /* rows that are not dropped */
  int32_t *order;        /* rank indices */
  float *scale;
  const uint16_t *tiles; /* float16 [stored, tiles], NULL unless the grid is "tiled" */
} Rows;

static inline int tiles_of(const Layer *l) { return (l->size + TILE - 1) / TILE; }

static inline float tile_scale(const Layer *l, const Rows *rows, int row, int tile) {
  return half_to_float(rows->tiles[(int64_t)row * tiles_of(l) + tile]);
}

/* Which pairs (token, slot) each expert has. */
typedef struct {
  int active;
  int32_t *expert; /* [active] */
  int32_t *first;  /* [active + 1], into pair */
  int32_t *pair;   /* [pairs] */
  int32_t *memory;
} Routing;

/* The rows of `factors` factors from `factor` on of all active experts. */
typedef struct {
  Rows *rows; /* [active, factors] */
  float *memory;
  int factor, factors;
} Index;

/* Rows from..to of the payload's order that have one width, and where they stand. */
typedef struct {
  const Decoder *decoder;
  int bits, from, to;
  int64_t stride; /* words of a row */
  const uint32_t *words;
} Run;

/* Parts that each of `tasks` tasks is cut into, so that few experts still occupy all threads. Each part computes
 * values of its own, so results depend neither on the number of threads nor on that of experts in use. */
static inline int parts_of(int tasks, int threads, int most) {
  int parts = (2 * threads + tasks - 1) / (tasks ? tasks : 1);
  parts = least(parts, most);
  return parts < 1 ? 1 : parts;
}

/* 16-bit codes, in float: too rare for more. In the grid "tiled" they are float16 values. */
static inline float wide_value(const Layer *l, const Decoder *d, const uint32_t *words, int i) {
  uint32_t code = words[i / 2] >> (i % 2 * 16) & 0xffff;
  return l->tile_scales ? half_to_float((uint16_t)code) : d->step * ((float)code - 32767.5f);
}

int bitsmoe_route(const Layer *l, const int64_t *ids, int64_t pairs, Routing *out);
int bitsmoe_new_index(const Layer *l, const Routing *routing, int factor, int factors, Index *out);
void bitsmoe_free_index(Index *index);
/* Called by all threads of a parallel region. */
void bitsmoe_fill_index(const Layer *l, const Routing *routing, Index *index);
/* The runs of one of `parts` parts of the rows; returns their number. */
int bitsmoe_runs_of(const Layer *l, const Rows *rows, int factor, int expert, int part, int parts, Run *runs);

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
  int16_t *q = new_lines(rows * (padded * sizeof(int16_t) + panels * (sizeof(float) + sizeof(int32_t))));
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
