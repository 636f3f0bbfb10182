// Grouped products on Hopper's tensor cores: one persistent, warp-specialised kernel in six forms.
//
//   A block holds one producer warpgroup, of which one thread asks the copy engine (TMA) for tiles, and one or two
//   consumer warpgroups, each of which multiplies its own 64 rows with wgmma and keeps the sums in registers:
//
//     out tile [64 or 128 rows, 128 or 256 columns]          ring of stages in shared memory, 128 bytes of K deep
//       +-----------------------+ consumer 0                   full[s]:  the copy engine has filled stage s
//       +-----------------------+ consumer 1                   empty[s]: every consumer warp has read it
//
//   Every block walks group_sizes itself (GroupTable) and takes tiles blockIdx.x, + gridDim.x, ... A tile begins at its
//   group's first row, wherever that lies. Rows of the next group that a copy brings along are multiplied and not
//   stored; a product of rows never mixes them. tgmm contracts over rows, so there they are zeroed in shared memory, on
//   both sides (zero times NaN is NaN).
#include "device.h"
#include "status.h"
#include "table.cuh"
#include "tiles.h"

namespace mjk {
namespace {

template <Product kProductOf, int kConsumersOf, int kBNOf>
struct Form {
  static constexpr Product kProduct = kProductOf;
  static constexpr int kConsumers = kConsumersOf;
  static constexpr int kBM = kMmaRows * kConsumers, kBN = kBNOf;
  static constexpr int kElement = kProduct == Product::kE4m3 || kProduct == Product::kS8 ? 1 : 2;  // bytes
  static constexpr int kBK = kLine / kElement;
  static constexpr bool kMnA = kProduct == Product::kTgmm;
  static constexpr bool kMnB = kProduct == Product::kTgmm || kProduct == Product::kGmm;
  static constexpr int kARows =
      kConsumers == 1 ? 16 : 64;  // rows of one copy of A (K-major); fewer copies for fewer rows
  static constexpr int kABytes = kBM * kLine, kBBytes = kBN * kLine, kStageBytes = kABytes + kBBytes;
  static constexpr int kStages = 196608 / kStageBytes;  // 192 KiB of the 227 that a block may have
  static constexpr int kConsumerThreads = 128 * kConsumers, kThreads = kConsumerThreads + 128;
  static constexpr int kSharedBytes = kStages * kStageBytes + kAtom;  // the base is rounded up to an atom
  static constexpr int kAccumulators = kBN / 2;                       // of a thread: 64 kBN / 128
};

struct Ring {
  uint64_t full[8], empty[8];
};

template <class F>
__device__ __forceinline__ int64_t tile_count(const Problem& p, const GroupTable& table) {
  if constexpr (F::kProduct == Product::kTgmm) {
    return tgmm_tiles<F::kBM, F::kBN>(p.groups, p.inner, p.columns);
  } else {
    return gmm_tiles<F::kBM, F::kBN>(table, p.groups, p.columns);
  }
}

template <class F>
__device__ __forceinline__ Tile tile_at(const Problem& p, const GroupTable& table, int64_t index) {
  if constexpr (F::kProduct == Product::kTgmm) {
    return tgmm_tile<F::kBM, F::kBN>(table, p.inner, p.columns, index);
  } else {
    return gmm_tile<F::kBM, F::kBN>(table, p.groups, p.columns, index);
  }
}

template <class F>
__device__ __forceinline__ int32_t k_blocks(const Problem& p, const Tile& tile) {
  return ceil_div(F::kProduct == Product::kTgmm ? tile.rows : p.inner, F::kBK);
}

// ---- producer: one thread

template <class F>
__device__ __forceinline__ void produce(const CUtensorMap* a_map, const CUtensorMap* b_map, const Problem& p,
                                        const GroupTable& table, Ring& ring, uint32_t stages) {
  prefetch_map(a_map);
  prefetch_map(b_map);
  uint32_t step = 0;
  const int64_t tiles = tile_count<F>(p, table);
  for (int64_t index = blockIdx.x; index < tiles; index += gridDim.x) {
    const Tile tile = tile_at<F>(p, table, index);
    const int32_t blocks = k_blocks<F>(p, tile);
    const int32_t a_copies = F::kMnA ? F::kConsumers : ceil_div(tile.rows, F::kARows);
    const uint32_t bytes = a_copies * (F::kMnA ? kBox : F::kARows * kLine) + F::kBBytes;
    for (int32_t block = 0; block < blocks; ++block, ++step) {
      const uint32_t stage = step % F::kStages;
      uint64_t* full = &ring.full[stage];
      const uint32_t a = stages + stage * F::kStageBytes, b = a + F::kABytes;
      const int32_t k = block * F::kBK;
      barrier_wait(&ring.empty[stage], (step / F::kStages & 1) ^ 1);
      barrier_arrive_expect(full, bytes);
      if constexpr (F::kMnA) {
        for (int i = 0; i < F::kConsumers; ++i) load_2d(a_map, full, a + i * kBox, tile.m + 64 * i, tile.row + k);
      } else {
        for (int i = 0; i < a_copies; ++i) {
          load_2d(a_map, full, a + i * F::kARows * kLine, k, tile.row + i * F::kARows);
        }
      }
      if constexpr (F::kProduct == Product::kTgmm) {
        for (int i = 0; i < F::kBN / 64; ++i) load_2d(b_map, full, b + i * kBox, tile.n + 64 * i, tile.row + k);
      } else if constexpr (F::kMnB) {
        for (int i = 0; i < F::kBN / 64; ++i) load_3d(b_map, full, b + i * kBox, tile.n + 64 * i, k, tile.group);
      } else {
        load_3d(b_map, full, b, k, tile.n, tile.group);
      }
    }
  }
}

// ---- consumers: a warpgroup each

// Lines `from`.. of every box of a stage become zero: rows of x and g that are not the group's.
template <class F>
__device__ __forceinline__ void zero_lines(uint8_t* stage, int32_t from) {
  constexpr int kChunks = kLine / 16;
  const int lines = 64 - from;
  for (int i = threadIdx.x; i < F::kStageBytes / kBox * lines * kChunks; i += F::kConsumerThreads) {
    const int box = i / (lines * kChunks), line = from + i / kChunks % lines;
    *reinterpret_cast<uint4*>(stage + box * kBox + line * kLine + i % kChunks * 16) = make_uint4(0, 0, 0, 0);
  }
}

__device__ __forceinline__ void store_pair(float* to, float a, float b, bool add) {
  float2* pair = reinterpret_cast<float2*>(to);
  *pair = add ? make_float2(pair->x + a, pair->y + b) : make_float2(a, b);
}

// Stores this warpgroup's 64 rows from `row` of the matrix at `out` on, of which `valid` count. `value(chunk, half, c)`
// is accumulator 4 chunk + 2 half + c, scaled. The pointers are 16-byte aligned and `columns` is a multiple of 8.
template <class F, class Value>
__device__ __forceinline__ void store(const Problem& p, void* out, int64_t row, int32_t valid, int32_t n, Value value) {
  const int thread = threadIdx.x % 128, q = threadIdx.x % 4;
  constexpr int kChunks = F::kBN / 8;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int32_t r = accumulator_row(thread, half);
    const int64_t line = (row + r) * p.columns;
    if (p.out_dtype == MJK_BF16) {
      // Four chunks at a time, so that a thread stores 16 bytes and a quad 64 without a gap.
#pragma unroll
      for (int chunk = 0; chunk < kChunks; chunk += 4) {
        uint32_t v[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const __nv_bfloat162 pair = __floats2bfloat162_rn(value(chunk + j, half, 0), value(chunk + j, half, 1));
          v[j] = *reinterpret_cast<const uint32_t*>(&pair);
        }
        quad_transpose(v, q, [](uint32_t x, int bit) { return __shfl_xor_sync(0xFFFFFFFFu, x, bit); });
        const int32_t column = n + 8 * (chunk + q);
        if (r < valid && column < p.columns) {
          *reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(out) + line + column) =
              make_uint4(v[0], v[1], v[2], v[3]);
        }
      }
    } else {
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        const int32_t column = n + accumulator_column(thread, chunk);
        if (r < valid && column < p.columns) {
          store_pair(static_cast<float*>(out) + line + column, value(chunk, half, 0), value(chunk, half, 1),
                     F::kProduct == Product::kTgmm && p.accumulate);
        }
      }
    }
  }
}

// Waits for the stages of a tile without reading them: this warpgroup's rows are all past the group's end.
template <class F>
__device__ __forceinline__ void skip(Ring& ring, uint32_t& step, int32_t blocks) {
  for (int32_t block = 0; block < blocks; ++block, ++step) {
    barrier_wait(&ring.full[step % F::kStages], step / F::kStages & 1);
    __syncwarp();  // no lane is left behind to see the barrier a whole round later
    if (threadIdx.x % 32 == 0) barrier_arrive(&ring.empty[step % F::kStages]);
  }
}

// bf16 and s8: the sums stay in the tensor cores' accumulators; one stage's products are in flight while the next one's
// are issued.
template <class F, class Accumulator>
__device__ __forceinline__ void multiply(const Problem& p, const Tile& tile, Ring& ring, uint8_t* stages,
                                         uint32_t& step, Accumulator (&acc)[F::kAccumulators]) {
  const int consumer = threadIdx.x / 128;
#pragma unroll
  for (int i = 0; i < F::kAccumulators; ++i) acc[i] = 0;
  const int32_t blocks = k_blocks<F>(p, tile);
  for (int32_t block = 0; block < blocks; ++block, ++step) {
    const uint32_t stage = step % F::kStages;
    uint8_t* a_stage = stages + stage * F::kStageBytes;
    barrier_wait(&ring.full[stage], step / F::kStages & 1);
    if constexpr (F::kProduct == Product::kTgmm) {
      const int32_t left = tile.rows - block * F::kBK;
      if (left < F::kBK) {
        zero_lines<F>(a_stage, left);
        async_proxy_fence();
        consumers_sync<F::kConsumerThreads>();
      }
    }
    const uint32_t a = shared_address(a_stage), b = a + F::kABytes;
    mma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint64_t a_operand = operand(F::kMnA, a, consumer * kMmaRows, k), b_operand = operand(F::kMnB, b, 0, k);
      if constexpr (F::kProduct == Product::kS8) {
        mma_s8(acc, a_operand, b_operand);
      } else {
        mma_bf16<F::kMnA, F::kMnB>(acc, a_operand, b_operand);
      }
    }
    mma_commit();
    mma_wait<1>();  // the stage before this one has been read
    if (block > 0 && threadIdx.x % 32 == 0) barrier_arrive(&ring.empty[(step - 1) % F::kStages]);
  }
  mma_wait<0>();
  pin(acc);
  if (blocks > 0 && threadIdx.x % 32 == 0) barrier_arrive(&ring.empty[(step - 1) % F::kStages]);
}

// e4m3: the sum over 128 of K is scaled and added to float32 registers, half of the columns at a time, since both
// halves' sums and products do not fit. While one warpgroup adds, the other one's products keep the tensor cores busy.
template <class F>
__device__ __forceinline__ void multiply_scaled(const Problem& p, const Tile& tile, Ring& ring, uint8_t* stages,
                                                uint32_t& step, float (&total)[F::kAccumulators]) {
  constexpr int kHalf = F::kAccumulators / 2;
  const int consumer = threadIdx.x / 128, thread = threadIdx.x % 128;
  const int32_t blocks = ceil_div(p.inner, 128), n_blocks = ceil_div(p.columns, 128);
  // Scales of the two rows of this thread; of a row past the end, those of a row that is there.
  const float* a_scale[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int32_t row = tile.row + consumer * kMmaRows + accumulator_row(thread, half);
    a_scale[half] = p.a_scale + static_cast<int64_t>(row < p.rows ? row : p.rows - 1) * blocks;
  }
  // Likewise for a half of the columns that is past the end.
  const float* b_scale[2];
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    const int32_t n_block = tile.n / 128 + side;
    b_scale[side] =
        p.b_scale + (static_cast<int64_t>(tile.group) * n_blocks + (n_block < n_blocks ? n_block : 0)) * blocks;
  }
#pragma unroll
  for (int i = 0; i < F::kAccumulators; ++i) total[i] = 0;
  float acc[kHalf] = {};  // here, not in the loop: 64 zeros a round would push the rest out of the registers
  for (int32_t block = 0; block < blocks; ++block, ++step) {
    const uint32_t stage = step % F::kStages;
    const uint32_t a = shared_address(stages + stage * F::kStageBytes), b = a + F::kABytes;
    const float rows[2] = {__ldg(a_scale[0] + block), __ldg(a_scale[1] + block)};
    const float sides[2] = {__ldg(b_scale[0] + block), __ldg(b_scale[1] + block)};
    barrier_wait(&ring.full[stage], step / F::kStages & 1);
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      mma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        mma_e4m3(acc, operand(false, a, consumer * kMmaRows, k), operand(false, b, side * 128, k), k > 0);
      }
      mma_commit();
      mma_wait<0>();
      pin(acc);
      if (side == 1 && threadIdx.x % 32 == 0) barrier_arrive(&ring.empty[stage]);
      const float scale[2] = {rows[0] * sides[side], rows[1] * sides[side]};
#pragma unroll
      for (int i = 0; i < kHalf; ++i) total[side * kHalf + i] += acc[i] * scale[i / 2 % 2];
      pin(total);  // else the next products start first, and two sets of accumulators do not fit
    }
  }
}

template <class F>
__device__ __forceinline__ void consume(const Problem& p, const GroupTable& table, Ring& ring, uint8_t* stages) {
  const int consumer = threadIdx.x / 128;
  uint32_t step = 0;
  const int64_t tiles = tile_count<F>(p, table);
  for (int64_t index = blockIdx.x; index < tiles; index += gridDim.x) {
    const Tile tile = tile_at<F>(p, table, index);
    const int32_t valid = tile.m_valid - consumer * kMmaRows;
    if (F::kProduct != Product::kTgmm && valid <= 0) {  // in tgmm both warpgroups mask the stages
      skip<F>(ring, step, k_blocks<F>(p, tile));
      continue;
    }
    const int64_t row = tile.m + consumer * kMmaRows;
    if constexpr (F::kProduct == Product::kE4m3) {
      float acc[F::kAccumulators];
      multiply_scaled<F>(p, tile, ring, stages, step, acc);
      store<F>(p, p.out, row, valid, tile.n, [&](int chunk, int half, int c) { return acc[4 * chunk + 2 * half + c]; });
    } else if constexpr (F::kProduct == Product::kS8) {
      int32_t acc[F::kAccumulators];
      multiply<F>(p, tile, ring, stages, step, acc);
      const int thread = threadIdx.x % 128;
      float rows[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t r = row + accumulator_row(thread, half);
        rows[half] = __ldg(p.a_scale + (r < p.rows ? r : p.rows - 1));
      }
      const float* b_scale = p.b_scale + static_cast<int64_t>(tile.group) * p.columns;
      store<F>(p, p.out, row, valid, tile.n, [&](int chunk, int half, int c) {
        const int32_t column = tile.n + accumulator_column(thread, chunk) + c;
        return static_cast<float>(acc[4 * chunk + 2 * half + c]) *
               (rows[half] * __ldg(b_scale + (column < p.columns ? column : 0)));
      });
    } else {
      float acc[F::kAccumulators];
      multiply<F>(p, tile, ring, stages, step, acc);
      void* out = p.out;
      if constexpr (F::kProduct == Product::kTgmm) {
        out = static_cast<uint8_t*>(out) +
              static_cast<int64_t>(tile.group) * p.inner * p.columns * (p.out_dtype == MJK_BF16 ? 2 : 4);
      }
      store<F>(p, out, row, valid, tile.n, [&](int chunk, int half, int c) { return acc[4 * chunk + 2 * half + c]; });
    }
  }
  if constexpr (F::kProduct != Product::kTgmm) {
    zero_outside(p, table, static_cast<int64_t>(blockIdx.x) * F::kConsumerThreads + threadIdx.x,
                 static_cast<int64_t>(gridDim.x) * F::kConsumerThreads);
  }
}

template <class F>
__global__ void __launch_bounds__(F::kThreads, 1)
    grouped_product(const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map,
                    const __grid_constant__ Problem p) {
  MJK_DYNAMIC_SHARED(dynamic);
  __shared__ GroupTable table;
  __shared__ Ring ring;
  static_assert(F::kStages <= 8 && F::kStages >= 2);
  uint8_t* stages = dynamic + (kAtom - shared_address(dynamic) % kAtom) % kAtom;

  const int warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 32, 0);  // the same in all lanes, and the compiler knows
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < F::kStages; ++stage) {
      barrier_init(&ring.full[stage], 1);
      barrier_init(&ring.empty[stage], F::kConsumers * 4);
    }
    barrier_init_fence();
    async_proxy_fence();
  }
  if (warp == 0) build_table<F::kBM>(p, table);
  __syncthreads();

  // Two consumers: 65,536 registers / 384 threads = 168 at entry; 40 + 2 * 232 = 3 * 168.
  if (warp >= F::kConsumers * 4) {
    if constexpr (F::kConsumers == 2) give_registers<40>();
    if (warp == F::kConsumers * 4 && threadIdx.x % 32 == 0) {
      produce<F>(&a_map, &b_map, p, table, ring, shared_address(stages));
    }
  } else {
    if constexpr (F::kConsumers == 2) take_registers<232>();
    consume<F>(p, table, ring, stages);
  }
}

// ---- host

// cuTensorMapEncodeTiled through the runtime, so that the library needs no libcuda to link or to load.
using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* pointer = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &pointer, 12000, cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<EncodeTiled>(pointer)
                                                                        : nullptr;
  }();
  return function;
}

// A map of [depth, height, width] elements (depth 0: [height, width]) whose boxes are 128 bytes by `box_rows`.
int encode(CUtensorMap* map, int element, const void* base, int64_t width, int64_t height, int64_t depth,
           int box_rows) {
  const EncodeTiled function = encode_tiled();
  if (function == nullptr) return fail(MJK_UNSUPPORTED, "the driver has no cuTensorMapEncodeTiled");
  const cuuint64_t extents[3] = {cuuint64_t(width), cuuint64_t(height), cuuint64_t(depth)};
  const cuuint64_t strides[2] = {cuuint64_t(width * element), cuuint64_t(width * height * element)};
  const cuuint32_t box[3] = {cuuint32_t(kLine / element), cuuint32_t(box_rows), 1};
  const cuuint32_t steps[3] = {1, 1, 1};
  const CUresult result =
      function(map, element == 2 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_UINT8, depth > 0 ? 3 : 2,
               const_cast<void*>(base), extents, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return MJK_OK;
  return fail(MJK_LAUNCH_FAILED, "cuTensorMapEncodeTiled of [%lld, %lld, %lld] returned %d",
              static_cast<long long>(depth), static_cast<long long>(height), static_cast<long long>(width),
              static_cast<int>(result));
}

template <class F>
int launch(void* stream, const Problem& p) {
  Device device;
  if (const int status = current_device(&device)) return status;
  CUtensorMap a_map, b_map;
  int status;
  if (F::kProduct == Product::kTgmm) {
    status = encode(&a_map, F::kElement, p.a, p.inner, p.rows, 0, 64);
    if (!status) status = encode(&b_map, F::kElement, p.b, p.columns, p.rows, 0, 64);
  } else {
    status = encode(&a_map, F::kElement, p.a, p.inner, p.rows, 0, F::kARows);
    if (!status) {
      status = F::kMnB ? encode(&b_map, F::kElement, p.b, p.columns, p.inner, p.groups, 64)
                       : encode(&b_map, F::kElement, p.b, p.inner, p.columns, p.groups, F::kBN);
    }
  }
  if (status) return status;
  // At most one tile per group more than the rows need.
  const int64_t down = F::kProduct == Product::kTgmm ? static_cast<int64_t>(p.groups) * ceil_div(p.inner, F::kBM)
                                                     : ceil_div(p.rows, F::kBM) + static_cast<int64_t>(p.groups);
  const int64_t tiles = down * ceil_div(p.columns, F::kBN);
  const int blocks = static_cast<int>(tiles < device.multiprocessors ? tiles : device.multiprocessors);
  auto* kernel = &grouped_product<F>;
  const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                 cudaFuncAttributeMaxDynamicSharedMemorySize, F::kSharedBytes);
  if (error != cudaSuccess) return fail(MJK_LAUNCH_FAILED, "cudaFuncSetAttribute: %s", cudaGetErrorString(error));
  MJK_LAUNCH(kernel, blocks, F::kThreads, F::kSharedBytes, stream, a_map, b_map, p);
  return launched("grouped_product");
}

}  // namespace

bool tensor_cores_fit(const Problem& p) {
  const int64_t element = size_of(p.in_dtype);
  return p.in_dtype != MJK_F32 && p.inner * element % 16 == 0 && p.columns % 8 == 0 && aligned(p.a, 16) &&
         aligned(p.b, 16) && aligned(p.out, 16);
}

int launch_tensor_cores(void* stream, const Problem& p, bool decode) {
  switch (p.product) {
    case Product::kGmm:
      return decode ? launch<Form<Product::kGmm, 1, 128>>(stream, p) : launch<Form<Product::kGmm, 2, 256>>(stream, p);
    case Product::kGmmT:
      return launch<Form<Product::kGmmT, 2, 256>>(stream, p);
    case Product::kTgmm:
      return launch<Form<Product::kTgmm, 2, 256>>(stream, p);
    case Product::kE4m3:
      return launch<Form<Product::kE4m3, 2, 256>>(stream, p);
    case Product::kS8:
      return launch<Form<Product::kS8, 2, 256>>(stream, p);
  }
  return fail(MJK_INVALID_ARGUMENT, "unknown product");
}

}  // namespace mjk
