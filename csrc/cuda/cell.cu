// A cell's ops by storage type: one file for each has the kernels. And BatchNorms' running statistics.
#include "cuda/cell_context.h"
#include "cuda/device.h"

namespace rfdarts::cuda {

void cell_forward(Storage storage, const Cell& cell, const CellForward& data, void* stream, const Allocate& allocate) {
  Queue queue(stream);
  with_storage(storage, [&]<class T>() { CellRun<T>::forward(cell, data, queue, allocate); });
}
void cell_branch_outputs(Storage storage, const Cell& cell, const CellForward& data, void* stream,
                         const Allocate& allocate) {
  Queue queue(stream);
  with_storage(storage, [&]<class T>() { CellRun<T>::branch_outputs(cell, data, queue, allocate); });
}
void cell_backward(Storage storage, const Cell& cell, const CellBackward& data, void* stream,
                   const Allocate& allocate) {
  Queue queue(stream);
  with_storage(storage, [&]<class T>() { CellRun<T>::backward(cell, data, queue, allocate); });
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
                const RunningUpdate& update, void* stream) {
  Queue queue(stream);
  for (size_t first = 0; first < running.size(); first += kMaxNorms) {
    int count = int(std::min<size_t>(kMaxNorms, running.size() - first));
    UpdateRunningStats<A> p{moments + first * channels, moments + (running.size() + first) * channels, int(channels),
                            update, {}};
    for (int i = 0; i < count; i++) {
      const RunningStats& r = running[first + i];
      p.norm[i] = {static_cast<A*>(r.mean), static_cast<A*>(r.variance), r.num_batches};
    }
    launch(update_running_stats_kernel<A>, dim3(count), 0, queue, p);
  }
}
}  // namespace

void update_running_stats(Storage storage, const std::vector<RunningStats>& running, const double* moments,
                          int64_t channels, const RunningUpdate& update, void* stream) {
  auto run = storage == Storage::Double ? run_update<double> : run_update<float>;
  run(running, moments, channels, update, stream);
}

namespace {
// The device is the current one while this lives.
struct Current {
  int before = 0;
  explicit Current(int device) {
    check(cudaGetDevice(&before), "device");
    check(cudaSetDevice(device), "device");
  }
  ~Current() { cudaSetDevice(before); }
};
}  // namespace

std::string missing(int device, const std::string& archs) {
  int count = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return cudaGetErrorString(error);
  }
  if (device >= count) return "there is no CUDA device" + (count ? " " + std::to_string(device) : "");
  try {
    Current current(device);
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "device");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "device");
    // the driver looks for code that runs here, all kernels being built for the same devices
    cudaFuncAttributes attributes;
    error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(update_running_stats_kernel<float>));
    if (error == cudaSuccess) return "";
    cudaGetLastError();
  } catch (const std::exception& failed) {
    return failed.what();
  }
  return "the CUDA kernels were built for compute capability " + archs + ", CUDA device " + std::to_string(device) +
         " has " + std::to_string(major) + "." + std::to_string(minor) + " (" + cudaGetErrorString(error) + ")";
}

std::string cell_misfit(Storage storage, const Cell& cell, int device) try {
  Current current(device);
  Queue queue(nullptr, false);
  // nothing is read: any aligned address will do
  void* some = reinterpret_cast<void*>(uintptr_t(1) << 20);
  int64_t c = cell.channels;
  auto states = [&](int64_t h, int64_t w) { return States{some, h * w * c, w * c, c}; };
  Allocate allocate = [&](int64_t) { return some; };
  CellForward forward{{}, std::vector<const void*>(cell.noises, some), some, some, some, some, some, some,
                      static_cast<double*>(some), {}};
  for (int i = 0; i < cell.inputs; i++) forward.inputs.push_back(states(cell.sources[i].h, cell.sources[i].w));
  forward.nodes.assign(cell.nodes, states(cell.oh, cell.ow));
  CellBackward backward{forward, forward.nodes, std::vector<void*>(cell.inputs, some), some, some, some, some};
  with_storage(storage, [&]<class T>() {
    CellRun<T>::forward(cell, forward, queue, allocate);
    CellRun<T>::backward(cell, backward, queue, allocate);
  });
  return "";
} catch (const std::exception& error) {
  return error.what();
}

std::string free_memory() {
  size_t free = 0, total = 0;
  if (cudaMemGetInfo(&free, &total) == cudaSuccess)
    return std::to_string(free) + " of " + std::to_string(total) + " bytes are free";
  cudaGetLastError();
  return "";
}

}  // namespace rfdarts::cuda
