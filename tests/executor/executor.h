// CUDA C++ for g++: the names of the language, and the host executor behind them. See README.md in this folder.
// Included by the compiler's command line before any device code.
#pragma once

#define ILVAE_EXECUTOR 1

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static_assert(false, "shared memory comes from ptx::dynamic_shared()");

#define EXECUTOR_VECTOR(T, name, bytes2, bytes4)             \
  struct __align__(bytes2) name##2 { T x, y; };              \
  struct __align__(bytes4) name##4 { T x, y, z, w; };        \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EXECUTOR_VECTOR(float, float, 8, 16)
EXECUTOR_VECTOR(double, double, 16, 16)
EXECUTOR_VECTOR(int, int, 8, 16)
EXECUTOR_VECTOR(unsigned, uint, 8, 16)
EXECUTOR_VECTOR(unsigned short, ushort, 4, 8)
#undef EXECUTOR_VECTOR

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Of the thread that runs; the executor changes them when it switches threads.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

namespace executor {

using Where = std::source_location;

// Runs kernel() in every thread of every block; see README.md for the seed. Throws nothing: what was found is kept for
// executor_findings().
void launch(dim3 grid, dim3 block, size_t dynamic_shared_bytes, int64_t seed, void (*kernel)(void*), void* context);

template <class Kernel>
void launch(dim3 grid, dim3 block, size_t dynamic_shared_bytes, int64_t seed, const Kernel& kernel) {
  launch(
      grid, block, dynamic_shared_bytes, seed, [](void* k) { (*static_cast<const Kernel*>(k))(); },
      const_cast<void*>(static_cast<const void*>(&kernel)));
}

unsigned char* dynamic_shared();

// Waits until the lanes of `mask` have come; then `perform` runs once with their records (null for other lanes).
void together(uint32_t mask, const char* what, Where where, void (*perform)(void* const* lanes), void* record);
void block_barrier(Where where);
void warp_barrier(uint32_t mask, Where where);

enum class Operand { bf16, fp16, tf32 };
void mma(Operand operand, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row, bool transposed);
void cp_async(void* shared, const void* global, int bytes, int source_bytes);  // bytes: 4 or 16
void cp_async_commit();
void cp_async_wait(int pending_groups);
uint32_t round_tf32(float x);
uint32_t pack_bf16(float low, float high);
uint32_t pack_fp16(float low, float high);
float2 unpack_fp16(uint32_t pair);
float ex2_approx(float x);
float rcp_approx(float x);

// An atomic access of the thread that runs: in order with other atomics, a race with anything else.
void note_atomic(void* address, size_t bytes);

struct Shuffle {
  uint64_t value;
  int source;  // lane
};
void shuffle(uint32_t mask, const char* what, Where where, Shuffle& record);
int lane();

template <class T>
T shuffle(uint32_t mask, const char* what, Where where, T value, int source, int width) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "shuffles move 32 or 64 bits");
  const int base = lane() & -width;
  Shuffle record{0, source >= base && source < base + width ? source : lane()};
  std::memcpy(&record.value, &value, sizeof(T));
  shuffle(mask, what, where, record);
  std::memcpy(&value, &record.value, sizeof(T));
  return value;
}

uint32_t ballot(uint32_t mask, bool predicate, Where where);

}  // namespace executor

#define EXECUTOR_HERE executor::Where where = executor::Where::current()

inline void __syncthreads(EXECUTOR_HERE) { executor::block_barrier(where); }
inline void __syncwarp(uint32_t mask = 0xffffffffu, EXECUTOR_HERE) { executor::warp_barrier(mask, where); }
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, EXECUTOR_HERE) {
  return executor::shuffle(mask, "shfl", where, value, (executor::lane() & -width) + (source & (width - 1)), width);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32, EXECUTOR_HERE) {
  return executor::shuffle(mask, "shfl.xor", where, value, executor::lane() ^ bits, width);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, int by, int width = 32, EXECUTOR_HERE) {
  return executor::shuffle(mask, "shfl.down", where, value, executor::lane() + by, width);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, int by, int width = 32, EXECUTOR_HERE) {
  return executor::shuffle(mask, "shfl.up", where, value, executor::lane() - by, width);
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate, EXECUTOR_HERE) {
  return executor::ballot(mask, predicate != 0, where);
}
inline int __any_sync(uint32_t mask, int predicate, EXECUTOR_HERE) {
  return executor::ballot(mask, predicate != 0, where) != 0;
}
inline int __all_sync(uint32_t mask, int predicate, EXECUTOR_HERE) {
  return executor::ballot(mask, predicate != 0, where) == mask;
}
#undef EXECUTOR_HERE

template <class T>
T __ldg(const T* address) {
  return *address;
}

template <class T>
__attribute__((no_sanitize("thread"))) T atomicAdd(T* address, std::type_identity_t<T> value) {
  executor::note_atomic(address, sizeof(T));
  const T old = *address;
  *address = old + value;
  return old;
}

inline uint32_t __float_as_uint(float x) { return __builtin_bit_cast(uint32_t, x); }
inline int32_t __float_as_int(float x) { return __builtin_bit_cast(int32_t, x); }
inline float __uint_as_float(uint32_t x) { return __builtin_bit_cast(float, x); }
inline float __int_as_float(int32_t x) { return __builtin_bit_cast(float, x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return std::exp(x); }

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return T(b) < T(a) ? T(b) : T(a);
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return T(a) < T(b) ? T(b) : T(a);
}
