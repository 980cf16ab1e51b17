// Products of weights whose codes are floats of 8 or 16 bits with scales, bodies in vectors of BITPLAN_LANES floats (8 or
// 16). Include it once in a file, after the pragma that names the instructions, with these defined: BITPLAN_SMALL_FLOATS,
// the table's name, and Floats, sum_lanes(v), load_scale(const uint16_t*, left), spread(const float*, lanes).
//
// A code is a sign and some bits of exponent and mantissa, a float32 the same with more of both: with these bits put where
// exponent and mantissa of a float32 meet, its value is that of the code over a power of two, subnormal codes included,
// unless subnormal numbers are flushed to zero. A vector of 32-bit words is taken apart into its four or two codes by two
// shifts and a mask each; activations lie in that order. To keep products of small weights within float32, the
// activations of a token are multiplied by a power of two, which is exact, and the outputs by another.
#include <float.h>
#include <math.h>
#include <string.h>

#include "packed_matrix.h"

namespace bitplan {
namespace {

typedef int32_t Integers __attribute__((vector_size(4 * BITPLAN_LANES), may_alias));
typedef int32_t Word __attribute__((may_alias));
typedef float UnalignedFloats __attribute__((vector_size(4 * BITPLAN_LANES), aligned(4), may_alias));
typedef int32_t UnalignedIntegers __attribute__((vector_size(4 * BITPLAN_LANES), aligned(1), may_alias));

constexpr int kLanes = BITPLAN_LANES, kVectorBytes = 4 * kLanes;
// Rows that share the reading of activations: of one token, and of four.
constexpr int kDecodeRows = 4, kPrefillRows = 2;
// A line is fetched several times on its way, see avx512_decode.cpp.
constexpr int kFetches = 2;
constexpr int64_t kAhead = 4096;
// Activations of a token are below 2^kExponent, the largest from a half of it on; less where the factor would overflow.
constexpr int kExponent = 116, kLeastExponent = kExponent - 127;

BITPLAN_INLINE Floats load(const float* x) { return *reinterpret_cast<const UnalignedFloats*>(x); }
BITPLAN_INLINE void store(float* x, Floats v) { *reinterpret_cast<UnalignedFloats*>(x) = v; }
BITPLAN_INLINE Floats fill(float value) { return Floats{} + value; }

// Codes of a word.
constexpr int parts_of(Element element) { return element == kScaledFloat16 ? 2 : 4; }

// What code `part` of each word stands for, over 2^(127 - bias).
template <Element ELEMENT>
BITPLAN_INLINE Floats widen(Integers words, int part) {
  constexpr int kParts = parts_of(ELEMENT), kBits = 32 / kParts;
  // A float32 has 8 bits of exponent.
  constexpr int kShift = 8 - (ELEMENT == kE4m3 ? 4 : 5);
  constexpr uint32_t kMagnitude = (1u << (kBits - 1)) - 1;
  constexpr int32_t kMask = static_cast<int32_t>(0x80000000u | kMagnitude << (32 - kBits - kShift));
  const Integers top = part + 1 < kParts ? words << (32 - kBits * (part + 1)) : words;
  return (Floats)(top >> kShift & kMask);
}

// Where the factors of a step come from: there is one for the row, one for the step, or several in its lanes.
enum Scaling { kByRow, kByStep, kByLane };

// sums[r][t] of the rows from `codes` on; `x` is padded with zeros to whole steps, factors of the next row lie `ahead`
// floats behind those of a row.
template <Element ELEMENT, int ROWS, int TOKENS, Scaling SCALING, bool FETCHES>
BITPLAN_INLINE void multiply_rows(const Matrix& w, const uint8_t* codes, const float* x, int64_t stride,
                                  const float* factors, int64_t ahead, float (&sums)[ROWS][TOKENS]) {
  constexpr int kParts = parts_of(ELEMENT), kStep = kParts * kLanes, kCode = 4 / kParts;
  const int64_t steps = divide_up(w.columns, kStep), whole = w.columns / kStep, row_bytes = w.columns * kCode;
  // Powers of two.
  const int64_t groups_of_step = SCALING == kByLane ? kStep / w.group_size : 1;
  const int shift = SCALING == kByStep ? __builtin_ctzll(w.group_size / kStep) : 0;
  const uint8_t* fetched = codes + ROWS * row_bytes + kAhead;
  Integers lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = SCALING == kByLane ? kParts * i / w.group_size : 0;
  Floats total[ROWS][TOKENS];
  for (auto& row : total)
    for (Floats& sum : row) sum = Floats{};
  for (int64_t v = 0; v < steps; ++v) {
    Integers words[ROWS];
    for (int r = 0; r < ROWS; ++r) {
      const uint8_t* place = codes + r * row_bytes + v * kVectorBytes;
      words[r] = Integers{};
      if (v < whole)
        words[r] = *reinterpret_cast<const UnalignedIntegers*>(place);
      else
        memcpy(&words[r], place, row_bytes - v * kVectorBytes);
    }
    // In the order of addresses, see avx512_decode.cpp.
    if (FETCHES)
      for (int u = 0; u < ROWS * kVectorBytes; u += 64)
        for (int f = 0; f < kFetches; ++f)
          _mm_prefetch(reinterpret_cast<const char*>(fetched + v * ROWS * kVectorBytes + u) + f * kAhead, _MM_HINT_T1);
    Floats sum[ROWS][TOKENS];
    for (int i = 0; i < kParts; ++i)
      for (int r = 0; r < ROWS; ++r) {
        const Floats weights = widen<ELEMENT>(words[r], i);
        for (int t = 0; t < TOKENS; ++t) {
          const Floats product = weights * load(x + t * stride + v * kStep + i * kLanes);
          sum[r][t] = i ? sum[r][t] + product : product;
        }
      }
    for (int r = 0; r < ROWS; ++r) {
      const float* place = factors + r * ahead;
      const Floats factor = SCALING == kByLane   ? spread(place + v * groups_of_step, lanes)
                            : SCALING == kByStep ? fill(place[v >> shift])
                                                 : fill(1.0f);
      for (int t = 0; t < TOKENS; ++t) total[r][t] += sum[r][t] * factor;
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int t = 0; t < TOKENS; ++t)
      sums[r][t] = sum_lanes(total[r][t]) * (SCALING == kByRow ? factors[r * ahead] : 1.0f);
}

int64_t factor_floats(const Matrix& w) { return w.groups() + 2 * kLanes; }

// Of some rows, each behind the factors of the one before.
void read_factors(const Matrix& w, int64_t row, int rows, float* factors) {
  const int64_t groups = w.groups();
  for (int r = 0; r < rows; ++r, factors += factor_floats(w)) {
    const int64_t first = (row + r) * groups;
    // Lanes behind the last group are multiplied by zeros: what is there must be finite.
    memset(factors + groups, 0, kLanes * sizeof(float));
    if (w.scale_type == kFloatScale)
      memcpy(factors, w.step() + first, groups * sizeof(float));
    else if (w.scale_type == kHalfScale)
      for (int64_t g = 0; g < groups; g += kLanes) store(factors + g, load_scale(w.scale + first + g, groups - g));
    else
      for (int64_t g = 0; g < groups; ++g) reinterpret_cast<Word*>(factors)[g] = power_bits(w.power()[first + g]);
  }
}

template <Element ELEMENT, int ROWS, int TOKENS, Scaling SCALING, bool FETCHES>
void write_rows(const Matrix& w, const Activations& a, int64_t token, const Output& out, int64_t row,
                const float* factors) {
  constexpr float kFactor = ELEMENT == kE4m3 ? 0x1p4f : 0x1p-4f;  // 2^(127 - bias - kExponent)
  const int64_t stride = a.value_stride / int64_t(sizeof(float));
  const float* x = reinterpret_cast<const float*>(a.values) + token * stride;
  float sums[ROWS][TOKENS];
  multiply_rows<ELEMENT, ROWS, TOKENS, SCALING, FETCHES>(w, w.codes + row * w.row_bytes(), x, stride, factors,
                                                         factor_floats(w), sums);
  for (int r = 0; r < ROWS; ++r)
    for (int t = 0; t < TOKENS; ++t)
      out.write(token + t, row + r, kFactor * sums[r][t] * a.step[(token + t) * a.block_stride]);
}

using Write = void (*)(const Matrix&, const Activations&, int64_t, const Output&, int64_t, const float*);

template <Element ELEMENT, int ROWS, int TOKENS, bool FETCHES>
Write by_scaling(const Matrix& w) {
  if (w.groups() == 1) return write_rows<ELEMENT, ROWS, TOKENS, kByRow, FETCHES>;
  return w.group_size < parts_of(ELEMENT) * kLanes ? write_rows<ELEMENT, ROWS, TOKENS, kByLane, FETCHES>
                                                   : write_rows<ELEMENT, ROWS, TOKENS, kByStep, FETCHES>;
}

template <int ROWS, int TOKENS, bool FETCHES>
Write find_write(const Matrix& w) {
  if (w.element == kScaledFloat16) return by_scaling<kScaledFloat16, ROWS, TOKENS, FETCHES>(w);
  return w.element == kE4m3 ? by_scaling<kE4m3, ROWS, TOKENS, FETCHES>(w) : by_scaling<kE5m2, ROWS, TOKENS, FETCHES>(w);
}

template <int TOKENS>
void decode_range(const Matrix& w, const Activations& a, int64_t token, const Output& out, int64_t first_row,
                  int64_t last_row, float* scratch) {
  constexpr int kRows = TOKENS == 1 ? kDecodeRows : 1;
  const Write write = find_write<kRows, TOKENS, true>(w), write_one = find_write<1, TOKENS, true>(w);
  for (int64_t row = first_row; row < last_row;) {
    const int rows = row + kRows <= last_row ? kRows : 1;
    read_factors(w, row, rows, scratch);
    (rows == kRows ? write : write_one)(w, a, token, out, row, scratch);
    row += rows;
  }
}

void decode(const Matrix& w, const Activations& a, int64_t token, int tokens, const Output& out, int64_t first_row,
            int64_t last_row, float* scratch) {
  const auto range = tokens == 1   ? decode_range<1>
                     : tokens == 2 ? decode_range<2>
                     : tokens == 3 ? decode_range<3>
                                   : decode_range<4>;
  range(w, a, token, out, first_row, last_row, scratch);
}

template <int ROWS>
void prefill_rows(const Matrix& w, const Activations& a, const Output& out, int64_t row, float* scratch) {
  const Write write_four = find_write<ROWS, 4, false>(w), write_one = find_write<ROWS, 1, false>(w);
  read_factors(w, row, ROWS, scratch);
  int64_t t = 0;
  for (; t + 4 <= a.tokens; t += 4) write_four(w, a, t, out, row, scratch);
  for (; t < a.tokens; ++t) write_one(w, a, t, out, row, scratch);
}

void prefill(const Matrix& w, const Activations& a, const Output& out, int64_t first_row, int64_t last_row,
             float* scratch) {
  int64_t row = first_row;
  for (; row + kPrefillRows <= last_row; row += kPrefillRows) prefill_rows<kPrefillRows>(w, a, out, row, scratch);
  for (; row < last_row; ++row) prefill_rows<1>(w, a, out, row, scratch);
}

void shape(const Matrix& w, Activations& a, bool) {
  a.block = 0;
  a.interleave = parts_of(w.element);
  const int64_t step = a.interleave * kLanes;
  a.blocks = 1;
  a.value_stride = divide_up(w.columns, step) * step * int64_t(sizeof(float));
  a.block_stride = 16;
}

// The exponent of the power of two above the largest magnitude.
int find_exponent(const float* x, int64_t columns) {
  Floats most{};
  int64_t k = 0;
  for (; k + kLanes <= columns; k += kLanes) {
    const Floats magnitude = (Floats)((Integers)load(x + k) & 0x7fffffff);
    most = magnitude > most ? magnitude : most;
  }
  float largest = 0;
  for (int i = 0; i < kLanes; ++i) largest = most[i] > largest ? most[i] : largest;
  for (; k < columns; ++k) largest = fabsf(x[k]) > largest ? fabsf(x[k]) : largest;
  int exponent = 0;
  // What is not finite stays so.
  if (largest <= FLT_MAX) frexpf(largest, &exponent);
  return exponent > kLeastExponent ? exponent : kLeastExponent;
}

// Puts activations times a factor in the order of the codes, step by step; `to` has room for whole steps.
template <int PARTS>
void place_token(const float* from, int64_t columns, float factor, float* to) {
  constexpr int kStep = PARTS * kLanes;
  const int64_t whole = columns / kStep * kStep;
  for (int64_t k = 0; k < whole; k += kStep)
    for (int j = 0; j < kLanes; ++j)
      for (int i = 0; i < PARTS; ++i) to[k + i * kLanes + j] = from[k + PARTS * j + i] * factor;
  if (whole == columns) return;
  memset(to + whole, 0, kStep * sizeof(float));
  for (int64_t k = 0; k < columns - whole; ++k) to[whole + k % PARTS * kLanes + k / PARTS] = from[whole + k] * factor;
}

void scale_tokens(const float* x, const Activations& a, int64_t first_token, int64_t last_token) {
  for (int64_t t = first_token; t < last_token; ++t) {
    const int exponent = find_exponent(x + t * a.columns, a.columns);
    const float factor = ldexpf(1.0f, kExponent - exponent);
    a.step[t * a.block_stride] = ldexpf(1.0f, exponent);
    const auto place = a.interleave == 2 ? place_token<2> : place_token<4>;
    place(x + t * a.columns, a.columns, factor, reinterpret_cast<float*>(a.values + t * a.value_stride));
  }
}

int64_t scratch_floats(const Matrix& w, const Activations&) { return kDecodeRows * factor_floats(w); }

}  // namespace

const Kernels BITPLAN_SMALL_FLOATS = {shape, scale_tokens, decode, prefill, scratch_floats, 1};

}  // namespace bitplan
