#define ILVAE_ISA baseline
#include "cpu/fused_tile.h"
