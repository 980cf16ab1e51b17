// Unpacking with AVX-512 VBMI: any width from 1 to 8.
//
// `parts` = n consecutive codes of b bits, n * b <= 8, make a field, and a vector holds 64 fields, one in each byte:
// 64 * n codes from 8 * b * n consecutive bytes of the stream. Where n * b is 8 the stream is that vector; else vpermb
// puts the bytes of every eight fields into a 64-bit word and vpmultishiftqb spreads them. Part i of the vector, code
// n * j + i in byte j, is a shift and a mask away. Activations are stored in that order.
//
// Fields of several codes are for the processor's sake: vpmultishiftqb competes with vpdpbusd (Zen 4 executes both in
// two of its four units), shifts and masks do not.
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

// Bytes of a vector.
constexpr int kVector = 64;

struct Bytes {
  alignas(64) uint8_t values[64];
};

// Byte k of word q comes from byte q * word_bytes + k.
constexpr Bytes place_bytes(int word_bytes) {
  Bytes table{};
  for (int i = 0; i < 64; ++i) table.values[i] = (i / 8 * word_bytes + i % 8) & 63;
  return table;
}

// First bits of the eight fields of a word.
constexpr Bytes shift_bytes(int field_bits) {
  Bytes table{};
  for (int j = 0; j < 64; ++j) table.values[j] = field_bits * (j % 8);
  return table;
}

template <int BITS, int PARTS>
struct Unpacker {
  static constexpr int kField = BITS * PARTS, kBytes = 8 * kField;
  __m512i place, shift, mask;

  __attribute__((always_inline)) inline Unpacker() {
    static constexpr Bytes kPlace = place_bytes(kField), kShift = shift_bytes(kField);
    place = _mm512_load_si512(kPlace.values);
    shift = _mm512_load_si512(kShift.values);
    mask = _mm512_set1_epi8(static_cast<char>((1 << BITS) - 1));
  }

  // The fields of one vector, of which `left` bytes are in the row; those behind it are zero and not touched.
  __attribute__((always_inline)) inline __m512i load(const uint8_t* stream, int64_t left) const {
    const unsigned bytes = left < 0 ? 0 : left < kBytes ? left : kBytes;
    return arrange(_mm512_maskz_loadu_epi8(_bzhi_u64(~0ull, bytes), stream));
  }

  // The same where 64 bytes may be read, whatever is in those behind the vector: loads under a mask are slower.
  __attribute__((always_inline)) inline __m512i load_whole(const uint8_t* stream) const {
    return arrange(_mm512_loadu_si512(stream));
  }

  __attribute__((always_inline)) inline __m512i arrange(__m512i bytes) const {
    return kField == 8 ? bytes : _mm512_multishift_epi64_epi8(shift, _mm512_permutexvar_epi8(place, bytes));
  }

  __attribute__((always_inline)) inline __m512i part(__m512i fields, int i) const {
    if (BITS == 8) return fields;
    // Bits of the next byte that a shift of 16-bit words brings in are masked away.
    return _mm512_and_si512(i ? _mm512_srli_epi16(fields, BITS * i) : fields, mask);
  }
};

// 16 consecutive float16 numbers, those past `left` as zeros.
BITPLAN_INLINE __m512 load_scale(const uint16_t* scale, int64_t left) {
  const __mmask16 present = left >= 16 ? 0xffff : (1 << left) - 1;
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(present, scale));
}

// The same of the two values of one bit, as a scale and what is taken off: weight = scale * code - shift.
BITPLAN_INLINE void read_values(const Matrix& w, int64_t row, float* scale, float* shift) {
  const int64_t groups = w.groups();
  for (int64_t g = 0; g < groups; g += 16) {
    const __m512 high = load_scale(w.scale + row * groups + g, groups - g);
    const __m512 low = load_scale(w.low() + row * groups + g, groups - g);
    _mm512_storeu_ps(scale + g, _mm512_sub_ps(high, low));
    _mm512_storeu_ps(shift + g, _mm512_sub_ps(_mm512_setzero_ps(), low));
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
  const uint8_t* stream = w.zero_point ? w.zero_point + row * bytes : nullptr;
  const Unpacker<BITS, 1> unpacker;
  alignas(64) uint8_t zero_point[64];
  for (int64_t g = 0; g < groups; g += 64) {
    if (stream) {
      const int64_t offset = g / 8 * BITS;
      _mm512_store_si512(zero_point, unpacker.part(unpacker.load(stream + offset, bytes - offset), 0));
    }
    for (int64_t i = g; i < g + 64 && i < groups; i += 16) {
      const __m512 s = load_scale(stored + i, groups - i);
      const auto* codes = reinterpret_cast<const __m128i*>(zero_point + i - g);
      const __m512 z =
          stream ? _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_load_si128(codes))) : _mm512_set1_ps(w.centre);
      _mm512_storeu_ps(scale + i, s);
      _mm512_storeu_ps(shift + i, _mm512_mul_ps(s, z));
    }
  }
}

}  // namespace bitplan
