// Many tokens, AVX-512: codes of 32 rows are unpacked once, turned so that a lane is a row, and multiplied with the
// activations of all tokens. Integer sums of a block stay in registers; scales are applied once a block.
#if defined(__x86_64__)
#include "avx512.h"

namespace bitplan {
namespace {

constexpr int kRows = 32, kRowVectors = 2, kTokens = 4;
// Columns that are unpacked at a time: 32 rows of them are 16 KiB, half of a first-level cache.
constexpr int64_t kChunk = 512;

// Rows become lanes: dword d of row r goes to lane r of vector d.
BITPLAN_INLINE void transpose_dwords(__m512i (&v)[16]) {
  __m512i u[16];
  for (int i = 0; i < 16; i += 2) {
    u[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    u[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_unpacklo_epi64(u[i], u[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(u[i], u[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(u[i + 1], u[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(u[i + 1], u[i + 3]);
  }
  // v[4i + j] holds, in 128-bit lane l, dword 4l + j of rows 4i .. 4i + 3.
  for (int j = 0; j < 4; ++j) {
    const __m512i a = _mm512_shuffle_i32x4(v[j], v[4 + j], 0x88), b = _mm512_shuffle_i32x4(v[j], v[4 + j], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0xdd);
    u[j] = _mm512_shuffle_i32x4(a, c, 0x88);
    u[8 + j] = _mm512_shuffle_i32x4(a, c, 0xdd);
    u[4 + j] = _mm512_shuffle_i32x4(b, d, 0x88);
    u[12 + j] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
  for (int i = 0; i < 16; ++i) v[i] = u[i];
}

// tile[column / 4][32 rows][4 columns] of the columns [first, last) of 32 rows; rows past the last are repeated.
template <int BITS>
void unpack_tile(const Matrix& w, int64_t row, int64_t first, int64_t last, uint8_t* tile) {
  const Unpacker<BITS, 1> unpacker;
  const int64_t row_bytes = w.row_bytes();
  for (int64_t k = first; k < last; k += 64, tile += 16 * kRows * 4) {
    const int64_t offset = k / 8 * BITS;
    for (int half = 0; half < kRowVectors; ++half) {
      __m512i codes[16];
      for (int r = 0; r < 16; ++r) {
        const int64_t n = row + 16 * half + r < w.rows ? row + 16 * half + r : w.rows - 1;
        codes[r] = unpacker.part(unpacker.load(w.codes + n * row_bytes + offset, row_bytes - offset), 0);
      }
      transpose_dwords(codes);
      for (int d = 0; d < 16; ++d) _mm512_store_si512(tile + (d * kRowVectors + half) * 64, codes[d]);
    }
  }
}

// scale and scale * zero_point by block, [blocks][32 rows] each.
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

// Adds the chunk's products to total[token][32 rows].
template <int TOKENS>
BITPLAN_INLINE void multiply(const Activations& a, int64_t token, int64_t first, int64_t last, const uint8_t* tile,
                             const float* scale, const float* shift, float* total) {
  const uint8_t* values = a.values + token * a.value_stride;
  __m512 sum[TOKENS][kRowVectors];
  for (int t = 0; t < TOKENS; ++t)
    for (int r = 0; r < kRowVectors; ++r) sum[t][r] = _mm512_load_ps(total + t * kRows + 16 * r);
  for (int64_t k = first, block = first / a.block; k < last; ++block) {
    const int64_t stop = k + a.block < last ? k + a.block : last;
    __m512i high[TOKENS][kRowVectors], low[TOKENS][kRowVectors];
    for (int t = 0; t < TOKENS; ++t)
      for (int r = 0; r < kRowVectors; ++r) high[t][r] = low[t][r] = _mm512_setzero_si512();
    for (; k < stop; k += 4, tile += kRowVectors * 64) {
      const __m512i w0 = _mm512_load_si512(tile), w1 = _mm512_load_si512(tile + 64);
      // Planes of 64 columns: high bytes, then low bytes.
      const uint8_t* planes = values + k / 64 * 128 + k % 64;
      for (int t = 0; t < TOKENS; ++t) {
        int32_t h, l;
        memcpy(&h, planes + t * a.value_stride, 4);
        memcpy(&l, planes + t * a.value_stride + 64, 4);
        const __m512i high_part = _mm512_set1_epi32(h), low_part = _mm512_set1_epi32(l);
        high[t][0] = _mm512_dpbusd_epi32(high[t][0], w0, high_part);
        high[t][1] = _mm512_dpbusd_epi32(high[t][1], w1, high_part);
        low[t][0] = _mm512_dpbusd_epi32(low[t][0], w0, low_part);
        low[t][1] = _mm512_dpbusd_epi32(low[t][1], w1, low_part);
      }
    }
    for (int t = 0; t < TOKENS; ++t) {
      const __m512 step = _mm512_set1_ps(a.step[(token + t) * a.block_stride + block]);
      const __m512 taken = _mm512_set1_ps(a.sum[(token + t) * a.block_stride + block]);
      for (int r = 0; r < kRowVectors; ++r) {
        const __m512i both = _mm512_add_epi32(_mm512_slli_epi32(high[t][r], 8), low[t][r]);
        const __m512 factor = _mm512_mul_ps(step, _mm512_load_ps(scale + block * kRows + 16 * r));
        sum[t][r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(both), factor, sum[t][r]);
        sum[t][r] = _mm512_fnmadd_ps(taken, _mm512_load_ps(shift + block * kRows + 16 * r), sum[t][r]);
      }
    }
  }
  for (int t = 0; t < TOKENS; ++t)
    for (int r = 0; r < kRowVectors; ++r) _mm512_store_ps(total + t * kRows + 16 * r, sum[t][r]);
}

void write_rows(const Activations& a, const Output& out, int64_t row, int64_t rows, const float* total) {
  for (int64_t t = 0; t < a.tokens; ++t)
    for (int64_t r = 0; r < rows; ++r) out.write(t, row + r, total[t * kRows + r]);
}

template <int BITS>
void prefill_range(const Matrix& w, const Activations& a, const Output& out, int64_t first_row, int64_t last_row,
                   float* scratch) {
  uint8_t* tile = reinterpret_cast<uint8_t*>(scratch);
  float* total = scratch + kRows * kChunk / 4;
  float *scale = total + a.tokens * kRows, *shift = scale + a.blocks * kRows, *rest = shift + a.blocks * kRows;
  // Padding behind the last column is zero in the activations, so whole octets may be multiplied.
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

void avx512_prefill(const Matrix& w, const Activations& a, const Output& out, int64_t first_row, int64_t last_row,
                    float* scratch) {
  static constexpr void (*kRanges[])(const Matrix&, const Activations&, const Output&, int64_t, int64_t, float*) = {
      prefill_range<1>, prefill_range<2>, prefill_range<3>, prefill_range<4>,
      prefill_range<5>, prefill_range<6>, prefill_range<7>, prefill_range<8>};
  kRanges[w.bits - 1](w, a, out, first_row, last_row, scratch);
}

int64_t avx512_prefill_scratch(const Matrix&, const Activations& a) {
  return kRows * kChunk / 4 + a.tokens * kRows + 2 * a.blocks * kRows + 2 * a.block_stride;
}

}  // namespace bitplan
#endif
