#include "fused_impl.h"

namespace mindjax {
extern const FusedIsa kFusedAvx512F;
const FusedIsa kFusedAvx512F = kTable;
}  // namespace mindjax
