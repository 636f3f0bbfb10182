// Plain C++: right on any processor.
#include "portable.h"

namespace mindjax {
namespace {

struct ScalarKernel {
  static constexpr int64_t kRows = 4, kColumns = 8;
  static void run(int64_t depth, const float* a, const float* b, float* sums, bool first) {
    float c[kRows][kColumns];
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kColumns; ++j) c[i][j] = first ? 0.f : sums[i * kColumns + j];
    for (int64_t k = 0; k < depth; ++k, a += kRows, b += kColumns)
      for (int i = 0; i < kRows; ++i)
        for (int j = 0; j < kColumns; ++j) c[i][j] += a[i] * b[j];
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kColumns; ++j) sums[i * kColumns + j] = c[i][j];
  }
};

template <class Source>
constexpr Kernels table() {
  using Tile = PortableTile<Source, ScalarKernel>;
  return {"scalar", Tile::kRows, Tile::kColumns, Tile::kDepth, sizeof(typename Tile::Packed), Tile::kStreamedRows, scratch_bytes<Tile>, multiply_block<Tile>,
          nothing,  nothing};
}

}  // namespace

extern const Kernels kScalarF32 = table<float>();
extern const Kernels kScalarBf16 = table<uint16_t>();

}  // namespace mindjax
