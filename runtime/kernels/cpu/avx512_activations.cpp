// Activations as the AVX-512 kernels want them: 16-bit integers in two planes of bytes, in the order of the parts.
#if defined(__x86_64__)
#include "avx512.h"

namespace bitplan {
namespace {

int parts_of(int bits, int block) {
  // Four fields, a lane of 32 bits, must not span two blocks.
  if (bits == 1) return block >= 32 ? 8 : 4;
  return bits == 2 ? 4 : bits <= 4 ? 2 : 1;
}

// Which of sixteen consecutive activations come together: all of part 0, then those of part 1, ...
template <int PARTS>
constexpr Bytes part_order() {
  Bytes table{};
  for (int i = 0; i < 16; ++i) table.values[i] = i % (16 / PARTS) * PARTS + i / (16 / PARTS);
  return table;
}

// Sixteen activations of one block as planes of high and low bytes.
template <int PARTS>
BITPLAN_INLINE void store_planes(uint8_t* values, int64_t k, __m512i v) {
  static constexpr Bytes kOrder = part_order<PARTS>();
  constexpr int kEach = 16 / PARTS;
  const __m128i order = _mm_load_si128(reinterpret_cast<const __m128i*>(kOrder.values));
  const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(v, _mm512_set1_epi32(128)), 8);
  alignas(16) uint8_t high[16], low[16];
  _mm_store_si128(reinterpret_cast<__m128i*>(high), _mm_shuffle_epi8(_mm512_cvtepi32_epi8(upper), order));
  _mm_store_si128(reinterpret_cast<__m128i*>(low), _mm_shuffle_epi8(_mm512_cvtepi32_epi8(v), order));
  const int64_t vector = k / (kVector * PARTS), field = k / PARTS % kVector;
  for (int i = 0; i < PARTS; ++i) {
    uint8_t* plane = values + (vector * PARTS + i) * 2 * kVector + field;
    memcpy(plane, high + i * kEach, kEach);
    memcpy(plane + kVector, low + i * kEach, kEach);
  }
}

template <int PARTS>
void quantize_token(const float* x, const Activations& a, int64_t token) {
  uint8_t* values = a.values + token * a.value_stride;
  float* step = a.step + token * a.block_stride;
  float* sum = a.sum + token * a.block_stride;
  memset(values, 0, a.value_stride);
  memset(step, 0, a.block_stride * sizeof(float));
  memset(sum, 0, a.block_stride * sizeof(float));
  const auto present = [&](int64_t k) -> __mmask16 { return a.columns - k >= 16 ? 0xffff : (1 << (a.columns - k)) - 1; };
  for (int64_t b = 0; b < a.blocks; ++b) {
    const int64_t first = b * a.block, last = first + a.block < a.columns ? first + a.block : a.columns;
    __m512 largest = _mm512_setzero_ps(), not_finite = _mm512_setzero_ps();
    for (int64_t k = first; k < last; k += 16) {
      const __m512 part = _mm512_maskz_loadu_ps(present(k), x + k);
      largest = _mm512_max_ps(largest, _mm512_abs_ps(part));
      not_finite = _mm512_fmadd_ps(part, _mm512_setzero_ps(), not_finite);
    }
    const float top = _mm512_reduce_max_ps(largest);
    // Blocks that are all but zero are zero: their reciprocal would overflow.
    const float inverse = top > 1e-30f ? kLargestActivation / top : 0.0f;
    __m512i total = _mm512_setzero_si512();
    for (int64_t k = first; k < last; k += 16) {
      const __m512 part = _mm512_maskz_loadu_ps(present(k), x + k);
      const __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(part, _mm512_set1_ps(inverse)));
      total = _mm512_add_epi32(total, v);
      store_planes<PARTS>(values, k, v);
    }
    // Infinities and NaN reach every output, as they do in floating point.
    step[b] = (inverse > 0 ? top / kLargestActivation : 0.0f) + _mm512_reduce_add_ps(not_finite);
    sum[b] = step[b] * static_cast<float>(_mm512_reduce_add_epi32(total));
  }
}

}  // namespace

void avx512_shape(const Matrix& w, Activations& a, bool decode) {
  a.block = block_of(w);
  a.interleave = decode ? parts_of(w.bits, a.block) : 1;
  const int64_t span = a.interleave * kVector > a.block ? a.interleave * kVector : a.block;
  a.blocks = divide_up(w.columns, a.block);
  a.value_stride = 2 * divide_up(w.columns, span) * span;
  a.block_stride = divide_up(a.blocks, 16) * 16 + 16;
}

void avx512_quantize(const float* x, const Activations& a, int64_t first_token, int64_t last_token) {
  const auto by_parts = a.interleave == 1   ? quantize_token<1>
                        : a.interleave == 2 ? quantize_token<2>
                        : a.interleave == 4 ? quantize_token<4>
                                            : quantize_token<8>;
  for (int64_t t = first_token; t < last_token; ++t) by_parts(x + t * a.columns, a, t);
}

}  // namespace bitplan
#endif
