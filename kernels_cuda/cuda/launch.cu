// The C ABI of launch.h on CUDA: argument checks, empty cases, and which kernel takes a call.
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>

#include <initializer_list>

#include "device.h"
#include "rows.h"
#include "status.h"
#include "tiles.h"

namespace mjk {
namespace {

thread_local char last_error[512] = "";

bool counts_fit(std::initializer_list<int64_t> counts) {
  for (const int64_t count : counts) {
    if (count < 0 || count > INT32_MAX - 256) return false;
  }
  return true;
}

}  // namespace

int fail(mjk_status status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(last_error, sizeof(last_error), format, arguments);
  va_end(arguments);
  return status;
}

int current_device(Device* device) {
  int number = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&number);
  if (error != cudaSuccess) {
    cudaGetLastError();  // does not stay for the next caller to find
    return fail(MJK_LAUNCH_FAILED, "no CUDA GPU is there: %s", cudaGetErrorString(error));
  }
  error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, number);
  if (!error) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, number);
  if (!error) error = cudaDeviceGetAttribute(&device->multiprocessors, cudaDevAttrMultiProcessorCount, number);
  if (error != cudaSuccess) return fail(MJK_LAUNCH_FAILED, "no CUDA GPU is there: %s", cudaGetErrorString(error));
  if (major == 9 && minor == 0) return MJK_OK;
  return fail(MJK_UNSUPPORTED, "these kernels are for compute capability 9.0 (H100, H200); this GPU is %d.%d", major,
              minor);
}

int launched(const char* what) {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? MJK_OK : fail(MJK_LAUNCH_FAILED, "%s: %s", what, cudaGetErrorString(error));
}

int fill_zero(void* stream, void* pointer, int64_t bytes) {
  Device device;
  if (const int status = current_device(&device)) return status;
  if (bytes == 0) return MJK_OK;
  const cudaError_t error = cudaMemsetAsync(pointer, 0, bytes, static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? MJK_OK : fail(MJK_LAUNCH_FAILED, "cudaMemsetAsync: %s", cudaGetErrorString(error));
}

namespace {

struct Call {
  Product product;
  mjk_dtype in_dtype, out_dtype;
  int32_t accumulate;
  int64_t rows, inner, columns, groups, groups_total, group_offset;
  const void *a, *b;
  const float *a_scale, *b_scale;
  const int32_t* group_sizes;
  void* out;
};

enum class By { kOurs, kDecode, kCutlass };

int grouped(void* stream, const Call& c, By by = By::kOurs) {
  if (!is_float(c.out_dtype)) return fail(MJK_INVALID_ARGUMENT, "the output must be float32 or bfloat16");
  if (!counts_fit({c.rows, c.inner, c.columns, c.groups, c.groups_total, c.group_offset})) {
    return fail(MJK_INVALID_ARGUMENT, "rows, k, n and groups must be between 0 and 2^31 - 257");
  }
  if (c.group_offset + c.groups > c.groups_total) {
    return fail(MJK_INVALID_ARGUMENT, "group_offset %lld and %lld groups exceed the %lld group sizes",
                static_cast<long long>(c.group_offset), static_cast<long long>(c.groups),
                static_cast<long long>(c.groups_total));
  }
  if (c.groups > kMaxGroups) {
    return fail(MJK_UNSUPPORTED, "%lld groups: the CUDA kernels take at most %d a call; use group_offset",
                static_cast<long long>(c.groups), kMaxGroups);
  }
  const bool tgmm = c.product == Product::kTgmm;
  if (tgmm && c.accumulate && c.out_dtype != MJK_F32) {
    return fail(MJK_INVALID_ARGUMENT, "tgmm accumulates into float32 alone");
  }
  const int64_t out_elements = (tgmm ? c.groups * c.inner : c.rows) * c.columns;
  if (out_elements == 0) return MJK_OK;
  if (c.groups == 0 || (tgmm ? c.rows : c.inner) == 0) {  // nothing to add up
    return tgmm && c.accumulate ? MJK_OK : fill_zero(stream, c.out, out_elements * size_of(c.out_dtype));
  }
  const Problem problem{c.product,
                        c.in_dtype,
                        c.out_dtype,
                        c.accumulate,
                        static_cast<int32_t>(c.rows),
                        static_cast<int32_t>(c.inner),
                        static_cast<int32_t>(c.columns),
                        static_cast<int32_t>(c.groups),
                        static_cast<int32_t>(c.groups_total),
                        static_cast<int32_t>(c.group_offset),
                        c.a,
                        c.b,
                        c.a_scale,
                        c.b_scale,
                        c.group_sizes,
                        c.out};
#ifdef MINDJAX_CUTLASS
  if (by == By::kCutlass) return launch_cutlass(stream, problem);
#endif
  return tensor_cores_fit(problem) ? launch_tensor_cores(stream, problem, by == By::kDecode)
                                   : launch_simt(stream, problem);
}

}  // namespace
}  // namespace mjk

using namespace mjk;

extern "C" {

int32_t mjk_abi_version(void) { return MJK_ABI_VERSION; }
const char* mjk_isa(void) { return "sm_90a"; }
const char* mjk_last_error(void) { return last_error; }

int mjk_gmm(void* stream, mjk_dtype in_dtype, mjk_dtype out_dtype, int64_t rows, int64_t k, int64_t n, int64_t groups,
            int64_t groups_total, int64_t group_offset, const void* x, const void* w, const int32_t* group_sizes,
            void* out) {
  if (!is_float(in_dtype)) return fail(MJK_INVALID_ARGUMENT, "gmm takes float32 or bfloat16");
  // At up to 16 rows a group the weights' bytes decide, and the form for few rows moves them with less beside.
  return grouped(stream,
                 {Product::kGmm, in_dtype, out_dtype, 0, rows, k, n, groups, groups_total, group_offset, x, w, nullptr,
                  nullptr, group_sizes, out},
                 rows <= 16 * groups ? By::kDecode : By::kOurs);
}

int mjk_gmm_t(void* stream, mjk_dtype in_dtype, mjk_dtype out_dtype, int64_t rows, int64_t k, int64_t n, int64_t groups,
              int64_t groups_total, int64_t group_offset, const void* g, const void* w, const int32_t* group_sizes,
              void* out) {
  if (!is_float(in_dtype)) return fail(MJK_INVALID_ARGUMENT, "gmm_t takes float32 or bfloat16");
  return grouped(stream, {Product::kGmmT, in_dtype, out_dtype, 0, rows, n, k, groups, groups_total, group_offset, g, w,
                          nullptr, nullptr, group_sizes, out});
}

int mjk_tgmm(void* stream, mjk_dtype in_dtype, mjk_dtype out_dtype, int32_t accumulate, int64_t rows, int64_t k,
             int64_t n, int64_t groups, int64_t groups_total, int64_t group_offset, const void* x, const void* g,
             const int32_t* group_sizes, void* out) {
  if (!is_float(in_dtype)) return fail(MJK_INVALID_ARGUMENT, "tgmm takes float32 or bfloat16");
  return grouped(stream, {Product::kTgmm, in_dtype, out_dtype, accumulate, rows, k, n, groups, groups_total,
                          group_offset, x, g, nullptr, nullptr, group_sizes, out});
}

int mjk_gmm_decode(void* stream, mjk_dtype in_dtype, mjk_dtype out_dtype, int64_t rows, int64_t k, int64_t n,
                   int64_t groups, int64_t groups_total, int64_t group_offset, const void* x, const void* w,
                   const int32_t* group_sizes, void* out) {
  if (in_dtype != MJK_BF16) return fail(MJK_INVALID_ARGUMENT, "gmm_decode takes bfloat16");
  return grouped(stream,
                 {Product::kGmm, in_dtype, out_dtype, 0, rows, k, n, groups, groups_total, group_offset, x, w, nullptr,
                  nullptr, group_sizes, out},
                 By::kDecode);
}

int mjk_gmm_fp8(void* stream, mjk_dtype out_dtype, int64_t rows, int64_t k, int64_t n, int64_t groups,
                int64_t groups_total, int64_t group_offset, const void* x, const float* xs, const void* w,
                const float* ws, const int32_t* group_sizes, void* out) {
  return grouped(stream, {Product::kE4m3, MJK_E4M3, out_dtype, 0, rows, k, n, groups, groups_total, group_offset, x, w,
                          xs, ws, group_sizes, out});
}

int mjk_gmm_s8(void* stream, mjk_dtype out_dtype, int64_t rows, int64_t k, int64_t n, int64_t groups,
               int64_t groups_total, int64_t group_offset, const void* x, const float* xs, const void* w,
               const float* ws, const int32_t* group_sizes, void* out) {
  return grouped(stream, {Product::kS8, MJK_S8, out_dtype, 0, rows, k, n, groups, groups_total, group_offset, x, w, xs,
                          ws, group_sizes, out});
}

int mjk_quantize_e4m3(void* stream, mjk_dtype in_dtype, int64_t rows, int64_t out_rows, int64_t k, const void* x,
                      const int32_t* index, void* out, float* scales) {
  if (!is_float(in_dtype)) return fail(MJK_INVALID_ARGUMENT, "quantize takes float32 or bfloat16");
  if (!counts_fit({rows, out_rows, k}))
    return fail(MJK_INVALID_ARGUMENT, "rows and k must be between 0 and 2^31 - 257");
  if (index == nullptr && rows != out_rows) {
    return fail(MJK_INVALID_ARGUMENT, "without an index rows must equal out_rows");
  }
  if (out_rows * k == 0) return MJK_OK;
  Device device;
  if (const int status = current_device(&device)) return status;
  return quantize_rows(stream, in_dtype, rows, out_rows, k, x, index, out, scales);
}

int mjk_permute(void* stream, mjk_dtype dtype, int64_t rows, int64_t out_rows, int64_t k, const void* x,
                const int32_t* index, void* out) {
  if (!counts_fit({rows, out_rows, k}))
    return fail(MJK_INVALID_ARGUMENT, "rows and k must be between 0 and 2^31 - 257");
  if (out_rows * k == 0) return MJK_OK;
  Device device;
  if (const int status = current_device(&device)) return status;
  return permute_rows(stream, rows, out_rows, k * size_of(dtype), x, index, out);
}

int mjk_unpermute(void* stream, mjk_dtype dtype, int64_t rows, int64_t tokens, int64_t choices, int64_t k,
                  const void* x, const int32_t* index, const float* weight, void* out) {
  if (!is_float(dtype)) return fail(MJK_INVALID_ARGUMENT, "unpermute takes float32 or bfloat16");
  if (!counts_fit({rows, tokens, choices, k})) {
    return fail(MJK_INVALID_ARGUMENT, "rows, tokens, choices and k must be between 0 and 2^31 - 257");
  }
  if (tokens * k == 0) return MJK_OK;
  if (rows * choices == 0) return fill_zero(stream, out, tokens * k * size_of(dtype));
  Device device;
  if (const int status = current_device(&device)) return status;
  return unpermute_rows(stream, dtype, rows, tokens, choices, k, x, index, weight, out);
}

int mjk_swiglu(void* stream, mjk_dtype dtype, int64_t rows, int64_t width, const void* gate_up, const float* scale,
               void* out) {
  if (!is_float(dtype)) return fail(MJK_INVALID_ARGUMENT, "swiglu takes float32 or bfloat16");
  if (!counts_fit({rows, width})) return fail(MJK_INVALID_ARGUMENT, "rows and width must be between 0 and 2^31 - 257");
  if (rows * width == 0) return MJK_OK;
  Device device;
  if (const int status = current_device(&device)) return status;
  return swiglu_rows(stream, dtype, rows, width, gate_up, scale, out);
}

int mjk_swiglu_grad(void* stream, mjk_dtype dtype, int64_t rows, int64_t width, const void* gate_up, const float* scale,
                    const void* d_out, void* d_gate_up, float* d_scale) {
  if (!is_float(dtype)) return fail(MJK_INVALID_ARGUMENT, "swiglu_grad takes float32 or bfloat16");
  if (!counts_fit({rows, width})) return fail(MJK_INVALID_ARGUMENT, "rows and width must be between 0 and 2^31 - 257");
  if (rows == 0) return MJK_OK;
  if (width == 0) return scale == nullptr ? MJK_OK : fill_zero(stream, d_scale, rows * sizeof(float));
  Device device;
  if (const int status = current_device(&device)) return status;
  return swiglu_grad_rows(stream, dtype, rows, width, gate_up, scale, d_out, d_gate_up, d_scale);
}

#ifdef MINDJAX_CUTLASS
// mjk_gmm, mjk_gmm_t and mjk_tgmm by CUTLASS, to compare with; not part of launch.h.
MJK_API int mjk_gmm_cutlass(void* stream, mjk_dtype in_dtype, mjk_dtype out_dtype, int64_t rows, int64_t k, int64_t n,
                            int64_t groups, int64_t groups_total, int64_t group_offset, const void* x, const void* w,
                            const int32_t* group_sizes, void* out) {
  return grouped(stream,
                 {Product::kGmm, in_dtype, out_dtype, 0, rows, k, n, groups, groups_total, group_offset, x, w, nullptr,
                  nullptr, group_sizes, out},
                 By::kCutlass);
}

MJK_API int mjk_gmm_t_cutlass(void* stream, mjk_dtype in_dtype, mjk_dtype out_dtype, int64_t rows, int64_t k, int64_t n,
                              int64_t groups, int64_t groups_total, int64_t group_offset, const void* g, const void* w,
                              const int32_t* group_sizes, void* out) {
  return grouped(stream,
                 {Product::kGmmT, in_dtype, out_dtype, 0, rows, n, k, groups, groups_total, group_offset, g, w, nullptr,
                  nullptr, group_sizes, out},
                 By::kCutlass);
}

MJK_API int mjk_tgmm_cutlass(void* stream, mjk_dtype in_dtype, mjk_dtype out_dtype, int32_t accumulate, int64_t rows,
                             int64_t k, int64_t n, int64_t groups, int64_t groups_total, int64_t group_offset,
                             const void* x, const void* g, const int32_t* group_sizes, void* out) {
  return grouped(stream,
                 {Product::kTgmm, in_dtype, out_dtype, accumulate, rows, k, n, groups, groups_total, group_offset, x, g,
                  nullptr, nullptr, group_sizes, out},
                 By::kCutlass);
}
#endif

}  // extern "C"
