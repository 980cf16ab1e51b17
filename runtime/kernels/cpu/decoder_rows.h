// DecoderMath's dequantize: rows of packed keys, values and embeddings in vectors of eight. Part of decoder_math.h.
#include <string.h>

#include "portable.h"

namespace bitplan {
namespace {

typedef uint64_t Words __attribute__((vector_size(64)));
typedef int32_t Codes __attribute__((vector_size(32)));
typedef float Eight __attribute__((vector_size(32), aligned(4), may_alias));

template <class T>
BITPLAN_ALWAYS uint64_t read_as(const uint8_t* bytes) {
  T value;
  memcpy(&value, bytes, sizeof value);
  return value;
}

// The BITS bytes of eight codes. Copied in one go, an odd number of them would take a detour through memory.
template <int BITS>
BITPLAN_ALWAYS uint64_t read_eight(const uint8_t* codes) {
  uint64_t word = BITS >= 8 ? read_as<uint64_t>(codes) : BITS >= 4 ? read_as<uint32_t>(codes) : read_as<uint16_t>(codes);
  if (BITS == 6 || BITS == 7) word |= read_as<uint16_t>(codes + 4) << 32;
  if (BITS == 3 || BITS == 5 || BITS == 7) word |= uint64_t{codes[BITS - 1]} << (8 * (BITS - 1));
  return word;
}

// out[k] = scale * (code - zero) for the codes of a group, eight at a time.
template <int BITS>
BITPLAN_ALWAYS void dequantize_group(const uint8_t* codes, int count, float scale, float zero, float* out) {
  const Words shifts = {0, BITS, 2 * BITS, 3 * BITS, 4 * BITS, 5 * BITS, 6 * BITS, 7 * BITS};
  for (int k = 0; k < count; k += 8, codes += BITS) {
    const Words fields = (Words{} + read_eight<BITS>(codes)) >> shifts & ((1u << BITS) - 1);
    const Eight numbers = __builtin_convertvector(__builtin_convertvector(fields, Codes), Eight);
    *reinterpret_cast<Eight*>(out + k) = (numbers - zero) * scale;
  }
}

template <int BITS>
BITPLAN_ALWAYS void dequantize_integers(const Matrix& w, int64_t row, float* out) {
  const int64_t groups = w.groups(), zero_bytes = w.zero_point_bytes();
  const uint8_t* codes = w.codes + row * w.row_bytes();
  for (int64_t g = 0; g < groups; ++g, codes += w.group_size / 8 * BITS, out += w.group_size) {
    const uint8_t* zeros = w.zero_point + row * zero_bytes;
    const float zero = w.zero_point ? static_cast<float>(read_code(zeros, zero_bytes, g, BITS)) : w.centre;
    dequantize_group<BITS>(codes, w.group_size, widen(w.scale[row * groups + g]), zero, out);
  }
}

typedef uint16_t Halves __attribute__((vector_size(16), aligned(2), may_alias));
typedef uint32_t Bits __attribute__((vector_size(32), aligned(4), may_alias));

void widen_bfloat16(const uint16_t* x, int64_t count, float* out) {
  int64_t k = 0;
  for (; k + 8 <= count; k += 8)
    *reinterpret_cast<Bits*>(out + k) = __builtin_convertvector(*reinterpret_cast<const Halves*>(x + k), Bits) << 16;
  for (; k < count; ++k) {
    const uint32_t bits = static_cast<uint32_t>(x[k]) << 16;
    memcpy(out + k, &bits, sizeof bits);
  }
}

void dequantize(const Matrix& w, int64_t row, float* out) {
  const auto* halves = reinterpret_cast<const uint16_t*>(w.codes) + row * w.columns;
  if (w.element == kBfloat16 && !w.next) return widen_bfloat16(halves, w.columns, out);
  const bool plain = w.element == kInteger && w.group_size % 8 == 0 && !w.index && !w.next && w.factor == 1.0f;
  switch (plain ? w.bits : 0) {
    case 2: return dequantize_integers<2>(w, row, out);
    case 3: return dequantize_integers<3>(w, row, out);
    case 4: return dequantize_integers<4>(w, row, out);
    case 5: return dequantize_integers<5>(w, row, out);
    case 6: return dequantize_integers<6>(w, row, out);
    case 7: return dequantize_integers<7>(w, row, out);
    case 8: return dequantize_integers<8>(w, row, out);
    default: dequantize_row(w, row, out);
  }
}

}  // namespace
}  // namespace bitplan
