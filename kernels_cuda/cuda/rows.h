// Launchers of rows.cu; arguments as in launch.h, already checked, nothing empty.
#pragma once
#include <stdint.h>

#include "../include/launch.h"

namespace mjk {

int permute_rows(void* stream, int64_t rows, int64_t out_rows, int64_t row_bytes, const void* x, const int32_t* index,
                 void* out);
int quantize_rows(void* stream, mjk_dtype dtype, int64_t rows, int64_t out_rows, int64_t k, const void* x,
                  const int32_t* index, void* out, float* scales);
int unpermute_rows(void* stream, mjk_dtype dtype, int64_t rows, int64_t tokens, int64_t choices, int64_t k,
                   const void* x, const int32_t* index, const float* weight, void* out);
int swiglu_rows(void* stream, mjk_dtype dtype, int64_t rows, int64_t width, const void* gate_up, const float* scale,
                void* out);
int swiglu_grad_rows(void* stream, mjk_dtype dtype, int64_t rows, int64_t width, const void* gate_up,
                     const float* scale, const void* d_out, void* d_gate_up, float* d_scale);

}  // namespace mjk
