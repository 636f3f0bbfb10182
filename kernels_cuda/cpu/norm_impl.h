// Normalisation, activations and rotary positions with their gradients, for one instruction set.
#pragma once
#include <math.h>

#include "launch_cpu.h"
#include "simd.h"

// For the bodies of for_vectors and for_several.
#define MJK_EACH [&](int64_t i, int64_t left) __attribute__((always_inline))
#define MJK_SEVERAL [&](auto of, int64_t i, int64_t left) __attribute__((always_inline))

namespace {

constexpr int kRows = 4;  // rows whose sums do not wait for each other

typedef vf Sums[kRows];  // of one row each

// The sums of the elements of four vectors, each in the order of sum().
inline vf4 sums(const Sums& v) {
#if MJK_LANES >= 8
  vf4 part[4];
  for (int r = 0; r < 4; ++r) {
#if MJK_LANES == 16
    const vf8 half = low_half(v[r]) + high_half(v[r]);
#else
    const vf8 half = v[r];
#endif
    part[r] = low_half(half) + high_half(half);
  }
  return (vf4)_mm_hadd_ps(_mm_hadd_ps((__m128)part[0], (__m128)part[1]),
                          _mm_hadd_ps((__m128)part[2], (__m128)part[3]));
#else
  return vf4{sum(v[0]), sum(v[1]), sum(v[2]), sum(v[3])};
#endif
}

// One number for each of the rows, to multiply vectors by.
struct PerRow {
  float of[kRows];
  PerRow(vf4 v) { memcpy(of, &v, sizeof v); }
};

inline vf4 inverse_root(vf4 v) {
#if defined(__x86_64__)
  return 1.0f / (vf4)_mm_sqrt_ps((__m128)v);
#else
  for (int i = 0; i < 4; ++i) v[i] = 1.0f / sqrtf(v[i]);
  return v;
#endif
}

template <bool centred, int rows, class T>
inline PerRow means(const T* x, int64_t size) {
  if (!centred) return vf4{};
  Sums total = {};
  for_vectors(size, MJK_EACH {
    for (int r = 0; r < rows; ++r) total[r] += load_part(x + r * size + i, left);
  });
  return sums(total) / (float)size;
}

// x less its mean where that is asked for; zeros past the last.
template <bool centred, class T>
inline vf deviation(const T* x, int64_t left, float mean) {
  const vf value = load_part(x, left);
  return centred ? first_part(value - mean, left) : value;
}

template <bool centred, int rows, class T>
inline void norm_some(int64_t size, float eps, const T* x, const T* scale, const T* bias, T* y) {
  const PerRow mean = means<centred, rows>(x, size);
  Sums squares = {};
  for_vectors(size, MJK_EACH {
    for (int r = 0; r < rows; ++r) {
      const vf value = deviation<centred>(x + r * size + i, left, mean.of[r]);
      squares[r] += value * value;
    }
  });
  const PerRow inverse = inverse_root(sums(squares) / (float)size + eps);
  for_vectors(size, MJK_EACH {
    const vf factor = load_part(scale + i, left), shift = centred ? load_part(bias + i, left) : vf{};
    for (int r = 0; r < rows; ++r) {
      const vf value = deviation<centred>(x + r * size + i, left, mean.of[r]) * inverse.of[r];
      store_part(y + r * size + i, centred ? value * factor + shift : rounded(value, x) * factor, left);
    }
  });
}

// y = normalised x times scale, plus bias where centred. RMSNorm rounds to T before the scale, as published.
template <class T, bool centred>
void norm_rows(int64_t first, int64_t last, int64_t size, float eps, const T* x, const T* scale, const T* bias, T* y) {
  int64_t r = first;
  for (; r + kRows <= last; r += kRows)
    norm_some<centred, kRows>(size, eps, x + r * size, scale, bias, y + r * size);
  for (; r < last; ++r) norm_some<centred, 1>(size, eps, x + r * size, scale, bias, y + r * size);
}

template <bool centred, int rows, class T>
inline void norm_grad_some(int64_t size, float eps, const T* x, const T* scale, const T* g, T* dx, float* d_scale,
                           float* d_bias) {
  const PerRow mean = means<centred, rows>(x, size);
  Sums squares = {}, along = {}, total = {};
  for_vectors(size, MJK_EACH {
    const vf factor = load_part(scale + i, left);
    for (int r = 0; r < rows; ++r) {
      const vf value = deviation<centred>(x + r * size + i, left, mean.of[r]);
      const vf inner = load_part(g + r * size + i, left) * factor;
      squares[r] += value * value;
      along[r] += inner * value;
      if (centred) total[r] += inner;
    }
  });
  const vf4 root = inverse_root(sums(squares) / (float)size + eps);
  const PerRow inverse = root, projection = sums(along) / (float)size * root;
  const PerRow inner_mean = centred ? sums(total) / (float)size : vf4{};
  for_vectors(size, MJK_EACH {
    const vf factor = load_part(scale + i, left);
    vf scale_sum = load(d_scale + i), bias_sum = centred ? load(d_bias + i) : vf{};
    for (int r = 0; r < rows; ++r) {
      const vf value = deviation<centred>(x + r * size + i, left, mean.of[r]) * inverse.of[r];
      const vf outer = load_part(g + r * size + i, left);
      scale_sum += outer * (centred ? value : rounded(value, x));
      bias_sum += outer;
      const vf inner = centred ? outer * factor - inner_mean.of[r] : outer * factor;
      store_part(dx + r * size + i, (inner - value * projection.of[r]) * inverse.of[r], left);
    }
    store(d_scale + i, scale_sum);
    if (centred) store(d_bias + i, bias_sum);
  });
}

// dx, and the gradients of scale and bias added to d_scale and d_bias, which have whole vectors. dx may be g.
template <class T, bool centred>
void norm_grad_rows(int64_t first, int64_t last, int64_t size, float eps, const T* x, const T* scale, const T* g, T* dx,
                    float* d_scale, float* d_bias) {
  int64_t r = first;
  for (; r + kRows <= last; r += kRows)
    norm_grad_some<centred, kRows>(size, eps, x + r * size, scale, g + r * size, dx + r * size, d_scale, d_bias);
  for (; r < last; ++r)
    norm_grad_some<centred, 1>(size, eps, x + r * size, scale, g + r * size, dx + r * size, d_scale, d_bias);
}

template <class V>
inline V sigmoid(V x) {
  return reciprocal(1.0f + exponential(0.0f - x));
}

// out = silu(gate) * up
template <class T>
void silu_product(int64_t first, int64_t last, const T* gate, const T* up, T* out) {
  gate += first, up += first, out += first;
  for_several(gate, last - first, MJK_SEVERAL {
    const auto x = load_like(of, gate + i, left);
    store_part(out + i, x * sigmoid(x) * load_like(of, up + i, left), left);
  });
}

template <class T>
void silu_product_grad(int64_t first, int64_t last, const T* gate, const T* up, const T* g, T* d_gate, T* d_up) {
  gate += first, up += first, g += first, d_gate += first, d_up += first;
  for_several(gate, last - first, MJK_SEVERAL {
    const auto x = load_like(of, gate + i, left), y = load_like(of, up + i, left), outer = load_like(of, g + i, left);
    const auto s = sigmoid(x);
    store_part(d_up + i, outer * x * s, left);
    store_part(d_gate + i, outer * y * s * (1.0f + x * (1.0f - s)), left);
  });
}

// out[width] = silu(gate) * up * scale of gate_up[2 width] for each row; scale NULL: 1
template <class T>
void swiglu_rows(int64_t first, int64_t last, int64_t width, const T* gate_up, const float* scale, T* out) {
  for (int64_t r = first; r < last; ++r) {
    const T *gate = gate_up + r * 2 * width, *up = gate + width;
    const float factor = scale ? scale[r] : 1.0f;
    for_several(gate, width, MJK_SEVERAL {
      const auto x = load_like(of, gate + i, left);
      store_part(out + r * width + i, x * sigmoid(x) * load_like(of, up + i, left) * factor, left);
    });
  }
}

template <class T>
void swiglu_grad_rows(int64_t first, int64_t last, int64_t width, const T* gate_up, const float* scale, const T* g,
                      T* d_gate_up, float* d_scale) {
  for (int64_t r = first; r < last; ++r) {
    const T *gate = gate_up + r * 2 * width, *up = gate + width;
    T *d_gate = d_gate_up + r * 2 * width, *d_up = d_gate + width;
    const float factor = scale ? scale[r] : 1.0f;
    vf total = {};
    for_several(gate, width, MJK_SEVERAL {
      const auto x = load_like(of, gate + i, left), y = load_like(of, up + i, left);
      const auto outer = load_like(of, g + r * width + i, left);
      const auto s = sigmoid(x), scaled = outer * factor;
      store_part(d_gate + i, scaled * y * s * (1.0f + x * (1.0f - s)), left);
      store_part(d_up + i, scaled * x * s, left);
      total += joined(outer * x * s * y);
    });
    if (d_scale) d_scale[r] = sum(total);
  }
}

// The standard normal distribution: what is below x, and the density times sqrt(2 pi).
template <class V>
struct Normal {
  V below, density;
};

// What is further out than t is density times a polynomial in (t - 3) / (t + 3), a minimax fit of the relative error
// (7e-9) for t up to 13.25, where the density is 0.
template <class V>
inline Normal<V> normal(V x) {
  const V density = exponential(x * x * -0.5f);
  const V w = reciprocal(at_most(20.0f, absolute(x)) + 3.0f) * -6.0f + 1.0f;
  V p = w * 5.4150834e-5f + 1.1603736e-4f;
  p = p * w - 3.3991132e-4f;
  p = p * w - 9.8418270e-4f;
  p = p * w + 2.9047027e-3f;
  p = p * w + 6.1321831e-3f;
  p = p * w - 4.6213314e-2f;
  p = p * w + 1.2322502e-1f;
  p = p * w - 2.0640261e-1f;
  p = p * w + 1.2151395e-1f;
  const V tail = p * density;
  return {where_negative(x, tail, 1.0f - tail), density};
}

// gelu(x) by tanh is x sigmoid(2 u), 2 u = x (kGelu + kCubic x^2) = 2 sqrt(2 / pi) (x + 0.044715 x^3).
constexpr float kGelu = 1.5957691216057308f, kCubic = 0.044715f * kGelu;

template <bool exact, class V>
inline V gelu(V x) {
  if constexpr (exact)
    return x * normal(x).below;
  else
    return x * sigmoid(x * (kCubic * (x * x) + kGelu));
}

template <bool exact, class V>
inline V gelu_slope(V x) {
  if constexpr (exact) {
    const Normal<V> at = normal(x);
    return at.below + x * at.density * 0.3989422804f;
  } else {
    const V s = sigmoid(x * (kCubic * (x * x) + kGelu));
    return s + x * s * (1.0f - s) * (3.0f * kCubic * (x * x) + kGelu);
  }
}

// y = gelu(z), z = x + bias on rows of `size`, rounded to T; z is kept where it is not NULL.
template <bool exact, class X, class T>
void bias_gelu_rows(int64_t first, int64_t last, int64_t size, const X* x, const T* bias, T* y, T* z) {
  for (int64_t r = first; r < last; ++r)
    for_several(y, size, MJK_SEVERAL {
      const int64_t at = r * size + i;
      const auto total = rounded(load_like(of, x + at, left) + load_like(of, bias + i, left), y);
      if (z) store_part(z + at, total, left);
      store_part(y + at, gelu<exact>(total), left);
    });
}

// dx, and the bias's gradient added to d_bias, which has whole vectors. dx may be g.
template <bool exact, class T>
void bias_gelu_grad_rows(int64_t first, int64_t last, int64_t size, const T* x, const T* bias, const T* g, T* dx,
                         float* d_bias) {
  for (int64_t r = first; r < last; ++r)
    for_several(x, size, MJK_SEVERAL {
      const int64_t at = r * size + i;
      const auto total = rounded(load_like(of, x + at, left) + load_like(of, bias + i, left), x);
      const auto d = load_like(of, g + at, left) * gelu_slope<exact>(total);
      store_part(dx + at, d, left);
      store_part(d_bias + i, load_like(of, d_bias + i, MJK_LANES) + d, MJK_LANES);
    });
}

// Rows added to `total`, which has whole vectors.
template <class T>
void add_rows(int64_t first, int64_t last, int64_t size, const T* x, float* total) {
  for_several(x, size, MJK_SEVERAL {
    auto so_far = load_like(of, total + i, MJK_LANES);
    for (int64_t r = first; r < last; ++r) so_far = so_far + load_like(of, x + r * size + i, left);
    store_part(total + i, so_far, MJK_LANES);
  });
}

// Rotates the pairs (i, i + dim / 2) of each head by cos and sin[rows, dim / 2]; `sign` -1 turns back.
template <class T>
void rope_rows(int64_t first, int64_t last, int64_t heads, int64_t dim, float sign, const T* x, const float* cosine,
               const float* sine, T* y) {
  const int64_t half = dim / 2;
  for (int64_t r = first; r < last; ++r)
    for (int64_t h = 0; h < heads; ++h) {
      const T* from = x + (r * heads + h) * dim;
      T* to = y + (r * heads + h) * dim;
      for_vectors(half, MJK_EACH {
        const vf a = load_part(from + i, left), b = load_part(from + half + i, left);
        const vf c = load_part(cosine + r * half + i, left), s = sign * load_part(sine + r * half + i, left);
        store_part(to + i, a * c - b * s, left);
        store_part(to + half + i, b * c + a * s, left);
      });
    }
}

#undef MJK_EACH
#undef MJK_SEVERAL

}  // namespace
