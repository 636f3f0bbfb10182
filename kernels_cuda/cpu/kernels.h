// What each instruction set provides: one block of a product at a time, on the calling thread.
#pragma once
#include <cstddef>
#include <cstdint>

#include "launch.h"

namespace mindjax {

// C[m, n] = the sum over k of A[m, k] B[k, n], accumulated in float32 in the order of k, whatever the blocking.
struct Block {
  mjk_dtype in, out;
  bool accumulate;                  // add to what C holds (out is F32)
  bool past_caches;                 // C is part of a result larger than they are: it is stored past them
  bool a_transposed, b_transposed;  // A is stored [k, m]; B is stored [n, k]
  const void *a, *b;
  const float* bias;  // of each column of C, added to the sums; or NULL
  void* c;
  int64_t lda, ldb, ldc;  // elements between the rows of the array as stored
  int64_t m, n, k;
  // Quantised inputs (E4M3, S8), both stored with k last. E4M3: a scale per 128 of k, ... ; S8: one per row of A and
  // per column of B.
  const float *a_scale, *b_scale;
  int64_t lda_scale, ldb_scale;
  int64_t depth;  // of k that is packed at a time; sums are kept in float32 between passes, so it changes no bit
};

struct Kernels {
  const char* name;
  int64_t rows, columns;  // C is computed in tiles of this many rows and columns
  int64_t depth;          // the most of k that is worth packing at a time
  int64_t packed;         // bytes of a packed element
  int64_t streamed_rows;  // up to so many rows of A, B as stored is read while it is used; 0: it is always packed before
  // Bytes of scratch for a block of that size.
  size_t (*scratch)(int64_t m, int64_t n, int64_t k, int64_t depth);
  // `scratch` is aligned to 64 bytes.
  void (*multiply)(const Block& block, char* scratch);
  // Around a thread's run of blocks (tile registers are configured and released).
  void (*enter)();
  void (*leave)();
  // Where B is streamed for more than 48 rows a group: the columns of a block, whose sums then stay in L2; 0: all.
  int64_t tall_columns = 0;
};

// result[m, n] = the sum over k of x[m, k] w[n, k], an int32, times (xs[m] ws[n]); n of 16, k of 64.
struct S8Block {
  const int8_t *x, *w;
  const float *xs, *ws;
  int64_t m, n, k, ldc;
  mjk_dtype out;
  void* result;
};

struct S8Kernels {
  int64_t rows;  // the most of x
  size_t (*scratch)(int64_t m, int64_t k);
  void (*multiply)(const S8Block& block, char* scratch);
};

// Per instruction set: for float32, for few rows of it, for bfloat16 and the quantised types, for few rows of int8 (NULL:
// as the others).
struct Isa {
  const char* name;
  const Kernels *f32, *f32_few, *bf16;
  const S8Kernels* s8;
};

}  // namespace mindjax
