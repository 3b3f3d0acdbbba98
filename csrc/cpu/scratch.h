// Scratch memory of a tile. Part of fused_tile.h.
//
// A layout is a function that takes every array it needs from an allocator. It runs once with ScratchSize, which
// counts, and once with Scratch, which hands out, so that both agree about the size.
//
// Builds without NDEBUG check two bounds and abort when one is broken: what is taken fits into the memory, and nobody
// has written behind an array. For the second a guard follows every array.
#pragma once

#include <cassert>
#include <cstdint>

#include "cpu/fused.h"
#include "cpu/vectors.h"

namespace ilvae::cpu::ILVAE_ISA {

#if defined(NDEBUG)
inline constexpr int64_t guard_units = 0;
#else
inline constexpr int64_t guard_units = 1;
#endif

// Counts the elements that a full tile takes.
template <class T>
class ScratchSize {
 public:
  ILVAE_HD T* take(int64_t units) {
    elements_ += (units + guard_units) * tile_lanes<T>;
    return nullptr;
  }
  ILVAE_HD int64_t elements() const { return elements_; }

 private:
  int64_t elements_ = 0;
};

#if defined(NDEBUG)

// Hands out panels of `lanes` lanes, front to back.
template <class T>
class Scratch {
 public:
  ILVAE_HD Scratch(const ScratchMemory<T>& memory, int64_t lanes) : next_(memory.data), lanes_(lanes) {}
  ILVAE_HD T* take(int64_t units) {
    T* const panel = next_;
    next_ += units * lanes_;
    return panel;
  }

 private:
  T* next_;
  int64_t lanes_;
};

#else

template <class T>
class Scratch {
 public:
  Scratch(const ScratchMemory<T>& memory, int64_t lanes)
      : next_(memory.data), end_(memory.data + memory.elements), lanes_(lanes) {}
  Scratch(const Scratch&) = delete;
  ~Scratch() {
    for (int i = 0; i < taken_; ++i) {
      for (int64_t r = 0; r < lanes_; ++r) assert(guards_[i][r] == guard && "a tile wrote behind a scratch panel");
    }
  }
  T* take(int64_t units) {
    assert(taken_ < most_panels && "a layout takes more panels than the checks of scratch memory have room for");
    assert(end_ - next_ >= (units + guard_units) * lanes_ && "scratch memory is smaller than its layout");
    T* const panel = next_;
    next_ += (units + guard_units) * lanes_;
    guards_[taken_] = panel + units * lanes_;
    for (int64_t r = 0; r < lanes_; ++r) guards_[taken_][r] = guard;
    ++taken_;
    return panel;
  }

 private:
  static constexpr int most_panels = 32;
  static constexpr T guard = T(-1.2345e30);
  T *next_, *end_, *guards_[most_panels];
  int64_t lanes_;
  int taken_ = 0;
};

#endif

}  // namespace ilvae::cpu::ILVAE_ISA
