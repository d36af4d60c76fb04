/* The products of tiles.h by a model of the tile instructions, after their description in Intel's manual (palette 1:
 * eight tiles). What would fault ends the process. */
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#include <stdlib.h>

#define TILE_CONFIGURE(config) model_configure(config)
#define TILE_RELEASE() model_release()
#define TILE_ZERO(tile) model_zero(tile)
#define TILE_LOAD(tile, from, stride) model_load(tile, from, stride)
#define TILE_STORE(tile, to, stride) model_store(tile, to, stride)
#define TILE_DOT(sums, signed_bytes, unsigned_bytes) model_dot(sums, signed_bytes, unsigned_bytes)

static void model_configure(const void *config);
static void model_release(void);
static void model_zero(int tile);
static void model_load(int tile, const void *from, int64_t stride);
static void model_store(int tile, void *to, int64_t stride);
static void model_dot(int sums, int a, int b);

#include "tile_kernels.h"

int64_t bitsmoe_model_products; /* of two tiles: so that a test sees that there were any */

static __thread TileConfig model;
static __thread uint8_t data[8][TILE_ROWS][TILE_BYTES];

static void demand(int holds) {
  if (!holds) abort();
}

static void demand_tile(int tile) { demand(model.palette == 1 && model.rows[tile] && model.bytes[tile]); }

static void model_configure(const void *config) {
  memcpy(&model, config, sizeof model);
  demand(model.palette == 1 && !model.start_row);
  for (int i = 0; i < 14; i++) demand(!model.reserved[i]);
  for (int i = 0; i < 16; i++) {
    demand(model.rows[i] <= TILE_ROWS && model.bytes[i] <= TILE_BYTES && !model.rows[i] == !model.bytes[i]);
    demand(i < 8 || !model.rows[i]);
  }
  memset(data, 0, sizeof data);
}

static void model_release(void) { memset(&model, 0, sizeof model); }

static void model_zero(int tile) {
  demand_tile(tile);
  memset(data[tile], 0, sizeof data[tile]);
}

static void model_load(int tile, const void *from, int64_t stride) {
  model_zero(tile);
  for (int i = 0; i < model.rows[tile]; i++)
    memcpy(data[tile][i], (const uint8_t *)from + i * stride, model.bytes[tile]);
}

static void model_store(int tile, void *to, int64_t stride) {
  demand_tile(tile);
  for (int i = 0; i < model.rows[tile]; i++) memcpy((uint8_t *)to + i * stride, data[tile][i], model.bytes[tile]);
}

/* TDPBSUD */
static void model_dot(int sums, int a, int b) {
  demand_tile(sums), demand_tile(a), demand_tile(b);
  demand(sums != a && sums != b && a != b);
  demand(model.rows[sums] == model.rows[a] && model.bytes[sums] == model.bytes[b]);
  demand(model.bytes[a] % 4 == 0 && model.bytes[b] % 4 == 0 && model.bytes[a] / 4 == model.rows[b]);
  __atomic_fetch_add(&bitsmoe_model_products, 1, __ATOMIC_RELAXED);
  for (int m = 0; m < model.rows[sums]; m++)
    for (int n = 0; n < model.bytes[sums] / 4; n++) {
      int32_t sum;
      memcpy(&sum, data[sums][m] + 4 * n, 4);
      for (int k = 0; k < model.bytes[a]; k++) sum += (int8_t)data[a][m][k] * data[b][k / 4][4 * n + k % 4];
      memcpy(data[sums][m] + 4 * n, &sum, 4);
    }
}

const Tiles bitsmoe_tiles_model = {"model", configure, release, tile_dot, band_dot, bitsmoe_decode_lanes, rows_dot};
#endif
