// Packing and storing in plain C++, for the instruction sets that have no file of their own for it.
#pragma once
#include <cstring>

#include "blocking.h"

namespace mindjax {
namespace {

inline float widen(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float x;
  std::memcpy(&x, &wide, sizeof x);
  return x;
}

// To nearest, ties to even; a NaN stays one.
inline uint16_t narrow(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40u);
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float load(const float* p) { return *p; }
inline float load(const uint16_t* p) { return widen(*p); }

template <class Source, int kTileRows>
void pack_rows(float* out, const Block& block, int64_t m0, int64_t rows, int64_t k0, int64_t depth) {
  const Source* a = static_cast<const Source*>(block.a);
  for (int64_t i = 0; i < kTileRows; ++i) {
    if (i >= rows) {
      for (int64_t k = 0; k < depth; ++k) out[k * kTileRows + i] = 0;
    } else if (!block.a_transposed) {
      const Source* row = a + (m0 + i) * block.lda + k0;
      for (int64_t k = 0; k < depth; ++k) out[k * kTileRows + i] = load(row + k);
    }
  }
  if (block.a_transposed)
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t i = 0; i < rows; ++i) out[k * kTileRows + i] = load(a + (k0 + k) * block.lda + m0 + i);
}

template <class Source, int kTileColumns>
void pack_columns(float* out, int64_t stride, const Block& block, int64_t k0, int64_t depth) {
  const Source* b = static_cast<const Source*>(block.b);
  for (int64_t n0 = 0; n0 < block.n; n0 += kTileColumns, out += stride) {
    const int64_t columns = smaller(kTileColumns, block.n - n0);
    if (block.b_transposed) {
      for (int64_t j = 0; j < kTileColumns; ++j) {
        const Source* column = b + (n0 + j) * block.ldb + k0;
        if (j < columns)
          for (int64_t k = 0; k < depth; ++k) out[k * kTileColumns + j] = load(column + k);
        else
          for (int64_t k = 0; k < depth; ++k) out[k * kTileColumns + j] = 0;
      }
    } else {
      for (int64_t k = 0; k < depth; ++k) {
        const Source* row = b + (k0 + k) * block.ldb + n0;
        for (int64_t j = 0; j < columns; ++j) out[k * kTileColumns + j] = load(row + j);
        for (int64_t j = columns; j < kTileColumns; ++j) out[k * kTileColumns + j] = 0;
      }
    }
  }
}

template <int kTileColumns>
void store_tile(const Block& block, int64_t m0, int64_t rows, int64_t n0, int64_t columns, const float* sums) {
  for (int64_t i = 0; i < rows; ++i, sums += kTileColumns) {
    const int64_t at = (m0 + i) * block.ldc + n0;
    const auto total = [&](int64_t j) { return block.bias ? sums[j] + block.bias[n0 + j] : sums[j]; };
    if (block.out == MJK_BF16) {
      uint16_t* c = static_cast<uint16_t*>(block.c) + at;
      for (int64_t j = 0; j < columns; ++j) c[j] = narrow(total(j));
    } else {
      float* c = static_cast<float*>(block.c) + at;
      for (int64_t j = 0; j < columns; ++j) c[j] = block.accumulate ? c[j] + total(j) : total(j);
    }
  }
}

// A tile of float32 in plain C++ around `kernel(depth, a, b, sums, first)`.
template <class Source, class Kernel>
struct PortableTile {
  using Packed = float;
  static constexpr int64_t kRows = Kernel::kRows, kColumns = Kernel::kColumns, kDepthUnit = 1, kDepth = 384,
                           kPieces = 1, kRowPadding = 0, kPanels = 1, kStreamedRows = 0;

  static const float* pack_a(float* out, const Block& block, int64_t m0, int64_t rows, int64_t k0, int64_t depth) {
    pack_rows<Source, kRows>(out, block, m0, rows, k0, depth);
    return out;
  }
  static void pack_b(float* out, int64_t stride, const Block& block, int64_t k0, int64_t depth) {
    pack_columns<Source, kColumns>(out, stride, block, k0, depth);
  }
  static void multiply(int64_t, int64_t depth, const float* a, const float* b, float* sums, bool first,
                       Meanwhile<PortableTile>& meanwhile) {
    meanwhile.store();
    Kernel::run(depth, a, b, sums, first);
  }
  static void store(const Block& block, int64_t m0, int64_t rows, int64_t n0, int64_t columns, const float* sums) {
    store_tile<kColumns>(block, m0, rows, n0, columns, sums);
  }
};

inline void nothing() {}

}  // namespace
}  // namespace mindjax
