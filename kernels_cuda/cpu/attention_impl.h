// Attention inside segments and its gradient in float32, for one instruction set; included inside a namespace.
//
// One task is one key/value head of one row of the batch. Its keys and values are copied once, as they are and
// transposed, so that every product below reads its right side along rows; queries go in blocks, and of the keys a
// block looks at those alone that one of its queries may see. Each sum has one fixed order, whatever the threads.
#pragma once
#include <math.h>

#include "launch_cpu.h"
#include "scratch.h"
#include "simd.h"

namespace {

constexpr int32_t kNoLimit = INT32_MAX;

constexpr int64_t kStrip = 2 * MJK_LANES;  // columns of a register tile
constexpr int64_t kTile = 12;              // its rows
constexpr int64_t kBlockBytes = 256 * 1024;
constexpr int64_t kMaxBlock = 96;

// c[rows, n] = (or +=) a[rows, depth] b[depth, n]; a by any two strides, n a multiple of kStrip.
template <int rows>
inline void tile_product(int64_t n, int64_t depth, const float* a, int64_t a_row, int64_t a_column, const float* b,
                         int64_t b_row, float* c, int64_t c_row, bool add) {
  for (int64_t j = 0; j < n; j += kStrip) {
    vf low[rows], high[rows];
#pragma GCC unroll 12
    for (int i = 0; i < rows; ++i) {
      low[i] = add ? load(c + i * c_row + j) : vf{};
      high[i] = add ? load(c + i * c_row + j + MJK_LANES) : vf{};
    }
    for (int64_t k = 0; k < depth; ++k) {
      const vf first = load(b + k * b_row + j), second = load(b + k * b_row + j + MJK_LANES);
#pragma GCC unroll 12
      for (int i = 0; i < rows; ++i) {
        const vf x = splat(a[i * a_row + k * a_column]);
        low[i] += x * first;
        high[i] += x * second;
      }
    }
#pragma GCC unroll 12
    for (int i = 0; i < rows; ++i) {
      store(c + i * c_row + j, low[i]);
      store(c + i * c_row + j + MJK_LANES, high[i]);
    }
  }
}

// tile_product for any number of rows up to kTile.
template <int rows = kTile - 1, class... Args>
inline void edge_product(int64_t m, Args... args) {
  if constexpr (rows > 0) {
    if (m == rows)
      tile_product<rows>(args...);
    else
      edge_product<rows - 1>(m, args...);
  }
}

inline void product(int64_t m, int64_t n, int64_t depth, const float* a, int64_t a_row, int64_t a_column, const float* b,
                    int64_t b_row, float* c, int64_t c_row, bool add) {
  int64_t i = 0;
  for (; i + kTile <= m; i += kTile)
    tile_product<kTile>(n, depth, a + i * a_row, a_row, a_column, b, b_row, c + i * c_row, c_row, add);
  edge_product(m - i, n, depth, a + i * a_row, a_row, a_column, b, b_row, c + i * c_row, c_row, add);
}

// x[keys] by rows of `stride`, each to a row of `width`; what lies beyond in `to` stays zero.
template <class T>
inline void copy_rows(const T* x, int64_t keys, int64_t dim, int64_t stride, int64_t width, float* to) {
  for (int64_t s = 0; s < keys; ++s) copy_row(x + s * stride, dim, 1.0f, to + s * width);
}

// The same as columns: to[dim, size].
template <class T>
inline void copy_columns(const T* x, int64_t keys, int64_t dim, int64_t stride, int64_t size, float* to) {
  constexpr int64_t block = 16;
  for (int64_t s0 = 0; s0 < keys; s0 += block)
    for (int64_t d = 0; d < dim; ++d)
      for (int64_t s = s0; s < least(keys, s0 + block); ++s) to[d * size + s] = to_float(x[s * stride + d]);
}

// Divides the thread's scratch memory; the first `zeroed` parts are cleared.
template <int count>
inline void carve(int zeroed, const int64_t (&sizes)[count], float* (&parts)[count]) {
  int64_t total = 0;
  for (int64_t size : sizes) total += round_up(size, 16);
  float* memory = reinterpret_cast<float*>(mindjax::thread_scratch(total * sizeof(float)));
  if (!memory) abort();
  for (int i = 0; i < count; ++i) {
    parts[i] = memory;
    memory += round_up(sizes[i], 16);
    if (i < zeroed) memset(parts[i], 0, sizes[i] * sizeof(float));
  }
}

struct Segments {
  const int32_t *query, *index, *key;
  int64_t keys;

  // `padded` holds zeros, which nobody attends to, for all keys up to a whole strip.
  Segments(const mjk_attention_shape& shape, const int32_t* q, const int32_t* kv, const int32_t* q_index, int64_t row,
           float* padded)
      : query(q + row * shape.queries), index(q_index), key(reinterpret_cast<int32_t*>(padded)), keys(shape.keys) {
    memcpy(padded, kv + row * shape.keys, shape.keys * sizeof(int32_t));
  }

  // The last key that query t may see, by its place.
  int32_t limit(int64_t t) const { return index[t] < 0 ? kNoLimit : index[t]; }

  // Keys [first, last), whole strips, outside which no query of the block sees any.
  void range(int64_t t0, int64_t t1, int64_t* first, int64_t* last) const {
    int64_t low = kNoLimit, high = 0, end = -1;
    for (int64_t t = t0; t < t1; ++t) {
      if (query[t] == 0) continue;
      low = least(low, query[t]);
      high = most(high, query[t]);
      end = most(end, limit(t));
    }
    const int64_t stop = least(keys, end + 1);
    int64_t a = 0, b = stop;
    while (a < stop && (key[a] < low || key[a] > high)) ++a;
    while (b > a && (key[b - 1] < low || key[b - 1] > high)) --b;
    *first = a / kStrip * kStrip;
    *last = a == b ? *first : round_up(b, kStrip);
  }
};

inline vi allowed(const Segments& segments, int64_t t, int64_t s, vi lane) {
  const vi key = load_int(&segments.key[s]);
  const vi seen = lane + (int32_t)s <= splat_int(segments.limit(t));
  return (key == splat_int(segments.query[t])) & (key != 0) & seen;
}

inline vi lanes() {
  vi lane;
  for (int i = 0; i < MJK_LANES; ++i) lane[i] = i;
  return lane;
}

inline int64_t block_rows(const mjk_attention_shape& shape) {
  const int64_t fitting = kBlockBytes / 4 / round_up(shape.keys, kStrip) / kTile * kTile;
  const int64_t largest_block = least(kMaxBlock, most(kTile, fitting));
  const int64_t blocks = (shape.queries + largest_block - 1) / largest_block;
  return (shape.queries + blocks - 1) / blocks;
}

template <class T>
void attention_task(const mjk_attention_shape& shape, const T* q, const T* k, const T* v, const int32_t* q_segments,
                    const int32_t* kv_segments, const int32_t* q_index, T* out, float* normaliser, int64_t task) {
  const int64_t row = task / shape.kv_heads, head = task % shape.kv_heads, dim = shape.dim;
  const int64_t group = shape.heads / shape.kv_heads, kv_stride = shape.kv_heads * dim, stride = shape.heads * dim;
  const int64_t kv_start = row * shape.keys * kv_stride + head * dim;
  // Padded to whole register tiles.
  const int64_t size = round_up(shape.keys, kStrip), width = round_up(dim, kStrip), block = block_rows(shape);
  float* parts[7];
  carve(3, {size, dim * size, size * width, block * dim, block * size, block * width, block}, parts);
  float *key_columns = parts[1], *values = parts[2], *queries = parts[3], *scores = parts[4], *result = parts[5],
        *total = parts[6];
  const Segments segments(shape, q_segments, kv_segments, q_index, row, parts[0]);
  copy_columns(k + kv_start, shape.keys, dim, kv_stride, size, key_columns);
  copy_rows(v + kv_start, shape.keys, dim, kv_stride, width, values);
  const float scale = 1.0f / sqrtf((float)dim);
  const vi lane = lanes();
  const vf nothing = splat(-INFINITY);

  for (int64_t h = head * group; h < (head + 1) * group; ++h) {
    for (int64_t t0 = 0; t0 < shape.queries; t0 += block) {
      const int64_t count = least(block, shape.queries - t0);
      int64_t first, last;
      segments.range(t0, t0 + count, &first, &last);
      const T* from = q + (row * shape.queries + t0) * stride + h * dim;
      for (int64_t i = 0; i < count; ++i) copy_row(from + i * stride, dim, scale, &queries[i * dim]);
      product(count, last - first, dim, queries, dim, 1, &key_columns[first], size, &scores[first], size,
              false);
      for (int64_t i = 0; i < count; ++i) {
        float* line = &scores[i * size];
        vf top = nothing;
        for (int64_t s = first; s < last; s += MJK_LANES) {
          const vf x = select(allowed(segments, t0 + i, s, lane), load(line + s), nothing);
          store(line + s, x);
          top = maximum(top, x);
        }
        const float top_score = largest(top);
        const bool any = top_score > -INFINITY;
        vf sums = {};
        for (int64_t s = first; s < last; s += MJK_LANES) {
          const vf weight = any ? exponential(load(line + s) - top_score) : vf{};
          store(line + s, weight);
          sums += weight;
        }
        total[i] = any ? sum(sums) : 1.0f;
        const float inverse = 1.0f / total[i];
        // Rounded as weights of the dtype, which is what decoding does too: the two must agree.
        if (sizeof(T) == 2)
          for (int64_t s = first; s < last; s += MJK_LANES) store(line + s, rounded(load(line + s) * inverse, q));
        normaliser[(row * shape.heads + h) * shape.queries + t0 + i] =
            any ? top_score + logf(total[i]) : INFINITY;
      }
      product(count, width, last - first, &scores[first], size, 1, &values[first * width], width, result,
              width, false);
      T* to = out + (row * shape.queries + t0) * stride + h * dim;
      for (int64_t i = 0; i < count; ++i) write_row(&result[i * width], dim, sizeof(T) == 2 ? 1.0f : 1.0f / total[i], to + i * stride);
    }
  }
}

template <class T>
void attention_grad_task(const mjk_attention_shape& shape, const T* q, const T* k, const T* v, const int32_t* q_segments,
                         const int32_t* kv_segments, const int32_t* q_index, const T* out, const float* normaliser,
                         const T* g, T* dq, T* dk, T* dv, int64_t task) {
  const int64_t row = task / shape.kv_heads, head = task % shape.kv_heads, dim = shape.dim;
  const int64_t group = shape.heads / shape.kv_heads, kv_stride = shape.kv_heads * dim, stride = shape.heads * dim;
  const int64_t kv_start = row * shape.keys * kv_stride + head * dim;
  const int64_t size = round_up(shape.keys, kStrip), width = round_up(dim, kStrip), block = block_rows(shape);
  float* parts[11];
  carve(8,
        {size, size * width, dim * size, dim * size, block * width, block * width, size * width, size * width,
         block * size, block * size, block * width},
        parts);
  float *keys = parts[1], *key_columns = parts[2], *value_columns = parts[3], *queries = parts[4], *gradients = parts[5],
        *d_keys = parts[6], *d_values = parts[7], *weights = parts[8], *d_scores = parts[9], *result = parts[10];
  const Segments segments(shape, q_segments, kv_segments, q_index, row, parts[0]);
  copy_rows(k + kv_start, shape.keys, dim, kv_stride, width, keys);
  copy_columns(k + kv_start, shape.keys, dim, kv_stride, size, key_columns);
  copy_columns(v + kv_start, shape.keys, dim, kv_stride, size, value_columns);
  const float scale = 1.0f / sqrtf((float)dim);
  const vi lane = lanes();

  for (int64_t h = head * group; h < (head + 1) * group; ++h) {
    for (int64_t t0 = 0; t0 < shape.queries; t0 += block) {
      const int64_t count = least(block, shape.queries - t0);
      int64_t first, last;
      segments.range(t0, t0 + count, &first, &last);
      const int64_t start = (row * shape.queries + t0) * stride + h * dim, seen = last - first;
      for (int64_t i = 0; i < count; ++i) {
        copy_row(q + start + i * stride, dim, scale, &queries[i * width]);
        copy_row(g + start + i * stride, dim, 1.0f, &gradients[i * width]);
      }
      product(count, seen, dim, queries, width, 1, &key_columns[first], size, &weights[first], size, false);
      product(count, seen, dim, gradients, width, 1, &value_columns[first], size, &d_scores[first], size,
              false);
      for (int64_t i = 0; i < count; ++i) {
        const float inner = dot(&gradients[i * width], out + start + i * stride, dim);
        const float norm = normaliser[(row * shape.heads + h) * shape.queries + t0 + i];
        float *weight = &weights[i * size], *d_score = &d_scores[i * size];
        for (int64_t s = first; s < last; s += MJK_LANES) {
          vf w = exponential(load(weight + s) - norm);
          w = select(allowed(segments, t0 + i, s, lane), w, vf{});
          store(weight + s, w);
          store(d_score + s, w * (load(d_score + s) - inner));
        }
      }
      product(count, width, seen, &d_scores[first], size, 1, &keys[first * width], width, result, width,
              false);
      for (int64_t i = 0; i < count; ++i) write_row(&result[i * width], dim, scale, dq + start + i * stride);
      // `queries` carry the scale already.
      product(seen, width, count, &d_scores[first], 1, size, queries, width, &d_keys[first * width], width, true);
      product(seen, width, count, &weights[first], 1, size, gradients, width, &d_values[first * width], width,
              true);
    }
  }
  for (int64_t s = 0; s < shape.keys; ++s) {
    write_row(&d_keys[s * width], dim, 1.0f, dk + kv_start + s * kv_stride);
    write_row(&d_values[s * width], dim, 1.0f, dv + kv_start + s * kv_stride);
  }
}

}  // namespace
