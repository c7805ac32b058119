// A cell's ops by storage type: one file for each has the kernels. And BatchNorms' running statistics.
#include "cuda/cell_context.h"

namespace rfdarts::cuda {

void cell_forward(Storage storage, const Cell& cell, const CellForward& data, void* stream, const Allocate& allocate) {
  with_storage(storage, [&]<class T>() { CellRun<T>::forward(cell, data, cudaStream_t(stream), allocate); });
}
void cell_branch_outputs(Storage storage, const Cell& cell, const CellForward& data, void* stream,
                         const Allocate& allocate) {
  with_storage(storage, [&]<class T>() { CellRun<T>::branch_outputs(cell, data, cudaStream_t(stream), allocate); });
}
void cell_backward(Storage storage, const Cell& cell, const CellBackward& data, void* stream,
                   const Allocate& allocate) {
  with_storage(storage, [&]<class T>() { CellRun<T>::backward(cell, data, cudaStream_t(stream), allocate); });
}

namespace {
constexpr int kMaxNorms = 128;

// One block per BatchNorm of c channels.
template <class A>
struct UpdateRunningStats {
  const double *means, *variances;  // [norms][c], of the batch
  int c;
  RunningUpdate update;
  struct {
    A *mean, *variance;
    int64_t* num_batches;
  } norm[kMaxNorms];
};

template <class A>
__global__ void __launch_bounds__(kThreads)
    update_running_stats_kernel(const __grid_constant__ UpdateRunningStats<A> a) {
  int i = blockIdx.x;
  for (int ch = threadIdx.x; ch < a.c; ch += kThreads)
    a.update(a.norm[i].mean[ch], a.norm[i].variance[ch], a.means[i * a.c + ch], a.variances[i * a.c + ch]);
  if (threadIdx.x == 0) ++*a.norm[i].num_batches;
}

template <class A>
void run_update(const std::vector<RunningStats>& running, const double* moments, int64_t channels,
                const RunningUpdate& update, cudaStream_t stream) {
  for (size_t first = 0; first < running.size(); first += kMaxNorms) {
    int count = int(std::min<size_t>(kMaxNorms, running.size() - first));
    UpdateRunningStats<A> p{moments + first * channels, moments + (running.size() + first) * channels, int(channels),
                            update, {}};
    for (int i = 0; i < count; i++) {
      const RunningStats& r = running[first + i];
      p.norm[i] = {static_cast<A*>(r.mean), static_cast<A*>(r.variance), r.num_batches};
    }
    launch(update_running_stats_kernel<A>, dim3(count), 0, stream, p);
  }
}
}  // namespace

void update_running_stats(Storage storage, const std::vector<RunningStats>& running, const double* moments,
                          int64_t channels, const RunningUpdate& update, void* stream) {
  auto run = storage == Storage::Double ? run_update<double> : run_update<float>;
  run(running, moments, channels, update, cudaStream_t(stream));
}

}  // namespace rfdarts::cuda
