/* Where the instructions of AMX-INT8 are to be had. */
#ifndef BITSMOE_TILES_AMX_H
#define BITSMOE_TILES_AMX_H

#include "tiles.h"

#if defined(__x86_64__) && defined(__linux__) && (__GNUC__ >= 11 || __clang_major__ >= 12)
#define BITSMOE_AMX 1
#else
#define BITSMOE_AMX 0
#endif

/* NULL without; refused: the CPU has them, but Linux did not permit their use. */
const Tiles *bitsmoe_find_amx(int *refused);

#endif
