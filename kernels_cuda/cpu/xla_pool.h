// XLA's thread pool as an mjk_pool.
#pragma once
#include "pool.h"
#include "xla/ffi/api/ffi.h"

namespace mindjax {

class XlaPool {
 public:
  explicit XlaPool(xla::ffi::ThreadPool& threads) : table_{&threads, int32_t(threads.num_threads()), run} {}
  void* stream() const { return const_cast<mjk_pool*>(&table_); }

 private:
  static void run(void* self, int64_t count, Task task, void* context) {
    xla::ffi::ThreadPool& threads = *static_cast<xla::ffi::ThreadPool*>(self);
    run_tasks([&](auto function) { threads.Schedule(std::move(function)); }, threads.num_threads(), count, task,
              context);
  }

  mjk_pool table_;
};

}  // namespace mindjax
