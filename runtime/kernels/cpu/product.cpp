// Plans products and divides their rows among threads.
#include "product.h"

#include "lookup.h"
#include "portable.h"

namespace bitplan {
namespace {

// Below this many bytes of weights for each thread, waking it costs more than it helps.
constexpr int64_t kLeastBytesPerThread = 48 << 10;

bool has_vector_layout(const Matrix& w) {
  if (w.groups() == 1) return true;
  return w.group_size == 16 || w.group_size == 32 || w.group_size == 64 || w.group_size == 128 || w.group_size == 256;
}

const Kernels* kernels_of(const Matrix& w, int level, bool decode) {
#if defined(__x86_64__)
  if (is_float(w.element)) return level == kAvx512 ? &kAvx512Floats : level == kAvx2 ? &kAvx2Floats : nullptr;
  if (!has_vector_layout(w)) return nullptr;
  if (level == kAvx512) return decode && w.lookup ? &kLookupKernels : &kAvx512Kernels;
  if (level == kAvx2) return &kAvx2Kernels;
#endif
  return nullptr;
}

Task plan_task(const Product& product, int level) {
  const Matrix& w = *product.weight;
  const bool decode = product.tokens <= kDecodeTokens;
  Task task = {product, kernels_of(w, level, decode), {}, 0, true};
  task.activations.tokens = product.tokens;
  task.activations.columns = w.columns;
  if (task.kernels) task.kernels->shape(w, task.activations, decode);
  task.cost = decode ? w.row_bytes() : w.columns * product.tokens / 8 + w.row_bytes();
  return task;
}

bool round_alike(const Task& a, const Task& b) {
  return a.product.x == b.product.x && a.product.tokens == b.product.tokens && a.kernels == b.kernels &&
         a.activations.columns == b.activations.columns && a.activations.block == b.activations.block &&
         a.activations.interleave == b.activations.interleave;
}

int64_t rounded_bytes(const Task& task) {
  const Activations& a = task.activations;
  if (!task.kernels || !task.rounds) return 0;
  return divide_up(a.tokens * (a.value_stride + 3 * a.block_stride * int64_t(sizeof(float))), 64) * 64;
}

void multiply_rows(const Task& task, int64_t first_row, int64_t last_row, float* scratch) {
  const Product& p = task.product;
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
  const int64_t rows = task.product.weight->rows;
  if (before <= 0) return 0;
  const int64_t multiple = task.kernels ? task.kernels->prefill_rows : 1;
  const int64_t row = divide_up(before / task.cost, multiple) * multiple;
  return row < rows ? row : rows;
}

int64_t total_cost(const Task* tasks, int64_t count) {
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += tasks[i].cost * tasks[i].product.weight->rows;
  return total;
}

}  // namespace

void plan_tasks(const Product* products, int64_t count, int level, Task* tasks) {
  for (int64_t i = 0; i < count; ++i) {
    tasks[i] = plan_task(products[i], level);
    // Only the task before: it is enough for projections of the same states, and thousands of experts stay cheap.
    if (i && tasks[i].kernels && round_alike(tasks[i], tasks[i - 1])) tasks[i].rounds = false;
  }
}

int64_t rounded_bytes(const Task* tasks, int64_t count) {
  int64_t bytes = 0;
  for (int64_t i = 0; i < count; ++i) bytes += rounded_bytes(tasks[i]);
  return bytes;
}

void place_activations(Task* tasks, int64_t count, uint8_t* memory) {
  for (int64_t i = 0; i < count; ++i) {
    Activations& a = tasks[i].activations;
    if (!tasks[i].rounds) {
      a = tasks[i - 1].activations;
      continue;
    }
    a.values = memory;
    a.step = reinterpret_cast<float*>(memory + a.tokens * a.value_stride);
    a.sum = a.step + a.tokens * a.block_stride;
    a.middle = a.sum + a.tokens * a.block_stride;
    memory += rounded_bytes(tasks[i]);
  }
}

int64_t scratch_floats(const Task* tasks, int64_t count) {
  int64_t most = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Matrix& w = *tasks[i].product.weight;
    const int64_t floats =
        tasks[i].kernels ? tasks[i].kernels->scratch_floats(w, tasks[i].activations) : w.columns;
    if (floats > most) most = floats;
  }
  return most;
}

int useful_threads(const Task* tasks, int64_t count, int threads) {
  const int64_t useful = total_cost(tasks, count) / kLeastBytesPerThread;
  return useful < threads ? (useful < 1 ? 1 : static_cast<int>(useful)) : threads;
}

void round_share(const Task* tasks, int64_t count, int thread, int threads) {
  for (int64_t i = 0; i < count; ++i) {
    const Activations& a = tasks[i].activations;
    if (!tasks[i].kernels || !tasks[i].rounds) continue;
    tasks[i].kernels->quantize(tasks[i].product.x, a, a.tokens * thread / threads, a.tokens * (thread + 1) / threads);
  }
}

void multiply_share(const Task* tasks, int64_t count, int thread, int threads, float* scratch) {
  const int64_t total = total_cost(tasks, count);
  const int64_t first = total * thread / threads, last = total * (thread + 1) / threads;
  int64_t before = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t rows = tasks[i].product.weight->rows, cost = rows * tasks[i].cost;
    const int64_t stop = before + cost <= last ? rows : row_at(tasks[i], last - before);
    multiply_rows(tasks[i], row_at(tasks[i], first - before), stop, scratch);
    before += cost;
  }
}

}  // namespace bitplan
