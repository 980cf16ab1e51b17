// Where the threads of one call meet.
#pragma once
#include <atomic>
#include <thread>

namespace bitplan {

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

}  // namespace bitplan
