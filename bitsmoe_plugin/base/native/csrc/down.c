/* Factors after the gating, see steps.h. */
#include "steps.h"

typedef struct {
  const Layer *layer;
  const int32_t *pair;
  int count;
  const float *h, *weights;
  const Hidden *hidden;
  float *out; /* of pair p: out + p * r */
} Down;

static void down_wide(const Down *g, const Rows *rows, const Run *run) {
  const Layer *l = g->layer;
  for (int row = run->from; row < run->to; row++)
    for (int m = 0; m < g->count; m++) {
      int64_t p = g->pair[m];
      const uint32_t *words = run->words + (row - run->from) * run->stride;
      float sum = 0;
      for (int i = 0; i < l->size; i++) sum += g->h[p * l->size + i] * wide_value(l, run->decoder, words, i);
      g->out[p * l->rank + rows->order[row]] = g->weights[p] * rows->scale[row] * sum;
    }
}

/* The pairs' terms with the rows of one width, [panels, count, planes]; sums: [count, QUAD]. */
static void down_terms(const Down *g, const Decoder *d, float *sums, Term *terms) {
  const Hidden *h = g->hidden;
  for (int panel = 0; panel < h->panels; panel++)
    for (int m = 0; m < g->count; m++)
      for (int plane = 0; plane < h->planes; plane++) {
        int64_t q = (int64_t)g->pair[m] * h->planes + plane, at = q * h->panels + panel;
        *terms++ = term_of(h->q + q * h->padded + panel * h->panel, h->sum[at], d->offset2,
                           h->scale[at] * d->step / 2, sums + m * QUAD);
      }
}

/* Room for a part of down. */
typedef struct {
  int16_t *decoded; /* [QUAD, padded] */
  float *sums;      /* [count, QUAD], of a panel in the grid "tiled" */
  float *scaled;    /* [count, QUAD], of the panels with their scales */
  Term *terms;
} DownRoom;

static void down_rows(const Down *g, const Rows *rows, const Run *run, int row, int count, const DownRoom *room) {
  const Hidden *h = g->hidden;
  const Decoder *d = run->decoder;
  const uint32_t *words = run->words + (row - run->from) * run->stride;
  int terms = g->count * h->planes, values = g->count * QUAD;
  for (int i = 0; i < count; i++)
    bitsmoe_kernels->decode_row(d, words + i * run->stride, h->padded / CHUNK, tail_of(g->layer->size),
                                room->decoded + (int64_t)i * h->padded);
  float *sums = rows->tiles ? room->scaled : room->sums;
  memset(sums, 0, values * sizeof(float));
  for (int panel = 0, start = 0; panel < h->panels; panel++, start += h->panel) {
    if (rows->tiles) memset(room->sums, 0, values * sizeof(float));
    bitsmoe_kernels->rows_dot(room->decoded + start, h->padded, least(h->panel, h->padded - start) / CHUNK,
                              room->terms + panel * terms, terms, d->offset2);
    for (int i = 0; rows->tiles && i < values; i++)
      if (i % QUAD < count) sums[i] += tile_scale(g->layer, rows, row + i % QUAD, panel) * room->sums[i];
  }
  for (int m = 0; m < g->count; m++) {
    int64_t p = g->pair[m];
    for (int i = 0; i < count; i++)
      g->out[p * g->layer->rank + rows->order[row + i]] = g->weights[p] * rows->scale[row + i] * sums[m * QUAD + i];
  }
}

static int down_part(const Down *g, const Rows *rows, int expert, int part, int parts) {
  const Layer *l = g->layer;
  const Hidden *h = g->hidden;
  int64_t terms = (int64_t)g->count * h->planes * h->panels, sums = (int64_t)g->count * QUAD;
  size_t decoded = QUAD * sizeof(int16_t) * h->padded;
  char *memory = new_lines(decoded + terms * sizeof(Term) + 2 * sums * sizeof(float));
  if (!memory) return -1;
  memset(memory, 0, decoded); /* rows beyond the last are multiplied, too */
  DownRoom room = {(int16_t *)memory, NULL, NULL, (Term *)(memory + decoded)};
  room.sums = (float *)(room.terms + terms);
  room.scaled = room.sums + sums;
  Run runs[MAX_WIDTHS];
  int count = bitsmoe_runs_of(l, rows, l->inputs, expert, part, parts, runs);
  for (int i = 0; i < count; i++) {
    if (runs[i].bits == 16) {
      down_wide(g, rows, &runs[i]);
      continue;
    }
    down_terms(g, runs[i].decoder, room.sums, room.terms);
    for (int row = runs[i].from; row < runs[i].to; row += QUAD)
      down_rows(g, rows, &runs[i], row, least(QUAD, runs[i].to - row), &room);
  }
  free(memory);
  return 0;
}

/* out [T, r] = sum over a token's slots of weights [T, k] times down of h [T k, I]. */
int bitsmoe_down(const Layer *l, const float *h, const float *weights, const int64_t *ids, int64_t tokens,
                 int64_t k, float *out, int threads, int planes) {
  Routing routing;
  Index index;
  int64_t pairs = tokens * k;
  if (bitsmoe_route(l, ids, pairs, &routing)) return -1;
  float *of_pair = calloc((size_t)pairs * l->rank, sizeof(float));
  Hidden hidden = new_hidden(pairs, l->size, l->tile_scales ? TILE : PANEL, planes);
  int failed = bitsmoe_new_index(l, &routing, l->inputs, 1, &index) || !of_pair || !hidden.q;
  int parts = parts_of(routing.active, threads, (l->rank + 127) / 128), tasks = failed ? 0 : routing.active * parts, ready = !failed;
#pragma omp parallel num_threads(threads) if (tasks)
  if (ready) {
    bitsmoe_fill_index(l, &routing, &index);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < pairs * hidden.panels; i++)
      quantize_panel(&hidden, i / hidden.panels, (int)(i % hidden.panels), h + i / hidden.panels * l->size, l->size);
#pragma omp for schedule(dynamic)
    for (int task = 0; task < tasks; task++) {
      int active = task / parts, first = routing.first[active];
      Down g = {l, routing.pair + first, routing.first[active + 1] - first, h, weights, &hidden, of_pair};
      if (down_part(&g, &index.rows[active], routing.expert[active], task % parts, parts)) {
#pragma omp atomic write
        failed = 1;
      }
    }
#pragma omp for schedule(static)
    for (int64_t token = 0; token < tokens; token++) {
      float *sum = out + token * l->rank;
      memset(sum, 0, l->rank * sizeof(float));
      for (int64_t pair = token * k; pair < (token + 1) * k; pair++)
        for (int i = 0; i < l->rank; i++) sum[i] += of_pair[pair * l->rank + i];
    }
  }
  free(of_pair);
  free(hidden.q);
  bitsmoe_free_index(&index);
  free(routing.memory);
  return -failed;
}
