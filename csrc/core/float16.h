// The storage format IEEE binary16, bit-compatible with c10::Half, for code without torch headers. Conversions are the
// business of the devices that compute with it.
#pragma once

#include <cstdint>

namespace ilvae {

struct float16 {
  uint16_t bits;
};

}  // namespace ilvae
