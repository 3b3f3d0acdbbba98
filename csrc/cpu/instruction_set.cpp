#include "cpu/instruction_set.h"

#include <ATen/Version.h>

#include <string>

namespace ilvae::cpu {

Isa isa() {
  static const Isa best = [] {
#if defined(ILVAE_X86)
    const std::string capability = at::get_cpu_capability();
    if (capability.starts_with("AVX512")) return Isa::avx512;
    if (capability.starts_with("AVX2")) return Isa::avx2;
#endif
    return Isa::baseline;
  }();
  return best;
}

const char* instruction_set() {
  switch (isa()) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace ilvae::cpu
