/* Which tiles are in use, and inputs in the order that they ask for; see tiles.h. */
#include "steps.h"
#include "tiles_amx.h"

const Tiles *bitsmoe_tiles;
static int amx_is_allowed = 1;

void bitsmoe_allow_amx(int allowed) { amx_is_allowed = allowed; }

/* Choose tiles to go with AVX-512: "amx", "model" (for tests), "none", NULL for the best of this machine. Returns what
 * is in use by now; "refused" if the system refuses "amx", NULL if it is not to be had, and nothing changed. */
const char *bitsmoe_select_tiles(const char *name) {
  int refused = 0;
  const Tiles *found = NULL;
#if defined(__x86_64__)
  if (bitsmoe_kernels == &bitsmoe_avx512) {
    if (name && !strcmp(name, "model")) found = &bitsmoe_tiles_model;
    else if (amx_is_allowed && (!name || !strcmp(name, "amx"))) found = bitsmoe_find_amx(&refused);
  }
#endif
  int wanted = name && strcmp(name, "none");
  if (wanted && !found) return refused ? "refused" : NULL;
  bitsmoe_tiles = found;
  return found ? found->name : refused ? "refused" : "none";
}

void bitsmoe_lanes_of(const int16_t *q, int chunks, int m, int count, int bytes, int8_t *lanes) {
  const int64_t half = (int64_t)count * bytes;
  lanes += (int64_t)m * bytes;
  for (int part = 0; part < 2 * LANES; part++, lanes += half) {
    const int8_t *from = (const int8_t *)q + part % 2 * CHUNK + part / 2 * 4;
    for (int c = 0; c < chunks; c++) memcpy(lanes + 4 * c, from + 2 * CHUNK * c, 4);
    memset(lanes + 4 * chunks, 0, bytes - 4 * chunks);
  }
}
