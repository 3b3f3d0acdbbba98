#define ILVAE_ISA avx2
#include "cpu/fused_tile.h"
