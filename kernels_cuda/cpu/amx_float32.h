// float32 products on the bfloat16 tiles of AMX.
//
// A float32 is the sum of three bfloat16, high + middle + low, exactly: each takes 8 of its 24 bits. Of the nine
// products of two such sums the six largest are added, each exact in float32; what is left out is at most 2^-24 of
// |a b|, as much as one rounding of that product. (XLA's BF16_BF16_F32_X6, what its precision HIGHEST is on a TPU.)
// The pieces of numbers below 2^-102 lose bits to the flushing of subnormals; an infinity, or a number that rounds to one
// in bfloat16, becomes a NaN.
#pragma once
#include "avx512.h"

namespace mindjax {
namespace {

struct SplitTile {
  using Packed = uint16_t;
  static constexpr int64_t kRows = 32, kColumns = 32, kDepthUnit = 32, kDepth = 128, kPieces = 3, kRowPadding = 0, kPanels = 1,
                           kStreamedRows = 0;
  // Both panels are, for each 32 of k, [piece][half][16 lines of a tile][16 words]; a word is elements i and i + 16.
  static constexpr int64_t kTile = 16 * 32, kPiece = 2 * kTile, kStep = kPieces * kPiece;

  // The highest 8 bits, rounded, as a float32; x becomes the rest.
  static __m512 take_piece(__m512& x) {
    const __m512i rounded = _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000));
    const __m512 piece = _mm512_castsi512_ps(_mm512_and_si512(rounded, _mm512_set1_epi32(int32_t(0xffff0000))));
    x = _mm512_sub_ps(x, piece);
    return piece;
  }

  static __m512i pair(__m512 first, __m512 second) {
    return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(first), 16), _mm512_castps_si512(second));
  }

  // The words of each piece, to `out`.
  static void split(__m512 first, __m512 second, uint16_t* out) {
    const __m512 high = take_piece(first), second_high = take_piece(second);
    const __m512 middle = take_piece(first), second_middle = take_piece(second);
    _mm512_storeu_si512(out, pair(high, second_high));
    _mm512_storeu_si512(out + kPiece, pair(middle, second_middle));
    _mm512_storeu_si512(out + 2 * kPiece, pair(first, second));
  }

  static void transpose_tile(uint16_t* tile) {
    __m512i r[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(tile + i * 32);
    transpose(r);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(tile + i * 32, r[i]);
  }

  // A tile of each piece out of `lines` rows of which each holds `depth` of k.
  static void pack_along_k(const float* from, int64_t stride, int64_t lines, int64_t depth, uint16_t* out) {
    const __mmask16 first = first_lanes(depth), second = first_lanes(depth - 16);
    for (int64_t i = 0; i < 16; ++i, from += stride, out += 32) {
      if (i < lines)
        split(_mm512_maskz_loadu_ps(first, from), _mm512_maskz_loadu_ps(second, from + 16), out);
      else
        split(_mm512_setzero_ps(), _mm512_setzero_ps(), out);
    }
  }

  // Line i of the tiles that hold one k (and the one 16 after it) in a line: `depth` rows are a k each.
  static void pack_across_k(const float* from, int64_t stride, int64_t lines, int64_t depth, int64_t i, uint16_t* out) {
    const __mmask16 mask = first_lanes(lines);
    const __m512 zero = _mm512_setzero_ps();
    split(i < depth ? _mm512_maskz_loadu_ps(mask, from + i * stride) : zero,
          i + 16 < depth ? _mm512_maskz_loadu_ps(mask, from + (i + 16) * stride) : zero, out);
  }

  static const uint16_t* pack_a(uint16_t* out, const Block& block, int64_t m0, int64_t rows, int64_t k0,
                                int64_t depth) {
    const float* a = static_cast<const float*>(block.a) + (block.a_transposed ? k0 * block.lda + m0 : m0 * block.lda + k0);
    uint16_t* to = out;
    for (int64_t s = 0; s < depth; s += 32, to += kStep) {
      for (int64_t half = 0; half < (rows > 16 ? 2 : 1); ++half) {
        uint16_t* tile = to + half * kTile;
        if (!block.a_transposed) {
          pack_along_k(a + half * 16 * block.lda + s, block.lda, rows - half * 16, depth - s, tile);
          continue;
        }
        for (int64_t i = 0; i < 16; ++i)
          pack_across_k(a + s * block.lda + half * 16, block.lda, rows - half * 16, depth - s, i, tile + i * 32);
        for (int64_t piece = 0; piece < kPieces; ++piece) transpose_tile(tile + piece * kPiece);
      }
    }
    return out;
  }

  static void pack_b(uint16_t* out, int64_t stride, const Block& block, int64_t k0, int64_t depth) {
    const float* b = static_cast<const float*>(block.b);
    for (int64_t s = 0; s < depth; s += 32, out += kStep) {
      if (!block.b_transposed) {
        // Along rows of B, which memory streams.
        const float* from = b + (k0 + s) * block.ldb;
        for (int64_t i = 0; i < 16; ++i)
          for (int64_t n0 = 0; n0 < round_up(block.n, 32); n0 += 16)
            pack_across_k(from + n0, block.ldb, block.n - n0, depth - s, i,
                          out + n0 / 32 * stride + n0 % 32 / 16 * kTile + i * 32);
        continue;
      }
      for (int64_t n0 = 0; n0 < round_up(block.n, 32); n0 += 16) {
        uint16_t* tile = out + n0 / 32 * stride + n0 % 32 / 16 * kTile;
        pack_along_k(b + n0 * block.ldb + k0 + s, block.ldb, block.n - n0, depth - s, tile);
        for (int64_t piece = 0; piece < kPieces; ++piece) transpose_tile(tile + piece * kPiece);
      }
    }
  }

  static void store(const Block& block, int64_t m0, int64_t rows, int64_t n0, int64_t columns, const float* sums) {
    store_tile(InOrder(), block, m0, rows, n0, columns, sums);
  }

  template <bool kBoth>
  static void load_a(const uint16_t* a) {
    _tile_loadd(4, a, 64);
    if (kBoth) _tile_loadd(5, a + kTile, 64);
  }
  // Past L1, where the panel of A is to stay.
  static void load_b(const uint16_t* b) {
    _tile_stream_loadd(6, b, 64);
    _tile_stream_loadd(7, b + kTile, 64);
  }
  template <bool kBoth>
  static void add_products() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (kBoth) {
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }

  template <bool kBoth>
  static void run(int64_t depth, const uint16_t* a, const uint16_t* b, float* sums, bool first,
                  Meanwhile<SplitTile>& meanwhile) {
    asm volatile("" ::: "memory");  // what was packed is in memory: the tile loads do not say what they read
    if (first) {
      _tile_zero(0);
      _tile_zero(1);
      if (kBoth) _tile_zero(2);
      if (kBoth) _tile_zero(3);
    } else {
      _tile_loadd(0, sums, 128);
      _tile_loadd(1, sums + 16, 128);
      if (kBoth) _tile_loadd(2, sums + 16 * 32, 128);
      if (kBoth) _tile_loadd(3, sums + 16 * 32 + 16, 128);
    }
    constexpr int64_t kMiddle = kPiece, kLow = 2 * kPiece;
    for (int64_t s = 0; s < depth; s += 32, a += kStep, b += kStep) {
      meanwhile.step();
      load_a<kBoth>(a + kLow);
      load_b(b);
      add_products<kBoth>();
      load_a<kBoth>(a);
      add_products<kBoth>();
      load_b(b + kLow);
      add_products<kBoth>();
      load_b(b + kMiddle);
      add_products<kBoth>();
      load_a<kBoth>(a + kMiddle);
      add_products<kBoth>();
      load_b(b);
      add_products<kBoth>();
    }
    _tile_stored(0, sums, 128);
    _tile_stored(1, sums + 16, 128);
    if (kBoth) _tile_stored(2, sums + 16 * 32, 128);
    if (kBoth) _tile_stored(3, sums + 16 * 32 + 16, 128);
    asm volatile("" ::: "memory");
  }

  static void multiply(int64_t rows, int64_t depth, const uint16_t* a, const uint16_t* b, float* sums, bool first,
                       Meanwhile<SplitTile>& meanwhile) {
    rows > 16 ? run<true>(depth, a, b, sums, first, meanwhile) : run<false>(depth, a, b, sums, first, meanwhile);
  }
};

}  // namespace
}  // namespace mindjax
