// Values per channel: coefficients of kernels, and statistics of images.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "core/data.h"
#include "cpu/kernels.h"

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

// A BatchNorm of c channels, and the moments [2][c] that it normalises by.
template <class T>
struct Norm {
  int64_t c;
  const T *gamma, *beta;
  const double* moments;
  double eps;

  double mean(int64_t i) const { return moments[i]; }
  double root(int64_t i) const { return std::sqrt(moments[c + i] + eps); }

  // as scale y + shift, and its mean: rows 0, 1, 2
  Coefficients<T> affine(int64_t period) const {
    Coefficients<T> rows(3, c, period);
    for (int64_t i = 0; i < c; i++) {
      double scale = gamma[i] / root(i);
      rows.set(0, i, scale);
      rows.set(1, i, beta[i] - mean(i) * scale);
      rows.set(2, i, mean(i));
    }
    return rows;
  }

  // NormBackward::coefficients. g_sum, dot: sums of g and of g (y - mean) over the `count` values that the moments are
  // of; null in evaluation mode, whose moments do not depend on y.
  Coefficients<T> backward(int64_t period, const double* g_sum, const double* dot, double count) const {
    Coefficients<T> rows(kNormRows, c, period);
    for (int64_t i = 0; i < c; i++) {
      double rstd = 1 / root(i), scale = gamma[i] * rstd;
      rows.set(kScale, i, scale);
      rows.set(kSlope, i, dot ? -scale * dot[i] * rstd * rstd / count : 0);
      rows.set(kMean, i, mean(i));
      rows.set(kShift, i, g_sum ? -scale * g_sum[i] / count : 0);
    }
    return rows;
  }
  // from sums over this process's values
  void gradients(const double* g_sum, const double* dot, T* grad_gamma, T* grad_beta) const {
    for (int64_t i = 0; i < c; i++) {
      grad_gamma[i] = T(dot[i] * (1 / root(i)));
      grad_beta[i] = T(g_sum[i]);
    }
  }
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
