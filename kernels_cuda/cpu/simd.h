// Vectors of float32 for code that is compiled once per instruction set; MJK_LANES is its width.
//
// All of it is local to its file, and no template of the standard library is used: of those the linker keeps one copy,
// from whichever instruction set.
#pragma once
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX2__)
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
// Of the conversion without an intrinsic GCC makes halves that it widens and joins.
static inline vu widened(const bf16* p) {
#if MJK_LANES == 16
  return (vu)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif MJK_LANES == 8
  return (vu)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vh h;
  memcpy(&h, p, sizeof h);
  return __builtin_convertvector(h, vu);
#endif
}
static inline vf load(const bf16* p) { return (vf)(widened(p) << 16); }
// To the nearest, ties to even; a NaN stays one.
static inline void store(bf16* p, vf v) {
  vu u = (vu)v;
  vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  vu quiet = (u >> 16) | 0x40;
  vh h = __builtin_convertvector((vu)(v == v ? (vi)rounded : (vi)quiet), vh);
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

// As if stored in T.
static inline vf rounded(vf x, const float*) { return x; }
static inline vf rounded(vf x, const bf16*) {
  bf16 bits[MJK_LANES];
  store(bits, x);
  return load(bits);
}

static inline vf select(vi mask, vf a, vf b) { return mask ? a : b; }
static inline vf maximum(vf a, vf b) { return a > b ? a : b; }

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

// e^x within 2 units in the last place for x in [-87, 88], 0 below, nothing of use above.
// 2^n e^r with |r| <= ln 2 / 2, ln 2 in two parts; the polynomial is a minimax fit of degree 6 (Cephes, expf).
static inline vf exponential_to_88(vf x) {
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which the lowest bits then are
  vf shifted = x * 1.44269504088896341f + shift;
  vf n = shifted - shift;
  vf r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return select(x < -87.0f, vf{}, p * (vf)(((vu)shifted << 23) + (127u << 23)));
}

// The same, and the value at 88 above.
static inline vf exponential(vf x) { return exponential_to_88(x > 88.0f ? splat(88.0f) : x); }

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

// Zeros, aligned to a cache line.
template <class T>
struct Buffer {
  T* data;
  explicit Buffer(int64_t size) {
    const size_t bytes = round_up(most(size, 1) * sizeof(T), 64);
    data = static_cast<T*>(aligned_alloc(64, bytes));
    if (!data) abort();
    memset(data, 0, bytes);
  }
  ~Buffer() { free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T& operator[](int64_t i) { return data[i]; }
  const T& operator[](int64_t i) const { return data[i]; }
};

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
