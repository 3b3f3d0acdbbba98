// Rows of tensors whose dtype, width and alignment are known at run time, four elements at a time.
#pragma once

#include "cuda/fused.h"
#include "cuda/operand.cuh"

namespace ilvae::cuda {

// Four elements of a row from `column`, zeros from column `width` on.
__device__ __forceinline__ float4 load_four(const Array& m, int64_t row, int column, int width) {
  float four[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  const int64_t at = row * m.stride + column;
  const auto* const bytes = static_cast<const unsigned char*>(m.data);
  if (m.type == DType::float32) {
    const auto* const from = reinterpret_cast<const float*>(bytes) + at;
    if (column + 4 <= width && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
      load<4>(four, from);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (column + i < width) four[i] = from[i];
      }
    }
  } else {
    const bool brain = m.type == DType::bfloat16;
    const auto* const from = reinterpret_cast<const uint16_t*>(bytes) + at;
    uint32_t bits[2] = {0, 0};
    if (column + 4 <= width && reinterpret_cast<uintptr_t>(from) % 8 == 0) {
      const uint2 both = *reinterpret_cast<const uint2*>(from);
      bits[0] = both.x, bits[1] = both.y;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (column + i < width) bits[i / 2] |= uint32_t(from[i]) << (16 * (i % 2));
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float2 pair = brain ? ptx::unpack_bf16(bits[i]) : ptx::unpack_fp16(bits[i]);
      four[2 * i] = pair.x, four[2 * i + 1] = pair.y;
    }
  }
  return make_float4(four[0], four[1], four[2], four[3]);
}

// The first elements of `four` to elements column .. width - 1 of a contiguous row.
__device__ __forceinline__ void store_four(void* data, DType type, int64_t row, int column, int width, float4 value) {
  const float four[4] = {value.x, value.y, value.z, value.w};
  const int64_t at = row * width + column;
  if (type == DType::float32 && width % 4 == 0) {  // torch aligns what it allocates
    store<4>(static_cast<float*>(data) + at, four);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (column + i < width) store_any(data, type, at + i, four[i]);
    }
  }
}

__device__ __forceinline__ float load_one(const Array& m, int64_t row, int column = 0) {
  return load_any<float>(m.data, m.type, row * m.stride + column);
}

}  // namespace ilvae::cuda
