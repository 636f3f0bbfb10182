// Log-probabilities out of logits and their gradient, for one instruction set.
#pragma once
#include "simd.h"

namespace {

// The largest of a row's numbers times `factor`.
inline float largest_of(const float* x, int64_t size, float factor) {
  vf so_far = splat(x[0] * factor);
  int64_t i = 0;
  for (; i + MJK_LANES <= size; i += MJK_LANES) so_far = maximum(so_far, load(x + i) * factor);
  float result = largest(so_far);
  for (; i < size; ++i) result = larger(result, x[i] * factor);
  return result;
}

// The gradient of the target's log-probability and of the entropy by a logit, but for the target's own share.
struct LogitGradient {
  float factor, normaliser, entropy, d_logp, d_entropy;
  vf operator()(vf x) const {
    const vf logp = x * factor - normaliser;
    return exponential_to_88(logp) * (d_logp + d_entropy * (logp + entropy)) * -factor;
  }
};

// Of rows of logits, each times `factor`: the target's log-probability, the entropy, the logarithm of the sum of
// exponentials.
void logprobs_rows(int64_t first, int64_t last, int64_t size, float factor, const float* logits, const int32_t* targets,
                   float* logp, float* entropy, float* normaliser) {
  for (int64_t r = first; r < last; ++r) {
    const float* x = logits + r * size;
    const float top = largest_of(x, size, factor);
    vf total = {}, weighted = {};
    for_vectors(size, [&](int64_t i, int64_t left) __attribute__((always_inline)) {
      const vf below = load_part(x + i, left) * factor - top, weight = first_part(exponential_to_88(below), left);
      total += weight;
      weighted += weight * below;
    });
    const float all = sum(total), log_all = logarithm(splat(all))[0];
    logp[r] = x[targets[r]] * factor - top - log_all;
    entropy[r] = log_all - sum(weighted) / all;
    normaliser[r] = top + log_all;
  }
}

template <class T>
void logprobs_grad_rows(int64_t first, int64_t last, int64_t size, float factor, const float* logits,
                        const int32_t* targets, const float* normaliser, const float* entropy, const float* d_logp,
                        const float* d_entropy, T* d_logits) {
  for (int64_t r = first; r < last; ++r) {
    const float* x = logits + r * size;
    T* to = d_logits + r * size;
    const LogitGradient gradient{factor, normaliser[r], entropy[r], d_logp[r], d_entropy[r]};
    const float of_target = gradient(splat(x[targets[r]]))[0] + d_logp[r] * factor;
    for_vectors(size, [&](int64_t i, int64_t left) __attribute__((always_inline)) {
      store_part(to + i, gradient(load_part(x + i, left)), left);
    });
    assign(to + targets[r], of_target);
  }
}

}  // namespace
