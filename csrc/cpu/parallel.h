// Work on all of torch's threads such that the bits never depend on how many there are: the caller cuts the work into
// tasks by shape alone, and whoever is free takes the next one.
#pragma once
#include <ATen/Parallel.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>

// Exported by builds of torch on MKL; null on others.
extern "C" int MKL_Set_Num_Threads_Local(int) __attribute__((weak));

namespace fastmoe_cpp::cpu {

// Within a parallel region MKL computes on one thread but still cuts its sums for as many as this thread was last told
// of (torch tells the main thread alone), so the bits would depend on that number and on who takes a task.
class OneMklThread {
 public:
  OneMklThread() : before_(MKL_Set_Num_Threads_Local != nullptr ? MKL_Set_Num_Threads_Local(1) : 0) {}
  ~OneMklThread() {
    if (MKL_Set_Num_Threads_Local != nullptr) MKL_Set_Num_Threads_Local(before_);
  }
  OneMklThread(const OneMklThread&) = delete;
  OneMklThread& operator=(const OneMklThread&) = delete;

 private:
  int before_;
};

// A thread's buffers for the length of one run_tasks: slot i grows to the largest size asked of it.
class Scratch {
 public:
  template <typename T>
  T* get(size_t slot, int64_t count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    auto& buffer = buffers_[slot];
    if (buffer.bytes < bytes) {
      buffer.data.clear();
      buffer.data = c10::GetCPUAllocator()->allocate(bytes);
      buffer.bytes = bytes;
    }
    return static_cast<T*>(buffer.data.get());
  }

 private:
  struct Buffer {
    c10::DataPtr data;
    size_t bytes = 0;
  };
  std::array<Buffer, 8> buffers_;
};

// The sum of many rows, column by column, in float64: one after another they would lose a float32 sum's last digits.
class ColumnSum {
 public:
  ColumnSum(int64_t columns, double* buffer) : columns_(columns), sum_(buffer) { std::fill_n(sum_, columns_, 0.0); }
  template <typename A>
  void add(const A* row) {
    for (int64_t c = 0; c < columns_; ++c) sum_[c] += row[c];
  }
  template <typename T>
  void store(T* out) const {
    for (int64_t c = 0; c < columns_; ++c) out[c] = static_cast<T>(sum_[c]);
  }

 private:
  int64_t columns_;
  double* sum_;
};

// Calls f(task, scratch) for every task in 0..n. A parallel region is entered even for one task, so that a GEMM in a
// task runs on one thread however many there are: split inside, its sums would depend on the number.
template <typename F>
void run_tasks(int64_t n, const F& f) {
  if (n <= 0) return;
  std::atomic<int64_t> next{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    const OneMklThread one;
    Scratch scratch;
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < n;) f(task, scratch);
  });
}

// Calls f(begin, end) for parts of 0..n, none cheaper than kGrain: for work on rows that know nothing of each other.
inline constexpr int64_t kGrain = 32768;

template <typename F>
void for_rows(int64_t n, int64_t cost_per_row, const F& f) {
  at::parallel_for(0, n, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, cost_per_row)), f);
}

}  // namespace fastmoe_cpp::cpu
