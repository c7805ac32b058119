// Which kernels a cell runs on: one file per storage type has them.
#include "cuda/cell.h"

#include <algorithm>

#include "cuda/launch.h"

namespace rfdarts::cuda {

template <class T>
void run_forward(const Cell&, const CellForward&, bool, cudaStream_t, const Allocate&);
template <class T>
void run_backward(const Cell&, const CellBackward&, cudaStream_t, const Allocate&);

namespace {
template <class A>
__global__ void __launch_bounds__(kThreads) update_running_kernel(const __grid_constant__ RunningParams<A> a) {
  int i = blockIdx.x;
  for (int ch = threadIdx.x; ch < a.c; ch += kThreads)
    a.update(a.norm[i].mean[ch], a.norm[i].variance[ch], a.mean[i * a.c + ch], a.variance[i * a.c + ch]);
  if (threadIdx.x == 0) ++*a.norm[i].batches;
}

template <class A>
void run_update(const std::vector<RunningStats>& running, const double* moments, int64_t channels,
                const RunningUpdate& update, cudaStream_t stream) {
  for (size_t first = 0; first < running.size(); first += kMaxNorms) {
    RunningParams<A> p{};
    p.c = int(channels), p.norms = int(std::min<size_t>(kMaxNorms, running.size() - first));
    p.mean = moments + first * channels, p.variance = moments + (running.size() + first) * channels;
    p.update = update;
    for (int i = 0; i < p.norms; i++) {
      const RunningStats& r = running[first + i];
      p.norm[i] = {static_cast<A*>(r.mean), static_cast<A*>(r.variance), r.num_batches};
    }
    launch(update_running_kernel<A>, dim3(p.norms), 0, stream, p);
  }
}

void forward(Storage storage, const Cell& cell, const CellForward& data, bool nodes, void* stream,
             const Allocate& allocate) {
  with_storage(storage,
               [&]<class T>() { run_forward<T>(cell, data, nodes, static_cast<cudaStream_t>(stream), allocate); });
}
}  // namespace

void cell_forward(Storage storage, const Cell& cell, const CellForward& data, void* stream, const Allocate& allocate) {
  forward(storage, cell, data, true, stream, allocate);
}
void cell_branch_outputs(Storage storage, const Cell& cell, const CellForward& data, void* stream,
                         const Allocate& allocate) {
  forward(storage, cell, data, false, stream, allocate);
}
void cell_backward(Storage storage, const Cell& cell, const CellBackward& data, void* stream,
                   const Allocate& allocate) {
  with_storage(storage, [&]<class T>() { run_backward<T>(cell, data, static_cast<cudaStream_t>(stream), allocate); });
}

void update_running_stats(Storage storage, const std::vector<RunningStats>& running, const double* moments,
                          int64_t channels, const RunningUpdate& update, void* stream) {
  auto run = storage == Storage::Double ? run_update<double> : run_update<float>;
  run(running, moments, channels, update, static_cast<cudaStream_t>(stream));
}

}  // namespace rfdarts::cuda
