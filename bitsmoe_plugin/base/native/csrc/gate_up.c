/* Factors before down, see steps.h. */
#include "steps.h"
#include "tiles.h"

typedef struct {
  const Layer *layer;
  const int32_t *pair; /* [count], of the expert */
  int count, k, factor, planes;
  const float *z;
  int from, to;  /* chunks of columns */
  float *values; /* [count, inputs, to - from, CHUNK] */
  Term *terms;   /* [count, planes] */
  int16_t (*q)[ROWS];
  const Tiles *tiles; /* NULL: none */
} GateUp;

static int width_of(const GateUp *g) { return (g->to - g->from) * CHUNK; }

/* Of one pair and factor. */
static float *values_of(const GateUp *g, int m, int factor) {
  return g->values + ((int64_t)m * g->layer->inputs + factor) * width_of(g);
}

static const float *input_of(const GateUp *g, int m) {
  const Layer *l = g->layer;
  return g->z + (int64_t)(g->pair[m] / g->k) * l->bases * l->rank + (l->bases == 2 && g->factor == 1 ? l->rank : 0);
}

static void gate_up_wide(const GateUp *g, const Rows *rows, const Run *run) {
  int start = g->from * CHUNK, columns = least(g->to * CHUNK, g->layer->size) - start;
  for (int row = run->from; row < run->to; row++)
    for (int m = 0; m < g->count; m++) {
      float a = rows->scale[row] * input_of(g, m)[rows->order[row]], *values = values_of(g, m, g->factor);
      const uint32_t *words = run->words + (row - run->from) * run->stride;
      for (int i = 0; i < columns; i++) values[i] += a * wide_value(g->layer, run->decoder, words, start + i);
    }
}

/* Terms of some rows' inputs times their scales; tile: whose scales, -1 if rows have one. */
static void quantize_inputs(const GateUp *g, const Rows *rows, const Decoder *d, int row, int count, int tile) {
  const Layer *l = g->layer;
  for (int m = 0; m < g->count; m++) {
    float a[ROWS], rest[ROWS];
    const float *z = input_of(g, m);
    bitsmoe_kernels->gather(z, rows->order + row, rows->scale + row, count, a);
    for (int i = 0; i < count && tile >= 0; i++) a[i] *= tile_scale(l, rows, row + i, tile);
    for (int plane = 0; plane < g->planes; plane++) {
      int at = m * g->planes + plane;
      int32_t sum;
      float scale = bitsmoe_kernels->quantize(plane ? rest : a, count, ROWS, g->q[at], &sum,
                                              plane + 1 < g->planes ? rest : NULL);
      g->terms[at] = term_of(g->q[at], sum, d->offset2, scale * d->step / 2, values_of(g, m, g->factor));
    }
  }
}

static void gate_up_rows(const GateUp *g, const Rows *rows, const Run *run, int row, int count) {
  const Layer *l = g->layer;
  const Decoder *d = run->decoder;
  int16_t tile[ROWS * CHUNK] __attribute__((aligned(LINE)));
  if (!rows->tiles) quantize_inputs(g, rows, d, row, count, -1);
  const uint32_t *words = run->words + (row - run->from) * run->stride;
  int chunks = chunks_of(l->size);
  int64_t bytes = 4 * run->stride * count;
  if (g->tiles && count < ROWS) memset(tile, 0, sizeof tile);
  for (int c = g->from; c < g->to; c++) {
    int tail = c == chunks - 1 && tail_of(l->size);
    if (rows->tiles && (c == g->from || c * CHUNK % TILE == 0))
      quantize_inputs(g, rows, d, row, count, c * CHUNK / TILE);
    /* chunks of a tile's rows are too far apart for the hardware to foresee, so a share of the next tile is fetched */
    int column = (c - g->from) * CHUNK, terms = g->count * g->planes;
    int done = bitsmoe_kernels->decode_tile(d, words + (int64_t)c * 2 * d->bits, run->stride, count, tail,
                                            (const char *)words + bytes + bytes * c / chunks, tile, g->terms,
                                            g->tiles ? 0 : terms, column);
    if (done < terms)
      (g->tiles ? g->tiles->tile_dot : bitsmoe_kernels->tile_dot)(tile, count, g->terms + done, terms - done, column,
                                                                  d->offset2);
  }
}

/* One factor's share of the values. */
static void gate_up_factor(const GateUp *g, const Rows *rows, int expert) {
  Run runs[MAX_WIDTHS];
  int count = bitsmoe_runs_of(g->layer, rows, g->factor, expert, 0, 1, runs);
  for (int m = 0; m < g->count; m++) memset(values_of(g, m, g->factor), 0, width_of(g) * sizeof(float));
  for (int i = 0; i < count; i++)
    for (int row = runs[i].from; row < runs[i].to && runs[i].bits < 16; row += ROWS)
      gate_up_rows(g, rows, &runs[i], row, least(ROWS, runs[i].to - row));
  for (int m = 0; m < g->count; m++) bitsmoe_kernels->order_columns(values_of(g, m, g->factor), g->to - g->from);
  for (int i = 0; i < count; i++)
    if (runs[i].bits == 16) gate_up_wide(g, rows, &runs[i]);
}

static void add_bias(const GateUp *g, int expert) {
  const Layer *l = g->layer;
  int start = g->from * CHUNK, columns = least(g->to * CHUNK, l->size) - start;
  for (int factor = 0; factor < l->inputs && l->bias_dtype; factor++) {
    int64_t first = ((int64_t)expert * l->inputs + factor) * l->size + start;
    for (int m = 0; m < g->count; m++)
      for (int i = 0; i < columns; i++) values_of(g, m, factor)[i] += stored_value(l->input_bias, l->bias_dtype, first + i);
  }
}

/* To `out`, what the caller of bitsmoe_gate_up asks for. */
static void store(const GateUp *g, float *out) {
  const Layer *l = g->layer;
  int start = g->from * CHUNK, columns = least(g->to * CHUNK, l->size) - start;
  int known = l->gating.activation != UNKNOWN, vectors = known ? 1 : l->inputs;
  for (int m = 0; m < g->count; m++) {
    float *first = values_of(g, m, 0);
    if (known)
      bitsmoe_kernels->gate(&l->gating, first, l->inputs == 2 ? values_of(g, m, 1) : NULL, g->to - g->from, first);
    for (int i = 0; i < vectors; i++)
      memcpy(out + ((int64_t)g->pair[m] * vectors + i) * l->size + start, values_of(g, m, i), columns * sizeof(float));
  }
}

/* Chunks g->from to g->to of one expert; rows: of its factors. */
static int gate_up_part(GateUp *g, const Rows *rows, int expert, float *out) {
  const Layer *l = g->layer;
  int64_t terms = (int64_t)g->count * g->planes, values = (int64_t)g->count * l->inputs * width_of(g);
  g->values = new_lines(values * sizeof(float) + terms * (sizeof *g->q + sizeof(Term)));
  if (!g->values) return -1;
  g->q = (int16_t (*)[ROWS])(g->values + values);
  g->terms = (Term *)(g->q + terms);
  g->tiles = tiles_for(terms);
  if (g->tiles) g->tiles->configure((int)terms, ROWS);
  for (g->factor = 0; g->factor < l->inputs; g->factor++) gate_up_factor(g, &rows[g->factor], expert);
  if (g->tiles) g->tiles->release();
  add_bias(g, expert);
  store(g, out);
  free(g->values);
  return 0;
}

enum { SCRATCH = 1 << 22 }; /* bytes of values of a part, more only where a chunk has them */

/* Parts that the columns of each expert are cut into. */
static int column_parts(const Layer *l, const Routing *routing, int threads) {
  int most = 1, chunks = chunks_of(l->size);
  for (int i = 0; i < routing->active; i++) {
    int count = routing->first[i + 1] - routing->first[i];
    most = count > most ? count : most;
  }
  int64_t of_chunk = (int64_t)most * l->inputs * CHUNK * sizeof(float);
  int fitting = of_chunk > SCRATCH ? 1 : (int)(SCRATCH / of_chunk);
  int needed = (chunks + fitting - 1) / fitting, wanted = parts_of(routing->active, threads, chunks);
  return wanted > needed ? wanted : needed;
}

/* From z [T, bases r] and ids [T, k] (outside 0..E-1: zeros) out[p] = the gating's result of pair p, [T k, I], or, if
 * that is not known here, gate and up, or up, [T k, inputs, I]. */
int bitsmoe_gate_up(const Layer *l, const float *z, const int64_t *ids, int64_t tokens, int64_t k, float *out,
                    int threads, int planes) {
  Routing routing;
  Index index;
  int64_t pairs = tokens * k;
  if (bitsmoe_route(l, ids, pairs, &routing)) return -1;
  int chunks = chunks_of(l->size), inputs = l->inputs, parts = column_parts(l, &routing, threads);
  int64_t values = (int64_t)l->size * (l->gating.activation == UNKNOWN ? inputs : 1);
  int failed = bitsmoe_new_index(l, &routing, 0, inputs, &index);
  int tasks = routing.active * parts, ready = !failed;
#pragma omp parallel num_threads(threads) if (ready)
  if (ready) {
    bitsmoe_fill_index(l, &routing, &index);
#pragma omp for schedule(static) nowait
    for (int64_t p = 0; p < pairs; p++)
      if (ids[p] < 0 || ids[p] >= l->experts) memset(out + p * values, 0, values * sizeof(float));
#pragma omp for schedule(dynamic)
    for (int task = 0; task < tasks; task++) {
      int part = task % parts, active = task / parts, first = routing.first[active];
      GateUp g = {l, routing.pair + first, routing.first[active + 1] - first, (int)k, 0, planes, z,
                  chunks * part / parts, chunks * (part + 1) / parts, NULL, NULL, NULL, NULL};
      if (gate_up_part(&g, &index.rows[inputs * active], routing.expert[active], out)) {
#pragma omp atomic write
        failed = 1;
      }
    }
  }
  bitsmoe_free_index(&index);
  free(routing.memory);
  return -failed;
}
