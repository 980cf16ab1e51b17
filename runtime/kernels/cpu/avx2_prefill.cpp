// Many tokens, AVX2: codes of 16 rows are unpacked once, turned so that a lane is a row, and multiplied with the
// activations of all tokens. Integer sums of a block stay in registers; scales are applied once a block.
#if defined(__x86_64__)
#include "avx2.h"

namespace bitplan {
namespace {

constexpr int kRows = 16, kRowVectors = 2, kTokens = 4;
// Columns that are unpacked at a time: 16 rows of them are 8 KiB.
constexpr int64_t kChunk = 256;

// Rows become lanes: dword d of row r goes to lane r of vector d.
BITPLAN_INLINE void transpose_dwords(__m256i (&v)[8]) {
  __m256i u[8], t[8];
  for (int i = 0; i < 8; i += 2) {
    u[i] = _mm256_unpacklo_epi32(v[i], v[i + 1]);
    u[i + 1] = _mm256_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    t[i] = _mm256_unpacklo_epi64(u[i], u[i + 2]);
    t[i + 1] = _mm256_unpackhi_epi64(u[i], u[i + 2]);
    t[i + 2] = _mm256_unpacklo_epi64(u[i + 1], u[i + 3]);
    t[i + 3] = _mm256_unpackhi_epi64(u[i + 1], u[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm256_permute2x128_si256(t[i], t[4 + i], 0x20);
    v[4 + i] = _mm256_permute2x128_si256(t[i], t[4 + i], 0x31);
  }
}

// tile[column / 2][16 rows][2 columns] of the columns [first, last) of 16 rows; rows past the last are repeated.
template <int BITS>
void unpack_tile(const Matrix& w, int64_t row, int64_t first, int64_t last, int16_t* tile) {
  const int64_t row_bytes = w.row_bytes();
  for (int64_t k = first; k < last; k += 16, tile += 8 * kRows * 2) {
    for (int half = 0; half < kRowVectors; ++half) {
      __m256i codes[8];
      for (int r = 0; r < 8; ++r) {
        const int64_t n = row + 8 * half + r < w.rows ? row + 8 * half + r : w.rows - 1;
        codes[r] = read_codes<BITS>(w.codes + n * row_bytes, row_bytes, k / 8 * BITS);
      }
      transpose_dwords(codes);
      for (int d = 0; d < 8; ++d)
        _mm256_store_si256(reinterpret_cast<__m256i*>(tile + (d * kRowVectors + half) * 16), codes[d]);
    }
  }
}

// scale and scale * zero_point by block, [blocks][16 rows] each.
template <int BITS>
void gather_groups(const Matrix& w, const Activations& a, int64_t row, float* scale, float* shift, float* scratch) {
  float *row_scale = scratch, *row_shift = scratch + a.block_stride;
  for (int r = 0; r < kRows; ++r) {
    read_groups<BITS>(w, row + r < w.rows ? row + r : w.rows - 1, row_scale, row_shift);
    for (int64_t b = 0; b < a.blocks; ++b) {
      const int64_t g = w.groups() == 1 ? 0 : b;
      scale[b * kRows + r] = row_scale[g];
      shift[b * kRows + r] = row_shift[g];
    }
  }
}

// Adds the chunk's products to total[token][16 rows].
template <int TOKENS>
BITPLAN_INLINE void multiply(const Activations& a, int64_t token, int64_t first, int64_t last, const int16_t* tile,
                             const float* scale, const float* shift, float* total) {
  const uint8_t* values = a.values + token * a.value_stride;
  for (int64_t k = first, block = first / a.block; k < last; ++block) {
    const int64_t stop = k + a.block < last ? k + a.block : last;
    __m256i sums[TOKENS][kRowVectors];
    for (int t = 0; t < TOKENS; ++t)
      for (int r = 0; r < kRowVectors; ++r) sums[t][r] = _mm256_setzero_si256();
    for (; k < stop; k += 2, tile += kRowVectors * 16) {
      const __m256i w0 = _mm256_load_si256(reinterpret_cast<const __m256i*>(tile));
      const __m256i w1 = _mm256_load_si256(reinterpret_cast<const __m256i*>(tile + 16));
      for (int t = 0; t < TOKENS; ++t) {
        int32_t pair;
        memcpy(&pair, values + t * a.value_stride + k * sizeof(int16_t), sizeof pair);
        const __m256i x = _mm256_set1_epi32(pair);
        sums[t][0] = _mm256_add_epi32(sums[t][0], _mm256_madd_epi16(w0, x));
        sums[t][1] = _mm256_add_epi32(sums[t][1], _mm256_madd_epi16(w1, x));
      }
    }
    for (int t = 0; t < TOKENS; ++t) {
      const __m256 step = _mm256_set1_ps(a.step[(token + t) * a.block_stride + block]);
      const __m256 taken = _mm256_set1_ps(a.sum[(token + t) * a.block_stride + block]);
      for (int r = 0; r < kRowVectors; ++r) {
        float* place = total + t * kRows + 8 * r;
        const __m256 factor = _mm256_mul_ps(step, _mm256_load_ps(scale + block * kRows + 8 * r));
        const __m256 sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[t][r]), factor, _mm256_load_ps(place));
        _mm256_store_ps(place, _mm256_fnmadd_ps(taken, _mm256_load_ps(shift + block * kRows + 8 * r), sum));
      }
    }
  }
}

void write_rows(const Activations& a, const Output& out, int64_t row, int64_t rows, const float* total) {
  for (int64_t t = 0; t < a.tokens; ++t)
    for (int64_t r = 0; r < rows; ++r) out.write(t, row + r, total[t * kRows + r]);
}

template <int BITS>
void prefill_range(const Matrix& w, const Activations& a, const Output& out, int64_t first_row, int64_t last_row,
                   float* scratch) {
  int16_t* tile = reinterpret_cast<int16_t*>(scratch);
  float* total = scratch + kRows * kChunk / 2;
  float *scale = total + a.tokens * kRows, *shift = scale + a.blocks * kRows, *rest = shift + a.blocks * kRows;
  // Padding behind the last column is zero in the activations, so a whole pair may be multiplied.
  const int64_t columns = divide_up(w.columns, 8) * 8;
  for (int64_t row = first_row; row < last_row; row += kRows) {
    gather_groups<BITS>(w, a, row, scale, shift, rest);
    memset(total, 0, a.tokens * kRows * sizeof(float));
    for (int64_t k = 0; k < columns; k += kChunk) {
      const int64_t stop = k + kChunk < columns ? k + kChunk : columns;
      unpack_tile<BITS>(w, row, k, stop, tile);
      int64_t t = 0;
      for (; t + kTokens <= a.tokens; t += kTokens)
        multiply<kTokens>(a, t, k, stop, tile, scale, shift, total + t * kRows);
      for (; t < a.tokens; ++t) multiply<1>(a, t, k, stop, tile, scale, shift, total + t * kRows);
    }
    write_rows(a, out, row, last_row - row < kRows ? last_row - row : kRows, total);
  }
}

}  // namespace

void avx2_prefill(const Matrix& w, const Activations& a, const Output& out, int64_t first_row, int64_t last_row,
                  float* scratch) {
  static constexpr void (*kRanges[])(const Matrix&, const Activations&, const Output&, int64_t, int64_t, float*) = {
      prefill_range<1>, prefill_range<2>, prefill_range<3>, prefill_range<4>,
      prefill_range<5>, prefill_range<6>, prefill_range<7>, prefill_range<8>};
  kRanges[w.bits - 1](w, a, out, first_row, last_row, scratch);
}

int64_t avx2_prefill_scratch(const Matrix&, const Activations& a) {
  return kRows * kChunk / 2 + a.tokens * kRows + 2 * a.blocks * kRows + 2 * a.block_stride;
}

}  // namespace bitplan
#endif
