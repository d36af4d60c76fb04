#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,bmi2")
#include <immintrin.h>
#define KERNELS bitsmoe_avx2
#define KERNELS_NAME "avx2"
#include "portable.h"
#endif
