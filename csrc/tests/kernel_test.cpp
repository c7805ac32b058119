// The kernels without torch: one separable convolution against plain loops, on the instruction set that runs here.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cpu/kernels.h"

namespace {
float noise() { return float(std::rand()) / float(RAND_MAX) - 0.5f; }

double worst_error(int64_t h, int64_t w, int64_t c, rfdarts::Conv conv) {
  const auto& k = rfdarts::kernels<float, float>();
  int64_t taps = conv.kernel * conv.kernel, period = k.repeat(c), pad = (conv.kernel - 1) * conv.dilation / 2;
  int64_t oh = (h - 1) / conv.stride + 1, ow = (w - 1) / conv.stride + 1;
  std::vector<float> x(h * w * c), dw(taps * c), pw(c * c);
  for (auto* values : {&x, &dw, &pw})
    for (float& v : *values) v = noise();
  rfdarts::Frame frame = k.frame(h, w, c, conv.stride);
  std::vector<float> framed(frame.size, 0.f), scratch(1 << 20), y(oh * ow * c + 32);
  k.frame_relu({x.data(), w * c, c}, h, w, c, frame, framed.data());
  int64_t wide = conv.stride == 1 ? period : c;
  std::vector<float> dw_wide(taps * wide), pw_wide(c * wide);
  for (int64_t i = 0; i < taps * wide; i++) dw_wide[i] = dw[i / wide * c + i % wide % c];
  for (int64_t i = 0; i < c * wide; i++) pw_wide[i] = pw[i / wide * c + i % wide % c];
  std::vector<double> mean(c), deviation(c);
  rfdarts::Ahead ahead;
  k.conv_forward(framed.data(), frame, h, w, c, conv, dw_wide.data(), pw_wide.data(), y.data(), false, mean.data(),
                 deviation.data(), scratch.data(), ahead);
  double worst = 0;
  std::vector<double> d(c);
  for (int64_t r = 0; r < oh; r++)
    for (int64_t q = 0; q < ow; q++) {
      for (int64_t i = 0; i < c; i++) {
        d[i] = 0;
        for (int64_t t = 0; t < taps; t++) {
          int64_t row = r * conv.stride + t / conv.kernel * conv.dilation - pad;
          int64_t column = q * conv.stride + t % conv.kernel * conv.dilation - pad;
          if (row < 0 || row >= h || column < 0 || column >= w) continue;
          d[i] += double(dw[t * c + i]) * std::fmax(0.f, x[(row * w + column) * c + i]);
        }
      }
      for (int64_t o = 0; o < c; o++) {
        double sum = 0;
        for (int64_t i = 0; i < c; i++) sum += d[i] * pw[i * c + o];
        worst = std::fmax(worst, std::fabs(sum - y[(r * ow + q) * c + o]));
      }
    }
  return worst;
}
}  // namespace

int main() {
  std::printf("instruction set: %s\n", rfdarts::isa_name());
  int failures = 0;
  for (int64_t c : {1, 4, 5, 8, 16, 24, 64})
    for (int64_t w : {3, 8, 16, 19})
      for (rfdarts::Conv conv : {rfdarts::Conv{3, 1, 1}, {5, 1, 1}, {3, 2, 1}, {5, 2, 1}, {3, 1, 2}, {5, 2, 2}}) {
        double error = worst_error(9, w, c, conv);
        if (error < 1e-4) continue;
        std::printf("C=%ld W=%ld K=%d D=%d S=%d: error %g\n", long(c), long(w), conv.kernel, conv.dilation,
                    conv.stride, error);
        failures++;
      }
  return failures != 0;
}
