// Memory that a thread keeps between calls.
#pragma once
#include <cstddef>

namespace mindjax {

// At least `bytes`, aligned to 64, of undefined content, valid until the thread's next call; NULL where there is none.
char* thread_scratch(size_t bytes);

}  // namespace mindjax
