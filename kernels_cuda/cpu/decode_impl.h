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

// So many queries of a head are answered together: what a key or a value costs is reading it.
constexpr int64_t kTogether = 4;
constexpr int kVectors = MJK_LANES == 16 ? 4 : 2;  // of a value, whose sums stay in registers

// scores[i][s] = q[i] . keys[s], in float32; rows of q are `width` apart, those of the scores `padded`. Meanwhile the
// values that will be wanted, as large as the keys, are fetched.
template <int queries, class T>
inline void score_keys(const float* q, int64_t width, const Span<T>& keys, const Span<T>& values, int64_t dim,
                       float* scores, int64_t padded) {
  for (int64_t s = 0; s < keys.count; ++s) {
    const T* key = keys.data + s * dim;
    for (int64_t d = 0; d < dim; d += 64 / sizeof(T)) __builtin_prefetch(values.data + s * dim + d);
    vf sums[queries] = {};
    int64_t d = 0;
    for (; d + MJK_LANES <= dim; d += MJK_LANES) {
      const vf x = load(key + d);
      for (int i = 0; i < queries; ++i) sums[i] += load(q + i * width + d) * x;
    }
    for (int i = 0; i < queries; ++i) {
      float rest = sum(sums[i]);
      for (int64_t e = d; e < dim; ++e) rest += q[i * width + e] * to_float(key[e]);
      scores[i * padded + s] = rest;
    }
  }
}

// out[i] += the sum of weights[i][s] values[s], for `vectors` vectors of them.
template <int queries, int vectors, class T>
inline void add_vectors(const float* weights, int64_t padded, const Span<T>& values, int64_t dim, float* out,
                        int64_t width) {
  vf sums[queries][vectors];
  for (int i = 0; i < queries; ++i)
    for (int j = 0; j < vectors; ++j) sums[i][j] = load(out + i * width + j * MJK_LANES);
  for (int64_t s = 0; s < values.count; ++s) {
    vf x[vectors];
    for (int j = 0; j < vectors; ++j) x[j] = load(values.data + s * dim + j * MJK_LANES);
    for (int i = 0; i < queries; ++i) {
      const vf weight = splat(weights[i * padded + s]);
      for (int j = 0; j < vectors; ++j) sums[i][j] += weight * x[j];
    }
  }
  for (int i = 0; i < queries; ++i)
    for (int j = 0; j < vectors; ++j) store(out + i * width + j * MJK_LANES, sums[i][j]);
}

template <int queries, class T>
inline void add_values(const float* weights, int64_t padded, const Span<T>& values, int64_t dim, float* out,
                       int64_t width) {
  int64_t d = 0;
  for (; d + kVectors * MJK_LANES <= dim; d += kVectors * MJK_LANES)
    add_vectors<queries, kVectors>(weights, padded, Span<T>{values.data + d, values.count}, dim, out + d, width);
  for (; d + MJK_LANES <= dim; d += MJK_LANES)
    add_vectors<queries, 1>(weights, padded, Span<T>{values.data + d, values.count}, dim, out + d, width);
  for (; d < dim; ++d)
    for (int i = 0; i < queries; ++i)
      for (int64_t s = 0; s < values.count; ++s)
        out[i * width + d] += weights[i * padded + s] * to_float(values.data[s * dim + d]);
}

// What `queries` queries of one head see: two spans of keys and of values, and which of the first.
template <class T>
struct Seen {
  Span<T> keys[2], values[2];
  const int32_t* segments;
  int64_t dim;
};

template <int queries, class T>
void answer(const Seen<T>& seen, const T* q, T* out, float* scratch) {
  const int64_t dim = seen.dim, width = round_up(dim, MJK_LANES), first = seen.keys[0].count;
  const int64_t count = first + seen.keys[1].count, padded = round_up(count, MJK_LANES);
  float *query = scratch, *result = query + queries * width, *scores = result + queries * width;
  const float scale = 1.0f / sqrtf((float)dim);
  memset(result, 0, queries * width * sizeof(float));
  for (int i = 0; i < queries; ++i) copy_row(q + i * dim, dim, scale, query + i * width);
  score_keys<queries>(query, width, seen.keys[0], seen.values[0], dim, scores, padded);
  score_keys<queries>(query, width, seen.keys[1], seen.values[1], dim, scores + first, padded);
  for (int i = 0; i < queries; ++i) {
    float* score = scores + i * padded;
    for (int64_t s = 0; s < first; ++s)
      if (!seen.segments[s]) score[s] = -INFINITY;
    for (int64_t s = count; s < padded; ++s) score[s] = -INFINITY;
    vf tops = splat(-INFINITY), total = {};
    for (int64_t s = 0; s < padded; s += MJK_LANES) tops = maximum(tops, load(score + s));
    const float top = largest(tops);
    for (int64_t s = 0; s < padded; s += MJK_LANES) {
      const vf weight = exponential(load(score + s) - top);
      store(score + s, weight);
      total += weight;
    }
    // Rounded as weights of the dtype: see attention_task.
    const float inverse = 1.0f / sum(total);
    for (int64_t s = 0; s < padded; s += MJK_LANES) store(score + s, rounded(load(score + s) * inverse, q));
  }
  add_values<queries>(scores, padded, seen.values[0], dim, result, width);
  add_values<queries>(scores + first, padded, seen.values[1], dim, result, width);
  for (int i = 0; i < queries; ++i) write_row(result + i * width, dim, 1.0f, out + i * dim);
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

  const int64_t keys = shape.keys;
  const Seen<T> seen = {{{prompt_k + old, keys}, {own_k + own, step + 1}},
                        {{prompt_v + old, keys}, {own_v + own, step + 1}},
                        segments + prompt * keys,
                        dim};
  const int64_t floats = 2 * round_up(dim, MJK_LANES) + round_up(keys + step + 1, MJK_LANES);
  float* scratch = reinterpret_cast<float*>(mindjax::thread_scratch(kTogether * floats * sizeof(float)));
  if (!scratch) abort();
  const int64_t last = (head + 1) * group;
  for (int64_t h = head * group; h < last;) {
    const int64_t at = (row * shape.heads + h) * dim;
    if (h + kTogether <= last)
      answer<kTogether>(seen, q + at, out + at, scratch), h += kTogether;
    else if (h + 2 <= last)
      answer<2>(seen, q + at, out + at, scratch), h += 2;
    else
      answer<1>(seen, q + at, out + at, scratch), h += 1;
  }
}

}  // namespace
