// What a block does around its tiles: the table of groups at the start, the rows of no group at the end.
#pragma once
#include "status.h"
#include "tiles.h"

namespace mjk {

template <class T>
__device__ __forceinline__ T warp_scan(T value) {  // inclusive
  for (int distance = 1; distance < 32; distance *= 2) {
    const T other = __shfl_up_sync(0xFFFFFFFFu, value, distance);
    if (static_cast<int>(threadIdx.x % 32) >= distance) value += other;
  }
  return value;
}

// One warp fills the table from the sizes: 32 groups at a time.
template <int kBM>
__device__ __forceinline__ void build_table(const Problem& p, GroupTable& table) {
  const int lane = threadIdx.x % 32;
  const int32_t last = p.group_offset + p.groups;
  int64_t rows_before = 0;
  int32_t tiles_before = 0;
  if (lane == 0) table.row[0] = table.tile[0] = 0;  // a call without groups
  __syncwarp();
  for (int32_t base = 0; base < last; base += 32) {
    const int32_t g = base + lane;
    const int64_t size = g < last ? clamp_size(p.group_sizes[g]) : 0;
    const int64_t rows_through = rows_before + warp_scan(size);
    const int32_t begin = clamp_row(rows_through - size, p.rows), end = clamp_row(rows_through, p.rows);
    const bool ours = g >= p.group_offset && g < last;
    const int32_t tiles = ours ? ceil_div(end - begin, kBM) : 0;
    const int32_t tiles_through = tiles_before + warp_scan(tiles);
    if (ours) {
      table.row[g - p.group_offset] = begin;
      table.tile[g - p.group_offset] = tiles_through - tiles;
      if (g == last - 1) {
        table.row[p.groups] = end;
        table.tile[p.groups] = tiles_through;
      }
    }
    rows_before = __shfl_sync(0xFFFFFFFFu, rows_through, 31);
    tiles_before = __shfl_sync(0xFFFFFFFFu, tiles_through, 31);
  }
}

// Thread `thread` of `threads` zeroes its share of the rows of `out` before the first group and past the last.
__device__ __forceinline__ void zero_outside(const Problem& p, const GroupTable& table, int64_t thread,
                                             int64_t threads) {
  const int64_t row_bytes = static_cast<int64_t>(p.columns) * (p.out_dtype == MJK_BF16 ? 2 : 4);
  uint8_t* out = static_cast<uint8_t*>(p.out);
  const int64_t begins[2] = {0, table.row[p.groups] * row_bytes};
  const int64_t ends[2] = {table.row[0] * row_bytes, p.rows * row_bytes};
  const bool wide = row_bytes % 16 == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0;
  for (int part = 0; part < 2; ++part) {
    if (wide) {
      for (int64_t i = begins[part] + 16 * thread; i < ends[part]; i += 16 * threads) {
        *reinterpret_cast<uint4*>(out + i) = make_uint4(0, 0, 0, 0);
      }
    } else {
      for (int64_t i = begins[part] + 2 * thread; i < ends[part]; i += 2 * threads) {
        *reinterpret_cast<uint16_t*>(out + i) = 0;
      }
    }
  }
}

}  // namespace mjk
