#include "fused_impl.h"

namespace mindjax {
extern const FusedIsa kFusedAvx2;
const FusedIsa kFusedAvx2 = kTable;
}  // namespace mindjax
