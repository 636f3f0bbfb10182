#include "fused_impl.h"

namespace mindjax {
extern const FusedIsa kFusedScalar;
const FusedIsa kFusedScalar = kTable;
}  // namespace mindjax
