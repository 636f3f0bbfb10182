// One new token per row attends to its prompt and to what the row has generated, for one instruction set.
#pragma once
#include <math.h>

#include "launch_cpu.h"
#include "scratch.h"
#include "simd.h"

namespace {

// Consecutive keys or values.
template <class T>
struct Span {
  const T* data;
  int64_t count;
};

// scores[i] = q . keys[i], in float32; q holds whole vectors, zeros past dim.
template <class T>
inline void score_keys(const float* q, const Span<T>& keys, int64_t dim, float* scores) {
  for (int64_t s = 0; s < keys.count; ++s) scores[s] = dot(q, keys.data + s * dim, dim);
}

template <class T>
inline void add_values(const float* weights, const Span<T>& values, int64_t dim, float* out) {
  for (int64_t s = 0; s < values.count; ++s) {
    const T* value = values.data + s * dim;
    int64_t d = 0;
    for (; d + MJK_LANES <= dim; d += MJK_LANES) store(out + d, load(out + d) + weights[s] * load(value + d));
    for (; d < dim; ++d) out[d] += weights[s] * to_float(value[d]);
  }
}

// One task is one key/value head of one row: writes the new key and value, then answers the head's queries.
template <class T>
void decode_task(const mjk_decode_shape& shape, const T* q, const T* k, const T* v, const T* prompt_k, const T* prompt_v,
                 T* own_k, T* own_v, const int32_t* segments, const int32_t* prompts, int64_t layer, int64_t step,
                 T* out, int64_t task) {
  const int64_t row = task / shape.kv_heads, head = task % shape.kv_heads, dim = shape.dim;
  const int64_t group = shape.heads / shape.kv_heads, prompt = prompts[row];
  const int64_t old = ((layer * shape.prompts + prompt) * shape.kv_heads + head) * shape.keys * dim;
  const int64_t own = ((layer * shape.rows + row) * shape.kv_heads + head) * shape.capacity * dim;
  memcpy(own_k + own + step * dim, k + (row * shape.kv_heads + head) * dim, dim * sizeof(T));
  memcpy(own_v + own + step * dim, v + (row * shape.kv_heads + head) * dim, dim * sizeof(T));

  const int64_t keys = shape.keys, count = keys + step + 1, padded = round_up(count, MJK_LANES);
  const int64_t width = round_up(dim, MJK_LANES);
  float* query = reinterpret_cast<float*>(mindjax::thread_scratch((2 * width + padded) * sizeof(float)));
  if (!query) abort();
  float *result = query + width, *scores = result + width;
  const int32_t* seen = segments + prompt * keys;
  const float scale = 1.0f / sqrtf((float)dim);
  for (int64_t h = head * group; h < (head + 1) * group; ++h) {
    memset(query, 0, 2 * width * sizeof(float));
    copy_row(q + (row * shape.heads + h) * dim, dim, scale, query);
    score_keys(query, Span<T>{prompt_k + old, keys}, dim, scores);
    score_keys(query, Span<T>{own_k + own, step + 1}, dim, scores + keys);
    float top = -INFINITY;
    for (int64_t s = 0; s < keys; ++s)
      if (!seen[s]) scores[s] = -INFINITY;
    for (int64_t s = 0; s < count; ++s) top = scores[s] > top ? scores[s] : top;
    for (int64_t s = count; s < padded; ++s) scores[s] = -INFINITY;
    vf total = {};
    for (int64_t s = 0; s < padded; s += MJK_LANES) {
      const vf weight = exponential(load(scores + s) - top);
      store(scores + s, weight);
      total += weight;
    }
    // Rounded as weights of the dtype: see attention_task.
    const float inverse = 1.0f / sum(total);
    for (int64_t s = 0; s < padded; s += MJK_LANES) store(scores + s, rounded(load(scores + s) * inverse, q));
    add_values(scores, Span<T>{prompt_v + old, keys}, dim, result);
    add_values(scores + keys, Span<T>{own_v + own, step + 1}, dim, result);
    write_row(result, dim, 1.0f, out + (row * shape.heads + h) * dim);
  }
}

}  // namespace
