/* Rounding of many rows, shared out over threads; see rounding.h. */
#include "rounding.h"

static const Rounding *rounding = &bitsmoe_rounding_portable;

/* As bitsmoe_select, which calls it: the same instruction set for rounding. */
void bitsmoe_select_rounding(const char *name) {
  rounding = &bitsmoe_rounding_portable;
#if defined(__x86_64__)
  if (!strcmp(name, "avx2")) rounding = &bitsmoe_rounding_avx2;
  if (!strcmp(name, "avx512")) rounding = &bitsmoe_rounding_avx512;
#endif
}

static void *new_search(void) { return aligned_alloc(64, (rounding->search_bytes + 63) / 64 * 64); }

static void *new_coupled(void) { return aligned_alloc(64, (rounding->coupled_bytes + 63) / 64 * 64); }

/* Codes of blocks [n, 32] with weights alike. Returns 0, or -1 without memory. */
int bitsmoe_trellis_codes(const float *blocks, const float *weights, int64_t n, const float *table, int bits,
                          int32_t *codes, int threads) {
  enum { BATCH = 256 };
  int failed = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t start = 0; start < n; start += BATCH) {
    const int count = n - start < BATCH ? (int)(n - start) : BATCH;
    void *search = new_search();
    Block queue[BATCH];
    if (search) {
      for (int i = 0; i < count; i++)
        queue[i] = (Block){blocks + (start + i) * BLOCK, weights + (start + i) * BLOCK, 1, BLOCK,
                           codes + (start + i) * BLOCK};
      rounding->search_blocks(search, queue, count, table, bits);
    } else {
#pragma omp atomic write
      failed = -1;
    }
    free(search);
  }
  return failed;
}

/* Codes of blocks [n, 32], owner [n] telling which unit [.., 32, 32] and variance [.., 32] each has; codes are those
 * found before. Returns 0, or -1 without memory. */
int bitsmoe_coupled_codes(const float *rows, const int64_t *owner, int64_t n, const float *unit, const float *variance,
                          const float *table, int bits, int32_t *codes, int threads) {
  enum { BATCH = 64 };
  int failed = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t start = 0; start < n; start += BATCH) {
    const int count = n - start < BATCH ? (int)(n - start) : BATCH;
    CoupledBlock blocks[BATCH];
    void *search = new_coupled();
    if (!search) {
#pragma omp atomic write
      failed = -1;
      continue;
    }
    for (int i = 0; i < count; i++) {
      const int64_t at = start + i;
      blocks[i] = (CoupledBlock){rows + at * BLOCK, unit + owner[at] * BLOCK * BLOCK, variance + owner[at] * BLOCK,
                                 codes + at * BLOCK};
    }
    rounding->search_coupled(search, blocks, count, table, bits);
    free(search);
  }
  return failed;
}

/* Bit strings [n, bits words] of blocks of codes [n, 32], as bit_strings.pack_codes. */
void bitsmoe_pack(const int32_t *codes, int64_t n, int bits, uint32_t *words, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t b = 0; b < n; b++) {
    uint64_t string = 0;
    int filled = 0;
    uint32_t *out = words + b * bits;
    for (int i = 0; i < BLOCK; i++) {
      string |= (uint64_t)(uint32_t)codes[b * BLOCK + i] << filled;
      filled += bits;
      if (filled >= 32) {
        *out++ = (uint32_t)string;
        string >>= 32;
        filled -= 32;
      }
    }
  }
}

/* grids.best_scale of rows [n, size], row j at bits[j] and with weights[j / per]. */
void bitsmoe_best_scales(const Grids *grids, const float *rows, const float *weights, int64_t per, int64_t n,
                         int size, const uint8_t *bits, float *scales, float *distortions, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t j = 0; j < n; j++)
    rounding->best_scale(rows + j * size, weights + j / per * size, size, bits[j], grids->step[bits[j]], scales + j,
               distortions + j);
}

/* scale_grid.nearby_codes of rows [n, size]; row j has low[j % rank], step[j % rank] and weights[j / per]. */
void bitsmoe_choose_scales(const Grids *grids, const float *rows, const float *weights, int64_t per, int64_t n,
                           int size, const uint8_t *bits, const float *start, const float *low, const float *step,
                           int64_t rank, uint8_t *codes, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t j = 0; j < n; j++)
    codes[j] = (uint8_t)rounding->choose_scale(rows + j * size, weights + j / per * size, size, bits[j],
                                     grids->step[bits[j]], start[j], low[j % rank], step[j % rank]);
}

/* Factors that are rounded row after row, P = factors times experts of them. */
typedef struct {
  int64_t problems, units, rank, first, last; /* P, U, r; rows of this call */
  int32_t size, padded, experts;       /* I, whole blocks, experts per factor */
  const float *weights;                /* [P, I] */
  const float *unit;                   /* [U, r, r] unit upper factor of the covariance, U = P or experts */
  const uint8_t *bits;                 /* [P, r] */
  const float *start;                  /* [P, r] planned scale codes */
  const float *low, *step;             /* [P / experts, r] scale grids */
  float *work;                         /* [P, r, I] rows; those before `first`, then all: row - value */
  float *target;                       /* [P, last - first, I] rows with the errors of those before `first` */
  uint8_t *scale_codes;                /* [P, r] */
  int32_t *codes;                      /* [P, r, padded] */
  float *values;                       /* [P, r, I] */
  float *errors;                       /* [P, r] weighted squares of what is left of each row's target */
} RankRows;

int64_t bitsmoe_rank_rows_bytes(void) { return sizeof(RankRows); }

/* Values of codes. */
static void decode_row(const Grids *grids, const int32_t *codes, int size, int bits, float scale, float *values) {
  if (bits == 0) {
    memset(values, 0, size * sizeof *values);
    return;
  }
  const float *table = bits <= TRELLIS_BITS ? grids->table[bits] : NULL;
  if (table) {
    rounding->decode(codes, size, table, bits, scale, values);
    return;
  }
  const float step = scale * grids->step[bits], half = (float)((1 << bits) - 1) / 2;
  for (int i = 0; i < size; i++) values[i] = ((float)codes[i] - half) * step;
}

/* Of rows that are one block each and owned `per` in succession, unit [n / per, 32, 32] and variance [n / per, 32];
 * without a unit errors stay where they are. */
typedef struct {
  const float *unit, *variance;
  int64_t per;
} Coupling;

enum { ROW_BATCH = 64 };

/* Codes of blocks of one width, `first` being those of row 0, once more as they are coupled. */
static void couple(const Coupling *c, void *search, const Block *blocks, int64_t count, const int32_t *first,
                   const float *scales, const float *table, int bits) {
  float rows[ROW_BATCH][BLOCK];
  CoupledBlock coupled[ROW_BATCH];
  for (int64_t i = 0; i < count; i++) {
    const Block *b = blocks + i;
    const int64_t row = (b->codes - first) / BLOCK, owner = row / c->per;
    for (int k = 0; k < BLOCK; k++) rows[i][k] = k < b->n ? b->x[k] / scales[row] : 0;
    coupled[i] = (CoupledBlock){rows[i], c->unit + owner * BLOCK * BLOCK, c->variance + owner * BLOCK, b->codes};
  }
  rounding->search_coupled(search, coupled, count, table, bits);
}

/* Codes [n, padded] and values [n, size] of rows [n, size] at scales [n] of their own, row j at bits[j] and with
 * weights[j / per]. With a unit, see Coupling, rows are one block each. Returns 0, or -1 without memory. */
int bitsmoe_rounded_rows(const Grids *grids, const float *rows, const float *weights, const float *unit,
                         const float *variance, int64_t per, int64_t n, int size, const uint8_t *bits, const float *scales,
                         int32_t *codes, float *values, int threads) {
  const Coupling coupling = {unit, variance, per};
  const int blocks = (size + BLOCK - 1) / BLOCK, padded = blocks * BLOCK;
  int failed = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t start = 0; start < n; start += ROW_BATCH) {
    const int64_t end = n - start < ROW_BATCH ? n : start + ROW_BATCH, room = (int64_t)ROW_BATCH * blocks;
    int64_t count[TRELLIS_BITS + 1] = {0};
    void *search = new_search(), *again = unit ? new_coupled() : search;
    Block *queue = malloc((TRELLIS_BITS + 1) * room * sizeof *queue);
    const int ready = search && again && queue;
    for (int64_t j = start; j < end && ready; j++) {
      const int width = bits[j];
      if (width == 0 || width > TRELLIS_BITS || !grids->table[width]) {
        memset(codes + j * padded, 0, padded * sizeof *codes);
        if (width)
          rounding->uniform_codes(rows + j * size, size, scales[j] * grids->step[width], width, codes + j * padded);
        continue;
      }
      for (int first = 0; first < size; first += BLOCK)
        queue[width * room + count[width]++] =
            (Block){rows + j * size + first, weights + j / per * size + first, 1.f / scales[j],
                    size - first < BLOCK ? size - first : BLOCK, codes + j * padded + first};
    }
    for (int width = 1; width <= TRELLIS_BITS; width++) {
      const Block *some = queue + width * room;
      if (!count[width]) continue;
      rounding->search_blocks(search, some, count[width], grids->table[width], width);
      if (unit) couple(&coupling, again, some, count[width], codes, scales, grids->table[width], width);
    }
    for (int64_t j = start; j < end && ready; j++)
      decode_row(grids, codes + j * padded, size, bits[j], scales[j], values + j * size);
    if (!ready) {
#pragma omp atomic write
      failed = -1;
    }
    if (unit) free(again);
    free(search);
    free(queue);
  }
  return failed;
}

/* Rows first..last of the problems from..to, in lockstep: row k of all of them is searched together. */
static void round_some(const Grids *grids, const RankRows *r, int64_t from, int64_t to, void *search, Block *queue) {
  const int blocks = r->padded / BLOCK;
  const int64_t room = (to - from) * blocks, called = r->last - r->first;
  for (int64_t k = r->first; k < r->last; k++) {
    int64_t count[TRELLIS_BITS + 1] = {0};
    for (int64_t p = from; p < to; p++) {
      const int64_t at = p * r->rank + k, grid = p / r->experts * r->rank + k;
      const float *row = r->target + (p * called + k - r->first) * r->size;
      const int bits = r->bits[at];
      int32_t *codes = r->codes + at * r->padded;
      const int code = rounding->choose_scale(row, r->weights + p * r->size, r->size, bits, grids->step[bits], r->start[at],
                                    r->low[grid], r->step[grid]);
      const float scale = exp2f(r->low[grid] + code * r->step[grid]);
      r->scale_codes[at] = (uint8_t)code;
      if (bits == 0 || bits > TRELLIS_BITS || !grids->table[bits]) {
        memset(codes, 0, r->padded * sizeof *codes);
        if (bits) rounding->uniform_codes(row, r->size, scale * grids->step[bits], bits, codes);
        continue;
      }
      for (int b = 0; b < blocks; b++) {
        const int left = r->size - b * BLOCK;
        queue[bits * room + count[bits]++] =
            (Block){row + b * BLOCK, r->weights + p * r->size + b * BLOCK, 1.f / scale,
                    left < BLOCK ? left : BLOCK, codes + b * BLOCK};
      }
    }
    for (int bits = 1; bits <= TRELLIS_BITS; bits++)
      if (count[bits]) rounding->search_blocks(search, queue + bits * room, count[bits], grids->table[bits], bits);
    for (int64_t p = from; p < to; p++) {
      const int64_t at = p * r->rank + k, grid = p / r->experts * r->rank + k;
      float *value = r->values + at * r->size;
      decode_row(grids, r->codes + at * r->padded, r->size, r->bits[at],
                 exp2f(r->low[grid] + r->scale_codes[at] * r->step[grid]), value);
      const float *unit = r->unit ? r->unit + (p % r->units * r->rank + k) * r->rank + k : NULL;
      r->errors[at] = rounding->pass_on(r->work + at * r->size, value, r->target + (p * called + k - r->first) * r->size,
                              r->weights + p * r->size, r->size, unit, unit ? (int)(r->last - k) : 1);
    }
  }
}

/* Returns 0, or -1 without memory. */
int bitsmoe_round_rank(const Grids *grids, const RankRows *r, int threads) {
  const int64_t share = (r->problems + threads - 1) / threads;
  int failed = 0;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int t = 0; t < threads; t++) {
    const int64_t from = t * share, to = from + share < r->problems ? from + share : r->problems;
    if (from >= to) continue;
    void *search = new_search();
    Block *queue = malloc((TRELLIS_BITS + 1) * share * (r->padded / BLOCK) * sizeof *queue);
    if (search && queue) round_some(grids, r, from, to, search, queue);
    else {
#pragma omp atomic write
      failed = -1;
    }
    free(search);
    free(queue);
  }
  return failed;
}
