// The execution layout of the lookup kernels (avx512_lookup.cpp), made from the stored one.
//
// Tiles of 16 rows; chunks of kLookupTiles tiles that are multiplied together, the last one of fewer; within a chunk
// span after span of 32 columns, so that a product reads memory in one sequence. Scales and zero points, group after
// group, in the same order.
#pragma once
#include "packed_matrix.h"

namespace bitplan {

constexpr int64_t kLookupTiles = 4, kLookupSpan = 32;

struct LookupLayout {
  uint8_t* codes;       // [chunks][spans][tiles of the chunk][bits][64]
  uint16_t* scale;      // [chunks][groups][tiles of the chunk][16]
  uint8_t* zero_point;  // the same of 2 * bits bytes (of one bit, its lower values: 32), or null
  int64_t rows, groups, spans;
  int bits, zero_point_bytes;  // of a tile and group
  bool binary;
  float centre;

  LookupLayout(const Matrix& w, uint8_t* memory)
      : codes(memory), rows(w.rows), groups(w.groups()), spans(divide_up(w.columns, kLookupSpan)), bits(w.bits),
        zero_point_bytes(w.element == kBinary ? 32 : 2 * w.bits), binary(w.element == kBinary), centre(w.centre) {
    scale = reinterpret_cast<uint16_t*>(codes + tiles() * tile_bytes());
    zero_point = w.zero_point ? reinterpret_cast<uint8_t*>(scale + tiles() * groups * 16) : nullptr;
  }

  // Tiles of the chunk that begins at a tile.
  int64_t chunk(int64_t begin) const { return tiles() - begin < kLookupTiles ? tiles() - begin : kLookupTiles; }
  int64_t tiles() const { return divide_up(rows, 16); }
  int64_t tile_bytes() const { return spans * bits * 64; }
  // All of it, with what is read behind the last zero point.
  int64_t bytes(bool zero_points) const {
    return tiles() * (tile_bytes() + groups * (32 + (zero_points ? zero_point_bytes : 0))) + 64;
  }
};

// Where plane `plane` of half `half` of a span is among its nibbles: the low ones of the first vector, its high ones, the
// low ones of the second, ... Planes 0 and 1 of a half share a vector; 1 bit, and the third plane, share it with those of
// the other half.
constexpr int nibble_place(int bits, int half, int plane) {
  return bits == 1 ? half : plane < 2 ? 2 * half + plane : 4 + half;
}

// Bits, and columns of a block, that the kernels know.
inline bool has_lookup(const Matrix& w) {
  return (w.element == kInteger || w.element == kBinary) && w.bits <= 3 && block_of(w) % kLookupSpan == 0 && block_of(w) <= 256;
}

// Writes a row of the stored layout into memory that was zero.
void pack_lookup_row(const Matrix& w, const LookupLayout& layout, int64_t row);

extern const Kernels kLookupKernels;

}  // namespace bitplan
