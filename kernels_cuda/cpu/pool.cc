// A pool of threads for callers that have none (torch's binding); XLA's is in jax_ffi.cc.
#include "pool.h"

#include <deque>
#include <functional>
#include <thread>
#include <vector>

namespace mindjax {
namespace {

class Pool {
 public:
  explicit Pool(int32_t threads) : table{this, threads, run} {
    for (int32_t i = 1; i < threads; ++i) threads_.emplace_back([this] { serve(); });
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      closing_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  const mjk_pool table;

 private:
  static void run(void* self, int64_t count, Task task, void* context) {
    Pool& pool = *static_cast<Pool*>(self);
    const auto schedule = [&pool](std::function<void()> function) {
      {
        std::lock_guard<std::mutex> lock(pool.mutex_);
        pool.queue_.push_back(std::move(function));
      }
      pool.wake_.notify_one();
    };
    run_tasks(schedule, pool.table.threads, count, task, context);
  }

  void serve() {
    for (;;) {
      std::function<void()> function;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [this] { return closing_ || !queue_.empty(); });
        if (queue_.empty()) return;
        function = std::move(queue_.front());
        queue_.pop_front();
      }
      function();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::function<void()>> queue_;
  std::vector<std::thread> threads_;
  bool closing_ = false;
};

}  // namespace
}  // namespace mindjax

extern "C" {

const mjk_pool* mjk_pool_create(int32_t threads) {
  return &(new mindjax::Pool(threads < 1 ? int32_t(std::thread::hardware_concurrency()) : threads))->table;
}

void mjk_pool_destroy(const mjk_pool* pool) {
  if (pool) delete static_cast<mindjax::Pool*>(pool->self);
}

}  // extern "C"
