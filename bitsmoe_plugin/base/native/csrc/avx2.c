/* The kernels with AVX2 (and FMA, F16C: Intel from Haswell on, AMD from Zen on).
 *
 * Nothing looks up bytes in 256 entries at once here, so trellis codes are looked up several at a time
 * (lookup.h). Products of bytes would saturate 16 bits, so u and q have 16 bits each, whose products
 * VPMADDWD adds up in pairs: of columns in a decoded row, of rows in a tile. */
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,bmi2")
#include <immintrin.h>
#include <math.h>

#include "dense_kernels.h"
#include "gating_kernels.h"
#include "lookup.h"

enum { LANES = 16, VECTORS = CHUNK / LANES }; /* 16-bit lanes of a vector, vectors of a chunk */

INLINE __m256i load(const void *from) { return _mm256_loadu_si256((const __m256i *)from); }
INLINE void store(void *to, __m256i v) { _mm256_storeu_si256((__m256i *)to, v); }
INLINE __m256 load_halves(const uint16_t *from) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from)); }

INLINE __m256i ascending(void) { return _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0); }

INLINE __m256i up_to(int n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), ascending()); }

/* 8 floats, zeros from n on; what lies beyond is not read. */
INLINE __m256 load_up_to(const float *from, int n) { return _mm256_maskload_ps(from, up_to(n)); }

INLINE __m128 halve(__m256 v) { return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)); }

/* Sums of four vectors. */
INLINE __m128 reduce4(const __m256 v[4]) {
  return halve(_mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3])));
}

INLINE float reduce(__m256 v) {
  __m128 sum = _mm_hadd_ps(halve(v), halve(v));
  return _mm_cvtss_f32(_mm_hadd_ps(sum, sum));
}

INLINE int32_t reduce_integers(__m256i v) {
  __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  sum = _mm_hadd_epi32(sum, sum);
  return _mm_cvtsi128_si32(_mm_hadd_epi32(sum, sum));
}

INLINE __m256 power(__m256i exponent) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(exponent, _mm256_set1_epi32(127)), 23));
}

/* exp2 to 1e-7: 2^round(x) times the Taylor series of exp at the remainder, within +-0.35. The power is
 * applied in halves, so that it may be too small or large for a float by itself. */
INLINE __m256 exp2_vector(__m256 x) {
  x = _mm256_max_ps(_mm256_set1_ps(-250), _mm256_min_ps(_mm256_set1_ps(250), x)); /* NaN stays NaN */
  __m256 whole = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 t = _mm256_mul_ps(_mm256_sub_ps(x, whole), _mm256_set1_ps(0.69314718056f));
  __m256 p = _mm256_set1_ps(1.0f / 5040);
  static const float series[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1, 1};
  for (int i = 0; i < 7; i++) p = _mm256_fmadd_ps(p, t, _mm256_set1_ps(series[i]));
  __m256i exponent = _mm256_cvtps_epi32(whole), half = _mm256_srai_epi32(exponent, 1);
  return _mm256_mul_ps(_mm256_mul_ps(p, power(half)), power(_mm256_sub_epi32(exponent, half)));
}

static void row_scales(const uint8_t *codes, const uint16_t *low, const uint16_t *step, int n, float *out) {
  int i = 0;
  for (; i + 8 <= n; i += 8) {
    __m256i code = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(codes + i)));
    __m256 level = _mm256_cvtepi32_ps(_mm256_and_si256(code, _mm256_set1_epi32(31)));
    _mm256_storeu_ps(out + i, exp2_vector(_mm256_fmadd_ps(level, load_halves(step + i), load_halves(low + i))));
  }
  for (; i < n; i++) out[i] = exp2f(_cvtsh_ss(low[i]) + (codes[i] & 31) * _cvtsh_ss(step[i]));
}

static int select_rows(const uint8_t *codes, int width, const float *scales, int n, int32_t *order,
                       float *chosen) {
  __m256i wanted = _mm256_set1_epi8((char)(width << 5)), top = _mm256_set1_epi8((char)0xe0);
  int count = 0, i = 0;
  for (; i + 32 <= n; i += 32) {
    __m256i same = _mm256_cmpeq_epi8(_mm256_and_si256(load(codes + i), top), wanted);
    for (uint32_t found = (uint32_t)_mm256_movemask_epi8(same); found; found &= found - 1) {
      order[count] = i + __builtin_ctz(found);
      chosen[count] = scales[order[count]];
      count++;
    }
  }
  for (; i < n; i++) {
    order[count] = i;
    chosen[count] = scales[i];
    count += codes[i] >> 5 == width;
  }
  return count;
}

static float quantize(const float *a, int n, int padded, int16_t *q, int32_t *sum, float *rest) {
  __m256 largest = _mm256_setzero_ps(), poison = _mm256_setzero_ps(), sign = _mm256_set1_ps(-0.0f);
  for (int i = 0; i < n; i += 8) {
    __m256 v = load_up_to(a + i, n - i);
    largest = _mm256_max_ps(_mm256_andnot_ps(sign, v), largest);
    poison = _mm256_fmadd_ps(v, _mm256_setzero_ps(), poison); /* NaN where v is not finite */
  }
  __m128 most = _mm_max_ps(_mm256_castps256_ps128(largest), _mm256_extractf128_ps(largest, 1));
  most = _mm_max_ps(most, _mm_movehl_ps(most, most));
  float top = _mm_cvtss_f32(_mm_max_ss(most, _mm_movehdup_ps(most))), bad = reduce(poison);
  __m256 inverse = _mm256_set1_ps(top > 0x1p-100f && bad == 0 ? LIMIT / top : 0);
  float scale = top / LIMIT + bad;
  __m256i total = _mm256_setzero_si256(), good = _mm256_set1_epi32(bad == 0 ? -1 : 0);
  for (int i = 0; i < padded; i += LANES) {
    __m256i part[2];
    for (int j = 0; j < 2; j++) {
      __m256 v = load_up_to(a + i + 8 * j, n - i - 8 * j);
      part[j] = _mm256_and_si256(_mm256_cvtps_epi32(_mm256_mul_ps(v, inverse)), good);
      total = _mm256_add_epi32(total, part[j]);
      if (rest) {
        __m256 left = _mm256_fnmadd_ps(_mm256_set1_ps(scale), _mm256_cvtepi32_ps(part[j]), v);
        _mm256_maskstore_ps(rest + i + 8 * j, up_to(n - i - 8 * j), left);
      }
    }
    store(q + i, _mm256_permute4x64_epi64(_mm256_packs_epi32(part[0], part[1]), 0xd8));
  }
  *sum = reduce_integers(total);
  return scale;
}

/* Codes of a uniform grid: a byte permutation brings the two bytes that a field touches into a 16-bit lane,
 * a product moves the field to the lane's upper byte. A 128-bit lane has 8 codes, which are `bits` bytes. */
typedef struct {
  __m256i perm[2]; /* of the block's halves, which come from its first and its last `loaded` bytes */
  __m256i factor, mask;
  int bits, loaded;
} Fields;

INLINE Fields fields_of(int bits) {
  Fields f;
  f.bits = bits;
  f.loaded = bits >= 4 ? 16 : bits >= 2 ? 8 : 4;
  f.mask = _mm256_set1_epi16((short)((1 << bits) - 1));
  __m128i lane = _mm_set_epi16(7, 6, 5, 4, 3, 2, 1, 0);
  __m256i bit = _mm256_broadcastsi128_si256(_mm_mullo_epi16(lane, _mm_set1_epi16((short)bits)));
  __m256i start = _mm256_inserti128_si256(_mm256_setzero_si256(), _mm_set1_epi16((short)bits), 1);
  __m256i twice = _mm256_set1_epi16(0x0101); /* a byte's index, or anything below 256, in both bytes */
  for (int half = 0; half < 2; half++) {
    int shared = half ? f.loaded - 2 * bits : 0;
    __m256i byte = _mm256_add_epi16(start, _mm256_set1_epi16((short)shared));
    byte = _mm256_add_epi16(byte, _mm256_srli_epi16(bit, 3));
    f.perm[half] = _mm256_add_epi16(_mm256_mullo_epi16(byte, twice), _mm256_set1_epi16(0x0100));
  }
  /* 256 >> shift: lower bytes, then upper ones */
  __m256i powers = _mm256_broadcastsi128_si256(_mm_set_epi8(0, 0, 0, 0, 0, 0, 0, 1, 2, 4, 8, 16, 32, 64, (char)128, 0));
  __m256i shift = _mm256_mullo_epi16(_mm256_and_si256(bit, _mm256_set1_epi16(7)), twice);
  f.factor = _mm256_shuffle_epi8(powers, _mm256_add_epi16(shift, _mm256_set1_epi16(0x0800)));
  return f;
}

/* Half a block: LANES codes. */
INLINE __m256i fields(const Fields *f, const uint32_t *words, int half) {
  const char *from = (const char *)words + (half ? BLOCK / 8 * f->bits - f->loaded : 0);
  int64_t eight;
  __m256i bytes;
  if (f->loaded == 16) bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)from));
  else if (f->loaded == 8) bytes = _mm256_set1_epi64x((memcpy(&eight, from, 8), eight));
  else bytes = _mm256_set1_epi32((int32_t)*words);
  __m256i shifted = _mm256_mullo_epi16(_mm256_shuffle_epi8(bytes, f->perm[half]), f->factor);
  return _mm256_and_si256(_mm256_srli_epi16(shifted, 8), f->mask);
}

INLINE __m256i widen(const uint8_t *bytes) {
  return _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)bytes));
}

static void decode_chunks(const Decoder *d, const uint32_t *words, int chunks, int tail, int16_t *out) {
  int blocks = 2 * chunks - tail;
  if (!d->trellis) {
    Fields f = fields_of(d->bits);
    for (int block = 0; block < blocks; block++, words += f.bits)
      for (int half = 0; half < 2; half++) store(out + block * BLOCK + half * LANES, fields(&f, words, half));
  } else {
    enum { PIECE = 32 }; /* blocks: long enough for stored bytes to be in the cache before vectors are read */
    uint8_t bytes[PIECE * BLOCK];
    for (int done = 0; done < blocks; done += PIECE) {
      int count = blocks - done < PIECE ? blocks - done : PIECE;
      lookup_blocks(d, words + done * d->bits, count, bytes);
      for (int i = 0; i < count * BLOCK; i += LANES) store(out + done * BLOCK + i, widen(bytes + i));
    }
  }
  if (tail) memset(out + blocks * BLOCK, 0, BLOCK * sizeof(int16_t));
}

static int decode_rows(const Decoder *d, const uint32_t *words, int64_t stride, int rows, int chunks, int tail,
                       int16_t *out, int64_t out_stride, const Term *terms, int count) {
  (void)terms, (void)count;
  prefetch(words, AHEAD, AHEAD + 4 * stride * rows);
  for (int r = 0; r < rows; r++) decode_chunks(d, words + r * stride, chunks, tail, out + r * out_stride);
  return 0;
}

/* A pair of rows side by side, 16 columns in two vectors: columns 0 to 3 and 8 to 11, then the others. */
INLINE void store_pair(int16_t *tile, int vector, __m256i a, __m256i b) {
  store(tile + 2 * vector * LANES, _mm256_unpacklo_epi16(a, b));
  store(tile + (2 * vector + 1) * LANES, _mm256_unpackhi_epi16(a, b));
}

INLINE void trellis_tile(const Decoder *d, const uint32_t *words, int64_t stride, int rows, int blocks,
                         int16_t *tile) {
  uint8_t bytes[ROWS * CHUNK];
  for (int r = 0; r < rows; r++) lookup_blocks(d, words + r * stride, blocks, bytes + r * CHUNK);
  for (int r = 0; r < rows; r += 2, tile += 2 * CHUNK) {
    int next = r + 1 < rows ? CHUNK : 0; /* beyond the last row: that row again, its q is zero */
    for (int v = 0; v < 2 * blocks; v++) {
      const uint8_t *from = bytes + r * CHUNK + v * LANES;
      store_pair(tile, v, widen(from), widen(from + next));
    }
  }
}

INLINE void fields_tile(const Decoder *d, const uint32_t *words, int64_t stride, int rows, int blocks,
                        int16_t *tile) {
  Fields f = fields_of(d->bits);
  for (int r = 0; r < rows; r += 2, words += 2 * stride, tile += 2 * CHUNK) {
    int64_t next = r + 1 < rows ? stride : 0;
    for (int v = 0; v < 2 * blocks; v++) {
      const uint32_t *block = words + v / 2 * f.bits;
      store_pair(tile, v, fields(&f, block, v % 2), fields(&f, block + next, v % 2));
    }
  }
}

static int decode_tile(const Decoder *d, const uint32_t *words, int64_t stride, int rows, int tail, const void *ahead,
                       int16_t *tile, const Term *terms, int count, int column) {
  (void)terms, (void)count, (void)column;
  prefetch(ahead, 0, (int64_t)8 * d->bits * rows);
  if (tail) memset(tile, 0, ROWS * CHUNK * sizeof(int16_t));
  if (d->trellis) trellis_tile(d, words, stride, rows, 2 - tail, tile);
  else fields_tile(d, words, stride, rows, 2 - tail, tile);
  return 0;
}

INLINE void tile_dot_of(const int16_t *tile, int rows, const Term *t, float *out) {
  __m256i sums[2 * VECTORS];
  for (int i = 0; i < 2 * VECTORS; i++) sums[i] = _mm256_set1_epi32((int32_t)t->start);
  for (int r = 0; r < rows; r += 2) {
    int32_t pair;
    memcpy(&pair, t->q + r, sizeof pair);
    __m256i both = _mm256_set1_epi32(pair);
    for (int i = 0; i < 2 * VECTORS; i++)
      sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(load(tile + r * CHUNK + i * LANES), both));
  }
  __m256i rest = _mm256_set1_epi32(t->rest);
  __m256 factor = _mm256_set1_ps(t->factor);
  for (int i = 0; i < 2 * VECTORS; i++) {
    __m256 sum = _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_add_epi32(sums[i], sums[i]), rest));
    _mm256_storeu_ps(out + 8 * i, _mm256_fmadd_ps(sum, factor, _mm256_loadu_ps(out + 8 * i)));
  }
}

static void tile_dot(const int16_t *tile, int rows, const Term *terms, int count, int column, int32_t offset2) {
  (void)offset2;
  for (const Term *t = terms; t < terms + count; t++) tile_dot_of(tile, rows, t, t->out + column);
}

/* From the order of store_pair. */
static void order_columns(float *out, int chunks) {
  for (; chunks > 0; chunks--, out += CHUNK)
    for (int i = 0; i < CHUNK; i += LANES) {
      __m256 low = _mm256_loadu_ps(out + i), high = _mm256_loadu_ps(out + i + 8);
      _mm256_storeu_ps(out + i, _mm256_permute2f128_ps(low, high, 0x20));
      _mm256_storeu_ps(out + i + 8, _mm256_permute2f128_ps(low, high, 0x31));
    }
}

/* Lane by lane, sums of q * (2 u - offset2); only so do they fit 32 bits. */
static void rows_dot(const int16_t *rows, int64_t stride, int chunks, const Term *terms, int count, int32_t offset2) {
  __m256i ones = _mm256_set1_epi16(1), factor2 = _mm256_set1_epi32(offset2);
  for (const Term *t = terms; t < terms + count; t++) {
    __m256i sums[QUAD], offset = _mm256_setzero_si256();
    for (int r = 0; r < QUAD; r++) sums[r] = _mm256_setzero_si256();
    for (int v = 0; v < chunks * VECTORS; v++) {
      __m256i inputs = load(t->q + v * LANES);
      offset = _mm256_add_epi32(offset, _mm256_madd_epi16(inputs, ones));
      for (int r = 0; r < QUAD; r++)
        sums[r] = _mm256_add_epi32(sums[r], _mm256_madd_epi16(load(rows + r * stride + v * LANES), inputs));
    }
    offset = _mm256_mullo_epi32(offset, factor2);
    __m256 parts[QUAD];
    for (int r = 0; r < QUAD; r++)
      parts[r] = _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_add_epi32(sums[r], sums[r]), offset));
    _mm_storeu_ps(t->out, _mm_fmadd_ps(reduce4(parts), _mm_set1_ps(t->factor), _mm_loadu_ps(t->out)));
  }
}

static void quad_sums(const int16_t *q, int chunks, int32_t *out) {
  for (int i = 0; i < chunks * CHUNK / 4; i++) out[i] = q[4 * i] + q[4 * i + 1] + q[4 * i + 2] + q[4 * i + 3];
}

/* v[i] lane j becomes v[j] lane i, 32-bit lanes. */
INLINE void transpose(__m256i v[8]) {
  __m256i t[8];
  for (int i = 0; i < 8; i += 4) {
    __m256i a = _mm256_unpacklo_epi32(v[i], v[i + 1]), b = _mm256_unpackhi_epi32(v[i], v[i + 1]);
    __m256i c = _mm256_unpacklo_epi32(v[i + 2], v[i + 3]), d = _mm256_unpackhi_epi32(v[i + 2], v[i + 3]);
    t[i] = _mm256_unpacklo_epi64(a, c);
    t[i + 1] = _mm256_unpackhi_epi64(a, c);
    t[i + 2] = _mm256_unpacklo_epi64(b, d);
    t[i + 3] = _mm256_unpackhi_epi64(b, d);
  }
  for (int i = 0; i < 4; i++) {
    v[i] = _mm256_permute2x128_si256(t[i], t[i + 4], 0x20);
    v[i + 4] = _mm256_permute2x128_si256(t[i], t[i + 4], 0x31);
  }
}

/* Pairs of columns, of BAND rows each. */
static int decode_band(const Decoder *d, const uint32_t *words, int64_t stride, int chunks, int tail, int16_t *values) {
  enum { PIECE = 4 };
  int16_t rows[BAND][PIECE * CHUNK];
  for (int c = 0; c < chunks; c += PIECE) {
    int count = chunks - c < PIECE ? chunks - c : PIECE;
    for (int r = 0; r < BAND; r++)
      decode_chunks(d, words + r * stride + c * 2 * d->bits, count, tail && c + count == chunks, rows[r]);
    for (int i = 0; i < count * CHUNK; i += 16, values += 16 * BAND)
      for (int half = 0; half < 2; half++) {
        __m256i v[8];
        for (int r = 0; r < 8; r++) v[r] = load(rows[8 * half + r] + i);
        transpose(v);
        for (int j = 0; j < 8; j++) store(values + 2 * BAND * j + 16 * half, _mm256_add_epi16(v[j], v[j]));
      }
  }
  return 1;
}

static void band_scales(const uint16_t *scales, int64_t stride, int count, float factor, float *out) {
  for (int i = 0; i < count; i++)
    for (int r = 0; r < BAND; r++) out[i * BAND + r] = factor * _cvtsh_ss(scales[r * stride + i]);
}

/* `count` vectors from number `first` on. */
INLINE void band_dot_of(const Band *b, const Vectors *v, int first, float *out, int64_t stride, int count) {
  enum { MOST = 4 };
  int step = b->group < CHUNK ? b->group : CHUNK, shift = __builtin_ctz(b->group);
  for (int start = 0, s = 0; start < b->columns; start += step, s++) {
    __m256i sums[MOST][2];
    const int16_t *q[MOST];
    for (int i = 0; i < count; i++) {
      sums[i][0] = sums[i][1] = _mm256_set1_epi32(v->offset[(first + i) * v->offset_stride + s]);
      q[i] = v->q + (first + i) * v->q_stride + start;
    }
    for (int c = 0; c < step; c += 2) {
      __m256i low = load(b->values + (start + c) * BAND), high = load(b->values + (start + c) * BAND + LANES);
      for (int i = 0; i < count; i++) {
        int32_t pair;
        memcpy(&pair, q[i] + c, sizeof pair);
        __m256i both = _mm256_set1_epi32(pair);
        sums[i][0] = _mm256_add_epi32(sums[i][0], _mm256_madd_epi16(low, both));
        sums[i][1] = _mm256_add_epi32(sums[i][1], _mm256_madd_epi16(high, both));
      }
    }
    for (int i = 0; i < count; i++)
      for (int half = 0; half < 2; half++) {
        float *to = out + (first + i) * stride + 8 * half;
        __m256 scale = _mm256_loadu_ps(b->scales + (start >> shift) * BAND + 8 * half);
        scale = _mm256_mul_ps(scale, _mm256_set1_ps(v->scale[(first + i) * v->scale_stride + start / CHUNK]));
        _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[i][half]), scale, _mm256_loadu_ps(to)));
      }
  }
}

static void band_dot(const Band *b, const Vectors *v, float *out, int64_t stride) {
  int i = 0;
  for (; i + 4 <= v->count; i += 4) band_dot_of(b, v, i, out, stride, 4);
  for (; i < v->count; i++) band_dot_of(b, v, i, out, stride, 1);
}

static float half_dot(const uint16_t *row, const float *x, int n) {
  __m256 sum[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  int i = 0;
  for (; i + 16 <= n; i += 16)
    for (int j = 0; j < 2; j++)
      sum[j] = _mm256_fmadd_ps(load_halves(row + i + 8 * j), _mm256_loadu_ps(x + i + 8 * j), sum[j]);
  float total = reduce(_mm256_add_ps(sum[0], sum[1]));
  for (; i < n; i++) total += _cvtsh_ss(row[i]) * x[i];
  return total;
}

const Kernels bitsmoe_avx2 = {"avx2", row_scales, select_rows, gather_in_turn, quantize, decode_tile, tile_dot, order_columns, decode_rows, rows_dot, quad_sums, decode_band, band_scales, band_dot, gate, half_dot, dots};
#endif
