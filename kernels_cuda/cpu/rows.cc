// Operations on rows: gather, quantise. Threads take runs of rows.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "e4m3_block.h"
#include "errors.h"
#include "portable.h"
#include "pool.h"

namespace mindjax {
namespace {

// To nearest even; the argument is within +-448 or NaN.
uint8_t to_e4m3(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint8_t sign = uint8_t(bits >> 24) & 0x80;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7f;
  if (bits < 0x3c800000u) {  // below 2^-6: multiples of 2^-9
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof bits);
    return sign | uint8_t(std::nearbyintf(magnitude * 512.f));
  }
  bits += 0x7ffffu + ((bits >> 20) & 1u);
  return sign | uint8_t((bits >> 20) - (120u << 3));
}

template <class T>
void quantize(int64_t rows, int64_t k, const T* x, const int32_t* index, int64_t first, int64_t end, uint8_t* out,
              float* scales) {
  const int64_t per_row = (k + 127) / 128;
  for (int64_t i = first; i < end; ++i) {
    const int64_t from = index ? index[i] : i;
    if (from < 0 || from >= rows) {
      std::memset(out + i * k, 0, size_t(k));
      for (int64_t b = 0; b < per_row; ++b) scales[i * per_row + b] = 1.f;
      continue;
    }
    for (int64_t b = 0; b < per_row; ++b) {
      const T* block = x + from * k + b * 128;
      const int64_t size = smaller(128, k - b * 128);
      float largest = 0.f;
      for (int64_t j = 0; j < size; ++j) largest = mjk::larger(largest, load(block + j));
      const mjk::E4m3Block how(largest);
      scales[i * per_row + b] = how.scale;
      for (int64_t j = 0; j < size; ++j) {
        const float value = how.counted(load(block + j)) / how.divisor, most = mjk::kE4m3Max;
        out[i * k + b * 128 + j] = to_e4m3(value > most ? most : value < -most ? -most : value);
      }
    }
  }
}

bool is_float(mjk_dtype type) { return type == MJK_F32 || type == MJK_BF16; }

int unsupported() { return fail(MJK_UNSUPPORTED, "rows must be float32 or bfloat16"); }

}  // namespace
}  // namespace mindjax

using namespace mindjax;

extern "C" {

int mjk_quantize_e4m3(void* stream, mjk_dtype in_dtype, int64_t rows, int64_t out_rows, int64_t k, const void* x,
                      const int32_t* index, void* out, float* scales) {
  if (!is_float(in_dtype)) return unsupported();
  over_rows(stream, out_rows, 8 * k, [=](int64_t first, int64_t end) {
    uint8_t* to = static_cast<uint8_t*>(out);
    if (in_dtype == MJK_F32)
      quantize(rows, k, static_cast<const float*>(x), index, first, end, to, scales);
    else
      quantize(rows, k, static_cast<const uint16_t*>(x), index, first, end, to, scales);
  });
  return MJK_OK;
}

int mjk_permute(void* stream, mjk_dtype dtype, int64_t rows, int64_t out_rows, int64_t k, const void* x,
                const int32_t* index, void* out) {
  if (!is_float(dtype)) return unsupported();
  const int64_t row = k * (dtype == MJK_F32 ? 4 : 2);
  over_rows(stream, out_rows, 2 * row, [=](int64_t first, int64_t end) {
    for (int64_t i = first; i < end; ++i) {
      char* to = static_cast<char*>(out) + i * row;
      if (index[i] < 0 || index[i] >= rows)
        std::memset(to, 0, size_t(row));
      else
        std::memcpy(to, static_cast<const char*>(x) + index[i] * row, size_t(row));
    }
  });
  return MJK_OK;
}

}  // extern "C"
