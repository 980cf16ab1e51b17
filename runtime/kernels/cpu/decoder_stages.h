// The states of a decoder's step and the products between them.
#pragma once
#include <initializer_list>

#include "decoder_step.h"
#include "product.h"

namespace bitplan {

constexpr int kMostProducts = 3, kMostTasks = kMostProducts * kMostPlanes;

// States of the tokens of a step, shared by the threads.
struct States {
  float *hidden, *normed, *delta;  // [tokens, hidden]
  float *query, *attended;         // [tokens, heads, head_dim]
  float *key, *value;              // [tokens, key_value_heads, head_dim]
  float *gate, *up;                // [tokens, feed_forward]
  uint8_t* rounded;
};

// Divides memory among the states; returns the floats used. Without memory it only counts.
inline int64_t place_states(const Decoder& d, int64_t tokens, float* memory, States& s) {
  int64_t used = 0;
  const auto take = [&](float*& state, int64_t floats) {
    state = memory ? memory + used : nullptr;
    used += divide_up(floats, 16) * 16;
  };
  for (float** state : {&s.hidden, &s.normed, &s.delta}) take(*state, tokens * d.hidden);
  for (float** state : {&s.query, &s.attended}) take(*state, tokens * d.heads * d.head_dim);
  for (float** state : {&s.key, &s.value}) take(*state, tokens * d.key_value_heads * d.head_dim);
  for (float** state : {&s.gate, &s.up}) take(*state, tokens * d.feed_forward);
  s.rounded = reinterpret_cast<uint8_t*>(memory ? memory + used : nullptr);
  return used;
}

// Products of the same states: their weights and where they go.
struct Stage {
  const Linear* linears[kMostProducts];
  const float* x;
  float* outs[kMostProducts];
  int count;
};

inline void list_stages(const Decoder& d, const Layer& l, const States& s, Stage (&stages)[4]) {
  stages[0] = {{&l.query, &l.key, &l.value}, s.normed, {s.query, s.key, s.value}, 3};
  stages[1] = {{&l.output}, s.attended, {s.delta}, 1};
  stages[2] = {{&l.gate, &l.up}, s.normed, {s.gate, s.up}, 2};
  stages[3] = {{&l.down}, s.gate, {s.delta}, 1};
}

// Returns the number of tasks.
inline int64_t plan_stage(const Stage& stage, int64_t tokens, int level, Task (&tasks)[kMostTasks]) {
  Product products[kMostProducts];
  for (int i = 0; i < stage.count; ++i)
    products[i] = {&stage.linears[i]->weight, stage.x, stage.outs[i], stage.linears[i]->bias, tokens};
  plan_tasks(products, stage.count, level, tasks);
  return count_tasks(products, stage.count);
}

// What the largest of all products needs.
struct Needs {
  int64_t rounded_bytes = 0, scratch_floats = 0;
  int threads = 1;

  void include(const Stage& stage, int64_t tokens, int level, int most_threads) {
    Task tasks[kMostTasks];
    const int64_t count = plan_stage(stage, tokens, level, tasks);
    const int64_t bytes = bitplan::rounded_bytes(tasks, count);
    const int64_t floats = bitplan::scratch_floats(tasks, count);
    const int useful = useful_threads(tasks, count, most_threads);
    if (bytes > rounded_bytes) rounded_bytes = bytes;
    if (floats > scratch_floats) scratch_floats = floats;
    if (useful > threads) threads = useful;
  }
};

inline Stage head_stage(const Decoder& d, const Step& step, const States& s) {
  const float* x = s.normed ? s.normed + (step.tokens - step.wanted) * d.hidden : nullptr;
  return {{&d.head}, x, {step.logits}, 1};
}

}  // namespace bitplan
