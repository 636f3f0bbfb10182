// AVX2 and FMA: float32 products, bfloat16 widened while it is packed.
#include <immintrin.h>

#include "portable.h"

namespace mindjax {
namespace {

struct Avx2Kernel {
  static constexpr int64_t kRows = 6, kColumns = 16;
  static void run(int64_t depth, const float* a, const float* b, float* sums, bool first) {
    __m256 c[kRows][2];
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < 2; ++j) c[i][j] = first ? _mm256_setzero_ps() : _mm256_loadu_ps(sums + i * kColumns + j * 8);
    for (int64_t k = 0; k < depth; ++k, a += kRows, b += kColumns) {
      const __m256 b0 = _mm256_loadu_ps(b), b1 = _mm256_loadu_ps(b + 8);
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i) {
        const __m256 ai = _mm256_broadcast_ss(a + i);
        c[i][0] = _mm256_fmadd_ps(ai, b0, c[i][0]);
        c[i][1] = _mm256_fmadd_ps(ai, b1, c[i][1]);
      }
    }
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < 2; ++j) _mm256_storeu_ps(sums + i * kColumns + j * 8, c[i][j]);
  }
};

template <class Source>
constexpr Kernels table() {
  using Tile = PortableTile<Source, Avx2Kernel>;
  return {"avx2", Tile::kRows, Tile::kColumns, Tile::kDepth, sizeof(typename Tile::Packed), Tile::kStreamedRows, scratch_bytes<Tile>, multiply_block<Tile>,
          nothing, nothing};
}

}  // namespace

extern const Kernels kAvx2F32 = table<float>();
extern const Kernels kAvx2Bf16 = table<uint16_t>();

}  // namespace mindjax
