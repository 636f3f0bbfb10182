// Running tasks on other threads without waiting for any that has not begun.
#pragma once
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>

#include "launch.h"

namespace mindjax {

using Task = void (*)(void* context, int64_t i);

// Calls task(context, i) once for each i in [0, count), on this thread and on those where schedule(function) runs one.
//
// This thread works until nothing is left to begin, and then waits only for tasks that another thread is in the middle
// of. So it ends even where no scheduled function ever runs: with every thread of the pool inside such a call. A
// function that runs late finds the shared state alive and nothing to do.
template <class Schedule>
void run_tasks(const Schedule& schedule, int64_t threads, int64_t count, Task task, void* context) {
  struct State {
    std::atomic<int64_t> next{0}, ended{0};
    int64_t count;
    Task task;
    void* context;
    std::mutex mutex;
    std::condition_variable all_ended;

    void work() {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
        task(context, i);
        if (ended.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
          std::lock_guard<std::mutex> lock(mutex);
          all_ended.notify_all();
        }
      }
    }
  };
  if (count <= 1 || threads <= 1) {
    for (int64_t i = 0; i < count; ++i) task(context, i);
    return;
  }
  auto state = std::make_shared<State>();
  state->count = count;
  state->task = task;
  state->context = context;
  for (int64_t i = 1; i < threads && i < count; ++i) schedule([state] { state->work(); });
  state->work();
  // The last tasks end within microseconds of each other: sleeping would cost more than it frees.
  for (int spin = 0; spin < 4000; ++spin) {
    if (state->ended.load(std::memory_order_acquire) == count) return;
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  std::unique_lock<std::mutex> lock(state->mutex);
  state->all_ended.wait(lock, [&] { return state->ended.load(std::memory_order_acquire) == count; });
}

// `count` tasks on a pool; NULL is this thread alone.
inline void run_tasks(const mjk_pool* pool, int64_t count, Task task, void* context) {
  if (pool && pool->threads > 1 && count > 1) return pool->run(pool->self, count, task, context);
  for (int64_t i = 0; i < count; ++i) task(context, i);
}

// Calls function(first, end) on parts of [0, rows) that are worth a thread's while, `cost` bytes each.
template <class Function>
void over_rows(void* stream, int64_t rows, int64_t cost, const Function& function) {
  const auto* pool = static_cast<const mjk_pool*>(stream);
  const int64_t part = std::max<int64_t>(1, (int64_t(1) << 17) / std::max<int64_t>(1, cost));
  struct Context {
    const Function& function;
    int64_t rows, part;
  } context{function, rows, part};
  const auto task = [](void* context, int64_t i) {
    const Context& c = *static_cast<Context*>(context);
    c.function(i * c.part, std::min((i + 1) * c.part, c.rows));
  };
  run_tasks(pool, (rows + part - 1) / part, task, &context);
}

}  // namespace mindjax
