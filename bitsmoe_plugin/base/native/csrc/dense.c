/* Products with weights that a layer stores as they were: experts that are kept. */
#include "steps.h"

static void widen(const void *stored, int dtype, int64_t start, int count, float *out) {
  switch (dtype) {
    case BFLOAT16: for (int i = 0; i < count; i++) out[i] = stored_value(stored, BFLOAT16, start + i); break;
    case FLOAT16: for (int i = 0; i < count; i++) out[i] = stored_value(stored, FLOAT16, start + i); break;
    default: for (int i = 0; i < count; i++) out[i] = stored_value(stored, FLOAT32, start + i); break;
  }
}

/* out [tokens, rows] = x [tokens, columns, padded with zeros to whole chunks] times the transposed weight [rows,
 * columns]. A token's result depends neither on the others nor on the number of threads. */
int bitsmoe_dense(const void *weight, int dtype, int rows, int columns, const float *x, int64_t tokens, float *out,
                  int threads) {
  int chunks = chunks_of(columns), failed = 0;
#pragma omp parallel num_threads(threads)
  {
    float *row = calloc((size_t)chunks * CHUNK, sizeof(float));
    if (!row) {
#pragma omp atomic write
      failed = 1;
    }
#pragma omp for schedule(static)
    for (int i = 0; i < rows; i++)
      if (row) {
        widen(weight, dtype, (int64_t)i * columns, columns, row);
        bitsmoe_kernels->dots(row, x, (int64_t)chunks * CHUNK, tokens, chunks, out + i, rows);
      }
    free(row);
  }
  return -failed;
}
