// GCC 12's own intrinsics begin with a register of any value.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include "cpu/includes.h"
#ifdef RFDARTS_BUILDS_AMX
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,bmi2,prefer-vector-width=512")
#define RFDARTS_ISA amx_bf16
#define RFDARTS_VECTOR_BYTES 64
#define RFDARTS_BFLOAT16_PRODUCTS
#define RFDARTS_AVX512_BF16
#define RFDARTS_AMX
#include "cpu/table.h"
#endif
