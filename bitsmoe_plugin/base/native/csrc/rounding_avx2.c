/* Rounding with AVX2 and FMA. */
#if defined(__x86_64__)
#pragma GCC target("avx2,fma")
#define ROUNDING bitsmoe_rounding_avx2
#include "rounding_kernels.h"
#endif
