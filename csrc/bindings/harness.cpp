// The kernels one by one on NumPy arrays, for tests of every instruction set in one process, and what they were built
// with. No torch here. Images are [H, W, C].
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "cpu/kernels.h"

namespace py = pybind11;
namespace rfdarts {
extern const Kernels<float, float> table_emulated_bf16_f32;
namespace {
template <class T>
const Kernels<T, T>* table_for(const std::string& isa) {
  if constexpr (std::is_same_v<T, float>)
    if (isa == "emulated_bf16") {
#if defined(__x86_64__)
      if (!kernels_for<float, float>("avx2")) return nullptr;
#endif
      return &table_emulated_bf16_f32;
    }
  return kernels_for<T, T>(isa.c_str());
}
template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class T>
void expect(const char* name, const Array<T>& a, const std::vector<int64_t>& shape) {
  bool same = a.ndim() == int64_t(shape.size());
  for (size_t i = 0; same && i < shape.size(); i++) same = a.shape(i) == shape[i];
  if (same) return;
  std::string text = std::string(name) + ": expected shape [";
  for (int64_t n : shape) text += std::to_string(n) + " ";
  text.back() = ']';
  throw std::invalid_argument(text);
}

// T: of arrays and arithmetic. Scratch is as large as ScratchSize says, so that a sanitizer sees what goes beyond.
template <class T>
class Harness {
 public:
  explicit Harness(const std::string& isa) : k_(table_for<T>(isa)), products_(isa.ends_with("_bf16")) {
    if (!k_)
      throw std::invalid_argument("isa: expected emulated_bf16, or baseline, avx2, avx512, avx512_bf16 or amx_bf16"
                                  " if this processor has it, got " + isa);
  }

  py::tuple conv_forward(const Array<T>& x, const Array<T>& depthwise, const Array<T>& pointwise, int dilation,
                         int stride) const {
    Image in(x);
    int kernel = depthwise.shape(0);
    expect("depthwise", depthwise, {kernel, kernel, in.c});
    expect("pointwise", pointwise, {in.c, in.c});
    Frame frame = k_->frame(in.size(), stride);
    Array<T> y(in.pooled(stride));
    Array<double> mean(in.c), deviation(in.c);
    std::vector<T> framed(frame.size), scratch(ScratchSize<T>::conv_forward(y.shape(1), in.c));
    k_->frame_relu(in.view(x), in.size(), frame, framed.data());
    auto dw = repeated(depthwise, in.c, stride), pw = repeated(matrix(pointwise.data(), in.c), in.c, stride);
    Conv<T> conv{kernel, dilation, stride, dw.data(), pw.data(), nullptr};
    Ahead ahead;
    k_->conv_forward(framed.data(), frame, in.size(), conv,
                     {y.mutable_data(), mean.mutable_data(), deviation.mutable_data()}, scratch.data(), ahead);
    return py::make_tuple(y, mean, deviation);
  }

  // coefficients [4, C]: scale, slope, mean, shift; pointwise is transposed here
  Array<T> conv_backward(const Array<T>& g, const Array<T>& y, const Array<T>& coefficients,
                         const Array<T>& depthwise, const Array<T>& pointwise, int dilation, int stride, int64_t h,
                         int64_t w) const {
    int64_t c = g.shape(2);
    int kernel = depthwise.shape(0);
    Array<T> dx({h, w, c});
    Image in(dx);
    expect("g", g, in.pooled(stride));
    expect("y", y, in.pooled(stride));
    expect("coefficients", coefficients, {kNormRows, c});
    std::vector<T> transposed(c * c), scratch(ScratchSize<T>::conv_backward(g.shape(1), c));
    for (int64_t i = 0; i < c; i++)
      for (int64_t o = 0; o < c; o++) transposed[o * c + i] = pointwise.at(i, o);
    Frame frame = k_->frame({g.shape(0), g.shape(1), c}, stride);
    std::vector<T> framed(frame.size);
    auto dw = repeated(depthwise, c, stride);
    auto pw_t = repeated(matrix(transposed.data(), c), c, stride);
    auto rows = repeated(coefficients, c, 1);
    Conv<T> conv{kernel, dilation, stride, dw.data(), nullptr, pw_t.data()};
    Ahead ahead;
    // once more, added
    for (bool add : {false, true})
      k_->conv_backward({g.data(), y.data(), rows.data()}, in.size(), conv, frame, framed.data(), add,
                        dx.mutable_data(), scratch.data(), ahead);
    return dx;
  }

  // by a few rows at a time, as a cell does
  py::tuple pool_forward(const Array<T>& x, int stride, int64_t rows) const {
    Image in(x);
    Array<T> max(in.pooled(stride)), avg(in.pooled(stride));
    std::vector<T> scratch(ScratchSize<T>::pool_forward(in.w, in.c));
    int64_t row = max.shape(1) * in.c;
    for (int64_t r = 0; r < max.shape(0); r += rows)
      k_->pool_forward(x.data(), in.size(), stride, r, std::min<int64_t>(rows, max.shape(0) - r),
                       max.mutable_data() + r * row, avg.mutable_data() + r * row, scratch.data());
    return py::make_tuple(max, avg);
  }
  Array<T> pool_backward(const Array<T>& x, const Array<T>& d_max, const Array<T>& d_avg, int stride) const {
    Image in(x);
    expect("d_max", d_max, in.pooled(stride));
    expect("d_avg", d_avg, in.pooled(stride));
    Array<T> dx({in.h, in.w, in.c}), share(in.pooled(stride));
    std::copy_n(d_avg.data(), d_avg.size(), share.mutable_data());
    std::fill_n(dx.mutable_data(), dx.size(), T(0));
    std::vector<T> scratch(ScratchSize<T>::pool_backward(in.w, in.c));
    k_->divide_by_window(share.mutable_data(), in.size(), stride);
    bool finite = std::all_of(x.data(), x.data() + x.size(), [](T v) { return std::isfinite(v); });
    k_->pool_backward(x.data(), d_max.data(), share.data(), in.size(), stride, finite, dx.mutable_data(),
                      scratch.data());
    return dx;
  }

  // mean and sum of squared deviations over `x`, by a few rows at a time
  py::tuple moments(const Array<T>& x, int64_t rows) const {
    Image in(x);
    Array<double> mean(in.c), deviation(in.c);
    std::vector<T> shift(k_->period(in.c)), scratch(ScratchSize<T>::sums(in.c));
    for (int64_t r = 0; r < in.h; r += rows)
      k_->add_moments(x.data() + r * in.w * in.c, std::min(rows, in.h - r) * in.w, in.c, r == 0, shift.data(),
                      mean.mutable_data(), deviation.mutable_data(), scratch.data());
    k_->finish_moments(shift.data(), in.h * in.w, in.c, mean.mutable_data(), deviation.mutable_data());
    return py::make_tuple(mean, deviation);
  }

  Array<T> shuffle(const Array<T>& mixed, const Array<T>& around, int64_t K) const {
    Image in(around);
    expect("mixed", mixed, {in.h, in.w, in.c / K});
    Array<T> out({in.h, in.w, in.c});
    std::vector<T> scratch(ScratchSize<T>::bypass_forward(in.w, in.c));
    ImageView<T> x = in.view(around);
    T one = 1;
    k_->bypass_forward(1, &x, &one, mixed.data(), in.size(), K, out.mutable_data(), scratch.data());
    return out;
  }
  py::tuple unshuffle(const Array<T>& x, int64_t K) const {
    Image in(x);
    Array<T> mixed({in.h, in.w, in.c / K}), planar({in.h, in.w, in.c});
    std::vector<T> scratch(ScratchSize<T>::bypass_backward(in.w, in.c));
    const T *g = x.data(), one = 1;
    k_->take_mixed(in.view(x), in.size(), K, mixed.mutable_data());
    k_->bypass_backward({nullptr, {}, 1, &g, &one, {}, planar.mutable_data(), nullptr}, in.size(), K, scratch.data());
    return py::make_tuple(mixed, planar);
  }

 private:
  struct Image {
    int64_t h, w, c;
    explicit Image(const Array<T>& x) {
      if (x.ndim() != 3 || x.size() == 0) throw std::invalid_argument("expected a non-empty image [H, W, C]");
      h = x.shape(0), w = x.shape(1), c = x.shape(2);
    }
    Size size() const { return {h, w, c}; }
    ImageView<T> view(const Array<T>& x) const { return {x.data(), w * c, c}; }
    std::vector<int64_t> pooled(int stride) const { return {(h - 1) / stride + 1, (w - 1) / stride + 1, c}; }
  };
  // rows of C values as the kernels read them: see Kernels::period
  std::vector<T> repeated(const Array<T>& rows, int64_t c, int stride) const {
    int64_t period = stride == 1 ? k_->period(c) : c, count = rows.size() / c;
    std::vector<T> wide(count * period);
    for (int64_t r = 0; r < count; r++)
      for (int64_t i = 0; i < period; i++) wide[r * period + i] = rows.data()[r * c + i % c];
    return wide;
  }
  // [C in][C out] as the kernels read it: for products of bfloat16 in pairs
  Array<T> matrix(const T* rows, int64_t c) const {
    if (!products_) return Array<T>({c, c}, rows);
    if (c % 4) throw std::invalid_argument("pointwise: expected channels in fours, got " + std::to_string(c));
    Array<T> pairs({c, c});
    for (int64_t i = 0; i < c; i++)
      for (int64_t o = 0; o < c; o++) {
        uint32_t bits;
        float value = rows[i * c + o];
        std::memcpy(&bits, &value, sizeof bits);
        uint16_t half = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        std::memcpy(reinterpret_cast<char*>(pairs.mutable_data() + i / 2 * c + o) + i % 2 * sizeof half, &half,
                    sizeof half);
      }
    return pairs;
  }
  const Kernels<T, T>* k_;
  bool products_;
};

template <class T>
void define(py::module_& m, const char* name) {
  using H = Harness<T>;
  py::class_<H>(m, name, "Kernels for one instruction set, on images [H, W, C] of one dtype.")
      .def(py::init<const std::string&>(), py::arg("isa"))
      .def("conv_forward", &H::conv_forward, py::arg("x"), py::arg("depthwise"), py::arg("pointwise"),
           py::arg("dilation") = 1, py::arg("stride") = 1,
           "relu(x) through depthwise [K, K, C] and pointwise [C in, C out]: y, its mean and sum of squared deviations")
      .def("conv_backward", &H::conv_backward, py::arg("g"), py::arg("y"), py::arg("coefficients"),
           py::arg("depthwise"), py::arg("pointwise"), py::arg("dilation"), py::arg("stride"), py::arg("h"),
           py::arg("w"),
           "twice the gradient [h, w, C] before the ReLU, for scale g + slope (y - mean) + shift at y; coefficients"
           " [4, C] are these four")
      .def("pool_forward", &H::pool_forward, py::arg("x"), py::arg("stride") = 1, py::arg("rows") = 4,
           "3x3 max and average pool, padding not counted")
      .def("pool_backward", &H::pool_backward, py::arg("x"), py::arg("d_max"), py::arg("d_avg"), py::arg("stride") = 1)
      .def("moments", &H::moments, py::arg("x"), py::arg("rows") = 4)
      .def("shuffle", &H::shuffle, py::arg("mixed"), py::arg("around"), py::arg("K"),
           "mixed [H, W, C / K] and what bypasses it [H, W, C], shuffled with K groups")
      .def("unshuffle", &H::unshuffle, py::arg("x"), py::arg("K"));
}
}  // namespace
}  // namespace rfdarts

PYBIND11_MODULE(_kernels, m) {
  m.doc() = "The CPU kernels without torch: how they were built, and each by itself.";
  m.def("build", [] {
    py::dict d;
    d["compiler"] = "g++ " __VERSION__;
    d["standard"] = int64_t(__cplusplus);
    d["isa"] = rfdarts::isa_name();
    d["isa_best"] = rfdarts::isa_best();
    return d;
  });
  m.def("has", [](const std::string& isa) { return rfdarts::table_for<float>(isa) != nullptr; },
        py::arg("isa"), "Whether this processor runs the kernels for an instruction set.");
  rfdarts::define<float>(m, "Float");
  rfdarts::define<double>(m, "Double");
}
