// Unpacking with AVX2, into 16-bit integers for vpmaddwd.
//
// Two ways. Where 16 is a multiple of the width, a vector is 32 bytes of the stream, and code i of every 16-bit word is
// a shift and a mask away: `interleave` = 16 / bits codes of a word, code w * interleave + i in word w of part i.
// Otherwise, and in prefill, interleave is 1: vpshufb puts the two bytes that hold code j into word j, a multiplication
// shifts the code to the top of its word, a shift brings it down.
#pragma once
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include <immintrin.h>
#include <string.h>

#include "packed_matrix.h"

#define BITPLAN_INLINE static inline __attribute__((always_inline))

namespace bitplan {

struct Words {
  alignas(32) uint8_t bytes[32];
  alignas(32) uint16_t factors[16];
};

// Bytes of the window of each of 16 codes, and the factor that moves the code to the top of it.
constexpr Words list_words(int bits) {
  Words table{};
  for (int j = 0; j < 16; ++j) {
    table.bytes[2 * j] = j * bits / 8;
    table.bytes[2 * j + 1] = j * bits / 8 + 1;
    table.factors[j] = 1 << (16 - bits - j * bits % 8);
  }
  return table;
}

template <int BITS>
constexpr Words kWords = list_words(BITS);

template <int BITS, int INTERLEAVE>
struct WordUnpacker {
  static constexpr int kBytes = 2 * BITS * INTERLEAVE;
  __m256i bytes, factors;

  __attribute__((always_inline)) inline WordUnpacker() {
    bytes = _mm256_load_si256(reinterpret_cast<const __m256i*>(kWords<BITS>.bytes));
    factors = _mm256_load_si256(reinterpret_cast<const __m256i*>(kWords<BITS>.factors));
  }

  // Reads 32 bytes, or 16 where interleave is 1.
  __attribute__((always_inline)) inline __m256i load(const uint8_t* stream) const {
    if (INTERLEAVE > 1) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(stream));
    const __m128i window = _mm_loadu_si128(reinterpret_cast<const __m128i*>(stream));
    return BITS == 8 ? _mm256_cvtepu8_epi16(window) : _mm256_broadcastsi128_si256(window);
  }

  // 16 codes.
  __attribute__((always_inline)) inline __m256i part(__m256i words, int i) const {
    if (INTERLEAVE > 1) {
      const __m256i shifted = _mm256_srli_epi16(words, i * BITS);
      return i + 1 == INTERLEAVE ? shifted : _mm256_and_si256(shifted, _mm256_set1_epi16((1 << BITS) - 1));
    }
    if (BITS == 8) return words;
    return _mm256_srli_epi16(_mm256_mullo_epi16(_mm256_shuffle_epi8(words, bytes), factors), 16 - BITS);
  }
};

// Sixteen codes at a place of a stream of `bytes` bytes, as 16-bit integers; past the end they are zero.
template <int BITS>
BITPLAN_INLINE __m256i read_codes(const uint8_t* stream, int64_t bytes, int64_t offset) {
  const WordUnpacker<BITS, 1> unpacker;
  if (offset + 16 <= bytes) return unpacker.part(unpacker.load(stream + offset), 0);
  alignas(16) uint8_t window[16] = {};
  memcpy(window, stream + offset, bytes - offset);
  return unpacker.part(unpacker.load(window), 0);
}

BITPLAN_INLINE float sum_lanes(__m256 v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

// Eight consecutive float16 numbers, those past `left` as zeros; `readable` of them may be read.
BITPLAN_INLINE __m256 load_scale(const uint16_t* scale, int64_t left, int64_t readable) {
  static constexpr int32_t kMask[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
  if (readable >= 8) {
    const __m256 numbers = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scale)));
    const int32_t* mask = kMask + (left < 8 ? 8 - left : 0);
    return _mm256_and_ps(numbers, _mm256_loadu_ps(reinterpret_cast<const float*>(mask)));
  }
  alignas(16) uint16_t padded[8] = {};
  memcpy(padded, scale, left * sizeof(uint16_t));
  return _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(padded)));
}

BITPLAN_INLINE __m256 load_scale(const uint16_t* scale, int64_t left) { return load_scale(scale, left, left); }

// The same of the two values of one bit, as a scale and what is taken off: weight = scale * code - shift.
BITPLAN_INLINE void read_values(const Matrix& w, int64_t row, float* scale, float* shift) {
  const int64_t groups = w.groups();
  for (int64_t g = 0; g < groups; g += 8) {
    const int64_t place = row * groups + g, readable = w.rows * groups - place;
    const __m256 high = load_scale(w.scale + place, groups - g, readable);
    const __m256 low = load_scale(w.low() + place, groups - g, readable);
    _mm256_storeu_ps(scale + g, _mm256_sub_ps(high, low));
    _mm256_storeu_ps(shift + g, _mm256_sub_ps(_mm256_setzero_ps(), low));
  }
}

// scale and scale * zero_point of the groups of a row, in float32; written in whole vectors.
template <int BITS>
BITPLAN_INLINE void read_groups(const Matrix& w, int64_t row, float* scale, float* shift) {
  if (BITS == 1 && w.element == kBinary) return read_values(w, row, scale, shift);
  if (w.element == kLevels) {
    memcpy(scale, w.step() + row * w.groups(), w.groups() * sizeof(float));
    memcpy(shift, w.shift() + row * w.groups(), w.groups() * sizeof(float));
    return;
  }
  const int64_t groups = w.groups(), bytes = w.zero_point_bytes();
  const uint16_t* stored = w.scale + row * groups;
  __m256i zero = _mm256_setzero_si256();
  for (int64_t g = 0; g < groups; g += 16) {
    if (w.zero_point) zero = read_codes<BITS>(w.zero_point + row * bytes, bytes, g / 8 * BITS);
    for (int half = 0; half < 2 && g + 8 * half < groups; ++half) {
      const __m256 s = load_scale(stored + g + 8 * half, groups - g - 8 * half, (w.rows - row) * groups - g - 8 * half);
      const __m128i codes = half ? _mm256_extracti128_si256(zero, 1) : _mm256_castsi256_si128(zero);
      const __m256 z =
          w.zero_point ? _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(codes)) : _mm256_set1_ps(w.centre);
      _mm256_storeu_ps(scale + g + 8 * half, s);
      _mm256_storeu_ps(shift + g + 8 * half, _mm256_mul_ps(s, z));
    }
  }
}

}  // namespace bitplan
