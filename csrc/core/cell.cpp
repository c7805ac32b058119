#include "core/cell.h"

#include <algorithm>
#include <stdexcept>

namespace rfdarts {
namespace {

[[noreturn]] void refuse(const std::string& expected, int64_t got) {
  throw std::invalid_argument("cell: expected " + expected + ", got " + std::to_string(got));
}
// no text is made where it holds: a cell is decoded in every call
void expect(bool holds, const char* expected, int64_t got) {
  if (!holds) refuse(expected, got);
}

// The numbers of an encoded cell, one after the other, each checked to lie between two others.
struct Reader {
  const std::vector<int64_t>& numbers;
  size_t at = 0;
  int64_t next(const char* name, int64_t least, int64_t most) {
    int64_t value = numbers.at(at++);
    if (value < least || value > most)
      refuse(std::string(name) + " from " + std::to_string(least) + " to " + std::to_string(most), value);
    return value;
  }
};

Branch read_branch(Reader& read, int norms, int stride) {
  // a row, an index or an offset where the op has one, else `none`
  auto optional = [&](const char* name, bool has, int64_t most, int64_t none) {
    return has ? read.next(name, 0, most) : read.next(name, none, none);
  };
  Branch b{};
  b.op = Op(read.next("op", int64_t(Op::None), int64_t(Op::NorConv)));
  bool depthwise = b.op == Op::SepConv || b.op == Op::DilConv, nor = b.op == Op::NorConv;
  b.kernel = int(read.next("kernel", depthwise ? 3 : nor, depthwise ? 5 : nor ? 3 : 0));
  expect(b.kernel % 2 || !b.convolves() || b.op == Op::Reduce, "an odd kernel", b.kernel);
  b.dilation = int(read.next("dilation", depthwise ? 1 : 0, depthwise ? 2 : 0));
  b.weight = optional("weight", b.convolves(), INT64_MAX / 2, 0);
  bool normed = b.convolves() || b.op == Op::MaxPool || (b.op == Op::AvgPool && stride == 2);
  b.norm = int(read.next("norm", normed ? 0 : -1, normed || b.op == Op::AvgPool ? norms - 1 : -1));
  b.inner_norm = int(optional("inner_norm", b.op == Op::SepConv, norms - 1, -1));
  b.noise = int(optional("noise", b.op == Op::Noise, INT32_MAX - 1, -1));
  expect(b.op != Op::Identity || stride == 1, "stride 1 for an identity", stride);
  expect(b.op != Op::Reduce || stride == 2, "stride 2 for a FactorizedReduce", stride);
  expect(!nor || stride == 1, "stride 1 for a convolution of NAS-Bench-201", stride);
  return b;
}
}  // namespace

int64_t Branch::weight_size(int64_t channels) const {
  if (op == Op::NorConv) return (kernel == 1 ? 2 : 2 * (9 + 16)) * channels * channels;
  int pairs = op == Op::SepConv ? 2 : convolves() ? 1 : 0;
  return pairs * channels * (kernel * kernel + 2 * channels);
}

CellDescription::CellDescription(const std::vector<int64_t>& encoded) {
  constexpr int64_t head = 5, numbers_per_branch = 7;
  int64_t size = encoded.size();
  expect(size >= head, "at least 5 numbers", size);
  Reader read{encoded};
  // none of them can be larger than the list, so that what follows does not overflow
  inputs = int(read.next("inputs", 1, size)), nodes = int(read.next("nodes", 1, size));
  primitives = int(read.next("primitives", 1, size)), norms = int(read.next("norms", 0, 2 * size));
  K = read.next("K", 1, INT32_MAX);
  int64_t count = int64_t(nodes) * inputs + int64_t(nodes) * (nodes - 1) / 2;
  int64_t expected = head + count * (1 + numbers_per_branch * int64_t(primitives));
  if (size != expected) refuse(std::to_string(expected) + " numbers", size);
  std::vector<bool> seen(norms);
  int used = 0;
  for (int i = 0; i < nodes; i++)
    for (int s = 0; s < incoming(i); s++) {
      Edge edge{s, i, int(read.next("stride", 1, 2)), {}};
      bool has[int(Op::NorConv) + 1] = {};
      for (int p = 0; p < primitives; p++) {
        const Branch& b = edge.branches.emplace_back(read_branch(read, norms, edge.stride));
        // kernels find them on an edge by their op
        bool once = b.pools() || b.averages() || b.op == Op::Identity;
        expect(!once || !has[int(b.op)], "a pool or identity once on an edge", int64_t(b.op));
        has[int(b.op)] = true;
        for (int norm : {b.norm, b.inner_norm}) {
          if (norm < 0) continue;
          expect(!seen[norm], "a norm once in the cell", norm);
          seen[norm] = true, used++;
        }
      }
      edges.push_back(edge);
    }
  if (used != norms) refuse("branches with " + std::to_string(norms) + " norms", used);
}

std::string CellDescription::text() const {
  auto fields = [](std::initializer_list<std::pair<const char*, int64_t>> values) {
    std::string line;
    for (auto [name, value] : values)
      line += (line.empty() ? "" : " ") + std::string(name) + "=" + std::to_string(value);
    return line + "\n";
  };
  std::string text = fields(
      {{"inputs", inputs}, {"nodes", nodes}, {"primitives", primitives}, {"norms", norms}, {"K", K}});
  for (size_t e = 0; e < edges.size(); e++) {
    const Edge& edge = edges[e];
    text += "edge " + std::to_string(e) + ": ";
    text += fields({{"source", edge.source}, {"node", edge.node}, {"stride", edge.stride}});
    for (const Branch& b : edge.branches)
      text += "  " + fields({{"op", int64_t(b.op)},
                             {"kernel", b.kernel},
                             {"dilation", b.dilation},
                             {"weight", b.weight},
                             {"norm", b.norm},
                             {"inner_norm", b.inner_norm},
                             {"noise", b.noise}});
  }
  return text;
}

Cell::Cell(const std::vector<int64_t>& encoded, int64_t images, int64_t channels, bool training, double eps,
           const std::vector<int64_t>& sizes)
    : CellDescription(encoded), images(images), channels(channels), mixed_channels(channels / K), training(training),
      eps(eps) {
  if (int64_t(sizes.size()) != 2 * inputs)
    throw std::invalid_argument("inputs: expected " + std::to_string(inputs) + " as the cell has, got " +
                                std::to_string(sizes.size() / 2));
  if (channels < 1 || channels % K)
    throw std::invalid_argument("inputs: expected a multiple of K = " + std::to_string(K) + " channels, got " +
                                std::to_string(channels));
  oh = sizes[0] / edges[0].stride, ow = sizes[1] / edges[0].stride;
  for (int s = 0; s < states(); s++) {
    bool input = s < inputs;
    sources.push_back({input ? sizes[2 * s] : oh, input ? sizes[2 * s + 1] : ow, 1, false, {}});
  }
  for (size_t e = 0; e < edges.size(); e++) {
    Edge& edge = edges[e];
    Source& source = sources[edge.source];
    expect(source.edges.empty() || source.stride == edge.stride, "one stride of all edges that leave a state",
           edge.stride);
    source.stride = edge.stride;
    if (source.h != oh * edge.stride || source.w != ow * edge.stride)
      throw std::invalid_argument("inputs: expected height and width of " + std::to_string(oh * edge.stride) + " x " +
                                  std::to_string(ow * edge.stride) + " for an edge of stride " +
                                  std::to_string(edge.stride) + ", got " + std::to_string(source.h) + " x " +
                                  std::to_string(source.w));
    source.edges.push_back(int(e));
    for (Branch& b : edge.branches) {
      source.pools |= b.pools();
      noises = std::max(noises, b.noise + 1);
      if (b.op == Op::SepConv) b.inner_output = outputs++;
      if (!b.convolves()) continue;
      b.output = outputs++;
      expect(b.weight % mixed_channels == 0, "a weight offset of whole rows of C / K", b.weight);
      conv_weights_size = std::max(conv_weights_size, b.weight + b.weight_size(mixed_channels));
    }
  }
}
}  // namespace rfdarts
