/* Which rows are read for which pairs of tokens and experts, see steps.h. */
#include "steps.h"

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

int bitsmoe_route(const Layer *l, const int64_t *ids, int64_t pairs, Routing *out) {
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

int bitsmoe_new_index(const Layer *l, const Routing *routing, int factor, int factors, Index *out) {
  int64_t count = (int64_t)routing->active * factors;
  *out = (Index){malloc((count + 1) * sizeof(Rows)), malloc((3 * count * room(l) + 1) * sizeof(float)), factor, factors};
  return out->rows && out->memory ? 0 : -1;
}

void bitsmoe_free_index(Index *index) {
  free(index->rows);
  free(index->memory);
}

void bitsmoe_fill_index(const Layer *l, const Routing *routing, Index *index) {
#pragma omp for schedule(static)
  for (int i = 0; i < routing->active * index->factors; i++)
    index->rows[i] = index_rows(l, index->factor + i % index->factors, routing->expert[i / index->factors],
                                index->memory + 3 * i * room(l));
}

int bitsmoe_runs_of(const Layer *l, const Rows *rows, int factor, int expert, int part, int parts, Run *runs) {
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
