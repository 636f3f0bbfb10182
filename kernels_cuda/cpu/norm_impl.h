// Normalisation, activations and rotary positions with their gradients, for one instruction set.
#pragma once
#include <math.h>

#include "launch_cpu.h"
#include "simd.h"

namespace {

// One row of float32 in `to`; beyond `size` zeros up to whole vectors.
template <class T>
inline void widen_row(const T* from, int64_t size, float* to) {
  const int64_t padded = round_up(size, MJK_LANES);
  for (int64_t i = size; i < padded; ++i) to[i] = 0;
  copy_row(from, size, 1.0f, to);
}

// Divides x[size], padded with zeros, by the root of its mean square plus eps, in place; `centred` subtracts the mean
// before (LayerNorm). Returns the factor.
template <bool centred>
inline float normalise(float* x, int64_t size, float eps) {
  const int64_t padded = round_up(size, MJK_LANES);
  if (centred) {
    vf total = {};
    for (int64_t i = 0; i < padded; i += MJK_LANES) total += load(x + i);
    const float mean = sum(total) / (float)size;
    for (int64_t i = 0; i < size; i += MJK_LANES) store(x + i, load(x + i) - mean);
    for (int64_t i = size; i < padded; ++i) x[i] = 0;
  }
  vf squares = {};
  for (int64_t i = 0; i < padded; i += MJK_LANES) squares += load(x + i) * load(x + i);
  const float inverse = 1.0f / sqrtf(sum(squares) / (float)size + eps);
  for (int64_t i = 0; i < padded; i += MJK_LANES) store(x + i, load(x + i) * inverse);
  return inverse;
}

// y = normalised x times scale, plus bias where centred. RMSNorm rounds to T before the scale, as published.
template <class T, bool centred>
void norm_rows(int64_t first, int64_t last, int64_t size, float eps, const T* x, const T* scale, const T* bias, T* y) {
  const int64_t padded = round_up(size, MJK_LANES);
  Buffer<float> row(padded), factor(padded), shift(padded);
  widen_row(scale, size, factor.data);
  if (centred) widen_row(bias, size, shift.data);
  for (int64_t r = first; r < last; ++r) {
    widen_row(x + r * size, size, row.data);
    normalise<centred>(row.data, size, eps);
    for (int64_t i = 0; i < padded; i += MJK_LANES) {
      const vf value = load(&row[i]);
      store(&row[i], centred ? value * load(&factor[i]) + load(&shift[i]) : rounded(value, x) * load(&factor[i]));
    }
    write_row(row.data, size, 1.0f, y + r * size);
  }
}

// dx, and the sums over these rows of the gradients of scale and bias, in d_scale[size] and d_bias[size].
template <class T, bool centred>
void norm_grad_rows(int64_t first, int64_t last, int64_t size, float eps, const T* x, const T* scale, const T* g, T* dx,
                    float* d_scale, float* d_bias) {
  const int64_t padded = round_up(size, MJK_LANES);
  Buffer<float> row(padded), gradient(padded), factor(padded), scale_sum(padded), bias_sum(padded);
  widen_row(scale, size, factor.data);
  for (int64_t r = first; r < last; ++r) {
    widen_row(x + r * size, size, row.data);
    widen_row(g + r * size, size, gradient.data);
    const float inverse = normalise<centred>(row.data, size, eps);
    vf along = {}, total = {};
    for (int64_t i = 0; i < padded; i += MJK_LANES) {
      const vf value = load(&row[i]), outer = load(&gradient[i]), inner = outer * load(&factor[i]);
      store(&scale_sum[i], load(&scale_sum[i]) + outer * (centred ? value : rounded(value, x)));
      if (centred) store(&bias_sum[i], load(&bias_sum[i]) + outer);
      along += inner * value;
      total += inner;
      store(&gradient[i], inner);
    }
    const float projection = sum(along) / (float)size, mean = centred ? sum(total) / (float)size : 0.0f;
    for (int64_t i = 0; i < padded; i += MJK_LANES)
      store(&row[i], (load(&gradient[i]) - mean - load(&row[i]) * projection) * inverse);
    write_row(row.data, size, 1.0f, dx + r * size);
  }
  memcpy(d_scale, scale_sum.data, size * sizeof(float));
  if (centred) memcpy(d_bias, bias_sum.data, size * sizeof(float));
}

inline vf sigmoid(vf x) { return 1.0f / (1.0f + exponential(-x)); }

// A vector of which `left` elements are there; the rest are zeros, and are not written.
template <class T>
inline vf load_part(const T* p, int64_t left) {
  if (left >= MJK_LANES) return load(p);
  vf v = {};
  for (int64_t i = 0; i < left; ++i) v[i] = to_float(p[i]);
  return v;
}

template <class T>
inline void store_part(T* p, vf v, int64_t left) {
  if (left >= MJK_LANES) return store(p, v);
  for (int64_t i = 0; i < left; ++i) assign(p + i, v[i]);
}

// out = silu(gate) * up
template <class T>
void silu_product(int64_t first, int64_t last, const T* gate, const T* up, T* out) {
  for (int64_t i = first; i < last; i += MJK_LANES) {
    const int64_t left = last - i;
    const vf x = load_part(gate + i, left);
    store_part(out + i, x * sigmoid(x) * load_part(up + i, left), left);
  }
}

template <class T>
void silu_product_grad(int64_t first, int64_t last, const T* gate, const T* up, const T* g, T* d_gate, T* d_up) {
  for (int64_t i = first; i < last; i += MJK_LANES) {
    const int64_t left = last - i;
    const vf x = load_part(gate + i, left), outer = load_part(g + i, left), s = sigmoid(x);
    store_part(d_up + i, outer * x * s, left);
    store_part(d_gate + i, outer * load_part(up + i, left) * s * (1.0f + x * (1.0f - s)), left);
  }
}

// out[width] = silu(gate) * up * scale of gate_up[2 width] for each row; scale NULL: 1
template <class T>
void swiglu_rows(int64_t first, int64_t last, int64_t width, const T* gate_up, const float* scale, T* out) {
  for (int64_t r = first; r < last; ++r) {
    const T *gate = gate_up + r * 2 * width, *up = gate + width;
    const float factor = scale ? scale[r] : 1.0f;
    for (int64_t i = 0; i < width; i += MJK_LANES) {
      const int64_t left = width - i;
      const vf x = load_part(gate + i, left);
      store_part(out + r * width + i, x * sigmoid(x) * load_part(up + i, left) * factor, left);
    }
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
    for (int64_t i = 0; i < width; i += MJK_LANES) {
      const int64_t left = width - i;
      const vf x = load_part(gate + i, left), y = load_part(up + i, left), outer = load_part(g + r * width + i, left);
      const vf s = sigmoid(x), scaled = outer * factor;
      store_part(d_gate + i, scaled * y * s * (1.0f + x * (1.0f - s)), left);
      store_part(d_up + i, scaled * x * s, left);
      total += outer * x * s * y;
    }
    if (d_scale) d_scale[r] = sum(total);
  }
}

// gelu(x) by tanh is x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3).
constexpr float kGelu = 1.5957691216057308f, kCubic = 0.044715f;

// y = gelu(x + bias) on rows of `size`
template <class T>
void bias_gelu_rows(int64_t first, int64_t last, int64_t size, const T* x, const T* bias, T* y) {
  for (int64_t r = first; r < last; ++r)
    for (int64_t i = 0; i < size; i += MJK_LANES) {
      const int64_t left = size - i, at = r * size + i;
      const vf z = rounded(load_part(x + at, left) + load_part(bias + i, left), x);
      store_part(y + at, z * sigmoid(kGelu * (z + kCubic * z * z * z)), left);
    }
}

// dx, and the sum over these rows of the bias's gradient.
template <class T>
void bias_gelu_grad_rows(int64_t first, int64_t last, int64_t size, const T* x, const T* bias, const T* g, T* dx,
                         float* d_bias) {
  Buffer<float> total(round_up(size, MJK_LANES));
  for (int64_t r = first; r < last; ++r)
    for (int64_t i = 0; i < size; i += MJK_LANES) {
      const int64_t left = size - i, at = r * size + i;
      const vf z = rounded(load_part(x + at, left) + load_part(bias + i, left), x);
      const vf s = sigmoid(kGelu * (z + kCubic * z * z * z));
      const vf slope = s + z * s * (1.0f - s) * kGelu * (1.0f + 3.0f * kCubic * z * z);
      const vf d = load_part(g + at, left) * slope;
      store_part(dx + at, d, left);
      store(&total[i], load(&total[i]) + d);
    }
  memcpy(d_bias, total.data, size * sizeof(float));
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
      for (int64_t i = 0; i < half; i += MJK_LANES) {
        const int64_t left = half - i;
        const vf a = load_part(from + i, left), b = load_part(from + half + i, left);
        const vf c = load_part(cosine + r * half + i, left), s = sign * load_part(sine + r * half + i, left);
        store_part(to + i, a * c - b * s, left);
        store_part(to + half + i, b * c + a * s, left);
      }
    }
}

}  // namespace
