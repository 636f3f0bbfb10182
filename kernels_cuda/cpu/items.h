// What the grouped products share: the rows of the groups, and items of work that threads take one by one.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "errors.h"
#include "isa.h"
#include "pool.h"
#include "scratch.h"

namespace mindjax {

inline int64_t blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }

// starts[g] is the first row of group g of this call and starts[groups] the row after its last.
inline int group_starts(int64_t rows, int64_t groups, int64_t groups_total, int64_t group_offset,
                        const int32_t* group_sizes, std::vector<int64_t>& starts) {
  if (rows < 0 || groups < 0 || group_offset < 0 || group_offset + groups > groups_total)
    return fail(MJK_INVALID_ARGUMENT, "%lld groups from %lld exceed the %lld group sizes", (long long)groups,
                (long long)group_offset, (long long)groups_total);
  starts.assign(size_t(groups + 1), 0);
  int64_t row = 0;
  for (int64_t g = 0; g < groups_total; ++g) {
    if (group_sizes[g] < 0) return fail(MJK_INVALID_ARGUMENT, "group %lld has %d rows", (long long)g, group_sizes[g]);
    if (g >= group_offset && g < group_offset + groups) starts[size_t(g - group_offset)] = row;
    row += group_sizes[g];
    if (g < group_offset + groups) starts[size_t(groups)] = row;
  }
  if (row > rows)
    return fail(MJK_INVALID_ARGUMENT, "the groups have %lld rows in all, x has %lld", (long long)row, (long long)rows);
  return MJK_OK;
}

// Calls function(item, scratch) once for each item in [0, items), on up to `workers` threads of the pool.
template <class Function>
int run_items(const mjk_pool* pool, int64_t workers, int64_t items, size_t scratch, const Kernels& kernels,
              const Function& function) {
  struct Shared {
    const Function& function;
    const Kernels& kernels;
    int64_t items;
    size_t scratch;
    std::atomic<int64_t> next{0};
    std::atomic<bool> out_of_memory{false};
  } shared{function, kernels, items, scratch};
  const auto work = [](void* context, int64_t) {
    Shared& shared = *static_cast<Shared*>(context);
    int64_t item = shared.next.fetch_add(1, std::memory_order_relaxed);
    if (item >= shared.items) return;
    char* memory = thread_scratch(shared.scratch);
    if (!memory) {
      shared.out_of_memory = true;
      return;
    }
    shared.kernels.enter();
    for (; item < shared.items; item = shared.next.fetch_add(1, std::memory_order_relaxed))
      shared.function(item, memory);
    shared.kernels.leave();
  };
  run_tasks(pool, std::min(workers, items), work, &shared);
  if (shared.out_of_memory) return fail(MJK_LAUNCH_FAILED, "no memory for %zu bytes of scratch", scratch);
  return MJK_OK;
}

}  // namespace mindjax
