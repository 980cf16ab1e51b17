// Weights in 16-bit floating point with AVX-512.
#if defined(__x86_64__)
#include "avx512.h"

namespace bitplan {
namespace {

typedef __m512 Floats;
BITPLAN_INLINE Floats load(const float* x) { return _mm512_loadu_ps(x); }
BITPLAN_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
BITPLAN_INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
BITPLAN_INLINE Floats zeros() { return _mm512_setzero_ps(); }
BITPLAN_INLINE float sum_lanes(Floats v) { return _mm512_reduce_add_ps(v); }

template <Element ELEMENT>
BITPLAN_INLINE Floats widen(const uint16_t* stored) {
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(stored));
  if (ELEMENT == kFloat16) return _mm512_cvtph_ps(words);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}

}  // namespace
}  // namespace bitplan

#define BITPLAN_LANES 16
#define BITPLAN_ROWS 4
#define BITPLAN_FLOATS kAvx512Floats
#include "float_rows.h"
#endif
