// Small products whose operands are copied once, for one instruction set; included inside a namespace.
//
// They are copied in units of four bytes along the sum: a float32 or, where the instruction set multiplies those, a
// pair of bfloat16. A vector of units of the right side is of MJK_LANES columns.
#pragma once
#include "simd.h"

struct HalfPair {
  uint32_t bits;
};

static inline vf load(const HalfPair* p) { return load(reinterpret_cast<const float*>(p)); }
static inline void store(HalfPair* p, vf v) { memcpy(p, &v, sizeof v); }

namespace {

template <class T>
struct UnitOf {
  using type = float;
};
#ifdef __AVX512BF16__
template <>
struct UnitOf<bf16> {
  using type = HalfPair;
};
#endif

// Terms of a sum in a unit.
template <class Unit>
constexpr int64_t kTerms = 1;
template <>
constexpr int64_t kTerms<HalfPair> = 2;

// total + x y, of one unit x and one of each column.
inline vf add_product(vf total, float x, vf y) { return total + splat(x) * y; }

// Rows t and t + 1 of what is summed along t, t even: `to` is row t, or the pair of both.
inline void store_rows(float* to, int64_t size, vf first, vf second) {
  store(to, first);
  store(to + size, second);
}

#ifdef __AVX512BF16__
inline vf add_product(vf total, HalfPair x, vf y) {
  return (vf)_mm512_dpbf16_ps((__m512)total, (__m512bh)_mm512_set1_epi32((int)x.bits), (__m512bh)y);
}
// Rounding flushes subnormals, as the products do.
inline __m256i to_bf16(vf x) { return (__m256i)_mm512_cvtneps_pbh((__m512)x); }
inline void store_rows(HalfPair* to, int64_t, vf first, vf second) {
  const vu low = (vu)_mm512_cvtepu16_epi32(to_bf16(first)), high = (vu)_mm512_cvtepu16_epi32(to_bf16(second));
  store(to, (vf)(low | high << 16));
}
// A vector of a row that is summed along itself.
inline void store_along(HalfPair* to, vf x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), to_bf16(x)); }
#endif
inline void store_along(float* to, vf x) { store(to, x); }

// Left side, at (i, k): data[i * row + k * column].
template <class Unit>
struct Left {
  const Unit* data;
  int64_t row, column;
};

// Right side, vector j of k: data[k * row + j * vector].
template <class Unit>
struct Right {
  const Unit* data;
  int64_t row, vector;
};

constexpr int64_t kTile = MJK_LANES == 16 ? 12 : 6;  // rows of a register tile
constexpr int64_t kTileVectors = 2;

template <int rows, int vectors, class Unit>
__attribute__((noinline)) void tile_product(int64_t depth, const Left<Unit>& a, const Right<Unit>& b, float* c,
                                            int64_t c_row, bool add) {
  vf sums[rows][vectors];
#pragma GCC unroll 12
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < vectors; ++j) sums[i][j] = add ? load(c + i * c_row + j * MJK_LANES) : vf{};
  for (int64_t k = 0; k < depth; ++k) {
    vf y[vectors];
#pragma GCC unroll 2
    for (int j = 0; j < vectors; ++j) y[j] = load(b.data + k * b.row + j * b.vector);
#pragma GCC unroll 12
    for (int i = 0; i < rows; ++i) {
      const Unit x = a.data[i * a.row + k * a.column];
#pragma GCC unroll 2
      for (int j = 0; j < vectors; ++j) sums[i][j] = add_product(sums[i][j], x, y[j]);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < vectors; ++j) store(c + i * c_row + j * MJK_LANES, sums[i][j]);
}

// c[m, vectors] = (or +=) a[m, depth] b[depth, vectors], m up to kTile.
template <int rows = kTile, class Unit>
inline void row_product(int64_t m, int64_t vectors, int64_t depth, const Left<Unit>& a, Right<Unit> b, float* c,
                        int64_t c_row, bool add) {
  if (m < rows) {
    if constexpr (rows > 1) row_product<rows - 1>(m, vectors, depth, a, b, c, c_row, add);
    return;
  }
  int64_t j = 0;
  for (; j + kTileVectors <= vectors; j += kTileVectors, b.data += kTileVectors * b.vector)
    tile_product<rows, kTileVectors>(depth, a, b, c + j * MJK_LANES, c_row, add);
  if (j < vectors) tile_product<rows, 1>(depth, a, b, c + j * MJK_LANES, c_row, add);
}

// A vector of units from consecutive terms.
template <class T>
inline vf load_units(const T* x, float*) {
  return load(x);
}
inline vf load_units(const bf16* x, HalfPair*) { return load(reinterpret_cast<const float*>(x)); }

inline void copy_rest(const float* x, int64_t terms, float* to) { memcpy(to, x, terms * sizeof(float)); }
inline void copy_rest(const bf16* x, int64_t terms, float* to) {
  for (int64_t d = 0; d < terms; ++d) to[d] = to_float(x[d]);
}
inline void copy_rest(const bf16* x, int64_t terms, HalfPair* to) {
  for (int64_t d = 0; d < terms; d += 2)
    to[d / 2].bits = x[d].bits | (d + 1 < terms ? (uint32_t)x[d + 1].bits << 16 : 0);
}

// Rows of `stride` lie too far apart for the processor to foresee.
constexpr int64_t kAhead = 16;
template <class T>
inline void prefetch_row(const T* x, int64_t dim) {
  for (int64_t d = 0; d < dim; d += 64 / sizeof(T)) __builtin_prefetch(x + d);
}

// x[count] by rows of `stride` as a left side whose sum is along `dim`.
template <class T, class Unit>
inline void copy_left(const T* x, int64_t count, int64_t dim, int64_t stride, Unit* to, int64_t units) {
  constexpr int64_t step = MJK_LANES * kTerms<Unit>;
  for (int64_t i = 0; i < count; ++i, x += stride, to += units) {
    int64_t d = 0;
    prefetch_row(x + kAhead * stride, dim);
    for (; d + step <= dim; d += step) store(to + d / kTerms<Unit>, load_units(x + d, to));
    copy_rest(x + d, dim - d, to + d / kTerms<Unit>);
  }
}

// Transposes a square.
inline void transpose(vf (&rows)[MJK_LANES]) {
#if MJK_LANES == 16
  // In each step rows i and i + 8 are merged into 2 i and 2 i + 1.
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  for (int step = 0; step < 4; ++step) {
    vf merged[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      merged[2 * i] = (vf)_mm512_permutex2var_ps((__m512)rows[i], low, (__m512)rows[i + 8]);
      merged[2 * i + 1] = (vf)_mm512_permutex2var_ps((__m512)rows[i], high, (__m512)rows[i + 8]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) rows[i] = merged[i];
  }
#else
  float x[MJK_LANES][MJK_LANES];
  for (int i = 0; i < MJK_LANES; ++i)
    for (int j = 0; j < MJK_LANES; ++j) x[j][i] = rows[i][j];
  memcpy(rows, x, sizeof x);
#endif
}

// x[count] by rows of `stride` as columns of a right side whose sum is along `dim`: vectors units * MJK_LANES apart,
// zeros beyond `count`.
template <class T, class Unit>
inline void copy_columns(const T* x, int64_t count, int64_t dim, int64_t stride, Unit* to, int64_t units) {
  constexpr int64_t step = MJK_LANES * kTerms<Unit>;
  for (int64_t s = 0; s < count; s += MJK_LANES, x += MJK_LANES * stride, to += units * MJK_LANES) {
    for (int64_t i = 0; i < MJK_LANES; ++i) prefetch_row(x + (i + kAhead) * stride, dim);
    for (int64_t d = 0; d < dim; d += step) {
      vf rows[MJK_LANES] = {};
      for (int64_t i = 0; i < least(MJK_LANES, count - s); ++i)
        if (d + step <= dim) {
          rows[i] = load_units(x + i * stride + d, to);
        } else {
          Unit line[MJK_LANES] = {};
          copy_rest(x + i * stride + d, dim - d, line);
          rows[i] = load(line);
        }
      transpose(rows);
      const int64_t first = d / kTerms<Unit>;
      for (int64_t u = first; u < least(units, first + MJK_LANES); ++u) store(to + u * MJK_LANES, rows[u - first]);
    }
  }
}

// x[count] by rows of `stride` as a right side whose sum is along them, vectors side by side in rows of `width`; zeros
// beyond `count` up to `size`.
template <class T>
inline void copy_right(const T* x, int64_t count, int64_t size, int64_t dim, int64_t stride, float* to, int64_t width) {
  for (int64_t s = 0; s < count; ++s) {
    prefetch_row(x + (s + kAhead) * stride, dim);
    copy_row(x + s * stride, dim, 1.0f, to + s * width);
  }
  memset(to + count * width, 0, (size - count) * width * sizeof(float));
}
inline void copy_right(const bf16* x, int64_t count, int64_t size, int64_t dim, int64_t stride, HalfPair* to,
                       int64_t width) {
  for (int64_t s = 0; s < count; s += 2, to += width) {
    const bf16 *first = x + s * stride, *second = s + 1 < count ? first + stride : nullptr;
    prefetch_row(first + kAhead * stride, dim);
    prefetch_row(first + (kAhead + 1) * stride, dim);
    int64_t d = 0;
    for (; d + MJK_LANES <= dim; d += MJK_LANES)
      store(to + d, (vf)(widened(first + d) | (second ? widened(second + d) << 16 : vu{})));
    for (; d < dim; ++d) to[d].bits = first[d].bits | (second ? (uint32_t)second[d].bits << 16 : 0);
  }
  memset(to, 0, (size - round_up(count, 2)) / 2 * width * sizeof(HalfPair));
}

}  // namespace
