// AMX: 32 x 32 sums in four tile registers. TDPBF16PS rounds its sums to nearest even and flushes subnormals.
#include <cstring>

#include "amx_float32.h"

namespace mindjax {
namespace {

struct AmxTile {
  using Packed = uint16_t;
  static constexpr int64_t kRows = 32, kColumns = 32, kDepthUnit = 32, kDepth = 2048, kPieces = 1, kRowPadding = 32, kPanels = 1,
                           kStreamedRows = 256, kStreamedPanels = 2;
  // Of so few rows memory is the limit, which the processor's prefetcher reads best in few lines at once.
  static constexpr int64_t streamed_depth(int64_t m) { return m <= 16 ? 32 : 64; }

  // A row is `stride` elements after the one before, the next 32 of k are `step` after these.
  struct Rows {
    const uint16_t* data;
    int64_t stride, step;
  };

  static Rows pack_a(uint16_t* scratch, const Block& block, int64_t m0, int64_t rows, int64_t k0, int64_t depth) {
    const auto* a = static_cast<const uint16_t*>(block.a);
    if (block.a_transposed) {
      transpose_rows(scratch, a + k0 * block.lda + m0, block.lda, rows, depth);
      return {scratch, 32, 32 * 32};
    }
    // In place where tiles read whole lines of cache, 16 rows of them and 32 of k.
    const uint16_t* from = a + m0 * block.lda + k0;
    if (rows % 16 == 0 && depth % 32 == 0 && block.lda % 32 == 0 && whole_line(from)) return {from, block.lda, 32};
    return copy_a(scratch, block, m0, rows, k0, depth);
  }

  // What a tile finds in rows past the last ends in sums that nobody stores.
  static Rows copy_a(uint16_t* scratch, const Block& block, int64_t m0, int64_t rows, int64_t k0, int64_t depth) {
    const uint16_t* from = static_cast<const uint16_t*>(block.a) + m0 * block.lda + k0;
    const int64_t stride = round_up(depth, 32) + kRowPadding;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t k = 0; k < depth; k += 32)
        _mm512_storeu_si512(scratch + i * stride + k,
                            _mm512_maskz_loadu_epi16(first_halves(depth - k), from + i * block.lda + k));
    return {scratch, stride, 32};
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
    pack_columns(UnpackedSource(), out, stride, block, k0, depth, round_up(depth, kDepthUnit));
  }
  static void store(const Block& block, int64_t m0, int64_t rows, int64_t n0, int64_t columns, const float* sums) {
    store_tile(UnpackedSource(), block, m0, rows, n0, columns, sums);
  }

  // `meanwhile` gets a step() and three between() in each 32 of k.
  template <class Other>
  static void multiply(int64_t rows, int64_t depth, const Rows& panel, const uint16_t* b, float* sums, bool first,
                       Other& meanwhile) {
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
        meanwhile.step();
        _tile_loadd(4, a, stride);
        meanwhile.between();
        _tile_loadd(6, b, 128);
        _tile_dpbf16ps(0, 4, 6);
        meanwhile.between();
        _tile_loadd(7, b + 32, 128);
        _tile_dpbf16ps(1, 4, 7);
        meanwhile.between();
      }
    } else {
      if (first) {
        _tile_zero(2);
        _tile_zero(3);
      } else {
        _tile_loadd(2, sums + 16 * 32, 128);
        _tile_loadd(3, sums + 16 * 32 + 16, 128);
      }
      for (int64_t s = 0; s < depth; s += 32, a += step, lower += step, b += 32 * 32) {
        meanwhile.step();
        _tile_loadd(4, a, stride);
        _tile_loadd(6, b, 128);
        _tile_dpbf16ps(0, 4, 6);
        meanwhile.between();
        _tile_loadd(7, b + 32, 128);
        _tile_dpbf16ps(1, 4, 7);
        meanwhile.between();
        _tile_loadd(5, lower, stride);
        _tile_dpbf16ps(2, 5, 6);
        meanwhile.between();
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(2, sums + 16 * 32, 128);
      _tile_stored(3, sums + 16 * 32 + 16, 128);
    }
    _tile_stored(0, sums, 128);
    _tile_stored(1, sums + 16, 128);
    asm volatile("" ::: "memory");
  }

  static void stream(const Block& block, char* scratch);
};

// A panel of B: `depth` rows from k on, columns from n on.
struct Ahead {
  int64_t depth, k, n;
};

// Packs one panel of B in steps, while the one before is multiplied, and fetches what will be packed after it.
class NextPanel {
 public:
  // The panel at `at`, in so many steps, to [pairs of k][32 columns].
  void begin(const Block& block, const Ahead& at, const Ahead& after, int64_t steps, uint16_t* to) {
    const auto* b = static_cast<const uint16_t*>(block.b);
    row_ = b + at.k * block.ldb + at.n;
    after_ = b + after.k * block.ldb + after.n;
    ldb_ = block.ldb, lanes_ = block.n - at.n, depth_ = at.depth;
    pairs_ = round_up(at.depth, AmxTile::kDepthUnit) / 2;
    share_ = (pairs_ + steps - 1) / steps;
    whole_ = lanes_ >= AmxTile::kColumns && depth_ % AmxTile::kDepthUnit == 0;
    to_ = to;
  }
  void step() { between(); }
  void between() { whole_ ? pack<true>(share_) : pack<false>(share_); }
  void finish() { pack<false>(pairs_); }

 private:
  template <bool kWhole>
  void pack(int64_t pairs) {
    const int64_t count = smaller(pairs, pairs_), ldb = ldb_;
    const uint16_t *row = row_, *after = after_;
    uint16_t* to = to_;
    for (int64_t i = 0; i < count; ++i, row += 2 * ldb, after += 2 * ldb, to += 64) {
      __m512i low = _mm512_setzero_si512(), high = low;
      if (kWhole)
        interleave(UnpackedSource(), _mm512_loadu_si512(row), _mm512_loadu_si512(row + ldb), low, high);
      else if (2 * i < depth_)
        load_across(UnpackedSource(), row, 2 * i + 1 < depth_ ? row + ldb : nullptr, lanes_, low, high);
      _mm512_storeu_si512(to, low);
      _mm512_storeu_si512(to + 32, high);
      _mm_prefetch(reinterpret_cast<const char*>(after), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(after + ldb), _MM_HINT_T0);
    }
    row_ = row, after_ = after, to_ = to;
    pairs_ -= count, depth_ -= 2 * count;
  }

  const uint16_t *row_, *after_;
  int64_t ldb_, lanes_, depth_, pairs_ = 0, share_;
  bool whole_;
  uint16_t* to_;
};

void AmxTile::stream(const Block& block, char* scratch) {
  const StreamedLayout<AmxTile> layout(block.m, block.n, block.k);
  auto* a = reinterpret_cast<uint16_t*>(scratch);
  auto* b = reinterpret_cast<uint16_t*>(scratch + layout.b);
  auto* c = reinterpret_cast<float*>(scratch + layout.c);
  const int64_t panel = layout.depth * kColumns, steps = 4 * layout.row_panels * layout.depth / kDepthUnit;
  // Panels are numbered along n, then along k.
  const auto at = [&](int64_t i) -> Ahead {
    const int64_t k = i / layout.column_panels * layout.depth;
    return {smaller(layout.depth, block.k - k), k, i % layout.column_panels * kColumns};
  };
  NextPanel next;
  next.begin(block, at(0), at(1), 1, b);
  next.finish();
  Rows panels[kStreamedRows / kRows];
  const int64_t count = layout.column_panels * ((block.k + layout.depth - 1) / layout.depth);
  for (int64_t i = 0; i < count; ++i) {
    const Ahead now = at(i);
    // The rows of a part stay in L1, where rows 4 KB apart would share one set.
    if (now.n == 0)
      for (int64_t p = 0; p < layout.row_panels; ++p)
        panels[p] = copy_a(a + p * layout.a_stride, block, p * kRows, smaller(kRows, block.m - p * kRows), now.k, now.depth);
    if (i + 1 < count) next.begin(block, at(i + 1), at(i + 2), steps, b + (i + 1) % 2 * panel);
    for (int64_t p = 0; p < layout.row_panels; ++p) {
      const int64_t m0 = p * kRows, rows = smaller(kRows, block.m - m0);
      float* sums = c + (now.n / kColumns * layout.row_panels + p) * kRows * kColumns;
      multiply(rows, now.depth, panels[p], b + i % 2 * panel, sums, now.k == 0, next);
      if (now.k + now.depth == block.k) store(block, m0, rows, now.n, smaller(kColumns, block.n - now.n), sums);
    }
    next.finish();
  }
}

// Few rows of int8. The rows of w are rows of a tile as they lie in memory, where nothing is packed; those of x are
// packed as words of four along k, [k / 4][16 rows].
constexpr int64_t kS8Rows = 64;

size_t s8_scratch(int64_t m, int64_t k) { return size_t(round_up(m, 16) * k + 4 * 16 * 16 * 4); }

// Sixteen outputs of sixteen rows: `sums` is [output][row].
void store_s8(const S8Block& block, int64_t m0, int64_t n0, const int32_t* sums) {
  __m512i r[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(sums + i * 16);
  transpose(r);
  const __m512 ws = _mm512_loadu_ps(block.ws + n0);
  const int64_t rows = smaller(16, block.m - m0);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    if (i >= rows) break;
    const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(block.xs[m0 + i]), ws), y = _mm512_mul_ps(_mm512_cvtepi32_ps(r[i]), scale);
    const int64_t at = (m0 + i) * block.ldc + n0;
    if (block.out == MJK_BF16)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<uint16_t*>(block.result) + at), narrow16(y));
    else
      _mm512_storeu_ps(static_cast<float*>(block.result) + at, y);
  }
}

void multiply_s8(const S8Block& block, char* scratch) {
  const int64_t k = block.k, panels = round_up(block.m, 16) / 16;
  auto* packed = reinterpret_cast<int8_t*>(scratch);
  auto* sums = reinterpret_cast<int32_t*>(scratch + panels * 16 * k);
  for (int64_t p = 0; p < panels; ++p) {
    for (int64_t s = 0; s < k; s += 64) {
      __m512i r[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const int64_t row = p * 16 + i;
        r[i] = row < block.m ? _mm512_loadu_si512(block.x + row * k + s) : _mm512_setzero_si512();
      }
      transpose(r);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(packed + (p * k + s + i * 4) * 16, r[i]);
    }
  }
  for (int64_t n0 = 0; n0 < block.n; n0 += 32) {
    const bool both = n0 + 32 <= block.n;
    const int8_t *w = block.w + n0 * k, *next = w + 32 * k;
    const int64_t left = (block.n - n0) * k - 32 * k;  // bytes of w after these rows
    for (int64_t p = 0; p < panels; p += 2) {
      const bool two = p + 1 < panels;
      const int8_t* b = packed + p * k * 16;
      asm volatile("" ::: "memory");  // as in AmxTile::multiply
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t s = 0; s < k; s += 64) {
        if (p == 0)
          for (int64_t line = s * 32; line < s * 32 + 2048 && line < left; line += 64)
            _mm_prefetch(reinterpret_cast<const char*>(next + line), _MM_HINT_T0);
        _tile_loadd(6, b + s * 16, 64);
        _tile_loadd(4, w + s, k);
        _tile_dpbssd(0, 4, 6);
        if (both) {
          _tile_loadd(5, w + 16 * k + s, k);
          _tile_dpbssd(2, 5, 6);
        }
        if (two) {
          _tile_loadd(7, b + (k + s) * 16, 64);
          _tile_dpbssd(1, 4, 7);
          if (both) _tile_dpbssd(3, 5, 7);
        }
      }
      _tile_stored(0, sums, 64);
      _tile_stored(1, sums + 256, 64);
      _tile_stored(2, sums + 512, 64);
      _tile_stored(3, sums + 768, 64);
      asm volatile("" ::: "memory");
      for (int64_t half = 0; half < (both ? 2 : 1); ++half)
        for (int64_t panel = 0; panel < (two ? 2 : 1); ++panel)
          store_s8(block, (p + panel) * 16, n0 + half * 16, sums + half * 512 + panel * 256);
    }
  }
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileConfig kConfig;

void enter() { _tile_loadconfig(&kConfig); }
void leave() {
  publish();
  _tile_release();
}

}  // namespace

extern const Kernels kAmxBf16 = {"amx_bf16", AmxTile::kRows, AmxTile::kColumns, AmxTile::kDepth, sizeof(AmxTile::Packed), AmxTile::kStreamedRows, scratch_bytes<AmxTile>,
                                 multiply_block<AmxTile>, enter, leave};

extern const Kernels kAmxF32 = {"amx_bf16", SplitTile::kRows, SplitTile::kColumns, SplitTile::kDepth, SplitTile::kPieces * sizeof(SplitTile::Packed), SplitTile::kStreamedRows, scratch_bytes<SplitTile>,
                                multiply_block<SplitTile>, enter, leave};

extern const S8Kernels kAmxS8 = {kS8Rows, s8_scratch, multiply_s8};

}  // namespace mindjax
