// The CPU kernels of amx_bf16 with emulated tiles, and no others, for tests on processors without AMX; they need AVX2.
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/includes.h"
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,bmi2")
#endif
#define RFDARTS_ISA emulated_amx
#define RFDARTS_VECTOR_BYTES 64
#define RFDARTS_BFLOAT16_PRODUCTS
#define RFDARTS_AMX
#define RFDARTS_EMULATED_TILES
#include "cpu/table.h"

namespace rfdarts {
const char* isa_name() { return "amx_bf16"; }
const char* isa_best() { return "amx_bf16"; }
const char* amx_missing() { return ""; }
bool multiplies_bfloat16() { return true; }

template <class T, class S>
const Kernels<T, S>& kernels() {
  throw std::invalid_argument("bfloat16_products: expected true of emulated kernels, got false");
}
template <>
const Kernels<float, float>& kernels_of_products() {
  return table_emulated_amx_f32;
}
template <>
const Kernels<float, bf16>& kernels_of_products() {
  return table_emulated_amx_bf16;
}
template <>
const Kernels<double, double>& kernels_of_products() {
  return kernels<double, double>();
}
template const Kernels<float, float>& kernels();
template const Kernels<float, bf16>& kernels();
template const Kernels<double, double>& kernels();
}  // namespace rfdarts
