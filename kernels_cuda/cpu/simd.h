// Vectors of float32 for code that is compiled once per instruction set; MJK_LANES is its width.
//
// All of it is local to its file, and no template of the standard library is used: of those the linker keeps one copy,
// from whichever instruction set.
#pragma once
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define MJK_LANES 16
#elif defined(__AVX2__)
#define MJK_LANES 8
#else
#define MJK_LANES 4
#endif

typedef float vf __attribute__((vector_size(MJK_LANES * 4)));
typedef int32_t vi __attribute__((vector_size(MJK_LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(MJK_LANES * 4)));
typedef uint16_t vh __attribute__((vector_size(MJK_LANES * 2)));

struct bf16 {
  uint16_t bits;
};

// Less zero, not plus: that leaves -0 as it is, so the compiler leaves it out.
static inline vf splat(float x) { return x - vf{}; }
static inline vi splat_int(int32_t x) { return x - vi{}; }

static inline vf load(const float* p) {
  vf v;
  memcpy(&v, p, sizeof v);
  return v;
}
static inline void store(float* p, vf v) { memcpy(p, &v, sizeof v); }
static inline vi load_int(const int32_t* p) {
  vi v;
  memcpy(&v, p, sizeof v);
  return v;
}
// In one instruction, or two, of the many that compilers make of __builtin_convertvector.
static inline vu widen(vh h) {
#if MJK_LANES == 16
  return (vu)_mm512_cvtepu16_epi32((__m256i)h);
#elif MJK_LANES == 8
  return (vu)_mm256_cvtepu16_epi32((__m128i)h);
#else
  return __builtin_convertvector(h, vu);
#endif
}
static inline vh narrow(vu u) {
#if MJK_LANES == 16
  return (vh)_mm512_cvtepi32_epi16((__m512i)u);
#elif MJK_LANES == 8
  return (vh)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)u), _mm256_extracti128_si256((__m256i)u, 1));
#else
  return __builtin_convertvector(u, vh);
#endif
}
static inline vu widened(const bf16* p) {
  vh h;
  memcpy(&h, p, sizeof h);
  return widen(h);
}
static inline vf load(const bf16* p) { return (vf)(widened(p) << 16); }

// rounded(x, p) is x as if stored at p, round_half what is stored.
#ifdef __AVX512BF16__
// To the nearest, ties to even; a NaN stays one, a subnormal becomes 0.
static inline vh round_half(vf v) { return (vh)_mm512_cvtneps_pbh((__m512)v); }
static inline vf rounded(vf x, const bf16*) { return (vf)(widen(round_half(x)) << 16); }
#else
// Rounded to the nearest bf16 in the upper half of each element, ties to even; a NaN stays one. The lower half is
// anything.
static inline vu round_upper(vf v) {
  const vu u = (vu)v;
  return v == v ? u + 0x7fff + ((u >> 16) & 1) : u | 0x400000;
}
static inline vh round_half(vf v) { return narrow(round_upper(v) >> 16); }
static inline vf rounded(vf x, const bf16*) { return (vf)(round_upper(x) & 0xffff0000); }
#endif
static inline void store(bf16* p, vf v) {
  const vh h = round_half(v);
  memcpy(p, &h, sizeof h);
}

static inline float to_float(float x) { return x; }
static inline float to_float(bf16 x) {
  uint32_t u = (uint32_t)x.bits << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
static inline void assign(float* p, float x) { *p = x; }
static inline void assign(bf16* p, float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  p->bits = (uint16_t)(x == x ? (u + 0x7fff + ((u >> 16) & 1)) >> 16 : (u >> 16) | 0x40);
}

static inline vf rounded(vf x, const float*) { return x; }

static inline vf select(vi mask, vf a, vf b) { return mask ? a : b; }
// b where either is a NaN.
static inline vf maximum(vf a, vf b) {
#if MJK_LANES == 16
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif MJK_LANES == 8
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
// x where it is a NaN.
static inline vf at_most(float bound, vf x) {
#if MJK_LANES == 16
  return (vf)_mm512_min_ps(_mm512_set1_ps(bound), (__m512)x);
#elif MJK_LANES == 8
  return (vf)_mm256_min_ps(_mm256_set1_ps(bound), (__m256)x);
#else
  return x > bound ? splat(bound) : x;
#endif
}

// Halves are combined until four numbers are left: one at a time, each would wait for the one before.
typedef float vf4 __attribute__((vector_size(16)));
typedef float vf8 __attribute__((vector_size(32)));

static inline float larger(float a, float b) { return a > b ? a : b; }
static inline float sum(vf4 v) { return (v[0] + v[1]) + (v[2] + v[3]); }
static inline float largest(vf4 v) { return larger(larger(v[0], v[1]), larger(v[2], v[3])); }

#if MJK_LANES >= 8
static inline vf4 low_half(vf8 v) { return (vf4)_mm256_castps256_ps128((__m256)v); }
static inline vf4 high_half(vf8 v) { return (vf4)_mm256_extractf128_ps((__m256)v, 1); }
static inline float sum(vf8 v) { return sum(low_half(v) + high_half(v)); }
static inline float largest(vf8 v) { return largest(low_half(v) > high_half(v) ? low_half(v) : high_half(v)); }
#endif
#if MJK_LANES >= 16
static inline vf8 low_half(vf v) { return (vf8)_mm512_castps512_ps256((__m512)v); }
static inline vf8 high_half(vf v) { return (vf8)_mm512_extractf32x8_ps((__m512)v, 1); }
static inline float sum(vf v) { return sum(low_half(v) + high_half(v)); }
static inline float largest(vf v) { return largest(low_half(v) > high_half(v) ? low_half(v) : high_half(v)); }
#endif

static inline vf absolute(vf x) { return (vf)((vi)x & 0x7fffffff); }
static inline vf where_negative(vf x, vf a, vf b) { return select(x < 0.0f, a, b); }
static inline vf zero_below(float bound, vf x, vf v) { return select(x < bound, vf{}, v); }

// x 2^n for x and x 2^n that are normal; n is in the last bits of n_and_more.
static inline vf times_power_of_two(vf x, vf n_and_more) { return (vf)((vu)x + ((vu)n_and_more << 23)); }

#if MJK_LANES == 16
static inline vf reciprocal_estimate(vf x) { return (vf)_mm512_rcp14_ps((__m512)x); }
#endif

// Two vectors, or two of these, for chains of operations that leave a processor waiting: it does not look far enough
// ahead to find the next vector's.
template <class V>
struct Pair {
  V a, b;
};
#define MJK_OPERATOR(op)                                                          \
  template <class V>                                                              \
  static inline Pair<V> operator op(Pair<V> x, Pair<V> y) {                       \
    return {x.a op y.a, x.b op y.b};                                              \
  }                                                                               \
  template <class V>                                                              \
  static inline Pair<V> operator op(Pair<V> x, float y) {                         \
    return {x.a op y, x.b op y};                                                  \
  }                                                                               \
  template <class V>                                                              \
  static inline Pair<V> operator op(float x, Pair<V> y) {                         \
    return {x op y.a, x op y.b};                                                  \
  }
MJK_OPERATOR(+)
MJK_OPERATOR(-)
MJK_OPERATOR(*)
MJK_OPERATOR(/)
#undef MJK_OPERATOR
template <class V>
static inline Pair<V> absolute(Pair<V> x) {
  return {absolute(x.a), absolute(x.b)};
}
template <class V>
static inline Pair<V> where_negative(Pair<V> x, Pair<V> v, Pair<V> w) {
  return {where_negative(x.a, v.a, w.a), where_negative(x.b, v.b, w.b)};
}
template <class V>
static inline Pair<V> at_most(float bound, Pair<V> x) {
  return {at_most(bound, x.a), at_most(bound, x.b)};
}
template <class V>
static inline Pair<V> zero_below(float bound, Pair<V> x, Pair<V> v) {
  return {zero_below(bound, x.a, v.a), zero_below(bound, x.b, v.b)};
}
template <class V>
static inline Pair<V> times_power_of_two(Pair<V> x, Pair<V> n_and_more) {
  return {times_power_of_two(x.a, n_and_more.a), times_power_of_two(x.b, n_and_more.b)};
}
template <class V>
static inline Pair<V> reciprocal_estimate(Pair<V> x) {
  return {reciprocal_estimate(x.a), reciprocal_estimate(x.b)};
}
template <class V, class T>
static inline Pair<V> rounded(Pair<V> x, const T* p) {
  return {rounded(x.a, p), rounded(x.b, p)};
}
static inline vf joined(vf x) { return x; }
template <class V>
static inline vf joined(Pair<V> x) {
  return joined(x.a + x.b);
}

// 1 / x within 2 units in the last place where that is a normal number; AVX-512 need not wait for a division.
template <class V>
static inline V reciprocal(V x) {
#if MJK_LANES == 16
  const V near = reciprocal_estimate(x);
  return near + near * (1.0f - x * near);
#else
  return 1.0f / x;
#endif
}

// e^x within 2 units in the last place for x in [-87, 88], 0 below, nothing of use above.
// 2^n e^r with |r| <= ln 2 / 2, ln 2 in two parts; the polynomial is a minimax fit of the relative error (2e-9).
template <class V>
static inline V exponential_to_88(V x) {
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const V shifted = x * 1.44269504088896341f + shift, n = shifted - shift;
  const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  V p = r * 1.3843607e-3f + 8.3741955e-3f;
  p = p * r + 4.1668005e-2f;
  p = p * r + 1.6666430e-1f;
  p = p * r + 4.9999994e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return zero_below(-87.0f, x, times_power_of_two(p, shifted));
}

// The same, and the value at 88 above.
template <class V>
static inline V exponential(V x) {
  return exponential_to_88(at_most(88.0f, x));
}

// The natural logarithm within 2 units in the last place of a positive, normal, finite x.
// x = 2^n m with m in [sqrt(1/2), sqrt(2)); the polynomial is that of Cephes, logf.
static inline vf logarithm(vf x) {
  const vi shifted = (vi)x - 0x3f3504f3;  // the bits of sqrt(1/2)
  const vf n = __builtin_convertvector(shifted >> 23, vf);
  const vf m = (vf)((shifted & 0x007fffff) + 0x3f3504f3) - 1.0f;
  vf p = splat(7.0376836292e-2f);
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const vf square = m * m;
  return n * 0.693359375f + (m + (square * (p * m - 0.5f) - n * 2.12194440e-4f));
}

namespace {

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// The first `left` elements of a vector, then zeros.
inline vf first_part(vf v, int64_t left) {
  if (left >= MJK_LANES) return v;
  vi place;
  for (int i = 0; i < MJK_LANES; ++i) place[i] = i;
  return select(place < (int32_t)left, v, vf{});
}

// A vector of which `left` elements are there; the rest are zeros, and are not written.
#if MJK_LANES == 16
inline vf load_part(const float* p, int64_t left) {
  return left >= MJK_LANES ? load(p) : (vf)_mm512_maskz_loadu_ps((__mmask16)((1 << left) - 1), p);
}
inline vf load_part(const bf16* p, int64_t left) {
  if (left >= MJK_LANES) return load(p);
  return (vf)(widen((vh)_mm256_maskz_loadu_epi16((__mmask16)((1 << left) - 1), p)) << 16);
}
inline void store_part(float* p, vf v, int64_t left) {
  if (left >= MJK_LANES) return store(p, v);
  _mm512_mask_storeu_ps(p, (__mmask16)((1 << left) - 1), (__m512)v);
}
inline void store_part(bf16* p, vf v, int64_t left) {
  if (left >= MJK_LANES) return store(p, v);
  _mm256_mask_storeu_epi16(p, (__mmask16)((1 << left) - 1), (__m256i)round_half(v));
}
#else
template <class T>
inline vf load_part(const T* p, int64_t left) {
  if (left >= MJK_LANES) return load(p);
  T part[MJK_LANES] = {};
  for (int64_t i = 0; i < left; ++i) part[i] = p[i];
  return load(part);
}
template <class T>
inline void store_part(T* p, vf v, int64_t left) {
  if (left >= MJK_LANES) return store(p, v);
  T part[MJK_LANES];
  store(part, v);
  for (int64_t i = 0; i < left; ++i) p[i] = part[i];
}
#endif

// Calls function(i, left) for each vector of `size` elements: `left` are there from i on. It is compiled for whole
// vectors and for the last apart.
template <class Function>
inline void for_vectors(int64_t size, const Function& function) {
  int64_t i = 0;
  for (; i + MJK_LANES <= size; i += MJK_LANES) function(i, MJK_LANES);
  if (i < size) function(i, size - i);
}

// As load_part and store_part; a Pair is all there.
template <class T>
inline vf load_like(vf, const T* p, int64_t left) {
  return load_part(p, left);
}
template <class V, class T>
inline Pair<V> load_like(Pair<V> of, const T* p, int64_t left) {
  return {load_like(of.a, p, left), load_like(of.b, p + sizeof(V) / sizeof(float), left)};
}
template <class V, class T>
inline void store_part(T* p, Pair<V> v, int64_t left) {
  store_part(p, v.a, left), store_part(p + sizeof(V) / sizeof(float), v.b, left);
}

// Of float32 one: several lines of cache at a time are several times as many streams, which took longer to read.
inline vf several(const float*) { return vf(); }
inline Pair<Pair<vf>> several(const bf16*) { return Pair<Pair<vf>>(); }

// Calls function(of, i, left) for several vectors of `size` elements at a time, which the type of `of` holds, and at
// the end for single ones.
template <class T, class Function>
inline void for_several(const T* like, int64_t size, const Function& function) {
  const auto of = several(like);
  const int64_t step = sizeof of / sizeof(float);
  int64_t i = 0;
  for (; i + step <= size; i += step) function(of, i, step);
  for (; i < size; i += MJK_LANES) function(vf{}, i, size - i);
}

template <class T>
inline void copy_row(const T* from, int64_t size, float factor, float* to) {
  int64_t d = 0;
  for (; d + MJK_LANES <= size; d += MJK_LANES) store(to + d, load(from + d) * factor);
  for (; d < size; ++d) to[d] = to_float(from[d]) * factor;
}

template <class T>
inline float dot(const T* a, const T* b, int64_t size) {
  vf total = {};
  int64_t d = 0;
  for (; d + MJK_LANES <= size; d += MJK_LANES) total += load(a + d) * load(b + d);
  float rest = sum(total);
  for (; d < size; ++d) rest += to_float(a[d]) * to_float(b[d]);
  return rest;
}

template <class T>
inline void write_row(const float* from, int64_t size, float factor, T* to) {
  int64_t d = 0;
  for (; d + MJK_LANES <= size; d += MJK_LANES) store(to + d, load(from + d) * factor);
  for (; d < size; ++d) assign(to + d, from[d] * factor);
}

}  // namespace
