// Plans products and divides their rows among threads.
#include "product.h"

#include "lookup.h"
#include "portable.h"

namespace bitplan {
namespace {

// Below this many bytes of weights for each thread, waking it costs more than it helps.
constexpr int64_t kLeastBytesPerThread = 48 << 10;
constexpr int64_t kTasksLookedAt = 8;
// Of a block that several passes read; a multiple of what kernels multiply together.
constexpr int64_t kRowsOfPass = 64;

bool has_vector_layout(const Matrix& w) {
  if (w.groups() == 1) return true;
  return w.group_size == 16 || w.group_size == 32 || w.group_size == 64 || w.group_size == 128 || w.group_size == 256;
}

const Kernels* kernels_of(const Matrix& w, int level, bool decode) {
  if (w.element == kSparse) return nullptr;
#if defined(__x86_64__)
  if (is_float(w.element)) return level == kAvx512 ? &kAvx512Floats : level == kAvx2 ? &kAvx2Floats : nullptr;
  if (!has_vector_layout(w)) return nullptr;
  if (is_small_float(w.element))
    return level == kAvx512 ? &kAvx512SmallFloats : level == kAvx2 ? &kAvx2SmallFloats : nullptr;
  if (level == kAvx512) return decode && w.lookup ? &kLookupKernels : &kAvx512Kernels;
  if (level == kAvx2) return &kAvx2Kernels;
#endif
  return nullptr;
}

Task plan_task(const Matrix& plane, const Product& product, int level) {
  const bool decode = product.tokens <= kFewTokens;
  const Output out = {product.out, plane.rows, product.bias, 0, plane.factor};
  Task task = {&plane, product.x, product.x, product.tokens, out, kernels_of(plane, level, decode), {}, 0, 1, 0};
  task.activations.tokens = product.tokens;
  task.activations.columns = plane.columns;
  if (task.kernels) task.kernels->shape(plane, task.activations, decode);
  // Never nothing: rows are divided by it.
  const int64_t passes = product.tokens ? divide_up(product.tokens, kDecodeTokens) : 1;
  task.cost = decode ? plane.row_bytes() * passes : plane.columns * product.tokens / 8 + plane.row_bytes();
  return task;
}

bool round_alike(const Task& a, const Task& b) {
  return a.inputs == b.inputs && a.plane->index == b.plane->index && a.tokens == b.tokens && a.kernels == b.kernels &&
         a.activations.columns == b.activations.columns && a.activations.block == b.activations.block &&
         a.activations.interleave == b.activations.interleave;
}

// The task that gathers and rounds what task `index` reads. Only a few before it are looked at: it is enough for the
// planes of projections of the same states, and thousands of experts stay cheap.
int64_t find_source(const Task* tasks, int64_t index) {
  for (int64_t i = index - 1; i >= 0 && i >= index - kTasksLookedAt; --i)
    if (tasks[i].source == i && round_alike(tasks[index], tasks[i])) return i;
  return index;
}

int64_t gathered_bytes(const Task& task) {
  return task.plane->index ? divide_up(task.tokens * task.plane->columns * int64_t(sizeof(float)), 64) * 64 : 0;
}

int64_t rounded_bytes(const Task& task) {
  const Activations& a = task.activations;
  return divide_up(a.tokens * (a.value_stride + 3 * a.block_stride * int64_t(sizeof(float))), 64) * 64;
}

// The columns of some tokens' inputs that a plane has.
void gather(const Task& task, int64_t first_token, int64_t last_token) {
  const Matrix& w = *task.plane;
  for (int64_t t = first_token; t < last_token; ++t) {
    float* x = const_cast<float*>(task.x) + t * w.columns;
    for (int64_t k = 0; k < w.columns; ++k) x[k] = task.inputs[t * w.inputs + w.index[k]];
  }
}

// A block of rows is read from memory once, by the first pass over it.
void decode_rows(const Task& task, int64_t first_row, int64_t last_row, float* scratch) {
  const int64_t rows = task.tokens <= kDecodeTokens ? last_row - first_row : kRowsOfPass;
  for (int64_t row = first_row; row < last_row; row += rows) {
    const int64_t stop = row + rows < last_row ? row + rows : last_row;
    for (int64_t t = 0; t < task.tokens; t += kDecodeTokens) {
      const int tokens = task.tokens - t < kDecodeTokens ? task.tokens - t : kDecodeTokens;
      task.kernels->decode(*task.plane, task.activations, t, tokens, task.out, row, stop, scratch);
    }
  }
}

void multiply_rows(const Task& task, int64_t first_row, int64_t last_row, float* scratch) {
  if (first_row >= last_row || task.tokens == 0) return;
  if (!task.kernels)
    portable_multiply(*task.plane, task.x, task.tokens, task.out, first_row, last_row, scratch);
  else if (task.tokens <= kFewTokens)
    decode_rows(task, first_row, last_row, scratch);
  else
    task.kernels->prefill(*task.plane, task.activations, task.out, first_row, last_row, scratch);
}

// One row of all planes of the product that begins with a task.
int64_t row_cost(const Task* first) {
  int64_t cost = 0;
  for (int64_t i = 0; i < first->planes; ++i) cost += first[i].cost;
  return cost;
}

// The first row of a product that costs `before` or more come before, at a place where ranges of all its planes may
// begin: what they ask for are powers of two.
int64_t row_at(const Task* first, int64_t before) {
  if (before <= 0) return 0;
  int64_t multiple = 1;
  for (int64_t i = 0; i < first->planes; ++i)
    if (first[i].kernels && first[i].kernels->prefill_rows > multiple) multiple = first[i].kernels->prefill_rows;
  const int64_t rows = first->plane->rows, row = divide_up(before / row_cost(first), multiple) * multiple;
  return row < rows ? row : rows;
}

int64_t total_cost(const Task* tasks, int64_t count) {
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += tasks[i].cost * tasks[i].plane->rows;
  return total;
}

}  // namespace

int64_t count_tasks(const Product* products, int64_t count) {
  int64_t tasks = 0;
  for (int64_t i = 0; i < count; ++i)
    for (const Matrix* plane = products[i].weight; plane; plane = plane->next) ++tasks;
  return tasks;
}

void plan_tasks(const Product* products, int64_t count, int level, Task* tasks) {
  int64_t index = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t first = index, planes = count_tasks(products + i, 1);
    for (const Matrix* plane = products[i].weight; plane; plane = plane->next, ++index) {
      tasks[index] = plan_task(*plane, products[i], level);
      tasks[index].planes = planes - (index - first);
      tasks[index].source = find_source(tasks, index);
      if (index == first) continue;
      tasks[index].out.added = products[i].out;
      tasks[index].out.added_stride = tasks[index].out.stride;
    }
  }
}

int64_t rounded_bytes(const Task* tasks, int64_t count) {
  int64_t bytes = 0;
  for (int64_t i = 0; i < count; ++i)
    if (tasks[i].source == i) bytes += gathered_bytes(tasks[i]) + rounded_bytes(tasks[i]);
  return bytes;
}

void place_activations(Task* tasks, int64_t count, uint8_t* memory) {
  for (int64_t i = 0; i < count; ++i) {
    Activations& a = tasks[i].activations;
    if (tasks[i].source != i) {
      a = tasks[tasks[i].source].activations;
      tasks[i].x = tasks[tasks[i].source].x;
      continue;
    }
    if (tasks[i].plane->index) tasks[i].x = reinterpret_cast<float*>(memory);
    memory += gathered_bytes(tasks[i]);
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
    const Matrix& w = *tasks[i].plane;
    const int64_t floats = tasks[i].kernels ? tasks[i].kernels->scratch_floats(w, tasks[i].activations) : w.columns;
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
    if (tasks[i].source != i) continue;
    const int64_t first = tasks[i].tokens * thread / threads, last = tasks[i].tokens * (thread + 1) / threads;
    if (tasks[i].plane->index) gather(tasks[i], first, last);
    if (tasks[i].kernels) tasks[i].kernels->quantize(tasks[i].x, tasks[i].activations, first, last);
  }
}

void multiply_share(const Task* tasks, int64_t count, int thread, int threads, float* scratch) {
  const int64_t total = total_cost(tasks, count);
  const int64_t first = total * thread / threads, last = total * (thread + 1) / threads;
  int64_t before = 0;
  for (const Task* task = tasks; task < tasks + count; task += task->planes) {
    const int64_t rows = task->plane->rows, cost = rows * row_cost(task);
    const int64_t start = row_at(task, first - before);
    const int64_t stop = before + cost <= last ? rows : row_at(task, last - before);
    for (int64_t i = 0; i < task->planes; ++i) multiply_rows(task[i], start, stop, scratch);
    before += cost;
  }
}

}  // namespace bitplan
