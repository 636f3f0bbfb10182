// Everything the kernels ask of the device: sm_90a, or, with MJK_EMULATE, its emulation on a CPU (emulate/emulate.h),
// on which the tests run the same sources.
#pragma once
#ifdef MJK_EMULATE
#include "emulate/emulate.h"
#else
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include "ptx.cuh"

#define MJK_DYNAMIC_SHARED(name) extern __shared__ uint8_t name[]
#define MJK_LAUNCH(kernel, grid, threads, shared, stream, ...) \
  kernel<<<grid, threads, shared, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#endif
