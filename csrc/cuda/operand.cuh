// Vectors of V elements in memory, and their conversion to and from the type of arithmetic.
#pragma once

#include "core/bfloat16.h"
#include "core/float16.h"
#include "core/scalar_math.h"
#include "cuda/dtype.h"
#include "cuda/ptx.cuh"

namespace ilvae::cuda {

// V elements, moved by the widest accesses that 16 bytes allow.
template <class T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Pack {
  T element[V];
};

// The two 16-bit types as pairs in a register.
template <class T>
struct Pairs;
template <>
struct Pairs<bfloat16> {
  static __device__ __forceinline__ uint32_t pack(float low, float high) { return ptx::pack_bf16(low, high); }
  static __device__ __forceinline__ float2 unpack(uint32_t pair) { return ptx::unpack_bf16(pair); }
};
template <>
struct Pairs<float16> {
  static __device__ __forceinline__ uint32_t pack(float low, float high) { return ptx::pack_fp16(low, high); }
  static __device__ __forceinline__ float2 unpack(uint32_t pair) { return ptx::unpack_fp16(pair); }
};

template <int V, class Real, class T>
__device__ __forceinline__ void load(Real (&to)[V], const T* from) {
  const auto pack = *reinterpret_cast<const Pack<T, V>*>(from);
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i + 1 < V; i += 2) {
      const auto pair = Pairs<T>::unpack(pack.element[i].bits | uint32_t(pack.element[i + 1].bits) << 16);
      to[i] = pair.x, to[i + 1] = pair.y;
    }
    if constexpr (V % 2) to[V - 1] = Pairs<T>::unpack(pack.element[V - 1].bits).x;
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) to[i] = Real(pack.element[i]);
  }
}

template <int V, class Real, class T>
__device__ __forceinline__ void store(T* to, const Real (&from)[V]) {
  Pack<T, V> pack;
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i + 1 < V; i += 2) {
      const uint32_t pair = Pairs<T>::pack(from[i], from[i + 1]);
      pack.element[i].bits = uint16_t(pair), pack.element[i + 1].bits = uint16_t(pair >> 16);
    }
    if constexpr (V % 2) pack.element[V - 1].bits = uint16_t(Pairs<T>::pack(from[V - 1], 0.0f));
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) pack.element[i] = T(from[i]);
  }
  *reinterpret_cast<Pack<T, V>*>(to) = pack;
}

template <class Real, class T>
__device__ __forceinline__ Real load(const T* from) {
  Real value[1];
  load<1>(value, from);
  return value[0];
}
template <class Real, class T>
__device__ __forceinline__ void store(T* to, Real value) {
  const Real values[1] = {value};
  store<1>(to, values);
}

// Elements of an array whose type is known at run time, for accesses that are not worth a kernel per type.

template <class Real>
__device__ __forceinline__ Real load_any(const void* data, DType type, int64_t i) {
  switch (type) {
    case DType::float64:
      return Real(static_cast<const double*>(data)[i]);
    case DType::float32:
      return Real(static_cast<const float*>(data)[i]);
    case DType::bfloat16:
      return Real(load<float>(static_cast<const bfloat16*>(data) + i));
    default:
      return Real(load<float>(static_cast<const float16*>(data) + i));
  }
}

template <class Real>
__device__ __forceinline__ void store_any(void* data, DType type, int64_t i, Real value) {
  switch (type) {
    case DType::float64:
      static_cast<double*>(data)[i] = value;
      break;
    case DType::float32:
      static_cast<float*>(data)[i] = float(value);
      break;
    case DType::bfloat16:
      store<float>(static_cast<bfloat16*>(data) + i, float(value));
      break;
    default:
      store<float>(static_cast<float16*>(data) + i, float(value));
  }
}

}  // namespace ilvae::cuda
