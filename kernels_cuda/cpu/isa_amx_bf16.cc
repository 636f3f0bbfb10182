// AMX: 32 x 32 sums in four tile registers. TDPBF16PS rounds its sums to nearest even and flushes subnormals.
#include <cstring>

#include "avx512.h"

namespace mindjax {
namespace {

struct AmxTile {
  using Packed = uint16_t;
  static constexpr int64_t kRows = 32, kColumns = 32, kDepthUnit = 32, kDepth = 2048, kRowPadding = 32,
                           kStreamedRows = 16, kStreamedDepth = 32;

  // A row is `stride` elements after the one before, the next 32 of k are `step` after these.
  struct Rows {
    const uint16_t* data;
    int64_t stride, step;
    const uint16_t* next;  // the next panel, where it is read from the array itself, else NULL
  };

  static Rows pack_a(uint16_t* scratch, const Block& block, int64_t m0, int64_t rows, int64_t k0, int64_t depth) {
    const auto* a = static_cast<const uint16_t*>(block.a);
    if (block.a_transposed) {
      transpose_rows(scratch, a + k0 * block.lda + m0, block.lda, rows, depth);
      return {scratch, 32, 32 * 32, nullptr};
    }
    const uint16_t* from = a + m0 * block.lda + k0;
    if (rows % 16 == 0 && depth % 32 == 0)
      return {from, block.lda, 32, m0 + 2 * kRows <= block.m ? from + kRows * block.lda : nullptr};
    // Copied, as a tile reads 16 rows and 32 of k. What it finds in rows past the last ends in sums that nobody stores.
    const int64_t stride = round_up(depth, 32) + kRowPadding;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t k = 0; k < depth; k += 32)
        _mm512_storeu_si512(scratch + i * stride + k,
                            _mm512_maskz_loadu_epi16(first_halves(depth - k), from + i * block.lda + k));
    return {scratch, stride, 32, nullptr};
  }

  // [steps of 32 k][32 rows][32 k]
  static void transpose_rows(uint16_t* out, const uint16_t* a, int64_t lda, int64_t rows, int64_t depth) {
    const int64_t used = rows > 16 ? 32 : 16;
    for (int64_t s = 0; s < depth; s += 32, out += 32 * 32) {
      for (int64_t i = 0; i < used; i += 16) {
        __m512i r[16];
#pragma GCC unroll 16
        for (int w = 0; w < 16; ++w) {
          const int64_t k = s + 2 * w;
          const uint16_t* row = a + k * lda + i;
          r[w] = k < depth ? load_across(PairSource(), row, k + 1 < depth ? row + lda : nullptr, rows - i)
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

  // `share` of `shares`: of the next panel of A, which is fetched into L2 meanwhile.
  static void multiply(int64_t rows, int64_t depth, const Rows& panel, const uint16_t* b, float* sums, bool first,
                       int64_t share, int64_t shares) {
    const uint16_t *a = panel.data, *lower = a + 16 * panel.stride;
    const int64_t stride = panel.stride * 2, step = panel.step;
    asm volatile("" ::: "memory");  // what was packed is in memory: the tile loads do not say what they read
    if (first) {
      _tile_zero(0);
      _tile_zero(1);
    } else {
      _tile_loadd(0, sums, 128);
      _tile_loadd(1, sums + 16, 128);
    }
    if (rows <= 16) {
      for (int64_t s = 0; s < depth; s += 32, a += step, b += 32 * 32) {
        _tile_loadd(4, a, stride);
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
      const uint16_t* next = panel.next;
      const int64_t from = next ? share * kRows / shares : 0, to = next ? (share + 1) * kRows / shares : 0;
      for (int64_t s = 0; s < depth; s += 32, a += step, lower += step, b += 32 * 32) {
        for (int64_t i = from; i < to; ++i)
          _mm_prefetch(reinterpret_cast<const char*>(next + i * panel.stride + s), _MM_HINT_T1);
        _tile_loadd(4, a, stride);
        _tile_loadd(6, b, 128);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + 32, 128);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, lower, stride);
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

  // The first tile of a column of tiles packs B into `b`.
  static void stream(const Block& block, int64_t k0, int64_t depth, int64_t n0, int64_t rows, bool packs,
                     const Rows& panel, uint16_t* b, float* sums, bool first, const Ahead& ahead) {
    if (packs) {
      auto* words = reinterpret_cast<int32_t*>(b);
      const FromSource<PairSource> source(block, k0, depth, n0, ahead, words);
      const int64_t used = (depth + 1) / 2;
      __m512i low, high;
      for (int64_t w = 0; w < used; ++w) source.load(w, low, high);
      std::memset(words + used * 32, 0, size_t(round_up(depth, kDepthUnit) / 2 - used) * 128);
    }
    multiply(rows, depth, panel, b, sums, first, 0, 1);
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

extern const Kernels kAmxBf16 = {"amx_bf16", AmxTile::kRows, AmxTile::kColumns, AmxTile::kDepth, sizeof(AmxTile::Packed), AmxTile::kStreamedRows, scratch_bytes<AmxTile>,
                                 multiply_block<AmxTile>, enter, leave};

}  // namespace mindjax
