// The C interface that Python calls through ctypes: which instruction set, which thread, which rows.
#include <stdlib.h>

#include "packed_matrix.h"
#include "portable.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace bitplan {
namespace {

enum Level { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

// Below this many bytes of weights for each thread, waking it costs more than it helps.
constexpr int64_t kLeastBytesPerThread = 48 << 10;
// Tokens that are rounded and multiplied at a time.
constexpr int64_t kMostTokens = 512;

// Memory that is kept from call to call; every thread has its own.
class Workspace {
 public:
  ~Workspace() { free(memory_); }
  uint8_t* reserve(int64_t bytes) {
    if (bytes > bytes_) {
      free(memory_);
      bytes_ = divide_up(bytes, 4096) * 4096;
      memory_ = static_cast<uint8_t*>(aligned_alloc(64, bytes_));
      if (!memory_) bytes_ = 0;
    }
    return memory_;
  }

 private:
  uint8_t* memory_ = nullptr;
  int64_t bytes_ = 0;
};

thread_local Workspace activation_space, scratch_space;

// One product: out[tokens, rows] = x[tokens, columns] W' + bias; read by ctypes in the same order.
struct Product {
  const Matrix* weight;
  const float* x;
  float* out;
  const float* bias;
  int64_t tokens;
};

struct Task {
  const Product* product;
  const Kernels* kernels;  // null: portable
  Activations activations;
  int64_t cost;  // of one row
};

const Kernels* kernels_of(int level) {
#if defined(__x86_64__)
  if (level == kAvx512) return &kAvx512Kernels;
  if (level == kAvx2) return &kAvx2Kernels;
#endif
  return nullptr;
}

bool has_vector_layout(const Matrix& w) {
  if (w.groups() == 1) return true;
  return w.group_size == 16 || w.group_size == 32 || w.group_size == 64 || w.group_size == 128 || w.group_size == 256;
}

Task plan_task(const Product& product, int level) {
  const Matrix& w = *product.weight;
  Task task = {&product, has_vector_layout(w) ? kernels_of(level) : nullptr, {}, 0};
  task.activations.tokens = product.tokens;
  task.activations.columns = w.columns;
  const bool decode = product.tokens <= kDecodeTokens;
  if (task.kernels) task.kernels->shape(w, task.activations, decode);
  task.cost = decode ? w.row_bytes() : w.columns * product.tokens / 8 + w.row_bytes();
  return task;
}

int64_t activation_bytes(const Task& task) {
  const Activations& a = task.activations;
  if (!task.kernels) return 0;
  return divide_up(a.tokens * (a.value_stride + 2 * a.block_stride * int64_t(sizeof(float))), 64) * 64;
}

int64_t scratch_floats(const Task& task) {
  const Matrix& w = *task.product->weight;
  return task.kernels ? task.kernels->scratch_floats(w, task.activations) : w.columns;
}

void place_activations(Task& task, uint8_t* memory) {
  Activations& a = task.activations;
  a.values = memory;
  a.step = reinterpret_cast<float*>(memory + a.tokens * a.value_stride);
  a.sum = a.step + a.tokens * a.block_stride;
}

void run_rows(const Task& task, int64_t first_row, int64_t last_row, float* scratch) {
  const Product& p = *task.product;
  const Output out = {p.out, p.weight->rows, p.bias};
  if (first_row >= last_row || p.tokens == 0) return;
  if (!task.kernels)
    portable_multiply(*p.weight, p.x, p.tokens, out, first_row, last_row, scratch);
  else if (p.tokens <= kDecodeTokens)
    task.kernels->decode(*p.weight, task.activations, 0, p.tokens, out, first_row, last_row, scratch);
  else
    task.kernels->prefill(*p.weight, task.activations, out, first_row, last_row, scratch);
}

// The first row of a task that costs `before` or more come before, at a place where a range may begin.
int64_t row_at(const Task& task, int64_t before) {
  const int64_t rows = task.product->weight->rows;
  if (before <= 0) return 0;
  const int64_t multiple = task.kernels ? task.kernels->prefill_rows : 1;
  const int64_t row = divide_up(before / task.cost, multiple) * multiple;
  return row < rows ? row : rows;
}

// The share of one thread: a contiguous part of all rows of all tasks, of equal cost.
void run_share(const Task* tasks, int64_t count, int64_t total, int thread, int threads, float* scratch) {
  const int64_t first = total * thread / threads, last = total * (thread + 1) / threads;
  int64_t before = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t rows = tasks[i].product->weight->rows, cost = rows * tasks[i].cost;
    const int64_t stop = before + cost <= last ? rows : row_at(tasks[i], last - before);
    run_rows(tasks[i], row_at(tasks[i], first - before), stop, scratch);
    before += cost;
  }
}

void quantize_share(const Task* tasks, int64_t count, int thread, int threads) {
  for (int64_t i = 0; i < count; ++i) {
    const Activations& a = tasks[i].activations;
    if (!tasks[i].kernels) continue;
    tasks[i].kernels->quantize(tasks[i].product->x, a, a.tokens * thread / threads, a.tokens * (thread + 1) / threads);
  }
}

bool run_tasks(Task* tasks, int64_t count, int threads) {
  int64_t bytes = 0, floats = 0, total = 0, tokens = 0;
  for (int64_t i = 0; i < count; ++i) {
    bytes += activation_bytes(tasks[i]);
    if (scratch_floats(tasks[i]) > floats) floats = scratch_floats(tasks[i]);
    total += tasks[i].cost * tasks[i].product->weight->rows;
    tokens += tasks[i].product->tokens;
  }
  uint8_t* memory = activation_space.reserve(bytes + 64);
  if (!memory) return false;
  for (int64_t i = 0; i < count; memory += activation_bytes(tasks[i]), ++i) place_activations(tasks[i], memory);
  if (total / kLeastBytesPerThread < threads) threads = total / kLeastBytesPerThread;
  if (threads < 2) {
    float* scratch = reinterpret_cast<float*>(scratch_space.reserve(floats * sizeof(float) + 64));
    if (!scratch) return false;
    quantize_share(tasks, count, 0, 1);
    run_share(tasks, count, total, 0, 1, scratch);
    return true;
  }
  bool complete = true;
  // One token is rounded sooner than a thread wakes.
  if (tokens == count) quantize_share(tasks, count, 0, 1);
#pragma omp parallel num_threads(threads)
  {
#ifdef _OPENMP
    const int thread = omp_get_thread_num(), running = omp_get_num_threads();
#else
    const int thread = 0, running = 1;
#endif
    if (tokens != count) quantize_share(tasks, count, thread, running);
#pragma omp barrier
    float* scratch = reinterpret_cast<float*>(scratch_space.reserve(floats * sizeof(float) + 64));
    if (scratch)
      run_share(tasks, count, total, thread, running, scratch);
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
  Task few[16];
  Task* tasks = count <= 16 ? few : static_cast<Task*>(malloc(count * sizeof(Task)));
  if (!tasks) return 1;
  for (int64_t i = 0; i < count; ++i) tasks[i] = plan_task(products[i], level);
  const bool complete = run_tasks(tasks, count, threads);
  if (tasks != few) free(tasks);
  return complete ? 0 : 1;
}

// Writes the float32 rows of a weight: all of them, or those at `indices`.
void bitplan_dequantize(const bitplan::Matrix* weight, const int64_t* indices, int64_t count, float* out, int threads) {
#pragma omp parallel for num_threads(threads) if (count * weight->columns > (1 << 16))
  for (int64_t i = 0; i < count; ++i)
    bitplan::dequantize_row(*weight, indices ? indices[i] : i, out + i * weight->columns);
}
}
