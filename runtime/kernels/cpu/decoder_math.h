// The bodies of DecoderMath in vectors of BITPLAN_LANES floats (4, 8 or 16), which a compiler turns into the
// instructions that the including file allows. Include it once in a file, after the pragma that names them, with
// BITPLAN_MATH defined as the table's name.
#include <math.h>
#include <string.h>

#include "decoder_step.h"

#define BITPLAN_ALWAYS static inline __attribute__((always_inline))

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

// Scaled products of the query with KEYS keys in a row.
template <int KEYS>
BITPLAN_ALWAYS void score(const float* query, const float* keys, int64_t head_dim, float scale, float* scores) {
  Floats sums[KEYS] = {};
  for (int64_t i = 0; i < head_dim; i += kLanes)
    for (int j = 0; j < KEYS; ++j) sums[j] += load(query + i) * load(keys + j * head_dim + i);
  for (int j = 0; j < KEYS; ++j) scores[j] = sum_lanes(sums[j]) * scale;
}

// scores[j] = e^(scores[j] - largest); returns their sum.
float exponentiate(int64_t count, float* scores) {
  float largest = scores[0], total = 0;
  for (int64_t j = 1; j < count; ++j) largest = scores[j] > largest ? scores[j] : largest;
  Floats sums{};
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) {
    const Floats e = exponential(load(scores + j) - largest);
    store(scores + j, e);
    sums += e;
  }
  float rest[kLanes] = {};
  memcpy(rest, scores + j, (count - j) * sizeof(float));
  store(rest, exponential(load(rest) - largest));
  memcpy(scores + j, rest, (count - j) * sizeof(float));
  for (int64_t i = 0; i < count - j; ++i) total += rest[i];
  return total + sum_lanes(sums);
}

// out[0 .. 16 PARTS) of the weighted sum of values.
template <int PARTS>
BITPLAN_ALWAYS void combine(const float* weights, const float* values, int64_t count, int64_t head_dim, float factor,
                            float* out) {
  Floats sums[PARTS] = {};
  for (int64_t j = 0; j < count; ++j)
    for (int i = 0; i < PARTS; ++i) sums[i] += load(values + j * head_dim + i * kLanes) * weights[j];
  for (int i = 0; i < PARTS; ++i) store(out + i * kLanes, sums[i] * factor);
}

void attend(const float* query, const float* keys, const float* values, int64_t count, int64_t head_dim, float scale,
            float* scores, float* out) {
  int64_t j = 0, i = 0;
  for (; j + 4 <= count; j += 4) score<4>(query, keys + j * head_dim, head_dim, scale, scores + j);
  for (; j < count; ++j) score<1>(query, keys + j * head_dim, head_dim, scale, scores + j);
  const float factor = 1.0f / exponentiate(count, scores);
  for (; i + 4 * kLanes <= head_dim; i += 4 * kLanes) combine<4>(scores, values + i, count, head_dim, factor, out + i);
  for (; i < head_dim; i += kLanes) combine<1>(scores, values + i, count, head_dim, factor, out + i);
}

}  // namespace

const DecoderMath BITPLAN_MATH = {normalize, add, gate, rotate, attend};

}  // namespace bitplan
