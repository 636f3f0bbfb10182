// Errors, and the device a launcher runs on. Nothing here allocates on the device, waits for it or reads from it.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include "../include/launch.h"

namespace mjk {

// Sets mjk_last_error of this thread and returns `status`.
__attribute__((format(printf, 2, 3))) int fail(mjk_status status, const char* format, ...);

struct Device {
  int multiprocessors;
};

// The current device; MJK_OK, or why it cannot run these kernels.
int current_device(Device* device);

// MJK_OK, or what the launch just before returned.
int launched(const char* what);

// Zeros `bytes` from `pointer` on.
int fill_zero(void* stream, void* pointer, int64_t bytes);

inline int64_t size_of(mjk_dtype dtype) { return dtype == MJK_F32 ? 4 : dtype == MJK_BF16 ? 2 : 1; }
inline bool is_float(mjk_dtype dtype) { return dtype == MJK_F32 || dtype == MJK_BF16; }
inline bool aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// What both kernels of a grouped product, gmm.cu's and simt.cu's, need to know.
enum class Product { kGmm, kGmmT, kTgmm, kE4m3, kS8 };

struct Problem {
  Product product;
  mjk_dtype in_dtype, out_dtype;
  int32_t accumulate;
  int32_t rows;
  int32_t inner;    // contracted; tgmm: columns of x
  int32_t columns;  // of out
  int32_t groups, groups_total, group_offset;
  const void *a, *b;
  const float *a_scale, *b_scale;
  const int32_t* group_sizes;
  void* out;
};

// The tensor-core kernels; they take what `tensor_cores_fit` allows. `decode` picks the form for few rows.
bool tensor_cores_fit(const Problem& problem);
int launch_tensor_cores(void* stream, const Problem& problem, bool decode);
// One multiply-add at a time, for every shape and dtype: float32, sizes that the copy engine cannot address.
int launch_simt(void* stream, const Problem& problem);
// The check: the same products by CUTLASS, where it is built.
int launch_cutlass(void* stream, const Problem& problem);

}  // namespace mjk
