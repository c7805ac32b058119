// Which instruction set runs: chosen once.
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <string>
#include <type_traits>

#include "cpu/kernels.h"
#ifdef RFDARTS_BUILDS_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace rfdarts {
extern const Kernels<float, float> table_baseline_f32;
extern const Kernels<float, bf16> table_baseline_bf16;
extern const Kernels<double, double> table_f64;
#if defined(__x86_64__)
extern const Kernels<float, float> table_avx2_f32, table_avx512_f32;
extern const Kernels<float, bf16> table_avx2_bf16, table_avx512_bf16;
// with products of bfloat16
extern const Kernels<float, float> table_avx512_bf16_f32;
extern const Kernels<float, bf16> table_avx512_bf16_bf16;
#endif
#ifdef RFDARTS_BUILDS_AMX
extern const Kernels<float, float> table_amx_bf16_f32;
extern const Kernels<float, bf16> table_amx_bf16_bf16;
#endif

namespace {
constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16"};
constexpr int kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmxBf16 = 4;
int level_of(const char* name) {
  for (int i = 0; i <= kAmxBf16; i++)
    if (!std::strcmp(name, kNames[i])) return i;
  return -1;
}
// what RFDARTS_CPU_ISA names, or -1
int asked_level() {
  const char* asked = std::getenv("RFDARTS_CPU_ISA");
  return asked ? level_of(asked) : -1;
}
}  // namespace

const char* amx_missing() {
#ifdef RFDARTS_BUILDS_AMX
  static const std::string reason = []() -> std::string {
    __builtin_cpu_init();
    // AVX512_BF16 multiplies what fills no tile
    if (!__builtin_cpu_supports("amx-tile") || !__builtin_cpu_supports("amx-bf16") ||
        !__builtin_cpu_supports("avx512bf16"))
      return "this processor, or its Linux, has none";
    // Linux is not asked for what is turned off: stacks of signal handlers would have to be larger
    int asked = asked_level();
    if (asked >= 0 && asked < kAmxBf16) return std::string("RFDARTS_CPU_ISA asks for ") + kNames[asked];
    // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    if (syscall(SYS_arch_prctl, 0x1023, 18))
      return std::string("Linux does not grant this process tiles: ") + std::strerror(errno);
    return "";
  }();
  return reason.c_str();
#else
  return "the compiler that built the kernels has none";
#endif
}

const char* isa_best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return !__builtin_cpu_supports("avx512bf16") ? "avx512" : *amx_missing() ? "avx512_bf16" : "amx_bf16";
  if (avx2) return "avx2";
#endif
  return "baseline";
}

namespace {
int level() {
  static const int chosen = [] {
    int best = level_of(isa_best()), wanted = asked_level();
    // an instruction set that the processor lacks is not an option
    return wanted < 0 || wanted > best ? best : wanted;
  }();
  return chosen;
}
template <class T, class S>
const Kernels<T, S>& kernels_at(int level);
template <>
const Kernels<float, float>& kernels_at(int level) {
#if defined(__x86_64__)
  if (level >= kAvx512) return table_avx512_f32;
  if (level == kAvx2) return table_avx2_f32;
#endif
  return table_baseline_f32;
}
template <>
const Kernels<float, bf16>& kernels_at(int level) {
#if defined(__x86_64__)
  if (level >= kAvx512) return table_avx512_bf16;
  if (level == kAvx2) return table_avx2_bf16;
#endif
  return table_baseline_bf16;
}
template <>
const Kernels<double, double>& kernels_at(int) {
  return table_f64;
}
// null: none
template <class T, class S>
const Kernels<T, S>* products_at(int level) {
#ifdef RFDARTS_BUILDS_AMX
  if (level == kAmxBf16) {
    if constexpr (std::is_same_v<S, bf16>) return &table_amx_bf16_bf16;
    if constexpr (std::is_same_v<S, float>) return &table_amx_bf16_f32;
  }
#endif
#if defined(__x86_64__)
  if (level < kAvx512Bf16) return nullptr;
  if constexpr (std::is_same_v<S, bf16>) return &table_avx512_bf16_bf16;
  if constexpr (std::is_same_v<S, float>) return &table_avx512_bf16_f32;
#endif
  return nullptr;
}
}  // namespace

const char* isa_name() { return kNames[level()]; }

template <class T, class S>
const Kernels<T, S>& kernels() {
  return kernels_at<T, S>(level());
}
bool multiplies_bfloat16() { return products_at<float, float>(level()); }
template <class T, class S>
const Kernels<T, S>& kernels_of_products() {
  return *products_at<T, S>(level());
}
template <class T, class S>
const Kernels<T, S>* kernels_for(const char* isa) {
  int wanted = level_of(isa);
  if (wanted < 0 || wanted > level_of(isa_best())) return nullptr;
  if (wanted >= kAvx512Bf16) return products_at<T, S>(wanted);
  return &kernels_at<T, S>(wanted);
}
template const Kernels<float, float>& kernels();
template const Kernels<float, bf16>& kernels();
template const Kernels<double, double>& kernels();
template const Kernels<float, float>& kernels_of_products();
template const Kernels<float, bf16>& kernels_of_products();
template const Kernels<double, double>& kernels_of_products();
template const Kernels<float, float>* kernels_for(const char*);
template const Kernels<float, bf16>* kernels_for(const char*);
template const Kernels<double, double>* kernels_for(const char*);
}  // namespace rfdarts
