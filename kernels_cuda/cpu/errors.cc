#include "errors.h"

#include <cstdarg>
#include <cstdio>

#include "isa.h"

namespace mindjax {
namespace {
thread_local char last_error[256] = "";
}

int fail(mjk_status status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(last_error, sizeof last_error, format, arguments);
  va_end(arguments);
  return status;
}

}  // namespace mindjax

extern "C" {

int32_t mjk_abi_version(void) { return MJK_ABI_VERSION; }
const char* mjk_isa(void) { return mindjax::isa().name; }
const char* mjk_last_error(void) { return mindjax::last_error; }

}  // extern "C"
