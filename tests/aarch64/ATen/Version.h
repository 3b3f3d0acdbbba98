// What torch says about the processor, where that decides about nothing.
#pragma once

#include <string>

namespace at {

inline std::string get_cpu_capability() { return "DEFAULT"; }

}  // namespace at
