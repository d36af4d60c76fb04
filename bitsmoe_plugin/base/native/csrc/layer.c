/* The steps of a layer's forward pass between its bases, see steps.h. */
#include <stdlib.h>
#include <string.h>

#include "steps.h"

const Kernels *bitsmoe_kernels = &bitsmoe_portable;

void bitsmoe_select_rounding(const char *name);

/* Choose the instruction set: NULL for the best of this machine. Returns its name, NULL if it is not to be had. */
const char *bitsmoe_select(const char *name) {
  const Kernels *usable[3];
  int count = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    usable[count++] = &bitsmoe_avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
    usable[count++] = &bitsmoe_avx2;
#endif
  usable[count++] = &bitsmoe_portable;
  for (int i = 0; i < count; i++)
    if (!name || !strcmp(name, usable[i]->name)) {
      bitsmoe_kernels = usable[i];
      bitsmoe_select_rounding(bitsmoe_kernels->name);
      return bitsmoe_kernels->name;
    }
  return NULL;
}

int64_t bitsmoe_layer_bytes(void) { return sizeof(Layer); }

/* What follows from the bits, trellis and table of a decoder. Returns 0, or -1 without memory. */
int bitsmoe_prepare_decoder(Decoder *d) {
  int ring = 4 * d->bits; /* bytes of a block */
  for (int i = 0; i < CHUNK; i++) {
    int block = i / BLOCK, first = i % BLOCK / 8 * 8; /* first code of this 64-bit lane, in the block */
    int lane_start = first * d->bits + (d->trellis ? d->bits - 8 + 8 * ring : 0);
    d->perm[i] = (uint8_t)(block * ring + (lane_start / 8 + i % 8) % ring);
    d->shift[i] = (uint8_t)(lane_start % 8 + i % 8 * d->bits);
  }
  d->joint = d->trellis ? bitsmoe_joint_table(d->bits, d->table) : NULL;
  return d->trellis && !d->joint ? -1 : 0;
}

/* The stored rows of one factor of one expert, in the order of the payload. */
typedef struct {
  int count[MAX_WIDTHS]; /* by falling width */
  int stored;            /* rows that are not dropped */
  int32_t *order;        /* rank indices */
  float *scale;
  const uint16_t *tiles; /* float16 [stored, tiles], NULL unless the grid is "tiled" */
} Rows;

static int tiles_of(const Layer *l) { return (l->size + TILE - 1) / TILE; }

static float tile_scale(const Layer *l, const Rows *rows, int row, int tile) {
  return half_to_float(rows->tiles[(int64_t)row * tiles_of(l) + tile]);
}

/* Room for 32-bit values, one per rank and 16 more; index_rows takes it three times. */
static int64_t room(const Layer *l) { return l->rank + 16; }

static Rows index_rows(const Layer *l, int factor, int expert, float *memory) {
  Rows rows = {{0}, 0, (int32_t *)memory, memory + room(l), NULL};
  float *scratch = memory + 2 * room(l);
  const uint8_t *codes = l->row_codes + ((int64_t)factor * l->experts + expert) * l->rank;
  if (l->tile_scales) memset(scratch, 0, l->rank * sizeof(float));
  else {
    const uint16_t *low = l->scale_grid + (int64_t)factor * 2 * l->rank;
    bitsmoe_kernels->row_scales(codes, low, low + l->rank, l->rank, scratch);
  }
  for (int i = 0; i < l->widths && l->width_bits[l->falling[i]]; i++) {
    rows.count[i] = bitsmoe_kernels->select_rows(codes, l->falling[i], scratch, l->rank, rows.order + rows.stored,
                                         rows.scale + rows.stored);
    rows.stored += rows.count[i];
  }
  if (l->tile_scales) {
    int64_t start = l->row_starts[(int64_t)factor * l->experts + expert];
    rows.tiles = l->tile_scales + start * tiles_of(l);
    for (int i = 0; i < rows.stored; i++) rows.scale[i] = half_to_float(l->row_gains[start + i]);
  }
  return rows;
}

/* Which pairs (token, slot) each expert has. */
typedef struct {
  int active;
  int32_t *expert; /* [active] */
  int32_t *first;  /* [active + 1], into pair */
  int32_t *pair;   /* [pairs] */
  int32_t *memory;
} Routing;

static int route(const Layer *l, const int64_t *ids, int64_t pairs, Routing *out) {
  int experts = l->experts;
  int32_t *next = out->memory = calloc((size_t)experts * 3 + 1 + (size_t)pairs, sizeof(int32_t));
  if (!next) return -1;
  out->expert = next + experts;
  out->first = out->expert + experts;
  out->pair = out->first + experts + 1;
  for (int64_t p = 0; p < pairs; p++)
    if (ids[p] >= 0 && ids[p] < experts) next[ids[p]]++;
  out->active = 0;
  int32_t done = 0;
  for (int e = 0; e < experts; e++) {
    int32_t count = next[e];
    next[e] = done;
    if (!count) continue;
    out->expert[out->active] = e;
    out->first[out->active++] = done;
    done += count;
  }
  out->first[out->active] = done;
  for (int64_t p = 0; p < pairs; p++)
    if (ids[p] >= 0 && ids[p] < experts) out->pair[next[ids[p]]++] = (int32_t)p;
  return 0;
}

/* The rows of `factors` factors from `factor` on of all active experts. */
typedef struct {
  Rows *rows; /* [active, factors] */
  float *memory;
  int factor, factors;
} Index;

static int new_index(const Layer *l, const Routing *routing, int factor, int factors, Index *out) {
  int64_t count = (int64_t)routing->active * factors;
  *out = (Index){malloc((count + 1) * sizeof(Rows)), malloc((3 * count * room(l) + 1) * sizeof(float)), factor, factors};
  return out->rows && out->memory ? 0 : -1;
}

static void free_index(Index *index) {
  free(index->rows);
  free(index->memory);
}

/* Called by all threads of a parallel region. */
static void fill_index(const Layer *l, const Routing *routing, Index *index) {
#pragma omp for schedule(static)
  for (int i = 0; i < routing->active * index->factors; i++)
    index->rows[i] = index_rows(l, index->factor + i % index->factors, routing->expert[i / index->factors],
                                index->memory + 3 * i * room(l));
}

/* Parts that each of `tasks` tasks is cut into, so that few experts still occupy all threads. Each part computes
 * values of its own, so results depend neither on the number of threads nor on that of experts in use. */
static int parts_of(int tasks, int threads, int most) {
  int parts = (2 * threads + tasks - 1) / (tasks ? tasks : 1);
  parts = least(parts, most);
  return parts < 1 ? 1 : parts;
}

/* Rows from..to of the payload's order that have one width, and where they stand. */
typedef struct {
  const Decoder *decoder;
  int bits, from, to;
  int64_t stride; /* words of a row */
  const uint32_t *words;
} Run;

/* The runs of one of `parts` parts of the rows; returns their number. */
static int runs_of(const Layer *l, const Rows *rows, int factor, int expert, int part, int parts, Run *runs) {
  int count = 0, first = 0, blocks = (l->size + BLOCK - 1) / BLOCK;
  int from = (int)((int64_t)rows->stored * part / parts), to = (int)((int64_t)rows->stored * (part + 1) / parts);
  const uint32_t *words = l->payload + l->starts[(int64_t)factor * l->experts + expert];
  for (int i = 0; i < l->widths; i++) {
    int width = l->falling[i], last = first + rows->count[i], bits = l->width_bits[width];
    int64_t stride = (int64_t)blocks * bits;
    int low = from > first ? from : first, high = least(to, last);
    if (low < high)
      runs[count++] = (Run){&l->decoders[width], bits, low, high, stride, words + (low - first) * stride};
    words += rows->count[i] * stride;
    first = last;
  }
  return count;
}

/* Bring bytes from..to into the cache; past the end of the payload this does nothing. */
static void prefetch(const void *start, int64_t from, int64_t to) {
  for (int64_t at = from; at < to; at += 64) __builtin_prefetch((const char *)start + at);
}

/* 16-bit codes, in float: too rare for more. In the grid "tiled" they are float16 values. */
static float wide_value(const Layer *l, const Decoder *d, const uint32_t *words, int i) {
  uint32_t code = words[i / 2] >> (i % 2 * 16) & 0xffff;
  return l->tile_scales ? half_to_float((uint16_t)code) : d->step * ((float)code - 32767.5f);
}

enum { AHEAD = 8192 }; /* bytes by which down runs ahead of itself */

typedef struct {
  const Layer *layer;
  const int32_t *pair; /* [count], of the expert */
  int count, k, factor, planes;
  const float *z;
  float *out; /* of pair p: out + p * inputs * padded, for one factor */
  int padded;
  int from, to; /* chunks of columns */
  Term *terms;  /* [count, planes] */
  int16_t (*q)[ROWS];
} GateUp;

static float *columns_of(const GateUp *g, int m) {
  return g->out + (int64_t)g->pair[m] * g->layer->inputs * g->padded;
}

static void gate_up_wide(const GateUp *g, const Rows *rows, const Run *run) {
  const Layer *l = g->layer;
  int last = least(g->to * CHUNK, l->size);
  for (int row = run->from; row < run->to; row++)
    for (int m = 0; m < g->count; m++) {
      int64_t token = g->pair[m] / g->k;
      float a = rows->scale[row] * g->z[token * l->bases * l->rank + rows->order[row]];
      const uint32_t *words = run->words + (row - run->from) * run->stride;
      for (int i = g->from * CHUNK; i < last; i++) columns_of(g, m)[i] += a * wide_value(l, run->decoder, words, i);
    }
}

/* Terms of some rows' inputs times their scales; tile: whose scales, -1 if rows have one. */
static void quantize_inputs(const GateUp *g, const Rows *rows, const Decoder *d, int row, int count, int tile) {
  const Layer *l = g->layer;
  for (int m = 0; m < g->count; m++) {
    float a[ROWS], rest[ROWS];
    const float *z = g->z + (int64_t)(g->pair[m] / g->k) * l->bases * l->rank;
    for (int i = 0; i < count; i++) {
      a[i] = rows->scale[row + i] * z[rows->order[row + i]];
      if (tile >= 0) a[i] *= tile_scale(l, rows, row + i, tile);
    }
    for (int plane = 0; plane < g->planes; plane++) {
      int at = m * g->planes + plane;
      int32_t sum;
      float scale = bitsmoe_kernels->quantize(plane ? rest : a, count, ROWS, g->q[at], &sum,
                                              plane + 1 < g->planes ? rest : NULL);
      g->terms[at] = term_of(g->q[at], sum, d->offset2, scale * d->step / 2, columns_of(g, m));
    }
  }
}

static void gate_up_rows(const GateUp *g, const Rows *rows, const Run *run, int row, int count) {
  const Layer *l = g->layer;
  const Decoder *d = run->decoder;
  int16_t tile[ROWS * CHUNK];
  if (!rows->tiles) quantize_inputs(g, rows, d, row, count, -1);
  const uint32_t *words = run->words + (row - run->from) * run->stride;
  int chunks = chunks_of(l->size);
  int64_t bytes = 4 * run->stride * count;
  for (int c = g->from; c < g->to; c++) {
    int tail = c == chunks - 1 && tail_of(l->size);
    if (rows->tiles && (c == g->from || c * CHUNK % TILE == 0))
      quantize_inputs(g, rows, d, row, count, c * CHUNK / TILE);
    /* chunks of a tile's rows are too far apart for the hardware to foresee, so fetch the next tile's */
    prefetch(words, bytes + bytes * c / chunks, bytes + bytes * (c + 1) / chunks);
    bitsmoe_kernels->decode_tile(d, words + (int64_t)c * 2 * d->bits, run->stride, count, tail, tile);
    bitsmoe_kernels->tile_dot(tile, count, g->terms, g->count * g->planes, c * CHUNK, d->offset2);
  }
}

/* Chunks g->from to g->to of one factor of one expert. */
static int gate_up_part(GateUp *g, const Rows *rows, int expert) {
  const Layer *l = g->layer;
  int64_t terms = (int64_t)g->count * g->planes;
  int start = g->from * CHUNK, chunks = g->to - g->from;
  g->terms = malloc(terms * (sizeof(Term) + sizeof *g->q));
  if (!g->terms) return -1;
  g->q = (int16_t (*)[ROWS])(g->terms + terms);
  for (int m = 0; m < g->count; m++) memset(columns_of(g, m) + start, 0, chunks * CHUNK * sizeof(float));
  Run runs[MAX_WIDTHS];
  int count = runs_of(l, rows, g->factor, expert, 0, 1, runs);
  for (int i = 0; i < count; i++)
    for (int row = runs[i].from; row < runs[i].to && runs[i].bits < 16; row += ROWS)
      gate_up_rows(g, rows, &runs[i], row, least(ROWS, runs[i].to - row));
  for (int m = 0; m < g->count; m++) bitsmoe_kernels->order_columns(columns_of(g, m) + start, chunks);
  for (int i = 0; i < count; i++)
    if (runs[i].bits == 16) gate_up_wide(g, rows, &runs[i]);
  free(g->terms);
  return 0;
}

/* out[p] = gate and up, or up, of pair p, [T k, inputs, padded] with padded = I rounded up to chunks, from
 * z [T, bases r] and ids [T, k] (outside 0..E-1: zeros). */
int bitsmoe_gate_up(const Layer *l, const float *z, const int64_t *ids, int64_t tokens, int64_t k, float *out,
                    int threads, int planes) {
  Routing routing;
  Index index;
  int64_t pairs = tokens * k;
  if (route(l, ids, pairs, &routing)) return -1;
  int chunks = chunks_of(l->size), padded = chunks * CHUNK, inputs = l->inputs;
  int parts = parts_of(inputs * routing.active, threads, chunks);
  int failed = new_index(l, &routing, 0, inputs, &index);
  int tasks = routing.active * inputs * parts, ready = !failed;
#pragma omp parallel num_threads(threads) if (ready)
  if (ready) {
    fill_index(l, &routing, &index);
#pragma omp for schedule(static) nowait
    for (int64_t p = 0; p < pairs; p++)
      if (ids[p] < 0 || ids[p] >= l->experts) memset(out + p * inputs * padded, 0, inputs * padded * sizeof(float));
#pragma omp for schedule(dynamic)
    for (int task = 0; task < tasks; task++) {
      int part = task % parts, factor = task / parts % inputs, active = task / parts / inputs;
      int first = routing.first[active];
      GateUp g = {l, routing.pair + first, routing.first[active + 1] - first, (int)k, factor,
                  planes, z + (l->bases == 2 && factor == 1 ? l->rank : 0), out + factor * padded, padded,
                  chunks * part / parts, chunks * (part + 1) / parts, NULL, NULL};
      if (gate_up_part(&g, &index.rows[inputs * active + factor], routing.expert[active])) {
#pragma omp atomic write
        failed = 1;
      }
    }
  }
  free_index(&index);
  free(routing.memory);
  return -failed;
}

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
  prefetch(words, AHEAD, AHEAD + 4 * run->stride * count);
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
  char *memory = calloc(terms * sizeof(Term) + 2 * sums * sizeof(float) + QUAD * sizeof(int16_t) * h->padded, 1);
  if (!memory) return -1;
  DownRoom room = {NULL, NULL, NULL, (Term *)memory};
  room.sums = (float *)(room.terms + terms);
  room.scaled = room.sums + sums;
  room.decoded = (int16_t *)(room.scaled + sums);
  Run runs[MAX_WIDTHS];
  int count = runs_of(l, rows, l->inputs, expert, part, parts, runs);
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
  if (route(l, ids, pairs, &routing)) return -1;
  float *of_pair = calloc((size_t)pairs * l->rank, sizeof(float));
  Hidden hidden = new_hidden(pairs, l->size, l->tile_scales ? TILE : PANEL, planes);
  int failed = new_index(l, &routing, l->inputs, 1, &index) || !of_pair || !hidden.q;
  int parts = parts_of(routing.active, threads, (l->rank + 127) / 128), tasks = failed ? 0 : routing.active * parts, ready = !failed;
#pragma omp parallel num_threads(threads) if (tasks)
  if (ready) {
    fill_index(l, &routing, &index);
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
  free_index(&index);
  free(routing.memory);
  return -failed;
}
