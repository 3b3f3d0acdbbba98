// Between the parts of the executor: scheduler (executor.cpp), instructions (instructions.cpp), race detector
// (races.cpp). Kernels do not see this.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "executor.h"

namespace executor {

struct Copy {  // a cp.async under way
  unsigned char* shared;
  const unsigned char* global;
  int bytes, source_bytes, group;
  bool done;
};

struct Thread {
  uint32_t id = 0;  // within the launch, from 1
  int warp = 0, lane = 0;
  std::vector<Copy> copies;
  int group = 0;  // of the cp.async issued next
};

extern Thread* running;  // null while the scheduler runs

// Grow monotonically over a launch: with every block and block barrier, and with every barrier of a warp.
extern uint32_t block_epoch;
extern std::vector<uint32_t> warp_epochs;

struct Memory {
  unsigned char* begin = nullptr;
  size_t bytes = 0;
  bool contains(const void* p, size_t n = 1) const {
    const auto* q = static_cast<const unsigned char*>(p);
    return q >= begin && q + n <= begin + bytes;
  }
};
extern Memory shared_memory, stacks;
extern uint32_t threads_per_block;

void report(std::string finding);
std::string place();  // "thread 3 of block 0"
std::string place(uint32_t thread_id);

uint32_t random_below(uint32_t bound);
bool in_order();  // seed 0

// The race detector; does nothing in programs compiled for another mode.
void races_begin_launch();
void races_begin_block();
enum class Kind : uint8_t { read, write, atomic, copy_begins, copy_ends };  // the last two: cp.async and its wait
void races_access(const void* address, size_t bytes, Kind kind, const void* caller);

}  // namespace executor
