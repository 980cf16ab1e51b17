// Few tokens and few bits, AVX-512: products by lookup, in an execution layout of their own.
//
// A code of b bits is sum_p 2^p bit_p, so a product with four columns is sum_p 2^p T[the four bits of plane p], where
// T holds the 16 sums of the four activations: one vpermb instead of unpacking the codes and multiplying them. Below 4
// bits that is less work, and it is the work that limits there, not memory.
//
// A step is 16 columns of a tile of 16 rows. Plane p of it is 64 nibbles, one for each row and four columns; nibble
// 4 * row + quad is in lane `row` of 32 bits. Its tables, 16 sums of each of four quads, are one vector: vpermb takes 6
// bits, the nibble and the quad. vpdpbusd adds the four quads of a row and the factor 2^p. What is added stays
// in the lane of its row, so nothing is summed across lanes, and scales of 16 rows are one vector.
//
// Sums of four 15-bit activations have 17 bits. Half of the sum of all four is taken off, `middle`, so that 16 are
// enough: a vector of their high bytes, signed, and one of their low bytes.
//
// Papers: Park et al., LUT-GEMM, 2022, arXiv:2206.09557; Wei et al., T-MAC, 2024, arXiv:2407.00088. There a register
// holds the table of one quad and lanes are many rows; sums are then of 8 bits and lose precision.
#if defined(__x86_64__)
#include "avx512.h"
#include "lookup.h"

namespace bitplan {
namespace {

// The largest activation whose sums of four, their middle taken off, have 16 bits.
constexpr int kLargest = 16383;
constexpr int kTableBytes = 2 * kVector;  // of a step: high bytes, low bytes
// Every line is fetched three times on its way, 12, 8 and 4 KiB before it is read: see avx512_decode.cpp. One fetch made
// 20 GB/s where three make 29.
constexpr int kFetches = 3;
constexpr int64_t kAhead = 4096;

// The 16 sums of four activations, less their middle, in the lanes of `bits`.
BITPLAN_INLINE __m256i sum_subsets(__m256i x0, __m256i x1, __m256i x2, __m256i x3, __m256i middle) {
  const __m256i index = _mm256_set_epi16(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const auto chosen = [&](int bit, __m256i x) {
    return _mm256_maskz_mov_epi16(_mm256_test_epi16_mask(index, _mm256_set1_epi16(1 << bit)), x);
  };
  // Sums of 17 bits wrap; less the middle they have 16 and are exact again.
  const __m256i low = _mm256_add_epi16(chosen(0, x0), chosen(1, x1));
  const __m256i high = _mm256_add_epi16(chosen(2, x2), chosen(3, x3));
  return _mm256_sub_epi16(_mm256_add_epi16(low, high), middle);
}

// Tables of sixteen activations; returns the sum of the middles of the four quads.
int store_tables(uint8_t* tables, __m512i v) {
  alignas(64) int32_t x[16];
  _mm512_store_si512(x, v);
  int middles = 0;
  for (int q = 0; q < 4; ++q) {
    const int32_t* quad = x + 4 * q;
    const int middle = (quad[0] + quad[1] + quad[2] + quad[3]) >> 1;
    middles += middle;
    const __m256i sums = sum_subsets(_mm256_set1_epi16(quad[0]), _mm256_set1_epi16(quad[1]), _mm256_set1_epi16(quad[2]),
                                     _mm256_set1_epi16(quad[3]), _mm256_set1_epi16(middle));
    _mm_store_si128(reinterpret_cast<__m128i*>(tables + 16 * q), _mm256_cvtepi16_epi8(_mm256_srli_epi16(sums, 8)));
    _mm_store_si128(reinterpret_cast<__m128i*>(tables + kVector + 16 * q), _mm256_cvtepi16_epi8(sums));
  }
  return middles;
}

void quantize_token(const float* x, const Activations& a, int64_t token) {
  uint8_t* tables = a.values + token * a.value_stride;
  float* step = a.step + token * a.block_stride;
  float* sum = a.sum + token * a.block_stride;
  float* middle = a.middle + token * a.block_stride;
  const auto present = [&](int64_t k) -> __mmask16 {
    return a.columns - k >= 16 ? 0xffff : a.columns > k ? (1 << (a.columns - k)) - 1 : 0;
  };
  for (int64_t b = 0; b < a.blocks; ++b) {
    const int64_t first = b * a.block, padded = divide_up(a.columns, kLookupSpan) * kLookupSpan;
    const int64_t last = first + a.block < padded ? first + a.block : padded;
    __m512 largest = _mm512_setzero_ps(), not_finite = _mm512_setzero_ps();
    for (int64_t k = first; k < last; k += 16) {
      const __m512 part = _mm512_maskz_loadu_ps(present(k), x + k);
      largest = _mm512_max_ps(largest, _mm512_abs_ps(part));
      not_finite = _mm512_fmadd_ps(part, _mm512_setzero_ps(), not_finite);
    }
    const float top = _mm512_reduce_max_ps(largest);
    // Blocks that are all but zero are zero: their reciprocal would overflow.
    const float inverse = top > 1e-30f ? kLargest / top : 0.0f;
    __m512i total = _mm512_setzero_si512();
    int middles = 0;
    for (int64_t k = first; k < last; k += 16) {
      const __m512 part = _mm512_maskz_loadu_ps(present(k), x + k);
      const __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(part, _mm512_set1_ps(inverse)));
      total = _mm512_add_epi32(total, v);
      middles += store_tables(tables + k / 16 * kTableBytes, v);
    }
    // Infinities and NaN reach every output, as they do in floating point.
    step[b] = (inverse > 0 ? top / kLargest : 0.0f) + _mm512_reduce_add_ps(not_finite);
    sum[b] = step[b] * static_cast<float>(_mm512_reduce_add_epi32(total));
    middle[b] = step[b] * static_cast<float>(middles);
  }
}

struct Lookup {
  __m512i mask, quad, factor[3];

  __attribute__((always_inline)) inline Lookup() {
    mask = _mm512_set1_epi8(15);
    quad = _mm512_set1_epi32(0x30201000);
    for (int p = 0; p < 3; ++p) factor[p] = _mm512_set1_epi8(1 << p);
  }

  __attribute__((always_inline)) inline void add(__m512i bytes, int plane, __m512i high_sums, __m512i low_sums,
                                                 __m512i& high, __m512i& low) const {
    const __m512i index = _mm512_ternarylogic_epi32(bytes, mask, quad, 0xea);  // (bytes & mask) | quad
    high = _mm512_dpbusd_epi32(high, factor[plane], _mm512_permutexvar_epi8(index, high_sums));
    low = _mm512_dpbusd_epi32(low, _mm512_permutexvar_epi8(index, low_sums), factor[plane]);
  }
};

// sums of 32 columns of TILES x TOKENS; `codes` are those of the first tile.
template <int BITS, int TILES, int TOKENS>
BITPLAN_INLINE void look_up(const Lookup& lookup, const uint8_t* codes, const uint8_t* tables, int64_t stride,
                            __m512i (&high)[TILES][TOKENS], __m512i (&low)[TILES][TOKENS]) {
  for (int r = 0; r < TILES; ++r) {
    __m512i nibbles[2 * BITS];
    for (int i = 0; i < BITS; ++i) {
      nibbles[2 * i] = _mm512_load_si512(codes + (r * BITS + i) * kVector);
      nibbles[2 * i + 1] = _mm512_srli_epi16(nibbles[2 * i], 4);
    }
    for (int t = 0; t < TOKENS; ++t)
      for (int s = 0; s < 2; ++s) {
        const uint8_t* place = tables + t * stride + s * kTableBytes;
        const __m512i high_sums = _mm512_load_si512(place), low_sums = _mm512_load_si512(place + kVector);
        for (int p = 0; p < BITS; ++p)
          lookup.add(nibbles[nibble_place(BITS, s, p)], p, high_sums, low_sums, high[r][t], low[r][t]);
      }
  }
}

template <int BITS>
BITPLAN_INLINE __m512 zero_points_of(const uint8_t* stream) {
  static constexpr Bytes kPlace = place_bytes(BITS), kShift = shift_bytes(BITS);
  const __m128i place = _mm_load_si128(reinterpret_cast<const __m128i*>(kPlace.values));
  const __m128i shift = _mm_load_si128(reinterpret_cast<const __m128i*>(kShift.values));
  // Eight bytes may be read: the layout is padded.
  const __m128i words = _mm_shuffle_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(stream)), place);
  const __m128i codes = _mm_multishift_epi64_epi8(shift, words);
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_and_si128(codes, _mm_set1_epi8((1 << BITS) - 1))));
}

// weight = scale * code - shift, of the rows of a tile.
struct Group {
  __m512 scale, shift;
};

BITPLAN_INLINE __m512 load_sixteen(const void* halves) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(halves)));
}

// The group at a place in the layout's order.
template <int BITS>
BITPLAN_INLINE Group load_group(const LookupLayout& l, int64_t place) {
  const __m512 scale = load_sixteen(l.scale + place * 16);
  const uint8_t* zero_point = l.zero_point ? l.zero_point + place * l.zero_point_bytes : nullptr;
  if (BITS == 1 && l.binary) {
    const __m512 low = load_sixteen(zero_point);
    return {_mm512_sub_ps(scale, low), _mm512_sub_ps(_mm512_setzero_ps(), low)};
  }
  const __m512 z = zero_point ? zero_points_of<BITS>(zero_point) : _mm512_set1_ps(l.centre);
  return {scale, _mm512_mul_ps(scale, z)};
}

// Output of TILES tiles from `first`, of a chunk that has `chunk` tiles and begins at tile `begin`.
template <int BITS, int TILES, int TOKENS>
BITPLAN_INLINE void decode_tiles(const LookupLayout& l, const Activations& a, int64_t token, const Output& out,
                                 int64_t begin, int64_t chunk, int64_t first) {
  const Lookup lookup;
  const int64_t each = first - begin, spans = l.spans;
  const int64_t span_bytes = chunk * BITS * kVector;
  const uint8_t* codes = l.codes + begin * l.tile_bytes() + each * BITS * kVector;
  const uint8_t* tables = a.values + token * a.value_stride;
  const int64_t block_spans = a.block / kLookupSpan;
  __m512 total[TILES][TOKENS];
  for (int r = 0; r < TILES; ++r)
    for (int t = 0; t < TOKENS; ++t) total[r][t] = _mm512_setzero_ps();
  for (int64_t b = 0, span = 0; span < spans; ++b) {
    __m512i high[TILES][TOKENS], low[TILES][TOKENS];
    for (int r = 0; r < TILES; ++r)
      for (int t = 0; t < TOKENS; ++t) high[r][t] = low[r][t] = _mm512_setzero_si512();
    const int64_t stop = span + block_spans < spans ? span + block_spans : spans;
    for (; span < stop; ++span) {
      look_up<BITS, TILES, TOKENS>(lookup, codes, tables + span * 2 * kTableBytes, a.value_stride, high, low);
      for (int i = 0; i < TILES * BITS; ++i)
        for (int f = 1; f <= kFetches; ++f)
          _mm_prefetch(reinterpret_cast<const char*>(codes + f * kAhead + i * kVector), _MM_HINT_T1);
      codes += span_bytes;
    }
    const int64_t group = l.groups == 1 ? 0 : b * chunk;
    for (int r = 0; r < TILES; ++r) {
      const Group values = load_group<BITS>(l, (begin * l.groups + each) + group + r);
      for (int t = 0; t < TOKENS; ++t) {
        const int64_t place = (token + t) * a.block_stride + b;
        const __m512i both = _mm512_add_epi32(_mm512_slli_epi32(high[r][t], 8), low[r][t]);
        const __m512 middle = _mm512_set1_ps(a.middle[place] * ((1 << BITS) - 1));
        const __m512 sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(both), _mm512_set1_ps(a.step[place]), middle);
        total[r][t] = _mm512_fnmadd_ps(values.shift, _mm512_set1_ps(a.sum[place]), total[r][t]);
        total[r][t] = _mm512_fmadd_ps(values.scale, sum, total[r][t]);
      }
    }
  }
  for (int r = 0; r < TILES; ++r) {
    const int64_t row = (first + r) * 16, left = l.rows - row;
    const __mmask16 present = left >= 16 ? 0xffff : (1 << left) - 1;
    for (int t = 0; t < TOKENS; ++t) {
      const __m512 added =
          out.added ? _mm512_maskz_loadu_ps(present, out.addend(token + t, row)) : _mm512_setzero_ps();
      _mm512_mask_storeu_ps(out.place(token + t, row), present,
                            _mm512_fmadd_ps(total[r][t], _mm512_set1_ps(out.factor), added));
    }
  }
}

template <int BITS, int TOKENS>
void decode_range(const LookupLayout& l, const Activations& a, int64_t token, const Output& out, int64_t first_row,
                  int64_t last_row) {
  constexpr int kTiles = TOKENS <= 2 ? kLookupTiles : 1;
  const int64_t stop = divide_up(last_row, 16);
  for (int64_t begin = first_row / 16; begin < stop; begin += kLookupTiles) {
    const int64_t chunk = l.chunk(begin);
    int64_t tile = begin;
    for (; tile + kTiles <= begin + chunk; tile += kTiles)
      decode_tiles<BITS, kTiles, TOKENS>(l, a, token, out, begin, chunk, tile);
    for (; tile < begin + chunk; ++tile) decode_tiles<BITS, 1, TOKENS>(l, a, token, out, begin, chunk, tile);
  }
}

template <int BITS>
void by_tokens(const LookupLayout& l, const Activations& a, int64_t token, int tokens, const Output& out,
               int64_t first_row, int64_t last_row) {
  if (tokens == 3) by_tokens<BITS>(l, a, token + 2, 1, out, first_row, last_row);
  const auto range = tokens == 1 ? decode_range<BITS, 1> : tokens == 4 ? decode_range<BITS, 4> : decode_range<BITS, 2>;
  range(l, a, token, out, first_row, last_row);
}

void lookup_shape(const Matrix& w, Activations& a, bool) {
  a.block = block_of(w);
  a.interleave = 0;
  a.blocks = divide_up(w.columns, a.block);
  a.value_stride = divide_up(w.columns, kLookupSpan) * 2 * kTableBytes;
  a.block_stride = divide_up(a.blocks, 16) * 16 + 16;
}

void lookup_quantize(const float* x, const Activations& a, int64_t first_token, int64_t last_token) {
  for (int64_t t = first_token; t < last_token; ++t) quantize_token(x + t * a.columns, a, t);
}

void lookup_decode(const Matrix& w, const Activations& a, int64_t token, int tokens, const Output& out,
                   int64_t first_row, int64_t last_row, float*) {
  const LookupLayout l(w, const_cast<uint8_t*>(w.lookup));
  const auto by_bits = w.bits == 1 ? by_tokens<1> : w.bits == 2 ? by_tokens<2> : by_tokens<3>;
  by_bits(l, a, token, tokens, out, first_row, last_row);
}

int64_t no_scratch(const Matrix&, const Activations&) { return 0; }

}  // namespace

const Kernels kLookupKernels = {lookup_shape, lookup_quantize, lookup_decode, nullptr, no_scratch, 16 * kLookupTiles};

}  // namespace bitplan
#endif
