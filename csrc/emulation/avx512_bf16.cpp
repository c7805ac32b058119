// The CPU kernels of avx512_bf16, products emulated, for tests on processors without it; they need AVX2.
#include "cpu/includes.h"
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,bmi2")
#define RFDARTS_VECTOR_BYTES 32
#else
#define RFDARTS_VECTOR_BYTES 16
#endif
#define RFDARTS_ISA emulated_bf16
#define RFDARTS_BFLOAT16_PRODUCTS
#include "cpu/table.h"
