// Attention inside segments and its gradient, for one instruction set; included inside a namespace.
//
// One task is one key/value head of one row of the batch. Its keys and values are copied once, as right sides of the
// products below; queries go by the rows of a register tile, and of the keys a tile looks at those alone that one of
// its queries may see. Softmax is in float32. Each sum has one fixed order, whatever the threads.
#pragma once
#include <math.h>

#include "launch_cpu.h"
#include "scratch.h"
#include "tile.h"

namespace {

constexpr int64_t kBlockBytes = 256 * 1024;
constexpr int64_t kMaxBlock = 16 * kTile;

// Divides the thread's scratch memory into parts of so many words of four bytes.
template <int count>
inline void carve(const int64_t (&words)[count], void* (&parts)[count]) {
  int64_t total = 0;
  for (int64_t size : words) total += round_up(size, 16);
  char* memory = mindjax::thread_scratch(total * 4);
  if (!memory) abort();
  for (int i = 0; i < count; ++i) {
    parts[i] = memory;
    memory += round_up(words[i], 16) * 4;
  }
}

struct Range {
  int64_t first, last;
};

// The keys that queries see, in whole vectors.
class Segments {
 public:
  // `memory` is of words() words.
  Segments(const mjk_attention_shape& shape, const int32_t* q, const int32_t* kv, const int32_t* q_index, int64_t row,
           void* memory)
      : query_(q + row * shape.queries),
        index_(q_index),
        queries_(shape.queries),
        size_(round_up(shape.keys, MJK_LANES)),
        key_(static_cast<int32_t*>(memory)) {
    memcpy(key_, kv + row * shape.keys, shape.keys * sizeof(int32_t));
    memset(key_ + shape.keys, 0, (size_ - shape.keys) * sizeof(int32_t));
    for (int i = 0; i < 2; ++i) {
      seen_[i].places = key_ + (i + 1) * size_;
      find(0, &seen_[i]);
    }
  }
  static int64_t words(int64_t keys) { return 3 * round_up(keys, MJK_LANES); }

  // The place of the last key that query t may see, if its segment has it; -1 if there is none.
  int32_t limit(int64_t t) const {
    if (t >= queries_ || query_[t] == 0) return -1;
    return index_[t] < 0 ? kHidden - 1 : index_[t];
  }

  // The place of each key of query t's segment, and for other keys more than any limit; of use to a query that sees
  // something. They stay until another query of the same parity is asked for.
  const int32_t* places(int64_t t) { return seen(t).places; }

  // What lies outside is seen by none of the queries [t0, t1).
  Range range(int64_t t0, int64_t t1) {
    Range all = {kHidden, 0};
    for (int64_t t = t0; t < t1; ++t) {
      if (limit(t) < 0) continue;
      const Range one = seen(t).range;
      all.first = least(all.first, one.first);
      all.last = most(all.last, least(one.last, (int64_t)limit(t) + 1));
    }
    all.first = all.first / MJK_LANES * MJK_LANES;
    all.last = round_up(all.last, MJK_LANES);
    return all.first < all.last ? all : Range{0, 0};
  }

 private:
  static constexpr int32_t kHidden = INT32_MAX;

  struct Seen {
    int32_t segment;
    Range range;
    int32_t* places;
  };

  const Seen& seen(int64_t t) {
    Seen* of = &seen_[t % 2];
    if (limit(t) >= 0 && query_[t] != of->segment) find(query_[t], of);
    return *of;
  }

  void find(int32_t segment, Seen* of) {
    const vi hidden = splat_int(kHidden);
    vi first = hidden, last = splat_int(-1), place = lanes();
    for (int64_t s = 0; s < size_; s += MJK_LANES, place += MJK_LANES) {
      const vi same = load_int(key_ + s) == segment, seen = same ? place : hidden;
      memcpy(of->places + s, &seen, sizeof seen);
      first = seen < first ? seen : first;
      last = same ? place : last;
    }
    of->segment = segment;
    of->range = {kHidden, 0};
    for (int i = 0; i < MJK_LANES; ++i)
      of->range = {least(of->range.first, first[i]), most(of->range.last, (int64_t)last[i] + 1)};
  }

  static vi lanes() {
    vi lane;
    for (int i = 0; i < MJK_LANES; ++i) lane[i] = i;
    return lane;
  }

  const int32_t *query_, *index_;
  int64_t queries_, size_;
  int32_t* key_;
  Seen seen_[2];
};

// Where the keys end that a query of that limit may see, of those of its tile.
inline int64_t row_end(const Range& range, int32_t limit) {
  return most(range.first, least(range.last, round_up((int64_t)limit + 1, MJK_LANES)));
}

inline vf seen_only(const int32_t* places, int32_t limit, vf x, float otherwise) {
  return select(load_int(places) <= splat_int(limit), x, splat(otherwise));
}

// Keys padded to whole vectors and an odd number of cache lines of floats: columns of such rows spread over the sets.
inline int64_t padded_keys(int64_t keys) { return round_up(keys, MJK_LANES) | 16; }

// Where the keys and values of a task start.
inline int64_t task_start(const mjk_attention_shape& shape, int64_t task) {
  return (task / shape.kv_heads * shape.keys * shape.kv_heads + task % shape.kv_heads) * shape.dim;
}

// Fetches some keys and values of the next task, which this thread may be given.
template <class T>
inline void prefetch_next(const mjk_attention_shape& shape, const T* k, const T* v, int64_t task, int64_t t0) {
  if (task + 1 == shape.rows * shape.kv_heads) return;
  for (int64_t s = t0; s < least(t0 + kTile, shape.keys); ++s) {
    const int64_t at = task_start(shape, task + 1) + s * shape.kv_heads * shape.dim;
    prefetch_row(k + at, shape.dim);
    prefetch_row(v + at, shape.dim);
  }
}

template <class T>
void attention_task(const mjk_attention_shape& shape, const T* q, const T* k, const T* v, const int32_t* q_segments,
                    const int32_t* kv_segments, const int32_t* q_index, T* out, float* normaliser, int64_t task) {
  using Unit = typename UnitOf<T>::type;
  constexpr int64_t terms = kTerms<Unit>;
  const int64_t row = task / shape.kv_heads, head = task % shape.kv_heads, dim = shape.dim;
  const int64_t group = shape.heads / shape.kv_heads, kv_stride = shape.kv_heads * dim, stride = shape.heads * dim;
  const int64_t kv_start = task_start(shape, task);
  const int64_t size = padded_keys(shape.keys), width = round_up(dim, MJK_LANES);
  const int64_t units = (dim + terms - 1) / terms;
  void* parts[7];
  carve({Segments::words(shape.keys), size * units, size / terms * width, kTile * units, kTile * size,
         kTile * size / terms, kTile * width},
        parts);
  Segments segments(shape, q_segments, kv_segments, q_index, row, parts[0]);
  Unit *keys = static_cast<Unit*>(parts[1]), *values = static_cast<Unit*>(parts[2]);
  Unit *queries = static_cast<Unit*>(parts[3]), *weights = static_cast<Unit*>(parts[5]);
  float *scores = static_cast<float*>(parts[4]), *result = static_cast<float*>(parts[6]);
  copy_columns(k + kv_start, shape.keys, dim, kv_stride, keys, units);
  copy_right(v + kv_start, shape.keys, size, dim, kv_stride, values, width);
  const float scale = 1.0f / sqrtf((float)dim);

  for (int64_t h = head * group; h < (head + 1) * group; ++h) {
    for (int64_t t0 = 0; t0 < shape.queries; t0 += kTile) {
      const int64_t count = least(kTile, shape.queries - t0), start = (row * shape.queries + t0) * stride + h * dim;
      const Range range = segments.range(t0, t0 + count);
      prefetch_next(shape, k, v, task, t0);
      for (int64_t i = 0; i < count; ++i) prefetch_row(out + start + i * stride, dim);
      const int64_t vectors = (range.last - range.first) / MJK_LANES;
      copy_left(q + start, count, dim, stride, queries, units);
      row_product(count, vectors, units, Left<Unit>{queries, units, 1},
                  Right<Unit>{keys + range.first * units, MJK_LANES, units * MJK_LANES}, scores + range.first, size,
                  false);
      constexpr int64_t lines = (kTile + MJK_LANES - 1) / MJK_LANES * MJK_LANES;
      float tops[lines] = {}, totals[lines] = {};
      for (int64_t i = 0; i < count; ++i) {
        const int32_t limit = segments.limit(t0 + i), *places = segments.places(t0 + i);
        vf top = splat(-INFINITY);
        for (int64_t s = range.first; s < row_end(range, limit); s += MJK_LANES)
          top = maximum(top, seen_only(places + s, limit, load(scores + i * size + s), -INFINITY));
        tops[i] = largest(top) * scale;
      }
      for (int64_t i = 0; i < count; ++i) {
        const int32_t limit = segments.limit(t0 + i), *places = segments.places(t0 + i);
        const bool any = tops[i] > -INFINITY;
        const float top = any ? tops[i] : 0.0f;
        float* line = scores + i * size;
        vf sums = {};
        int64_t s = range.first;
        for (; s < row_end(range, limit); s += MJK_LANES) {
          const vf weight = seen_only(places + s, limit, exponential_to_88(load(line + s) * scale - top), 0.0f);
          store(line + s, weight);
          sums += weight;
        }
        for (; s < range.last; s += MJK_LANES) store(line + s, vf{});
        totals[i] = any ? sum(sums) : 1.0f;
      }
      float norms[lines], factors[lines];
      for (int64_t i = 0; i < lines; i += MJK_LANES) {
        const vf top = load(tops + i), total = load(totals + i);
        store(norms + i, top > -INFINITY ? top + logarithm(total) : splat(INFINITY));
        store(factors + i, 1.0f / total);
      }
      memcpy(normaliser + (row * shape.heads + h) * shape.queries + t0, norms, count * sizeof(float));
      const Unit* left;
      if constexpr (sizeof(T) == sizeof(float)) {
        left = scores;
      } else {
        // Rounded as weights of the dtype, which is what decoding does too: the two must agree.
        for (int64_t i = 0; i < count; ++i) {
          for (int64_t s = range.first; s < range.last; s += MJK_LANES) {
            const vf weight = load(scores + i * size + s) * factors[i];
            store_along(weights + (i * size + s) / terms, terms == 2 ? weight : rounded(weight, q));
          }
          factors[i] = 1.0f;
        }
        left = weights;
      }
      row_product(count, width / MJK_LANES, (range.last - range.first) / terms,
                  Left<Unit>{left + range.first / terms, size / terms, 1},
                  Right<Unit>{values + range.first / terms * width, width, MJK_LANES}, result, width, false);
      for (int64_t i = 0; i < count; ++i) write_row(result + i * width, dim, factors[i], out + start + i * stride);
    }
  }
}

// Queries whose weights are kept together for the gradients of keys and values.
inline int64_t block_rows(const mjk_attention_shape& shape) {
  const int64_t fitting = kBlockBytes / 4 / padded_keys(shape.keys) / kTile * kTile;
  return least(kMaxBlock, most(kTile, fitting));
}

template <class T>
void attention_grad_task(const mjk_attention_shape& shape, const T* q, const T* k, const T* v,
                         const int32_t* q_segments, const int32_t* kv_segments, const int32_t* q_index, const T* out,
                         const float* normaliser, const T* g, T* dq, T* dk, T* dv, int64_t task) {
  using Unit = typename UnitOf<T>::type;
  constexpr int64_t terms = kTerms<Unit>;
  const int64_t row = task / shape.kv_heads, head = task % shape.kv_heads, dim = shape.dim;
  const int64_t group = shape.heads / shape.kv_heads, kv_stride = shape.kv_heads * dim, stride = shape.heads * dim;
  const int64_t kv_start = task_start(shape, task);
  const int64_t size = padded_keys(shape.keys), width = round_up(dim, MJK_LANES);
  const int64_t units = (dim + terms - 1) / terms, block = block_rows(shape);
  void* parts[15];
  carve({Segments::words(shape.keys), size * units, size * units, size / terms * width, kTile * units,
         block / terms * width, block / terms * width, kTile * size, kTile * size, block / terms * size,
         block / terms * size, kTile * size / terms, size * width, size * width, kTile * width},
        parts);
  const auto unit_part = [&](int i) { return static_cast<Unit*>(parts[i]); };
  const auto float_part = [&](int i) { return static_cast<float*>(parts[i]); };
  Segments segments(shape, q_segments, kv_segments, q_index, row, parts[0]);
  Unit *key_columns = unit_part(1), *value_columns = unit_part(2), *keys = unit_part(3), *lefts = unit_part(4);
  Unit *queries = unit_part(5), *gradients = unit_part(6), *weights = unit_part(9), *d_scores = unit_part(10);
  Unit* d_rows = unit_part(11);
  float *scores = float_part(7), *d_weights = float_part(8), *d_keys = float_part(12), *d_values = float_part(13);
  float* result = float_part(14);
  memset(d_keys, 0, size * width * sizeof(float));
  memset(d_values, 0, size * width * sizeof(float));
  copy_columns(k + kv_start, shape.keys, dim, kv_stride, key_columns, units);
  copy_columns(v + kv_start, shape.keys, dim, kv_stride, value_columns, units);
  copy_right(k + kv_start, shape.keys, size, dim, kv_stride, keys, width);
  const float scale = 1.0f / sqrtf((float)dim);

  for (int64_t h = head * group; h < (head + 1) * group; ++h) {
    for (int64_t block0 = 0; block0 < shape.queries; block0 += block) {
      const int64_t rows = least(block, shape.queries - block0), even = round_up(rows, terms);
      const int64_t block_start = (row * shape.queries + block0) * stride + h * dim;
      const Range all = segments.range(block0, block0 + rows);
      Range ranges[kMaxBlock / kTile];
      for (int64_t t = 0; t < rows; t += kTile) {
        const int64_t t0 = block0 + t, count = least(kTile, rows - t), start = block_start + t * stride;
        const Range range = ranges[t / kTile] = segments.range(t0, t0 + count);
        const int64_t vectors = (range.last - range.first) / MJK_LANES;
        Unit *query_rows = queries + t / terms * width, *gradient_rows = gradients + t / terms * width;
        prefetch_next(shape, k, v, task, t0);
        for (int64_t i = 0; i < count; ++i) {
          prefetch_row(out + start + i * stride, dim);
          prefetch_row(dq + start + i * stride, dim);
        }
        const auto score = [&](const T* x, Unit* rights, const Unit* columns, float* to) {
          copy_right(x + start, count, round_up(count, terms), dim, stride, rights, width);
          if (terms == 2) copy_left(x + start, count, dim, stride, lefts, units);
          row_product(count, vectors, units, terms == 2 ? Left<Unit>{lefts, units, 1} : Left<Unit>{rights, width, 1},
                      Right<Unit>{columns + range.first * units, MJK_LANES, units * MJK_LANES}, to + range.first, size,
                      false);
        };
        score(q, query_rows, key_columns, scores);
        score(g, gradient_rows, value_columns, d_weights);
        for (int64_t i = 0; i < count; i += 2) {
          int32_t limits[2];
          const int32_t* places[2];
          float norms[2] = {}, inner[2] = {};
          for (int64_t j = 0; j < 2; ++j) {
            limits[j] = segments.limit(t0 + i + j);
            places[j] = segments.places(t0 + i + j);
            if (i + j == count) break;
            norms[j] = normaliser[(row * shape.heads + h) * shape.queries + t0 + i + j];
            inner[j] = dot(g + start + (i + j) * stride, out + start + (i + j) * stride, dim);
          }
          Unit *weight = weights + (t + i) / terms * size, *d_score = d_scores + (t + i) / terms * size;
          const auto clear = [&](int64_t first, int64_t last) {
            for (int64_t s = first; s < last; s += MJK_LANES) {
              store_rows(weight + s, size, vf{}, vf{});
              store_rows(d_score + s, size, vf{}, vf{});
            }
          };
          const int64_t end = row_end(range, most(limits[0], limits[1]));
          clear(all.first, range.first);
          clear(end, all.last);
          for (int64_t s = range.first; s < end; s += MJK_LANES) {
            vf w[2], d[2];
            for (int64_t j = 0; j < 2; ++j) {
              const int64_t at = (i + j) * size + s;
              w[j] = seen_only(places[j] + s, limits[j], exponential_to_88(load(scores + at) * scale - norms[j]), 0.0f);
              d[j] = seen_only(places[j] + s, limits[j], w[j] * (load(d_weights + at) - inner[j]), 0.0f);
            }
            store_rows(weight + s, size, w[0], w[1]);
            store_rows(d_score + s, size, d[0], d[1]);
            if (terms == 2)
              for (int64_t j = 0; j < 2; ++j) store_along(d_rows + ((i + j) * size + s) / terms, d[j]);
          }
          if (terms == 2)
            for (int64_t s = end; s < range.last; s += MJK_LANES)
              for (int64_t j = 0; j < 2; ++j) store_along(d_rows + ((i + j) * size + s) / terms, vf{});
        }
        const Unit* d_left = terms == 2 ? d_rows : d_scores + t * size;
        row_product(count, width / MJK_LANES, (range.last - range.first) / terms,
                    Left<Unit>{d_left + range.first / terms, size / terms, 1},
                    Right<Unit>{keys + range.first / terms * width, width, MJK_LANES}, result, width, false);
        for (int64_t i = 0; i < count; ++i) write_row(result + i * width, dim, scale, dq + start + i * stride);
      }
      for (int64_t s = all.first; s < least(all.last, shape.keys); s += kTile) {
        const int64_t count = least(kTile, least(all.last, shape.keys) - s);
        int64_t first = rows, last = 0;  // of the queries, by whole tiles, those that see such a key
        for (int64_t t = 0; t < rows; t += kTile)
          if (ranges[t / kTile].first < s + count && ranges[t / kTile].last > s) {
            first = least(first, t);
            last = least(even, t + kTile);
          }
        if (first >= last) continue;
        for (int64_t i = s; i < s + count; ++i) {
          prefetch_row(dk + kv_start + i * kv_stride, dim);
          prefetch_row(dv + kv_start + i * kv_stride, dim);
        }
        const int64_t depth = (last - first) / terms, left = first / terms * size + s, right = first / terms * width;
        row_product(count, width / MJK_LANES, depth, Left<Unit>{d_scores + left, 1, size},
                    Right<Unit>{queries + right, width, MJK_LANES}, d_keys + s * width, width, true);
        row_product(count, width / MJK_LANES, depth, Left<Unit>{weights + left, 1, size},
                    Right<Unit>{gradients + right, width, MJK_LANES}, d_values + s * width, width, true);
      }
    }
  }
  for (int64_t s = 0; s < shape.keys; ++s) {
    write_row(d_keys + s * width, dim, scale, dk + kv_start + s * kv_stride);
    write_row(d_values + s * width, dim, 1.0f, dv + kv_start + s * kv_stride);
  }
}

}  // namespace
