// Arithmetic of the grouped products that a CPU can check: which tile is where, what shared memory holds, which
// accumulator is which element. gmm.cu and simt.cu run it on the device; tiles_test.cc runs it against brute force.
//
// Sources: PTX ISA 9.0, sections "Asynchronous Warpgroup Level Matrix Shared Memory Layout" (swizzle, major-ness,
// matrix descriptor), "Register Fragments and Shared Memory Matrix Layouts" of wgmma (accumulators) and "Tensor
// swizzling modes"; the same constants stand in CUTLASS's cute/atom/mma_traits_sm90_gmma.hpp (make_gmma_desc).
#pragma once
#include <stdint.h>

#ifndef MJK_HD
#ifdef __CUDACC__
#define MJK_HD __host__ __device__ __forceinline__
#else
#define MJK_HD inline
#endif
#endif

namespace mjk {

MJK_HD constexpr int32_t ceil_div(int32_t a, int32_t b) { return (a + b - 1) / b; }

// ---- groups: where the rows and the tiles of each group begin

constexpr int kMaxGroups = 1024;

struct GroupTable {
  int32_t row[kMaxGroups + 1];   // group g of the call holds rows row[g] .. row[g + 1]
  int32_t tile[kMaxGroups + 1];  // and, for gmm, the tiles of rows tile[g] .. tile[g + 1]
};

// A row of the table, whatever the sizes sum to: a bad sum must not leave the arrays.
MJK_HD int32_t clamp_row(int64_t row, int32_t rows) { return row < rows ? static_cast<int32_t>(row) : rows; }
MJK_HD int32_t clamp_size(int32_t size) { return size > 0 ? size : 0; }

// The group that holds a tile of rows: the last g with starts[g] <= tile. Empty groups, which start where the next one
// does, are never it.
MJK_HD int32_t find_group(const int32_t* starts, int32_t groups, int32_t tile) {
  int32_t low = 0, high = groups - 1;
  while (low < high) {
    const int32_t middle = (low + high + 1) / 2;
    if (starts[middle] <= tile) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// One tile of output. gmm: rows of x are its rows. tgmm: columns of x are its rows, and the rows of x are contracted.
struct Tile {
  int32_t group;
  int32_t row;      // first row of x: of the tile (gmm), of the group (tgmm)
  int32_t rows;     // rows of x that count, from `row` on
  int32_t m, n;     // first row and column of the tile in its output matrix (gmm: m == row)
  int32_t m_valid;  // rows of the tile that are stored
};

// gmm: tiles of a group's rows begin at the group's first row; the columns run fastest, so that the tiles in flight
// share rows of x, and all columns of one matrix lie in the L2 cache together.
template <int kBM, int kBN>
MJK_HD int64_t gmm_tiles(const GroupTable& table, int32_t groups, int32_t columns) {
  return static_cast<int64_t>(table.tile[groups]) * ceil_div(columns, kBN);
}

template <int kBM, int kBN>
MJK_HD Tile gmm_tile(const GroupTable& table, int32_t groups, int32_t columns, int64_t index) {
  const int32_t across = ceil_div(columns, kBN);
  const int32_t down = static_cast<int32_t>(index / across);
  Tile tile;
  tile.group = find_group(table.tile, groups, down);
  tile.row = table.row[tile.group] + (down - table.tile[tile.group]) * kBM;
  const int32_t left = table.row[tile.group + 1] - tile.row;
  tile.rows = tile.m_valid = left < kBM ? left : kBM;
  tile.m = tile.row;
  tile.n = static_cast<int32_t>(index % across) * kBN;
  return tile;
}

template <int kBM, int kBN>
MJK_HD int64_t tgmm_tiles(int32_t groups, int32_t inner, int32_t columns) {
  return static_cast<int64_t>(groups) * ceil_div(inner, kBM) * ceil_div(columns, kBN);
}

template <int kBM, int kBN>
MJK_HD Tile tgmm_tile(const GroupTable& table, int32_t inner, int32_t columns, int64_t index) {
  const int32_t across = ceil_div(columns, kBN), down = ceil_div(inner, kBM);
  Tile tile;
  tile.group = static_cast<int32_t>(index / (across * down));
  tile.row = table.row[tile.group];
  tile.rows = table.row[tile.group + 1] - tile.row;
  tile.m = static_cast<int32_t>(index / across % down) * kBM;
  tile.n = static_cast<int32_t>(index % across) * kBN;
  const int32_t left = inner - tile.m;
  tile.m_valid = left < kBM ? left : kBM;
  return tile;
}

// ---- shared memory: lines of 128 bytes, eight of them an atom, whose 16-byte chunks are permuted

constexpr int kLine = 128;        // bytes; the span of CU_TENSOR_MAP_SWIZZLE_128B
constexpr int kAtom = 8 * kLine;  // the swizzle repeats; operands must begin at a multiple
constexpr int kBox = 64 * kLine;  // 64 lines: 64 rows of a K-major operand, or 64 elements of K of an MN-major one
constexpr int kMmaRows = 64;      // M of wgmma
constexpr int kDescriptorSwizzle128 = 1;  // bits 62-63 of the descriptor

// Swizzle<3, 4, 3>: bits 4-6 of an address (the chunk) are xored with bits 7-9 (the line of the atom).
MJK_HD constexpr uint32_t swizzle(uint32_t offset) { return offset ^ ((offset >> 7 & 7) << 4); }

// The matrix descriptor. All three quantities are in units of 16 bytes, 14 bits each.
//   start   bits 0-13
//   leading bits 16-29: K-major: unused with a swizzle; MN-major: from 64 (bf16) elements of MN to the next 64
//   stride  bits 32-45: K-major: from 8 rows to the next 8; MN-major: from 8 elements of K to the next 8
//   base offset, bits 49-51, is 0: every atom begins at a multiple of 1024 bytes
MJK_HD constexpr uint64_t descriptor(uint32_t start, uint32_t leading, uint32_t stride) {
  return static_cast<uint64_t>((start & 0x3FFFF) >> 4) | static_cast<uint64_t>((leading & 0x3FFFF) >> 4) << 16 |
         static_cast<uint64_t>((stride & 0x3FFFF) >> 4) << 32 | static_cast<uint64_t>(kDescriptorSwizzle128) << 62;
}

// The operand of one wgmma, 32 bytes of K deep (16 bf16, 32 bytes of e4m3 or s8): step `k` of the four in a stage, from
// line or element `mn` of the operand on (a multiple of 64).
//   K-major: a line is 128 bytes of K of one row; step k begins 32 k bytes into the line (the hardware swizzles the
//   sum). MN-major (bf16 only): boxes of 64 elements of MN, a line is one element of K; step k begins 16 k lines
//   further.
MJK_HD constexpr uint64_t operand(bool mn_major, uint32_t base, int mn, int k) {
  return mn_major ? descriptor(base + mn / 64 * kBox + k * 16 * kLine, kBox, kAtom)
                  : descriptor(base + mn * kLine + k * 32, 16, kAtom);
}

// ---- accumulators of wgmma m64nNk*: thread t of the warpgroup holds acc[4 j + 2 h + c], which is element
// (16 (t / 32) + (t % 32) / 4 + 8 h, 8 j + 2 (t % 4) + c).

MJK_HD constexpr int accumulator_row(int thread, int half) { return thread / 32 * 16 + thread % 32 / 4 + 8 * half; }
MJK_HD constexpr int accumulator_column(int thread, int chunk) { return 8 * chunk + 2 * (thread % 4); }

// Four threads (a quad) hold four chunks of eight columns, each thread two columns of every chunk: in[j] of thread q
// are columns 2 q, 2 q + 1 of chunk j. After the transpose thread q holds chunk q whole: v[i] are its columns 2 i, 2 i
// + 1. Two rounds of exchange with the thread whose number differs in one bit; `exchange(value, bit)` returns the value
// that thread q ^ bit passed.
template <class Exchange>
MJK_HD void quad_transpose(uint32_t (&v)[4], int q, Exchange exchange) {
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool high = q & bit;
#ifdef __CUDACC__
#pragma unroll
#endif
    for (int pair = 0; pair < 2; ++pair) {
      const int low = bit == 1 ? 2 * pair : pair;
      const uint32_t received = exchange(high ? v[low] : v[low + bit], bit);
      if (high) {
        v[low] = received;
      } else {
        v[low + bit] = received;
      }
    }
  }
}

}  // namespace mjk
