// XLA's thread pool as the `stream` of the CPU library.
#pragma once
#include "pool.h"
#include "xla/ffi/api/ffi.h"

namespace mindjax {

struct Stream {
  using Context = xla::ffi::ThreadPool;

  explicit Stream(Context& context) : pool{&context, int32_t(context.num_threads()), run} {}
  void* get() { return &pool; }

 private:
  static void run(void* self, int64_t count, Task task, void* context) {
    Context& threads = *static_cast<Context*>(self);
    run_tasks([&threads](auto function) { threads.Schedule(std::move(function)); }, threads.num_threads(), count, task,
              context);
  }

  mjk_pool pool;
};

}  // namespace mindjax
