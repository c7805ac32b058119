#include "rfdarts/cell.h"

#include <cstdlib>
#include <new>

#include "cell_parts.h"

namespace rfdarts {

Cell::Cell(const std::vector<int64_t>& spec, int64_t images, int64_t channels, double eps,
           const std::vector<int64_t>& sizes)
    : images(images), channels(channels), eps(eps) {
  size_t at = 0;
  auto next = [&] { return spec.at(at++); };
  inputs = next(), nodes = next(), primitives = next(), norms = next(), K = next(), training = next();
  mixed = channels / K;
  for (int i = 0; i < nodes; i++)
    for (int j = 0; j < inputs + i; j++) {
      Edge edge{j, i, int(next()), {}};
      for (int p = 0; p < primitives; p++) {
        Branch b{Op(next()), int(next()), int(next()), next(), int(next()), int(next()), int(next())};
        edge.branches.push_back(b);
      }
      edges.push_back(edge);
    }
  int64_t stride = edges.at(0).stride;
  oh = sizes.at(0) / stride, ow = sizes.at(1) / stride;
  for (int j = 0; j < inputs + nodes; j++) {
    bool input = j < inputs;
    sources.push_back({input ? sizes.at(2 * j) : oh, input ? sizes.at(2 * j + 1) : ow, 1, false, {}});
  }
  for (size_t e = 0; e < edges.size(); e++) {
    Edge& edge = edges[e];
    Source& source = sources[edge.source];
    if (!source.edges.empty() && source.stride != edge.stride)
      throw std::invalid_argument("edges that leave one state must have one stride");
    source.stride = edge.stride;
    if (source.h / edge.stride != oh || source.w / edge.stride != ow)
      throw std::invalid_argument("the edges of a cell must have one output size");
    source.edges.push_back(int(e));
    for (Branch& b : edge.branches) {
      source.pools |= b.pools();
      if (b.op == Op::SepConv) b.inner_slot = slots++;
      if (b.convolves()) b.slot = slots++;
    }
  }
}

namespace {
Phase phases[kPhases] = {{"preprocess", 0},
                         {"node sums, stage 1", 0},
                         {"stage 2", 0},
                         {"stage 2 backward", 0},
                         {"stage 1 backward, node sums", 0},
                         {"preprocess backward", 0}};

struct Block {
  char* data;
  int64_t size;
};
struct Arena {
  std::vector<Block> blocks;
  ~Arena() {
    for (Block& b : blocks) std::free(b.data);
  }
};
thread_local Arena arena;
}  // namespace

const std::vector<Phase>& profile() {
  static std::vector<Phase> copy;
  copy.assign(phases, phases + kPhases);
  return copy;
}
Timed::Timed(PhaseId phase) : phase(phase), begin(std::chrono::steady_clock::now()) {}
Timed::~Timed() {
  phases[phase].seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

Scratch::Scratch() = default;
void* Scratch::grab(int64_t bytes) {
  // blocks never move, as pieces of them are in use
  while (block_ < arena.blocks.size() && used_ + bytes > arena.blocks[block_].size) block_++, used_ = 0;
  if (block_ == arena.blocks.size()) {
    int64_t size = (bytes + (1 << 20)) / 4096 * 4096 + 4096;
    char* p = static_cast<char*>(std::aligned_alloc(4096, size));
    if (!p) throw std::bad_alloc();
    arena.blocks.push_back({p, size});
  }
  void* p = arena.blocks[block_].data + used_;
  used_ += bytes;
  return p;
}
}  // namespace rfdarts
