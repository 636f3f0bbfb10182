// The product of one block out of the tiles of an instruction set. Included once in each instruction set's file, which
// is compiled for it: everything is in an unnamed namespace and no function of the standard library is instantiated,
// so that the linker cannot hand one file's code to another.
#pragma once
#include "kernels.h"

namespace mindjax {
namespace {

constexpr int64_t kCacheLine = 64;
constexpr int64_t kSetStride = 4096;  // bytes between lines that share a set of L1

inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Where the parts of a block lie in its scratch.
template <class Tile>
struct Layout {
  int64_t row_panels, column_panels, depth, b_stride, tiles;
  size_t a, b, c, end;

  Layout(int64_t m, int64_t n, int64_t k, int64_t most) {
    row_panels = round_up(m, Tile::kRows) / Tile::kRows;
    column_panels = round_up(n, Tile::kColumns) / Tile::kColumns;
    // Parts of equal depth, so that none is a short rest.
    const int64_t parts = k > most ? (k + most - 1) / most : 1;
    depth = round_up((k + parts - 1) / parts, Tile::kDepthUnit);
    // An odd number of cache lines between panels spreads them over the cache's sets.
    b_stride = Tile::kPieces * depth * Tile::kColumns + kCacheLine / (int64_t)sizeof(typename Tile::Packed);
    // The sums of one tile (and of the one before) stay in L1 where one pass over k finishes it; else all are kept
    // between passes.
    tiles = parts == 1 ? 2 : row_panels * column_panels;
    a = 0;
    b = a + size_t(round_up(Tile::kPanels * (Tile::kPieces * depth + Tile::kRowPadding) * Tile::kRows * (int64_t)sizeof(typename Tile::Packed), kCacheLine));
    c = b + size_t(column_panels * b_stride) * sizeof(typename Tile::Packed);
    end = c + size_t(tiles * Tile::kRows * Tile::kColumns) * sizeof(float);
  }
};

// The same where B is streamed: all of A for a part of k, one panel of B (or two), all sums.
template <class Tile>
struct StreamedLayout {
  int64_t row_panels, column_panels, depth, a_stride;
  size_t b, c, end;

  StreamedLayout(int64_t m, int64_t n, int64_t k) {
    row_panels = round_up(m, Tile::kRows) / Tile::kRows;
    column_panels = round_up(n, Tile::kColumns) / Tile::kColumns;
    depth = smaller(Tile::streamed_depth(m), round_up(k, Tile::kDepthUnit));
    a_stride = (depth + Tile::kRowPadding) * Tile::kRows;
    b = size_t(round_up(row_panels * a_stride * (int64_t)sizeof(typename Tile::Packed), kCacheLine));
    c = b + size_t(Tile::kStreamedPanels * depth * Tile::kColumns) * sizeof(typename Tile::Packed);
    end = c + size_t(row_panels * column_panels * Tile::kRows * Tile::kColumns) * sizeof(float);
  }
};

// A part of an array that is wanted soon: `rows` of so many bytes, fetched into L2 line by line.
struct Fetch {
  const char* row = nullptr;
  int64_t stride = 0, bytes = 0, rows = 0, at = 0;

  int64_t lines() const { return rows * ((bytes + kCacheLine - 1) / kCacheLine); }
  void next(int64_t lines) {
    for (; lines > 0 && rows > 0; --lines) {
      __builtin_prefetch(row + at, 0, 2);
      if ((at += kCacheLine) >= bytes) at = 0, row += stride, --rows;
    }
  }
};

// What memory does in the shadow of a tile's arithmetic, a share in each step: the tile before is stored, and what will
// be packed next is fetched.
template <class Tile>
class Meanwhile {
 public:
  explicit Meanwhile(const Block& block) : block_(block), size_(block.in == MJK_F32 ? 4 : 2) {}

  // A pass over `depth` of k in `tiles` tiles; the next one takes `next_depth` from `next` on.
  void begin(int64_t depth, int64_t tiles, int64_t next, int64_t next_depth) {
    steps_ = round_up(depth, Tile::kDepthUnit) / Tile::kDepthUnit;
    rows_a_step_ = Tile::kRows / steps_ + 1;
    b_ = part(block_.b, block_.ldb, !block_.b_transposed, 0, block_.n, next, next_depth);
    b_lines_ = b_.lines() / (tiles * steps_) + 1;
  }
  // The next panel of A: `rows` from m0 on, of k from k0 on; it has so many tiles to arrive.
  void expect(int64_t m0, int64_t rows, int64_t k0, int64_t depth, int64_t tiles) {
    a_ = part(block_.a, block_.lda, block_.a_transposed, m0, rows, k0, depth);
    a_lines_ = a_.lines() / (tiles * steps_) + 1;
  }
  // A tile is ready to be stored.
  void finish(int64_t m0, int64_t rows, int64_t n0, const float* sums) { m0_ = m0, rows_ = rows, n0_ = n0, sums_ = sums; }

  void between() {}  // the tile operations of a depth unit: all is done in one step
  void step() {
    store(rows_a_step_);
    a_.next(a_lines_);
    b_.next(b_lines_);
  }
  // For tiles that fetch it themselves.
  const Fetch& next_a() const { return a_; }
  bool a_transposed() const { return block_.a_transposed; }
  void store(int64_t count = Tile::kRows) {
    const int64_t rows = smaller(count, rows_);
    if (rows == 0) return;
    Tile::store(block_, m0_, rows, n0_, smaller(Tile::kColumns, block_.n - n0_), sums_);
    m0_ += rows, rows_ -= rows, sums_ += rows * Tile::kColumns;
  }

 private:
  // Lines [i, i + count) of A or B and [k, k + depth) of each, stored along k or across it.
  Fetch part(const void* array, int64_t width, bool across, int64_t i, int64_t count, int64_t k, int64_t depth) const {
    const char* from = static_cast<const char*>(array) + (across ? k * width + i : i * width + k) * size_;
    return {from, width * size_, (across ? count : depth) * size_, across ? depth : count};
  }

  const Block& block_;
  int64_t size_, steps_ = 1, rows_a_step_ = 0, a_lines_ = 0, b_lines_ = 0;
  Fetch a_, b_;
  int64_t m0_ = 0, rows_ = 0, n0_ = 0;
  const float* sums_ = nullptr;
};

template <class Tile>
size_t scratch_bytes(int64_t m, int64_t n, int64_t k, int64_t depth) {
  const size_t packed = Layout<Tile>(m, n, k, depth).end;
  if constexpr (Tile::kStreamedRows > 0) {
    const size_t streamed = StreamedLayout<Tile>(smaller(m, Tile::kStreamedRows), n, k).end;
    return packed > streamed ? packed : streamed;
  }
  return packed;
}

// Tile::stream for tiles that give copy_a (pack_a, but never in place) and stream_tile(block, k0, depth, n0, rows,
// packs, a, b, sums, first, ahead): the product of few rows, for which packing B first would take as long as using it.
// Here memory delivers B meanwhile.
// The first tile of a column of tiles reads B where it lies, packs it for the others and fetches what comes soon: its
// share of the next part of k in the order of memory, which is read twice as fast so, where rows are whole or L1 has no
// room for a panel as stored; else a panel, of a few rows not the next one, which is too soon.
// Parts of k are shallow, so that two of them stay in L2.
template <class Tile>
void stream_block(const Block& block, char* scratch) {
  using Packed = typename Tile::Packed;
  const StreamedLayout<Tile> layout(block.m, block.n, block.k);
  Packed* a = reinterpret_cast<Packed*>(scratch);
  Packed* b = reinterpret_cast<Packed*>(scratch + layout.b);
  float* c = reinterpret_cast<float*>(scratch + layout.c);
  const int64_t size = block.in == MJK_F32 ? 4 : 2, row = block.ldb * size;
  const char* from = static_cast<const char*>(block.b);
  const bool in_order = Tile::in_order(block.m) && (block.n == block.ldb || row % kSetStride == 0);
  const int64_t panels_ahead = layout.row_panels < 4 ? 4 / layout.row_panels : 1;
  Fetch ahead = {from, row, block.n * size, smaller(layout.depth, block.k)};
  if (in_order) ahead.next(ahead.lines());
  for (int64_t k0 = 0; k0 < block.k; k0 += layout.depth) {
    const int64_t depth = smaller(layout.depth, block.k - k0), next = k0 + depth;
    const bool first = k0 == 0, last = next == block.k;
    decltype(Tile::copy_a(a, block, 0, 0, 0, 0)) panels[(Tile::kStreamedRows + Tile::kRows - 1) / Tile::kRows];
    for (int64_t i = 0; i < layout.row_panels; ++i) {
      const int64_t m0 = i * Tile::kRows;
      panels[i] = Tile::copy_a(a + i * layout.a_stride, block, m0, smaller(Tile::kRows, block.m - m0), k0, depth);
    }
    const int64_t next_depth = smaller(layout.depth, block.k - next);
    ahead = {from + next * row, row, block.n * size, next_depth};
    for (int64_t j = 0; j < layout.column_panels; ++j) {
      const int64_t n0 = j * Tile::kColumns;
      if (!in_order) {
        const int64_t soon = j + panels_ahead, below = soon - layout.column_panels;  // below: in the next part of k
        const bool here = below < 0;
        const char* line = from + (here ? k0 : next) * row + (here ? soon : below) * Tile::kColumns * size;
        ahead = {line, row, Tile::kColumns * size, here ? depth : next_depth};
      }
      for (int64_t i = 0; i < layout.row_panels; ++i) {
        const int64_t m0 = i * Tile::kRows, rows = smaller(Tile::kRows, block.m - m0);
        float* sums = c + (j * layout.row_panels + i) * Tile::kRows * Tile::kColumns;
        Packed* panel = layout.row_panels > 1 ? b : nullptr;
        Tile::stream_tile(block, k0, depth, n0, rows, i == 0, panels[i], panel, sums, first, ahead);
        if (last) Tile::store(block, m0, rows, n0, smaller(Tile::kColumns, block.n - n0), sums);
      }
    }
  }
}

// Tile gives: Packed, kRows, kColumns, kDepthUnit, kDepth, kPieces (that an element is packed as), kRowPadding, kPanels
// (of A that the scratch holds);
// pack_a(scratch, block, m0, rows, k0, depth): a panel of rows, in the scratch or where it lies;
// pack_b(out, stride, block, k0, depth): all panels of columns;
// multiply(rows, depth, a, b, sums, first, meanwhile), which gives `meanwhile` its steps or stores what it holds;
// store(block, m0, rows, n0, columns, sums).
// With kStreamedRows above 0 also streamed_depth(m), kStreamedPanels and stream(block, scratch);
// for stream_block in_order(m), whether B may be fetched so.
template <class Tile>
void multiply_block(const Block& block, char* scratch) {
  if constexpr (Tile::kStreamedRows > 0)
    if (block.m <= Tile::kStreamedRows && block.k > 0 && !block.a_transposed && !block.b_transposed)
      return Tile::stream(block, scratch);
  using Packed = typename Tile::Packed;
  const Layout<Tile> layout(block.m, block.n, block.k, block.depth);
  Packed* a = reinterpret_cast<Packed*>(scratch + layout.a);
  Packed* b = reinterpret_cast<Packed*>(scratch + layout.b);
  float* c = reinterpret_cast<float*>(scratch + layout.c);
  constexpr int64_t kTile = Tile::kRows * Tile::kColumns;
  Meanwhile<Tile> meanwhile(block);
  if (block.k == 0) {
    if (block.accumulate) return;
    for (int64_t i = 0; i < kTile; ++i) c[i] = 0;
    for (int64_t m0 = 0; m0 < block.m; m0 += Tile::kRows)
      for (int64_t n0 = 0; n0 < block.n; n0 += Tile::kColumns)
        Tile::store(block, m0, smaller(Tile::kRows, block.m - m0), n0, smaller(Tile::kColumns, block.n - n0), c);
    return;
  }
  for (int64_t k0 = 0; k0 < block.k; k0 += layout.depth) {
    const int64_t depth = smaller(layout.depth, block.k - k0), next = k0 + depth;
    const int64_t next_depth = smaller(layout.depth, block.k - next);
    const bool first = k0 == 0, last = next == block.k;
    Tile::pack_b(b, layout.b_stride, block, k0, depth);
    meanwhile.begin(depth, layout.row_panels * layout.column_panels, next, next_depth);
    for (int64_t i = 0; i < layout.row_panels; ++i) {
      const int64_t m0 = i * Tile::kRows, rows = smaller(Tile::kRows, block.m - m0), below = m0 + rows;
      const auto panel = Tile::pack_a(a, block, m0, rows, k0, depth);
      if (below < block.m)
        meanwhile.expect(below, smaller(Tile::kRows, block.m - below), k0, depth, layout.column_panels);
      else
        meanwhile.expect(0, smaller(Tile::kRows, block.m), next, next_depth, layout.column_panels);
      for (int64_t j = 0; j < layout.column_panels; ++j) {
        const int64_t tile = i * layout.column_panels + j;
        float* sums = c + (first && last ? tile % 2 : tile) * kTile;
        Tile::multiply(rows, depth, panel, b + j * layout.b_stride, sums, first, meanwhile);
        if (last) meanwhile.finish(m0, rows, j * Tile::kColumns, sums);
      }
    }
  }
  meanwhile.store();
}

}  // namespace
}  // namespace mindjax
