/* Expert layers computed from their packed rows on a CPU; see bitsmoe_plugin/codec/layout.py for the layout.
 *
 * Codes become unsigned bytes u with value = step * (u - offset) * scale, in every grid. Inputs become
 * 16-bit integers q with a scale for each short stretch of them, so that a sum over codes is an integer
 * dot product, exact, and the rounding of the inputs (below 2^-15 of the stretch's largest) is all that
 * is lost. Everything else is float32. Where that is too much, what rounding left over becomes a second plane
 * of 16-bit integers, with scales of its own, whose products are added: 2^-30 of the stretch's largest is
 * lost, less than by float32.
 */
#ifndef BITSMOE_H
#define BITSMOE_H

#include <stdint.h>
#include <string.h>

enum {
  BLOCK = 32,    /* codes that the packed layout keeps together */
  CHUNK = 64,    /* codes decoded at once */
  ROWS = 64,     /* rows whose inputs share a scale in gate_up */
  PANEL = 2048,  /* inputs that share a scale in down: the most whose integer sums fit 32 bits */
  QUAD = 4,      /* rows decoded and multiplied together */
  BAND = 16,     /* rows of a basis decoded and multiplied together; there are as many rows as columns of an
                    expert's input or output, in groups of 16 and more */
  AHEAD = 8192,  /* bytes by which rows of down are fetched before they are decoded */
  LINE = 64,     /* bytes of a cache line, and of a vector: one that lies across two lines is read twice */
  LIMIT = 32639, /* largest |q|: 127 * 256 + 127, two signed bytes */
  MAX_WIDTHS = 8,
  QUAD_BITS = 2,
  MAX_PLANES = 2, /* of inputs */
  TILE = 128     /* values that share a scale in the grid "tiled" */
};

/* How codes of one width become bytes. */
typedef struct {
  int32_t bits;      /* per code, 1 to 8 */
  int32_t trellis;   /* bytes are table[window], otherwise codes */
  int32_t offset2;   /* 2 * offset */
  float step;
  const uint8_t *joint; /* bytes of several codes at once, see lookup.h; of a trellis */
  uint8_t table[256];
  uint8_t perm[CHUNK], shift[CHUNK]; /* vector code: source bytes, then bits, of each code of a chunk */
  uint8_t quad_perm[QUAD][CHUNK], quad_shift[QUAD][CHUNK]; /* the same for the chunks of QUAD rows side by side, of
                                                              trellises of at most QUAD_BITS */
} Decoder;

/* Gatings in the order of models/gating.py, and one that is known in Python alone. */
enum { SILU, GELU, GELU_TANH, RELU, RELU2, UNKNOWN = -1 };

typedef struct {
  int32_t activation, clamps_activation;
  float alpha, limit, offset;
  float gate_cap, up_cap; /* 0: nothing is capped softly */
} GatingForm;

/* Dtypes of what is stored as it was. */
enum { NO_BIAS, BFLOAT16, FLOAT16, FLOAT32 };

typedef struct {
  int32_t experts, hidden, rank, size; /* E, H, r, I */
  int32_t inputs, bases;             /* factors before down: gate and up, or up; their bases */
  int32_t basis_bits, basis_group;
  int32_t widths;                    /* number of them */
  int32_t width_bits[MAX_WIDTHS];    /* in the order that row codes count in */
  int32_t falling[MAX_WIDTHS];       /* indices of width_bits by falling bits */
  Decoder decoders[MAX_WIDTHS];      /* of width_bits; unused for 0 and 16 bits */
  Decoder basis;
  const uint8_t *row_codes;          /* [inputs + 1, E, r] */
  const uint16_t *scale_grid;        /* [inputs + 1, 2, r] float16 */
  const uint32_t *payload;
  const int64_t *starts;             /* [inputs + 1, E] first word */
  const uint32_t *input_basis, *output_basis;
  const uint16_t *input_scales, *output_scales; /* float16 */
  const uint16_t *tile_scales, *row_gains; /* float16 [rows, ceil(I / TILE)], [rows]; NULL in other grids */
  const int64_t *row_starts;               /* [inputs + 1, E] first of those rows */
  const void *input_bias;                  /* [E, inputs, I] */
  int32_t bias_dtype;
  GatingForm gating;
} Layer;

/* BAND rows of a basis, up to PANEL columns. */
typedef struct {
  const int16_t *values; /* of all columns, in a form of the instruction set's own */
  const float *scales;   /* [columns / group, BAND] */
  int columns, group;
  int doubled; /* values are 2 u, otherwise u */
} Band;

/* Vectors to be multiplied with a band: number i is q + i * q_stride and so on. */
typedef struct {
  const int16_t *q;
  const float *scale;    /* [columns / CHUNK] */
  const int32_t *offset; /* [columns / min(group, CHUNK)] -offset2 * sum of q */
  int64_t q_stride, scale_stride, offset_stride;
  int count;
} Vectors;

/* A vector q to be multiplied with codes: out += factor * (2 * (start + sum of q * u) - rest), where start =
 * -(offset2 / 2) * sum of q and rest = sum of q if offset2 is odd, otherwise 0. */
typedef struct {
  const int16_t *q;
  float *out;
  int64_t start; /* fits 32 bits for ROWS values */
  int32_t rest;
  float factor;
} Term;

static inline Term term_of(const int16_t *q, int32_t sum, int32_t offset2, float factor, float *out) {
  return (Term){q, out, -(int64_t)(offset2 / 2) * sum, offset2 % 2 ? sum : 0, factor};
}

/* What depends on the instruction set. Rows are decoded in chunks; `tail` says that a row's last chunk
 * has one block instead of two: what follows must not be read. Inputs q and decoded u have 16 bits of room
 * each; in what form and order they stand within a chunk is known to their instruction set only. */
typedef struct {
  const char *name;
  /* out[i] = exp2(low[i] + step[i] * (code[i] & 31)) */
  void (*row_scales)(const uint8_t *codes, const uint16_t *low, const uint16_t *step, int n, float *out);
  /* The rows among n whose code is width << 5 and something: their indices to order, their scales to chosen,
   * each with room for 16 more; returns how many. */
  int (*select_rows)(const uint8_t *codes, int width, const float *scales, int n, int32_t *order, float *chosen);
  /* out[i] = scale[i] * z[order[i]] */
  void (*gather)(const float *z, const int32_t *order, const float *scale, int n, float *out);
  /* q = round(a / s), zeros from n to padded (whole chunks), rest = a - s * q [n] unless NULL; returns s, NaN
   * if an input is not finite */
  float (*quantize)(const float *a, int n, int padded, int16_t *q, int32_t *sum, float *rest);
  /* one chunk of `rows` <= ROWS rows; meanwhile fetches as many bytes at `ahead`, little by little: many at once wait
   * for each other. Returns how many of the terms it has multiplied with it already, as tile_dot does. */
  int (*decode_tile)(const Decoder *d, const uint32_t *words, int64_t stride, int rows, int tail, const void *ahead,
                     int16_t *tile, const Term *terms, int count, int column);
  /* out[column + i] += the terms' products with a tile of `rows` rows, CHUNK columns in an order of its own */
  void (*tile_dot)(const int16_t *tile, int rows, const Term *terms, int count, int column, int32_t offset2);
  /* chunks of columns in that order become chunks of columns that ascend */
  void (*order_columns)(float *out, int chunks);
  /* `chunks` chunks of `rows` <= QUAD rows; meanwhile fetches what lies AHEAD of them. Returns how many of the terms it
   * has multiplied with them already, as rows_dot does. */
  int (*decode_rows)(const Decoder *d, const uint32_t *words, int64_t stride, int rows, int chunks, int tail, int16_t *out,
                     int64_t out_stride, const Term *terms, int count);
  /* out[row] += the terms' products with QUAD rows, chunks <= PANEL / CHUNK */
  void (*rows_dot)(const int16_t *rows, int64_t stride, int chunks, const Term *terms, int count, int32_t offset2);
  /* out[CHUNK / 4 * chunks]: sums of q over columns in fours */
  void (*quad_sums)(const int16_t *q, int chunks, int32_t *out);
  /* `chunks` chunks of BAND rows; returns whether values are doubled */
  int (*decode_band)(const Decoder *d, const uint32_t *words, int64_t stride, int chunks, int tail, int16_t *values);
  /* out[i * BAND + row] = factor * scales[row * stride + i], i < count */
  void (*band_scales)(const uint16_t *scales, int64_t stride, int count, float factor, float *out);
  /* out[i * stride + row] += sum over columns of q * (2 u - offset2) * scale[column / CHUNK] * scales[column / group][row] */
  void (*band_dot)(const Band *band, const Vectors *vectors, float *out, int64_t stride);
  /* out[CHUNK * chunks] = gating of gate and up, of experts without a gate of up (as `gate`; `up` is NULL) */
  void (*gate)(const GatingForm *form, const float *gate, const float *up, int chunks, float *out);
  /* sum of row[i] * x[i], row in float16 */
  float (*half_dot)(const uint16_t *row, const float *x, int n);
  /* out[i * out_stride] = sum of row * (x + i * stride), i < count, whole chunks */
  void (*dots)(const float *row, const float *x, int64_t stride, int64_t count, int chunks, float *out, int64_t out_stride);
} Kernels;

extern const Kernels bitsmoe_portable;
#if defined(__x86_64__)
extern const Kernels bitsmoe_avx2, bitsmoe_avx512;
#endif

/* Bring bytes from..to into the cache; past the end of the payload this does nothing. */
static inline void prefetch(const void *start, int64_t from, int64_t to) {
  for (int64_t at = from; at < to; at += LINE) __builtin_prefetch((const char *)start + at);
}

static inline float half_to_float(uint16_t half) {
  uint32_t sign = (uint32_t)(half & 0x8000) << 16, magnitude = half & 0x7fff, bits;
  float value;
  if (magnitude >= 0x7c00) {
    bits = sign | 0x7f800000 | (magnitude & 0x3ff) << 13;
    memcpy(&value, &bits, 4);
    return value;
  }
  bits = magnitude << 13; /* 2^112 too small: the exponents' biases differ by that, subnormals included */
  memcpy(&value, &bits, 4);
  value *= 0x1p112f;
  return sign ? -value : value;
}

static inline void gather_in_turn(const float *z, const int32_t *order, const float *scale, int n, float *out) {
  for (int i = 0; i < n; i++) out[i] = scale[i] * z[order[i]];
}

const uint8_t *bitsmoe_joint_table(int bits, const uint8_t *table);

#endif
