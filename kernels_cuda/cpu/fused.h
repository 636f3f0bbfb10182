// Operations beside the products of a small model, each in one pass over its data; compiled once per instruction set.
#pragma once
#include "launch_cpu.h"

namespace mindjax {

// Of one element type, each on a part: a task of attention, or elements or rows [first, last).
struct Fused {
  void (*attention)(const mjk_attention_shape& shape, const void* q, const void* k, const void* v,
                    const int32_t* q_segments, const int32_t* kv_segments, const int32_t* q_index, void* out,
                    float* normaliser, int64_t task);
  void (*attention_grad)(const mjk_attention_shape& shape, const void* q, const void* k, const void* v,
                         const int32_t* q_segments, const int32_t* kv_segments, const int32_t* q_index, const void* out,
                         const float* normaliser, const void* g, void* dq, void* dk, void* dv, int64_t task);
  void (*decode)(const mjk_decode_shape& shape, const void* q, const void* k, const void* v, const void* prompt_k,
                 const void* prompt_v, void* own_k, void* own_v, const int32_t* segments, const int32_t* prompts,
                 int64_t layer, int64_t step, void* out, int64_t task);
  void (*norm)(bool centred, int64_t first, int64_t last, int64_t size, float eps, const void* x, const void* scale,
               const void* bias, void* y);
  void (*norm_grad)(bool centred, int64_t first, int64_t last, int64_t size, float eps, const void* x, const void* scale,
                    const void* g, void* dx, float* d_scale, float* d_bias);
  void (*silu_product)(int64_t first, int64_t last, const void* gate, const void* up, void* out);
  void (*silu_product_grad)(int64_t first, int64_t last, const void* gate, const void* up, const void* g, void* d_gate,
                            void* d_up);
  void (*swiglu)(int64_t first, int64_t last, int64_t width, const void* gate_up, const float* scale, void* out);
  void (*swiglu_grad)(int64_t first, int64_t last, int64_t width, const void* gate_up, const float* scale,
                      const void* g, void* d_gate_up, float* d_scale);
  // wide: x is float32
  void (*bias_gelu)(bool exact, bool wide, int64_t first, int64_t last, int64_t size, const void* x, const void* bias,
                    void* y, void* z);
  void (*bias_gelu_grad)(bool exact, int64_t first, int64_t last, int64_t size, const void* x, const void* bias,
                         const void* g, void* dx, float* d_bias);
  void (*sum_rows)(int64_t first, int64_t last, int64_t size, const void* x, float* total);
  void (*rope)(int64_t first, int64_t last, int64_t heads, int64_t dim, float sign, const void* x, const float* cosine,
               const float* sine, void* y);
  void (*logprobs)(int64_t first, int64_t last, int64_t size, float factor, const float* logits, const int32_t* targets,
                   float* logp, float* entropy, float* normaliser);
  void (*logprobs_grad)(int64_t first, int64_t last, int64_t size, float factor, const float* logits,
                        const int32_t* targets, const float* normaliser, const float* entropy, const float* d_logp,
                        const float* d_entropy, void* d_logits);
  void (*combine)(int64_t first, int64_t last, int64_t rows, int64_t choices, int64_t size, const void* x,
                  const int32_t* index, const float* weight, void* y);
};

struct FusedIsa {
  Fused f32, bf16;
};

}  // namespace mindjax
