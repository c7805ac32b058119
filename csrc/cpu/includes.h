// Everything that the kernels take from outside, read before an instruction set is switched on.
#pragma once
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/kernels.h"
