// Which instruction set runs: chosen once.
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "rfdarts/kernels.h"

namespace rfdarts {
extern const Kernels<float, float> table_baseline_f32;
extern const Kernels<float, bf16> table_baseline_bf16;
extern const Kernels<double, double> table_f64;
#if defined(__x86_64__)
extern const Kernels<float, float> table_avx2_f32, table_avx512_f32;
extern const Kernels<float, bf16> table_avx2_bf16, table_avx512_bf16;
#endif

const char* isa_best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return "avx512";
  if (avx2) return "avx2";
#endif
  return "baseline";
}

const char* isa_name() {
  static const char* chosen = [] {
    const char *best = isa_best(), *asked = std::getenv("RFDARTS_CPU_ISA");
    if (!asked) return best;
    // an instruction set that the processor lacks is not an option
    for (const char* name : {"baseline", "avx2", "avx512"}) {
      if (!std::strcmp(asked, name)) return name;
      if (!std::strcmp(best, name)) break;
    }
    return best;
  }();
  return chosen;
}

namespace {
int level() {
  static const int chosen = !std::strcmp(isa_name(), "avx512") ? 2 : !std::strcmp(isa_name(), "avx2") ? 1 : 0;
  return chosen;
}
}  // namespace

template <>
const Kernels<float, float>& kernels() {
#if defined(__x86_64__)
  if (level() == 2) return table_avx512_f32;
  if (level() == 1) return table_avx2_f32;
#endif
  return table_baseline_f32;
}
template <>
const Kernels<float, bf16>& kernels() {
#if defined(__x86_64__)
  if (level() == 2) return table_avx512_bf16;
  if (level() == 1) return table_avx2_bf16;
#endif
  return table_baseline_bf16;
}
template <>
const Kernels<double, double>& kernels() {
  return table_f64;
}
}  // namespace rfdarts
