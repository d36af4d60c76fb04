#define KERNELS bitsmoe_portable
#define KERNELS_NAME "portable"
#include "portable.h"
