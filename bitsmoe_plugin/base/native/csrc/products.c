/* Products in 16-bit integers, shared out over threads; see products.h. */
#include "products.h"

static const Products *products;

/* As bitsmoe_select, which calls it. Other instruction sets multiply float32 as fast. */
void bitsmoe_select_products(const char *name) {
  products = NULL;
#if defined(__x86_64__)
  if (!strcmp(name, "avx512")) products = &bitsmoe_products_avx512;
#endif
}

/* Whether there are any. */
int bitsmoe_has_products(void) { return products != NULL; }

int64_t bitsmoe_stripes_bytes(void) { return sizeof(Source) + sizeof(Stripes); }

/* A matrix, or the transposed of one, becomes stripes. */
void bitsmoe_pack_stripes(const Source *source, const float *root, int transposed, Stripes *out, int threads) {
  const int64_t stripes = stripes_of(out->rows), stretches = stretches_of(out->columns);
#pragma omp parallel for num_threads(threads) collapse(2) schedule(static)
  for (int64_t stripe = 0; stripe < stripes; stripe++)
    for (int64_t stretch = 0; stretch < stretches; stretch++) {
      const int64_t first = stripe * STRIPE, begin = stretch * STRETCH, at = stripe * out->room + stretch;
      const int rows = out->rows - first < STRIPE ? (int)(out->rows - first) : STRIPE;
      const int count = out->columns - begin < STRETCH ? (int)(out->columns - begin) : STRETCH;
      int16_t *integers = out->integers + at * STRIPE * STRETCH;
      float *scales = out->scales + at * STRIPE;
      if (transposed) products->pack_columns(source, root, first, rows, begin, count, integers, scales);
      else products->pack_rows(source, first, rows, begin, count, integers, scales);
    }
}

/* One square of a result [rows of a, rows of b], and its mirror image if that is symmetric. */
static void store_square(const float *sums, int64_t row, int64_t column, int64_t rows, int64_t columns, int mirrored,
                         float *out) {
  const int height = rows - row < STRIPE ? (int)(rows - row) : STRIPE;
  const int width = columns - column < STRIPE ? (int)(columns - column) : STRIPE;
  for (int i = 0; i < height; i++) memcpy(out + (row + i) * columns + column, sums + i * STRIPE, width * sizeof *sums);
  if (!mirrored) return;
  for (int j = 0; j < width; j++)
    for (int i = 0; i < (row == column ? j : height); i++) out[(column + j) * columns + row + i] = sums[i * STRIPE + j];
}

/* out = a b^T, [rows of a, rows of b]; of a symmetric one a half is multiplied. Sums are made in one order,
 * whatever the number of threads. */
void bitsmoe_multiply_stripes(const Stripes *a, const Stripes *b, int symmetric, float *out, int threads) {
  const int64_t left = stripes_of(a->rows), right = stripes_of(b->rows), stretches = stretches_of(a->columns);
  const int together = TASK / STRIPE;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t task = 0; task < left; task += together) {
    float sums[STRIPE * STRIPE] __attribute__((aligned(64)));
    const int64_t end = task + together < left ? task + together : left;
    for (int64_t j = symmetric ? task : 0; j < right; j++)
      for (int64_t i = task; i < end; i++) {
        if (symmetric && j < i) continue;
        memset(sums, 0, sizeof sums);
        for (int64_t k = 0; k < stretches; k++) {
          const int64_t count = a->columns - k * STRETCH < STRETCH ? a->columns - k * STRETCH : STRETCH;
          const int64_t at = i * a->room + k, with = j * b->room + k;
          products->add_products(a->integers + at * STRIPE * STRETCH, a->scales + at * STRIPE,
                                 b->integers + with * STRIPE * STRETCH, b->scales + with * STRIPE,
                                 (int)(count + 1) / 2, sums);
        }
        store_square(sums, i * STRIPE, j * STRIPE, a->rows, b->rows, symmetric, out);
      }
  }
}
