#include "cpu/includes.h"
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,bmi2")
#define RFDARTS_ISA avx2
#define RFDARTS_VECTOR_BYTES 32
#include "cpu/table.h"
#endif
