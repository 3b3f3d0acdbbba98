// A list, for kernels that are compiled without torch.
#pragma once

#include <vector>

namespace c10 {

template <class T, unsigned>
using SmallVector = std::vector<T>;

}  // namespace c10
