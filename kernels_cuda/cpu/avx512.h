// Packing and storing with AVX-512 (F, BW, VL, DQ), for tiles of 32 columns.
//
// A packed panel is made of 32-bit words: a float32, or the bfloat16 of k and k + 1 (the pair that VDPBF16PS and
// TDPBF16PS multiply). B's panels are [k words][32 columns].
#pragma once
#include <immintrin.h>

#include <cstring>

#include "blocking.h"

namespace mindjax {
namespace {

// What a source element becomes: `Word` loads give 16 words of consecutive k from one row.
//
// Columns of a panel lie in order, two halves of 16 words ...
struct InOrder {
  static constexpr int64_t kSecondHalf = 16;  // the column that its word 0 holds
  static constexpr int64_t column(int64_t word) { return word; }
};
struct FloatSource : InOrder {
  using Source = float;
  using Packed = float;
  static constexpr int64_t kPerWord = 1;
};
struct WidenedSource : InOrder {
  using Source = uint16_t;
  using Packed = float;
  static constexpr int64_t kPerWord = 1;
};
struct PairSource : InOrder {
  using Source = uint16_t;
  using Packed = uint16_t;
  static constexpr int64_t kPerWord = 2;
};
// ... or as unpacking leaves them, which takes half as long.
struct UnpackedSource : PairSource {
  static constexpr int64_t kSecondHalf = 4;
  static constexpr int64_t column(int64_t word) { return word + (word & 12); }
};

inline __mmask16 first_lanes(int64_t count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1; }
inline __mmask32 first_halves(int64_t count) {
  return count >= 32 ? 0xffffffffu : count <= 0 ? 0 : (1u << count) - 1;
}

inline __m512i widen16(__m256i x) { return _mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16); }

// 16 words, one per lane, of `count` consecutive elements along k; zeros past them.
inline __m512i load_along_k(FloatSource, const float* p, int64_t count) {
  return _mm512_castps_si512(_mm512_maskz_loadu_ps(first_lanes(count), p));
}
inline __m512i load_along_k(WidenedSource, const uint16_t* p, int64_t count) {
  return widen16(_mm256_maskz_loadu_epi16(first_lanes(count), p));
}
inline __m512i load_along_k(PairSource, const uint16_t* p, int64_t count) {
  return _mm512_maskz_loadu_epi16(first_halves(count), p);
}

// 16 words, one per lane, of `lanes` neighbours at one k (at k and k + 1 where `next` is not NULL and words are pairs).
inline __m512i load_across(FloatSource, const float* p, const float*, int64_t lanes) {
  return _mm512_castps_si512(_mm512_maskz_loadu_ps(first_lanes(lanes), p));
}
inline __m512i load_across(WidenedSource, const uint16_t* p, const uint16_t*, int64_t lanes) {
  return widen16(_mm256_maskz_loadu_epi16(first_lanes(lanes), p));
}
inline __m512i load_across(PairSource, const uint16_t* p, const uint16_t* next, int64_t lanes) {
  const __mmask16 mask = first_lanes(lanes);
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p));
  if (!next) return low;
  return _mm512_or_si512(low, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, next)), 16));
}

// 32 words, two vectors, of neighbours at one k, or two for pairs.
template <class S>
void load_across(S source, const typename S::Source* p, const typename S::Source* next, int64_t lanes, __m512i& low,
                 __m512i& high) {
  low = load_across(source, p, next, lanes);
  high = lanes > 16 ? load_across(source, p + 16, next ? next + 16 : nullptr, lanes - 16) : _mm512_setzero_si512();
}
// 16 words of pairs of x and y, from number `first` on.
inline __m512i pairs(__m512i x, __m512i y, int16_t first) {
  const __m512i from_0 = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                          5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  return _mm512_permutex2var_epi16(x, _mm512_add_epi16(from_0, _mm512_set1_epi16(first)), y);
}
inline void interleave(PairSource, __m512i x, __m512i y, __m512i& low, __m512i& high) {
  low = pairs(x, y, 0);
  high = pairs(x, y, 16);
}
inline void interleave(UnpackedSource, __m512i x, __m512i y, __m512i& low, __m512i& high) {
  low = _mm512_unpacklo_epi16(x, y);
  high = _mm512_unpackhi_epi16(x, y);
}
template <class S>
void load_pairs(S source, const uint16_t* p, const uint16_t* next, int64_t lanes, __m512i& low, __m512i& high) {
  const __mmask32 mask = first_halves(lanes);
  const __m512i x = _mm512_maskz_loadu_epi16(mask, p);
  interleave(source, x, next ? _mm512_maskz_loadu_epi16(mask, next) : _mm512_setzero_si512(), low, high);
}
inline void load_across(PairSource source, const uint16_t* p, const uint16_t* next, int64_t lanes, __m512i& low,
                        __m512i& high) {
  load_pairs(source, p, next, lanes, low, high);
}
inline void load_across(UnpackedSource source, const uint16_t* p, const uint16_t* next, int64_t lanes, __m512i& low,
                        __m512i& high) {
  load_pairs(source, p, next, lanes, low, high);
}

// Lane j of vector i becomes lane i of vector j.
inline void transpose(__m512i (&r)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// Rows of `count` elements along k, `stride` apart, `lanes` of them, as words: out[i] holds word i of each row of a half,
// one per lane.
template <class S>
void load_transposed(S source, __m512i (&out)[16], const typename S::Source* p, int64_t stride, int64_t lanes,
                     int64_t count) {
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    const int64_t row = S::column(i);
    out[i] = row < lanes ? load_along_k(source, p + row * stride, count) : _mm512_setzero_si512();
  }
  transpose(out);
}

// All panels of B: [words][32] each, words of zeros up to `padded` elements of k.
template <class S>
void pack_columns(S source, typename S::Packed* out, int64_t stride, const Block& block, int64_t k0, int64_t depth,
                  int64_t padded) {
  constexpr int64_t kPer = S::kPerWord, kRowsAhead = 8;  // rows of B that are fetched ahead
  const auto* b = static_cast<const typename S::Source*>(block.b);
  const int64_t words = (padded + kPer - 1) / kPer, panel = stride * (int64_t)sizeof(*out) / 4;
  int32_t* to = reinterpret_cast<int32_t*>(out);
  if (!block.b_transposed) {
    // Along rows of B, which memory streams; each word row goes to all panels.
    for (int64_t w = 0; w < words; ++w) {
      const int64_t k = w * kPer;
      const auto* row = b + (k0 + k) * block.ldb;
      const auto* next = kPer == 2 && k + 1 < depth ? row + block.ldb : nullptr;
      int32_t* at = to + w * 32;
      const bool ahead = k + kRowsAhead + kPer <= depth;
      for (int64_t n0 = 0; n0 < block.n; n0 += 32, at += panel) {
        if (ahead)
          for (int64_t i = 0; i < kPer; ++i)
            _mm_prefetch(reinterpret_cast<const char*>(row + (kRowsAhead + i) * block.ldb + n0), _MM_HINT_T0);
        __m512i low = _mm512_setzero_si512(), high = low;
        if (k < depth) {
          load_across(source, row + n0, next ? next + n0 : nullptr, block.n - n0, low, high);
        }
        _mm512_storeu_si512(at, low);
        _mm512_storeu_si512(at + 16, high);
      }
    }
    return;
  }
  for (int64_t n0 = 0; n0 < block.n; n0 += 32, to += panel) {
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t first = n0 + half * S::kSecondHalf;
      for (int64_t w = 0; w < words; w += 16) {
        __m512i r[16];
        load_transposed(source, r, b + first * block.ldb + k0 + w * kPer, block.ldb, block.n - first, depth - w * kPer);
        const int64_t count = smaller(16, words - w);
        for (int64_t i = 0; i < count; ++i) _mm512_storeu_si512(to + (w + i) * 32 + half * 16, r[i]);
      }
    }
  }
}

// One panel of A as [words][kTileRows], kTileRows <= 16.
template <int64_t kTileRows, class S>
void pack_rows(S source, typename S::Packed* out, const Block& block, int64_t m0, int64_t rows, int64_t k0,
               int64_t depth) {
  constexpr int64_t kPer = S::kPerWord;
  const auto* a = static_cast<const typename S::Source*>(block.a);
  const int64_t words = (depth + kPer - 1) / kPer;
  constexpr __mmask16 mask = (1u << kTileRows) - 1;
  int32_t* to = reinterpret_cast<int32_t*>(out);
  if (block.a_transposed) {
    for (int64_t w = 0; w < words; ++w) {
      const auto* row = a + (k0 + w * kPer) * block.lda + m0;
      const auto* next = kPer == 2 && w * kPer + 1 < depth ? row + block.lda : nullptr;
      _mm512_mask_storeu_epi32(to + w * kTileRows, mask, load_across(source, row, next, rows));
    }
    return;
  }
  for (int64_t w = 0; w < words; w += 16) {
    __m512i r[16];
    load_transposed(source, r, a + m0 * block.lda + k0 + w * kPer, block.lda, rows, depth - w * kPer);
    const int64_t count = smaller(16, words - w);
    for (int64_t i = 0; i < count; ++i) _mm512_mask_storeu_epi32(to + (w + i) * kTileRows, mask, r[i]);
  }
}

// Two panels of A stored across k, side by side: half the loads.
template <int64_t kTileRows>
void pack_two_panels(uint16_t* first, uint16_t* second, const Block& block, int64_t m0, int64_t rows, int64_t k0,
                     int64_t depth) {
  const uint16_t* row = static_cast<const uint16_t*>(block.a) + k0 * block.lda + m0;
  const __mmask32 there = first_halves(rows);
  constexpr __mmask16 mask = (1u << kTileRows) - 1;
  for (int64_t k = 0; k < depth; k += 2, row += 2 * block.lda, first += 2 * kTileRows, second += 2 * kTileRows) {
    const __m512i x = _mm512_maskz_loadu_epi16(there, row);
    const __m512i y = k + 1 < depth ? _mm512_maskz_loadu_epi16(there, row + block.lda) : _mm512_setzero_si512();
    _mm512_mask_storeu_epi32(first, mask, pairs(x, y, 0));
    _mm512_mask_storeu_epi32(second, mask, pairs(x, y, kTileRows));
  }
}

// To nearest, ties to even; a NaN stays one. In integers, as VCVTNEPS2BF16 would flush subnormals.
inline __m256i narrow16(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
}

// Two halves of a row of sums in the order of the columns.
inline void reorder(InOrder, __m512&, __m512&) {}
inline void reorder(UnpackedSource, __m512& x, __m512& y) {
  const __m512d a = _mm512_castps_pd(x), b = _mm512_castps_pd(y);
  x = _mm512_castpd_ps(_mm512_permutex2var_pd(a, _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0), b));
  y = _mm512_castpd_ps(_mm512_permutex2var_pd(a, _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4), b));
}

inline bool whole_line(const void* p) { return reinterpret_cast<uintptr_t>(p) % kCacheLine == 0; }

// `sums` is [kTileRows][32].
template <class Order>
void store_tile(Order order, const Block& block, int64_t m0, int64_t rows, int64_t n0, int64_t columns, const float* sums) {
  const __mmask16 low = first_lanes(columns), high = first_lanes(columns - 16);
  for (int64_t i = 0; i < rows; ++i, sums += 32) {
    const int64_t at = (m0 + i) * block.ldc + n0;
    __m512 x = _mm512_loadu_ps(sums), y = _mm512_loadu_ps(sums + 16);
    reorder(order, x, y);
    if (block.bias) {
      x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(low, block.bias + n0));
      if (high) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(high, block.bias + n0 + 16));
    }
    if (block.out == MJK_BF16) {
      uint16_t* c = static_cast<uint16_t*>(block.c) + at;
#ifdef __AVX512BF16__
      // It flushes subnormals, which the sums of VDPBF16PS and TDPBF16PS cannot be.
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(y, x);
      if (block.past_caches && columns >= 32 && whole_line(c))
        _mm512_stream_si512(reinterpret_cast<__m512i*>(c), both);
      else
        _mm512_mask_storeu_epi16(c, first_halves(columns), both);
#else
      _mm256_mask_storeu_epi16(c, low, narrow16(x));
      if (high) _mm256_mask_storeu_epi16(c + 16, high, narrow16(y));
#endif
    } else {
      float* c = static_cast<float*>(block.c) + at;
      if (block.accumulate) {
        x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(low, c));
        if (high) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(high, c + 16));
      }
      if (block.past_caches && columns >= 32 && whole_line(c)) {
        _mm512_stream_ps(c, x);
        _mm512_stream_ps(c + 16, y);
      } else {
        _mm512_mask_storeu_ps(c, low, x);
        if (high) _mm512_mask_storeu_ps(c + 16, high, y);
      }
    }
  }
}

// Where a tile gets the words of its panel of B: from the packed panel ...
struct FromPanel {
  const int32_t* at;
  void load(int64_t w, __m512i& low, __m512i& high) const {
    low = _mm512_loadu_si512(at + w * 32), high = _mm512_loadu_si512(at + w * 32 + 16);
  }
};

// ... fetching the next panel of A meanwhile, a line or two with each word: stored across k, its rows in turn; along k,
// one line of each row in turn ...
template <class S, bool kAcross>
struct FromPanelFetching : FromPanel {
  const char* next;
  int64_t row;

  FromPanelFetching(const FromPanel& panel, const Fetch& a)
      : FromPanel(panel), next(kAcross ? a.row + a.bytes - 1 : a.row), row(a.stride) {}
  void load(int64_t w, __m512i& low, __m512i& high) const {
    constexpr int64_t kWord = S::kPerWord * sizeof(typename S::Source), kWords = kCacheLine / kWord;
    FromPanel::load(w, low, high);
    if (kAcross)
      for (int64_t i = 0; i < S::kPerWord; ++i) _mm_prefetch(next + (w * S::kPerWord + i) * row, _MM_HINT_T0);
    else
      _mm_prefetch(next + (w & (kWords - 1)) * row + (w & -kWords) * kWord, _MM_HINT_T0);
  }
};

// ... or from B itself, of which it packs the panel on the way and fetches as many lines of what is wanted next.
template <class S>
struct FromSource {
  const char* at;
  int64_t row, depth, lanes;
  int32_t* panel;
  Fetch& ahead;

  FromSource(const Block& block, int64_t k0, int64_t depth, int64_t n0, int32_t* panel, Fetch& ahead)
      : row(block.ldb * kSize), depth(depth), lanes(block.n - n0), panel(panel), ahead(ahead) {
    at = static_cast<const char*>(block.b) + k0 * row + n0 * kSize;
  }
  void load(int64_t w, __m512i& low, __m512i& high) const {
    const int64_t k = w * S::kPerWord;
    const auto* p = reinterpret_cast<const typename S::Source*>(at + k * row);
    const auto* next = reinterpret_cast<const typename S::Source*>(at + (k + 1) * row);
    load_across(S(), p, S::kPerWord == 2 && k + 1 < depth ? next : nullptr, lanes, low, high);
    if (panel) {
      _mm512_storeu_si512(panel + w * 32, low);
      _mm512_storeu_si512(panel + w * 32 + 16, high);
    }
    ahead.next(S::kPerWord * 32 * kSize / kCacheLine);
  }

 private:
  static constexpr int64_t kSize = sizeof(typename S::Source);
};

inline __m512i broadcast_word(const char* p) {
  int32_t word;
  std::memcpy(&word, p, sizeof word);
  return _mm512_set1_epi32(word);
}

// A tile of kTileRows x 32 sums held in vector registers. Step::run adds one word of k: broadcast A by two vectors of B.
template <class S, class Step, int64_t kTileRows>
struct VectorTile {
  using Packed = typename S::Packed;
  static constexpr int64_t kRows = kTileRows, kColumns = 32, kDepthUnit = S::kPerWord, kDepth = 384 * S::kPerWord,
                           kPieces = 1, kRowPadding = 0, kStreamedRows = 256, kStreamedPanels = 1,
                           kPanels = S::kPerWord;
  static constexpr int64_t kWord = 4;  // bytes
  // Where rows are few, memory is the limit; of more rows, float32 is limited by arithmetic.
  static constexpr bool kHalf = sizeof(typename S::Source) == 2;
  static constexpr int64_t kTallColumns = kHalf ? 512 : 0;
  static constexpr int64_t streamed_depth(int64_t m) { return m <= 48 ? (kHalf ? 48 : 24) : kHalf ? 64 : 48; }
  static constexpr bool in_order(int64_t m) { return kHalf || m <= 48; }

  // Rows `row` bytes apart, the words of a row `word` bytes apart.
  struct Rows {
    const char* data;
    int64_t row, word;
  };

  // In place where rows are made of words, but not where they would share one set of L1.
  static Rows pack_a(Packed* out, const Block& block, int64_t m0, int64_t rows, int64_t k0, int64_t depth) {
    constexpr bool kWords = S::kPerWord * sizeof(typename S::Source) == kWord;
    const int64_t stride = block.lda * (int64_t)sizeof(typename S::Source);
    if (kWords && rows == kRows && stride % kSetStride != 0) {
      const char* a = static_cast<const char*>(block.a);
      if (!block.a_transposed && depth % S::kPerWord == 0)
        return {a + m0 * stride + k0 / S::kPerWord * kWord, stride, kWord};
      if (block.a_transposed && S::kPerWord == 1) return {a + k0 * stride + m0 * kWord, kWord, stride};
    }
    if constexpr (kPanels == 2)
      if (block.a_transposed) {
        Packed* second = out + round_up(depth, S::kPerWord) * kRows;
        const bool odd = m0 / kRows % 2;
        if (!odd) pack_two_panels<kRows>(out, second, block, m0, smaller(2 * kRows, block.m - m0), k0, depth);
        return {reinterpret_cast<const char*>(odd ? second : out), kWord, kRows * kWord};
      }
    return copy_a(out, block, m0, rows, k0, depth);
  }
  static Rows copy_a(Packed* out, const Block& block, int64_t m0, int64_t rows, int64_t k0, int64_t depth) {
    pack_rows<kRows>(S(), out, block, m0, rows, k0, depth);
    return {reinterpret_cast<const char*>(out), kWord, kRows * kWord};
  }
  static void pack_b(Packed* out, int64_t stride, const Block& block, int64_t k0, int64_t depth) {
    pack_columns(S(), out, stride, block, k0, depth, depth);
  }
  static void store(const Block& block, int64_t m0, int64_t rows, int64_t n0, int64_t columns, const float* sums) {
    store_tile(S(), block, m0, rows, n0, columns, sums);
  }

  enum Order { kPacked, kAlong, kAcross };
  template <int R, Order kOrder, class B>
  static void run(int64_t words, const Rows& panel, const B& from, float* sums, bool first) {
    const char* a = panel.data;
    const int64_t row = kOrder == kAlong ? panel.row : kWord;
    const int64_t word = kOrder == kAlong ? kWord : kOrder == kPacked ? kRows * kWord : panel.word;
    __m512 c[R][2];
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
      for (int j = 0; j < 2; ++j) c[i][j] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + i * 32 + j * 16);
    for (int64_t w = 0; w < words; ++w, a += word) {
      __m512i b0, b1;
      from.load(w, b0, b1);
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        const __m512i ai = broadcast_word(a + i * row);
        c[i][0] = Step::run(c[i][0], ai, b0);
        c[i][1] = Step::run(c[i][1], ai, b1);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
      for (int j = 0; j < 2; ++j) _mm512_storeu_ps(sums + i * 32 + j * 16, c[i][j]);
  }

  // Packed in four sizes, so that few rows cost little.
  template <class B>
  static void run(int64_t rows, int64_t depth, const Rows& a, const B& from, float* sums, bool first) {
    const int64_t words = (depth + S::kPerWord - 1) / S::kPerWord;
    if (a.word == kWord) return run<kRows, kAlong>(words, a, from, sums, first);
    if (a.word != kRows * kWord) return run<kRows, kAcross>(words, a, from, sums, first);
    if (rows > 8) return run<kRows, kPacked>(words, a, from, sums, first);
    if (rows > 6) return run<8, kPacked>(words, a, from, sums, first);
    if (rows > 3) return run<6, kPacked>(words, a, from, sums, first);
    run<3, kPacked>(words, a, from, sums, first);
  }

  static void multiply(int64_t rows, int64_t depth, const Rows& a, const Packed* b, float* sums, bool first,
                       Meanwhile<VectorTile>& meanwhile) {
    meanwhile.store();
    const FromPanel panel{reinterpret_cast<const int32_t*>(b)};
    if (meanwhile.a_transposed())
      run(rows, depth, a, FromPanelFetching<S, true>(panel, meanwhile.next_a()), sums, first);
    else
      run(rows, depth, a, FromPanelFetching<S, false>(panel, meanwhile.next_a()), sums, first);
  }

  static void stream(const Block& block, char* scratch) { stream_block<VectorTile>(block, scratch); }
  // The first tile of a column of tiles packs B into `panel`, where others follow.
  static void stream_tile(const Block& block, int64_t k0, int64_t depth, int64_t n0, int64_t rows, bool packs,
                     const Rows& a, Packed* panel, float* sums, bool first, Fetch& ahead) {
    auto* words = reinterpret_cast<int32_t*>(panel);
    if (packs)
      run(rows, depth, a, FromSource<S>(block, k0, depth, n0, words, ahead), sums, first);
    else
      run(rows, depth, a, FromPanel{words}, sums, first);
  }
};

inline void nothing() {}
// What was stored past the caches is seen by every thread.
inline void publish() { _mm_sfence(); }

}  // namespace
}  // namespace mindjax
