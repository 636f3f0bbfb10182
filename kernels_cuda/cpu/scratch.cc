#include "scratch.h"

#include <cstdlib>
#include <memory>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mindjax {

char* thread_scratch(size_t bytes) {
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  static thread_local std::unique_ptr<char, Free> memory;
  static thread_local size_t size = 0;
  if (size < bytes) {
    constexpr size_t kHugePage = size_t(2) << 20;
    memory.reset();
    size = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    memory.reset(static_cast<char*>(std::aligned_alloc(kHugePage, size)));
    if (!memory) {
      size = 0;
      return nullptr;
    }
#if defined(__linux__)
    madvise(memory.get(), size, MADV_HUGEPAGE);  // a block's rows lie on many pages
#endif
  }
  return memory.get();
}

}  // namespace mindjax
