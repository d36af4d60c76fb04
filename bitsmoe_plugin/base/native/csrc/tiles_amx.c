/* The products of tiles.h by AMX-INT8 (Intel from Sapphire Rapids on), for which a process asks Linux. */
#include "tiles_amx.h"

#if BITSMOE_AMX
#pragma GCC target("amx-tile,amx-int8,avx512f,avx512bw,avx512dq,avx512vl,fma")
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

/* The compiler is not told what these read. */
#define WRITTEN __asm__ volatile("" : : : "memory")
#define TILE_CONFIGURE(config)                                 \
  do {                                                         \
    __asm__ volatile("" : : "r"(config) : "memory");           \
    _tile_loadconfig(config);                                  \
  } while (0)
#define TILE_RELEASE() _tile_release()
#define TILE_ZERO(tile) _tile_zero(tile)
#define TILE_LOAD(tile, from, stride)   \
  do {                                  \
    WRITTEN;                            \
    _tile_loadd(tile, from, stride);    \
  } while (0)
#define TILE_STORE(tile, to, stride) _tile_stored(tile, to, stride)
#define TILE_DOT(sums, signed_bytes, unsigned_bytes) _tile_dpbsud(sums, signed_bytes, unsigned_bytes)

#include "tile_kernels.h"

static const Tiles amx = {"amx", configure, release, tile_dot, band_dot, bitsmoe_decode_lanes, rows_dot};

static int cpu_has_amx(void) {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & 1) || !(d >> 25 & 1)) return 0; /* AMX-TILE, AMX-INT8 */
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return 0;                            /* XGETBV */
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low >> 17 & 3) == 3; /* the system saves configuration and data */
}

/* Asked for once: a process keeps what it was granted. */
static int is_permitted(void) {
  enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
  static int answer = -1;
  if (answer < 0) answer = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
  return answer;
}

const Tiles *bitsmoe_find_amx(int *refused) {
  *refused = 0;
  if (!cpu_has_amx()) return NULL;
  *refused = !is_permitted();
  return *refused ? NULL : &amx;
}
#else
const Tiles *bitsmoe_find_amx(int *refused) {
  *refused = 0;
  return NULL;
}
#endif
