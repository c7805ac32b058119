// The kernels for one instruction set. RFDARTS_ISA names the namespace, RFDARTS_VECTOR_BYTES the vector.
// Everything here has internal linkage: an inline function shared with another file's target would be one
// copy for both.
namespace rfdarts {
namespace {
namespace RFDARTS_ISA {
#include "cpu/vec.h"

#ifdef RFDARTS_AMX
#include "cpu/tile_product.h"
#endif

#include "cpu/depthwise.h"
#include "cpu/elementwise.h"
#include "cpu/pointwise.h"
#include "cpu/pool.h"

#include "cpu/bypass.h"
#include "cpu/conv_forward.h"
#include "cpu/conv_backward.h"
#include "cpu/nor_conv.h"

#include "cpu/relu_conv_bn_kernels.h"

template <class T, class S>
constexpr Kernels<T, S> make_table(const char* name) {
  Kernels<T, S> k{};
  k.name = name;
  k.period = period_of<T>;
  k.frame = make_frame<T>;
  k.nor_frame = nor_frame<T>;
  k.frame_relu = frame_relu<T>;
  k.frame_affine_relu = frame_affine_relu<T, S>;
  k.conv_forward = conv_forward<T, S>;
  k.nor_convs_forward = nor_convs_forward<T, S>;
  k.pack = pack<T>;
  k.pool_forward = pool_forward<T>;
  k.add_moments = add_moments<T>;
  k.finish_moments = finish_moments<T>;
  k.pool_backward = pool_backward<T>;
  k.sum_branch_outputs = sum_streams<T, S>;
  k.sum_states = sum_streams<T, T>;
  k.dot_branch_outputs = [](const T* g, int n, const S* const* src, const T* mean, double* out, int64_t count,
                            int64_t c, T* scratch) {
    dot_streams<T, S>(g, n, src, mean, out, nullptr, count, c, scratch);
  };
  k.dot_states = dot_streams<T, T>;
  k.conv_backward = conv_backward<T, T, S>;
  k.conv_backward_stored = conv_backward<T, S, S>;
  k.relu_conv1x1 = relu_conv1x1<T>;
  k.nor_convs_backward = nor_convs_backward<T, S>;
  k.reduce_backward = reduce_backward<T, S>;
  k.relu_backward_inner = relu_backward_inner<T, S>;
  k.relu_backward_add = relu_backward_add<T>;
  k.divide_by_window = divide_by_window<T>;
  k.window_sums = window_sums<T>;
  k.conv1x1_forward = conv1x1_forward<T, S>;
  k.conv1x1_backward = conv1x1_backward<T>;
  k.affine = affine<T>;
  k.norm_backward = norm_backward<T>;
  k.spread = spread<T>;
  k.take_mixed = take_mixed<T>;
  k.bypass_forward = bypass_forward<T>;
  k.bypass_backward = bypass_backward<T>;
  k.half_pool_forward = half_pool_forward<T>;
  k.half_pool_backward = half_pool_backward<T>;
  return k;
}
}  // namespace RFDARTS_ISA
}  // namespace

#define RF_NAME2(isa) #isa
#define RF_NAME(isa) RF_NAME2(isa)
#define RF_TABLE2(isa, types) table_##isa##_##types
#define RF_TABLE(isa, types) RF_TABLE2(isa, types)
extern const Kernels<float, float> RF_TABLE(RFDARTS_ISA, f32);
extern const Kernels<float, bf16> RF_TABLE(RFDARTS_ISA, bf16);
const Kernels<float, float> RF_TABLE(RFDARTS_ISA, f32) =
    RFDARTS_ISA::make_table<float, float>(RF_NAME(RFDARTS_ISA));
const Kernels<float, bf16> RF_TABLE(RFDARTS_ISA, bf16) =
    RFDARTS_ISA::make_table<float, bf16>(RF_NAME(RFDARTS_ISA));
#ifdef RFDARTS_WITH_DOUBLE
extern const Kernels<double, double> table_f64;
const Kernels<double, double> table_f64 = RFDARTS_ISA::make_table<double, double>(RF_NAME(RFDARTS_ISA));
#endif
}  // namespace rfdarts
