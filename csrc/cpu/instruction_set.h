// The instruction set in use: the best that was compiled and that torch reports. ATEN_CPU_CAPABILITY lowers it.
#pragma once

namespace ilvae::cpu {

enum class Isa { baseline, avx2, avx512 };

Isa isa();
const char* instruction_set();  // "avx512", "avx2" or "baseline"

}  // namespace ilvae::cpu
