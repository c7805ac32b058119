// Values per channel: coefficients of kernels, and statistics of images.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/data.h"

namespace rfdarts {

// Rows of per-channel coefficients in the width that the kernels read, `period`.
template <class T>
class Coefficients {
 public:
  Coefficients() = default;
  Coefficients(int64_t rows, int64_t c, int64_t period) : c_(c), period_(period), values_(rows * period) {}
  void set(int64_t row, int64_t channel, double value) {
    for (int64_t k = channel; k < period_; k += c_) values_[row * period_ + k] = T(value);
  }
  void set(int64_t row, double value) {
    for (int64_t i = 0; i < c_; i++) set(row, i, value);
  }
  const T* row(int64_t r) const { return values_.data() + r * period_; }

 private:
  int64_t c_ = 0, period_ = 0;
  std::vector<T> values_;
};

// Mean and sum of squared deviations of each image, for each of `count` branch outputs or pools.
struct ImageMoments {
  int64_t count = 0, c = 0;
  double* room = nullptr;  // [images][count][2][c]
  static int64_t size(int64_t images, int64_t count, int64_t c) { return images * count * 2 * c; }
  double* mean_of(int64_t n, int64_t i) const { return room + (n * count + i) * 2 * c; }
  double* deviation_of(int64_t n, int64_t i) const { return mean_of(n, i) + c; }

  // images of equal size: the mean of means, and Chan's merge of the deviations
  void merge(int64_t i, int64_t images, int64_t pixels, double* mean_out, double* variance_out) const {
    std::fill_n(mean_out, c, 0.0);
    for (int64_t n = 0; n < images; n++)
      for (int64_t j = 0; j < c; j++) mean_out[j] += mean_of(n, i)[j];
    for (int64_t j = 0; j < c; j++) mean_out[j] /= images, variance_out[j] = 0;
    for (int64_t n = 0; n < images; n++)
      for (int64_t j = 0; j < c; j++) {
        double off = mean_of(n, i)[j] - mean_out[j];
        variance_out[j] += deviation_of(n, i)[j] + pixels * off * off;
      }
    for (int64_t j = 0; j < c; j++) variance_out[j] /= images * pixels;
  }
};

// Mean and variance of some channels.
struct Moments {
  double *mean, *variance;
  int64_t channels;
};

// Those of this process's `count` values of a channel become those of all processes' `all`, in one message. In double,
// the difference of squares loses nothing that float inputs have.
inline void merge_over_processes(const SumOverProcesses& sum, double count, double all,
                                 const std::vector<Moments>& moments) {
  if (!sum || moments.empty()) return;
  std::vector<double> sums;
  for (auto [mean, variance, channels] : moments)
    for (int64_t j = 0; j < channels; j++) {
      sums.push_back(count * mean[j]);
      sums.push_back(count * (variance[j] + mean[j] * mean[j]));
    }
  sum(sums.data(), sums.size());
  const double* s = sums.data();
  for (auto [mean, variance, channels] : moments)
    for (int64_t j = 0; j < channels; j++, s += 2) {
      mean[j] = s[0] / all;
      variance[j] = std::max(s[1] / all - mean[j] * mean[j], 0.0);
    }
}

}  // namespace rfdarts
