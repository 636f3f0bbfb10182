// The handlers of launch_cpu.h over XLA's thread pool; jax_fused.py registers them.
#include "launch_cpu.h"
#include "xla_stream.h"

namespace {

namespace ffi = xla::ffi;
using ffi::AnyBuffer;
using Ints = ffi::Buffer<ffi::S32>;
using Floats = ffi::Buffer<ffi::F32>;
template <class Buffer>
using Result = ffi::Result<Buffer>;

ffi::Error answer(int status) {
  return status == MJK_OK ? ffi::Error::Success() : ffi::Error::InvalidArgument(mjk_last_error());
}

// The C ABI's name for an element type; anything else is refused by the functions themselves.
mjk_dtype dtype_of(const AnyBuffer& buffer) {
  return buffer.element_type() == ffi::F32    ? MJK_F32
         : buffer.element_type() == ffi::BF16 ? MJK_BF16
                                              : static_cast<mjk_dtype>(-1);
}

template <class Buffer>
int64_t last_of(const Buffer& buffer) { return buffer.dimensions().back(); }
template <class Buffer>
int64_t rows_of(const Buffer& buffer) { return int64_t(buffer.element_count()) / last_of(buffer); }

mjk_attention_shape attention_shape(const AnyBuffer& q, const AnyBuffer& k) {
  const auto queries = q.dimensions(), keys = k.dimensions();
  return {queries[0], queries[1], keys[1], queries[2], keys[2], queries[3]};
}

ffi::Error linear(ffi::ThreadPool threads, AnyBuffer x, AnyBuffer w, Floats bias, Result<AnyBuffer> out) {
  mindjax::Stream stream(threads);
  return answer(mjk_linear(stream.get(), dtype_of(x), rows_of(x), last_of(x), last_of(w), x.untyped_data(),
                           w.untyped_data(), bias.typed_data(), out->untyped_data()));
}

ffi::Error attention(ffi::ThreadPool threads, AnyBuffer q, AnyBuffer k, AnyBuffer v, Ints q_segments, Ints kv_segments,
                     Ints q_index, Result<AnyBuffer> out, Result<Floats> normaliser) {
  mindjax::Stream stream(threads);
  const mjk_attention_shape shape = attention_shape(q, k);
  return answer(mjk_attention(stream.get(), dtype_of(q), &shape, q.untyped_data(), k.untyped_data(), v.untyped_data(),
                              q_segments.typed_data(), kv_segments.typed_data(), q_index.typed_data(),
                              out->untyped_data(), normaliser->typed_data()));
}

ffi::Error attention_grad(ffi::ThreadPool threads, AnyBuffer q, AnyBuffer k, AnyBuffer v, Ints q_segments,
                          Ints kv_segments, Ints q_index, AnyBuffer out, Floats normaliser, AnyBuffer g,
                          Result<AnyBuffer> dq, Result<AnyBuffer> dk, Result<AnyBuffer> dv) {
  mindjax::Stream stream(threads);
  const mjk_attention_shape shape = attention_shape(q, k);
  return answer(mjk_attention_grad(stream.get(), dtype_of(q), &shape, q.untyped_data(), k.untyped_data(),
                                   v.untyped_data(), q_segments.typed_data(), kv_segments.typed_data(),
                                   q_index.typed_data(), out.untyped_data(), normaliser.typed_data(), g.untyped_data(),
                                   dq->untyped_data(), dk->untyped_data(), dv->untyped_data()));
}

// own_k and own_v are the buffers of the results of that name. They may hold two-byte floats as integers.
ffi::Error decode_attention(ffi::ThreadPool threads, AnyBuffer q, AnyBuffer k, AnyBuffer v, AnyBuffer prompt_k,
                            AnyBuffer prompt_v, AnyBuffer own_k, AnyBuffer own_v, Ints segments, Ints prompt, Ints layer,
                            Ints step, Result<AnyBuffer> out, Result<AnyBuffer> new_k, Result<AnyBuffer> new_v) {
  if (own_k.untyped_data() != new_k->untyped_data() || own_v.untyped_data() != new_v->untyped_data())
    return ffi::Error::InvalidArgument("decode_attention: the cache must be updated in place");
  mindjax::Stream stream(threads);
  const auto old = prompt_k.dimensions(), own = own_k.dimensions();
  const mjk_decode_shape shape = {old[0], old[1], own[1], q.dimensions()[2], old[2], old[4], old[3], own[3]};
  return answer(mjk_decode_attention(stream.get(), dtype_of(q), &shape, q.untyped_data(), k.untyped_data(),
                                     v.untyped_data(), prompt_k.untyped_data(), prompt_v.untyped_data(),
                                     new_k->untyped_data(), new_v->untyped_data(), segments.typed_data(),
                                     prompt.typed_data(), layer.typed_data(), step.typed_data(), out->untyped_data()));
}

ffi::Error rms_norm(ffi::ThreadPool threads, float eps, AnyBuffer x, AnyBuffer scale, Result<AnyBuffer> y) {
  mindjax::Stream stream(threads);
  return answer(mjk_norm(stream.get(), dtype_of(x), 0, rows_of(x), last_of(x), eps, x.untyped_data(),
                         scale.untyped_data(), nullptr, y->untyped_data()));
}

ffi::Error rms_norm_grad(ffi::ThreadPool threads, float eps, AnyBuffer x, AnyBuffer scale, AnyBuffer g,
                         Result<AnyBuffer> dx, Result<Floats> d_scale) {
  mindjax::Stream stream(threads);
  return answer(mjk_norm_grad(stream.get(), dtype_of(x), 0, rows_of(x), last_of(x), eps, x.untyped_data(),
                              scale.untyped_data(), g.untyped_data(), dx->untyped_data(), d_scale->typed_data(),
                              nullptr));
}

ffi::Error layer_norm(ffi::ThreadPool threads, float eps, AnyBuffer x, AnyBuffer scale, AnyBuffer bias,
                      Result<AnyBuffer> y) {
  mindjax::Stream stream(threads);
  return answer(mjk_norm(stream.get(), dtype_of(x), 1, rows_of(x), last_of(x), eps, x.untyped_data(),
                         scale.untyped_data(), bias.untyped_data(), y->untyped_data()));
}

ffi::Error layer_norm_grad(ffi::ThreadPool threads, float eps, AnyBuffer x, AnyBuffer scale, AnyBuffer g,
                           Result<AnyBuffer> dx, Result<Floats> d_scale, Result<Floats> d_bias) {
  mindjax::Stream stream(threads);
  return answer(mjk_norm_grad(stream.get(), dtype_of(x), 1, rows_of(x), last_of(x), eps, x.untyped_data(),
                              scale.untyped_data(), g.untyped_data(), dx->untyped_data(), d_scale->typed_data(),
                              d_bias->typed_data()));
}

ffi::Error silu_product(ffi::ThreadPool threads, AnyBuffer gate, AnyBuffer up, Result<AnyBuffer> out) {
  mindjax::Stream stream(threads);
  return answer(mjk_silu_product(stream.get(), dtype_of(gate), int64_t(gate.element_count()), gate.untyped_data(),
                                 up.untyped_data(), out->untyped_data()));
}

ffi::Error silu_product_grad(ffi::ThreadPool threads, AnyBuffer gate, AnyBuffer up, AnyBuffer g,
                             Result<AnyBuffer> d_gate, Result<AnyBuffer> d_up) {
  mindjax::Stream stream(threads);
  return answer(mjk_silu_product_grad(stream.get(), dtype_of(gate), int64_t(gate.element_count()), gate.untyped_data(),
                                      up.untyped_data(), g.untyped_data(), d_gate->untyped_data(),
                                      d_up->untyped_data()));
}

// z without elements is not written.
ffi::Error bias_gelu(ffi::ThreadPool threads, bool exact, AnyBuffer x, AnyBuffer bias, Result<AnyBuffer> y,
                     Result<AnyBuffer> z) {
  mindjax::Stream stream(threads);
  return answer(mjk_bias_gelu(stream.get(), dtype_of(x), dtype_of(bias), exact, rows_of(x), last_of(x),
                              x.untyped_data(), bias.untyped_data(), y->untyped_data(),
                              z->element_count() ? z->untyped_data() : nullptr));
}

ffi::Error bias_gelu_grad(ffi::ThreadPool threads, bool exact, AnyBuffer x, AnyBuffer bias, AnyBuffer g, Result<AnyBuffer> dx,
                          Result<Floats> d_bias) {
  mindjax::Stream stream(threads);
  return answer(mjk_bias_gelu_grad(stream.get(), dtype_of(x), exact, rows_of(x), last_of(x), x.untyped_data(),
                                   bias.untyped_data(), g.untyped_data(), dx->untyped_data(), d_bias->typed_data()));
}

ffi::Error sum_rows(ffi::ThreadPool threads, AnyBuffer x, Result<Floats> total) {
  mindjax::Stream stream(threads);
  return answer(mjk_sum_rows(stream.get(), dtype_of(x), rows_of(x), last_of(x), x.untyped_data(), total->typed_data()));
}

ffi::Error rope(ffi::ThreadPool threads, float sign, AnyBuffer x, Floats cosine, Floats sine, Result<AnyBuffer> y) {
  mindjax::Stream stream(threads);
  const auto dims = x.dimensions();
  const int64_t dim = dims.back(), heads = dims[dims.size() - 2];
  return answer(mjk_rope(stream.get(), dtype_of(x), int64_t(x.element_count()) / (heads * dim), heads, dim, sign,
                         x.untyped_data(), cosine.typed_data(), sine.typed_data(), y->untyped_data()));
}

ffi::Error logprobs(ffi::ThreadPool threads, Floats logits, Ints targets, Floats temperature, Ints count,
                    Result<Floats> logp, Result<Floats> entropy, Result<Floats> normaliser) {
  mindjax::Stream stream(threads);
  return answer(mjk_logprobs(stream.get(), rows_of(logits), last_of(logits), logits.typed_data(), targets.typed_data(),
                             temperature.typed_data(), count.typed_data(), logp->typed_data(), entropy->typed_data(),
                             normaliser->typed_data()));
}

ffi::Error logprobs_grad(ffi::ThreadPool threads, Floats logits, Ints targets, Floats temperature, Ints count,
                         Floats normaliser, Floats entropy, Floats d_logp, Floats d_entropy,
                         Result<AnyBuffer> d_logits) {
  mindjax::Stream stream(threads);
  return answer(mjk_logprobs_grad(stream.get(), dtype_of(*d_logits), rows_of(logits), last_of(logits),
                                  logits.typed_data(), targets.typed_data(), temperature.typed_data(),
                                  count.typed_data(), normaliser.typed_data(), entropy.typed_data(),
                                  d_logp.typed_data(), d_entropy.typed_data(), d_logits->untyped_data()));
}

ffi::Error choose_experts(ffi::ThreadPool threads, bool normalise, Floats logits, Ints segments, Result<Floats> weights,
                          Result<Ints> chosen, Result<Floats> probabilities) {
  mindjax::Stream stream(threads);
  return answer(mjk_choose_experts(stream.get(), rows_of(logits), last_of(logits), last_of(*weights), normalise,
                                   logits.typed_data(), segments.typed_data(), weights->typed_data(),
                                   chosen->typed_data(), probabilities->typed_data()));
}

ffi::Error choose_experts_grad(ffi::ThreadPool threads, bool normalise, Ints chosen, Floats probabilities,
                               Floats d_weights, Floats d_probabilities, Result<Floats> d_logits) {
  mindjax::Stream stream(threads);
  return answer(mjk_choose_experts_grad(stream.get(), rows_of(probabilities), last_of(probabilities),
                                        last_of(d_weights), normalise, chosen.typed_data(), probabilities.typed_data(),
                                        d_weights.typed_data(), d_probabilities.typed_data(), d_logits->typed_data()));
}

ffi::Error sort_by_expert(ffi::ThreadPool, Ints chosen, Floats weights, Result<Ints> token, Result<Ints> back,
                          Result<Ints> load, Result<Floats> scales) {
  return answer(mjk_sort_by_expert(rows_of(weights), last_of(*load), last_of(weights), chosen.typed_data(),
                                   weights.typed_data(), token->typed_data(), back->typed_data(), load->typed_data(),
                                   scales->typed_data()));
}

ffi::Error expert_shares(ffi::ThreadPool threads, Ints chosen, Ints segments, Result<Floats> shares) {
  mindjax::Stream stream(threads);
  const int64_t length = last_of(segments);
  return answer(mjk_expert_shares(stream.get(), rows_of(segments), length, last_of(*shares), last_of(chosen),
                                  chosen.typed_data(), segments.typed_data(), shares->typed_data()));
}

}  // namespace

// The symbols that jax_fused.py registers.
#define MJK_FUSED(name, ...)                                          \
  extern "C" MJK_API XLA_FFI_Error* mjk_ffi_##name(XLA_FFI_CallFrame*); \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(mjk_ffi_##name, name, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>() __VA_ARGS__)
#define MJK_ANY .Arg<AnyBuffer>()
#define MJK_OUT .Ret<AnyBuffer>()
#define MJK_SUM .Ret<Floats>()

MJK_FUSED(linear, MJK_ANY MJK_ANY.Arg<Floats>() MJK_OUT);
MJK_FUSED(attention, MJK_ANY MJK_ANY MJK_ANY.Arg<Ints>().Arg<Ints>().Arg<Ints>() MJK_OUT MJK_SUM);
MJK_FUSED(attention_grad, MJK_ANY MJK_ANY MJK_ANY.Arg<Ints>().Arg<Ints>().Arg<Ints>() MJK_ANY.Arg<Floats>() MJK_ANY MJK_OUT MJK_OUT MJK_OUT);
MJK_FUSED(decode_attention, MJK_ANY MJK_ANY MJK_ANY MJK_ANY MJK_ANY MJK_ANY MJK_ANY.Arg<Ints>().Arg<Ints>().Arg<Ints>().Arg<Ints>()
          MJK_OUT MJK_OUT MJK_OUT);
MJK_FUSED(rms_norm, .Attr<float>("eps") MJK_ANY MJK_ANY MJK_OUT);
MJK_FUSED(rms_norm_grad, .Attr<float>("eps") MJK_ANY MJK_ANY MJK_ANY MJK_OUT MJK_SUM);
MJK_FUSED(layer_norm, .Attr<float>("eps") MJK_ANY MJK_ANY MJK_ANY MJK_OUT);
MJK_FUSED(layer_norm_grad, .Attr<float>("eps") MJK_ANY MJK_ANY MJK_ANY MJK_OUT MJK_SUM MJK_SUM);
MJK_FUSED(silu_product, MJK_ANY MJK_ANY MJK_OUT);
MJK_FUSED(silu_product_grad, MJK_ANY MJK_ANY MJK_ANY MJK_OUT MJK_OUT);
MJK_FUSED(bias_gelu, .Attr<bool>("exact") MJK_ANY MJK_ANY MJK_OUT MJK_OUT);
MJK_FUSED(bias_gelu_grad, .Attr<bool>("exact") MJK_ANY MJK_ANY MJK_ANY MJK_OUT MJK_SUM);
MJK_FUSED(sum_rows, MJK_ANY MJK_SUM);
MJK_FUSED(rope, .Attr<float>("sign") MJK_ANY.Arg<Floats>().Arg<Floats>() MJK_OUT);
MJK_FUSED(logprobs, .Arg<Floats>().Arg<Ints>().Arg<Floats>().Arg<Ints>() MJK_SUM MJK_SUM MJK_SUM);
MJK_FUSED(logprobs_grad,
          .Arg<Floats>().Arg<Ints>().Arg<Floats>().Arg<Ints>().Arg<Floats>().Arg<Floats>().Arg<Floats>().Arg<Floats>() MJK_OUT);
MJK_FUSED(choose_experts, .Attr<bool>("normalise").Arg<Floats>().Arg<Ints>() MJK_SUM.Ret<Ints>() MJK_SUM);
MJK_FUSED(choose_experts_grad, .Attr<bool>("normalise").Arg<Ints>().Arg<Floats>().Arg<Floats>().Arg<Floats>() MJK_SUM);
MJK_FUSED(sort_by_expert, .Arg<Ints>().Arg<Floats>().Ret<Ints>().Ret<Ints>().Ret<Ints>() MJK_SUM);
MJK_FUSED(expert_shares, .Arg<Ints>().Arg<Ints>() MJK_SUM);
