// What both backends, and mindjax/ops/quantize.py, agree on about a block of e4m3: its scale is max |x| / 448, at least
// 2^-126, and 1 where all are zero. Numbers below 2^-126 count as zero, as many processors flush them. Where one is
// infinite or NaN all values are 0 and the scale is NaN, so that all of the block dequantises to NaN.
#pragma once
#include <float.h>
#include <math.h>

#ifndef MJK_HD
#ifdef __CUDACC__
#define MJK_HD __host__ __device__ __forceinline__
#else
#define MJK_HD inline
#endif
#endif

namespace mjk {

constexpr float kE4m3Max = 448.0f;

// The largest magnitude with one number more; infinite once one was infinite or NaN.
MJK_HD float larger(float largest, float x) {
  const float magnitude = fabsf(x);
  return magnitude <= largest ? largest : magnitude <= FLT_MAX ? magnitude : INFINITY;
}

struct E4m3Block {
  float scale, divisor;  // what is stored; what values are divided by

  MJK_HD explicit E4m3Block(float largest) {
    const float quotient = largest / kE4m3Max;
    divisor = largest < FLT_MIN || largest > FLT_MAX ? 1.0f : quotient < FLT_MIN ? FLT_MIN : quotient;
    scale = largest > FLT_MAX ? NAN : divisor;
  }
  // The number that is divided for x.
  MJK_HD float counted(float x) const { return scale != scale ? 0.0f : fabsf(x) < FLT_MIN ? 0.0f * x : x; }
};

}  // namespace mjk
