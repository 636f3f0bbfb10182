// The handlers of launch.h over XLA's thread pool.
#include "xla_stream.h"

#include "../bindings/jax_ffi.h"
