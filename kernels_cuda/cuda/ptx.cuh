// The few instructions of sm_90a that the kernels use, one wrapper each. Names and operands: PTX ISA 9.0, sections
// "mbarrier", "cp.async.bulk.tensor", "wgmma.mma_async", "setmaxnreg", "Async proxy".
#pragma once
#include <cuda.h>
#include <stdint.h>

namespace mjk {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- mbarrier

__device__ __forceinline__ void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Makes the initialisation visible to the copy engine; a __syncthreads() makes it so to the other threads.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void barrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Returns when the phase of this parity has completed; for parity 1 a fresh barrier counts as completed.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  const uint32_t address = shared_address(barrier);
  uint32_t done;
  do {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(address), "r"(parity)
        : "memory");
  } while (!done);
}

// ---- tensor copies into shared memory; coordinates innermost first, out of bounds reads as zero

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ __forceinline__ void load_2d(const CUtensorMap* map, uint64_t* barrier, uint32_t to, int32_t c0,
                                        int32_t c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          to),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1)
      : "memory");
}

__device__ __forceinline__ void load_3d(const CUtensorMap* map, uint64_t* barrier, uint32_t to, int32_t c0, int32_t c1,
                                        int32_t c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
          "r"(to),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}

// Orders this thread's ordinary stores to shared memory before later reads by the tensor cores.
__device__ __forceinline__ void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- warpgroups

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kThreads>
__device__ __forceinline__ void consumers_sync() {  // barrier 0 is __syncthreads()
  asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");
}

__device__ __forceinline__ void mma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void mma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void mma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Pins accumulators: no read or write of them moves across this point.
template <int kCount>
__device__ __forceinline__ void pin(float (&acc)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(acc[i])::"memory");
}
template <int kCount>
__device__ __forceinline__ void pin(int32_t (&acc)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(acc[i])::"memory");
}

#define MJK_REGISTERS_64                                                                            \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
  "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, " \
  "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, " \
  "%59, %60, %61, %62, %63"
#define MJK_REGISTERS_128                                                                           \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
  "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, " \
  "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, " \
  "%59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, " \
  "%78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, " \
  "%97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, "   \
  "%113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define MJK_ACC_8(how, d, i) \
  how(d[i]), how(d[i + 1]), how(d[i + 2]), how(d[i + 3]), how(d[i + 4]), how(d[i + 5]), how(d[i + 6]), how(d[i + 7])
#define MJK_ACC_32(how, d, i) \
  MJK_ACC_8(how, d, i), MJK_ACC_8(how, d, i + 8), MJK_ACC_8(how, d, i + 16), MJK_ACC_8(how, d, i + 24)
#define MJK_ACC_64(how, d) MJK_ACC_32(how, d, 0), MJK_ACC_32(how, d, 32)
#define MJK_ACC_128(how, d) MJK_ACC_64(how, d), MJK_ACC_32(how, d, 64), MJK_ACC_32(how, d, 96)

// acc += a by b, both in shared memory. kMnA, kMnB: whether the operand is MN-major (imm-trans-a, imm-trans-b).
template <bool kMnA, bool kMnB>
__device__ __forceinline__ void mma_bf16(float (&acc)[128], uint64_t a, uint64_t b) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" MJK_REGISTERS_128
      "}, %128, %129, p, 1, 1, %130, %131;\n}"
      : MJK_ACC_128("+f", acc)
      : "l"(a), "l"(b), "n"(kMnA ? 1 : 0), "n"(kMnB ? 1 : 0));
}

template <bool kMnA, bool kMnB>
__device__ __forceinline__ void mma_bf16(float (&acc)[64], uint64_t a, uint64_t b) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" MJK_REGISTERS_64 "}, %64, %65, p, 1, 1, %66, %67;\n}"
      : MJK_ACC_64("+f", acc)
      : "l"(a), "l"(b), "n"(kMnA ? 1 : 0), "n"(kMnB ? 1 : 0));
}

// Both operands K-major: the only form for one-byte types. `add` false overwrites acc.
__device__ __forceinline__ void mma_e4m3(float (&acc)[64], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" MJK_REGISTERS_64 "}, %64, %65, p, 1, 1;\n}"
      : MJK_ACC_64("+f", acc)
      : "l"(a), "l"(b), "r"(add ? 1 : 0));
}

__device__ __forceinline__ void mma_s8(int32_t (&acc)[128], uint64_t a, uint64_t b) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8 {" MJK_REGISTERS_128 "}, %128, %129, p;\n}"
      : MJK_ACC_128("+r", acc)
      : "l"(a), "l"(b));
}

}  // namespace mjk
