// Any processor: rows are read back to float32, one at a time, and multiplied in floating point.
#include "portable.h"

#include <string.h>

#include <vector>

namespace bitplan {

float widen(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31, fraction = half & 1023;
  uint32_t word = sign | (exponent + 112) << 23 | fraction << 13;
  if (exponent == 0) {
    // Zero and subnormal numbers: fraction * 2^-24.
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  if (exponent == 31) word = sign | 0x7f800000u | fraction << 13;
  float value;
  memcpy(&value, &word, sizeof value);
  return value;
}

namespace {

// Eight codes of an octet, out of the first `bytes` of its bytes.
void read_octet(const uint8_t* stream, int64_t bytes, int bits, uint8_t* codes) {
  uint64_t word = 0;
  for (int i = 0; i < bits && i < bytes; ++i) word |= static_cast<uint64_t>(stream[i]) << (8 * i);
  for (int j = 0; j < 8; ++j) codes[j] = word >> (bits * j) & ((1u << bits) - 1);
}

// Enough independent sums for the compiler to keep them in vectors.
float multiply_rows(const float* a, const float* b, int64_t count) {
  constexpr int kSums = 16;
  float sums[kSums] = {}, total = 0;
  int64_t k = 0;
  for (; k + kSums <= count; k += kSums)
    for (int i = 0; i < kSums; ++i) sums[i] += a[k + i] * b[k + i];
  for (; k < count; ++k) total += a[k] * b[k];
  for (float sum : sums) total += sum;
  return total;
}

void widen_row(const Matrix& w, int64_t row, float* out) {
  const auto* stored = reinterpret_cast<const uint16_t*>(w.codes) + row * w.columns;
  for (int64_t k = 0; k < w.columns; ++k) {
    const uint32_t word = static_cast<uint32_t>(stored[k]) << 16;
    if (w.element == kFloat16)
      out[k] = widen(stored[k]);
    else
      memcpy(out + k, &word, sizeof word);
  }
}

// A float of 8 bits: its bits are those of a float16 with as many or one more of exponent, which makes that 2^8 less.
float widen_small(uint8_t code, Element element) {
  if (element == kE5m2) return widen(static_cast<uint16_t>(code << 8));
  return 256.0f * widen(static_cast<uint16_t>((code & 0x80) << 8 | (code & 0x7f) << 7));
}

float read_scale(const Matrix& w, int64_t group) {
  if (w.scale_type == kHalfScale) return widen(w.scale[group]);
  if (w.scale_type == kFloatScale) return w.step()[group];
  const int32_t power = power_bits(w.power()[group]);
  float value;
  memcpy(&value, &power, sizeof value);
  return value;
}

void read_small_floats(const Matrix& w, int64_t row, float* out) {
  const auto* halves = reinterpret_cast<const uint16_t*>(w.codes) + row * w.columns;
  const uint8_t* codes = w.codes + row * w.columns;
  for (int64_t k = 0; k < w.columns; ++k) {
    const float number = w.element == kScaledFloat16 ? widen(halves[k]) : widen_small(codes[k], w.element);
    out[k] = read_scale(w, row * w.groups() + k / w.group_size) * number;
  }
}

// The values of a row of one plane, without its factor.
void read_plane_row(const Matrix& w, int64_t row, float* out) {
  if (is_float(w.element)) {
    widen_row(w, row, out);
    return;
  }
  if (w.element == kSparse) {
    memset(out, 0, w.columns * sizeof(float));
    for (int64_t i = row * w.group_size; i < (row + 1) * w.group_size; ++i) out[w.places()[i]] += w.numbers()[i];
    return;
  }
  if (is_small_float(w.element)) {
    read_small_floats(w, row, out);
    return;
  }
  const int64_t groups = w.groups(), row_bytes = w.row_bytes(), zero_bytes = w.zero_point_bytes();
  const uint8_t* stream = w.codes + row * row_bytes;
  float low = 0, scale = 0, shift = 0, zero = w.centre;
  uint8_t codes[8];
  for (int64_t k = 0; k < w.columns; ++k) {
    if (k % 8 == 0) read_octet(stream + k / 8 * w.bits, row_bytes - k / 8 * w.bits, w.bits, codes);
    if (k % w.group_size == 0) {
      const int64_t g = k / w.group_size;
      if (w.element == kLevels) {
        scale = w.step()[row * groups + g];
        shift = w.shift()[row * groups + g];
      } else
        scale = widen(w.scale[row * groups + g]);
      if (w.element == kBinary) low = widen(w.low()[row * groups + g]);
      if (w.zero_point && w.element == kInteger)
        zero = static_cast<float>(read_code(w.zero_point + row * zero_bytes, zero_bytes, g, w.bits));
    }
    if (w.element == kBinary)
      out[k] = codes[k % 8] ? scale : low;
    else if (w.element == kLevels)
      out[k] = scale * static_cast<float>(codes[k % 8]) - shift;
    else
      out[k] = scale * (static_cast<float>(codes[k % 8]) - zero);
  }
}

void multiply_sparse(const Matrix& w, const float* x, int64_t tokens, const Output& out, int64_t first_row,
                     int64_t last_row) {
  for (int64_t row = first_row; row < last_row; ++row)
    for (int64_t t = 0; t < tokens; ++t) {
      float sum = 0;
      for (int64_t i = row * w.group_size; i < (row + 1) * w.group_size; ++i)
        sum += w.numbers()[i] * x[t * w.columns + w.places()[i]];
      out.write(t, row, sum);
    }
}

}  // namespace

void dequantize_row(const Matrix& w, int64_t row, float* out) {
  std::vector<float> values(w.inputs);
  memset(out, 0, w.inputs * sizeof(float));
  for (const Matrix* plane = &w; plane; plane = plane->next) {
    read_plane_row(*plane, row, values.data());
    for (int64_t k = 0; k < plane->columns; ++k) out[plane->index ? plane->index[k] : k] += plane->factor * values[k];
  }
}

void portable_multiply(const Matrix& w, const float* x, int64_t tokens, const Output& out, int64_t first_row,
                       int64_t last_row, float* scratch) {
  if (w.element == kSparse) {
    multiply_sparse(w, x, tokens, out, first_row, last_row);
    return;
  }
  for (int64_t row = first_row; row < last_row; ++row) {
    read_plane_row(w, row, scratch);
    for (int64_t t = 0; t < tokens; ++t) out.write(t, row, multiply_rows(scratch, x + t * w.columns, w.columns));
  }
}

}  // namespace bitplan
