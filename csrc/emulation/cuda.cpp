#include "emulation/cuda.h"

#include <dlfcn.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <map>
#include <numeric>
#include <random>
#include <stdexcept>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#undef threadIdx
#undef blockIdx
#undef gridDim

namespace emulation {

Thread* thread;
Block block;

namespace {
constexpr size_t kStack = 128 << 10;
constexpr int kMaxThreads = 1024;
bool shuffled = false, recording = false;
std::string log;
std::vector<Device> devices = {{9, 0, 228 << 10, 227 << 10, 1 << 10, true, -1}};
int current = 0;
cudaError_t last_error = cudaSuccess;
// device and kernel -> bytes of shared memory
std::map<std::pair<int, const void*>, size_t> granted;
cudaError_t result(bool good, cudaError_t error) { return good ? cudaSuccess : last_error = error; }
void (*body)(void*);
void* context;

#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)
void* scheduler;
// saves what a call must preserve, and changes stacks
extern "C" void rfdarts_emulation_switch(void** save, void* to);
asm(R"(
.text
.type rfdarts_emulation_switch,@function
rfdarts_emulation_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp,(%rdi)
  mov %rsi,%rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");
void leave() { rfdarts_emulation_switch(&thread->stack, scheduler); }
void enter(Thread& t) {
  thread = &t;
  rfdarts_emulation_switch(&scheduler, t.stack);
}
void entry() {
  body(context);
  thread->state = State::Returned;
  leave();
  std::abort();
}
void prepare(Thread& t, int, char* stack) {
  auto top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + kStack) & ~uintptr_t(15));
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&entry);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  t.stack = top;
}
#else
// slower, but any processor, and the sanitizer is told of every change of stacks
ucontext_t home, contexts[kMaxThreads];
const void* home_stack;
size_t home_size;
#if defined(__SANITIZE_ADDRESS__)
void before(void** save, const void* stack, size_t size) { __sanitizer_start_switch_fiber(save, stack, size); }
void after(void* saved, const void** stack, size_t* size) { __sanitizer_finish_switch_fiber(saved, stack, size); }
#else
void before(void**, const void*, size_t) {}
void after(void*, const void**, size_t*) {}
#endif
void leave() {
  void* fake = nullptr;
  before(thread->state == State::Returned ? nullptr : &fake, home_stack, home_size);
  swapcontext(static_cast<ucontext_t*>(thread->stack), &home);
  after(fake, &home_stack, &home_size);
}
void enter(Thread& t) {
  thread = &t;
  auto to = static_cast<ucontext_t*>(t.stack);
  void* fake = nullptr;
  before(&fake, to->uc_stack.ss_sp, to->uc_stack.ss_size);
  swapcontext(&home, to);
  after(fake, nullptr, nullptr);
}
void entry() {
  after(nullptr, &home_stack, &home_size);
  body(context);
  thread->state = State::Returned;
  leave();
}
void prepare(Thread& t, int i, char* stack) {
  ucontext_t* c = &contexts[i];
  getcontext(c);
  c->uc_stack.ss_sp = stack;
  c->uc_stack.ss_size = kStack;
  c->uc_link = nullptr;
  makecontext(c, entry, 0);
  t.stack = c;
}
#endif

[[noreturn]] void die(const char* what, const std::vector<Thread>& threads) {
  int count[4] = {};
  for (const Thread& t : threads) count[int(t.state)]++;
  std::fprintf(stderr, "CUDA emulation: %s in block (%u, %u, %u): %d threads at a barrier, %d at a warp operation, %d "
               "returned\n", what, block.id.x, block.id.y, block.id.z, count[1], count[2], count[3]);
  std::abort();
}

// Lets the warp operations go on whose lanes have all arrived. Of shuffled threads only those of the first warp in
// `order` that has any, so that warps reach a barrier one after the other.
bool complete_warps(std::vector<Thread>& threads, const std::vector<int>& order) {
  bool any = false;
  int n = int(threads.size()), completed = -1;
  for (int number : order) {
    Thread& t = threads[number];
    if (t.state != State::Warp || (shuffled && any && t.warp != completed)) continue;
    int first = t.warp * 32, last = std::min(n, first + 32);
    if (!(t.mask >> t.lane & 1)) die("a lane is not in its own mask", threads);
    bool all = true;
    for (int i = first; i < last; i++) {
      if (!(t.mask >> threads[i].lane & 1)) continue;
      if (threads[i].state == State::Returned) die("a lane of the mask has returned", threads);
      all = all && threads[i].state == State::Warp && threads[i].mask == t.mask;
      if (all && threads[i].operation != t.operation) die("lanes are at different warp operations", threads);
    }
    if (!all) continue;
    any = true, completed = t.warp;
    for (int i = first; i < last; i++)
      if (t.mask >> threads[i].lane & 1) {
        block.exchange[t.warp][threads[i].lane] = threads[i].slot;
        threads[i].state = State::Running;
      }
  }
  return any;
}

void run_block(std::vector<Thread>& threads, std::vector<int>& order, std::mt19937& random) {
  auto shuffle_order = [&] {
    if (shuffled) std::shuffle(order.begin(), order.end(), random);
  };
  shuffle_order();
  for (;;) {
    for (int i : order)
      if (threads[i].state == State::Running) enter(threads[i]);
    if (complete_warps(threads, order)) continue;
    size_t waiting = 0, returned = 0;
    for (const Thread& t : threads) waiting += t.state == State::Barrier, returned += t.state == State::Returned;
    if (returned == threads.size()) return;
    if (waiting + returned < threads.size()) die("deadlock", threads);
    if (returned) die("a barrier that some threads never reach", threads);
    for (Thread& t : threads) t.state = State::Running;
    shuffle_order();
  }
}
}  // namespace

void shuffle(bool on) { shuffled = on; }
void record(bool on) {
  recording = on;
  log.clear();
}
const std::string& recorded() { return log; }
bool write_down(const char* function, const void* kernel, dim3 grid, dim3 size, size_t shared, Bytes params) {
  if (!recording) return false;
  std::string name = function;
  // ... [with Params = ...; ...]
  name = name.substr(name.find("Params = "));
  Dl_info library{};
  dladdr(kernel, &library);
  auto place = static_cast<const char*>(kernel) - static_cast<const char*>(library.dli_fbase);
  auto sizes = [](dim3 d) { return std::to_string(d.x) + " " + std::to_string(d.y) + " " + std::to_string(d.z); };
  log += name.substr(0, name.find_first_of(";]")) + " | " + std::to_string(grid.x * grid.y * grid.z) + " | " +
         std::to_string(shared) + " | " + std::to_string(place) + " | " + sizes(grid) + " | " + sizes(size) + " | ";
  for (size_t i = 0; i < params.size; i++) {
    unsigned char byte = static_cast<const unsigned char*>(params.data)[i];
    for (int digit : {byte >> 4, byte & 15}) log += "0123456789abcdef"[digit];
  }
  log += "\n";
  return true;
}
void emulate(std::vector<Device> some) {
  devices = std::move(some);
  current = 0, last_error = cudaSuccess;
  granted.clear();
}
void allocate(int64_t bytes) {
  int64_t most = devices[current].allocation;
  if (most >= 0 && bytes > most) throw std::runtime_error("aoti_torch_aten_new_empty(...) API call failed");
}
bool launchable(const void* kernel, size_t shared) {
  // what is beyond needs cudaFuncSetAttribute
  size_t most = granted.count({current, kernel}) ? granted[{current, kernel}] : 48 << 10;
  if (!devices[current].image) last_error = cudaErrorNoKernelImageForDevice;
  else if (shared > most) last_error = cudaErrorInvalidValue;
  else return true;
  return false;
}

void barrier() {
  thread->state = State::Barrier;
  leave();
}
void warp_operation(unsigned mask, int operation) {
  thread->mask = mask;
  thread->operation = operation;
  thread->state = State::Warp;
  leave();
}

void run(dim3 grid, dim3 size, size_t shared, void (*kernel)(void*), void* arguments) {
  static char* stacks = static_cast<char*>(mmap(nullptr, kStack * kMaxThreads, PROT_READ | PROT_WRITE,
                                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  static std::mt19937 random(1);
  int n = int(size.x * size.y * size.z);
  std::vector<Thread> threads(n);
  std::vector<uint64_t> exchange((n + 31) / 32 * 32);
  std::vector<int> order(n);
  std::iota(order.begin(), order.end(), 0);
  body = kernel;
  context = arguments;
  block.grid = grid;
  block.exchange = reinterpret_cast<uint64_t(*)[32]>(exchange.data());
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x++) {
        block.id = dim3(x, y, z);
        // exactly as much as was asked for, so that AddressSanitizer sees what lies beyond
        block.shared = static_cast<unsigned char*>(std::malloc(shared));
        std::memset(block.shared, 0xff, shared);
        for (int i = 0; i < n; i++) {
          threads[i] = {};
          threads[i].id = {unsigned(i) % size.x, unsigned(i) / size.x % size.y, unsigned(i) / (size.x * size.y)};
          threads[i].lane = i % 32;
          threads[i].warp = i / 32;
          prepare(threads[i], i, stacks + kStack * i);
        }
        run_block(threads, order, random);
        std::free(block.shared);
      }
}

}  // namespace emulation

using emulation::current;
using emulation::devices;
using emulation::result;

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorNoKernelImageForDevice: return "no kernel image is available for execution on the device";
  }
  return "unknown error";
}
cudaError_t cudaGetLastError() { return std::exchange(emulation::last_error, cudaSuccess); }
cudaError_t cudaGetDeviceCount(int* count) {
  *count = int(devices.size());
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = current;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  bool known = device >= 0 && device < int(devices.size());
  if (known) current = device;
  return result(known, cudaErrorInvalidDevice);
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  const emulation::Device& d = devices.at(device);
  int values[] = {d.major, d.minor, d.per_multiprocessor, d.per_block, d.reserved};
  *value = values[attribute];
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) {
  return result(devices[current].image, cudaErrorNoKernelImageForDevice);
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  bool room = bytes <= devices[current].per_block;
  if (room) emulation::granted[{current, kernel}] = bytes;
  return result(room, cudaErrorInvalidValue);
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *free = devices[current].allocation < 0 ? size_t(1) << 40 : size_t(devices[current].allocation);
  *total = size_t(1) << 40;
  return cudaSuccess;
}
