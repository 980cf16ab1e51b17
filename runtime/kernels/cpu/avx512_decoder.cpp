#if defined(__x86_64__)
#include "avx512.h"
#define BITPLAN_LANES 16
#define BITPLAN_MATH kAvx512Math
#include "decoder_math.h"
#endif
