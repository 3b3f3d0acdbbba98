// torch's threads, as far as csrc/cpu uses them, by those of C++.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace at {

inline int threads = 1;
inline thread_local bool inside = false;

inline int get_num_threads() { return threads; }
inline void set_num_threads(int n) { threads = n; }
inline bool in_parallel_region() { return inside; }

template <class Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  const int64_t pieces = std::min<int64_t>(threads, (end - begin + grain - 1) / grain);
  if (pieces <= 1 || inside) {
    if (begin < end) body(begin, end);
    return;
  }
  std::vector<std::thread> team;
  for (int64_t i = 0; i < pieces; ++i) {
    team.emplace_back([&, i] {
      inside = true;
      body(begin + (end - begin) * i / pieces, begin + (end - begin) * (i + 1) / pieces);
    });
  }
  for (auto& thread : team) thread.join();
}

}  // namespace at
