// The storage format bfloat16, bit-compatible with c10::BFloat16, for code without torch headers.
#pragma once

#include <cstdint>

namespace ilvae {

struct bfloat16 {
  uint16_t bits;

  bfloat16() = default;
  inline explicit bfloat16(float value) {  // to nearest, ties to even; NaN stays NaN
    const uint32_t u = __builtin_bit_cast(uint32_t, value);
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    bits = static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
  }
};

}  // namespace ilvae
