// Writes the execution layout of the lookup kernels.
#if defined(__x86_64__)
#include "lookup.h"

#include "avx512.h"

namespace bitplan {
namespace {

// Bits b of every code of a word of eight.
constexpr uint64_t plane_mask(int bits, int plane) {
  uint64_t mask = 0;
  for (int j = 0; j < 8; ++j) mask |= 1ull << (bits * j + plane);
  return mask;
}

// Eight codes.
uint64_t read_word(const uint8_t* row, int64_t bytes, int64_t octet, int bits) {
  uint64_t word = 0;
  const int64_t offset = octet * bits;
  if (offset < bytes) memcpy(&word, row + offset, bytes - offset < bits ? bytes - offset : bits);
  return word;
}

template <int BITS>
void write_codes(const Matrix& w, const LookupLayout& l, int64_t row) {
  const int64_t tile = row / 16, begin = tile / kLookupTiles * kLookupTiles, chunk = l.chunk(begin);
  const uint8_t* stream = w.codes + row * w.row_bytes();
  for (int64_t span = 0; span < l.spans; ++span) {
    uint8_t* place = l.codes + begin * l.tile_bytes() + (span * chunk + tile - begin) * BITS * kVector + row % 16 * 4;
    for (int octet = 0; octet < 4; ++octet) {
      const uint64_t word = read_word(stream, w.row_bytes(), span * 4 + octet, BITS);
      const int s = octet / 2, quad = octet % 2 * 2;
      for (int p = 0; p < BITS; ++p) {
        const int from = nibble_place(BITS, s, p);
        const auto bits = static_cast<uint8_t>(_pext_u64(word, plane_mask(BITS, p)));
        uint8_t* bytes = place + from / 2 * kVector + quad;
        const int shift = from % 2 * 4;
        bytes[0] |= (bits & 15) << shift;
        bytes[1] |= (bits >> 4) << shift;
      }
    }
  }
}

}  // namespace

void pack_lookup_row(const Matrix& w, const LookupLayout& l, int64_t row) {
  (w.bits == 1 ? write_codes<1> : w.bits == 2 ? write_codes<2> : write_codes<3>)(w, l, row);
  const int64_t tile = row / 16, begin = tile / kLookupTiles * kLookupTiles, chunk = l.chunk(begin);
  for (int64_t g = 0; g < l.groups; ++g) {
    const int64_t place = begin * l.groups + g * chunk + tile - begin;
    l.scale[place * 16 + row % 16] = w.scale[row * l.groups + g];
    if (!w.zero_point) continue;
    if (w.element == kBinary) {
      reinterpret_cast<uint16_t*>(l.zero_point)[place * 16 + row % 16] = w.low()[row * l.groups + g];
      continue;
    }
    const int code = read_code(w.zero_point + row * w.zero_point_bytes(), w.zero_point_bytes(), g, w.bits);
    uint8_t* stream = l.zero_point + place * 2 * w.bits;
    const int bit = row % 16 * w.bits;
    stream[bit / 8] |= code << bit % 8;
    if (bit % 8 + w.bits > 8) stream[bit / 8 + 1] |= code >> (8 - bit % 8);
  }
}

}  // namespace bitplan
#endif
