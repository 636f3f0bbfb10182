// See emulate.h. Fibers by ucontext; a seeded random number decides what runs and when copies and products happen.
#include "emulate.h"

#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>

#include <deque>
#include <map>
#include <memory>
#include <random>
#include <vector>

namespace mjk {
namespace emulated {

dim3 block_index, grid_size;
uint8_t* shared;

namespace {

constexpr size_t kStack = 96 << 10, kShared = 227 << 10, kAlignment = 1024;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
  std::vector<Mma> issued;
  std::deque<std::vector<Mma>> committed;
};

struct Meeting {  // threads that wait for each other
  unsigned arrived = 0, generation = 0;
};

struct Barrier {
  uint32_t expected = 0, missing = 0, phase = 0;
  int64_t bytes = 0;
};

struct Copy {
  const CUtensorMap* map;
  uint64_t* barrier;
  uint32_t to;
  int32_t at[3];
};

struct Map {  // what encode() puts into a CUtensorMap
  const uint8_t* base;
  int64_t element, extents[3], strides[2];
  int32_t box_rows, rank;
};
static_assert(sizeof(Map) <= sizeof(CUtensorMap));

// MINDJAX_EMULATE_SEED gives another order of events.
std::mt19937 random_number(getenv("MINDJAX_EMULATE_SEED") ? atoi(getenv("MINDJAX_EMULATE_SEED")) : 1);
std::vector<Fiber> fibers;
std::vector<Meeting> warps;
Meeting block_meetings[2];
std::map<const uint64_t*, Barrier> barriers;
std::vector<Copy> copies;
std::vector<uint64_t> lanes;
ucontext_t scheduler;
unsigned current, launched_threads;
uint64_t progress;
const std::function<void()>* body;
std::unique_ptr<uint8_t[]> arena;

[[noreturn]] void stop(const char* what) {
  fprintf(stderr, "emulation: %s (block %u, thread %u)\n", what, block_index.x, current);
  abort();
}

void yield() { swapcontext(&fibers[current].context, &scheduler); }

template <class Condition>
void wait_until(Condition condition) {
  while (!condition()) yield();
  ++progress;
}

void meet(Meeting& meeting, unsigned threads) {
  const unsigned generation = meeting.generation;
  if (++meeting.arrived == threads) {
    meeting.arrived = 0;
    ++meeting.generation;
    ++progress;
  } else {
    wait_until([&] { return meeting.generation != generation; });
  }
}

Barrier& barrier_at(const uint64_t* address) {
  const auto found = barriers.find(address);
  if (found == barriers.end()) stop("a barrier that nobody initialised");
  return found->second;
}

void complete(Barrier& barrier) {
  if (barrier.missing > 0 || barrier.bytes != 0) return;
  barrier.missing = barrier.expected;
  ++barrier.phase;
  ++progress;
}

void arrive(Barrier& barrier) {
  if (barrier.missing == 0) stop("more arrivals at a barrier than it expects");
  --barrier.missing;
  complete(barrier);
}

// PTX ISA, "Swizzling Modes", 128-byte: bits 4-6 of the address are xored with bits 7-9.
uint32_t swizzled(uint32_t address) { return address ^ (address >> 3 & 0x70); }

void copy_now(const Copy& copy) {
  Map map;
  memcpy(&map, copy.map, sizeof(map));
  if (copy.to % 128 != 0) stop("a copy to an address that is no multiple of 128");
  const int64_t width = 128 / map.element;
  for (int64_t line = 0; line < map.box_rows; ++line) {
    const int64_t row = copy.at[1] + line;
    for (int64_t i = 0; i < width; ++i) {
      const int64_t column = copy.at[0] + i;
      const bool inside = column >= 0 && column < map.extents[0] && row >= 0 && row < map.extents[1] &&
                          (map.rank == 2 || (copy.at[2] >= 0 && copy.at[2] < map.extents[2]));
      const uint32_t to = swizzled(copy.to + line * 128 + i * map.element);
      if (to + map.element > kShared) stop("a copy past the end of shared memory");
      for (int64_t byte = 0; byte < map.element; ++byte) {
        shared[to - 16 + byte] = inside ? map.base[column * map.element + row * map.strides[0] +
                                                   (map.rank == 3 ? copy.at[2] * map.strides[1] : 0) + byte]
                                        : 0;
      }
    }
  }
  Barrier& barrier = barrier_at(copy.barrier);
  barrier.bytes -= 128 * map.box_rows;
  complete(barrier);
  ++progress;
}

// Some or all of the copies under way end, in any order.
void copy_some(bool all) {
  for (size_t i = copies.size(); i-- > 0;) {
    std::swap(copies[i], copies[random_number() % (i + 1)]);
    if (all || random_number() % 2) {
      copy_now(copies[i]);
      copies.erase(copies.begin() + i);
    }
  }
}

float as_float(Kind kind, const uint8_t* bytes) {
  if (kind == Kind::kBf16) {
    uint16_t bits;
    memcpy(&bits, bytes, 2);
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
  }
  if (kind == Kind::kS8) return float(int8_t(*bytes));
  const int exponent = *bytes >> 3 & 15, mantissa = *bytes & 7;
  if (exponent == 15 && mantissa == 7) return NAN;
  const float size = exponent ? ldexpf(8 + mantissa, exponent - 10) : ldexpf(mantissa, -9);
  return *bytes & 0x80 ? -size : size;
}

// Element (mn, k) of an operand, by "Matrix Descriptor Format" and "Strides" of the PTX ISA's wgmma, 128-byte swizzle.
float operand_at(Kind kind, bool mn_major, uint64_t descriptor, int mn, int k) {
  const uint32_t start = (descriptor & 0x3FFF) << 4, leading = (descriptor >> 16 & 0x3FFF) << 4,
                 stride = (descriptor >> 32 & 0x3FFF) << 4;
  if (descriptor >> 62 != 1) stop("a descriptor whose mode is not the 128-byte swizzle");
  if ((descriptor >> 49 & 7) != 0) stop("a descriptor with a base offset");
  const int size = kind == Kind::kBf16 ? 2 : 1;
  if (mn_major && size != 2) stop("an MN-major operand of one-byte elements");
  const uint32_t address = mn_major ? start + mn / 64 * leading + mn % 64 * 2 + k / 8 * stride + k % 8 * 128
                                    : start + mn / 8 * stride + mn % 8 * 128 + k * size;
  return as_float(kind, shared + swizzled(address) - 16);
}

// This thread's share of D of m64nNk*, by "Register Fragments" of wgmma.
void multiply(const Mma& mma, unsigned thread) {
  const int depth = mma.kind == Kind::kBf16 ? 16 : 32;
  float a[2][32];
  for (int half = 0; half < 2; ++half) {
    const int row = thread % 128 / 32 * 16 + thread % 32 / 4 + 8 * half;
    for (int k = 0; k < depth; ++k) a[half][k] = operand_at(mma.kind, mma.mn_a, mma.a, row, k);
  }
  for (int j = 0; j < mma.columns / 8; ++j) {
    for (int c = 0; c < 2; ++c) {
      float b[32];
      for (int k = 0; k < depth; ++k) b[k] = operand_at(mma.kind, mma.mn_b, mma.b, 8 * j + thread % 4 * 2 + c, k);
      for (int half = 0; half < 2; ++half) {
        float sum = 0;
        for (int k = 0; k < depth; ++k) sum += a[half][k] * b[k];
        const int i = 4 * j + 2 * half + c;
        if (mma.kind == Kind::kS8) {
          static_cast<int32_t*>(mma.acc)[i] = int32_t(sum) + (mma.add ? static_cast<int32_t*>(mma.acc)[i] : 0);
        } else {
          static_cast<float*>(mma.acc)[i] = sum + (mma.add ? static_cast<float*>(mma.acc)[i] : 0);
        }
      }
    }
  }
}

void enter() {
  (*body)();
  if (!fibers[current].issued.empty() || !fibers[current].committed.empty()) stop("ended with products under way");
  fibers[current].done = true;
  ++progress;
  yield();
}

void run_block(unsigned threads) {
  memset(shared, 0xFF, kShared);  // NaN, until something is written
  barriers.clear();
  copies.clear();
  block_meetings[0] = block_meetings[1] = Meeting();
  warps.assign((threads + 31) / 32, Meeting());
  lanes.assign(threads, 0);
  fibers.clear();
  fibers.resize(threads);
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.context);
    fiber.stack.reset(new char[kStack]);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    makecontext(&fiber.context, enter, 0);
  }
  std::vector<unsigned> order(threads);
  for (unsigned i = 0; i < threads; ++i) order[i] = i;
  for (bool running = true; running;) {
    const uint64_t before = progress;
    // Whole warps run near each other, in an order that changes.
    const unsigned first = random_number() % threads;
    running = false;
    for (unsigned i = 0; i < threads; ++i) {
      current = order[(first + i) % threads];
      if (fibers[current].done) continue;
      swapcontext(&scheduler, &fibers[current].context);
      running |= !fibers[current].done;
    }
    copy_some(progress == before);
    if (running && progress == before) stop("deadlock");
  }
  if (!copies.empty()) stop("ended with copies under way");
}

}  // namespace

Thread thread() { return {current}; }

void run(dim3 grid, unsigned threads, const std::function<void()>& kernel) {
  if (!arena) arena.reset(new uint8_t[kShared + 2 * kAlignment]);
  // Not aligned to an atom, as a block's dynamic memory may not be.
  shared = arena.get() + (kAlignment - reinterpret_cast<uintptr_t>(arena.get()) % kAlignment) + 16;
  grid_size = grid;
  body = &kernel;
  launched_threads = threads;
  for (block_index.y = 0; block_index.y < grid.y; ++block_index.y) {
    for (block_index.x = 0; block_index.x < grid.x; ++block_index.x) run_block(threads);
  }
}

void warp_barrier() { meet(warps[current / 32], 32); }

void block_barrier(int which, unsigned threads) { meet(block_meetings[which], threads ? threads : launched_threads); }

uint64_t exchange(uint64_t value, unsigned from_lane) {
  lanes[current] = value;
  warp_barrier();
  const uint64_t received = lanes[current / 32 * 32 + from_lane % 32];
  warp_barrier();
  return received;
}

void issue(const Mma& mma) { fibers[current].issued.push_back(mma); }

void commit_mma() {
  Fiber& fiber = fibers[current];
  fiber.committed.push_back(std::move(fiber.issued));
  fiber.issued.clear();
  if (random_number() % 2) wait_for_mma(0);
}

void wait_for_mma(size_t pending) {
  Fiber& fiber = fibers[current];
  while (fiber.committed.size() > pending) {
    for (const Mma& mma : fiber.committed.front()) multiply(mma, current);
    fiber.committed.pop_front();
  }
}

void load(const CUtensorMap* map, uint64_t* barrier, uint32_t to, int32_t c0, int32_t c1, int32_t c2) {
  copies.push_back({map, barrier, to, {c0, c1, c2}});
}

CUresult encode(CUtensorMap* to, CUtensorMapDataType type, cuuint32_t rank, void* base, const cuuint64_t* extents,
                const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps, CUtensorMapInterleave,
                CUtensorMapSwizzle mode, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  Map map{};
  map.base = static_cast<const uint8_t*>(base);
  map.element = type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 ? 2 : 1;
  map.rank = rank;
  map.box_rows = box[1];
  if (mode != CU_TENSOR_MAP_SWIZZLE_128B || box[0] * map.element != 128 || box[1] > 256)
    return CUDA_ERROR_INVALID_VALUE;
  if (reinterpret_cast<uintptr_t>(base) % 16) return CUDA_ERROR_INVALID_VALUE;
  for (cuuint32_t i = 0; i < rank; ++i) {
    if (extents[i] == 0 || extents[i] > 1ull << 32 || steps[i] != 1) return CUDA_ERROR_INVALID_VALUE;
    map.extents[i] = extents[i];
  }
  for (cuuint32_t i = 0; i + 1 < rank; ++i) {
    if (strides[i] % 16 || strides[i] >= 1ull << 40) return CUDA_ERROR_INVALID_VALUE;
    map.strides[i] = strides[i];
  }
  memcpy(to, &map, sizeof(map));
  return CUDA_SUCCESS;
}

}  // namespace emulated

uint32_t shared_address(const void* pointer) {  // offsets of 16 and more: the arena is not aligned to an atom
  return static_cast<uint32_t>(static_cast<const uint8_t*>(pointer) - emulated::shared) + 16;
}

void barrier_init(uint64_t* barrier, uint32_t arrivals) { emulated::barriers[barrier] = {arrivals, arrivals, 0, 0}; }
void barrier_arrive(uint64_t* barrier) { emulated::arrive(emulated::barrier_at(barrier)); }

void barrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  emulated::barrier_at(barrier).bytes += bytes;
  barrier_arrive(barrier);
}

void barrier_wait(uint64_t* barrier, uint32_t parity) {
  emulated::wait_until([=] { return (emulated::barrier_at(barrier).phase & 1) != parity; });
}

}  // namespace mjk

// The runtime's functions that the launchers call: a device of three multiprocessors, so that blocks take several
// tiles.
extern "C" {
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaGetLastError(void) { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "an error"; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? 9 : attribute == cudaDevAttrMultiProcessorCount ? 3 : 0;
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  return memset(to, value, bytes), cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int value) {
  return value <= 227 << 10 ? cudaSuccess : cudaErrorInvalidValue;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  *function = reinterpret_cast<void*>(mjk::emulated::encode);
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
}
