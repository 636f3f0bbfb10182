// The XLA FFI handlers over the C ABI, written once for both libraries. They check shapes and dtypes and say in words
// what does not fit.
//
// Whoever includes this first defines in namespace mindjax
//   struct Stream { using Context = ...;  // an XLA FFI context, decoded for each call
//                   explicit Stream(Context& context); void* get(); };
// with get() as the `stream` argument of launch.h, valid as long as the object. An operand that is not given is an
// array without elements.
#pragma once
#include <string>

#include "launch.h"
#include "xla/ffi/api/ffi.h"

namespace mindjax {

namespace ffi = xla::ffi;
using Array = ffi::AnyBuffer;
using Result = ffi::Result<ffi::AnyBuffer>;

inline ffi::Error wrong(const std::string& message) { return ffi::Error::InvalidArgument(message); }

inline ffi::Error finish(int status) {
  if (status == MJK_OK) return ffi::Error::Success();
  return status == MJK_LAUNCH_FAILED ? ffi::Error::Internal(mjk_last_error()) : wrong(mjk_last_error());
}

inline std::string show(const Array& array) {
  std::string text = "[";
  for (size_t i = 0; i < array.dimensions().size(); ++i)
    text += (i ? ", " : "") + std::to_string(array.dimensions()[i]);
  return text + "]";
}

inline bool has_shape(const Array& array, std::initializer_list<int64_t> shape) {
  const auto dims = array.dimensions();
  return dims.size() == shape.size() && std::equal(shape.begin(), shape.end(), dims.begin());
}

inline int64_t dim(const Array& array, size_t i) { return i < array.dimensions().size() ? array.dimensions()[i] : -1; }
inline int64_t blocks(int64_t size) { return (size + 127) / 128; }
inline bool is_float(const Array& array) {
  return array.element_type() == ffi::DataType::F32 || array.element_type() == ffi::DataType::BF16;
}
inline mjk_dtype dtype(const Array& array) { return array.element_type() == ffi::DataType::F32 ? MJK_F32 : MJK_BF16; }
template <class T>
const T* data(const Array& array) {
  return array.element_count() ? static_cast<const T*>(array.untyped_data()) : nullptr;
}

inline ffi::Error check_sizes(const Array& sizes, int64_t groups, int64_t offset) {
  if (sizes.element_type() != ffi::DataType::S32 || sizes.dimensions().size() != 1)
    return wrong("group_sizes must be int32 [G], got shape " + show(sizes));
  if (offset < 0 || offset + groups > dim(sizes, 0))
    return wrong("group_offset " + std::to_string(offset) + " and " + std::to_string(groups) +
                 " groups exceed group_sizes " + show(sizes));
  return ffi::Error::Success();
}

using Gmm = decltype(mjk_gmm);

// x[R, K], w[G, K, N] -> out[R, N], or with `transposed` x[R, N] -> out[R, K].
inline ffi::Error grouped(Gmm* launch, bool transposed, Stream::Context context, const Array& x, const Array& w,
                          const Array& sizes, Result out, int64_t group_offset) {
  const int64_t rows = dim(x, 0), groups = dim(w, 0), k = dim(w, 1), n = dim(w, 2);
  if (!has_shape(x, {rows, transposed ? n : k}) || !has_shape(w, {groups, k, n}) ||
      !has_shape(*out, {rows, transposed ? k : n}))
    return wrong("x " + show(x) + ", w " + show(w) + " and the result " + show(*out) + " do not fit");
  if (!is_float(x) || x.element_type() != w.element_type() || !is_float(*out))
    return wrong("x and w must have one dtype, float32 or bfloat16, and so must the result");
  if (auto error = check_sizes(sizes, groups, group_offset); error.failure()) return error;
  Stream stream(context);
  return finish(launch(stream.get(), dtype(x), dtype(*out), rows, k, n, groups, dim(sizes, 0), group_offset,
                       x.untyped_data(), w.untyped_data(), static_cast<const int32_t*>(sizes.untyped_data()),
                       out->untyped_data()));
}

inline ffi::Error gmm(Stream::Context context, Array x, Array w, Array sizes, Result out, int64_t group_offset) {
  return grouped(mjk_gmm, false, context, x, w, sizes, out, group_offset);
}

inline ffi::Error gmm_t(Stream::Context context, Array x, Array w, Array sizes, Result out, int64_t group_offset) {
  return grouped(mjk_gmm_t, true, context, x, w, sizes, out, group_offset);
}

// x[R, K], g[R, N] -> out[G, K, N]; `into`, without elements or the buffer of the result itself, is added to.
inline ffi::Error tgmm(Stream::Context context, Array x, Array g, Array sizes, Array into, Result out,
                       int64_t group_offset) {
  const int64_t rows = dim(x, 0), k = dim(x, 1), n = dim(g, 1), groups = dim(*out, 0);
  if (!has_shape(x, {rows, k}) || !has_shape(g, {rows, n}) || !has_shape(*out, {groups, k, n}))
    return wrong("x " + show(x) + ", g " + show(g) + " and the result " + show(*out) + " do not fit");
  if (!is_float(x) || x.element_type() != g.element_type() || !is_float(*out))
    return wrong("x and g must have one dtype, float32 or bfloat16, and so must the result");
  const bool accumulate = into.element_count() > 0;
  if (accumulate && into.untyped_data() != out->untyped_data()) return wrong("into must be the result's own buffer");
  if (auto error = check_sizes(sizes, groups, group_offset); error.failure()) return error;
  Stream stream(context);
  return finish(mjk_tgmm(stream.get(), dtype(x), dtype(*out), accumulate, rows, k, n, groups, dim(sizes, 0),
                         group_offset, x.untyped_data(), g.untyped_data(),
                         static_cast<const int32_t*>(sizes.untyped_data()), out->untyped_data()));
}

// x[R, K] xs, w[G, N, K] ws -> out[R, N]
inline ffi::Error gmm_fp8(Stream::Context context, Array x, Array xs, Array w, Array ws, Array sizes, Result out,
                          int64_t group_offset) {
  const int64_t rows = dim(x, 0), k = dim(x, 1), groups = dim(w, 0), n = dim(w, 1);
  if (!has_shape(x, {rows, k}) || !has_shape(w, {groups, n, k}) || !has_shape(*out, {rows, n}) ||
      !has_shape(xs, {rows, blocks(k)}) || !has_shape(ws, {groups, blocks(n), blocks(k)}))
    return wrong("x " + show(x) + " with scales " + show(xs) + ", w " + show(w) + " with scales " + show(ws) +
                 " and the result " + show(*out) + " do not fit: scales are per 1 x 128 of x, 128 x 128 of w");
  if (x.element_type() != ffi::DataType::F8E4M3FN || w.element_type() != ffi::DataType::F8E4M3FN ||
      xs.element_type() != ffi::DataType::F32 || ws.element_type() != ffi::DataType::F32 || !is_float(*out))
    return wrong("x and w must be float8_e4m3fn, their scales float32, the result float32 or bfloat16");
  if (auto error = check_sizes(sizes, groups, group_offset); error.failure()) return error;
  Stream stream(context);
  return finish(mjk_gmm_fp8(stream.get(), dtype(*out), rows, k, n, groups, dim(sizes, 0), group_offset,
                            x.untyped_data(), static_cast<const float*>(xs.untyped_data()), w.untyped_data(),
                            static_cast<const float*>(ws.untyped_data()),
                            static_cast<const int32_t*>(sizes.untyped_data()), out->untyped_data()));
}

inline ffi::Error gmm_s8(Stream::Context context, Array x, Array xs, Array w, Array ws, Array sizes, Result out,
                         int64_t group_offset) {
  const int64_t rows = dim(x, 0), k = dim(x, 1), groups = dim(w, 0), n = dim(w, 1);
  if (!has_shape(x, {rows, k}) || !has_shape(w, {groups, n, k}) || !has_shape(*out, {rows, n}) ||
      !has_shape(xs, {rows}) || !has_shape(ws, {groups, n}))
    return wrong("x " + show(x) + " with scales " + show(xs) + ", w " + show(w) + " with scales " + show(ws) +
                 " and the result " + show(*out) + " do not fit: scales are per row of x and per output of w");
  if (x.element_type() != ffi::DataType::S8 || w.element_type() != ffi::DataType::S8 ||
      xs.element_type() != ffi::DataType::F32 || ws.element_type() != ffi::DataType::F32 || !is_float(*out))
    return wrong("x and w must be int8, their scales float32, the result float32 or bfloat16");
  if (auto error = check_sizes(sizes, groups, group_offset); error.failure()) return error;
  Stream stream(context);
  return finish(mjk_gmm_s8(stream.get(), dtype(*out), rows, k, n, groups, dim(sizes, 0), group_offset,
                           x.untyped_data(), static_cast<const float*>(xs.untyped_data()), w.untyped_data(),
                           static_cast<const float*>(ws.untyped_data()),
                           static_cast<const int32_t*>(sizes.untyped_data()), out->untyped_data()));
}

// x[rows, K], index[out_rows] or nothing -> out[out_rows, K], scales[out_rows, ceil(K / 128)]
inline ffi::Error quantize_e4m3(Stream::Context context, Array x, Array index, Result out, Result scales) {
  const int64_t rows = dim(x, 0), k = dim(x, 1), out_rows = dim(*out, 0);
  const bool all = index.element_count() == 0;
  if (!has_shape(x, {rows, k}) || !has_shape(*out, {out_rows, k}) || !has_shape(*scales, {out_rows, blocks(k)}) ||
      (all ? out_rows != rows && out_rows != 0 : !has_shape(index, {out_rows})))
    return wrong("x " + show(x) + ", index " + show(index) + " and the results " + show(*out) + ", " +
                 show(*scales) + " do not fit");
  if (!is_float(x) || index.element_type() != ffi::DataType::S32 || out->element_type() != ffi::DataType::F8E4M3FN ||
      scales->element_type() != ffi::DataType::F32)
    return wrong("x must be float32 or bfloat16, index int32, the results float8_e4m3fn and float32");
  Stream stream(context);
  return finish(mjk_quantize_e4m3(stream.get(), dtype(x), rows, out_rows, k, x.untyped_data(), data<int32_t>(index),
                                  out->untyped_data(), static_cast<float*>(scales->untyped_data())));
}

// x[rows, K], index[out_rows] -> out[out_rows, K]
inline ffi::Error permute(Stream::Context context, Array x, Array index, Result out) {
  const int64_t rows = dim(x, 0), k = dim(x, 1), out_rows = dim(index, 0);
  if (!has_shape(x, {rows, k}) || !has_shape(index, {out_rows}) || !has_shape(*out, {out_rows, k}))
    return wrong("x " + show(x) + ", index " + show(index) + " and the result " + show(*out) + " do not fit");
  if (!is_float(x) || index.element_type() != ffi::DataType::S32 || out->element_type() != x.element_type())
    return wrong("x must be float32 or bfloat16, the result like it, index int32");
  Stream stream(context);
  return finish(mjk_permute(stream.get(), dtype(x), rows, out_rows, k, x.untyped_data(),
                            static_cast<const int32_t*>(index.untyped_data()), out->untyped_data()));
}

// x[rows, K], index[tokens, choices], weight[tokens, choices] or nothing -> out[tokens, K]
inline ffi::Error unpermute(Stream::Context context, Array x, Array index, Array weight, Result out) {
  const int64_t rows = dim(x, 0), k = dim(x, 1), tokens = dim(index, 0), choices = dim(index, 1);
  const bool weighted = weight.element_count() > 0;
  if (!has_shape(x, {rows, k}) || !has_shape(index, {tokens, choices}) || !has_shape(*out, {tokens, k}) ||
      (weighted && !has_shape(weight, {tokens, choices})))
    return wrong("x " + show(x) + ", index " + show(index) + ", weight " + show(weight) + " and the result " +
                 show(*out) + " do not fit");
  if (!is_float(x) || index.element_type() != ffi::DataType::S32 || weight.element_type() != ffi::DataType::F32 ||
      out->element_type() != x.element_type())
    return wrong("x must be float32 or bfloat16, the result like it, index int32, weight float32");
  Stream stream(context);
  return finish(mjk_unpermute(stream.get(), dtype(x), rows, tokens, choices, k, x.untyped_data(),
                              static_cast<const int32_t*>(index.untyped_data()), data<float>(weight),
                              out->untyped_data()));
}

// gate_up[R, 2 I], scale[R] or nothing -> out[R, I]
inline ffi::Error swiglu(Stream::Context context, Array gate_up, Array scale, Result out) {
  const int64_t rows = dim(*out, 0), width = dim(*out, 1);
  const bool scaled = scale.element_count() > 0;
  if (!has_shape(gate_up, {rows, 2 * width}) || !has_shape(*out, {rows, width}) ||
      (scaled && !has_shape(scale, {rows})))
    return wrong("gate_up " + show(gate_up) + ", scale " + show(scale) + " and the result " + show(*out) +
                 " do not fit");
  if (!is_float(gate_up) || out->element_type() != gate_up.element_type() ||
      scale.element_type() != ffi::DataType::F32)
    return wrong("gate_up must be float32 or bfloat16, the result like it, scale float32");
  Stream stream(context);
  return finish(mjk_swiglu(stream.get(), dtype(gate_up), rows, width, gate_up.untyped_data(), data<float>(scale),
                           out->untyped_data()));
}

// gate_up[R, 2 I], scale[R] or nothing, d_out[R, I] -> d_gate_up[R, 2 I], d_scale[R] (or nothing)
inline ffi::Error swiglu_grad(Stream::Context context, Array gate_up, Array scale, Array d_out, Result d_gate_up,
                              Result d_scale) {
  const int64_t rows = dim(d_out, 0), width = dim(d_out, 1);
  const bool scaled = scale.element_count() > 0;
  if (!has_shape(gate_up, {rows, 2 * width}) || !has_shape(d_out, {rows, width}) ||
      !has_shape(*d_gate_up, {rows, 2 * width}) ||
      (scaled && (!has_shape(scale, {rows}) || !has_shape(*d_scale, {rows}))))
    return wrong("gate_up " + show(gate_up) + ", scale " + show(scale) + ", d_out " + show(d_out) +
                 " and the results " + show(*d_gate_up) + ", " + show(*d_scale) + " do not fit");
  if (!is_float(gate_up) || d_out.element_type() != gate_up.element_type() ||
      d_gate_up->element_type() != gate_up.element_type() || scale.element_type() != ffi::DataType::F32 ||
      d_scale->element_type() != ffi::DataType::F32)
    return wrong("gate_up must be float32 or bfloat16, d_out and its gradient like it, scales float32");
  Stream stream(context);
  return finish(mjk_swiglu_grad(stream.get(), dtype(gate_up), rows, width, gate_up.untyped_data(), data<float>(scale),
                                d_out.untyped_data(), d_gate_up->untyped_data(),
                                scaled ? static_cast<float*>(d_scale->untyped_data()) : nullptr));
}

}  // namespace mindjax

// The symbols that jax_binding.py registers; a handler may be recorded into a CUDA graph (sizes stay on the device).
#define MINDJAX_FFI(name, function, binding)                                       \
  extern "C" MJK_API XLA_FFI_Error* name(XLA_FFI_CallFrame*);                      \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, mindjax::function,                           \
                                (xla::ffi::Ffi::Bind().Ctx<mindjax::Stream::Context>() binding), \
                                {xla::ffi::Traits::kCmdBufferCompatible})

#define MINDJAX_ARG .Arg<mindjax::Array>()
#define MINDJAX_RET .Ret<mindjax::Array>()
#define MINDJAX_OFFSET .Attr<int64_t>("group_offset")

MINDJAX_FFI(mjk_ffi_gmm, gmm, MINDJAX_ARG MINDJAX_ARG MINDJAX_ARG MINDJAX_RET MINDJAX_OFFSET);
MINDJAX_FFI(mjk_ffi_gmm_t, gmm_t, MINDJAX_ARG MINDJAX_ARG MINDJAX_ARG MINDJAX_RET MINDJAX_OFFSET);
MINDJAX_FFI(mjk_ffi_tgmm, tgmm, MINDJAX_ARG MINDJAX_ARG MINDJAX_ARG MINDJAX_ARG MINDJAX_RET MINDJAX_OFFSET);
MINDJAX_FFI(mjk_ffi_gmm_fp8, gmm_fp8,
            MINDJAX_ARG MINDJAX_ARG MINDJAX_ARG MINDJAX_ARG MINDJAX_ARG MINDJAX_RET MINDJAX_OFFSET);
MINDJAX_FFI(mjk_ffi_gmm_s8, gmm_s8,
            MINDJAX_ARG MINDJAX_ARG MINDJAX_ARG MINDJAX_ARG MINDJAX_ARG MINDJAX_RET MINDJAX_OFFSET);
MINDJAX_FFI(mjk_ffi_quantize_e4m3, quantize_e4m3, MINDJAX_ARG MINDJAX_ARG MINDJAX_RET MINDJAX_RET);
MINDJAX_FFI(mjk_ffi_permute, permute, MINDJAX_ARG MINDJAX_ARG MINDJAX_RET);
MINDJAX_FFI(mjk_ffi_unpermute, unpermute, MINDJAX_ARG MINDJAX_ARG MINDJAX_ARG MINDJAX_RET);
MINDJAX_FFI(mjk_ffi_swiglu, swiglu, MINDJAX_ARG MINDJAX_ARG MINDJAX_RET);
MINDJAX_FFI(mjk_ffi_swiglu_grad, swiglu_grad, MINDJAX_ARG MINDJAX_ARG MINDJAX_ARG MINDJAX_RET MINDJAX_RET);
