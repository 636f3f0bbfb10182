// The three products by CUTLASS's grouped GEMM: code that shares nothing with gmm.cu, to check it and to compare with
// it. bf16 in and out. Built where CUTLASS's headers are (-DMINDJAX_CUTLASS=.../include).
//
// CUTLASS takes arrays of pointers and shapes, one per group, which a small kernel writes from group_sizes on the
// device. They and the workspace are allocated at a device's first call and shared by all: calls must not overlap on
// two streams, and the first one cannot be captured into a graph.
#include <cuda_bf16.h>

#include <map>
#include <mutex>

#include "cute/tensor.hpp"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/group_array_problem_shape.hpp"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "status.h"
#include "table.cuh"
#include "tiles.h"

namespace mjk {
namespace {

using Element = cutlass::bfloat16_t;
using Shapes = cutlass::gemm::GroupProblemShape<cute::Shape<int, int, int>>;  // M, N, K of each group
using Row = cutlass::layout::RowMajor;
using Column = cutlass::layout::ColumnMajor;

// The epilogue is the same for all three. At namespace scope: inside the template nvcc writes it wrongly for the host.
using TileShape = cute::Shape<cute::_128, cute::_256, cute::_64>;
using ClusterShape = cute::Shape<cute::_2, cute::_1, cute::_1>;
using Epilogue = cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, TileShape, ClusterShape,
    cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, Row*, 8, Element, Row*, 8,
    cutlass::epilogue::PtrArrayTmaWarpSpecializedCooperative,
    cutlass::epilogue::fusion::LinearCombination<Element, float, void>>::CollectiveOp;
constexpr int kEpilogueBytes = static_cast<int>(sizeof(Epilogue::SharedStorage));

template <class LayoutA, class LayoutB>
struct Grouped {
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, LayoutA*, 8, Element, LayoutB*, 8, float, TileShape,
      ClusterShape, cutlass::gemm::collective::StageCountAutoCarveout<kEpilogueBytes>,
      cutlass::gemm::KernelPtrArrayTmaWarpSpecializedCooperative>::CollectiveOp;
  using GemmKernel = cutlass::gemm::kernel::GemmUniversal<Shapes, Mainloop, Epilogue>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<GemmKernel>;
  using StrideA = typename GemmKernel::InternalStrideA;
  using StrideB = typename GemmKernel::InternalStrideB;
  using StrideD = typename GemmKernel::InternalStrideD;
};

using Gmm = Grouped<Row, Row>;
using GmmT = Grouped<Row, Column>;
using Tgmm = Grouped<Column, Row>;

// One entry per group; strides are CUTLASS's own types of one int64.
struct Groups {
  typename Shapes::UnderlyingProblemShape shape[kMaxGroups];
  const Element* a[kMaxGroups];
  const Element* b[kMaxGroups];
  Element* d[kMaxGroups];
  int64_t a_stride[kMaxGroups], b_stride[kMaxGroups], d_stride[kMaxGroups];
};

__global__ void describe(const __grid_constant__ Problem p, Groups* groups) {
  __shared__ GroupTable table;
  if (threadIdx.x < 32) build_table<64>(p, table);
  __syncthreads();
  const auto* a = static_cast<const Element*>(p.a);
  const auto* b = static_cast<const Element*>(p.b);
  auto* d = static_cast<Element*>(p.out);
  for (int64_t g = threadIdx.x; g < p.groups; g += blockDim.x) {
    const int64_t row = table.row[g];
    const int rows = table.row[g + 1] - table.row[g];
    const bool tgmm = p.product == Product::kTgmm;
    groups->a[g] = a + row * p.inner;
    groups->a_stride[g] = p.inner;
    if (tgmm) {  // no rows: no tiles; the output is zeroed before
      groups->shape[g] = cute::make_shape(rows > 0 ? p.inner : 0, p.columns, rows);
      groups->b[g] = b + row * p.columns;
      groups->b_stride[g] = p.columns;
      groups->d[g] = d + g * p.inner * p.columns;
    } else {
      groups->shape[g] = cute::make_shape(rows, p.columns, p.inner);
      groups->b[g] = b + g * p.inner * p.columns;
      groups->b_stride[g] = p.product == Product::kGmm ? p.columns : p.inner;
      groups->d[g] = d + row * p.columns;
    }
    groups->d_stride[g] = p.columns;
  }
}

struct Buffers {
  Groups* groups = nullptr;
  void* workspace = nullptr;
  size_t workspace_bytes = 0;
};

template <class K>
int launch(void* stream, const Problem& p) {
  using Gemm = typename K::Gemm;
  static_assert(sizeof(typename K::StrideA) == 8 && sizeof(typename K::StrideB) == 8 &&
                sizeof(typename K::StrideD) == 8);
  Device device;
  if (const int status = current_device(&device)) return status;
  auto* cuda_stream = static_cast<cudaStream_t>(stream);
  int number = 0;
  cudaGetDevice(&number);

  static std::mutex mutex;
  static std::map<int, Buffers> all_buffers;
  const std::lock_guard<std::mutex> lock(mutex);
  Buffers& buffers = all_buffers[number];
  if (!buffers.groups && cudaMalloc(&buffers.groups, sizeof(Groups)) != cudaSuccess) return launched("cudaMalloc");

  const int64_t out_rows = p.product == Product::kTgmm ? static_cast<int64_t>(p.groups) * p.inner : p.rows;
  if (const int status = fill_zero(stream, p.out, out_rows * p.columns * 2)) return status;
  describe<<<1, 256, 0, cuda_stream>>>(p, buffers.groups);
  if (const int status = launched("describe")) return status;

  Groups* g = buffers.groups;
  typename Gemm::Arguments arguments{
      cutlass::gemm::GemmUniversalMode::kGrouped,
      {p.groups, g->shape, nullptr},
      {const_cast<const Element**>(g->a), reinterpret_cast<typename K::StrideA*>(g->a_stride),
       const_cast<const Element**>(g->b), reinterpret_cast<typename K::StrideB*>(g->b_stride)},
      {{}, nullptr, nullptr, g->d, reinterpret_cast<typename K::StrideD*>(g->d_stride)},
      {number, device.multiprocessors}};
  arguments.epilogue.thread.alpha = 1.0f;
  arguments.epilogue.thread.beta = 0.0f;
  const size_t bytes = Gemm::get_workspace_size(arguments);
  if (bytes > buffers.workspace_bytes) {
    cudaFree(buffers.workspace);
    if (cudaMalloc(&buffers.workspace, bytes) != cudaSuccess) return launched("cudaMalloc");
    buffers.workspace_bytes = bytes;
  }
  Gemm gemm;
  cutlass::Status status = gemm.can_implement(arguments);
  if (status == cutlass::Status::kSuccess) status = gemm.initialize(arguments, buffers.workspace, cuda_stream);
  if (status == cutlass::Status::kSuccess) status = gemm.run(cuda_stream);
  if (status == cutlass::Status::kSuccess) return launched("CUTLASS");
  return fail(MJK_LAUNCH_FAILED, "CUTLASS: %s", cutlass::cutlassGetStatusString(status));
}

}  // namespace

int launch_cutlass(void* stream, const Problem& p) {
  if (p.in_dtype != MJK_BF16 || p.out_dtype != MJK_BF16 || p.accumulate || !tensor_cores_fit(p)) {
    return fail(MJK_UNSUPPORTED, "the CUTLASS check takes bfloat16 in and out, sizes that are multiples of 8");
  }
  if (p.product == Product::kGmm) return launch<Gmm>(stream, p);
  return p.product == Product::kGmmT ? launch<GmmT>(stream, p) : launch<Tgmm>(stream, p);
}

}  // namespace mjk
