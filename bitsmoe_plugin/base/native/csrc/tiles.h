/* Products of many vectors with tile instructions: AMX-INT8, a tile of which has up to 16 rows of up to 64 bytes. Sums of
 * integers are exact, and what is float is computed in the order of avx512.c, so results are those of AVX-512 bit by
 * bit, and who takes which is a matter of time alone.
 *
 * A thread configures its tiles for a number of vectors and for the bytes of each that one instruction multiplies,
 * calls products of that many vectors, and releases them. */
#ifndef BITSMOE_TILES_H
#define BITSMOE_TILES_H

#include "bitsmoe.h"

enum {
  TILE_ROWS = 16,
  TILE_BYTES = 64,   /* of a row */
  LANES = 16,        /* 32-bit sums that AVX-512 adds up by themselves: of columns 4 j to 4 j + 3 of all chunks */
  LEAST_VECTORS = 8, /* from which tiles are used: estimated, never measured; see examples/speed.md */
  MOST_VECTORS = 512 /* of which `lanes` are held at a time */
};

typedef struct {
  const char *name;
  void (*configure)(int vectors, int bytes);
  void (*release)(void);
  /* As those of Kernels. tile: with zeros beyond `rows`; the terms' q follow one another, ROWS each; configured for
   * ROWS bytes. */
  void (*tile_dot)(const int16_t *tile, int rows, const Term *terms, int count, int column, int32_t offset2);
  /* configured for the columns that share a scale, at most CHUNK */
  void (*band_dot)(const Band *band, const Vectors *vectors, float *out, int64_t stride);
  /* `chunks` chunks of `rows` <= BAND rows: row r of lane j of chunk c at 64 (16 c + j) + 4 r */
  void (*decode_rows)(const Decoder *d, const uint32_t *words, int64_t stride, int rows, int chunks, int tail,
                      uint8_t *values);
  /* out[row] += the terms' products with BAND rows; `rows`: as decode_rows leaves them, `lanes`: as lanes_of, of `count`
   * vectors of `bytes`; configured for lane_step(bytes) */
  void (*rows_dot)(const uint8_t *rows, const int8_t *lanes, int bytes, const Term *terms, int count, int32_t offset2);
} Tiles;

/* Bytes of a lane of `chunks` chunks, whole tiles if more than one. */
static inline int lane_bytes(int chunks) {
  int bytes = 4 * chunks;
  return bytes <= TILE_BYTES ? bytes : (bytes + TILE_BYTES - 1) / TILE_BYTES * TILE_BYTES;
}
static inline int lane_step(int bytes) { return bytes < TILE_BYTES ? bytes : TILE_BYTES; }

/* Vector m of `count`, in `chunks` chunks, to its place in lanes [LANES, 2, count, bytes]: high bytes, then low ones. */
void bitsmoe_lanes_of(const int16_t *q, int chunks, int m, int count, int bytes, int8_t *lanes);

#if defined(__x86_64__)
void bitsmoe_decode_lanes(const Decoder *d, const uint32_t *words, int64_t stride, int rows, int chunks, int tail,
                          uint8_t *values); /* with AVX-512 */
extern const Tiles bitsmoe_tiles_model; /* what the instructions do, in C: for tests */
#endif
extern const Tiles *bitsmoe_tiles; /* those in use, NULL: none */

/* The tiles to multiply so many vectors with, NULL: none. */
static inline const Tiles *tiles_for(int64_t vectors) { return vectors >= LEAST_VECTORS ? bitsmoe_tiles : NULL; }

#endif
