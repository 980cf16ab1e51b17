// Few tokens, AVX-512: rows of W are read once, in order, four at a time, and multiplied with vpdpbusd.
#if defined(__x86_64__)
#include "avx512.h"

namespace bitplan {
namespace {

// Blocks whose factors are in the lanes of one vector.
constexpr int kChunk = 16;
// What is fetched lies at least so many bytes behind the rows that are multiplied: the latency of memory times its
// bandwidth.
constexpr int64_t kAhead = 4096;
// How often a line is fetched, and how many bytes lie between. A prefetch is dropped where too many misses are under
// way, as they are where a line takes so little work that many are asked for in a row. To ask again costs less than to
// miss: with one fetch each, rows of 8 bits came in at 0.68 of the bandwidth of memory.
template <int BITS>
constexpr int kFetches = BITS < 4 ? 1 : BITS < 7 ? 3 : BITS == 7 ? 4 : 6;
constexpr int64_t kFetchGap = 4096;
// Rows between a scale and the one that is fetched with it, in numbers of rows that are multiplied together.
constexpr int kScalesAhead = 4;

BITPLAN_INLINE void fetch_near(const void* place) {
  _mm_prefetch(static_cast<const char*>(place), _MM_HINT_T0);
}

// Zero points of sixteen groups, the first at a multiple of 16; those past the last are not read and any number.
template <int BITS>
BITPLAN_INLINE __m512 load_zero_points(const uint8_t* stream, int64_t left) {
  static constexpr Bytes kPlace = place_bytes(BITS), kShift = shift_bytes(BITS);
  const __mmask16 present = left >= 2 * BITS ? (1 << 2 * BITS) - 1 : (1 << left) - 1;
  const __m128i place = _mm_load_si128(reinterpret_cast<const __m128i*>(kPlace.values));
  const __m128i shift = _mm_load_si128(reinterpret_cast<const __m128i*>(kShift.values));
  const __m128i words = _mm_shuffle_epi8(_mm_maskz_loadu_epi8(present, stream), place);
  const __m128i codes = _mm_multishift_epi64_epi8(shift, words);
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_and_si128(codes, _mm_set1_epi8((1 << BITS) - 1))));
}

// Where the scales of a matrix are, and what goes with them; found once, for divisions are slow.
struct Groups {
  int64_t count, zero_point_bytes;
  int blocks_of_vector;  // 1 where a block is one vector or more
  enum { kCentre, kZeroPoints, kBinary, kLevels } kind;

  Groups(const Matrix& w, int codes_of_vector, int block)
      : count(w.groups()), zero_point_bytes(w.zero_point_bytes()),
        blocks_of_vector(block < codes_of_vector ? codes_of_vector / block : 1) {
    kind = w.element == Element::kLevels   ? kLevels
           : w.element == Element::kBinary ? kBinary
           : w.zero_point                  ? kZeroPoints
                                           : kCentre;
  }
};

template <class T>
BITPLAN_INLINE __m512 load_numbers(const T* stored, int64_t left, bool one) {
  if constexpr (sizeof(T) == 2) return one ? _mm512_cvtph_ps(_mm256_set1_epi16(*stored)) : load_scale(stored, left);
  const __mmask16 present = left >= 16 ? 0xffff : (1 << left) - 1;
  return one ? _mm512_set1_ps(*stored) : _mm512_maskz_loadu_ps(present, stored);
}

// scale and scale * zero_point of the groups of a chunk, of ROWS rows.
template <int BITS, int ROWS>
BITPLAN_INLINE void load_rows(const Matrix& w, const Groups& groups, int64_t row, int64_t chunk, __m512 (&scale)[ROWS],
                              __m512 (&shift)[ROWS]) {
  const int64_t count = groups.count, left = count - chunk * kChunk;
  // One group is that of all chunks.
  const bool one = count == 1;
  const int64_t first = one ? row : row * count + chunk * kChunk;
  if (groups.kind == Groups::kLevels) {
    for (int r = 0; r < ROWS; ++r) {
      scale[r] = load_numbers(w.step() + first + r * count, left, one);
      shift[r] = load_numbers(w.shift() + first + r * count, left, one);
    }
    return;
  }
  for (int r = 0; r < ROWS; ++r) {
    scale[r] = load_numbers(w.scale + first + r * count, left, one);
    fetch_near(w.scale + first + (r + kScalesAhead * ROWS) * count);
  }
  if (groups.kind == Groups::kCentre) {
    for (int r = 0; r < ROWS; ++r) shift[r] = _mm512_mul_ps(scale[r], _mm512_set1_ps(w.centre));
    return;
  }
  if (BITS == 1 && groups.kind == Groups::kBinary) {
    for (int r = 0; r < ROWS; ++r) {
      const __m512 low = load_numbers(w.low() + first + r * count, left, one);
      scale[r] = _mm512_sub_ps(scale[r], low);
      shift[r] = _mm512_sub_ps(_mm512_setzero_ps(), low);
    }
    return;
  }
  const int64_t bytes = groups.zero_point_bytes, offset = one ? 0 : chunk * 2 * BITS;
  for (int r = 0; r < ROWS; ++r) {
    const uint8_t* stream = w.zero_point + (row + r) * bytes + offset;
    fetch_near(stream + kScalesAhead * ROWS * bytes);
    shift[r] = _mm512_mul_ps(scale[r], one ? _mm512_set1_ps(*stream) : load_zero_points<BITS>(stream, bytes - offset));
  }
}

// The same by a call where there are several rows: within a kernel the compiler would leave their loops as they are and
// keep all sums in memory for it. A single row has no loops, and a call is long beside it.
template <int BITS, int ROWS>
__attribute__((noinline)) void call_load_rows(const Matrix& w, const Groups& groups, int64_t row, int64_t chunk,
                                              __m512 (&scale)[ROWS], __m512 (&shift)[ROWS]) {
  load_rows<BITS, ROWS>(w, groups, row, chunk, scale, shift);
}

// factor = scale * step of the blocks of a chunk for each row and token; total -= what the zero points take away.
template <int BITS, int ROWS, int TOKENS>
BITPLAN_INLINE void begin_chunk(const Matrix& w, const Groups& groups, const Activations& a, int64_t token, int64_t row,
                                int64_t chunk, float (&factor)[ROWS][TOKENS][kChunk], __m512 (&total)[ROWS][TOKENS]) {
  __m512 scale[ROWS], shift[ROWS];
  if constexpr (ROWS == 1)
    load_rows<BITS, ROWS>(w, groups, row, chunk, scale, shift);
  else
    call_load_rows<BITS, ROWS>(w, groups, row, chunk, scale, shift);
  for (int t = 0; t < TOKENS; ++t) {
    const int64_t place = (token + t) * a.block_stride + chunk * kChunk;
    const __m512 step = _mm512_loadu_ps(a.step + place), sum = _mm512_loadu_ps(a.sum + place);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      _mm512_store_ps(factor[r][t], _mm512_mul_ps(scale[r], step));
      total[r][t] = _mm512_fnmadd_ps(shift[r], sum, total[r][t]);
    }
  }
}

// sums[r][t] = 256 * (codes . high bytes) + codes . low bytes of VECTORS vectors. Where the unpacked codes stay in
// registers the sum of high bytes is shifted before the low ones are added to it, else there are two sums.
template <int PARTS, int VECTORS, int ROWS, int TOKENS, class Unpacker>
BITPLAN_INLINE void multiply_vectors(const Unpacker& unpacker, const __m512i (&words)[VECTORS][ROWS],
                                     const uint8_t* values, int64_t stride, __m512i (&sums)[ROWS][TOKENS]) {
  constexpr int kParts = PARTS * VECTORS;
  constexpr bool kKeeps = kParts * ROWS <= 8;
  __m512i low[ROWS][TOKENS], codes[kKeeps ? kParts : 1][ROWS];
  for (int r = 0; r < ROWS; ++r)
    for (int t = 0; t < TOKENS; ++t) sums[r][t] = low[r][t] = _mm512_setzero_si512();
  for (int i = 0; i < kParts; ++i) {
    __m512i(&unpacked)[ROWS] = codes[kKeeps ? i : 0];
    for (int r = 0; r < ROWS; ++r) unpacked[r] = unpacker.part(words[i / PARTS][r], i % PARTS);
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
    const __m128 added = out.added ? _mm_loadu_ps(out.addend(token, row)) : _mm_setzero_ps();
    _mm_storeu_ps(out.place(token, row), _mm_fmadd_ps(sums, _mm_set1_ps(out.factor), added));
  } else {
    for (int r = 0; r < ROWS; ++r)
      for (int t = 0; t < TOKENS; ++t) out.write(token + t, row + r, _mm512_reduce_add_ps(total[r][t]));
  }
}

// ROWS x TOKENS outputs. A step is VECTORS vectors, which are one block, or one vector of `parts` blocks.
template <int BITS, int PARTS, int VECTORS, bool BY_LANE, int ROWS, int TOKENS>
BITPLAN_INLINE void decode_rows(const Matrix& w, const Groups& groups, const Activations& a, int64_t token,
                                const Output& out, int64_t row) {
  constexpr int kBytes = Unpacker<BITS, PARTS>::kBytes, kPlanes = PARTS * 2 * kVector;
  const Unpacker<BITS, PARTS> unpacker;
  const int64_t row_bytes = w.row_bytes(), vectors = divide_up(w.columns, kVector * PARTS);
  // Vectors that may be loaded whole: activations behind a row are zero, so what follows it does no harm where it is there.
  const int64_t readable = (w.rows - row - ROWS + 1) * row_bytes;
  const int64_t whole = readable < kVector ? 0 : (readable - kVector) / kBytes + 1;
  const uint8_t* fetched = w.codes + (row + ROWS) * row_bytes + kAhead + (kFetches<BITS> - 1) * kFetchGap;
  const int parts = BY_LANE ? groups.blocks_of_vector : 1;
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
    begin_chunk<BITS>(w, groups, a, token, row, chunk, factor, total);
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
      // Into the second level, whose misses are many more at a time, in the order of addresses: memory likes it more
      // than as many streams as there are rows.
      for (int u = 0; u < ROWS * VECTORS * kBytes; u += 64)
        for (int i = 0; i < kFetches<BITS>; ++i)
          _mm_prefetch(reinterpret_cast<const char*>(fetched + u - i * kFetchGap), _MM_HINT_T1);
      fetched += ROWS * VECTORS * kBytes;
      multiply_vectors<PARTS>(unpacker, words, values + v * kPlanes, a.value_stride, sums);
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

template <int BITS, int PARTS, int VECTORS, bool BY_LANE, int TOKENS>
void decode_range(const Matrix& w, const Activations& a, int64_t token, const Output& out, int64_t first_row,
                  int64_t last_row) {
  constexpr int kRows = TOKENS == 1 ? 4 : TOKENS == 2 ? 2 : 1;
  const Groups groups(w, kVector * PARTS, a.block);
  int64_t row = first_row;
  for (; row + kRows <= last_row; row += kRows)
    decode_rows<BITS, PARTS, VECTORS, BY_LANE, kRows, TOKENS>(w, groups, a, token, out, row);
  for (; row < last_row; ++row) decode_rows<BITS, PARTS, VECTORS, BY_LANE, 1, TOKENS>(w, groups, a, token, out, row);
}

using Range = void (*)(const Matrix&, const Activations&, int64_t, const Output&, int64_t, int64_t);

template <int BITS, int PARTS, int VECTORS, bool BY_LANE>
Range by_tokens(int tokens) {
  return tokens == 1   ? decode_range<BITS, PARTS, VECTORS, BY_LANE, 1>
         : tokens == 2 ? decode_range<BITS, PARTS, VECTORS, BY_LANE, 2>
                       : decode_range<BITS, PARTS, VECTORS, BY_LANE, 4>;
}

template <int BITS, int PARTS>
Range by_block(int block, int tokens) {
  constexpr int kCodes = kVector * PARTS;
  if (block < kCodes) return by_tokens<BITS, PARTS, 1, true>(tokens);
  // Blocks are 256 at most.
  if constexpr (kCodes <= 64)
    if (block == 4 * kCodes) return by_tokens<BITS, PARTS, 4, false>(tokens);
  if constexpr (kCodes <= 128)
    if (block == 2 * kCodes) return by_tokens<BITS, PARTS, 2, false>(tokens);
  return by_tokens<BITS, PARTS, 1, false>(tokens);
}

Range find_range(int bits, int parts, int block, int tokens) {
  switch (10 * bits + parts) {
    case 14: return by_block<1, 4>(block, tokens);
    case 18: return by_block<1, 8>(block, tokens);
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

void avx512_shape(const Matrix&, Activations&, bool decode);
void avx512_quantize(const float* x, const Activations&, int64_t first_token, int64_t last_token);
void avx512_prefill(const Matrix&, const Activations&, const Output&, int64_t, int64_t, float*);
int64_t avx512_prefill_scratch(const Matrix&, const Activations&);

const Kernels kAvx512Kernels = {avx512_shape,   avx512_quantize,         decode,
                                avx512_prefill, avx512_prefill_scratch, 32};

}  // namespace bitplan
#endif
