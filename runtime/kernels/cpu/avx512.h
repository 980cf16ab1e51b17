// Unpacking with AVX-512 VBMI: any width from 1 to 8 in at most three instructions for 64 codes.
//
// Eight codes of b bits, an octet, are b bytes. A 64-bit word takes `octets` = n of them (n * b <= 8), a vector eight
// such words: 64 * n codes from 8 * b * n consecutive bytes of the stream. vpermb puts the bytes into the words (nothing
// to do when n * b is 8), and vpmultishiftqb picks octet i of every word: byte j of word q becomes the code
// q * 8n + 8i + j of the vector. Activations are stored in that order.
#pragma once
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,bmi2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,bmi2,fma,f16c")
#endif
#include <immintrin.h>
#include <string.h>

#include "packed_matrix.h"

#define BITPLAN_INLINE static inline __attribute__((always_inline))

namespace bitplan {

struct Bytes {
  alignas(64) uint8_t values[64];
};

// Byte k of word q comes from byte q * word_bytes + k.
constexpr Bytes place_bytes(int word_bytes) {
  Bytes table{};
  for (int i = 0; i < 64; ++i) table.values[i] = (i / 8 * word_bytes + i % 8) & 63;
  return table;
}

// First bits of the eight codes of octet i in their word.
constexpr Bytes shift_bytes(int bits, int i) {
  Bytes table{};
  for (int j = 0; j < 64; ++j) table.values[j] = (8 * bits * i + bits * (j % 8)) & 63;
  return table;
}

struct Shifts {
  Bytes octets[8];
};

constexpr Shifts list_shifts(int bits) {
  Shifts table{};
  for (int i = 0; i < 8; ++i) table.octets[i] = shift_bytes(bits, i);
  return table;
}

template <int BITS>
constexpr Shifts kShifts = list_shifts(BITS);

template <int BITS, int OCTETS>
struct Unpacker {
  static constexpr int kBytes = 8 * BITS * OCTETS;
  static constexpr bool kPermutes = BITS * OCTETS != 8;
  __m512i place, shifts[OCTETS], mask;

  __attribute__((always_inline)) inline Unpacker() {
    static constexpr Bytes kPlace = place_bytes(BITS * OCTETS);
    place = _mm512_load_si512(kPlace.values);
    for (int i = 0; i < OCTETS; ++i) shifts[i] = _mm512_load_si512(kShifts<BITS>.octets[i].values);
    mask = _mm512_set1_epi8(static_cast<char>((1 << BITS) - 1));
  }

  // The words of one vector, of which `left` bytes are in the row; those behind it are zero and not touched.
  __attribute__((always_inline)) inline __m512i load(const uint8_t* stream, int64_t left) const {
    if (left >= kBytes) return load_whole(stream);
    return arrange(_mm512_maskz_loadu_epi8((1ull << left) - 1, stream));
  }

  __attribute__((always_inline)) inline __m512i load_whole(const uint8_t* stream) const {
    if (kBytes == 64) return arrange(_mm512_loadu_si512(stream));
    return arrange(_mm512_maskz_loadu_epi8(~0ull >> (64 - kBytes), stream));
  }

  __attribute__((always_inline)) inline __m512i arrange(__m512i words) const {
    return kPermutes ? _mm512_permutexvar_epi8(place, words) : words;
  }

  __attribute__((always_inline)) inline __m512i octet(__m512i words, int i) const {
    return BITS == 8 ? words : _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts[i], words), mask);
  }
};

// 16 consecutive float16 numbers, those past `left` as zeros.
BITPLAN_INLINE __m512 load_scale(const uint16_t* scale, int64_t left) {
  const __mmask16 present = left >= 16 ? 0xffff : (1 << left) - 1;
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(present, scale));
}

// scale and scale * zero_point of the groups of a row, in float32; written in whole vectors.
template <int BITS>
BITPLAN_INLINE void read_groups(const Matrix& w, int64_t row, float* scale, float* shift) {
  const int64_t groups = w.groups(), bytes = w.zero_point_bytes();
  const uint16_t* stored = w.scale + row * groups;
  const uint8_t* stream = w.zero_point ? w.zero_point + row * bytes : nullptr;
  const Unpacker<BITS, 1> unpacker;
  alignas(64) uint8_t zero_point[64];
  memset(zero_point, 1 << (BITS - 1), sizeof zero_point);
  for (int64_t g = 0; g < groups; g += 64) {
    if (stream) {
      const int64_t offset = g / 8 * BITS;
      _mm512_store_si512(zero_point, unpacker.octet(unpacker.load(stream + offset, bytes - offset), 0));
    }
    for (int64_t i = g; i < g + 64 && i < groups; i += 16) {
      const __m512 s = load_scale(stored + i, groups - i);
      const __m512i z = _mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(zero_point + i - g)));
      _mm512_storeu_ps(scale + i, s);
      _mm512_storeu_ps(shift + i, _mm512_mul_ps(s, _mm512_cvtepi32_ps(z)));
    }
  }
}

}  // namespace bitplan
