/* The steps of a layer's forward pass between its bases, see steps.h. */
#include <stdlib.h>
#include <string.h>

#include "steps.h"

const Kernels *bitsmoe_kernels = &bitsmoe_portable;

void bitsmoe_select_rounding(const char *name);
void bitsmoe_select_products(const char *name);
const char *bitsmoe_select_tiles(const char *name);

/* Choose the instruction set: NULL for the best of this machine. Returns its name, NULL if it is not to be had. */
const char *bitsmoe_select(const char *name) {
  const Kernels *usable[3];
  int count = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
      __builtin_cpu_supports("avx512vnni") &&
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
      bitsmoe_select_products(bitsmoe_kernels->name);
      bitsmoe_select_tiles(NULL);
      return bitsmoe_kernels->name;
    }
  return NULL;
}

int64_t bitsmoe_layer_bytes(void) { return sizeof(Layer); }

/* Code i of those that decode_tile makes of QUAD chunks side by side: register i / CHUNK holds in its 32-bit lane j
 * the rows of column j / 4 * 16 + 4 * (i / CHUNK) + j % 4. Two columns of QUAD rows fill a 64-bit lane; of a row both
 * windows lie in two bytes. */
static void prepare_quad(Decoder *d, int i) {
  int ring = 4 * d->bits, part = i / CHUNK, lane = i % CHUNK / QUAD, row = i % QUAD;
  int column = lane / 4 * 16 + 4 * part + lane % 4, even = column & ~1, block = column / BLOCK;
  int start = (even % BLOCK + 1) * d->bits - 8 + 8 * ring; /* of the even column's window, in the ring */
  int byte = i % 8; /* of the lane: both of row 0, of row 1 and so on */
  d->quad_perm[part][i % CHUNK] = (uint8_t)(byte / 2 * 2 * ring + block * ring + (start / 8 + byte % 2) % ring);
  d->quad_shift[part][i % CHUNK] = (uint8_t)(16 * row + start % 8 + column % 2 * d->bits);
}

/* What follows from the bits, trellis and table of a decoder. Returns 0, or -1 without memory. */
int bitsmoe_prepare_decoder(Decoder *d) {
  int ring = 4 * d->bits; /* bytes of a block */
  for (int i = 0; i < CHUNK; i++) {
    int block = i / BLOCK, first = i % BLOCK / 8 * 8; /* first code of this 64-bit lane, in the block */
    int lane_start = first * d->bits + (d->trellis ? d->bits - 8 + 8 * ring : 0);
    d->perm[i] = (uint8_t)(block * ring + (lane_start / 8 + i % 8) % ring);
    d->shift[i] = (uint8_t)(lane_start % 8 + i % 8 * d->bits);
  }
  if (d->trellis && d->bits <= QUAD_BITS)
    for (int i = 0; i < QUAD * CHUNK; i++) prepare_quad(d, i);
  d->joint = d->trellis ? bitsmoe_joint_table(d->bits, d->table) : NULL;
  return d->trellis && !d->joint ? -1 : 0;
}
