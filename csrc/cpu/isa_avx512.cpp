#include "cpu/includes.h"
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,bmi2,prefer-vector-width=512")
#define RFDARTS_ISA avx512
#define RFDARTS_VECTOR_BYTES 64
#include "cpu/table.h"
#endif
