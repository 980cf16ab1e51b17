// Few tokens, AVX-512: rows of W are read once, in order, four at a time, and multiplied with vpdpbusd.
#if defined(__x86_64__)
#include "avx512.h"

namespace bitplan {
namespace {

constexpr int kVector = 64;

int octets_of(int bits, int block) {
  int octets = bits >= 5 ? 1 : bits >= 3 ? 2 : bits == 2 ? 4 : 8;
  // A 64-bit word must not span two blocks.
  while (octets > 1 && 8 * octets > block) octets /= 2;
  return octets;
}

void shape(const Matrix& w, Activations& a, bool decode) {
  a.block = block_of(w);
  a.interleave = decode ? octets_of(w.bits, a.block) : 1;
  const int64_t span = a.interleave * kVector > a.block ? a.interleave * kVector : a.block;
  a.blocks = divide_up(w.columns, a.block);
  a.value_stride = 2 * divide_up(w.columns, span) * span;
  a.block_stride = divide_up(a.blocks, 16) * 16 + 16;
}

// Sixteen activations of one block as planes of high and low bytes.
BITPLAN_INLINE void store_octets(const Activations& a, uint8_t* values, int64_t k, __m512i v) {
  alignas(16) uint8_t high[16], low[16];
  _mm_store_si128(reinterpret_cast<__m128i*>(low), _mm512_cvtepi32_epi8(v));
  const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(v, _mm512_set1_epi32(128)), 8);
  _mm_store_si128(reinterpret_cast<__m128i*>(high), _mm512_cvtepi32_epi8(upper));
  for (int part = 0; part < 2; ++part) {
    const int64_t octet = k / 8 + part, vector = octet / (8 * a.interleave), within = octet % (8 * a.interleave);
    const int64_t place = (vector * a.interleave + within % a.interleave) * 2 * kVector + within / a.interleave * 8;
    memcpy(values + place, high + 8 * part, 8);
    memcpy(values + place + kVector, low + 8 * part, 8);
  }
}

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
      store_octets(a, values, k, v);
    }
    // Infinities and NaN reach every output, as they do in floating point.
    step[b] = (inverse > 0 ? top / kLargestActivation : 0.0f) + _mm512_reduce_add_ps(not_finite);
    sum[b] = step[b] * static_cast<float>(_mm512_reduce_add_epi32(total));
  }
}

void quantize(const float* x, const Activations& a, int64_t first_token, int64_t last_token) {
  for (int64_t t = first_token; t < last_token; ++t) quantize_token(x + t * a.columns, a, t);
}

// Factors of the blocks of a row for each token, and what the zero points take away from the sums.
template <int BITS, int TOKENS>
BITPLAN_INLINE void prepare_row(const Matrix& w, const Activations& a, int64_t token, int64_t row, float* scratch,
                                float* factor, float* taken) {
  float *scale = scratch, *shift = scratch + a.block_stride;
  read_groups<BITS>(w, row, scale, shift);
  const bool by_row = w.groups() == 1;
  for (int t = 0; t < TOKENS; ++t) {
    const float* step = a.step + (token + t) * a.block_stride;
    const float* sum = a.sum + (token + t) * a.block_stride;
    __m512 total = _mm512_setzero_ps();
    for (int64_t b = 0; b < a.blocks; b += 16) {
      const __m512 s = by_row ? _mm512_set1_ps(scale[0]) : _mm512_loadu_ps(scale + b);
      const __m512 z = by_row ? _mm512_set1_ps(shift[0]) : _mm512_loadu_ps(shift + b);
      _mm512_storeu_ps(factor + t * a.block_stride + b, _mm512_mul_ps(s, _mm512_loadu_ps(step + b)));
      total = _mm512_fmadd_ps(z, _mm512_loadu_ps(sum + b), total);
    }
    taken[t] = _mm512_reduce_add_ps(total);
  }
}

// Adds the products of one vector of codes in each row to the sums of high and low bytes.
template <int OCTETS, int ROWS, int TOKENS, class Unpacker>
BITPLAN_INLINE void add_products(const Unpacker& unpacker, const __m512i (&words)[ROWS], const uint8_t* values,
                                 int64_t stride, __m512i (&high)[ROWS][TOKENS], __m512i (&low)[ROWS][TOKENS]) {
  for (int i = 0; i < OCTETS; ++i)
    for (int t = 0; t < TOKENS; ++t) {
      const uint8_t* planes = values + t * stride + i * 2 * kVector;
      const __m512i h = _mm512_load_si512(planes), l = _mm512_load_si512(planes + kVector);
      for (int r = 0; r < ROWS; ++r) {
        const __m512i codes = unpacker.octet(words[r], i);
        high[r][t] = _mm512_dpbusd_epi32(high[r][t], codes, h);
        low[r][t] = _mm512_dpbusd_epi32(low[r][t], codes, l);
      }
    }
}

// total[ROWS][TOKENS] += sums of the blocks of one step; a step is a block, or the blocks of a vector.
template <bool BY_LANE, int ROWS, int TOKENS>
BITPLAN_INLINE void scale_sums(const __m512i (&high)[ROWS][TOKENS], const __m512i (&low)[ROWS][TOKENS],
                               const float* factor, int64_t stride, __m512i part_of_lane,
                               __m512 (&total)[ROWS][TOKENS]) {
  for (int r = 0; r < ROWS; ++r)
    for (int t = 0; t < TOKENS; ++t) {
      const float* f = factor + (r * TOKENS + t) * stride;
      const __m512 by_lane = BY_LANE ? _mm512_permutexvar_ps(part_of_lane, _mm512_loadu_ps(f)) : _mm512_set1_ps(*f);
      const __m512i both = _mm512_add_epi32(_mm512_slli_epi32(high[r][t], 8), low[r][t]);
      total[r][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(both), by_lane, total[r][t]);
    }
}

// ROWS x TOKENS outputs. Either a vector is some blocks, each in its share of the 16 lanes (BY_LANE), or a block is
// one or more vectors.
template <int BITS, int OCTETS, bool BY_LANE, int ROWS, int TOKENS>
BITPLAN_INLINE void decode_rows(const Matrix& w, const Activations& a, int64_t token, const Output& out, int64_t row,
                                float* scratch) {
  constexpr int kBytes = Unpacker<BITS, OCTETS>::kBytes, kCodes = kVector * OCTETS;
  const Unpacker<BITS, OCTETS> unpacker;
  const int64_t row_bytes = w.row_bytes(), vectors = divide_up(w.columns, kCodes), whole = row_bytes / kBytes;
  const int64_t stride = a.block_stride;
  float* factor = scratch + 2 * stride;
  float taken[ROWS * TOKENS];
  for (int r = 0; r < ROWS; ++r)
    prepare_row<BITS, TOKENS>(w, a, token, row + r, scratch, factor + r * TOKENS * stride, taken + r * TOKENS);

  const int64_t together = BY_LANE ? 1 : a.block / kCodes, parts = BY_LANE ? kCodes / a.block : 1;
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i part_of_lane = _mm512_srli_epi32(_mm512_mullo_epi32(lanes, _mm512_set1_epi32(parts)), 4);
  const uint8_t* stream = w.codes + row * row_bytes;
  const uint8_t* values = a.values + token * a.value_stride;
  __m512 total[ROWS][TOKENS];
  for (int r = 0; r < ROWS; ++r)
    for (int t = 0; t < TOKENS; ++t) total[r][t] = _mm512_setzero_ps();

  for (int64_t v = 0; v < vectors; factor += parts) {
    __m512i high[ROWS][TOKENS], low[ROWS][TOKENS];
    for (int r = 0; r < ROWS; ++r)
      for (int t = 0; t < TOKENS; ++t) high[r][t] = low[r][t] = _mm512_setzero_si512();
    const int64_t stop = v + together < vectors ? v + together : vectors;
    do {
      __m512i words[ROWS];
      const uint8_t* place = stream + v * kBytes;
      if (v < whole)
        for (int r = 0; r < ROWS; ++r) words[r] = unpacker.load_whole(place + r * row_bytes);
      else
        for (int r = 0; r < ROWS; ++r) words[r] = unpacker.load(place + r * row_bytes, row_bytes - v * kBytes);
      // The same columns two steps of rows ahead: into the second level, whose misses are many more at a time.
      for (int r = 0; r < ROWS; ++r)
        _mm_prefetch(reinterpret_cast<const char*>(place + (2 * ROWS + r) * row_bytes), _MM_HINT_T1);
      add_products<OCTETS>(unpacker, words, values + v * OCTETS * 2 * kVector, a.value_stride, high, low);
    } while (++v < stop);
    scale_sums<BY_LANE>(high, low, factor, stride, part_of_lane, total);
  }
  for (int r = 0; r < ROWS; ++r)
    for (int t = 0; t < TOKENS; ++t)
      out.values[(token + t) * out.stride + row + r] = _mm512_reduce_add_ps(total[r][t]) - taken[r * TOKENS + t] +
                                                       (out.bias ? out.bias[row + r] : 0.0f);
}

template <int BITS, int OCTETS, bool BY_LANE, int TOKENS>
void decode_range(const Matrix& w, const Activations& a, int64_t token, const Output& out, int64_t first_row,
                  int64_t last_row, float* scratch) {
  constexpr int kRows = TOKENS == 1 ? 4 : TOKENS == 2 ? 2 : 1;
  int64_t row = first_row;
  for (; row + kRows <= last_row; row += kRows)
    decode_rows<BITS, OCTETS, BY_LANE, kRows, TOKENS>(w, a, token, out, row, scratch);
  for (; row < last_row; ++row) decode_rows<BITS, OCTETS, BY_LANE, 1, TOKENS>(w, a, token, out, row, scratch);
}

using Range = void (*)(const Matrix&, const Activations&, int64_t, const Output&, int64_t, int64_t, float*);

template <int BITS, int OCTETS, bool BY_LANE>
Range by_tokens(int tokens) {
  static const Range ranges[] = {decode_range<BITS, OCTETS, BY_LANE, 1>, decode_range<BITS, OCTETS, BY_LANE, 2>,
                                 decode_range<BITS, OCTETS, BY_LANE, 3>, decode_range<BITS, OCTETS, BY_LANE, 4>};
  return ranges[tokens - 1];
}

template <int BITS, int OCTETS>
Range by_block(int block, int tokens) {
  return block < kVector * OCTETS ? by_tokens<BITS, OCTETS, true>(tokens) : by_tokens<BITS, OCTETS, false>(tokens);
}

Range find_range(int bits, int octets, int block, int tokens) {
  switch (10 * bits + octets) {
    case 12: return by_block<1, 2>(block, tokens);
    case 14: return by_block<1, 4>(block, tokens);
    case 18: return by_block<1, 8>(block, tokens);
    case 22: return by_block<2, 2>(block, tokens);
    case 24: return by_block<2, 4>(block, tokens);
    case 32: return by_block<3, 2>(block, tokens);
    case 42: return by_block<4, 2>(block, tokens);
    case 51: return by_block<5, 1>(block, tokens);
    case 61: return by_block<6, 1>(block, tokens);
    case 71: return by_block<7, 1>(block, tokens);
    default: return by_block<8, 1>(block, tokens);
  }
}

void decode(const Matrix& w, const Activations& a, int64_t token, int tokens, const Output& out, int64_t first_row,
            int64_t last_row, float* scratch) {
  find_range(w.bits, a.interleave, a.block, tokens)(w, a, token, out, first_row, last_row, scratch);
}

}  // namespace

void avx512_prefill(const Matrix&, const Activations&, const Output&, int64_t, int64_t, float*);
int64_t avx512_prefill_scratch(const Matrix&, const Activations&);

namespace {
int64_t scratch_floats(const Matrix& w, const Activations& a) {
  // Scale and shift of a row, then the factors of at most four pairs of row and token.
  const int64_t decoding = (2 + 4) * a.block_stride, prefilling = avx512_prefill_scratch(w, a);
  return decoding > prefilling ? decoding : prefilling;
}
}  // namespace

const Kernels kAvx512Kernels = {shape, quantize, decode, avx512_prefill, scratch_floats, 32};

}  // namespace bitplan
#endif
