#pragma once
#include "packed_matrix.h"

namespace bitplan {

// The float32 values of one row of W, the sum of its planes: of one plane the same numbers as factor * scale *
// (code - zero_point) in PyTorch.
void dequantize_row(const Matrix&, int64_t row, float* out);

// float16 to float32, exactly.
float widen(uint16_t half);

// Writes x W' of one plane for the rows [first_row, last_row); `scratch` holds `columns` floats.
void portable_multiply(const Matrix&, const float* x, int64_t tokens, const Output&, int64_t first_row,
                       int64_t last_row, float* scratch);

}  // namespace bitplan
