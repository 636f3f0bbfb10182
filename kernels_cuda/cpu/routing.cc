// The router of a mixture of experts: its choices, their order by expert, and the shares of its balance loss.
#include <cmath>
#include <cstring>
#include <vector>

#include "errors.h"
#include "launch_cpu.h"
#include "pool.h"
#include "simd.h"

namespace mindjax {
namespace {

// x[size] becomes its softmax; beyond `size` it is written up to whole vectors.
void softmax(float* x, int64_t size) {
  const int64_t padded = round_up(size, MJK_LANES);
  for (int64_t i = size; i < padded; ++i) x[i] = -INFINITY;
  vf most = load(x);
  for (int64_t i = MJK_LANES; i < padded; i += MJK_LANES) most = maximum(most, load(x + i));
  const float shift = largest(most);
  vf total = {};
  for (int64_t i = 0; i < padded; i += MJK_LANES) {
    const vf value = exponential(load(x + i) - shift);
    store(x + i, value);
    total += value;
  }
  const float all = sum(total);
  for (int64_t i = 0; i < padded; i += MJK_LANES) store(x + i, load(x + i) / all);
}

// An integer in the order of the numbers; a NaN lies beyond the infinity of its sign, as in XLA's top_k.
int32_t key(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

// The places of the `choices` largest of x[size], the largest first, of equal ones the first; keys[choices] is scratch.
void top(const float* x, int64_t size, int64_t choices, int32_t* keys, int32_t* places) {
  for (int64_t i = 0; i < size; ++i) {
    const int32_t here = key(x[i]);
    if (i >= choices && here <= keys[choices - 1]) continue;
    int64_t j = least(i, choices - 1);
    for (; j > 0 && here > keys[j - 1]; --j) keys[j] = keys[j - 1], places[j] = places[j - 1];
    keys[j] = here, places[j] = int32_t(i);
  }
}

}  // namespace
}  // namespace mindjax

using namespace mindjax;

int mjk_choose_experts(void* stream, int64_t tokens, int64_t experts, int64_t choices, int32_t normalise,
                       const float* logits, const int32_t* segments, float* weights, int32_t* chosen,
                       float* probabilities) {
  if (choices < 1 || choices > experts)
    return fail(MJK_INVALID_ARGUMENT, "a token cannot choose %lld of %lld experts", (long long)choices,
                (long long)experts);
  over_rows(stream, tokens, 32 * experts, [=](int64_t first, int64_t end) {
    std::vector<float> row(size_t(round_up(experts, MJK_LANES)));
    std::vector<int32_t> keys(static_cast<size_t>(choices));
    for (int64_t t = first; t < end; ++t) {
      float* weight = weights + t * choices;
      int32_t* choice = chosen + t * choices;
      if (segments[t] <= 0) {
        for (int64_t j = 0; j < choices; ++j) weight[j] = 0, choice[j] = int32_t(experts);
        std::memset(probabilities + t * experts, 0, size_t(experts) * sizeof(float));
        continue;
      }
      top(logits + t * experts, experts, choices, keys.data(), choice);
      std::memcpy(row.data(), logits + t * experts, size_t(experts) * sizeof(float));
      softmax(row.data(), experts);
      float total = 0;
      for (int64_t j = 0; j < choices; ++j) total += weight[j] = row[size_t(choice[j])];
      if (normalise)
        for (int64_t j = 0; j < choices; ++j) weight[j] /= total;
      std::memcpy(probabilities + t * experts, row.data(), size_t(experts) * sizeof(float));
    }
  });
  return MJK_OK;
}

int mjk_choose_experts_grad(void* stream, int64_t tokens, int64_t experts, int64_t choices, int32_t normalise,
                            const int32_t* chosen, const float* probabilities, const float* d_weights,
                            const float* d_probabilities, float* d_logits) {
  over_rows(stream, tokens, 32 * experts, [=](int64_t first, int64_t end) {
    for (int64_t t = first; t < end; ++t) {
      const float *p = probabilities + t * experts, *d_weight = d_weights + t * choices;
      const int32_t* choice = chosen + t * choices;
      float* d = d_logits + t * experts;
      if (choice[0] >= experts) {
        std::memset(d, 0, size_t(experts) * sizeof(float));
        continue;
      }
      std::memcpy(d, d_probabilities + t * experts, size_t(experts) * sizeof(float));
      float total = 0, along = 0;
      for (int64_t j = 0; j < choices; ++j) total += p[choice[j]], along += p[choice[j]] * d_weight[j];
      for (int64_t j = 0; j < choices; ++j)
        d[choice[j]] += normalise ? (d_weight[j] - along / total) / total : d_weight[j];
      const float mean = dot(d, p, experts);
      for (int64_t e = 0; e < experts; ++e) d[e] = p[e] * (d[e] - mean);
    }
  });
  return MJK_OK;
}

int mjk_sort_by_expert(int64_t tokens, int64_t experts, int64_t choices, const int32_t* chosen, const float* weights,
                       int32_t* token, int32_t* back, int32_t* load, float* scales) {
  std::vector<int32_t> next(size_t(experts + 1));
  const auto group = [=](int64_t i) {
    return size_t(chosen[i] < 0 || chosen[i] > experts ? experts : int64_t(chosen[i]));
  };
  for (int64_t i = 0; i < tokens * choices; ++i) ++next[group(i)];
  int32_t start = 0;
  for (int64_t e = 0; e <= experts; ++e) {
    const int32_t size = next[size_t(e)];
    if (e < experts) load[e] = size;
    next[size_t(e)] = start;
    start += size;
  }
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t i = t * choices; i < (t + 1) * choices; ++i) {
      const int32_t place = next[group(i)]++;
      back[i] = place;
      token[place] = int32_t(t);
      scales[place] = weights[i];
    }
  return MJK_OK;
}

int mjk_expert_shares(void* stream, int64_t rows, int64_t length, int64_t experts, int64_t choices,
                      const int32_t* chosen, const int32_t* segments, float* shares) {
  over_rows(stream, rows, 8 * length * experts, [=](int64_t first_row, int64_t end_row) {
    for (int64_t first = first_row * length, last; first < end_row * length; first = last) {
      const int64_t end = (first / length + 1) * length;
      for (last = first + 1; last < end && segments[last] == segments[first];) ++last;
      float* share = shares + first * experts;
      std::memset(share, 0, size_t((last - first) * experts) * sizeof(float));
      if (segments[first] <= 0) continue;
      for (int64_t i = first * choices; i < last * choices; ++i)
        if (chosen[i] >= 0 && chosen[i] < experts) share[chosen[i]] += 1;
      const float size = float(last - first);
      for (int64_t e = 0; e < experts; ++e) share[e] /= size * size;
      for (int64_t t = first + 1; t < last; ++t)
        std::memcpy(shares + t * experts, share, size_t(experts) * sizeof(float));
    }
  });
  return MJK_OK;
}
