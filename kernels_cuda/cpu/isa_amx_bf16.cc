// AMX: 32 x 32 sums in four tile registers. TDPBF16PS rounds its sums to nearest even and flushes subnormals.
#include "avx512.h"

namespace mindjax {
namespace {

struct AmxTile {
  using Packed = uint16_t;
  static constexpr int64_t kRows = 32, kColumns = 32, kDepthUnit = 32, kDepth = 512;

  // [steps of 32 k][32 rows][32 k]: what a tile register loads is 16 consecutive cache lines.
  static void pack_a(uint16_t* out, const Block& block, int64_t m0, int64_t rows, int64_t k0, int64_t depth) {
    const auto* a = static_cast<const uint16_t*>(block.a);
    const int64_t used = rows > 16 ? 32 : 16;
    for (int64_t s = 0; s < depth; s += 32, out += 32 * 32) {
      if (!block.a_transposed) {
        const __mmask32 mask = first_halves(depth - s);
        const uint16_t* from = a + m0 * block.lda + k0 + s;
        for (int64_t i = 0; i < rows; ++i)
          _mm512_storeu_si512(out + i * 32, _mm512_maskz_loadu_epi16(mask, from + i * block.lda));
        for (int64_t i = rows; i < used; ++i) _mm512_storeu_si512(out + i * 32, _mm512_setzero_si512());
        continue;
      }
      for (int64_t i = 0; i < used; i += 16) {
        __m512i r[16];
#pragma GCC unroll 16
        for (int w = 0; w < 16; ++w) {
          const int64_t k = s + 2 * w;
          const uint16_t* row = a + (k0 + k) * block.lda + m0 + i;
          r[w] = k < depth ? load_across(PairSource(), row, k + 1 < depth ? row + block.lda : nullptr, rows - i)
                           : _mm512_setzero_si512();
        }
        transpose(r);
#pragma GCC unroll 16
        for (int w = 0; w < 16; ++w) _mm512_storeu_si512(out + (i + w) * 32, r[w]);
      }
    }
  }
  static void pack_b(uint16_t* out, int64_t stride, const Block& block, int64_t k0, int64_t depth) {
    pack_columns(PairSource(), out, stride, block, k0, depth, round_up(depth, kDepthUnit));
  }
  static void store(const Block& block, int64_t m0, int64_t rows, int64_t n0, int64_t columns, const float* sums) {
    store_tile(block, m0, rows, n0, columns, sums);
  }

  static void multiply(int64_t rows, int64_t depth, const uint16_t* a, const uint16_t* b, float* sums, bool first) {
    asm volatile("" ::: "memory");  // what was packed is in memory: the tile loads do not say what they read
    if (first) {
      _tile_zero(0);
      _tile_zero(1);
    } else {
      _tile_loadd(0, sums, 128);
      _tile_loadd(1, sums + 16, 128);
    }
    if (rows <= 16) {
      for (int64_t s = 0; s < depth; s += 32, a += 32 * 32, b += 32 * 32) {
        _tile_loadd(4, a, 64);
        _tile_loadd(6, b, 128);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + 32, 128);
        _tile_dpbf16ps(1, 4, 7);
      }
    } else {
      if (first) {
        _tile_zero(2);
        _tile_zero(3);
      } else {
        _tile_loadd(2, sums + 16 * 32, 128);
        _tile_loadd(3, sums + 16 * 32 + 16, 128);
      }
      for (int64_t s = 0; s < depth; s += 32, a += 32 * 32, b += 32 * 32) {
        _tile_loadd(4, a, 64);
        _tile_loadd(6, b, 128);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + 32, 128);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + 16 * 32, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(2, sums + 16 * 32, 128);
      _tile_stored(3, sums + 16 * 32 + 16, 128);
    }
    _tile_stored(0, sums, 128);
    _tile_stored(1, sums + 16, 128);
    asm volatile("" ::: "memory");
  }
};

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileConfig kConfig;

void enter() { _tile_loadconfig(&kConfig); }
void leave() { _tile_release(); }

}  // namespace

extern const Kernels kAmxBf16 = {"amx_bf16", AmxTile::kRows, AmxTile::kColumns, AmxTile::kDepth, scratch_bytes<AmxTile>,
                                 multiply_block<AmxTile>, enter, leave};

}  // namespace mindjax
