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

// Blocks whose factors are in the lanes of one vector.
constexpr int kChunk = 16;
// Bytes between what is multiplied and what is fetched, at least: the latency of memory times its bandwidth.
constexpr int64_t kLeastAhead = 4096;

// Zero points of sixteen groups, the first at a multiple of 16; those past the last are not read and any number.
template <int BITS>
BITPLAN_INLINE __m512 load_zero_points(const uint8_t* stream, int64_t left) {
  static constexpr Bytes kPlace = place_bytes(BITS), kShift = shift_bytes(BITS, 0);
  const __mmask16 present = left >= 2 * BITS ? (1 << 2 * BITS) - 1 : (1 << left) - 1;
  const __m128i place = _mm_load_si128(reinterpret_cast<const __m128i*>(kPlace.values));
  const __m128i shift = _mm_load_si128(reinterpret_cast<const __m128i*>(kShift.values));
  const __m128i words = _mm_shuffle_epi8(_mm_maskz_loadu_epi8(present, stream), place);
  const __m128i codes = _mm_multishift_epi64_epi8(shift, words);
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_and_si128(codes, _mm_set1_epi8((1 << BITS) - 1))));
}

// factor = scale * step of the blocks of a chunk for each row and token; total -= what the zero points take away.
template <int BITS, int ROWS, int TOKENS>
BITPLAN_INLINE void begin_chunk(const Matrix& w, const Activations& a, int64_t token, int64_t row, int64_t chunk,
                                float (&factor)[ROWS][TOKENS][kChunk], __m512 (&total)[ROWS][TOKENS]) {
  const int64_t groups = w.groups(), bytes = w.zero_point_bytes(), offset = chunk * 2 * BITS;
  const bool by_row = groups == 1;
  for (int r = 0; r < ROWS; ++r) {
    const int64_t n = row + r;
    const __m512 scale = by_row ? _mm512_cvtph_ps(_mm256_set1_epi16(w.scale[n]))
                                : load_scale(w.scale + n * groups + chunk * kChunk, groups - chunk * kChunk);
    __m512 zero_point = _mm512_set1_ps(1 << (BITS - 1));
    if (w.zero_point)
      zero_point = by_row ? _mm512_set1_ps(w.zero_point[n])
                          : load_zero_points<BITS>(w.zero_point + n * bytes + offset, bytes - offset);
    const __m512 shift = _mm512_mul_ps(scale, zero_point);
    for (int t = 0; t < TOKENS; ++t) {
      const int64_t place = (token + t) * a.block_stride + chunk * kChunk;
      _mm512_store_ps(factor[r][t], _mm512_mul_ps(scale, _mm512_loadu_ps(a.step + place)));
      total[r][t] = _mm512_fnmadd_ps(shift, _mm512_loadu_ps(a.sum + place), total[r][t]);
    }
  }
}

// sums[r][t] = 256 * (codes . high bytes) + codes . low bytes of VECTORS vectors. Where the unpacked codes stay in
// registers the sum of high bytes is shifted before the low ones are added to it, else there are two sums.
template <int OCTETS, int VECTORS, int ROWS, int TOKENS, class Unpacker>
BITPLAN_INLINE void multiply_vectors(const Unpacker& unpacker, const __m512i (&words)[VECTORS][ROWS],
                                     const uint8_t* values, int64_t stride, __m512i (&sums)[ROWS][TOKENS]) {
  constexpr int kParts = OCTETS * VECTORS;
  constexpr bool kKeeps = kParts * ROWS <= 8;
  __m512i low[ROWS][TOKENS], codes[kKeeps ? kParts : 1][ROWS];
  for (int r = 0; r < ROWS; ++r)
    for (int t = 0; t < TOKENS; ++t) sums[r][t] = low[r][t] = _mm512_setzero_si512();
  for (int i = 0; i < kParts; ++i) {
    __m512i(&unpacked)[ROWS] = codes[kKeeps ? i : 0];
    for (int r = 0; r < ROWS; ++r) unpacked[r] = unpacker.octet(words[i / OCTETS][r], i % OCTETS);
    for (int t = 0; t < TOKENS; ++t) {
      const uint8_t* planes = values + t * stride + i * 2 * kVector;
      const __m512i h = _mm512_load_si512(planes);
      for (int r = 0; r < ROWS; ++r) sums[r][t] = _mm512_dpbusd_epi32(sums[r][t], unpacked[r], h);
      if (kKeeps) continue;
      const __m512i l = _mm512_load_si512(planes + kVector);
      for (int r = 0; r < ROWS; ++r) low[r][t] = _mm512_dpbusd_epi32(low[r][t], unpacked[r], l);
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int t = 0; t < TOKENS; ++t) sums[r][t] = _mm512_add_epi32(_mm512_slli_epi32(sums[r][t], 8), low[r][t]);
  if (!kKeeps) return;
  for (int i = 0; i < kParts; ++i)
    for (int t = 0; t < TOKENS; ++t) {
      const __m512i l = _mm512_load_si512(values + t * stride + i * 2 * kVector + kVector);
      for (int r = 0; r < ROWS; ++r) sums[r][t] = _mm512_dpbusd_epi32(sums[r][t], codes[i][r], l);
    }
}

// The sums of the lanes of four vectors.
BITPLAN_INLINE __m128 sum_four(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 low = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)));
  const __m512 high = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)));
  const __m512 four = _mm512_add_ps(low, high);
  const __m256 two = _mm256_add_ps(_mm512_castps512_ps256(four), _mm512_extractf32x8_ps(four, 1));
  return _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1));
}

template <int ROWS, int TOKENS>
BITPLAN_INLINE void write_totals(const __m512 (&total)[ROWS][TOKENS], const Output& out, int64_t token, int64_t row) {
  if constexpr (ROWS == 4 && TOKENS == 1) {
    __m128 sums = sum_four(total[0][0], total[1][0], total[2][0], total[3][0]);
    if (out.bias) sums = _mm_add_ps(sums, _mm_loadu_ps(out.bias + row));
    _mm_storeu_ps(out.values + token * out.stride + row, sums);
  } else {
    for (int r = 0; r < ROWS; ++r)
      for (int t = 0; t < TOKENS; ++t)
        out.values[(token + t) * out.stride + row + r] =
            _mm512_reduce_add_ps(total[r][t]) + (out.bias ? out.bias[row + r] : 0.0f);
  }
}

// ROWS x TOKENS outputs. A step is VECTORS vectors, which are one block, or one vector of `parts` blocks.
template <int BITS, int OCTETS, int VECTORS, bool BY_LANE, int ROWS, int TOKENS>
BITPLAN_INLINE void decode_rows(const Matrix& w, const Activations& a, int64_t token, const Output& out, int64_t row) {
  constexpr int kBytes = Unpacker<BITS, OCTETS>::kBytes, kPlanes = OCTETS * 2 * kVector;
  const Unpacker<BITS, OCTETS> unpacker;
  const int64_t row_bytes = w.row_bytes(), vectors = divide_up(w.columns, kVector * OCTETS), whole = row_bytes / kBytes;
  const int64_t ahead = 2 * ROWS * row_bytes > kLeastAhead ? 2 * ROWS * row_bytes : kLeastAhead;
  const int parts = BY_LANE ? kVector * OCTETS / a.block : 1;
  // The block that a lane belongs to, within the first step.
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i first = _mm512_srli_epi32(_mm512_mullo_epi32(lanes, _mm512_set1_epi32(parts)), 4);
  const uint8_t* stream = w.codes + row * row_bytes;
  const uint8_t* values = a.values + token * a.value_stride;
  __m512 total[ROWS][TOKENS];
  for (int r = 0; r < ROWS; ++r)
    for (int t = 0; t < TOKENS; ++t) total[r][t] = _mm512_setzero_ps();

  int64_t v = 0;
  for (int64_t chunk = 0; v < vectors; ++chunk) {
    alignas(64) float factor[ROWS][TOKENS][kChunk];
    begin_chunk<BITS>(w, a, token, row, chunk, factor, total);
    __m512i block = first;
    for (int i = 0; i < kChunk && v < vectors; i += parts, v += VECTORS) {
      __m512i words[VECTORS][ROWS], sums[ROWS][TOKENS];
      const uint8_t* place = stream + v * kBytes;
      if (v + VECTORS <= whole)
        for (int u = 0; u < VECTORS; ++u)
          for (int r = 0; r < ROWS; ++r) words[u][r] = unpacker.load_whole(place + r * row_bytes + u * kBytes);
      else
        for (int u = 0; u < VECTORS; ++u)
          for (int r = 0; r < ROWS; ++r)
            words[u][r] = unpacker.load(place + r * row_bytes + u * kBytes, row_bytes - (v + u) * kBytes);
      for (int u = 0; u < VECTORS * kBytes; u += 64)
        for (int r = 0; r < ROWS; ++r)
          // Into the second level, whose misses are many more at a time.
          _mm_prefetch(reinterpret_cast<const char*>(place + r * row_bytes + u + ahead), _MM_HINT_T1);
      multiply_vectors<OCTETS>(unpacker, words, values + v * kPlanes, a.value_stride, sums);
      for (int r = 0; r < ROWS; ++r)
        for (int t = 0; t < TOKENS; ++t) {
          const __m512 f = BY_LANE ? _mm512_permutexvar_ps(block, _mm512_load_ps(factor[r][t]))
                                   : _mm512_set1_ps(factor[r][t][i]);
          total[r][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[r][t]), f, total[r][t]);
        }
      if (BY_LANE) block = _mm512_add_epi32(block, _mm512_set1_epi32(parts));
    }
  }
  write_totals(total, out, token, row);
}

template <int BITS, int OCTETS, int VECTORS, bool BY_LANE, int TOKENS>
void decode_range(const Matrix& w, const Activations& a, int64_t token, const Output& out, int64_t first_row,
                  int64_t last_row) {
  constexpr int kRows = TOKENS == 1 ? 4 : TOKENS == 2 ? 2 : 1;
  int64_t row = first_row;
  for (; row + kRows <= last_row; row += kRows)
    decode_rows<BITS, OCTETS, VECTORS, BY_LANE, kRows, TOKENS>(w, a, token, out, row);
  for (; row < last_row; ++row) decode_rows<BITS, OCTETS, VECTORS, BY_LANE, 1, TOKENS>(w, a, token, out, row);
}

using Range = void (*)(const Matrix&, const Activations&, int64_t, const Output&, int64_t, int64_t);

template <int BITS, int OCTETS, int VECTORS, bool BY_LANE>
Range by_tokens(int tokens) {
  return tokens == 1   ? decode_range<BITS, OCTETS, VECTORS, BY_LANE, 1>
         : tokens == 2 ? decode_range<BITS, OCTETS, VECTORS, BY_LANE, 2>
                       : decode_range<BITS, OCTETS, VECTORS, BY_LANE, 4>;
}

template <int BITS, int OCTETS>
Range by_block(int block, int tokens) {
  constexpr int kCodes = kVector * OCTETS;
  if (block < kCodes) return by_tokens<BITS, OCTETS, 1, true>(tokens);
  // Blocks are 256 at most.
  if constexpr (kCodes <= 64)
    if (block == 4 * kCodes) return by_tokens<BITS, OCTETS, 4, false>(tokens);
  if constexpr (kCodes <= 128)
    if (block == 2 * kCodes) return by_tokens<BITS, OCTETS, 2, false>(tokens);
  return by_tokens<BITS, OCTETS, 1, false>(tokens);
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
            int64_t last_row, float*) {
  // Every number of tokens would be another copy of all of this; three of them are rare.
  if (tokens == 3) decode(w, a, token + 2, 1, out, first_row, last_row, nullptr);
  find_range(w.bits, a.interleave, a.block, tokens == 3 ? 2 : tokens)(w, a, token, out, first_row, last_row);
}

}  // namespace

void avx512_prefill(const Matrix&, const Activations&, const Output&, int64_t, int64_t, float*);
int64_t avx512_prefill_scratch(const Matrix&, const Activations&);

const Kernels kAvx512Kernels = {shape, quantize, decode, avx512_prefill, avx512_prefill_scratch, 32};

}  // namespace bitplan
#endif
