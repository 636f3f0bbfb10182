// The C ABI of mindjax's kernels: one set of functions, one library per backend.
//
// libmindjax_cpu.so and libmindjax_cuda.so export the same symbols; load each with RTLD_LOCAL. `stream` is a
// cudaStream_t on CUDA and a `const mjk_pool*` on the CPU (NULL: the calling thread alone). Pointers are to memory of
// that device, row-major, without gaps; sizes of groups stay on the device. R rows, K inputs, N outputs, G groups.
// Every function returns an mjk_status; a CUDA one returns as soon as the work is queued.
//
// Rows past the last group come out as zeros, whatever they hold (NaN included); empty groups are legal.
#pragma once
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define MJK_ABI_VERSION 4
#define MJK_API __attribute__((visibility("default")))

typedef enum { MJK_OK = 0, MJK_INVALID_ARGUMENT = 1, MJK_UNSUPPORTED = 2, MJK_LAUNCH_FAILED = 3 } mjk_status;
typedef enum { MJK_F32 = 0, MJK_BF16 = 1, MJK_E4M3 = 2, MJK_S8 = 3 } mjk_dtype;

// Runs tasks on a pool's threads (CPU). `run` calls task(context, i) once for each i in [0, count), from any threads,
// and returns when all have ended; it must be able to do so with the calling thread alone.
typedef struct mjk_pool {
  void* self;
  int32_t threads;
  void (*run)(void* self, int64_t count, void (*task)(void* context, int64_t i), void* context);
} mjk_pool;

// The CPU library's own pool, for callers that have none; threads < 1: one per core. Destroy it when no call uses it.
MJK_API const mjk_pool* mjk_pool_create(int32_t threads);
MJK_API void mjk_pool_destroy(const mjk_pool* pool);

MJK_API int32_t mjk_abi_version(void);
// What the library runs on, e.g. "amx_bf16", "avx512_bf16", "avx2", "scalar", "sm_90a"; MINDJAX_CPU_ISA lowers the CPU's.
MJK_API const char* mjk_isa(void);
// Of the calling thread's last failure; never NULL.
MJK_API const char* mjk_last_error(void);

// out[R, N] = x[R, K] by w[G, K, N], each group of rows by its own matrix. Group g of this call has
// group_sizes[group_offset + g] rows; rows of groups before the offset or past offset + G come out as zeros, so that a
// device that holds some of the experts passes all sizes. `groups_total` is the length of group_sizes.
// Accumulates in float32. x, w: both in_dtype (F32 or BF16); out: out_dtype (F32 or BF16).
MJK_API int mjk_gmm(void* stream, mjk_dtype in_dtype, mjk_dtype out_dtype, int64_t rows, int64_t k, int64_t n,
                    int64_t groups, int64_t groups_total, int64_t group_offset, const void* x, const void* w,
                    const int32_t* group_sizes, void* out);

// out[R, K] = g[R, N] by w[G, K, N] transposed: the gradient of x, from the same weights.
MJK_API int mjk_gmm_t(void* stream, mjk_dtype in_dtype, mjk_dtype out_dtype, int64_t rows, int64_t k, int64_t n,
                      int64_t groups, int64_t groups_total, int64_t group_offset, const void* g, const void* w,
                      const int32_t* group_sizes, void* out);

// out[G, K, N] = x[R, K] transposed by g[R, N], over the rows of each group: the gradient of w, zeros for a group
// without rows. accumulate != 0 adds to what `out` holds (out_dtype must be F32).
MJK_API int mjk_tgmm(void* stream, mjk_dtype in_dtype, mjk_dtype out_dtype, int32_t accumulate, int64_t rows, int64_t k,
                     int64_t n, int64_t groups, int64_t groups_total, int64_t group_offset, const void* x, const void* g,
                     const int32_t* group_sizes, void* out);

// mjk_gmm for few rows: reads each weight once. bf16 in, F32 or BF16 out.
MJK_API int mjk_gmm_decode(void* stream, mjk_dtype in_dtype, mjk_dtype out_dtype, int64_t rows, int64_t k, int64_t n,
                           int64_t groups, int64_t groups_total, int64_t group_offset, const void* x, const void* w,
                           const int32_t* group_sizes, void* out);

// Block-scaled e4m3: out[R, N] = (x * xs) by (w * ws) transposed. x[R, K] with xs[R, ceil(K / 128)], w[G, N, K] with
// ws[G, ceil(N / 128), ceil(K / 128)], scales float32; the sum over each 128 of K is promoted to float32 before its
// scale is applied. K is contracted along the last dimension of both, so the transposed product takes the other copy.
MJK_API int mjk_gmm_fp8(void* stream, mjk_dtype out_dtype, int64_t rows, int64_t k, int64_t n, int64_t groups,
                        int64_t groups_total, int64_t group_offset, const void* x, const float* xs, const void* w,
                        const float* ws, const int32_t* group_sizes, void* out);

// int8 with one scale per row of x and per output of w: x[R, K], xs[R], w[G, N, K], ws[G, N]; the sum is an int32.
MJK_API int mjk_gmm_s8(void* stream, mjk_dtype out_dtype, int64_t rows, int64_t k, int64_t n, int64_t groups,
                       int64_t groups_total, int64_t group_offset, const void* x, const float* xs, const void* w,
                       const float* ws, const int32_t* group_sizes, void* out);

// Row i of out[out_rows, K] (e4m3) is row index[i] of x[rows, K] (in_dtype) in 1 x 128 blocks, with
// scales[out_rows, ceil(K / 128)] = max |x| / 448: the value is x / scale, clipped to +-448, rounded to nearest even.
// e4m3_block.h says what becomes of tiny numbers, infinities and NaN. index NULL: the same row. index[i] < 0: zeros with
// scale 1.
MJK_API int mjk_quantize_e4m3(void* stream, mjk_dtype in_dtype, int64_t rows, int64_t out_rows, int64_t k, const void* x,
                              const int32_t* index, void* out, float* scales);

// Row i of out[out_rows, K] is row index[i] of x[rows, K]; zeros where index[i] < 0.
MJK_API int mjk_permute(void* stream, mjk_dtype dtype, int64_t rows, int64_t out_rows, int64_t k, const void* x,
                        const int32_t* index, void* out);

// Row t of out[tokens, K] is the sum over j < choices of weight[t, j] (NULL: 1) times row index[t, j] of x[rows, K],
// in float32, in the order of j; a negative index adds nothing.
MJK_API int mjk_unpermute(void* stream, mjk_dtype dtype, int64_t rows, int64_t tokens, int64_t choices, int64_t k,
                          const void* x, const int32_t* index, const float* weight, void* out);

// out[R, I] = silu(gate) * up of gate_up[R, 2 I] (gate first), times scale[R] where scale is not NULL; float32 inside.
MJK_API int mjk_swiglu(void* stream, mjk_dtype dtype, int64_t rows, int64_t width, const void* gate_up,
                       const float* scale, void* out);
// Its gradients: d_gate_up[R, 2 I] and, where scale is not NULL, d_scale[R] float32.
MJK_API int mjk_swiglu_grad(void* stream, mjk_dtype dtype, int64_t rows, int64_t width, const void* gate_up,
                            const float* scale, const void* d_out, void* d_gate_up, float* d_scale);

#ifdef __cplusplus
}
#endif
