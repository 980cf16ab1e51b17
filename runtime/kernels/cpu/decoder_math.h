// The bodies of DecoderMath in vectors of BITPLAN_LANES floats (4, 8 or 16), which a compiler turns into the
// instructions that the including file allows. Include it once in a file, after the pragma that names them, with
// BITPLAN_MATH defined as the table's name.
#include <math.h>
#include <string.h>

#include <utility>

#include "decoder_step.h"
#include "portable.h"

#define BITPLAN_ALWAYS static inline __attribute__((always_inline))

#include "decoder_rows.h"

namespace bitplan {
namespace {

constexpr int kLanes = BITPLAN_LANES;
// Unaligned, and allowed to view any floats.
typedef float Floats __attribute__((vector_size(4 * BITPLAN_LANES), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(4 * BITPLAN_LANES), aligned(4), may_alias));

BITPLAN_ALWAYS Floats load(const float* x) { return *reinterpret_cast<const Floats*>(x); }
BITPLAN_ALWAYS void store(float* x, Floats v) { *reinterpret_cast<Floats*>(x) = v; }
BITPLAN_ALWAYS Floats fill(float value) { return Floats{} + value; }

BITPLAN_ALWAYS float sum_lanes(Floats v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// e^x by x = n ln 2 + r, |r| <= ln 2 / 2, and the Taylor polynomial of degree 7: relative error below 2^-23 and some
// roundings. Results outside the normal numbers become the smallest or largest of them; NaN stays.
BITPLAN_ALWAYS Floats exponential(Floats x) {
  const float lowest = -87.3f, highest = 88.3f;
  x = x < lowest ? fill(lowest) : x;
  x = x > highest ? fill(highest) : x;
  // Adding 1.5 * 2^23 rounds to an integer, which is then in the lowest bits.
  const float magic = 12582912.0f;
  const Floats shifted = x * 1.44269504f + magic, n = shifted - magic;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = r * (1.0f / 5040) + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  Integers bits;
  memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + (127 - 0x4b400000)) << 23;
  Floats power;
  memcpy(&power, &bits, sizeof power);
  return p * power;
}

void normalize(const float* x, const float* weight, int64_t length, float epsilon, float* out) {
  Floats squares{};
  for (int64_t i = 0; i < length; i += kLanes) squares += load(x + i) * load(x + i);
  const float factor = 1.0f / sqrtf(sum_lanes(squares) / static_cast<float>(length) + epsilon);
  for (int64_t i = 0; i < length; i += kLanes) store(out + i, load(weight + i) * (load(x + i) * factor));
}

void add(const float* x, int64_t length, float* sum) {
  for (int64_t i = 0; i < length; i += kLanes) store(sum + i, load(sum + i) + load(x + i));
}

void gate(const float* gate, const float* up, int64_t length, float* out) {
  for (int64_t i = 0; i < length; i += kLanes) {
    const Floats g = load(gate + i);
    store(out + i, g / (exponential(-g) + 1.0f) * load(up + i));
  }
}

void rotate(const float* cosine, const float* sine, int64_t length, float* x) {
  const int64_t half = length / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[half + i];
    x[i] = a * cosine[i] - b * sine[i];
    x[half + i] = b * cosine[half + i] + a * sine[half + i];
  }
}

template <int... I>
BITPLAN_ALWAYS Floats pick(Floats u, Floats v, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(u, v, I...);
#else
  return __builtin_shuffle(u, v, Integers{I...});
#endif
}

// The lanes of two vectors are segments; these are the first, or second, halves of all of them, in order.
template <int SEGMENT, bool SECOND, int... I>
BITPLAN_ALWAYS Floats pick_halves(Floats u, Floats v, std::integer_sequence<int, I...>) {
  constexpr int kHalf = SEGMENT / 2;
  return pick(u, v, std::integer_sequence<int, (I / kHalf * SEGMENT + I % kHalf + (SECOND ? kHalf : 0))...>{});
}

// The sums of the lanes of COUNT vectors, each spread over a segment of the result.
template <int COUNT>
BITPLAN_ALWAYS Floats sum_each(const Floats* x) {
  if constexpr (COUNT == 1) {
    return *x;
  } else {
    using Lanes = std::make_integer_sequence<int, kLanes>;
    constexpr int kSegment = 2 * kLanes / COUNT;
    const Floats u = sum_each<COUNT / 2>(x), v = sum_each<COUNT / 2>(x + COUNT / 2);
    return pick_halves<kSegment, false>(u, v, Lanes{}) + pick_halves<kSegment, true>(u, v, Lanes{});
  }
}

// Memory is asked for what lies 12, 8 and 4 KiB ahead, for what a fetch is dropped of where many misses are under way.
BITPLAN_ALWAYS void fetch_ahead(const float* place, int64_t floats) {
  for (int64_t i = 0; i < floats; i += 16)
    for (int f = 1; f <= 3; ++f) __builtin_prefetch(place + i + f * 1024, 0, 2);
}

// Scaled products of a query with as many keys as a vector has lanes.
BITPLAN_ALWAYS void score_lanes(const float* query, const float* keys, int64_t head_dim, float scale, float* scores) {
  Floats sums[kLanes] = {};
  for (int64_t i = 0; i < head_dim; i += kLanes) {
    const Floats q = load(query + i);
    for (int j = 0; j < kLanes; ++j) sums[j] += q * load(keys + j * head_dim + i);
  }
  store(scores, sum_each<kLanes>(sums) * scale);
}

// Of `heads` queries with the same keys; scores[heads, count].
void score(const float* query, const float* keys, int64_t count, int64_t heads, int64_t head_dim, float scale,
           float* scores) {
  for (int64_t j = 0; j < count; j += kLanes) {
    // The last vector may repeat what is in the one before.
    const int64_t first = j + kLanes <= count ? j : count - kLanes;
    if (first < 0) break;
    fetch_ahead(keys + first * head_dim, kLanes * head_dim);
    for (int64_t h = 0; h < heads; ++h)
      score_lanes(query + h * head_dim, keys + first * head_dim, head_dim, scale, scores + h * count + first);
  }
  if (count >= kLanes) return;
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t j = 0; j < count; ++j) {
      Floats sum{};
      for (int64_t i = 0; i < head_dim; i += kLanes)
        sum += load(query + h * head_dim + i) * load(keys + j * head_dim + i);
      scores[h * count + j] = sum_lanes(sum) * scale;
    }
}

BITPLAN_ALWAYS float find_largest(int64_t count, const float* x) {
  Floats most = fill(x[0]);
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) most = load(x + j) > most ? load(x + j) : most;
  float largest = x[0], lanes[kLanes];
  store(lanes, most);
  for (const float lane : lanes) largest = lane > largest ? lane : largest;
  for (; j < count; ++j) largest = x[j] > largest ? x[j] : largest;
  return largest;
}

// scores[j] = e^(scores[j] - largest); returns their sum.
float exponentiate(int64_t count, float* scores) {
  const float largest = find_largest(count, scores);
  Floats sums{};
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) {
    const Floats e = exponential(load(scores + j) - largest);
    store(scores + j, e);
    sums += e;
  }
  float rest[kLanes] = {}, total = 0;
  memcpy(rest, scores + j, (count - j) * sizeof(float));
  store(rest, exponential(load(rest) - largest));
  memcpy(scores + j, rest, (count - j) * sizeof(float));
  for (int64_t i = 0; i < count - j; ++i) total += rest[i];
  return total + sum_lanes(sums);
}

// PARTS vectors of each head's weighted sum of values: every value is read once for all heads.
template <int HEADS, int PARTS>
BITPLAN_ALWAYS void combine_parts(const float* weights, const float* values, int64_t count, int64_t head_dim,
                                  const float* factors, float* out) {
  Floats sums[HEADS][PARTS] = {};
  for (int64_t j = 0; j < count; ++j) {
    fetch_ahead(values + j * head_dim, PARTS * kLanes);
    for (int i = 0; i < PARTS; ++i) {
      const Floats value = load(values + j * head_dim + i * kLanes);
      for (int h = 0; h < HEADS; ++h) sums[h][i] += value * weights[h * count + j];
    }
  }
  for (int h = 0; h < HEADS; ++h)
    for (int i = 0; i < PARTS; ++i) store(out + h * head_dim + i * kLanes, sums[h][i] * factors[h]);
}

template <int HEADS>
void combine(const float* weights, const float* values, int64_t count, int64_t head_dim, const float* factors,
             float* out) {
  int64_t i = 0;
  for (; i + 4 * kLanes <= head_dim; i += 4 * kLanes)
    combine_parts<HEADS, 4>(weights, values + i, count, head_dim, factors, out + i);
  for (; i < head_dim; i += kLanes) combine_parts<HEADS, 1>(weights, values + i, count, head_dim, factors, out + i);
}

void attend(const float* query, const float* keys, const float* values, int64_t count, int64_t heads, int64_t head_dim,
            float scale, float* scores, float* out) {
  float factors[kMostHeads];
  score(query, keys, count, heads, head_dim, scale, scores);
  for (int64_t h = 0; h < heads; ++h) factors[h] = 1.0f / exponentiate(count, scores + h * count);
  const auto by_heads = heads == 1 ? combine<1> : heads == 2 ? combine<2> : heads == 3 ? combine<3> : combine<4>;
  by_heads(scores, values, count, head_dim, factors, out);
}

template <bool HIGH, int... I>
BITPLAN_ALWAYS Floats interleave(Floats u, Floats v, std::integer_sequence<int, I...>) {
  return pick(u, v, std::integer_sequence<int, (I / 2 + (HIGH ? kLanes / 2 : 0) + I % 2 * kLanes)...>{});
}

// Turns a square of as many vectors as a vector has lanes. Interleaving the halves moves the highest bit of an element's
// row to the lowest place of its column, and all others up by one; each bit has moved across when all rounds are over.
BITPLAN_ALWAYS void transpose_square(Floats (&x)[kLanes]) {
  using Lanes = std::make_integer_sequence<int, kLanes>;
  for (int round = 1; round < kLanes; round *= 2) {
    Floats turned[kLanes];
    for (int i = 0; i < kLanes / 2; ++i) {
      turned[2 * i] = interleave<false>(x[i], x[i + kLanes / 2], Lanes{});
      turned[2 * i + 1] = interleave<true>(x[i], x[i + kLanes / 2], Lanes{});
    }
    for (int i = 0; i < kLanes; ++i) x[i] = turned[i];
  }
}

void transpose(const float* rows, int64_t count, float* out, int64_t stride) {
  int64_t t = 0;
  for (; t + kLanes <= count; t += kLanes)
    for (int k = 0; k < kStrip; k += kLanes) {
      Floats square[kLanes];
      for (int i = 0; i < kLanes; ++i) square[i] = load(rows + (k + i) * count + t);
      transpose_square(square);
      for (int i = 0; i < kLanes; ++i) store(out + (t + i) * stride + k, square[i]);
    }
  for (; t < count; ++t)
    for (int k = 0; k < kStrip; ++k) out[t * stride + k] = rows[k * count + t];
}

}  // namespace

const DecoderMath BITPLAN_MATH = {normalize, add, gate, rotate, attend, dequantize, transpose};

}  // namespace bitplan
