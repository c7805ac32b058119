// BatchNorms over several processes: what each process has is multiplied by its number of values, added up over all,
// and divided by the number of all.
#pragma once
#include <vector>

#include "cuda/launch.h"
#include "cuda/params.h"

namespace rfdarts::cuda {

// Two means of one BatchNorm's channels: mean and variance; or slope and shift, which are means over the values too.
template <class U>
struct Means {
  U *first, *second;
  int c;
};

template <class U>
struct OverProcesses {
  int count;
  double values, all;
  double* sums;  // [count][2][c]
  Means<U> of[2 * kMaxBranches];
};

// Moments: the second of a pair is a variance, whose sum is that of squares.
template <class U, bool Moments, bool Gather>
__global__ void __launch_bounds__(kThreads) over_processes_kernel(const __grid_constant__ OverProcesses<U> a) {
  double* sums = a.sums;
  for (int i = 0; i < int(blockIdx.x); i++) sums += 2 * a.of[i].c;
  Means<U> of = a.of[blockIdx.x];
  for (int ch = threadIdx.x; ch < of.c; ch += kThreads) {
    double *first = sums + ch, *second = first + of.c;
    if constexpr (Gather) {
      double mean = double(of.first[ch]);
      *first = a.values * mean;
      *second = a.values * (double(of.second[ch]) + (Moments ? mean * mean : 0));
    } else {
      double mean = *first / a.all, other = *second / a.all - (Moments ? mean * mean : 0);
      of.first[ch] = U(mean);
      // a NaN stays one
      of.second[ch] = U(Moments && other < 0 ? 0 : other);
    }
  }
}

// `means` of this process become those of all, in one message; `pixels`: values of a channel in an image.
template <bool Moments, class U>
void merge_over_processes(const Processes& processes, int64_t images, int64_t pixels,
                          const std::vector<Means<U>>& means, const Queue& queue, const Allocate& allocate) {
  if (!processes.sum || means.empty()) return;
  int64_t size = 0, most = 2 * kMaxBranches;
  for (const Means<U>& of : means) size += 2 * of.c;
  double* sums = static_cast<double*>(allocate(size * int64_t(sizeof(double))));
  auto run = [&](auto kernel) {
    double* to = sums;
    for (size_t begin = 0; begin < means.size(); begin += most) {
      OverProcesses<U> p{0, double(images * pixels), double(processes.images * pixels), to, {}};
      for (size_t i = begin; i < means.size() && p.count < most; i++) {
        p.of[p.count++] = means[i];
        to += 2 * means[i].c;
      }
      launch(kernel, dim3(p.count), 0, queue, p);
    }
  };
  run(over_processes_kernel<U, Moments, true>);
  processes.sum(sums, size);
  run(over_processes_kernel<U, Moments, false>);
}

}  // namespace rfdarts::cuda
