#if defined(__x86_64__)
#include "avx2.h"
#define BITPLAN_LANES 8
#define BITPLAN_MATH kAvx2Math
#include "decoder_math.h"
#endif
