// Weights in 16-bit floating point with AVX2.
#if defined(__x86_64__)
#include "avx2.h"

namespace bitplan {
namespace {

typedef __m256 Floats;
BITPLAN_INLINE Floats load(const float* x) { return _mm256_loadu_ps(x); }
BITPLAN_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
BITPLAN_INLINE Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
BITPLAN_INLINE Floats zeros() { return _mm256_setzero_ps(); }

template <Element ELEMENT>
BITPLAN_INLINE Floats widen(const uint16_t* stored) {
  const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(stored));
  if (ELEMENT == kFloat16) return _mm256_cvtph_ps(words);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
}

}  // namespace
}  // namespace bitplan

#define BITPLAN_LANES 8
#define BITPLAN_ROWS 2
#define BITPLAN_FLOATS kAvx2Floats
#include "float_rows.h"
#endif
