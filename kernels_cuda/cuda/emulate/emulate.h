// Hopper on a CPU, as far as these kernels use it: every thread of a block is a fiber, blocks run one after another.
//
// What it checks: results, and the order of things. Copies and products happen at random moments between the earliest
// and the latest that the PTX ISA allows, so that a stage released too early or an accumulator read too soon gives a
// wrong result; a barrier that nobody completes is reported. Descriptors, swizzles and accumulators are decoded here
// from the PTX ISA's tables and not with tiles.h, which encodes them. What it cannot check: the hardware's own reading
// of those tables, fences between proxies, and speed.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <functional>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __shared__ static  // one block at a time
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

#define threadIdx (mjk::emulated::thread())
#define blockIdx (mjk::emulated::block_index)
#define gridDim (mjk::emulated::grid_size)
#define MJK_DYNAMIC_SHARED(name) uint8_t* name = mjk::emulated::shared
#define MJK_LAUNCH(kernel, grid, threads, shared, stream, ...) \
  mjk::emulated::run(grid, threads, [&] { (kernel)(__VA_ARGS__); })

namespace mjk {
namespace emulated {

extern dim3 block_index, grid_size;
extern uint8_t* shared;  // 1024-byte aligned plus 16: the kernels must align it themselves

struct Thread {
  unsigned x;
};
Thread thread();
void run(dim3 grid, unsigned threads, const std::function<void()>& kernel);
void warp_barrier();
void block_barrier(int which, unsigned threads);
uint64_t exchange(uint64_t value, unsigned from_lane);

enum class Kind { kBf16, kE4m3, kS8 };
struct Mma {
  Kind kind;
  bool mn_a, mn_b, add;
  int columns;
  uint64_t a, b;
  void* acc;
};
void issue(const Mma& mma);
void wait_for_mma(size_t pending);
void commit_mma();
void load(const CUtensorMap* map, uint64_t* barrier, uint32_t to, int32_t c0, int32_t c1, int32_t c2);

template <class T>
T shuffle(T value, unsigned from_lane) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = exchange(bits, from_lane);
  memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulated

uint32_t shared_address(const void* pointer);
void barrier_init(uint64_t* barrier, uint32_t arrivals);
inline void barrier_init_fence() {}
void barrier_arrive(uint64_t* barrier);
void barrier_arrive_expect(uint64_t* barrier, uint32_t bytes);
void barrier_wait(uint64_t* barrier, uint32_t parity);
inline void prefetch_map(const CUtensorMap*) {}
inline void load_2d(const CUtensorMap* map, uint64_t* barrier, uint32_t to, int32_t c0, int32_t c1) {
  emulated::load(map, barrier, to, c0, c1, 0);
}
inline void load_3d(const CUtensorMap* map, uint64_t* barrier, uint32_t to, int32_t c0, int32_t c1, int32_t c2) {
  emulated::load(map, barrier, to, c0, c1, c2);
}
inline void async_proxy_fence() {}
template <int>
void take_registers() {}
template <int>
void give_registers() {}
template <int kThreads>
void consumers_sync() {
  emulated::block_barrier(1, kThreads);
}
// The .sync.aligned of wgmma: a warp does these together.
inline void mma_fence() { emulated::warp_barrier(); }
inline void mma_commit() { emulated::commit_mma(); }
template <int kPending>
void mma_wait() {
  emulated::wait_for_mma(kPending);
  emulated::warp_barrier();
}
template <class T, int kCount>
void pin(T (&)[kCount]) {}
template <bool kMnA, bool kMnB, int kCount>
void mma_bf16(float (&acc)[kCount], uint64_t a, uint64_t b) {
  emulated::issue({emulated::Kind::kBf16, kMnA, kMnB, true, kCount * 2, a, b, acc});
}
inline void mma_e4m3(float (&acc)[64], uint64_t a, uint64_t b, bool add) {
  emulated::issue({emulated::Kind::kE4m3, false, false, add, 128, a, b, acc});
}
inline void mma_s8(int32_t (&acc)[128], uint64_t a, uint64_t b) {
  emulated::issue({emulated::Kind::kS8, false, false, true, 256, a, b, acc});
}

}  // namespace mjk

// CUDA's own names.
inline void __syncthreads() { mjk::emulated::block_barrier(0, 0); }
inline void __syncwarp() { mjk::emulated::warp_barrier(); }
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return mjk::emulated::shuffle(value, lane);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int bit) {
  return mjk::emulated::shuffle(value, threadIdx.x % 32 ^ bit);
}
template <class T>
T __shfl_up_sync(unsigned, T value, int distance) {
  const int lane = threadIdx.x % 32;
  return mjk::emulated::shuffle(value, lane >= distance ? lane - distance : lane);
}
template <class T>
T __ldg(const T* pointer) {
  return *pointer;
}
inline float __fdiv_rn(float a, float b) { return a / b; }
