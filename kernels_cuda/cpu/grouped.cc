// The grouped products: groups are cut into blocks, which the threads of a pool take one by one.
#include <cstring>

#include "items.h"
#include "launch_cpu.h"

namespace mindjax {
namespace {

enum class Product { kGmm, kGmmT, kTgmm };

// A call, in the terms of launch.h; k and n are those of w[G, K, N].
struct Call {
  Product product;
  mjk_dtype in, out;
  bool accumulate;
  int64_t rows, k, n, groups;
  const char *x, *w;  // tgmm: x and g
  char* result;
  const float* bias = nullptr;  // of gmm, for all groups
};

int64_t bytes(mjk_dtype type) { return type == MJK_F32 ? 4 : type == MJK_BF16 ? 2 : 1; }

constexpr int64_t kFewF32Rows = 48;  // of the tallest group; it is the call that decides, whatever the threads

int64_t tallest_group(const std::vector<int64_t>& starts) {
  int64_t tallest = 0;
  for (size_t g = 0; g + 1 < starts.size(); ++g) tallest = std::max(tallest, starts[g + 1] - starts[g]);
  return tallest;
}

// How a call is cut: into items, numbered from 0, that any thread can do in any order with the same result.
class Plan {
 public:
  Plan(const Call& call, const Kernels& kernels, std::vector<int64_t> starts, int64_t threads)
      : call_(call), kernels_(kernels), starts_(std::move(starts)) {
    const bool tgmm = call.product == Product::kTgmm;
    past_caches_ = tgmm && !call.accumulate && call.groups * call.k * call.n * bytes(call.out) > kCaches;
    width_ = call.product == Product::kGmmT ? call.k : call.n;
    const int64_t tallest = tallest_group(starts_), height = tgmm ? call.k : tallest;
    const int64_t contracted = tgmm ? tallest : call.product == Product::kGmmT ? call.n : call.k;
    const bool few_rows = !tgmm && tallest <= kFewRows && call.product == Product::kGmm;
    const bool tall = few_rows && kernels.tall_columns && starts_[call.groups] - starts_[0] > kWideRows * call.groups &&
                      call.groups * blocks(width_, kernels.tall_columns) >= 3 * threads;
    const int64_t widest = tall ? kernels.tall_columns : 2048;
    // Few rows: the time is that of reading w, which is fastest in order, whole rows of it.
    // tgmm packs both sides: a shallower part is packed fewer times.
    depth_ = few_rows ? 256 : tgmm ? std::min<int64_t>(kernels.depth, 1024) : kernels.depth;
    block_n_ = even_blocks(width_, few_rows ? widest : kPackedBytes / (std::min(contracted, depth_) * kernels.packed + 1),
                           kernels.columns);
    block_m_ = even_blocks(height, contracted > depth_ ? 512 : 2048, kernels.rows);
    // Enough items that threads end together, unless they would get tiny.
    // One each where memory is the limit, as the longer a row that a thread reads, the faster, and where both sides are
    // packed, as each item does so anew.
    const bool streamed = few_rows && tallest <= kernels.streamed_rows;
    const int64_t wanted = threads == 1 ? 1 : streamed || tgmm ? threads : 2 * threads;
    while (count() < wanted) {
      if (block_m_ >= block_n_ && block_m_ > 2 * kernels.rows)
        block_m_ = even_blocks(block_m_, block_m_ / 2, kernels.rows);
      else if (block_n_ > 2 * kernels.columns)
        block_n_ = even_blocks(block_n_, block_n_ / 2, kernels.columns);
      else
        break;
    }
    count();
    scratch_ = kernels.scratch(block_m_, block_n_, contracted, depth_);
    if (!tgmm) {  // rows of no group
      zero_items_ = blocks(starts_[0], kZeroRows) + blocks(call.rows - starts_[call.groups], kZeroRows);
    }
  }

  int64_t items() const { return first_item_.back() + zero_items_; }
  size_t scratch() const { return scratch_; }
  double work() const {
    return 2.0 * double(starts_[call_.groups] - starts_[0]) * double(call_.k) * double(call_.n);
  }

  void run(int64_t item, char* scratch) const {
    if (item >= first_item_.back()) return zero(item - first_item_.back());
    const int64_t group = std::upper_bound(first_item_.begin(), first_item_.end(), item) - first_item_.begin() - 1;
    const int64_t start = starts_[group], size = starts_[group + 1] - start;
    const int64_t in = bytes(call_.in), out = bytes(call_.out), k = call_.k, n = call_.n;
    Block b = {};
    b.in = call_.in;
    b.out = call_.out;
    b.accumulate = call_.accumulate;
    b.past_caches = past_caches_;
    b.depth = depth_;
    const int64_t height = call_.product == Product::kTgmm ? k : size, tall = blocks(height, block_m_);
    const int64_t inside = item - first_item_[group];
    const int64_t m0 = inside % tall * block_m_, n0 = inside / tall * block_n_;
    b.m = std::min(block_m_, height - m0);
    b.n = std::min(block_n_, width_ - n0);
    const char* w = call_.w + group * k * n * in;
    switch (call_.product) {
      case Product::kGmm:
        b.k = k, b.lda = k, b.ldb = n, b.ldc = n;
        b.a = call_.x + (start + m0) * k * in;
        b.b = w + n0 * in;
        b.c = call_.result + ((start + m0) * n + n0) * out;
        if (call_.bias) b.bias = call_.bias + n0;
        break;
      case Product::kGmmT:
        b.k = n, b.lda = n, b.ldb = n, b.ldc = k;
        b.b_transposed = true;
        b.a = call_.x + (start + m0) * n * in;
        b.b = w + n0 * n * in;
        b.c = call_.result + ((start + m0) * k + n0) * out;
        break;
      case Product::kTgmm:
        b.k = size, b.lda = k, b.ldb = n, b.ldc = n;
        b.a_transposed = true;
        b.a = call_.x + (start * k + m0) * in;
        b.b = call_.w + (start * n + n0) * in;
        b.c = call_.result + (group * k * n + m0 * n + n0) * out;
        break;
    }
    kernels_.multiply(b, scratch);
  }

 private:
  static constexpr int64_t kZeroRows = 256, kFewRows = 256, kWideRows = 48, kPackedBytes = 1 << 20, kCaches = 32 << 20;

  static int64_t even_blocks(int64_t size, int64_t most, int64_t unit) {
    const int64_t parts = std::max<int64_t>(1, blocks(size, std::max(unit, most)));
    return std::max(unit, blocks(blocks(size, parts), unit) * unit);
  }

  // Numbers the items; returns how many there are.
  int64_t count() {
    first_item_.assign(1, 0);
    for (int64_t g = 0; g < call_.groups; ++g) {
      const int64_t size = starts_[g + 1] - starts_[g], height = call_.product == Product::kTgmm ? call_.k : size;
      first_item_.push_back(first_item_.back() + blocks(height, block_m_) * blocks(width_, block_n_));
    }
    return first_item_.back();
  }

  void zero(int64_t i) const {
    const int64_t before = blocks(starts_[0], kZeroRows), row = width_ * bytes(call_.out);
    int64_t first, end;
    if (i < before) {
      first = i * kZeroRows, end = std::min(first + kZeroRows, starts_[0]);
    } else {
      first = starts_[call_.groups] + (i - before) * kZeroRows, end = std::min(first + kZeroRows, call_.rows);
    }
    std::memset(call_.result + first * row, 0, size_t((end - first) * row));
  }

  const Call call_;
  const Kernels& kernels_;
  const std::vector<int64_t> starts_;  // [groups + 1], of this call's groups
  std::vector<int64_t> first_item_;    // [groups + 1]
  int64_t width_, block_m_, block_n_, depth_, zero_items_ = 0;
  bool past_caches_;
  size_t scratch_;
};

int run(const mjk_pool* pool, const Call& call, int64_t groups_total, int64_t group_offset,
        const int32_t* group_sizes) {
  if (call.in != MJK_F32 && call.in != MJK_BF16) return fail(MJK_UNSUPPORTED, "inputs must be float32 or bfloat16");
  if (call.out != MJK_F32 && call.out != MJK_BF16) return fail(MJK_UNSUPPORTED, "the result must be float32 or bfloat16");
  if (call.accumulate && call.out != MJK_F32) return fail(MJK_INVALID_ARGUMENT, "accumulate takes a float32 result");
  if (call.k < 0 || call.n < 0) return fail(MJK_INVALID_ARGUMENT, "sizes must not be negative");
  std::vector<int64_t> starts;
  if (int status = group_starts(call.rows, call.groups, groups_total, group_offset, group_sizes, starts)) return status;
  const Kernels& f32 = tallest_group(starts) > kFewF32Rows ? *isa().f32 : *isa().f32_few;
  const Kernels& kernels = call.in == MJK_F32 ? f32 : *isa().bf16;
  const Plan plan(call, kernels, std::move(starts), pool ? pool->threads : 1);
  // Waking a thread costs microseconds.
  const int64_t workers = !pool || plan.work() < 6e5 ? 1 : pool->threads;
  return run_items(pool, workers, plan.items(), plan.scratch(), kernels,
                   [&plan](int64_t item, char* scratch) { plan.run(item, scratch); });
}

}  // namespace
}  // namespace mindjax

using mindjax::Call;
using mindjax::Product;

extern "C" {

int mjk_gmm(void* stream, mjk_dtype in_dtype, mjk_dtype out_dtype, int64_t rows, int64_t k, int64_t n, int64_t groups,
            int64_t groups_total, int64_t group_offset, const void* x, const void* w, const int32_t* group_sizes,
            void* out) {
  const Call call = {Product::kGmm, in_dtype, out_dtype, false, rows, k, n, groups, static_cast<const char*>(x),
                     static_cast<const char*>(w), static_cast<char*>(out)};
  return mindjax::run(static_cast<const mjk_pool*>(stream), call, groups_total, group_offset, group_sizes);
}

int mjk_linear(void* stream, mjk_dtype dtype, int64_t rows, int64_t k, int64_t n, const void* x, const void* w,
               const float* bias, void* out) {
  const Call call = {Product::kGmm, dtype, dtype, false, rows, k, n, 1, static_cast<const char*>(x),
                     static_cast<const char*>(w), static_cast<char*>(out), bias};
  const int32_t size = int32_t(rows);
  return mindjax::run(static_cast<const mjk_pool*>(stream), call, 1, 0, &size);
}

int mjk_gmm_t(void* stream, mjk_dtype in_dtype, mjk_dtype out_dtype, int64_t rows, int64_t k, int64_t n, int64_t groups,
              int64_t groups_total, int64_t group_offset, const void* g, const void* w, const int32_t* group_sizes,
              void* out) {
  const Call call = {Product::kGmmT, in_dtype, out_dtype, false, rows, k, n, groups, static_cast<const char*>(g),
                     static_cast<const char*>(w), static_cast<char*>(out)};
  return mindjax::run(static_cast<const mjk_pool*>(stream), call, groups_total, group_offset, group_sizes);
}

int mjk_tgmm(void* stream, mjk_dtype in_dtype, mjk_dtype out_dtype, int32_t accumulate, int64_t rows, int64_t k,
             int64_t n, int64_t groups, int64_t groups_total, int64_t group_offset, const void* x, const void* g,
             const int32_t* group_sizes, void* out) {
  const Call call = {Product::kTgmm, in_dtype, out_dtype, accumulate != 0, rows, k, n, groups,
                     static_cast<const char*>(x), static_cast<const char*>(g), static_cast<char*>(out)};
  return mindjax::run(static_cast<const mjk_pool*>(stream), call, groups_total, group_offset, group_sizes);
}

int mjk_gmm_decode(void* stream, mjk_dtype in_dtype, mjk_dtype out_dtype, int64_t rows, int64_t k, int64_t n,
                   int64_t groups, int64_t groups_total, int64_t group_offset, const void* x, const void* w,
                   const int32_t* group_sizes, void* out) {
  return mjk_gmm(stream, in_dtype, out_dtype, rows, k, n, groups, groups_total, group_offset, x, w, group_sizes, out);
}

}  // extern "C"
