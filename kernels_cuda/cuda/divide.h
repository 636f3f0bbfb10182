// Many numbers divided by one, each quotient rounded as IEEE division rounds it, in three instructions instead of ten.
#pragma once
#include <math.h>

#include "tiles.h"

namespace mjk {

// Markstein's theorem (IBM J. Res. Dev. 34(1), 1990): with r = RN(1 / d), q = RN(x r) and e = x - q d, which an fma
// gives exactly, RN(q + e r) is the correctly rounded x / d, as long as nothing leaves the range of normal numbers. |x|
// <= 448.001 d here; where d or x is so small that e could be subnormal, the division is done as one.
struct Divisor {
  float value, reciprocal;
  bool plain;  // the theorem does not apply

  MJK_HD explicit Divisor(float d) : value(d), reciprocal(1.0f / d), plain(!(d > 0x1p-60f && d < 0x1p+60f)) {}

  MJK_HD float divide(float x) const {
    if (plain || !(fabsf(x) > 0x1p-80f)) return x / value;
    const float quotient = x * reciprocal;
    return fmaf(fmaf(-quotient, value, x), reciprocal, quotient);
  }
};

}  // namespace mjk
