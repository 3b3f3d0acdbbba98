#define ILVAE_ISA baseline
#include "cpu/pointwise_rows.h"
