// Running statistics of BatchNorms, as BatchNorm2d in training mode updates them, on any device.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define RFDARTS_HOST_DEVICE __host__ __device__
#else
#define RFDARTS_HOST_DEVICE
#endif

namespace rfdarts {

// Of one BatchNorm: mean and variance [C] in the parameters' type.
struct RunningStats {
  void *mean, *variance;
  int64_t* num_batches;
};

// Both go towards the batch's by `momentum`; the variance is made unbiased first.
struct RunningUpdate {
  double momentum, unbias;

  template <class A>
  RFDARTS_HOST_DEVICE void operator()(A& mean, A& variance, double batch_mean, double batch_variance) const {
    mean = A((1 - momentum) * mean + momentum * batch_mean);
    variance = A((1 - momentum) * variance + momentum * unbias * batch_variance);
  }
};
// count: values per channel behind the batch's statistics
inline RunningUpdate running_update(double momentum, int64_t count) {
  return {momentum, double(count) / double(count > 1 ? count - 1 : 1)};
}

}  // namespace rfdarts
