// Weights of floats of 8 and of 16 bits with scales, with AVX2.
#if defined(__x86_64__)
#include "avx2.h"

namespace bitplan {
namespace {

typedef __m256 Floats;
// Lane i of the result is factors[lanes[i]]; eight may be read.
template <class Integers>
BITPLAN_INLINE Floats spread(const float* factors, Integers lanes) {
  return _mm256_permutevar8x32_ps(_mm256_loadu_ps(factors), (__m256i)lanes);
}

}  // namespace
}  // namespace bitplan

#define BITPLAN_LANES 8
#define BITPLAN_SMALL_FLOATS kAvx2SmallFloats
#include "small_floats.h"
#endif
