// Kernels that move rows: quantize, permute, unpermute, SwiGLU. One warp per row (or per part of one), 16 bytes per
// thread and load where rows and pointers allow it, several loads in flight before the first use.
#include "../include/e4m3_block.h"
#include "device.h"
#include "divide.h"
#include "rows.h"
#include "status.h"
#include "tiles.h"

namespace mjk {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kRounds = 4;  // of quantize: blocks a thread has a share of

// Indices of packs and of blocks of 128 are 32-bit: a division of 64-bit ones costs as much as the rest of a thread.
constexpr int64_t kMaxIndex = INT32_MAX - 1024;

unsigned blocks_for(int64_t units, int64_t per_block) {
  return static_cast<unsigned>((units + per_block - 1) / per_block);
}

__device__ __forceinline__ uint32_t warp_index() { return blockIdx.x * kWarps + threadIdx.x / 32; }
__device__ __forceinline__ uint32_t thread_index() { return blockIdx.x * kThreads + threadIdx.x; }

// kWidth elements of T as floats, from one load (to one store) of their size.
template <class T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
  T at[kWidth];
};

template <class T, int kWidth>
__device__ __forceinline__ void read(const T* from, float (&to)[kWidth]) {
  const Pack<T, kWidth> pack = *reinterpret_cast<const Pack<T, kWidth>*>(from);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) to[i] = static_cast<float>(pack.at[i]);
}

template <class T, int kWidth>
__device__ __forceinline__ void write(T* to, const float (&from)[kWidth]) {
  Pack<T, kWidth> pack;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) pack.at[i] = static_cast<T>(from[i]);
  *reinterpret_cast<Pack<T, kWidth>*>(to) = pack;
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, distance);
  return value;
}

__device__ __forceinline__ bool present(int32_t index, int64_t rows) { return index >= 0 && index < rows; }

// ---- permute

// A warp copies 4 x 32 packs of one row, the blockIdx.y-th part of it.
template <class P>
__global__ void __launch_bounds__(kThreads)
    permute(int64_t rows, int64_t out_rows, int64_t packs, const P* x, const int32_t* index, P* out) {
  const int64_t row = warp_index(), first = blockIdx.y * 128 + threadIdx.x % 32;
  if (row >= out_rows) return;
  const int32_t from = __ldg(index + row);
  P values[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[i] = P{};
    if (first + 32 * i < packs && present(from, rows)) values[i] = x[from * packs + first + 32 * i];
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (first + 32 * i < packs) out[row * packs + first + 32 * i] = values[i];
  }
}

template <class P>
int launch_permute(void* stream, int64_t rows, int64_t out_rows, int64_t row_bytes, const void* x, const int32_t* index,
                   void* out) {
  const int64_t packs = row_bytes / sizeof(P);
  const dim3 grid(blocks_for(out_rows, kWarps), blocks_for(packs, 128));
  MJK_LAUNCH(permute<P>, grid, kThreads, 0, stream, rows, out_rows, packs, static_cast<const P*>(x), index,
             static_cast<P*>(out));
  return launched("permute");
}

// ---- quantize

// kLanes threads hold one block of 128 elements, kWidth each; a warp takes kRounds times as many blocks as it can hold,
// with all their loads in flight before the first is used.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    quantize(int64_t rows, int64_t out_rows, int64_t k, const T* x, const int32_t* index, uint8_t* out, float* scales) {
  constexpr int kLanes = 128 / kWidth, kPerWarp = 32 / kLanes;
  static_assert(kLanes <= 32);
  const uint32_t blocks = (k + 127) / 128;
  const uint32_t first = warp_index() * (kPerWarp * kRounds) + threadIdx.x % 32 / kLanes;  // block, of all rows
  Pack<T, kWidth> loaded[kRounds];
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    loaded[round] = Pack<T, kWidth>{};
    const uint32_t block = first + round * kPerWarp;
    const int64_t row = block / blocks, column = block % blocks * 128 + threadIdx.x % kLanes * kWidth;
    if (row < out_rows && column < k) {
      const int64_t from = index == nullptr ? row : __ldg(index + row);
      if (from >= 0 && from < rows) loaded[round] = *reinterpret_cast<const Pack<T, kWidth>*>(x + from * k + column);
    }
  }
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    float largest = 0;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) largest = larger(largest, static_cast<float>(loaded[round].at[i]));
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, distance));
    }
    const E4m3Block how(largest);
    const Divisor divisor(how.divisor);
    const uint32_t block = first + round * kPerWarp;
    const int64_t row = block / blocks, column = block % blocks * 128 + threadIdx.x % kLanes * kWidth;
    if (row >= out_rows || column >= k) continue;
    Pack<uint8_t, kWidth> packed;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float quotient = divisor.divide(how.counted(static_cast<float>(loaded[round].at[i])));
      packed.at[i] = __nv_cvt_float_to_fp8(quotient, __NV_SATFINITE, __NV_E4M3);
    }
    *reinterpret_cast<Pack<uint8_t, kWidth>*>(out + row * k + column) = packed;
    if (threadIdx.x % kLanes == 0) scales[block] = how.scale;
  }
}

// The whole of one block per thread, for rows that cannot be read in packs.
template <class T>
__global__ void __launch_bounds__(kThreads) quantize_any(int64_t rows, int64_t out_rows, int64_t k, const T* x,
                                                         const int32_t* index, uint8_t* out, float* scales) {
  const uint32_t blocks = (k + 127) / 128, block = thread_index();
  const int64_t row = block / blocks, begin = block % blocks * 128, end = begin + 128 < k ? begin + 128 : k;
  if (row >= out_rows) return;
  const int64_t from = index == nullptr ? row : index[row];
  const bool there = from >= 0 && from < rows;
  float largest = 0;
  for (int64_t i = begin; there && i < end; ++i) largest = larger(largest, static_cast<float>(x[from * k + i]));
  const E4m3Block how(largest);
  const Divisor divisor(how.divisor);
  for (int64_t i = begin; i < end; ++i) {
    const float value = there ? static_cast<float>(x[from * k + i]) : 0.0f;
    out[row * k + i] = __nv_cvt_float_to_fp8(divisor.divide(how.counted(value)), __NV_SATFINITE, __NV_E4M3);
  }
  scales[block] = how.scale;
}

template <class T>
int launch_quantize(void* stream, int64_t rows, int64_t out_rows, int64_t k, const void* x, const int32_t* index,
                    void* out, float* scales) {
  constexpr int kWidth = 16 / sizeof(T);
  const int64_t blocks = out_rows * ((k + 127) / 128);
  if (blocks > kMaxIndex) return fail(MJK_UNSUPPORTED, "quantize takes at most 2^31 blocks of 128");
  auto* from = static_cast<const T*>(x);
  auto* to = static_cast<uint8_t*>(out);
  if (k % kWidth == 0 && aligned(x, 16) && aligned(out, kWidth)) {
    auto* kernel = &quantize<T, kWidth>;
    MJK_LAUNCH(kernel, blocks_for(blocks * (128 / kWidth), kThreads * kRounds), kThreads, 0, stream, rows, out_rows, k,
               from, index, to, scales);
  } else {
    MJK_LAUNCH(quantize_any<T>, blocks_for(blocks, kThreads), kThreads, 0, stream, rows, out_rows, k, from, index, to,
               scales);
  }
  return launched("quantize");
}

// ---- unpermute

// A warp gathers and adds 32 packs of one token's choices, four loads in flight: an absent choice loads row 0 and drops
// it, since a branch would keep the loads apart.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads) unpermute(int64_t rows, int64_t tokens, int64_t choices, int64_t k,
                                                      const T* x, const int32_t* index, const float* weight, T* out) {
  const int64_t token = warp_index(), column = (blockIdx.y * 32 + threadIdx.x % 32) * kWidth;
  if (token >= tokens || column >= k) return;
  float sum[kWidth] = {};
#pragma unroll 4
  for (int64_t j = 0; j < choices; ++j) {
    const int64_t at = token * choices + j;
    const int32_t from = __ldg(index + at);
    const bool there = present(from, rows);
    const float w = weight == nullptr ? 1.0f : __ldg(weight + at);
    float values[kWidth];
    read<T, kWidth>(x + (there ? from : 0) * k + column, values);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum[i] = there ? sum[i] + w * values[i] : sum[i];
  }
  write<T, kWidth>(out + token * k + column, sum);
}

template <class T, int kWidth>
int launch_unpermute(void* stream, int64_t rows, int64_t tokens, int64_t choices, int64_t k, const void* x,
                     const int32_t* index, const float* weight, void* out) {
  const dim3 grid(blocks_for(tokens, kWarps), blocks_for(k / kWidth, 32));
  auto* kernel = &unpermute<T, kWidth>;
  MJK_LAUNCH(kernel, grid, kThreads, 0, stream, rows, tokens, choices, k, static_cast<const T*>(x), index, weight,
             static_cast<T*>(out));
  return launched("unpermute");
}

// ---- SwiGLU

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    swiglu(int64_t rows, int64_t width, const T* gate_up, const float* scale, T* out) {
  const uint32_t packs = width / kWidth, pack = thread_index();
  const int64_t row = pack / packs, column = pack % packs * kWidth;
  if (row >= rows) return;
  float gate[kWidth], up[kWidth];
  read<T, kWidth>(gate_up + row * 2 * width + column, gate);
  read<T, kWidth>(gate_up + row * 2 * width + width + column, up);
  const float factor = scale == nullptr ? 1.0f : __ldg(scale + row);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) up[i] = gate[i] * sigmoid(gate[i]) * up[i] * factor;
  write<T, kWidth>(out + row * width + column, up);
}

// A warp per row, since the gradient of the row's scale sums over it.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    swiglu_grad(int64_t rows, int64_t width, const T* gate_up, const float* scale, const T* d_out, T* d_gate_up,
                float* d_scale) {
  const int64_t row = warp_index();
  if (row >= rows) return;
  const float factor = scale == nullptr ? 1.0f : __ldg(scale + row);
  float d_factor = 0;
  for (int64_t column = threadIdx.x % 32 * kWidth; column < width; column += 32 * kWidth) {
    float gate[kWidth], up[kWidth], d[kWidth];
    read<T, kWidth>(gate_up + row * 2 * width + column, gate);
    read<T, kWidth>(gate_up + row * 2 * width + width + column, up);
    read<T, kWidth>(d_out + row * width + column, d);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float s = sigmoid(gate[i]), silu = gate[i] * s;
      d_factor += silu * up[i] * d[i];
      d[i] *= factor;
      gate[i] = d[i] * up[i] * (s + silu * (1.0f - s));
      up[i] = d[i] * silu;
    }
    write<T, kWidth>(d_gate_up + row * 2 * width + column, gate);
    write<T, kWidth>(d_gate_up + row * 2 * width + width + column, up);
  }
  d_factor = warp_sum(d_factor);
  if (scale != nullptr && threadIdx.x % 32 == 0) d_scale[row] = d_factor;
}

template <class T, int kWidth>
int launch_swiglu(void* stream, int64_t rows, int64_t width, const void* gate_up, const float* scale, void* out) {
  const int64_t packs = rows * (width / kWidth);
  if (packs > kMaxIndex) return fail(MJK_UNSUPPORTED, "swiglu takes at most 2^31 groups of %d elements", kWidth);
  auto* kernel = &swiglu<T, kWidth>;
  MJK_LAUNCH(kernel, blocks_for(packs, kThreads), kThreads, 0, stream, rows, width, static_cast<const T*>(gate_up),
             scale, static_cast<T*>(out));
  return launched("swiglu");
}

template <class T, int kWidth>
int launch_swiglu_grad(void* stream, int64_t rows, int64_t width, const void* gate_up, const float* scale,
                       const void* d_out, void* d_gate_up, float* d_scale) {
  auto* kernel = &swiglu_grad<T, kWidth>;
  MJK_LAUNCH(kernel, blocks_for(rows, kWarps), kThreads, 0, stream, rows, width, static_cast<const T*>(gate_up), scale,
             static_cast<const T*>(d_out), static_cast<T*>(d_gate_up), d_scale);
  return launched("swiglu_grad");
}

// Calls `f<T, width>()` of the dtype, with packs of 16 bytes where `wide`, else single elements.
#define MJK_BY_TYPE(dtype, wide, f, ...)                                               \
  ((dtype) == MJK_F32 ? ((wide) ? f<float, 4>(__VA_ARGS__) : f<float, 1>(__VA_ARGS__)) \
                      : ((wide) ? f<__nv_bfloat16, 8>(__VA_ARGS__) : f<__nv_bfloat16, 1>(__VA_ARGS__)))

}  // namespace

int permute_rows(void* stream, int64_t rows, int64_t out_rows, int64_t row_bytes, const void* x, const int32_t* index,
                 void* out) {
  const auto fits = [&](int64_t bytes) { return row_bytes % bytes == 0 && aligned(x, bytes) && aligned(out, bytes); };
  if (fits(16)) return launch_permute<uint4>(stream, rows, out_rows, row_bytes, x, index, out);
  if (fits(4)) return launch_permute<uint32_t>(stream, rows, out_rows, row_bytes, x, index, out);
  return launch_permute<uint8_t>(stream, rows, out_rows, row_bytes, x, index, out);
}

int quantize_rows(void* stream, mjk_dtype dtype, int64_t rows, int64_t out_rows, int64_t k, const void* x,
                  const int32_t* index, void* out, float* scales) {
  return dtype == MJK_F32 ? launch_quantize<float>(stream, rows, out_rows, k, x, index, out, scales)
                          : launch_quantize<__nv_bfloat16>(stream, rows, out_rows, k, x, index, out, scales);
}

int unpermute_rows(void* stream, mjk_dtype dtype, int64_t rows, int64_t tokens, int64_t choices, int64_t k,
                   const void* x, const int32_t* index, const float* weight, void* out) {
  const bool wide = k * size_of(dtype) % 16 == 0 && aligned(x, 16) && aligned(out, 16);
  return MJK_BY_TYPE(dtype, wide, launch_unpermute, stream, rows, tokens, choices, k, x, index, weight, out);
}

int swiglu_rows(void* stream, mjk_dtype dtype, int64_t rows, int64_t width, const void* gate_up, const float* scale,
                void* out) {
  const bool wide = width * size_of(dtype) % 16 == 0 && aligned(gate_up, 16) && aligned(out, 16);
  return MJK_BY_TYPE(dtype, wide, launch_swiglu, stream, rows, width, gate_up, scale, out);
}

int swiglu_grad_rows(void* stream, mjk_dtype dtype, int64_t rows, int64_t width, const void* gate_up,
                     const float* scale, const void* d_out, void* d_gate_up, float* d_scale) {
  const bool wide =
      width * size_of(dtype) % 16 == 0 && aligned(gate_up, 16) && aligned(d_out, 16) && aligned(d_gate_up, 16);
  return MJK_BY_TYPE(dtype, wide, launch_swiglu_grad, stream, rows, width, gate_up, scale, d_out, d_gate_up, d_scale);
}

}  // namespace mjk
