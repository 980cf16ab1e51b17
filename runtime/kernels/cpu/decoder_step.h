// One pass of a decoder of Llama's shape over a few tokens of one sequence, all layers in one call.
//
//   h  = x + O attend(rotate(norm(Q n)), rotate(norm(K n)), V n),   n = rms(x)
//   x' = h + D (silu(G m) * U m),                                   m = rms(h)
//
// and the head on the last norm of the last layer. Keys and values of every position are kept in float32; or those of
// past positions are packed, and read back one layer at a time. What an operation is in PyTorch defines it;
// `runtime/decoder_tensors.py` says which models have this shape.
#pragma once
#include "packed_matrix.h"

namespace bitplan {

struct Linear {
  Matrix weight;  // and the planes behind it
  const float* bias;  // [rows], or null
};

// One layer; the fields are read by ctypes in the same order, as are those below.
struct Layer {
  const float *attention_norm, *feed_forward_norm;  // [hidden]
  const float *query_norm, *key_norm;               // [head_dim] each, or null where queries and keys have no norm
  Linear query, key, value, output, gate, up, down;
};

struct Decoder {
  const Layer* layers;
  const float* last_norm;  // [hidden]
  Linear head;
  Matrix embedding;  // the table of tokens [rows, hidden]; without codes where embeddings are given
  int64_t layer_count, hidden, heads, key_value_heads, head_dim, feed_forward;
  float epsilon, attention_scale, embedding_scale;
};

// The packed keys, or values, of a layer: token by token [tokens * key_value_heads, head_dim], or in blocks of
// `token_block` tokens [blocks * key_value_heads * head_dim, token_block]; behind them further tokens in float16.
struct PackedHalf {
  Matrix rows;
  int64_t token_block;     // 0 for token by token
  const uint16_t* recent;  // [key_value_heads, recent_tokens, head_dim]
  int64_t recent_tokens;

  int64_t packed_tokens(int64_t heads, int64_t dim) const {
    return token_block ? rows.rows / (heads * dim) * token_block : rows.rows / heads;
  }
};

// The tokens of one call. They come behind `past` others; `capacity` positions have room. Before these there may be
// `packed_tokens` more, which are read into `room`.
struct Step {
  const int64_t* ids;          // [tokens] rows of the embedding, or null where `hidden` is given
  const float* hidden;         // [tokens, hidden] embeddings
  const float *cosine, *sine;  // [tokens, head_dim]
  float* states;              // [layers, 2 (keys, values), key_value_heads, capacity, head_dim]
  float* logits;              // [wanted, rows of the head], of the last tokens
  int64_t tokens, past, capacity, wanted;
  const PackedHalf* packed;  // [layers, 2], or null
  float* room;               // [2, key_value_heads, room_capacity, head_dim], at least of all positions
  int64_t packed_tokens, room_capacity;

  int64_t positions() const { return packed_tokens + past; }  // before the first of these tokens
};

// Returns false when there is no memory for it.
bool run_step(const Decoder&, const Step&, int level, int threads);

constexpr int kMostHeads = 4, kStrip = 16;

// What is done to vectors of floats, compiled for each instruction set. All lengths are multiples of 16.
struct DecoderMath {
  // out = x / sqrt(mean(x^2) + epsilon) * weight
  void (*normalize)(const float* x, const float* weight, int64_t length, float epsilon, float* out);
  void (*add)(const float* x, int64_t length, float* sum);
  // out = silu(gate) * up
  void (*gate)(const float* gate, const float* up, int64_t length, float* out);
  // Turns the pairs (x[i], x[i + length / 2]), in place.
  void (*rotate)(const float* cosine, const float* sine, int64_t length, float* x);
  // out[h] = sum_j softmax_j(scale query[h] . keys[j]) values[j] over `count` positions, for at most kMostHeads heads
  // behind one another that read the same keys and values; `scores` has room for as many positions of each.
  void (*attend)(const float* query, const float* keys, const float* values, int64_t count, int64_t heads,
                 int64_t head_dim, float scale, float* scores, float* out);
  // As dequantize_row.
  void (*dequantize)(const Matrix&, int64_t row, float* out);
  // out[t * stride + k] = rows[k * count + t] of kStrip rows of `count` numbers.
  void (*transpose)(const float* rows, int64_t count, float* out, int64_t stride);
};

extern const DecoderMath kAvx512Math;
extern const DecoderMath kAvx2Math;
extern const DecoderMath kPortableMath;

}  // namespace bitplan
