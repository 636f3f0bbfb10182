// What the calling thread's last failure was.
#pragma once
#include "launch.h"

namespace mindjax {

// Keeps the message for mjk_last_error and returns the status.
__attribute__((format(printf, 2, 3))) int fail(mjk_status status, const char* format, ...);

}  // namespace mindjax
