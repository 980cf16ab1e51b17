// Weights of floats of 8 and of 16 bits with scales, with AVX-512.
#if defined(__x86_64__)
#include "avx512.h"

namespace bitplan {
namespace {

typedef __m512 Floats;
BITPLAN_INLINE float sum_lanes(Floats v) { return _mm512_reduce_add_ps(v); }
// Lane i of the result is factors[lanes[i]]; sixteen may be read.
template <class Integers>
BITPLAN_INLINE Floats spread(const float* factors, Integers lanes) {
  return _mm512_permutexvar_ps((__m512i)lanes, _mm512_loadu_ps(factors));
}

}  // namespace
}  // namespace bitplan

#define BITPLAN_LANES 16
#define BITPLAN_SMALL_FLOATS kAvx512SmallFloats
#include "small_floats.h"
#endif
