/* Rounding with AVX-512. */
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi2,fma")
#define ROUNDING bitsmoe_rounding_avx512
#include "rounding_kernels.h"
#endif
