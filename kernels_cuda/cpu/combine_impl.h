// Sums of chosen rows, for one instruction set.
#pragma once
#include "simd.h"

namespace {

// y[t] = the sum over j of weight[t, j] (NULL: 1) times row index[t, j] of x[rows, size], for t in [first, last).
template <class T>
void combine_rows(int64_t first, int64_t last, int64_t rows, int64_t choices, int64_t size, const T* x,
                  const int32_t* index, const float* weight, T* y) {
  for (int64_t t = first; t < last; ++t) {
    const int32_t* from = index + t * choices;
    const float* factor = weight ? weight + t * choices : nullptr;
    int64_t d = 0;
    for (; d + MJK_LANES <= size; d += MJK_LANES) {
      vf total = {};
      for (int64_t j = 0; j < choices; ++j)
        if (from[j] >= 0 && from[j] < rows) total += load(x + from[j] * size + d) * (factor ? factor[j] : 1.0f);
      store(y + t * size + d, total);
    }
    for (; d < size; ++d) {
      float total = 0;
      for (int64_t j = 0; j < choices; ++j)
        if (from[j] >= 0 && from[j] < rows) total += to_float(x[from[j] * size + d]) * (factor ? factor[j] : 1.0f);
      assign(y + t * size + d, total);
    }
  }
}

}  // namespace
