#define ILVAE_ISA avx512
#include "cpu/pointwise_rows.h"
