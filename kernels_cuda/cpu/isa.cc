#include "isa.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mindjax {

extern const Kernels kScalarF32, kScalarBf16;
#ifdef MINDJAX_AVX2
extern const Kernels kAvx2F32, kAvx2Bf16;
#endif
#ifdef MINDJAX_AVX512F
extern const Kernels kAvx512F32, kAvx512Bf16;
#endif
#ifdef MINDJAX_AVX512_BF16
extern const Kernels kAvx512DotBf16;
#endif
#ifdef MINDJAX_AMX_BF16
extern const Kernels kAmxF32, kAmxBf16;
extern const S8Kernels kAmxS8;
#endif

namespace {

#if defined(__x86_64__)
struct Features {
  bool avx2 = false, avx512f = false, avx512_bf16 = false, amx_bf16 = false;

  Features() {
    unsigned a, b, c, d, b7, d7, a71 = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return;
    const bool fma = c & bit_FMA;
    unsigned low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));  // what the operating system saves of a thread
    const bool ymm = (low & 0x6) == 0x6, zmm = (low & 0xe6) == 0xe6, tiles = (low & 0x60000) == 0x60000;
    if (!__get_cpuid_count(7, 0, &a, &b7, &c, &d7)) return;
    if (a >= 1) __get_cpuid_count(7, 1, &a71, &b, &c, &d);
    avx2 = ymm && fma && (b7 & (1u << 5));
    // F, DQ, BW, VL
    avx512f = avx2 && zmm && (b7 & (1u << 16)) && (b7 & (1u << 17)) && (b7 & (1u << 30)) && (b7 & (1u << 31));
    avx512_bf16 = avx512f && (a71 & (1u << 5));
    amx_bf16 = avx512_bf16 && tiles && (d7 & (1u << 22)) && (d7 & (1u << 24)) && (d7 & (1u << 25)) && may_use_tiles();
  }

  // Linux hands out the tile registers' state on request (ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
  static bool may_use_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
    return false;
#endif
  }
};
#endif

Isa choose() {
  static constexpr const char* kNames[] = {"scalar", "avx2", "avx512f", "avx512_bf16", "amx_bf16"};
  int level = 0;
#if defined(__x86_64__)
  const Features has;
  level = has.amx_bf16 ? 4 : has.avx512_bf16 ? 3 : has.avx512f ? 2 : has.avx2 ? 1 : 0;
#endif
  if (const char* wanted = std::getenv("MINDJAX_CPU_ISA"))
    for (int i = 0; i < level; ++i)
      if (!std::strcmp(wanted, kNames[i])) level = i;
  Isa chosen = {kNames[0], &kScalarF32, &kScalarF32, &kScalarBf16, nullptr};
#ifdef MINDJAX_AVX2
  if (level >= 1) chosen = {kNames[1], &kAvx2F32, &kAvx2F32, &kAvx2Bf16, nullptr};
#endif
#ifdef MINDJAX_AVX512F
  if (level >= 2) chosen = {kNames[2], &kAvx512F32, &kAvx512F32, &kAvx512Bf16, nullptr};
#endif
#ifdef MINDJAX_AVX512_BF16
  if (level >= 3) chosen = {kNames[3], &kAvx512F32, &kAvx512F32, &kAvx512DotBf16, nullptr};
#endif
#ifdef MINDJAX_AMX_BF16
  if (level >= 4) chosen = {kNames[4], &kAmxF32, &kAvx512F32, &kAmxBf16, &kAmxS8};
#endif
  return chosen;
}

}  // namespace

const Isa& isa() {
  static const Isa chosen = choose();
  return chosen;
}

}  // namespace mindjax
