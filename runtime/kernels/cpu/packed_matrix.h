// What every instruction set implements: y = x W' for W in the stored layout, activations as 16-bit integers.
//
// A row of W is a little-endian bit stream of codes; weight[n, k] = scale[n, g] * (code[n, k] - zero_point[n, g]) with
// g = k / group_size. The kernels read that stream as it is; those of lookup.h have a layout of their own. A weight may
// be the sum of several such planes, each times a factor of its own, of all its columns or of some.
//
// Activations are rounded to 16 bits within blocks of a row: x[k] ~ step[b] * v[k], |v| <= kLargestActivation. A block
// never spans two groups, so with exact integer sums
//
//   y[n] = sum_b step[b] * scale[n, g] * (sum_k code[n, k] v[k] - zero_point[n, g] * sum_k v[k]).
#pragma once
#include <stdint.h>

namespace bitplan {

// Instruction sets, as Python counts them.
enum Level { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

// What the codes of a weight are: integers with scales; 16-bit floating point numbers, which stand for themselves; one bit
// that chooses between two values of its group, weight = low + (high - low) * code; levels, weight = step * code - shift
// with both of these in float32; floats of 8 or 16 bits, all of them finite, with scales. A sparse weight has no codes: of
// each row `group_size` numbers in float32 and the columns that they are in, the others are zero.
enum Element : int32_t {
  kInteger = 0,
  kBfloat16 = 1,
  kFloat16 = 2,
  kBinary = 3,
  kLevels = 4,
  kE4m3 = 5,
  kE5m2 = 6,
  kSparse = 7,
  kScaledFloat16 = 8
};
inline bool is_float(Element element) { return element == kBfloat16 || element == kFloat16; }
inline bool is_small_float(Element element) {
  return element == kE4m3 || element == kE5m2 || element == kScaledFloat16;
}

// Of the scales of small floats: float16, an exponent e in a byte that stands for 2^(e - 127) (E8M0), or float32.
enum ScaleType : int32_t { kHalfScale = 0, kPowerScale = 1, kFloatScale = 2 };

// 127 * 256 + 127: the largest v that splits into v = 256 * high + low with signed 8-bit parts.
constexpr int kLargestActivation = 32639;
// Columns that share a step where a whole row shares one scale.
constexpr int kRowBlock = 128;
// Tokens that one pass over the weights serves when they are read row by row.
constexpr int kDecodeTokens = 4;
// Tokens up to which several such passes are faster than what is done for many.
constexpr int kFewTokens = 12;
// Planes of one weight.
constexpr int kMostPlanes = 8;

// One weight in its stored layout, or a plane of it; the fields are read by ctypes in the same order.
struct Matrix {
  const uint8_t* codes;       // [rows, ceil(columns * bits / 8)]
  // [rows, columns / group_size] float16, or of another `scale_type`; of two values, the higher one; of levels, the step.
  const uint16_t* scale;
  // [rows, ceil(groups * bits / 8)], or null where `centre` is the zero point of all groups; of two values, the lower one
  // in float16; of levels, the shift.
  const uint8_t* zero_point;
  int64_t rows, columns;
  int32_t bits, group_size;
  const uint8_t* lookup;  // the same weight in the layout of lookup.h, or null
  Element element;        // of numbers in floating point: bits 16, group_size the columns, no scale
  ScaleType scale_type;   // kHalfScale but of small floats
  float centre;           // what is taken off codes that have no zero points; it may lie between two
  float factor;           // of this plane in the weight
  const int32_t* index;   // [columns], which columns of the weight the plane has, or null for all of them in order
  int64_t inputs;         // columns of the weight
  const Matrix* next;     // the plane that is added to this one, or null; of the same rows and inputs

  int64_t row_bytes() const { return element == kSparse ? 8 * group_size : (columns * bits + 7) / 8; }
  // Of 32 bits, as divisions of 64 are slow on many processors.
  int64_t groups() const { return static_cast<uint32_t>(columns) / static_cast<uint32_t>(group_size); }
  int64_t zero_point_bytes() const { return (groups() * bits + 7) / 8; }
  const uint16_t* low() const { return reinterpret_cast<const uint16_t*>(zero_point); }
  const uint8_t* power() const { return reinterpret_cast<const uint8_t*>(scale); }
  const float* step() const { return reinterpret_cast<const float*>(scale); }
  // Of sparse ones, the columns [rows, group_size] and the numbers there.
  const int32_t* places() const { return reinterpret_cast<const int32_t*>(codes); }
  const float* numbers() const { return reinterpret_cast<const float*>(scale); }
  const float* shift() const { return reinterpret_cast<const float*>(zero_point); }
};

// Rounded activations of some tokens. `values` is laid out as the instruction set wants it.
struct Activations {
  int64_t tokens, columns;
  int32_t block;         // columns that share a step
  int32_t interleave;    // order of `values`, see avx512.h (parts of a field) and avx2.h (codes of a 16-bit word)
  int64_t blocks;        // blocks of a row
  int64_t value_stride;  // bytes of `values` for one token
  int64_t block_stride;  // floats of `step` and `sum` for one token, `blocks` and readable padding
  uint8_t* values;
  float* step;  // [tokens, block_stride]
  float* sum;   // [tokens, block_stride]: step * sum_k v[k]
  float* middle;  // [tokens, block_stride]: step * what lookup tables leave out
};

// Where the product with a plane goes: values[token * stride + row] = factor * product + added[token * added_stride + row].
struct Output {
  float* values;
  int64_t stride;
  const float* added;  // the bias, with a stride of 0; what other planes gave, in `values` itself; or null
  int64_t added_stride;
  float factor;

  float* place(int64_t token, int64_t row) const { return values + token * stride + row; }
  const float* addend(int64_t token, int64_t row) const { return added + token * added_stride + row; }
  void write(int64_t token, int64_t row, float product) const {
    *place(token, row) = factor * product + (added ? *addend(token, row) : 0.0f);
  }
};

struct Kernels {
  // Sets block, interleave and strides for a matrix.
  void (*shape)(const Matrix&, Activations&, bool decode);
  void (*quantize)(const float* x, const Activations&, int64_t first_token, int64_t last_token);
  // At most kDecodeTokens tokens, beginning with first_token.
  void (*decode)(const Matrix&, const Activations&, int64_t first_token, int tokens, const Output&, int64_t first_row,
                 int64_t last_row, float* scratch);
  void (*prefill)(const Matrix&, const Activations&, const Output&, int64_t first_row, int64_t last_row, float* scratch);
  int64_t (*scratch_floats)(const Matrix&, const Activations&);
  int64_t prefill_rows;  // ranges of prefill begin at multiples of it
};

extern const Kernels kAvx512Kernels;
extern const Kernels kAvx2Kernels;
// Of 16-bit floating point.
extern const Kernels kAvx512Floats;
extern const Kernels kAvx2Floats;
// Of floats of 8 and of 16 bits with scales.
extern const Kernels kAvx512SmallFloats;
extern const Kernels kAvx2SmallFloats;

inline int block_of(const Matrix& w) { return w.groups() == 1 ? kRowBlock : w.group_size; }

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The bits of 2^(exponent - 127) in float32; the least is a subnormal number.
inline int32_t power_bits(uint8_t exponent) {
  const int32_t normal = static_cast<int32_t>(exponent) << 23, least = 1 << 22;
  return normal > least ? normal : least;
}

// A code or zero point out of a bit stream of `bytes` bytes.
inline int read_code(const uint8_t* stream, int64_t bytes, int64_t index, int bits) {
  const int64_t bit = index * bits, byte = bit >> 3;
  const int window = stream[byte] | (byte + 1 < bytes ? stream[byte + 1] << 8 : 0);
  return (window >> (bit & 7)) & ((1 << bits) - 1);
}

}  // namespace bitplan
