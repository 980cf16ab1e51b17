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

// Eight floats, those past `left` as zeros.
BITPLAN_INLINE __m256 load_floats(const float* x, int64_t left) {
  if (left >= 8) return _mm256_loadu_ps(x);
  alignas(32) float padded[8] = {};
  memcpy(padded, x, left * sizeof(float));
  return _mm256_load_ps(padded);
}

// Calls use(g, scale, shift) for every eight groups of a row: weight = scale * code - shift. Numbers past the last group
// are zero.
template <int BITS, class Use>
BITPLAN_INLINE void visit_groups(const Matrix& w, int64_t groups, int64_t row, const Use& use) {
  const int64_t first = row * groups, readable = (w.rows - row) * groups;
  if (w.element == kLevels) {
    for (int64_t g = 0; g < groups; g += 8)
      use(g, load_floats(w.step() + first + g, groups - g), load_floats(w.shift() + first + g, groups - g));
    return;
  }
  const auto load = [&](const uint16_t* stored, int64_t g) {
    return load_scale(stored + first + g, groups - g, readable - g);
  };
  if (BITS == 1 && w.element == kBinary) {
    for (int64_t g = 0; g < groups; g += 8) {
      const __m256 high = load(w.scale, g), low = load(w.low(), g);
      use(g, _mm256_sub_ps(high, low), _mm256_sub_ps(_mm256_setzero_ps(), low));
    }
    return;
  }
  if (!w.zero_point) {
    for (int64_t g = 0; g < groups; g += 8) {
      const __m256 scale = load(w.scale, g);
      use(g, scale, _mm256_mul_ps(scale, _mm256_set1_ps(w.centre)));
    }
    return;
  }
  const int64_t bytes = w.zero_point_bytes();
  for (int64_t g = 0; g < groups; g += 16) {
    // What is read of the next row is multiplied by scales of zero.
    const __m256i zero = read_codes<BITS>(w.zero_point + row * bytes, (w.rows - row) * bytes, g / 8 * BITS);
    for (int half = 0; half < 2 && g + 8 * half < groups; ++half) {
      const __m128i codes = half ? _mm256_extracti128_si256(zero, 1) : _mm256_castsi256_si128(zero);
      const __m256 scale = load(w.scale, g + 8 * half);
      use(g + 8 * half, scale, _mm256_mul_ps(scale, _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(codes))));
    }
  }
}

// scale and scale * zero_point of the groups of a row; written in whole vectors.
template <int BITS>
BITPLAN_INLINE void read_groups(const Matrix& w, int64_t row, float* scale, float* shift) {
  visit_groups<BITS>(w, w.groups(), row, [&](int64_t g, __m256 scales, __m256 shifts) {
    _mm256_storeu_ps(scale + g, scales);
    _mm256_storeu_ps(shift + g, shifts);
  });
}

}  // namespace bitplan
