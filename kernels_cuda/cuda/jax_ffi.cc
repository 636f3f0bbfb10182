// XLA's CUDA stream as the `stream` of the CUDA library, and the handlers over it.
#include "xla/ffi/api/ffi.h"

namespace mindjax {

struct CudaStream {
  void* stream;  // a cudaStream_t
};

struct Stream {
  using Context = CudaStream;

  explicit Stream(Context& context) : stream_(context.stream) {}
  void* get() { return stream_; }

 private:
  void* stream_;
};

}  // namespace mindjax

// XLA's own context for this, PlatformStream, decodes to a bare pointer; the handlers want a type of its own.
template <>
struct xla::ffi::CtxDecoding<mindjax::CudaStream> {
  using Type = mindjax::CudaStream;

  static std::optional<Type> Decode(const XLA_FFI_Api* api, XLA_FFI_ExecutionContext* context,
                                    DiagnosticEngine& diagnostic) {
    const auto stream = CtxDecoding<PlatformStream<void*>>::Decode(api, context, diagnostic);
    return stream.has_value() ? std::optional<Type>({*stream}) : std::nullopt;
  }
};

#include "../bindings/jax_ffi.h"

#ifdef MINDJAX_CUTLASS
// The same products by CUTLASS. Their first call allocates, so that they may not be recorded into a graph.
namespace mindjax {

extern "C" {
Gmm mjk_gmm_cutlass, mjk_gmm_t_cutlass;
decltype(mjk_tgmm) mjk_tgmm_cutlass;
}

ffi::Error gmm_cutlass(CudaStream context, Array x, Array w, Array sizes, Result out, int64_t group_offset) {
  return grouped(mjk_gmm_cutlass, false, context, x, w, sizes, out, group_offset);
}

ffi::Error gmm_t_cutlass(CudaStream context, Array x, Array w, Array sizes, Result out, int64_t group_offset) {
  return grouped(mjk_gmm_t_cutlass, true, context, x, w, sizes, out, group_offset);
}

ffi::Error tgmm_cutlass(CudaStream context, Array x, Array g, Array sizes, Array into, Result out,
                        int64_t group_offset) {
  const int64_t rows = dim(x, 0), k = dim(x, 1), n = dim(g, 1), groups = dim(*out, 0);
  if (!has_shape(x, {rows, k}) || !has_shape(g, {rows, n}) || !has_shape(*out, {groups, k, n}) || into.element_count())
    return wrong("x " + show(x) + ", g " + show(g) + " and the result " + show(*out) + " do not fit");
  if (!is_float(x) || x.element_type() != g.element_type() || !is_float(*out))
    return wrong("x and g must have one dtype, and so must the result");
  if (auto error = check_sizes(sizes, groups, group_offset); error.failure()) return error;
  Stream stream(context);
  return finish(mjk_tgmm_cutlass(stream.get(), dtype(x), dtype(*out), 0, rows, k, n, groups, dim(sizes, 0),
                                 group_offset, x.untyped_data(), g.untyped_data(),
                                 static_cast<const int32_t*>(sizes.untyped_data()), out->untyped_data()));
}

}  // namespace mindjax

#define MINDJAX_CUTLASS_FFI(name, function, arguments)        \
  extern "C" MJK_API XLA_FFI_Error* name(XLA_FFI_CallFrame*); \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(                              \
      name, mindjax::function,                                \
      (xla::ffi::Ffi::Bind().Ctx<mindjax::CudaStream>() arguments MINDJAX_RET MINDJAX_OFFSET))

MINDJAX_CUTLASS_FFI(mjk_ffi_gmm_cutlass, gmm_cutlass, MINDJAX_ARG MINDJAX_ARG MINDJAX_ARG);
MINDJAX_CUTLASS_FFI(mjk_ffi_gmm_t_cutlass, gmm_t_cutlass, MINDJAX_ARG MINDJAX_ARG MINDJAX_ARG);
MINDJAX_CUTLASS_FFI(mjk_ffi_tgmm_cutlass, tgmm_cutlass, MINDJAX_ARG MINDJAX_ARG MINDJAX_ARG MINDJAX_ARG);
#endif
