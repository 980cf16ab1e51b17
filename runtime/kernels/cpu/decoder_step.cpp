// The layers of a decoder, stage by stage; threads share every stage and meet behind it.
#include "decoder_step.h"

#include <string.h>

#include "barrier.h"
#include "decoder_stages.h"
#include "portable.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace bitplan {
namespace {

thread_local Workspace state_space, own_space;

const DecoderMath& math_of(int level) {
#if defined(__x86_64__)
  if (level == kAvx512) return kAvx512Math;
  if (level == kAvx2) return kAvx2Math;
#endif
  return kPortableMath;
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
    if (half.token_block) {
      for (int64_t strip = first(half.rows.rows / kStrip); strip < last(half.rows.rows / kStrip); ++strip) {
        const int64_t row = strip * kStrip, block = row / (heads * dim), channel = row % (heads * dim);
        for (int64_t k = 0; k < kStrip; ++k) math_.dequantize(half.rows, row + k, scores_ + k * half.token_block);
        math_.transpose(scores_, half.token_block, place_of(channel / dim, block * half.token_block) + channel % dim, dim);
      }
    } else {
      for (int64_t row = first(half.rows.rows); row < last(half.rows.rows); ++row)
        math_.dequantize(half.rows, row, place_of(row % heads, row / heads));
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

  // Heads of a group that a thread takes together: as many as may be, for keys and values are then read once, unless
  // threads would wait for one that has more to do.
  int64_t heads_together() const {
    const int64_t group = d_.heads / d_.key_value_heads, groups = step_.tokens * d_.key_value_heads;
    int64_t best = 1, least = divide_up(step_.tokens * d_.heads, threads_);
    for (int64_t heads = 2; heads <= group && heads <= kMostHeads; ++heads) {
      const int64_t most = divide_up(groups * divide_up(group, heads), threads_) * heads;
      if (most <= least) best = heads, least = most;
    }
    return best;
  }

  void attend(const Kept& kept) {
    const int64_t dim = d_.head_dim, group = d_.heads / d_.key_value_heads, together = heads_together();
    const int64_t parts = divide_up(group, together), count = step_.tokens * d_.key_value_heads * parts;
    // Later tokens see more: a thread takes every n-th part of a group and token.
    for (int64_t i = thread_; i < count; i += threads_) {
      const int64_t t = i % step_.tokens, key_head = i / step_.tokens / parts, first = i / step_.tokens % parts * together;
      const int64_t at = (t * d_.heads + key_head * group + first) * dim, from = key_head * kept.capacity * dim;
      math_.attend(s_.query + at, kept.keys + from, kept.values + from, step_.positions() + t + 1,
                   first + together <= group ? together : group - first, dim, d_.attention_scale, scores_,
                   s_.attended + at);
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

void embed(const Decoder& d, const Step& step, int level, float* hidden) {
  if (!step.ids) {
    memcpy(hidden, step.hidden, step.tokens * d.hidden * sizeof(float));
    return;
  }
  for (int64_t t = 0; t < step.tokens; ++t, hidden += d.hidden) {
    math_of(level).dequantize(d.embedding, step.ids[t], hidden);
    for (int64_t i = 0; i < d.hidden; ++i) hidden[i] *= d.embedding_scale;
  }
}

// What a thread needs for the scores of its heads, and before them for the channels of a block that it reads back.
int64_t score_floats(const Decoder& d, const Step& step) {
  int64_t most = kMostHeads * (step.positions() + step.tokens);
  for (int64_t i = 0; step.packed && i < 2 * d.layer_count; ++i)
    if (kStrip * step.packed[i].token_block > most) most = kStrip * step.packed[i].token_block;
  return most;
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
  const int64_t own = divide_up(needs.scratch_floats + score_floats(d, step), 16) * 16 + 16;
  float* scratch = reinterpret_cast<float*>(own_space.reserve(threads * own * int64_t(sizeof(float)) + 64));
  if (!memory || !scratch) return false;
  place_states(d, step.tokens, memory, states);
  embed(d, step, level, states.hidden);
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
