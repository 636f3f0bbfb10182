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
