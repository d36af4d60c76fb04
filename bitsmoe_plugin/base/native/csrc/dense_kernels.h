/* Dot products of float32, compiled for each instruction set that includes this. Columns are added up in one order,
 * whatever the number of vectors. */
#include "bitsmoe.h"

enum { DOT_LANES = 16, DOT_VECTORS = 4 };
typedef float Lanes __attribute__((vector_size(4 * DOT_LANES), aligned(4)));

static inline __attribute__((always_inline)) void dots_of(const float *row, const float *x, int64_t stride, int count,
                                                          int chunks, float *out, int64_t out_stride) {
  Lanes sums[DOT_VECTORS][2] = {{{0}}};
  for (int c = 0; c < chunks * CHUNK; c += 2 * DOT_LANES)
    for (int half = 0; half < 2; half++) {
      Lanes a = *(const Lanes *)(row + c + half * DOT_LANES);
      for (int i = 0; i < count; i++) sums[i][half] += a * *(const Lanes *)(x + i * stride + c + half * DOT_LANES);
    }
  for (int i = 0; i < count; i++) {
    Lanes both = sums[i][0] + sums[i][1];
    float sum = 0;
    for (int j = 0; j < DOT_LANES; j++) sum += both[j];
    out[i * out_stride] = sum;
  }
}

static void dots(const float *row, const float *x, int64_t stride, int64_t count, int chunks, float *out,
                 int64_t out_stride) {
  int64_t i = 0;
  for (; i + DOT_VECTORS <= count; i += DOT_VECTORS)
    dots_of(row, x + i * stride, stride, DOT_VECTORS, chunks, out + i * out_stride, out_stride);
  for (; i < count; i++) dots_of(row, x + i * stride, stride, 1, chunks, out + i * out_stride, out_stride);
}
