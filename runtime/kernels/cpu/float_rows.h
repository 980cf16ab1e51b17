// Products of weights in 16-bit floating point, bodies in vectors of BITPLAN_LANES floats (8 or 16). Include it once in a
// file, after the pragma that names the instructions, with these defined: BITPLAN_FLOATS, the table's name, BITPLAN_ROWS, rows
// that fit into registers with 4 tokens, and Floats, load(const float*), multiply_add(a, b, c) = a * b + c, add(a, b), zeros(), sum_lanes(v),
// widen<Element>(const uint16_t*).
//
// Weights become float32 exactly as they are read, activations stay float32. A few tokens read the rows once, one after
// the other, which is what memory likes best; many tokens take blocks of kRows rows and 4 tokens.
#include <string.h>

#include "packed_matrix.h"

namespace bitplan {
namespace {

constexpr int kLanes = BITPLAN_LANES, kRows = BITPLAN_ROWS;
// A line is fetched several times on its way, see avx512_decode.cpp.
constexpr int kFetches = 4;
constexpr int64_t kAhead = 4096;

// sums[r][t] of the rows and tokens that begin at `w` and `x`; x is padded with zeros to whole vectors.
template <Element ELEMENT, int ROWS, int TOKENS, bool FETCHES>
BITPLAN_INLINE void multiply_block(const uint16_t* w, const float* x, int64_t columns, int64_t padded,
                                   float (&sums)[ROWS][TOKENS]) {
  constexpr int kParts = ROWS * TOKENS < 4 ? 4 : 1;
  Floats part[kParts][ROWS][TOKENS];
  for (auto& p : part)
    for (auto& row : p)
      for (Floats& sum : row) sum = zeros();
  int64_t k = 0;
  for (; k + kParts * kLanes <= columns; k += kParts * kLanes) {
    if (FETCHES)
      for (int f = 1; f <= kFetches; ++f)
        for (int u = 0; u < kParts * kLanes * 2; u += 64)
          _mm_prefetch(reinterpret_cast<const char*>(w + k) + f * kAhead + u, _MM_HINT_T1);
    for (int p = 0; p < kParts; ++p)
      for (int r = 0; r < ROWS; ++r) {
        const Floats weights = widen<ELEMENT>(w + r * columns + k + p * kLanes);
        for (int t = 0; t < TOKENS; ++t)
          part[p][r][t] = multiply_add(weights, load(x + t * padded + k + p * kLanes), part[p][r][t]);
      }
  }
  for (; k < columns; k += kLanes)
    for (int r = 0; r < ROWS; ++r) {
      uint16_t rest[kLanes] = {};
      memcpy(rest, w + r * columns + k, 2 * (columns - k < kLanes ? columns - k : kLanes));
      const Floats weights = widen<ELEMENT>(rest);
      for (int t = 0; t < TOKENS; ++t) part[0][r][t] = multiply_add(weights, load(x + t * padded + k), part[0][r][t]);
    }
  for (int r = 0; r < ROWS; ++r)
    for (int t = 0; t < TOKENS; ++t) {
      for (int p = 1; p < kParts; ++p) part[0][r][t] = add(part[0][r][t], part[p][r][t]);
      sums[r][t] = sum_lanes(part[0][r][t]);
    }
}

template <Element ELEMENT, int ROWS, int TOKENS, bool FETCHES>
BITPLAN_INLINE void write_block(const Matrix& w, const Activations& a, int64_t token, const Output& out, int64_t row) {
  const auto* stored = reinterpret_cast<const uint16_t*>(w.codes) + row * w.columns;
  const int64_t padded = a.value_stride / int64_t(sizeof(float));
  float sums[ROWS][TOKENS];
  multiply_block<ELEMENT, ROWS, TOKENS, FETCHES>(stored, reinterpret_cast<const float*>(a.values) + token * padded,
                                                 w.columns, padded, sums);
  for (int r = 0; r < ROWS; ++r)
    for (int t = 0; t < TOKENS; ++t) out.write(token + t, row + r, sums[r][t]);
}

template <Element ELEMENT, int TOKENS>
void decode_range(const Matrix& w, const Activations& a, int64_t token, const Output& out, int64_t first_row,
                  int64_t last_row) {
  for (int64_t row = first_row; row < last_row; ++row) write_block<ELEMENT, 1, TOKENS, true>(w, a, token, out, row);
}

template <Element ELEMENT>
void decode_tokens(const Matrix& w, const Activations& a, int64_t token, int tokens, const Output& out,
                   int64_t first_row, int64_t last_row) {
  const auto range = tokens == 1   ? decode_range<ELEMENT, 1>
                     : tokens == 2 ? decode_range<ELEMENT, 2>
                     : tokens == 3 ? decode_range<ELEMENT, 3>
                                   : decode_range<ELEMENT, 4>;
  range(w, a, token, out, first_row, last_row);
}

template <Element ELEMENT, int ROWS>
void prefill_rows(const Matrix& w, const Activations& a, const Output& out, int64_t row) {
  int64_t t = 0;
  for (; t + 4 <= a.tokens; t += 4) write_block<ELEMENT, ROWS, 4, false>(w, a, t, out, row);
  for (; t < a.tokens; ++t) write_block<ELEMENT, ROWS, 1, false>(w, a, t, out, row);
}

template <Element ELEMENT>
void prefill_range(const Matrix& w, const Activations& a, const Output& out, int64_t first_row, int64_t last_row) {
  int64_t row = first_row;
  for (; row + kRows <= last_row; row += kRows) prefill_rows<ELEMENT, kRows>(w, a, out, row);
  for (; row < last_row; ++row) prefill_rows<ELEMENT, 1>(w, a, out, row);
}

void shape(const Matrix& w, Activations& a, bool) {
  a.block = 0;
  a.interleave = 0;
  a.blocks = 0;
  a.value_stride = divide_up(w.columns, kLanes) * kLanes * int64_t(sizeof(float));
  a.block_stride = 0;
}

// Activations are copied, for the zeros behind them.
void copy_tokens(const float* x, const Activations& a, int64_t first_token, int64_t last_token) {
  for (int64_t t = first_token; t < last_token; ++t) {
    uint8_t* values = a.values + t * a.value_stride;
    memcpy(values, x + t * a.columns, a.columns * sizeof(float));
    memset(values + a.columns * sizeof(float), 0, a.value_stride - a.columns * sizeof(float));
  }
}

void decode(const Matrix& w, const Activations& a, int64_t token, int tokens, const Output& out, int64_t first_row,
            int64_t last_row, float*) {
  (w.element == kBfloat16 ? decode_tokens<kBfloat16> : decode_tokens<kFloat16>)(w, a, token, tokens, out, first_row,
                                                                               last_row);
}

void prefill(const Matrix& w, const Activations& a, const Output& out, int64_t first_row, int64_t last_row, float*) {
  (w.element == kBfloat16 ? prefill_range<kBfloat16> : prefill_range<kFloat16>)(w, a, out, first_row, last_row);
}

int64_t no_scratch(const Matrix&, const Activations&) { return 0; }

}  // namespace

const Kernels BITPLAN_FLOATS = {shape, copy_tokens, decode, prefill, no_scratch, kRows};

}  // namespace bitplan
