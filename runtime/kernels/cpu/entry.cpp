// The C interface that Python calls through ctypes.
#include "decoder_step.h"
#include "lookup.h"
#include "portable.h"
#include "product.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace bitplan {
namespace {

thread_local Workspace activation_space, scratch_space;

float* reserve_scratch(int64_t floats) {
  return reinterpret_cast<float*>(scratch_space.reserve(floats * sizeof(float) + 64));
}

bool run_tasks(Task* tasks, int64_t count, int threads) {
  uint8_t* memory = activation_space.reserve(rounded_bytes(tasks, count) + 64);
  if (!memory) return false;
  place_activations(tasks, count, memory);
  const int64_t floats = scratch_floats(tasks, count);
  threads = useful_threads(tasks, count, threads);
  if (threads < 2) {
    float* scratch = reserve_scratch(floats);
    if (!scratch) return false;
    round_share(tasks, count, 0, 1);
    multiply_share(tasks, count, 0, 1, scratch);
    return true;
  }
  int64_t tokens = 0;
  for (int64_t i = 0; i < count; ++i) tokens += tasks[i].tokens;
  bool complete = true;
  // One token is rounded sooner than a thread wakes.
  if (tokens == count) round_share(tasks, count, 0, 1);
#pragma omp parallel num_threads(threads)
  {
#ifdef _OPENMP
    const int thread = omp_get_thread_num(), running = omp_get_num_threads();
#else
    const int thread = 0, running = 1;
#endif
    if (tokens != count) round_share(tasks, count, thread, running);
#pragma omp barrier
    float* scratch = reserve_scratch(floats);
    if (scratch)
      multiply_share(tasks, count, thread, running, scratch);
    else
      complete = false;
  }
  return complete;
}

}  // namespace
}  // namespace bitplan

extern "C" {

// The best level that this processor has.
int bitplan_best_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return bitplan::kPortable;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
  return avx512 ? bitplan::kAvx512 : bitplan::kAvx2;
#else
  return bitplan::kPortable;
#endif
}

// Computes all products; returns 0, or 1 when there is no memory for it.
int bitplan_multiply(const bitplan::Product* products, int64_t count, int level, int threads) {
  using namespace bitplan;
  const int64_t task_count = count_tasks(products, count);
  Task few[16];
  Task* tasks = task_count <= 16 ? few : static_cast<Task*>(malloc(task_count * sizeof(Task)));
  if (!tasks) return 1;
  plan_tasks(products, count, level, tasks);
  const bool complete = run_tasks(tasks, task_count, threads);
  if (tasks != few) free(tasks);
  return complete ? 0 : 1;
}

// Runs a decoder over some tokens, see decoder_step.h; returns 0, or 1 when there is no memory for it.
int bitplan_step(const bitplan::Decoder* decoder, const bitplan::Step* step, int level, int threads) {
  return bitplan::run_step(*decoder, *step, level, threads) ? 0 : 1;
}

// Writes the float32 rows of a weight: all of them, or those at `indices`.
void bitplan_dequantize(const bitplan::Matrix* weight, const int64_t* indices, int64_t count, float* out, int threads) {
#pragma omp parallel for num_threads(threads) if (count * weight->inputs > (1 << 16))
  for (int64_t i = 0; i < count; ++i)
    bitplan::dequantize_row(*weight, indices ? indices[i] : i, out + i * weight->inputs);
}

// Bytes of a weight in the layout of lookup.h, or 0 where no kernel at the level reads it.
int64_t bitplan_lookup_bytes(const bitplan::Matrix* weight, int level) {
  if (level < bitplan::kAvx512 || !bitplan::has_lookup(*weight)) return 0;
  return bitplan::LookupLayout(*weight, nullptr).bytes(weight->zero_point != nullptr);
}

// Writes that layout into so many bytes, all zero.
void bitplan_pack_lookup(const bitplan::Matrix* weight, uint8_t* memory, int threads) {
#if defined(__x86_64__)
  const bitplan::LookupLayout layout(*weight, memory);
  // Rows of a tile share bytes: a thread has whole tiles.
#pragma omp parallel for num_threads(threads)
  for (int64_t tile = 0; tile < layout.tiles(); ++tile)
    for (int64_t row = 16 * tile; row < 16 * tile + 16 && row < weight->rows; ++row)
      bitplan::pack_lookup_row(*weight, layout, row);
#endif
}
}
