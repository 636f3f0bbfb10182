// The C ABI of the fused operations: what the tasks are.
#include "fused.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "errors.h"
#include "isa.h"
#include "pool.h"

namespace mindjax {

extern const FusedIsa kFusedScalar;
#ifdef MINDJAX_AVX2
extern const FusedIsa kFusedAvx2;
#endif
#ifdef MINDJAX_AVX512F
extern const FusedIsa kFusedAvx512F;
#endif
#ifdef MINDJAX_AVX512_BF16
extern const FusedIsa kFusedAvx512Bf16;
#endif

namespace {

const FusedIsa& fused_isa() {
  const char* name = isa().name;
  if (!std::strcmp(name, "scalar")) return kFusedScalar;
#ifdef MINDJAX_AVX2
  if (!std::strcmp(name, "avx2")) return kFusedAvx2;
#endif
#ifdef MINDJAX_AVX512F
  if (!std::strcmp(name, "avx512f")) return kFusedAvx512F;
#endif
#ifdef MINDJAX_AVX512_BF16
  return kFusedAvx512Bf16;
#else
  return kFusedScalar;
#endif
}

const Fused* fused_for(mjk_dtype dtype) {
  if (dtype == MJK_F32) return &fused_isa().f32;
  if (dtype == MJK_BF16) return &fused_isa().bf16;
  fail(MJK_UNSUPPORTED, "the CPU's fused operations take float32 and bfloat16, not dtype %d", int(dtype));
  return nullptr;
}

// Runs function(i) for each i on the pool.
template <class Function>
void for_each(void* stream, int64_t count, const Function& function) {
  const Task task = [](void* context, int64_t i) { (*static_cast<const Function*>(context))(i); };
  run_tasks(static_cast<const mjk_pool*>(stream), count, task, const_cast<Function*>(&function));
}

// Enough parts for many threads, few enough that partial sums cost little; of the size alone, so that every sum has one
// order whatever the threads.
constexpr int64_t kParts = 64;
constexpr int64_t kLeastElements = 16 * 1024;
constexpr int64_t kLanes = 16;  // of the widest instruction set
constexpr int64_t kRows = 4;    // that norm_impl.h takes together

struct Parts {
  int64_t count, size, number;

  // Of [0, count), whole multiples of `unit`, of `elements` numbers each.
  Parts(int64_t count, int64_t unit, int64_t elements) : count(count) {
    const int64_t least = (kLeastElements / elements + unit) / unit * unit;
    const int64_t even = ((count + kParts - 1) / kParts + unit - 1) / unit * unit;
    size = even > least ? even : least;
    number = (count + size - 1) / size;
  }
};

// Runs function(part, first, last) on each part.
template <class Function>
void for_each_part(void* stream, const Parts& parts, const Function& function) {
  for_each(stream, parts.number, [&](int64_t part) {
    const int64_t first = part * parts.size, last = first + parts.size < parts.count ? first + parts.size : parts.count;
    function(part, first, last);
  });
}

// Sums over parts of what each part adds to its row of `size` numbers, which ends with a whole vector.
class PartialSums {
 public:
  PartialSums(const Parts& parts, int64_t size)
      : parts_(parts.number), size_(size), stride_((size + kLanes - 1) / kLanes * kLanes),
        sums_(size_t(parts_ * stride_)) {}
  float* row(int64_t part) { return &sums_[size_t(part * stride_)]; }
  void add_up(float* total) {
    for (int64_t i = 0; i < size_; ++i) total[i] = 0;
    for (int64_t part = 0; part < parts_; ++part)
      for (int64_t i = 0; i < size_; ++i) total[i] += row(part)[i];
  }

 private:
  int64_t parts_, size_, stride_;
  std::vector<float> sums_;
};

int check(const mjk_attention_shape& shape) {
  if (shape.kv_heads < 1 || shape.heads % shape.kv_heads || shape.dim < 1)
    return fail(MJK_INVALID_ARGUMENT, "attention: %lld heads do not share %lld key/value heads of %lld",
                (long long)shape.heads, (long long)shape.kv_heads, (long long)shape.dim);
  return MJK_OK;
}

}  // namespace
}  // namespace mindjax

using namespace mindjax;

int mjk_attention(void* stream, mjk_dtype dtype, const mjk_attention_shape* shape, const void* q, const void* k,
                  const void* v, const int32_t* q_segments, const int32_t* kv_segments, const int32_t* q_index, void* out,
                  float* normaliser) {
  const Fused* kernels = fused_for(dtype);
  if (!kernels) return MJK_UNSUPPORTED;
  if (int status = check(*shape)) return status;
  for_each(stream, shape->rows * shape->kv_heads, [&](int64_t i) {
    kernels->attention(*shape, q, k, v, q_segments, kv_segments, q_index, out, normaliser, i);
  });
  return MJK_OK;
}

int mjk_attention_grad(void* stream, mjk_dtype dtype, const mjk_attention_shape* shape, const void* q, const void* k,
                       const void* v, const int32_t* q_segments, const int32_t* kv_segments, const int32_t* q_index,
                       const void* out, const float* normaliser, const void* g, void* dq, void* dk, void* dv) {
  const Fused* kernels = fused_for(dtype);
  if (!kernels) return MJK_UNSUPPORTED;
  if (int status = check(*shape)) return status;
  for_each(stream, shape->rows * shape->kv_heads, [&](int64_t i) {
    kernels->attention_grad(*shape, q, k, v, q_segments, kv_segments, q_index, out, normaliser, g, dq, dk, dv, i);
  });
  return MJK_OK;
}

int mjk_decode_attention(void* stream, mjk_dtype dtype, const mjk_decode_shape* shape, const void* q, const void* k,
                         const void* v, const void* prompt_k, const void* prompt_v, void* own_k, void* own_v,
                         const int32_t* segments, const int32_t* prompt, const int32_t* layer, const int32_t* step,
                         void* out) {
  const Fused* kernels = fused_for(dtype);
  if (!kernels) return MJK_UNSUPPORTED;
  if (shape->kv_heads < 1 || shape->heads % shape->kv_heads || *layer < 0 || *layer >= shape->layers || *step < 0 ||
      *step >= shape->capacity)
    return fail(MJK_INVALID_ARGUMENT, "decoding: layer %d of %lld, step %d of %lld, %lld heads on %lld", int(*layer),
                (long long)shape->layers, int(*step), (long long)shape->capacity, (long long)shape->heads,
                (long long)shape->kv_heads);
  for (int64_t row = 0; row < shape->rows; ++row)
    if (prompt[row] < 0 || prompt[row] >= shape->prompts)
      return fail(MJK_INVALID_ARGUMENT, "decoding: row %lld is of prompt %d of %lld", (long long)row, int(prompt[row]),
                  (long long)shape->prompts);
  const int64_t work = shape->heads / shape->kv_heads * shape->dim * (shape->keys + *step + 1);
  for_each_part(stream, Parts(shape->rows * shape->kv_heads, 1, work),
                [&](int64_t, int64_t first, int64_t last) {
                  for (int64_t i = first; i < last; ++i)
                    kernels->decode(*shape, q, k, v, prompt_k, prompt_v, own_k, own_v, segments, prompt, *layer,
                                    *step, out, i);
                });
  return MJK_OK;
}

int mjk_norm(void* stream, mjk_dtype dtype, int32_t centred, int64_t rows, int64_t size, float eps, const void* x,
             const void* scale, const void* bias, void* y) {
  const Fused* kernels = fused_for(dtype);
  if (!kernels) return MJK_UNSUPPORTED;
  for_each_part(stream, Parts(rows, kRows, size), [&](int64_t, int64_t first, int64_t last) {
    kernels->norm(centred, first, last, size, eps, x, scale, bias, y);
  });
  return MJK_OK;
}

int mjk_norm_grad(void* stream, mjk_dtype dtype, int32_t centred, int64_t rows, int64_t size, float eps, const void* x,
                  const void* scale, const void* g, void* dx, float* d_scale, float* d_bias) {
  const Fused* kernels = fused_for(dtype);
  if (!kernels) return MJK_UNSUPPORTED;
  const Parts parts(rows, kRows, size);
  PartialSums scale_sums(parts, size), bias_sums(parts, centred ? size : 0);
  for_each_part(stream, parts, [&](int64_t part, int64_t first, int64_t last) {
    kernels->norm_grad(centred, first, last, size, eps, x, scale, g, dx, scale_sums.row(part),
                       centred ? bias_sums.row(part) : nullptr);
  });
  scale_sums.add_up(d_scale);
  if (centred) bias_sums.add_up(d_bias);
  return MJK_OK;
}

int mjk_silu_product(void* stream, mjk_dtype dtype, int64_t count, const void* gate, const void* up, void* out) {
  const Fused* kernels = fused_for(dtype);
  if (!kernels) return MJK_UNSUPPORTED;
  for_each_part(stream, Parts(count, kLanes, 1),
                [&](int64_t, int64_t first, int64_t last) { kernels->silu_product(first, last, gate, up, out); });
  return MJK_OK;
}

int mjk_silu_product_grad(void* stream, mjk_dtype dtype, int64_t count, const void* gate, const void* up, const void* g,
                          void* d_gate, void* d_up) {
  const Fused* kernels = fused_for(dtype);
  if (!kernels) return MJK_UNSUPPORTED;
  for_each_part(stream, Parts(count, kLanes, 1), [&](int64_t, int64_t first, int64_t last) {
    kernels->silu_product_grad(first, last, gate, up, g, d_gate, d_up);
  });
  return MJK_OK;
}

int mjk_swiglu(void* stream, mjk_dtype dtype, int64_t rows, int64_t width, const void* gate_up, const float* scale,
               void* out) {
  const Fused* kernels = fused_for(dtype);
  if (!kernels) return MJK_UNSUPPORTED;
  for_each_part(stream, Parts(rows, 1, width), [&](int64_t, int64_t first, int64_t last) {
    kernels->swiglu(first, last, width, gate_up, scale, out);
  });
  return MJK_OK;
}

int mjk_swiglu_grad(void* stream, mjk_dtype dtype, int64_t rows, int64_t width, const void* gate_up, const float* scale,
                    const void* d_out, void* d_gate_up, float* d_scale) {
  const Fused* kernels = fused_for(dtype);
  if (!kernels) return MJK_UNSUPPORTED;
  for_each_part(stream, Parts(rows, 1, width), [&](int64_t, int64_t first, int64_t last) {
    kernels->swiglu_grad(first, last, width, gate_up, scale, d_out, d_gate_up, d_scale);
  });
  return MJK_OK;
}

int mjk_bias_gelu(void* stream, mjk_dtype x_dtype, mjk_dtype dtype, int32_t exact, int64_t rows, int64_t size,
                  const void* x, const void* bias, void* y, void* z) {
  const Fused* kernels = fused_for(dtype);
  if (!kernels) return MJK_UNSUPPORTED;
  if (x_dtype != dtype && x_dtype != MJK_F32)
    return fail(MJK_UNSUPPORTED, "gelu: x of dtype %d for a result of dtype %d", int(x_dtype), int(dtype));
  for_each_part(stream, Parts(rows, 1, size), [&](int64_t, int64_t first, int64_t last) {
    kernels->bias_gelu(exact, x_dtype == MJK_F32, first, last, size, x, bias, y, z);
  });
  return MJK_OK;
}

int mjk_bias_gelu_grad(void* stream, mjk_dtype dtype, int32_t exact, int64_t rows, int64_t size, const void* x,
                       const void* bias, const void* g, void* dx, float* d_bias) {
  const Fused* kernels = fused_for(dtype);
  if (!kernels) return MJK_UNSUPPORTED;
  const Parts parts(rows, 1, size);
  PartialSums sums(parts, size);
  for_each_part(stream, parts, [&](int64_t part, int64_t first, int64_t last) {
    kernels->bias_gelu_grad(exact, first, last, size, x, bias, g, dx, sums.row(part));
  });
  sums.add_up(d_bias);
  return MJK_OK;
}

int mjk_sum_rows(void* stream, mjk_dtype dtype, int64_t rows, int64_t size, const void* x, float* total) {
  const Fused* kernels = fused_for(dtype);
  if (!kernels) return MJK_UNSUPPORTED;
  const Parts parts(rows, 1, size);
  PartialSums sums(parts, size);
  for_each_part(stream, parts, [&](int64_t part, int64_t first, int64_t last) {
    kernels->sum_rows(first, last, size, x, sums.row(part));
  });
  sums.add_up(total);
  return MJK_OK;
}

int mjk_rope(void* stream, mjk_dtype dtype, int64_t rows, int64_t heads, int64_t dim, float sign, const void* x,
             const float* cosine, const float* sine, void* y) {
  const Fused* kernels = fused_for(dtype);
  if (!kernels) return MJK_UNSUPPORTED;
  if (dim % 2) return fail(MJK_INVALID_ARGUMENT, "rope: the head size must be even, not %lld", (long long)dim);
  for_each_part(stream, Parts(rows, 1, heads * dim), [&](int64_t, int64_t first, int64_t last) {
    kernels->rope(first, last, heads, dim, sign, x, cosine, sine, y);
  });
  return MJK_OK;
}

namespace {

// What both directions take: logits[rows, size], of which the first `count` rows have a target.
int check(int64_t rows, int64_t size, float temperature, const int32_t* targets, int32_t count) {
  if (count < 0 || count > rows)
    return fail(MJK_INVALID_ARGUMENT, "log-probabilities: %d of %lld rows", count, (long long)rows);
  if (!(temperature > 0)) return fail(MJK_INVALID_ARGUMENT, "log-probabilities: temperature %g", double(temperature));
  for (int64_t r = 0; r < count; ++r)
    if (targets[r] < 0 || targets[r] >= size)
      return fail(MJK_INVALID_ARGUMENT, "log-probabilities: token %d of a vocabulary of %lld", targets[r],
                  (long long)size);
  return MJK_OK;
}

}  // namespace

int mjk_logprobs(void* stream, int64_t rows, int64_t size, const float* logits, const int32_t* targets,
                 const float* temperature, const int32_t* count, float* logp, float* entropy, float* normaliser) {
  if (int status = check(rows, size, *temperature, targets, *count)) return status;
  for_each_part(stream, Parts(*count, 1, size), [&](int64_t, int64_t first, int64_t last) {
    fused_isa().f32.logprobs(first, last, size, 1 / *temperature, logits, targets, logp, entropy, normaliser);
  });
  for (float* result : {logp, entropy, normaliser}) std::fill(result + *count, result + rows, 0.0f);
  return MJK_OK;
}

int mjk_logprobs_grad(void* stream, mjk_dtype dtype, int64_t rows, int64_t size, const float* logits,
                      const int32_t* targets, const float* temperature, const int32_t* count, const float* normaliser,
                      const float* entropy, const float* d_logp, const float* d_entropy, void* d_logits) {
  const Fused* kernels = fused_for(dtype);
  if (!kernels) return MJK_UNSUPPORTED;
  if (int status = check(rows, size, *temperature, targets, *count)) return status;
  for_each_part(stream, Parts(*count, 1, size), [&](int64_t, int64_t first, int64_t last) {
    kernels->logprobs_grad(first, last, size, 1 / *temperature, logits, targets, normaliser, entropy, d_logp, d_entropy,
                           d_logits);
  });
  const int64_t row = size * (dtype == MJK_F32 ? 4 : 2);
  std::memset(static_cast<char*>(d_logits) + *count * row, 0, size_t((rows - *count) * row));
  return MJK_OK;
}

int mjk_unpermute(void* stream, mjk_dtype dtype, int64_t rows, int64_t tokens, int64_t choices, int64_t k,
                  const void* x, const int32_t* index, const float* weight, void* out) {
  const Fused* kernels = fused_for(dtype);
  if (!kernels) return MJK_UNSUPPORTED;
  for_each_part(stream, Parts(tokens, 1, k * (choices + 1)), [&](int64_t, int64_t first, int64_t last) {
    kernels->combine(first, last, rows, choices, k, x, index, weight, out);
  });
  return MJK_OK;
}
