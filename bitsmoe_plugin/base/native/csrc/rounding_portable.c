/* Rounding in plain C. */
#define ROUNDING bitsmoe_rounding_portable
#include "rounding_kernels.h"
