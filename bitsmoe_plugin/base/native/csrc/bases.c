/* Products with the bases, see steps.h. BAND rows are decoded once for all vectors, and stand side by side in vector
 * registers, so that neither sums nor scales have to be gathered. Sums are added up in the order of the columns,
 * whatever the number of vectors: a token's result does not depend on the others. */
#include "steps.h"
#include "tiles.h"

typedef struct {
  int rows, columns;
  const uint32_t *words;
  const uint16_t *scales;
} Basis;

static Basis basis_of(const Layer *l, int output) {
  if (output) return (Basis){l->hidden, l->rank, l->output_basis, l->output_scales};
  return (Basis){l->bases * l->rank, l->hidden, l->input_basis, l->input_scales};
}

static int step_of(const Layer *l) { return least(l->basis_group, CHUNK); }

/* `offsets` of row i of h, see Vectors; fours: room for a sum for each four columns. */
static void sum_offsets(const Layer *l, const Hidden *h, int64_t i, int32_t *fours, int32_t *offsets) {
  int per_step = step_of(l) / 4;
  bitsmoe_kernels->quad_sums(h->q + i * h->padded, h->padded / CHUNK, fours);
  for (int s = 0; s < h->padded / step_of(l); s++) {
    int32_t sum = 0;
    for (int j = 0; j < per_step; j++) sum += fours[s * per_step + j];
    offsets[s] = -l->basis.offset2 * sum;
  }
}

/* Room for a decoded band. */
typedef struct {
  int16_t values[BAND * PANEL];
  float scales[BAND * PANEL / 16];
} Room;

/* BAND rows from `row` on times all tokens. */
static void basis_rows(const Layer *l, const Basis *b, int row, const Hidden *x, const int32_t *offsets,
                       int64_t tokens, const Tiles *tiles, Room *room, float *out) {
  int64_t stride = (int64_t)(b->columns + BLOCK - 1) / BLOCK * l->basis_bits, groups = b->columns / l->basis_group;
  int steps = x->padded / step_of(l);
  for (int64_t t = 0; t < tokens; t++) memset(out + t * b->rows + row, 0, BAND * sizeof(float));
  for (int start = 0; start < b->columns; start += PANEL) {
    int columns = least(PANEL, b->columns - start), last = start + columns == b->columns;
    Band band = {room->values, room->scales, columns, l->basis_group, 0};
    band.doubled = bitsmoe_kernels->decode_band(&l->basis, b->words + row * stride + start / BLOCK * l->basis_bits, stride,
                                                chunks_of(columns), last && tail_of(b->columns), room->values);
    bitsmoe_kernels->band_scales(b->scales + row * groups + start / l->basis_group, groups, columns / l->basis_group,
                                 l->basis.step / 2, room->scales);
    for (int plane = 0; plane < x->planes; plane++) {
      Vectors vectors = {x->q + (int64_t)plane * x->padded + start, x->scale + plane * x->panels + start / CHUNK,
                         offsets + (int64_t)plane * steps + start / step_of(l), (int64_t)x->planes * x->padded,
                         (int64_t)x->planes * x->panels, (int64_t)x->planes * steps, (int)tokens};
      (tiles ? tiles->band_dot : bitsmoe_kernels->band_dot)(&band, &vectors, out + row, b->rows);
    }
  }
}

static int basis_product(const Layer *l, const Basis *b, const float *x, int64_t tokens, float *out, int threads,
                         int planes) {
  int chunks = chunks_of(b->columns), failed = 0;
  Hidden hidden = new_hidden(tokens, b->columns, CHUNK, planes);
  int64_t vectors = tokens * planes, steps = hidden.padded / step_of(l);
  int32_t *offsets = malloc((vectors * steps + 1) * sizeof(int32_t));
  int ready = hidden.q && offsets;
  const Tiles *tiles = tiles_for(tokens);
#pragma omp parallel num_threads(threads) if (ready)
  if (ready) {
    Room *room = new_lines(sizeof(Room) + hidden.padded / 4 * sizeof(int32_t));
    if (!room) {
#pragma omp atomic write
      failed = 1;
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < tokens; i++) {
      for (int c = 0; c < chunks; c++) quantize_panel(&hidden, i, c, x + i * b->columns, b->columns);
      for (int64_t v = i * planes; v < (i + 1) * planes && room; v++)
        sum_offsets(l, &hidden, v, (int32_t *)(room + 1), offsets + v * steps);
    }
    if (tiles) tiles->configure((int)tokens, step_of(l));
#pragma omp for schedule(dynamic)
    for (int row = 0; row < b->rows; row += BAND)
      if (room) basis_rows(l, b, row, &hidden, offsets, tokens, tiles, room, out);
    if (tiles) tiles->release();
    free(room);
  }
  free(offsets);
  free(hidden.q);
  return -(failed || !ready);
}

/* out [T, rows] = x [T, columns] times the transposed basis; output: 0 for the input basis, 1 for the output's. */
int bitsmoe_basis(const Layer *l, int output, const float *x, int64_t tokens, float *out, int threads, int planes) {
  Basis b = basis_of(l, output);
  if (l->basis_bits < 16) return basis_product(l, &b, x, tokens, out, threads, planes);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int row = 0; row < b.rows; row++)
    for (int64_t t = 0; t < tokens; t++)
      out[t * b.rows + row] =
          bitsmoe_kernels->half_dot((const uint16_t *)b.words + (int64_t)row * b.columns, x + t * b.columns, b.columns);
  return 0;
}
