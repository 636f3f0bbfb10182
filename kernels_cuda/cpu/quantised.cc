// The quantised products: a run of k that is exact or shares its scales goes through the bfloat16 product, which holds
// both kinds of inputs exactly, and is then promoted.
//
// E4M3: runs of 128, added in float32 after their scales. S8: runs of 1024, whose sums are integers below 2^24 and so
// exact in float32, added as int32.
#include <cstring>

#include "items.h"
#include "portable.h"

namespace mindjax {
namespace {

struct Quantised {
  mjk_dtype in, out;
  int64_t rows, k, n, groups;
  const uint8_t* x;
  const float* xs;
  const uint8_t* w;  // [G, N, K]
  const float* ws;
  char* result;
};

// The bfloat16 of each byte.
struct Table {
  uint16_t of[256];
  explicit Table(mjk_dtype type) {
    for (int i = 0; i < 256; ++i) {
      float value;
      if (type == MJK_S8) {
        value = float(int8_t(i));
      } else {
        const int exponent = (i >> 3) & 15, mantissa = i & 7;
        value = exponent ? float(8 + mantissa) * float(1 << exponent) / 1024.f : float(mantissa) / 512.f;
        if ((i & 127) == 127) value = __builtin_nanf("");
        if (i & 128) value = -value;
      }
      of[i] = narrow(value);
    }
  }
};

const Table& table(mjk_dtype type) {
  static const Table e4m3(MJK_E4M3), s8(MJK_S8);
  return type == MJK_S8 ? s8 : e4m3;
}

constexpr int64_t kRows = 128, kColumns = 256;  // of an item

int64_t run_of(mjk_dtype type) { return type == MJK_S8 ? 1024 : 128; }

// An item's scratch, in front of what the bfloat16 product takes.
struct Parts {
  size_t a, b, part, sums, product;
  explicit Parts(int64_t run) {
    a = 0;
    b = a + size_t(kRows * run) * 2;
    part = b + size_t(kColumns * run) * 2;
    sums = part + size_t(kRows * kColumns) * 4;
    product = sums + size_t(kRows * kColumns) * 4;
  }
};

void widen_bytes(const uint16_t* of, const uint8_t* from, int64_t stride, int64_t rows, int64_t run, uint16_t* to) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t k = 0; k < run; ++k) to[i * run + k] = of[from[i * stride + k]];
}

void multiply(const Quantised& q, const Kernels& kernels, int64_t group, int64_t row, int64_t m, int64_t n0, int64_t n,
              char* scratch) {
  const int64_t run = run_of(q.in), scale_rows = blocks(q.n, 128), scale_columns = blocks(q.k, 128);
  const Parts parts(run);
  uint16_t* a = reinterpret_cast<uint16_t*>(scratch + parts.a);
  uint16_t* b = reinterpret_cast<uint16_t*>(scratch + parts.b);
  float* part = reinterpret_cast<float*>(scratch + parts.part);
  float* sums = reinterpret_cast<float*>(scratch + parts.sums);  // of S8: int32
  int32_t* integers = reinterpret_cast<int32_t*>(scratch + parts.sums);
  std::memset(sums, 0, size_t(m * n) * 4);
  const uint8_t *x = q.x + row * q.k, *w = q.w + (group * q.n + n0) * q.k;
  for (int64_t k0 = 0; k0 < q.k; k0 += run) {
    const int64_t size = std::min(run, q.k - k0);
    widen_bytes(table(q.in).of, x + k0, q.k, m, size, a);
    widen_bytes(table(q.in).of, w + k0, q.k, n, size, b);
    Block block = {};
    block.in = MJK_BF16, block.out = MJK_F32, block.b_transposed = true;
    block.a = a, block.b = b, block.c = part;
    block.lda = block.ldb = size, block.ldc = n;
    block.m = m, block.n = n, block.k = size, block.depth = size;
    kernels.multiply(block, scratch + parts.product);
    for (int64_t i = 0; i < m; ++i) {
      if (q.in == MJK_S8) {
        for (int64_t j = 0; j < n; ++j) integers[i * n + j] += int32_t(part[i * n + j]);
        continue;
      }
      const float xs = q.xs[(row + i) * scale_columns + k0 / 128];
      const float* ws = q.ws + group * scale_rows * scale_columns + k0 / 128;
      for (int64_t j = 0; j < n;) {
        const float scale = xs * ws[(n0 + j) / 128 * scale_columns];
        const int64_t end = std::min(n, ((n0 + j) / 128 + 1) * 128 - n0);
        for (; j < end; ++j) sums[i * n + j] += part[i * n + j] * scale;
      }
    }
  }
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      const float value =
          q.in == MJK_S8 ? float(integers[i * n + j]) * (q.xs[row + i] * q.ws[group * q.n + n0 + j]) : sums[i * n + j];
      const int64_t at = (row + i) * q.n + n0 + j;
      if (q.out == MJK_BF16)
        reinterpret_cast<uint16_t*>(q.result)[at] = narrow(value);
      else
        reinterpret_cast<float*>(q.result)[at] = value;
    }
  }
}

// Few rows of int8 with an instruction for them: an item is a run of a group's outputs.
int run_few(const mjk_pool* pool, const Quantised& q, const S8Kernels& s8, const std::vector<int64_t>& starts) {
  std::vector<int64_t> used;
  for (int64_t g = 0; g < q.groups; ++g)
    if (starts[size_t(g + 1)] > starts[size_t(g)]) used.push_back(g);
  const int64_t threads = pool ? pool->threads : 1, groups = int64_t(used.size());
  const int64_t parts = groups >= 3 * threads ? 1 : groups > 1 ? threads : std::min(threads, blocks(q.n, 32));
  const int64_t part = blocks(blocks(q.n, parts), 32) * 32, across = blocks(q.n, part);
  const auto item = [&](int64_t i, char* memory) {
    const int64_t group = used[size_t(i / across)], n0 = i % across * part, row = starts[size_t(group)];
    S8Block block = {};
    block.x = reinterpret_cast<const int8_t*>(q.x) + row * q.k;
    block.w = reinterpret_cast<const int8_t*>(q.w) + (group * q.n + n0) * q.k;
    block.xs = q.xs + row;
    block.ws = q.ws + group * q.n + n0;
    block.m = starts[size_t(group + 1)] - row, block.n = std::min(part, q.n - n0), block.k = q.k, block.ldc = q.n;
    block.out = q.out;
    block.result = q.result + (row * q.n + n0) * (q.out == MJK_F32 ? 4 : 2);
    s8.multiply(block, memory);
  };
  return run_items(pool, threads, groups * across, s8.scratch(s8.rows, q.k), *isa().bf16, item);
}

int run(const mjk_pool* pool, const Quantised& q, int64_t groups_total, int64_t group_offset,
        const int32_t* group_sizes) {
  if (q.out != MJK_F32 && q.out != MJK_BF16) return fail(MJK_UNSUPPORTED, "the result must be float32 or bfloat16");
  std::vector<int64_t> starts, first(1, 0);
  if (int status = group_starts(q.rows, q.groups, groups_total, group_offset, group_sizes, starts)) return status;
  const int64_t row = q.n * (q.out == MJK_F32 ? 4 : 2), across = blocks(q.n, kColumns);
  std::memset(q.result, 0, size_t(starts.front() * row));
  std::memset(q.result + starts.back() * row, 0, size_t((q.rows - starts.back()) * row));
  int64_t tallest = 0;
  for (int64_t g = 0; g < q.groups; ++g) tallest = std::max(tallest, starts[size_t(g + 1)] - starts[size_t(g)]);
  const bool whole = q.in == MJK_S8 && q.n % 16 == 0 && q.k % 64 == 0 && q.n * q.k > 0;
  const S8Kernels* s8 = whole ? isa().s8 : nullptr;
  if (s8 && tallest <= s8->rows) return run_few(pool, q, *s8, starts);
  for (int64_t g = 0; g < q.groups; ++g)
    first.push_back(first.back() + blocks(starts[size_t(g + 1)] - starts[size_t(g)], kRows) * across);
  const Kernels& kernels = *isa().bf16;
  const int64_t depth = run_of(q.in);
  const size_t scratch = Parts(depth).product + kernels.scratch(kRows, kColumns, depth, depth);
  const auto item = [&](int64_t i, char* memory) {
    const int64_t group = std::upper_bound(first.begin(), first.end(), i) - first.begin() - 1;
    const int64_t inside = i - first[size_t(group)], end = starts[size_t(group + 1)];
    const int64_t m0 = starts[size_t(group)] + inside / across * kRows, n0 = inside % across * kColumns;
    multiply(q, kernels, group, m0, std::min(kRows, end - m0), n0, std::min(kColumns, q.n - n0), memory);
  };
  return run_items(pool, pool ? pool->threads : 1, first.back(), scratch, kernels, item);
}

}  // namespace
}  // namespace mindjax

extern "C" {

int mjk_gmm_fp8(void* stream, mjk_dtype out_dtype, int64_t rows, int64_t k, int64_t n, int64_t groups,
                int64_t groups_total, int64_t group_offset, const void* x, const float* xs, const void* w,
                const float* ws, const int32_t* group_sizes, void* out) {
  const mindjax::Quantised q = {MJK_E4M3, out_dtype, rows, k, n, groups, static_cast<const uint8_t*>(x), xs,
                                static_cast<const uint8_t*>(w), ws, static_cast<char*>(out)};
  return mindjax::run(static_cast<const mjk_pool*>(stream), q, groups_total, group_offset, group_sizes);
}

int mjk_gmm_s8(void* stream, mjk_dtype out_dtype, int64_t rows, int64_t k, int64_t n, int64_t groups,
               int64_t groups_total, int64_t group_offset, const void* x, const float* xs, const void* w,
               const float* ws, const int32_t* group_sizes, void* out) {
  const mindjax::Quantised q = {MJK_S8, out_dtype, rows, k, n, groups, static_cast<const uint8_t*>(x), xs,
                                static_cast<const uint8_t*>(w), ws, static_cast<char*>(out)};
  return mindjax::run(static_cast<const mjk_pool*>(stream), q, groups_total, group_offset, group_sizes);
}

}  // extern "C"
