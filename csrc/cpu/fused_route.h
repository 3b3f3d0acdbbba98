// The fused route on the CPU, on tensors: a tile of rows goes through the whole network in the caches of one core, one
// kernel per operator.
//
// What it saves (cpu/fused.h): panels of the pre-activations (padded_rows(N), S+1), biases included, and of the
// adjoints (padded_rows(N), S - n_K); A B.
#pragma once

#include "route.h"

namespace ilvae::cpu {

extern const Implementation fused;

}  // namespace ilvae::cpu
