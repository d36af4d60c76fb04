/* Factors after the gating, see steps.h. */
#include "steps.h"
#include "tiles.h"

typedef struct {
  const Layer *layer;
  const int32_t *pair;
  int count;
  const float *h, *weights;
  const Hidden *hidden;
  float *out; /* of pair p: out + p * r */
  const Tiles *tiles; /* NULL: none */
  int step;           /* rows decoded and multiplied together: BAND with tiles, otherwise QUAD */
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

/* The pairs' terms with the rows of one width, [panels, count, planes]; sums: [count, step]. */
static void down_terms(const Down *g, const Decoder *d, float *sums, Term *terms) {
  const Hidden *h = g->hidden;
  for (int panel = 0; panel < h->panels; panel++)
    for (int m = 0; m < g->count; m++)
      for (int plane = 0; plane < h->planes; plane++) {
        int64_t q = (int64_t)g->pair[m] * h->planes + plane, at = q * h->panels + panel;
        *terms++ = term_of(h->q + q * h->padded + panel * h->panel, h->sum[at], d->offset2,
                           h->scale[at] * d->step / 2, sums + m * g->step);
      }
}

/* Room for a part of down. */
typedef struct {
  int16_t *decoded; /* [QUAD, padded]; with tiles bytes [panels, lane_bytes / 4, LANES, BAND, 4] */
  float *sums;      /* [count, step], of a panel in the grid "tiled" */
  float *scaled;    /* [count, step], of the panels with their scales */
  int8_t *lanes;    /* [panels, LANES, 2, terms, lane_bytes], with tiles */
  int lane_bytes;
  Term *terms;
} DownRoom;

/* Returns how many of the first panel's terms were multiplied on the way: there, if it is the only one. */
static int decode_rows(const Down *g, const Run *run, int row, int count, const DownRoom *room) {
  const uint32_t *words = run->words + (row - run->from) * run->stride;
  int chunks = g->hidden->padded / CHUNK, tail = tail_of(g->layer->size);
  if (g->tiles) {
    prefetch(words, AHEAD, AHEAD + 4 * run->stride * count);
    g->tiles->decode_rows(run->decoder, words, run->stride, count, chunks, tail, (uint8_t *)room->decoded);
    return 0;
  }
  return bitsmoe_kernels->decode_rows(run->decoder, words, run->stride, count, chunks, tail, room->decoded,
                                      g->hidden->padded, room->terms,
                                      g->hidden->panels == 1 ? g->count * g->hidden->planes : 0);
}

/* room->sums += the products of one panel and its terms from number `done` on. */
static void panel_dot(const Down *g, const Run *run, int panel, int done, const DownRoom *room) {
  const Hidden *h = g->hidden;
  int terms = g->count * h->planes, start = panel * h->panel;
  const Term *first = room->terms + (int64_t)panel * terms + done;
  if (g->tiles)
    g->tiles->rows_dot((const uint8_t *)room->decoded + (int64_t)start * BAND,
                       room->lanes + (int64_t)panel * 2 * LANES * terms * room->lane_bytes, room->lane_bytes, first, terms,
                       run->decoder->offset2);
  else if (done < terms)
    bitsmoe_kernels->rows_dot(room->decoded + start, h->padded, least(h->panel, h->padded - start) / CHUNK, first,
                              terms - done, run->decoder->offset2);
}

static void down_rows(const Down *g, const Rows *rows, const Run *run, int row, int count, const DownRoom *room) {
  int values = g->count * g->step;
  float *sums = rows->tiles ? room->scaled : room->sums;
  memset(sums, 0, values * sizeof(float));
  memset(room->sums, 0, values * sizeof(float));
  int done = decode_rows(g, run, row, count, room);
  for (int panel = 0; panel < g->hidden->panels; panel++, done = 0) {
    if (rows->tiles && panel) memset(room->sums, 0, values * sizeof(float));
    panel_dot(g, run, panel, done, room);
    for (int i = 0; rows->tiles && i < values; i++)
      if (i % g->step < count) sums[i] += tile_scale(g->layer, rows, row + i % g->step, panel) * room->sums[i];
  }
  for (int m = 0; m < g->count; m++) {
    int64_t p = g->pair[m];
    for (int i = 0; i < count; i++)
      g->out[p * g->layer->rank + rows->order[row + i]] = g->weights[p] * rows->scale[row + i] * sums[m * g->step + i];
  }
}

/* Parts of one piece of memory, of which the decoded rows are zeros: those beyond the last are multiplied, too. */
static int new_room(const Down *g, DownRoom *room) {
  const Hidden *h = g->hidden;
  int64_t terms = (int64_t)g->count * h->planes, sums = (int64_t)g->count * g->step;
  room->lane_bytes = g->tiles ? lane_bytes(least(h->panel, h->padded) / CHUNK) : 0;
  int64_t decoded = QUAD * (int64_t)sizeof(int16_t) * h->padded;
  if (g->tiles) decoded = (int64_t)h->panels * room->lane_bytes / 4 * LANES * 4 * BAND;
  int64_t lanes = h->panels * terms * 2 * LANES * room->lane_bytes;
  char *memory = new_lines(decoded + lanes + terms * h->panels * sizeof(Term) + 2 * sums * sizeof(float));
  if (!memory) return -1;
  memset(memory, 0, decoded);
  room->decoded = (int16_t *)memory;
  room->lanes = (int8_t *)(memory + decoded);
  room->terms = (Term *)(room->lanes + lanes);
  room->sums = (float *)(room->terms + terms * h->panels);
  room->scaled = room->sums + sums;
  return 0;
}

static void fill_lanes(const Down *g, const DownRoom *room) {
  const Hidden *h = g->hidden;
  int terms = g->count * h->planes;
  for (int panel = 0; panel < h->panels; panel++)
    for (int i = 0; i < terms; i++) {
      int64_t q = (int64_t)g->pair[i / h->planes] * h->planes + i % h->planes;
      int start = panel * h->panel, chunks = least(h->panel, h->padded - start) / CHUNK;
      bitsmoe_lanes_of(h->q + q * h->padded + start, chunks, i, terms, room->lane_bytes,
                       room->lanes + (int64_t)panel * 2 * LANES * terms * room->lane_bytes);
    }
}

static int down_part(Down *g, const Rows *rows, int expert, int part, int parts) {
  const Layer *l = g->layer;
  DownRoom room;
  Run runs[MAX_WIDTHS];
  int count = bitsmoe_runs_of(l, rows, l->inputs, expert, part, parts, runs);
  g->tiles = rows->tiles ? NULL : tiles_for((int64_t)g->count * g->hidden->planes); /* panels are too short there */
  g->step = g->tiles ? BAND : QUAD;
  if (new_room(g, &room)) return -1;
  if (g->tiles) {
    g->tiles->configure(g->count * g->hidden->planes, lane_step(room.lane_bytes));
    fill_lanes(g, &room);
  }
  for (int i = 0; i < count; i++) {
    if (runs[i].bits == 16) {
      down_wide(g, rows, &runs[i]);
      continue;
    }
    down_terms(g, runs[i].decoder, room.sums, room.terms);
    for (int row = runs[i].from; row < runs[i].to; row += g->step)
      down_rows(g, rows, &runs[i], row, least(g->step, runs[i].to - row), &room);
  }
  if (g->tiles) g->tiles->release();
  free(room.decoded);
  return 0;
}

/* The pairs of a part, with tiles at most MOST_VECTORS of their vectors at a time. */
static int down_pairs(Down *g, const Rows *rows, int expert, int part, int parts) {
  int count = g->count, most = bitsmoe_tiles ? MOST_VECTORS / g->hidden->planes : count;
  const int32_t *pair = g->pair;
  for (int first = 0; first < count; first += most) {
    g->pair = pair + first;
    g->count = least(most, count - first);
    if (down_part(g, rows, expert, part, parts)) return -1;
  }
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
      Down g = {l, routing.pair + first, routing.first[active + 1] - first, h, weights, &hidden, of_pair, NULL, 0};
      if (down_pairs(&g, &index.rows[active], routing.expert[active], task % parts, parts)) {
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
