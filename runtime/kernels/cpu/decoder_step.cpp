// The layers of a decoder, stage by stage; threads share every stage and meet behind it.
#include "decoder_step.h"

#include <string.h>

#include <atomic>
#include <initializer_list>
#include <thread>

#include "portable.h"
#include "product.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace bitplan {
namespace {

constexpr int kMostProducts = 3, kMostTasks = kMostProducts * kMostPlanes;

// Threads wait here for each other. They spin: a stage is a few microseconds, less than it takes to wake.
class Barrier {
 public:
  // Before any of the threads waits.
  void expect(int threads) { threads_ = threads; }

  void wait() {
    if (threads_ == 1) return;
    const int round = round_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins)
      // On a machine with more threads than processors the one waited for may not be running.
      if (spins > 4000) std::this_thread::yield();
  }

 private:
  int threads_ = 1;
  std::atomic<int> arrived_{0}, round_{0};
};

// States of the tokens of a step, shared by the threads.
struct States {
  float *hidden, *normed, *delta;  // [tokens, hidden]
  float *query, *attended;         // [tokens, heads, head_dim]
  float *key, *value;              // [tokens, key_value_heads, head_dim]
  float *gate, *up;                // [tokens, feed_forward]
  uint8_t* rounded;
};

thread_local Workspace state_space, own_space;

const DecoderMath& math_of(int level) {
#if defined(__x86_64__)
  if (level == kAvx512) return kAvx512Math;
  if (level == kAvx2) return kAvx2Math;
#endif
  return kPortableMath;
}

// Products of the same states: their weights and where they go.
struct Stage {
  const Linear* linears[kMostProducts];
  const float* x;
  float* outs[kMostProducts];
  int count;
};

void list_stages(const Decoder& d, const Layer& l, const States& s, Stage (&stages)[4]) {
  stages[0] = {{&l.query, &l.key, &l.value}, s.normed, {s.query, s.key, s.value}, 3};
  stages[1] = {{&l.output}, s.attended, {s.delta}, 1};
  stages[2] = {{&l.gate, &l.up}, s.normed, {s.gate, s.up}, 2};
  stages[3] = {{&l.down}, s.gate, {s.delta}, 1};
}

// Returns the number of tasks.
int64_t plan_stage(const Stage& stage, int64_t tokens, int level, Task (&tasks)[kMostTasks]) {
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

Stage head_stage(const Decoder& d, const Step& step, const States& s) {
  const float* x = s.normed ? s.normed + (step.tokens - step.wanted) * d.hidden : nullptr;
  return {{&d.head}, x, {step.logits}, 1};
}

// The keys and values of a layer of all positions in float32: those of head h begin at h * capacity positions.
struct Kept {
  float *keys, *values;
  int64_t capacity;
};

// What one thread does.
class Worker {
 public:
  Worker(const Decoder& d, const Step& step, const States& states, int level, int thread, int threads,
         Barrier& barrier, float* scratch, float* scores)
      : d_(d), step_(step), s_(states), math_(math_of(level)), level_(level), thread_(thread), threads_(threads),
        barrier_(barrier), scratch_(scratch), scores_(scores) {}

  void run() {
    for (int64_t i = 0; i < d_.layer_count; ++i) run_layer(i);
    normalize(d_.last_norm, d_.layer_count > 0);
    // The head reads states of other threads' tokens, rounded in another division of them.
    barrier_.wait();
    multiply(head_stage(d_, step_, s_), step_.wanted);
  }

 private:
  void run_layer(int64_t index) {
    const Layer& layer = d_.layers[index];
    Stage stages[4];
    list_stages(d_, layer, s_, stages);
    const Kept states = find_kept(step_.states, 2 * index, step_.capacity);
    // No other thread reads the room of the layer before: all have met since.
    const Kept kept = step_.packed ? find_kept(step_.room, 0, step_.room_capacity) : states;
    normalize(layer.attention_norm, index > 0);
    multiply(stages[0], step_.tokens);
    if (step_.packed) {
      unpack(step_.packed[2 * index], kept.keys, states.keys);
      unpack(step_.packed[2 * index + 1], kept.values, states.values);
    }
    place(layer, states, kept);
    barrier_.wait();
    attend(kept);
    barrier_.wait();
    multiply(stages[1], step_.tokens);
    normalize(layer.feed_forward_norm, true);
    multiply(stages[2], step_.tokens);
    for (int64_t t = first(step_.tokens); t < last(step_.tokens); ++t)
      math_.gate(s_.gate + t * d_.feed_forward, s_.up + t * d_.feed_forward, d_.feed_forward,
                 s_.gate + t * d_.feed_forward);
    multiply(stages[3], step_.tokens);
  }

  int64_t first(int64_t count) const { return count * thread_ / threads_; }
  int64_t last(int64_t count) const { return count * (thread_ + 1) / threads_; }

  // Norms the thread's tokens, to which the product before is added first.
  void normalize(const float* weight, bool adds) {
    for (int64_t t = first(step_.tokens); t < last(step_.tokens); ++t) {
      float* hidden = s_.hidden + t * d_.hidden;
      if (adds) math_.add(s_.delta + t * d_.hidden, d_.hidden, hidden);
      math_.normalize(hidden, weight, d_.hidden, d_.epsilon, s_.normed + t * d_.hidden);
    }
  }

  // Every thread rounds the tokens that it has just computed; the outputs are there when it returns.
  void multiply(const Stage& stage, int64_t tokens) {
    Task tasks[kMostTasks];
    const int64_t count = plan_stage(stage, tokens, level_, tasks);
    place_activations(tasks, count, s_.rounded);
    round_share(tasks, count, thread_, threads_);
    barrier_.wait();
    multiply_share(tasks, count, thread_, threads_, scratch_);
    barrier_.wait();
  }

  void normalize_head(const float* weight, float* head) const {
    if (weight) math_.normalize(head, weight, d_.head_dim, d_.epsilon, head);
  }

  Kept find_kept(float* memory, int64_t first, int64_t capacity) const {
    const int64_t half = d_.key_value_heads * capacity * d_.head_dim;
    return {memory + first * half, memory + (first + 1) * half, capacity};
  }

  // Reads packed positions into the room of a layer, and puts those behind them that came with this step's tokens.
  void unpack(const PackedHalf& half, float* room, const float* states) {
    const int64_t heads = d_.key_value_heads, dim = d_.head_dim, packed = half.packed_tokens(heads, dim);
    const auto place_of = [&](int64_t head, int64_t t) { return room + (head * step_.room_capacity + t) * dim; };
    for (int64_t row = first(half.rows.rows); row < last(half.rows.rows); ++row) {
      if (!half.token_block) {
        math_.dequantize(half.rows, row, place_of(row % heads, row / heads));
        continue;
      }
      const int64_t block = row / (heads * dim), channel = row % (heads * dim);
      math_.dequantize(half.rows, row, scores_);
      float* to = place_of(channel / dim, block * half.token_block) + channel % dim;
      for (int64_t t = 0; t < half.token_block; ++t) to[t * dim] = scores_[t];
    }
    for (int64_t i = first(heads * half.recent_tokens); i < last(heads * half.recent_tokens); ++i) {
      float* to = place_of(i / half.recent_tokens, packed + i % half.recent_tokens);
      for (int64_t k = 0; k < dim; ++k) to[k] = widen(half.recent[i * dim + k]);
    }
    for (int64_t head = first(heads); head < last(heads); ++head)
      memcpy(place_of(head, step_.packed_tokens), states + head * step_.capacity * dim, step_.past * dim * sizeof(float));
  }

  void keep(const Kept& kept, int64_t head, int64_t position, const float* key, const float* value) const {
    const int64_t to = (head * kept.capacity + position) * d_.head_dim;
    memcpy(kept.keys + to, key, d_.head_dim * sizeof(float));
    memcpy(kept.values + to, value, d_.head_dim * sizeof(float));
  }

  // Queries are turned in place, keys and values put behind those before, in the room of the layer as well.
  void place(const Layer& layer, const Kept& states, const Kept& room) {
    const int64_t dim = d_.head_dim, each = d_.heads + d_.key_value_heads, count = step_.tokens * each;
    for (int64_t i = first(count); i < last(count); ++i) {
      const int64_t t = i / each, head = i % each, key_head = head - d_.heads;
      const float *cosine = step_.cosine + t * dim, *sine = step_.sine + t * dim;
      if (key_head < 0) {
        float* query = s_.query + (t * d_.heads + head) * dim;
        normalize_head(layer.query_norm, query);
        math_.rotate(cosine, sine, dim, query);
        continue;
      }
      const int64_t from = (t * d_.key_value_heads + key_head) * dim;
      normalize_head(layer.key_norm, s_.key + from);
      math_.rotate(cosine, sine, dim, s_.key + from);
      keep(states, key_head, step_.past + t, s_.key + from, s_.value + from);
      if (step_.packed) keep(room, key_head, step_.positions() + t, s_.key + from, s_.value + from);
    }
  }

  void attend(const Kept& kept) {
    const int64_t dim = d_.head_dim, group = d_.heads / d_.key_value_heads, count = step_.tokens * d_.heads;
    // Later tokens see more: a thread takes every n-th pair of head and token.
    for (int64_t i = thread_; i < count; i += threads_) {
      const int64_t head = i / step_.tokens, t = i % step_.tokens, at = (t * d_.heads + head) * dim;
      const int64_t first = head / group * kept.capacity * dim;
      math_.attend(s_.query + at, kept.keys + first, kept.values + first, step_.positions() + t + 1, dim,
                   d_.attention_scale, scores_, s_.attended + at);
    }
  }

  const Decoder& d_;
  const Step& step_;
  const States& s_;
  const DecoderMath& math_;
  const int level_, thread_, threads_;
  Barrier& barrier_;
  float *scratch_, *scores_;
};

// Divides memory among the states; returns the floats used. Without memory it only counts.
int64_t place_states(const Decoder& d, int64_t tokens, float* memory, States& s) {
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

}  // namespace

bool run_step(const Decoder& d, const Step& step, int level, int threads) {
  States states{};
  Needs needs;
  for (int64_t i = 0; i < d.layer_count; ++i) {
    Stage stages[4];
    list_stages(d, d.layers[i], states, stages);
    for (const Stage& stage : stages) needs.include(stage, step.tokens, level, threads);
  }
  const int useful = needs.threads;
  needs.include(head_stage(d, step, states), step.wanted, level, threads);
  threads = useful;

  const int64_t floats = place_states(d, step.tokens, nullptr, states);
  float* memory = reinterpret_cast<float*>(
      state_space.reserve(floats * int64_t(sizeof(float)) + needs.rounded_bytes + 64));
  // Each thread's own part begins at a cache line.
  const int64_t own = divide_up(needs.scratch_floats + step.positions() + step.tokens, 16) * 16 + 16;
  float* scratch = reinterpret_cast<float*>(own_space.reserve(threads * own * int64_t(sizeof(float)) + 64));
  if (!memory || !scratch) return false;
  place_states(d, step.tokens, memory, states);
  memcpy(states.hidden, step.hidden, step.tokens * d.hidden * sizeof(float));
  Barrier barrier;
#pragma omp parallel num_threads(threads)
  {
#ifdef _OPENMP
    const int thread = omp_get_thread_num(), running = omp_get_num_threads();
#else
    const int thread = 0, running = 1;
#endif
    // Fewer may run than were asked for. All of them pass here before one goes on.
#pragma omp single
    barrier.expect(running);
    float* mine = scratch + thread * own;
    Worker(d, step, states, level, thread, running, barrier, mine, mine + needs.scratch_floats).run();
  }
  return true;
}

}  // namespace bitplan
