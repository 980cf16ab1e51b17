// Products of packed weights: what is planned once, and what each thread does of it.
#pragma once
#include <stdlib.h>

#include "packed_matrix.h"

namespace bitplan {

// Memory that is kept from call to call; every thread has its own.
class Workspace {
 public:
  ~Workspace() { free(memory_); }
  // At least so many bytes, or null; what was there before is lost.
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

// One product: out[tokens, rows] = x[tokens, columns] W' + bias, W the sum of `weight` and the planes behind it; read by
// ctypes in the same order.
struct Product {
  const Matrix* weight;
  const float* x;
  float* out;
  const float* bias;
  int64_t tokens;
};

// The product with one plane of a weight. Tasks of a product lie behind one another and are computed by the same thread
// for each row: what the first has written, the next adds to.
struct Task {
  const Matrix* plane;
  const float* inputs;  // [tokens, inputs]
  const float* x;       // [tokens, columns]: the inputs, or those columns of them that the plane has
  int64_t tokens;
  Output out;
  const Kernels* kernels;  // null: portable
  Activations activations;
  int64_t cost;    // of one row
  int64_t planes;  // of the product from this one on, itself included
  int64_t source;  // the task that gathers and rounds what this one reads, in the same layout: itself, or one before it
};

// How many tasks so many products are.
int64_t count_tasks(const Product* products, int64_t count);

// Plans products for an instruction set, `level` as the C interface counts them, as so many tasks.
void plan_tasks(const Product* products, int64_t count, int level, Task* tasks);

// Bytes of the rounded activations of all tasks.
int64_t rounded_bytes(const Task* tasks, int64_t count);

// Says where the rounded activations go: `memory` is aligned to 64 bytes.
void place_activations(Task* tasks, int64_t count, uint8_t* memory);

// Floats that a thread needs for itself.
int64_t scratch_floats(const Task* tasks, int64_t count);

// So many threads, and no more than are worth waking.
int useful_threads(const Task* tasks, int64_t count, int threads);

// Rounds a thread's share of the tokens of every task.
void round_share(const Task* tasks, int64_t count, int thread, int threads);

// Computes the share of one thread: a contiguous part of all rows of all tasks, of equal cost.
void multiply_share(const Task* tasks, int64_t count, int thread, int threads, float* scratch);

}  // namespace bitplan
