// The CPU kernels of avx512_bf16, products emulated, for tests on processors without it.
#include "cpu/includes.h"
#define RFDARTS_ISA emulated_bf16
#define RFDARTS_VECTOR_BYTES 16
#define RFDARTS_BFLOAT16_PRODUCTS
#include "cpu/table.h"
