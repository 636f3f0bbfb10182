// Kernels that only the CPU library has: on other devices XLA, cuDNN or Pallas do these well. See launch.h.
#pragma once
#include "launch.h"

#ifdef __cplusplus
extern "C" {
#endif

// B rows; `heads` query heads share `kv_heads` key/value heads, consecutive ones the same.
typedef struct mjk_attention_shape {
  int64_t rows, queries, keys, heads, kv_heads, dim;
} mjk_attention_shape;

// out = x[rows, k] w[k, n] + bias[n], summed in float32 and rounded once; all but the bias of one dtype.
MJK_API int mjk_linear(void* stream, mjk_dtype dtype, int64_t rows, int64_t k, int64_t n, const void* x, const void* w,
                       const float* bias, void* out);

// Softmax attention of q[B, queries, heads, dim] to k, v[B, keys, kv_heads, dim], scores times dim^-0.5, in float32.
// Query t sees key s where their segments (q_segments[B, queries], kv_segments[B, keys]) are equal and not 0, and
// s <= q_index[t] unless q_index[t] < 0. Writes out like q, and normaliser[B, heads, queries] float32, the logarithm
// of the sum of exponentials; a query that sees nothing gets zeros and +infinity.
MJK_API int mjk_attention(void* stream, mjk_dtype dtype, const mjk_attention_shape* shape, const void* q, const void* k,
                          const void* v, const int32_t* q_segments, const int32_t* kv_segments, const int32_t* q_index,
                          void* out, float* normaliser);

// Gradients of the above from its results and g, the gradient of `out`; of the shapes of q, k and v.
MJK_API int mjk_attention_grad(void* stream, mjk_dtype dtype, const mjk_attention_shape* shape, const void* q,
                               const void* k, const void* v, const int32_t* q_segments, const int32_t* kv_segments,
                               const int32_t* q_index, const void* out, const float* normaliser, const void* g, void* dq,
                               void* dk, void* dv);

// Rows of any of the prompts; layers of `keys` prompt tokens and `capacity` new ones.
typedef struct mjk_decode_shape {
  int64_t layers, prompts, rows, heads, kv_heads, dim, keys, capacity;
} mjk_decode_shape;

// Decoding of one token per row (R rows): writes k, v[R, kv_heads, dim] at place `step` of `layer` into
// own_k, own_v[layers, R, kv_heads, capacity, dim], then attends with q[R, heads, dim] to the keys and values of the
// row's prompt, number prompt[R] of prompt_k, prompt_v[layers, prompts, kv_heads, keys, dim], where
// segments[prompts, keys] are not 0, and to the row's own up to `step`. layer and step are int32 scalars.
MJK_API int mjk_decode_attention(void* stream, mjk_dtype dtype, const mjk_decode_shape* shape, const void* q,
                                 const void* k, const void* v, const void* prompt_k, const void* prompt_v, void* own_k,
                                 void* own_v, const int32_t* segments, const int32_t* prompt, const int32_t* layer,
                                 const int32_t* step, void* out);

// y = x * scale / rms(x) over the last dimension of x[rows, size] (centred == 0; bias NULL; rounded to the dtype before
// the scale), or LayerNorm with bias (centred != 0); eps is added to the mean square.
MJK_API int mjk_norm(void* stream, mjk_dtype dtype, int32_t centred, int64_t rows, int64_t size, float eps, const void* x,
                     const void* scale, const void* bias, void* y);
// dx, which may be g, and float32 d_scale[size] and (where centred) d_bias[size].
MJK_API int mjk_norm_grad(void* stream, mjk_dtype dtype, int32_t centred, int64_t rows, int64_t size, float eps,
                          const void* x, const void* scale, const void* g, void* dx, float* d_scale, float* d_bias);

// out = silu(gate) * up, `count` elements each, and its gradients; d_gate may be g.
MJK_API int mjk_silu_product(void* stream, mjk_dtype dtype, int64_t count, const void* gate, const void* up, void* out);
MJK_API int mjk_silu_product_grad(void* stream, mjk_dtype dtype, int64_t count, const void* gate, const void* up,
                                  const void* g, void* d_gate, void* d_up);

// y = gelu(z) of z = x + bias rounded to the dtype, by tanh or exactly (exact != 0); x[rows, size] of x_dtype, which is
// the dtype or float32, and bias[size]. Writes z too where it is not NULL.
MJK_API int mjk_bias_gelu(void* stream, mjk_dtype x_dtype, mjk_dtype dtype, int32_t exact, int64_t rows, int64_t size,
                          const void* x, const void* bias, void* y, void* z);
// dx, which may be g, and float32 d_bias, for x of the dtype.
MJK_API int mjk_bias_gelu_grad(void* stream, mjk_dtype dtype, int32_t exact, int64_t rows, int64_t size, const void* x,
                               const void* bias, const void* g, void* dx, float* d_bias);

// The float32 sum of the rows of x[rows, size].
MJK_API int mjk_sum_rows(void* stream, mjk_dtype dtype, int64_t rows, int64_t size, const void* x, float* total);

// Rotates the pairs (i, i + dim / 2) of x[rows, heads, dim] by cos, sin[rows, dim / 2]; sign -1 turns back. y may be x.
MJK_API int mjk_rope(void* stream, mjk_dtype dtype, int64_t rows, int64_t heads, int64_t dim, float sign, const void* x,
                     const float* cosine, const float* sine, void* y);

// Of the first `count` rows of logits[rows, size], each over the temperature: the log-probability of the row's target,
// the entropy, and the logarithm of the sum of exponentials, all [rows], zeros in the other rows.
MJK_API int mjk_logprobs(void* stream, int64_t rows, int64_t size, const float* logits, const int32_t* targets,
                         const float* temperature, const int32_t* count, float* logp, float* entropy, float* normaliser);
// d_logits[rows, size], which may be logits, from the gradients of the first two results; zeros in the other rows.
MJK_API int mjk_logprobs_grad(void* stream, mjk_dtype dtype, int64_t rows, int64_t size, const float* logits,
                              const int32_t* targets, const float* temperature, const int32_t* count,
                              const float* normaliser, const float* entropy, const float* d_logp, const float* d_entropy,
                              void* d_logits);

// The `choices` likeliest of `experts` by the softmax of logits[tokens, experts], the likeliest first, the lower number
// before its equal. Writes weights[tokens, choices], their probabilities (normalise != 0: over the sum of them),
// chosen[tokens, choices], and probabilities[tokens, experts]; a token whose segment is not above 0 chooses number
// `experts` with weight 0 and has no probabilities.
MJK_API int mjk_choose_experts(void* stream, int64_t tokens, int64_t experts, int64_t choices, int32_t normalise,
                               const float* logits, const int32_t* segments, float* weights, int32_t* chosen,
                               float* probabilities);
// d_logits from the results and their gradients.
MJK_API int mjk_choose_experts_grad(void* stream, int64_t tokens, int64_t experts, int64_t choices, int32_t normalise,
                                    const int32_t* chosen, const float* probabilities, const float* d_weights,
                                    const float* d_probabilities, float* d_logits);

// Sorts chosen[tokens, choices] by expert, in the order of the tokens, what no expert has last. Writes
// token[tokens * choices] and scales[tokens * choices], the token and the weight of each choice in that order,
// back[tokens, choices], the place of each there, and load[experts], how many chose each.
MJK_API int mjk_sort_by_expert(int64_t tokens, int64_t experts, int64_t choices, const int32_t* chosen,
                               const float* weights, int32_t* token, int32_t* back, int32_t* load, float* scales);

// shares[rows, length, experts]: of the run of one id in segments[rows, length] that the token is in, how often
// chosen[rows, length, choices] names the expert, over the square of the run's length; 0 where the id is not above 0.
MJK_API int mjk_expert_shares(void* stream, int64_t rows, int64_t length, int64_t experts, int64_t choices,
                              const int32_t* chosen, const int32_t* segments, float* shares);

#ifdef __cplusplus
}
#endif
