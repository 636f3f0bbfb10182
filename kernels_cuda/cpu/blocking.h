// The product of one block out of the tiles of an instruction set. Included once in each instruction set's file, which
// is compiled for it: everything is in an unnamed namespace and no function of the standard library is instantiated,
// so that the linker cannot hand one file's code to another.
#pragma once
#include "kernels.h"

namespace mindjax {
namespace {

constexpr int64_t kCacheLine = 64;

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
    b_stride = depth * Tile::kColumns + kCacheLine / (int64_t)sizeof(typename Tile::Packed);
    // The sums of one tile stay in L1 where one pass over k finishes it; else all are kept between passes.
    tiles = parts == 1 ? 1 : row_panels * column_panels;
    a = 0;
    b = a + size_t(round_up((depth + Tile::kRowPadding) * Tile::kRows * (int64_t)sizeof(typename Tile::Packed), kCacheLine));
    c = b + size_t(column_panels * b_stride) * sizeof(typename Tile::Packed);
    end = c + size_t(tiles * Tile::kRows * Tile::kColumns) * sizeof(float);
  }
};

template <class Tile>
size_t scratch_bytes(int64_t m, int64_t n, int64_t k, int64_t depth) {
  return Layout<Tile>(m, n, k, depth).end;
}

// Tile gives: Packed, kRows, kColumns, kDepthUnit, kDepth, kRowPadding; pack_a(scratch, block, m0, rows, k0, depth): a
// panel of rows, in the scratch or where it lies; pack_b(out, stride, block, k0, depth): all panels of columns;
// multiply(rows, depth, a, b, sums, first, j, panels of columns); store(block, m0, rows, n0, columns, sums).
template <class Tile>
void multiply_block(const Block& block, char* scratch) {
  using Packed = typename Tile::Packed;
  const Layout<Tile> layout(block.m, block.n, block.k, block.depth);
  Packed* a = reinterpret_cast<Packed*>(scratch + layout.a);
  Packed* b = reinterpret_cast<Packed*>(scratch + layout.b);
  float* c = reinterpret_cast<float*>(scratch + layout.c);
  constexpr int64_t kTile = Tile::kRows * Tile::kColumns;
  if (block.k == 0) {
    if (block.accumulate) return;
    for (int64_t i = 0; i < kTile; ++i) c[i] = 0;
    for (int64_t m0 = 0; m0 < block.m; m0 += Tile::kRows)
      for (int64_t n0 = 0; n0 < block.n; n0 += Tile::kColumns)
        Tile::store(block, m0, smaller(Tile::kRows, block.m - m0), n0, smaller(Tile::kColumns, block.n - n0), c);
    return;
  }
  for (int64_t k0 = 0; k0 < block.k; k0 += layout.depth) {
    const int64_t depth = smaller(layout.depth, block.k - k0);
    const bool first = k0 == 0, last = k0 + depth == block.k;
    Tile::pack_b(b, layout.b_stride, block, k0, depth);
    for (int64_t i = 0; i < layout.row_panels; ++i) {
      const int64_t m0 = i * Tile::kRows, rows = smaller(Tile::kRows, block.m - m0);
      const auto panel = Tile::pack_a(a, block, m0, rows, k0, depth);
      for (int64_t j = 0; j < layout.column_panels; ++j) {
        float* sums = layout.tiles == 1 ? c : c + (i * layout.column_panels + j) * kTile;
        Tile::multiply(rows, depth, panel, b + j * layout.b_stride, sums, first, j, layout.column_panels);
        if (last) {
          const int64_t n0 = j * Tile::kColumns;
          Tile::store(block, m0, rows, n0, smaller(Tile::kColumns, block.n - n0), sums);
        }
      }
    }
  }
}

}  // namespace
}  // namespace mindjax
