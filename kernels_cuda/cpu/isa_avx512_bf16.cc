// AVX-512 BF16: VDPBF16PS, which takes pairs along k, rounds its sums to nearest even and flushes subnormals.
#include "avx512.h"

namespace mindjax {
namespace {

struct DotPairs {
  static __m512 run(__m512 c, __m512i a, __m512i b) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
};

using Tile = VectorTile<PairSource, DotPairs, 12>;

}  // namespace

extern const Kernels kAvx512DotBf16 = {"avx512_bf16", Tile::kRows, Tile::kColumns, Tile::kDepth, sizeof(Tile::Packed), Tile::kStreamedRows, scratch_bytes<Tile>,
                                       multiply_block<Tile>, nothing, publish, Tile::kTallColumns};

}  // namespace mindjax
