#define ILVAE_ISA avx512
#include "cpu/fused_tile.h"
