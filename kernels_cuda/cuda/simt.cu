// Grouped products one multiply-add at a time: float32, and every shape that the tensor-core kernel's copies cannot
// address (rows that are no multiple of 16 bytes). Right for every size; 64 x 64 tiles, 16 of the contraction at a
// time.
#include <type_traits>

#include "device.h"
#include "status.h"
#include "table.cuh"
#include "tiles.h"

namespace mjk {
namespace {

constexpr int kTile = 64, kDepth = 16, kThreads = 256, kPromote = 128;

__device__ __forceinline__ float value(float x) { return x; }
__device__ __forceinline__ float value(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float value(__nv_fp8_e4m3 x) { return static_cast<float>(x); }
__device__ __forceinline__ int32_t value(int8_t x) { return x; }

template <class T>
__global__ void __launch_bounds__(kThreads) simt_product(const __grid_constant__ Problem p) {
  using Sum = decltype(value(T()));
  constexpr bool kScaled = std::is_same_v<T, __nv_fp8_e4m3>;
  __shared__ GroupTable table;
  __shared__ Sum a_tile[kDepth][kTile + 4], b_tile[kDepth][kTile + 4];
  if (threadIdx.x < 32) build_table<kTile>(p, table);
  __syncthreads();

  const bool tgmm = p.product == Product::kTgmm;
  // b[k, n] of a group lies at k * b_k + n * b_n.
  const bool n_contiguous = tgmm || p.product == Product::kGmm;
  const int64_t b_k = n_contiguous ? p.columns : 1, b_n = n_contiguous ? 1 : p.inner;
  const int64_t tiles = tgmm ? tgmm_tiles<kTile, kTile>(p.groups, p.inner, p.columns)
                             : gmm_tiles<kTile, kTile>(table, p.groups, p.columns);
  const int thread_row = threadIdx.x / 16 * 4, thread_column = threadIdx.x % 16 * 4;
  for (int64_t index = blockIdx.x; index < tiles; index += gridDim.x) {
    const Tile tile = tgmm ? tgmm_tile<kTile, kTile>(table, p.inner, p.columns, index)
                           : gmm_tile<kTile, kTile>(table, p.groups, p.columns, index);
    const int32_t depth = tgmm ? tile.rows : p.inner;
    // a[m, k] lies at m * a_m + k * a_k.
    const int64_t a_m = tgmm ? 1 : p.inner, a_k = tgmm ? p.inner : 1;
    const T* a = static_cast<const T*>(p.a) + static_cast<int64_t>(tile.row) * p.inner + (tgmm ? tile.m : 0);
    const T* b = static_cast<const T*>(p.b) +
                 (tgmm ? static_cast<int64_t>(tile.row) : static_cast<int64_t>(tile.group) * p.inner) * p.columns;
    Sum sums[4][4] = {};
    float total[4][4] = {};
    for (int32_t k0 = 0; k0 < depth; k0 += kDepth) {
      for (int i = threadIdx.x; i < kDepth * kTile; i += kThreads) {
        // Neighbouring threads read neighbouring addresses.
        const int am = tgmm ? i % kTile : i / kDepth, ak = tgmm ? i / kTile : i % kDepth;
        a_tile[ak][am] = am < tile.m_valid && k0 + ak < depth ? value(a[am * a_m + (k0 + ak) * a_k]) : Sum(0);
        const int bn = n_contiguous ? i % kTile : i / kDepth, bk = n_contiguous ? i / kTile : i % kDepth;
        b_tile[bk][bn] =
            tile.n + bn < p.columns && k0 + bk < depth ? value(b[(k0 + bk) * b_k + (tile.n + bn) * b_n]) : Sum(0);
      }
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kDepth; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) sums[i][j] += a_tile[k][thread_row + i] * b_tile[k][thread_column + j];
        }
      }
      __syncthreads();
      if (kScaled && ((k0 + kDepth) % kPromote == 0 || k0 + kDepth >= depth)) {
        const int32_t k_block = k0 / kPromote, k_blocks = ceil_div(p.inner, kPromote);
        const int32_t n_blocks = ceil_div(p.columns, kPromote);
        for (int i = 0; i < 4; ++i) {
          for (int j = 0; j < 4; ++j) {
            const int64_t row = tile.row + thread_row + i, n_block = (tile.n + thread_column + j) / kPromote;
            if (row < p.rows && n_block < n_blocks) {
              total[i][j] += static_cast<float>(sums[i][j]) *
                             (p.a_scale[row * k_blocks + k_block] *
                              p.b_scale[(static_cast<int64_t>(tile.group) * n_blocks + n_block) * k_blocks + k_block]);
            }
            sums[i][j] = 0;
          }
        }
      }
    }
    const int64_t first = tgmm ? static_cast<int64_t>(tile.group) * p.inner + tile.m : tile.m;
    for (int i = 0; i < 4 && thread_row + i < tile.m_valid; ++i) {
      for (int j = 0; j < 4 && tile.n + thread_column + j < p.columns; ++j) {
        const int64_t column = tile.n + thread_column + j, at = (first + thread_row + i) * p.columns + column;
        float result = kScaled ? total[i][j] : static_cast<float>(sums[i][j]);
        if (p.product == Product::kS8) {
          result *=
              p.a_scale[tile.row + thread_row + i] * p.b_scale[static_cast<int64_t>(tile.group) * p.columns + column];
        }
        if (p.out_dtype == MJK_BF16) {
          static_cast<__nv_bfloat16*>(p.out)[at] = __float2bfloat16(result);
        } else {
          static_cast<float*>(p.out)[at] = result + (p.accumulate ? static_cast<float*>(p.out)[at] : 0.0f);
        }
      }
    }
  }
  if (!tgmm) {
    zero_outside(p, table, static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x,
                 static_cast<int64_t>(gridDim.x) * kThreads);
  }
}

}  // namespace

int launch_simt(void* stream, const Problem& p) {
  Device device;
  if (const int status = current_device(&device)) return status;
  const int blocks = 4 * device.multiprocessors;
  auto* kernel = p.in_dtype == MJK_F32    ? &simt_product<float>
                 : p.in_dtype == MJK_BF16 ? &simt_product<__nv_bfloat16>
                 : p.in_dtype == MJK_E4M3 ? &simt_product<__nv_fp8_e4m3>
                                          : &simt_product<int8_t>;
  MJK_LAUNCH(kernel, blocks, kThreads, 0, stream, p);
  return launched("simt_product");
}

}  // namespace mjk
