// Which instruction sets this library was built with and which one it uses.
#pragma once
#include "kernels.h"

namespace mindjax {

// The best that the processor and MINDJAX_CPU_ISA allow; decided once, at the first call.
const Isa& isa();

}  // namespace mindjax
