// The table of one instruction set; see fused.h. Included once in each instruction set's file.
#pragma once
#include "attention_impl.h"
#include "combine_impl.h"
#include "decode_impl.h"
#include "fused.h"
#include "logprobs_impl.h"
#include "norm_impl.h"

namespace mindjax {
namespace {

// The typed kernels behind untyped pointers.
template <class T>
struct Typed {
  static const T* in(const void* p) { return static_cast<const T*>(p); }
  static T* out(void* p) { return static_cast<T*>(p); }

  static void attention(const mjk_attention_shape& shape, const void* q, const void* k, const void* v,
                        const int32_t* q_segments, const int32_t* kv_segments, const int32_t* q_index, void* result,
                        float* normaliser, int64_t task) {
    attention_task(shape, in(q), in(k), in(v), q_segments, kv_segments, q_index, out(result), normaliser, task);
  }
  static void attention_grad(const mjk_attention_shape& shape, const void* q, const void* k, const void* v,
                             const int32_t* q_segments, const int32_t* kv_segments, const int32_t* q_index,
                             const void* result, const float* normaliser, const void* g, void* dq, void* dk, void* dv,
                             int64_t task) {
    attention_grad_task(shape, in(q), in(k), in(v), q_segments, kv_segments, q_index, in(result), normaliser, in(g),
                        out(dq), out(dk), out(dv), task);
  }
  static void decode(const mjk_decode_shape& shape, const void* q, const void* k, const void* v, const void* prompt_k,
                     const void* prompt_v, void* own_k, void* own_v, const int32_t* segments, const int32_t* prompts,
                     int64_t layer, int64_t step, void* result, int64_t task) {
    decode_task(shape, in(q), in(k), in(v), in(prompt_k), in(prompt_v), out(own_k), out(own_v), segments, prompts, layer,
                step, out(result), task);
  }
  static void norm(bool centred, int64_t first, int64_t last, int64_t size, float eps, const void* x, const void* scale,
                   const void* bias, void* y) {
    const auto rows = centred ? norm_rows<T, true> : norm_rows<T, false>;
    rows(first, last, size, eps, in(x), in(scale), in(bias), out(y));
  }
  static void norm_grad(bool centred, int64_t first, int64_t last, int64_t size, float eps, const void* x,
                        const void* scale, const void* g, void* dx, float* d_scale, float* d_bias) {
    const auto rows = centred ? norm_grad_rows<T, true> : norm_grad_rows<T, false>;
    rows(first, last, size, eps, in(x), in(scale), in(g), out(dx), d_scale, d_bias);
  }
  static void silu(int64_t first, int64_t last, const void* gate, const void* up, void* result) {
    silu_product(first, last, in(gate), in(up), out(result));
  }
  static void silu_grad(int64_t first, int64_t last, const void* gate, const void* up, const void* g, void* d_gate,
                        void* d_up) {
    silu_product_grad(first, last, in(gate), in(up), in(g), out(d_gate), out(d_up));
  }
  static void swiglu(int64_t first, int64_t last, int64_t width, const void* gate_up, const float* scale,
                     void* result) {
    swiglu_rows(first, last, width, in(gate_up), scale, out(result));
  }
  static void swiglu_grad(int64_t first, int64_t last, int64_t width, const void* gate_up, const float* scale,
                          const void* g, void* d_gate_up, float* d_scale) {
    swiglu_grad_rows(first, last, width, in(gate_up), scale, in(g), out(d_gate_up), d_scale);
  }
  template <class X>
  static void gelu_of(bool exact, int64_t first, int64_t last, int64_t size, const void* x, const void* bias, void* y,
                      void* z) {
    const auto rows = exact ? bias_gelu_rows<true, X, T> : bias_gelu_rows<false, X, T>;
    rows(first, last, size, static_cast<const X*>(x), in(bias), out(y), out(z));
  }
  static void gelu(bool exact, bool wide, int64_t first, int64_t last, int64_t size, const void* x, const void* bias,
                   void* y, void* z) {
    const auto of = wide ? gelu_of<float> : gelu_of<T>;
    of(exact, first, last, size, x, bias, y, z);
  }
  static void gelu_grad(bool exact, int64_t first, int64_t last, int64_t size, const void* x, const void* bias,
                        const void* g, void* dx, float* d_bias) {
    const auto rows = exact ? bias_gelu_grad_rows<true, T> : bias_gelu_grad_rows<false, T>;
    rows(first, last, size, in(x), in(bias), in(g), out(dx), d_bias);
  }
  static void sum_rows(int64_t first, int64_t last, int64_t size, const void* x, float* total) {
    add_rows(first, last, size, in(x), total);
  }
  static void rope(int64_t first, int64_t last, int64_t heads, int64_t dim, float sign, const void* x,
                   const float* cosine, const float* sine, void* y) {
    rope_rows(first, last, heads, dim, sign, in(x), cosine, sine, out(y));
  }
  static void logprobs_grad(int64_t first, int64_t last, int64_t size, float factor, const float* logits,
                            const int32_t* targets, const float* normaliser, const float* entropy, const float* d_logp,
                            const float* d_entropy, void* d_logits) {
    logprobs_grad_rows(first, last, size, factor, logits, targets, normaliser, entropy, d_logp, d_entropy, out(d_logits));
  }
  static void combine(int64_t first, int64_t last, int64_t rows, int64_t choices, int64_t size, const void* x,
                      const int32_t* index, const float* weight, void* y) {
    combine_rows(first, last, rows, choices, size, in(x), index, weight, out(y));
  }
  static constexpr Fused table() {
    return {attention,   attention_grad, decode,    norm,     norm_grad, silu,          silu_grad,     swiglu,
            swiglu_grad, gelu,           gelu_grad, sum_rows, rope,      logprobs_rows, logprobs_grad, combine};
  }
};

constexpr FusedIsa kTable = {Typed<float>::table(), Typed<bf16>::table()};

}  // namespace
}  // namespace mindjax
