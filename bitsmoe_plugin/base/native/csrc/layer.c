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

/* Parts that the rows of one factor of one expert are cut into, so that few experts still occupy many
 * threads. No function of the number of threads: results must not depend on it. */
static int parts_of(const Layer *l, int tasks) {
  int parts = 64 / (tasks ? tasks : 1), most = l->rank / 128;
  if (parts > most) parts = most;
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
  int16_t q[ROWS];
  int32_t sum;
  float scale;
} Inputs;

typedef struct {
  const Layer *layer;
  const int32_t *pair; /* [count], of the expert */
  int count, k, factor, planes;
  const float *z;
  float *out; /* of pair p: out + p * inputs * padded, for one factor */
  int padded;
} GateUp;

static void gate_up_wide(const GateUp *g, const Rows *rows, const Run *run) {
  const Layer *l = g->layer;
  for (int row = run->from; row < run->to; row++)
    for (int m = 0; m < g->count; m++) {
      int64_t token = g->pair[m] / g->k;
      float a = rows->scale[row] * g->z[token * l->bases * l->rank + rows->order[row]];
      float *out = g->out + (int64_t)g->pair[m] * l->inputs * g->padded;
      const uint32_t *words = run->words + (row - run->from) * run->stride;
      for (int i = 0; i < l->size; i++) out[i] += a * wide_value(l, run->decoder, words, i);
    }
}

/* The inputs of some rows, times their scales, [count, planes]; tile: whose scales, -1 if rows have one. */
static void quantize_inputs(const GateUp *g, const Rows *rows, int row, int count, int tile, Inputs *inputs) {
  const Layer *l = g->layer;
  for (int m = 0; m < g->count; m++) {
    float a[ROWS], rest[ROWS];
    const float *z = g->z + (int64_t)(g->pair[m] / g->k) * l->bases * l->rank;
    for (int i = 0; i < count; i++) {
      a[i] = rows->scale[row + i] * z[rows->order[row + i]];
      if (tile >= 0) a[i] *= tile_scale(l, rows, row + i, tile);
    }
    for (int plane = 0; plane < g->planes; plane++, inputs++)
      inputs->scale = bitsmoe_kernels->quantize(plane ? rest : a, count, ROWS, inputs->q, &inputs->sum,
                                        plane + 1 < g->planes ? rest : NULL);
  }
}

static void gate_up_rows(const GateUp *g, const Rows *rows, const Run *run, int row, int count, Inputs *inputs) {
  const Layer *l = g->layer;
  const Decoder *d = run->decoder;
  int16_t tile[ROWS * CHUNK];
  if (!rows->tiles) quantize_inputs(g, rows, row, count, -1, inputs);
  const uint32_t *words = run->words + (row - run->from) * run->stride;
  int chunks = chunks_of(l->size);
  int64_t bytes = 4 * run->stride * count;
  for (int c = 0; c < chunks; c++) {
    int tail = c == chunks - 1 && tail_of(l->size);
    if (rows->tiles && c * CHUNK % TILE == 0) quantize_inputs(g, rows, row, count, c * CHUNK / TILE, inputs);
    /* chunks of a tile's rows are too far apart for the hardware to foresee, so fetch the next tile's */
    prefetch(words, bytes + bytes * c / chunks, bytes + bytes * (c + 1) / chunks);
    bitsmoe_kernels->decode_tile(d, words + (int64_t)c * 2 * d->bits, run->stride, count, tail, tile);
    for (int i = 0; i < g->count * g->planes; i++)
      bitsmoe_kernels->tile_dot(tile, count, inputs[i].q, d->offset2 * inputs[i].sum, inputs[i].scale * d->step / 2,
                        g->out + (int64_t)g->pair[i / g->planes] * l->inputs * g->padded + c * CHUNK);
  }
}

static int gate_up_part(const GateUp *g, const Rows *rows, int expert, int part, int parts) {
  const Layer *l = g->layer;
  Inputs *inputs = malloc((size_t)g->count * g->planes * sizeof(Inputs));
  if (!inputs) return -1;
  Run runs[MAX_WIDTHS];
  int count = runs_of(l, rows, g->factor, expert, part, parts, runs);
  for (int i = 0; i < count; i++) {
    if (runs[i].bits == 16) gate_up_wide(g, rows, &runs[i]);
    else
      for (int row = runs[i].from; row < runs[i].to; row += ROWS)
        gate_up_rows(g, rows, &runs[i], row, least(ROWS, runs[i].to - row), inputs);
  }
  free(inputs);
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
  int padded = chunks_of(l->size) * CHUNK, inputs = l->inputs;
  int parts = parts_of(l, inputs * routing.active);
  size_t values = (size_t)pairs * inputs * padded;
  float *partial = parts > 1 ? malloc(values * parts * sizeof(float)) : out;
  int failed = new_index(l, &routing, 0, inputs, &index) || !partial;
  int tasks = failed ? 0 : routing.active * inputs * parts;
#pragma omp parallel num_threads(threads) if (tasks)
  if (tasks) {
    fill_index(l, &routing, &index);
#pragma omp for schedule(static)
    for (int i = 0; i < parts; i++) memset(partial + values * i, 0, values * sizeof(float));
#pragma omp for schedule(dynamic)
    for (int task = 0; task < tasks; task++) {
      int part = task % parts, factor = task / parts % inputs, active = task / parts / inputs;
      int first = routing.first[active];
      GateUp g = {l, routing.pair + first, routing.first[active + 1] - first, (int)k, factor,
                  planes, z + (l->bases == 2 && factor == 1 ? l->rank : 0),
                  partial + values * part + factor * padded, padded};
      if (gate_up_part(&g, &index.rows[inputs * active + factor], routing.expert[active], part, parts)) {
#pragma omp atomic write
        failed = 1;
      }
    }
    if (parts > 1) {
#pragma omp for schedule(static)
      for (int64_t p = 0; p < pairs * inputs; p++) {
        float *sum = out + p * padded;
        memcpy(sum, partial + p * padded, padded * sizeof(float));
        for (int part = 1; part < parts; part++)
          for (int i = 0; i < padded; i++) sum[i] += partial[values * part + p * padded + i];
      }
    }
  }
  else if (!failed) memset(out, 0, values * sizeof(float)); /* no token chose an expert that is here */
  if (parts > 1) free(partial);
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

static void down_rows(const Down *g, const Rows *rows, const Run *run, int row, int count, int16_t *decoded) {
  const Layer *l = g->layer;
  const Hidden *hidden = g->hidden;
  const Decoder *d = run->decoder;
  const uint32_t *words = run->words + (row - run->from) * run->stride;
  prefetch(words, AHEAD, AHEAD + 4 * run->stride * count);
  for (int i = 0; i < count; i++)
    bitsmoe_kernels->decode_row(d, words + i * run->stride, chunks_of(l->size), tail_of(l->size),
                        decoded + (int64_t)i * hidden->padded);
  for (int m = 0; m < g->count; m++) {
    int64_t p = g->pair[m];
    float sums[QUAD] = {0};
    for (int start = 0, length = rows->tiles ? TILE : PANEL; start < hidden->padded; start += length) {
      float part[QUAD] = {0};
      int chunks = least(length, hidden->padded - start) / CHUNK;
      for (int64_t q = p * hidden->planes; q < (p + 1) * hidden->planes; q++)
        bitsmoe_kernels->rows_dot(decoded + start, hidden->padded, chunks, hidden->q + q * hidden->padded + start,
                          d->offset2, hidden->scale[q * hidden->panels + start / PANEL] * d->step / 2,
                          rows->tiles ? part : sums);
      for (int i = 0; rows->tiles && i < count; i++)
        sums[i] += tile_scale(l, rows, row + i, start / TILE) * part[i];
    }
    for (int i = 0; i < count; i++)
      g->out[p * l->rank + rows->order[row + i]] = g->weights[p] * rows->scale[row + i] * sums[i];
  }
}

static int down_part(const Down *g, const Rows *rows, int expert, int part, int parts) {
  const Layer *l = g->layer;
  int16_t *decoded = calloc(QUAD * sizeof(int16_t), g->hidden->padded);
  if (!decoded) return -1;
  Run runs[MAX_WIDTHS];
  int count = runs_of(l, rows, l->inputs, expert, part, parts, runs);
  for (int i = 0; i < count; i++) {
    if (runs[i].bits == 16) down_wide(g, rows, &runs[i]);
    else
      for (int row = runs[i].from; row < runs[i].to; row += QUAD)
        down_rows(g, rows, &runs[i], row, least(QUAD, runs[i].to - row), decoded);
  }
  free(decoded);
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
  Hidden hidden = new_hidden(pairs, l->size, PANEL, planes);
  int failed = new_index(l, &routing, l->inputs, 1, &index) || !of_pair || !hidden.q;
  int parts = parts_of(l, routing.active), tasks = failed ? 0 : routing.active * parts, ready = !failed;
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
