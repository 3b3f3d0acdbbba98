#define ILVAE_ISA avx2
#include "cpu/pointwise_rows.h"
