// Few tokens, AVX2: rows of W are read once, in order, and multiplied with vpmaddwd.
#if defined(__x86_64__)
#include "avx2.h"

namespace bitplan {
namespace {

constexpr int kWordsOfVector = 16;

int interleave_of(int bits, int block) {
  // A lane of 32 bits must not span two blocks.
  return 16 % bits == 0 && 32 / bits <= block ? 16 / bits : 1;
}

void shape(const Matrix& w, Activations& a, bool decode) {
  a.block = block_of(w);
  a.interleave = decode ? interleave_of(w.bits, a.block) : 1;
  const int64_t vector = a.interleave * kWordsOfVector, span = vector > a.block ? vector : a.block;
  a.blocks = divide_up(w.columns, a.block);
  a.value_stride = divide_up(divide_up(w.columns, span) * span * int64_t(sizeof(int16_t)), 64) * 64;
  a.block_stride = divide_up(a.blocks, 16) * 16 + 16;
}

// Rounds one block and returns the sum of its integers.
template <int INTERLEAVE>
int64_t round_block(const float* x, const Activations& a, int64_t first, int64_t last, float inverse, int16_t* values) {
  constexpr int64_t kCodes = INTERLEAVE * kWordsOfVector;
  int64_t total = 0;
  for (int64_t k = first; k < last; k += 8) {
    const __m256 part = load_floats(x + k, a.columns - k);
    alignas(32) int32_t v[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(v), _mm256_cvtps_epi32(_mm256_mul_ps(part, _mm256_set1_ps(inverse))));
    // Blocks begin at multiples of 8: all eight are in one vector.
    int16_t* to = values + k / kCodes * kCodes;
    for (int j = 0; j < 8; ++j) {
      const int64_t within = k % kCodes + j;
      to[within % INTERLEAVE * kWordsOfVector + within / INTERLEAVE] = static_cast<int16_t>(v[j]);
      total += v[j];
    }
  }
  return total;
}

template <int INTERLEAVE>
void quantize_token(const float* x, const Activations& a, int64_t token) {
  int16_t* values = reinterpret_cast<int16_t*>(a.values + token * a.value_stride);
  float* step = a.step + token * a.block_stride;
  float* sum = a.sum + token * a.block_stride;
  memset(values, 0, a.value_stride);
  memset(step, 0, a.block_stride * sizeof(float));
  memset(sum, 0, a.block_stride * sizeof(float));
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  for (int64_t b = 0; b < a.blocks; ++b) {
    const int64_t first = b * a.block, last = first + a.block < a.columns ? first + a.block : a.columns;
    __m256 largest = _mm256_setzero_ps(), not_finite = _mm256_setzero_ps();
    for (int64_t k = first; k < last; k += 8) {
      const __m256 part = load_floats(x + k, a.columns - k);
      largest = _mm256_max_ps(largest, _mm256_and_ps(part, magnitude));
      not_finite = _mm256_fmadd_ps(part, _mm256_setzero_ps(), not_finite);
    }
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, largest);
    float top = 0;
    for (float lane : lanes) top = lane > top ? lane : top;
    // Blocks that are all but zero are zero: their reciprocal would overflow.
    const float inverse = top > 1e-30f ? kLargestActivation / top : 0.0f;
    const int64_t total = round_block<INTERLEAVE>(x, a, first, last, inverse, values);
    // Infinities and NaN reach every output, as they do in floating point.
    step[b] = (inverse > 0 ? top / kLargestActivation : 0.0f) + sum_lanes(not_finite);
    sum[b] = step[b] * static_cast<float>(total);
  }
}

void quantize(const float* x, const Activations& a, int64_t first_token, int64_t last_token) {
  const auto rounded = a.interleave == 1   ? quantize_token<1>
                       : a.interleave == 2 ? quantize_token<2>
                       : a.interleave == 4 ? quantize_token<4>
                       : a.interleave == 8 ? quantize_token<8>
                                           : quantize_token<16>;
  for (int64_t t = first_token; t < last_token; ++t) rounded(x + t * a.columns, a, t);
}

// Every line is fetched this often on its way, the last time so many bytes before it is read: see avx512_decode.cpp.
constexpr int kFetches = 3;
constexpr int64_t kAhead = 4096, kFetchGap = 4096;

// Factors of the blocks of a row for each token, and what the zero points take away from the sums.
template <int BITS, int TOKENS>
BITPLAN_INLINE void prepare_row(const Matrix& w, int64_t groups, const Activations& a, int64_t token, int64_t row,
                                float* factor, float* taken) {
  const float *step = a.step + token * a.block_stride, *sum = a.sum + token * a.block_stride;
  __m256 total[TOKENS];
  for (int t = 0; t < TOKENS; ++t) total[t] = _mm256_setzero_ps();
  const auto use = [&](int64_t b, __m256 scale, __m256 shift) {
    for (int t = 0; t < TOKENS; ++t) {
      const int64_t place = t * a.block_stride + b;
      _mm256_storeu_ps(factor + place, _mm256_mul_ps(scale, _mm256_loadu_ps(step + place)));
      total[t] = _mm256_fmadd_ps(shift, _mm256_loadu_ps(sum + place), total[t]);
    }
  };
  visit_groups<BITS>(w, groups, row, [&](int64_t g, __m256 scale, __m256 shift) {
    if (groups > 1) return use(g, scale, shift);
    // One group, of several blocks.
    scale = _mm256_broadcastss_ps(_mm256_castps256_ps128(scale));
    shift = _mm256_broadcastss_ps(_mm256_castps256_ps128(shift));
    for (int64_t b = 0; b < a.blocks; b += 8) use(b, scale, shift);
  });
  for (int t = 0; t < TOKENS; ++t) taken[t] = sum_lanes(total[t]);
}

// Factors of `parts` blocks, each in its share of the lanes. No more is loaded than one store wrote: that is forwarded.
BITPLAN_INLINE __m256 spread(const float* factors, int64_t parts, __m256i part_of_lane) {
  if (parts == 1) return _mm256_broadcast_ss(factors);
  const __m256 some = parts == 2   ? _mm256_castpd_ps(_mm256_broadcast_sd(reinterpret_cast<const double*>(factors)))
                      : parts == 4 ? _mm256_broadcast_ps(reinterpret_cast<const __m128*>(factors))
                                   : _mm256_loadu_ps(factors);
  return _mm256_permutevar8x32_ps(some, part_of_lane);
}

// ROWS x TOKENS outputs; `stream` is the codes of the first row, with 32 readable bytes behind the last.
template <int BITS, int INTERLEAVE, int ROWS, int TOKENS>
BITPLAN_INLINE void decode_rows(const Matrix& w, int64_t groups, const Activations& a, int64_t token, const Output& out,
                                int64_t row, const uint8_t* stream, float* factor) {
  constexpr int kBytes = WordUnpacker<BITS, INTERLEAVE>::kBytes, kCodes = kWordsOfVector * INTERLEAVE;
  const WordUnpacker<BITS, INTERLEAVE> unpacker;
  const int64_t row_bytes = w.row_bytes(), vectors = divide_up(w.columns, kCodes);
  float taken[ROWS * TOKENS];
  for (int r = 0; r < ROWS; ++r)
    prepare_row<BITS, TOKENS>(w, groups, a, token, row + r, factor + r * TOKENS * a.block_stride, taken + r * TOKENS);

  // Either a block is one or more vectors, or a vector is some blocks, each in its share of the 8 lanes.
  const int64_t together = a.block > kCodes ? a.block / kCodes : 1;
  const int64_t parts = a.block < kCodes ? static_cast<uint32_t>(kCodes) / static_cast<uint32_t>(a.block) : 1;
  const __m256i lanes = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
  const __m256i part_of_lane = _mm256_srli_epi32(_mm256_mullo_epi32(lanes, _mm256_set1_epi32(parts)), 3);
  const uint8_t* values = a.values + token * a.value_stride;
  const uint8_t* fetched = stream + ROWS * row_bytes + kAhead + (kFetches - 1) * kFetchGap;
  __m256 total[ROWS][TOKENS];
  for (int r = 0; r < ROWS; ++r)
    for (int t = 0; t < TOKENS; ++t) total[r][t] = _mm256_setzero_ps();

  for (int64_t v = 0, block = 0; v < vectors; v += together, block += parts) {
    __m256i sums[ROWS][TOKENS];
    for (int r = 0; r < ROWS; ++r)
      for (int t = 0; t < TOKENS; ++t) sums[r][t] = _mm256_setzero_si256();
    for (int64_t u = v; u < v + together && u < vectors; ++u) {
      __m256i words[ROWS];
      for (int r = 0; r < ROWS; ++r) words[r] = unpacker.load(stream + r * row_bytes + u * kBytes);
      for (int i = 0; i < ROWS * kBytes; i += 64)
        for (int f = 0; f < kFetches; ++f)
          _mm_prefetch(reinterpret_cast<const char*>(fetched + i - f * kFetchGap), _MM_HINT_T1);
      fetched += ROWS * kBytes;
      for (int i = 0; i < INTERLEAVE; ++i)
        for (int t = 0; t < TOKENS; ++t) {
          const int64_t offset = (u * INTERLEAVE + i) * kWordsOfVector * sizeof(int16_t);
          const __m256i x = _mm256_load_si256(reinterpret_cast<const __m256i*>(values + t * a.value_stride + offset));
          for (int r = 0; r < ROWS; ++r)
            sums[r][t] = _mm256_add_epi32(sums[r][t], _mm256_madd_epi16(unpacker.part(words[r], i), x));
        }
    }
    for (int r = 0; r < ROWS; ++r)
      for (int t = 0; t < TOKENS; ++t) {
        const float* f = factor + (r * TOKENS + t) * a.block_stride + block;
        const __m256 by_lane = spread(f, parts, part_of_lane);
        total[r][t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[r][t]), by_lane, total[r][t]);
      }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int t = 0; t < TOKENS; ++t)
      out.write(token + t, row + r, sum_lanes(total[r][t]) - taken[r * TOKENS + t]);
}

template <int BITS, int INTERLEAVE, int TOKENS>
void decode_range(const Matrix& w, const Activations& a, int64_t token, const Output& out, int64_t first_row,
                  int64_t last_row, float* scratch) {
  constexpr int kRows = TOKENS == 1 ? 4 : TOKENS == 2 ? 2 : 1;
  // Behind the last row of the weight nothing may be read: rows from here on are copied first.
  const int64_t row_bytes = w.row_bytes(), unsafe = w.rows - divide_up(32, row_bytes);
  const int64_t groups = w.groups();
  const int64_t safe_end = last_row < unsafe ? last_row : unsafe;
  int64_t row = first_row;
  for (; row + kRows <= safe_end; row += kRows)
    decode_rows<BITS, INTERLEAVE, kRows, TOKENS>(w, groups, a, token, out, row, w.codes + row * row_bytes, scratch);
  uint8_t* copy = reinterpret_cast<uint8_t*>(scratch + kDecodeTokens * a.block_stride);
  for (; row < last_row; ++row) {
    memcpy(copy, w.codes + row * row_bytes, row_bytes);
    decode_rows<BITS, INTERLEAVE, 1, TOKENS>(w, groups, a, token, out, row, copy, scratch);
  }
}

using Range = void (*)(const Matrix&, const Activations&, int64_t, const Output&, int64_t, int64_t, float*);

template <int BITS, int INTERLEAVE>
Range by_tokens(int tokens) {
  static const Range ranges[] = {decode_range<BITS, INTERLEAVE, 1>, decode_range<BITS, INTERLEAVE, 2>,
                                 decode_range<BITS, INTERLEAVE, 3>, decode_range<BITS, INTERLEAVE, 4>};
  return ranges[tokens - 1];
}

Range find_range(int bits, int interleave, int tokens) {
  switch (bits) {
    case 1: return interleave == 1 ? by_tokens<1, 1>(tokens) : by_tokens<1, 16>(tokens);
    case 2: return interleave == 1 ? by_tokens<2, 1>(tokens) : by_tokens<2, 8>(tokens);
    case 3: return by_tokens<3, 1>(tokens);
    case 4: return by_tokens<4, 4>(tokens);
    case 5: return by_tokens<5, 1>(tokens);
    case 6: return by_tokens<6, 1>(tokens);
    case 7: return by_tokens<7, 1>(tokens);
    default: return by_tokens<8, 2>(tokens);
  }
}

void decode(const Matrix& w, const Activations& a, int64_t token, int tokens, const Output& out, int64_t first_row,
            int64_t last_row, float* scratch) {
  find_range(w.bits, a.interleave, tokens)(w, a, token, out, first_row, last_row, scratch);
}

}  // namespace

void avx2_prefill(const Matrix&, const Activations&, const Output&, int64_t, int64_t, float*);
int64_t avx2_prefill_scratch(const Matrix&, const Activations&);

namespace {
int64_t scratch_floats(const Matrix& w, const Activations& a) {
  // The factors of at most four pairs of row and token, and a row with room behind it.
  const int64_t decoding = kDecodeTokens * a.block_stride + w.row_bytes() / 4 + 32;
  const int64_t prefilling = avx2_prefill_scratch(w, a);
  return decoding > prefilling ? decoding : prefilling;
}
}  // namespace

const Kernels kAvx2Kernels = {shape, quantize, decode, avx2_prefill, scratch_floats, 16};

}  // namespace bitplan
#endif
