#define BITPLAN_LANES 4
#define BITPLAN_MATH kPortableMath
#include "decoder_math.h"
