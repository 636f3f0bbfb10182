// AVX-512 F, BW, VL and DQ: float32 products, bfloat16 widened while it is packed.
#include "avx512.h"

namespace mindjax {
namespace {

struct Fma {
  static __m512 run(__m512 c, __m512i a, __m512i b) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), c);
  }
};

template <class S>
constexpr Kernels table() {
  using Tile = VectorTile<S, Fma, 12>;
  return {"avx512f", Tile::kRows, Tile::kColumns, Tile::kDepth, sizeof(typename Tile::Packed), Tile::kStreamedRows, scratch_bytes<Tile>, multiply_block<Tile>,
          nothing, publish, Tile::kTallColumns};
}

}  // namespace

extern const Kernels kAvx512F32 = table<FloatSource>();
extern const Kernels kAvx512Bf16 = table<WidenedSource>();

}  // namespace mindjax
