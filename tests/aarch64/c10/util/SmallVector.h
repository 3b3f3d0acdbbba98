#pragma once

#include <vector>

namespace c10 {

template <class T, unsigned>
class SmallVector : public std::vector<T> {
 public:
  using std::vector<T>::vector;
};

}  // namespace c10
