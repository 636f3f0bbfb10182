#include "fused_impl.h"

namespace mindjax {
extern const FusedIsa kFusedAvx512Bf16;
const FusedIsa kFusedAvx512Bf16 = kTable;
}  // namespace mindjax
