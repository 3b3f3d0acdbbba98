// torch's threads, for kernels that are compiled without torch: new ones for each call, so that a race detector sees
// every hand-over.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace at {

inline thread_local int threads_here = 1;
inline thread_local bool inside = false;
inline int get_num_threads() { return threads_here; }
inline void set_num_threads(int count) { threads_here = count; }
inline bool in_parallel_region() { return inside; }

template <class Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  const int64_t count = std::min<int64_t>(threads_here, (end - begin + grain - 1) / std::max<int64_t>(1, grain));
  if (count <= 1 || inside) {
    if (begin < end) body(begin, end);
    return;
  }
  const int64_t share = (end - begin + count - 1) / count;
  std::vector<std::thread> others;
  for (int64_t from = begin; from < end; from += share) {
    others.emplace_back([&body, from, to = std::min(end, from + share)] {
      inside = true;
      body(from, to);
    });
  }
  for (auto& thread : others) thread.join();
}

}  // namespace at
