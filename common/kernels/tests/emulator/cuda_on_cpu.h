// Enough of CUDA C++ to run the kernels of this folder with g++, one thread of a block at a time.
//
// Each CUDA thread is a fiber that runs until a barrier. The order in which fibers are resumed is a parameter:
// a kernel with a race gives different results in different orders.

#pragma once
#define CUDA_ON_CPU
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#define __shared__ static

using std::min;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

struct __half {
  _Float16 value;
};
inline float __half2float(__half a) { return (float)a.value; }
inline __half __float2half_rn(float a) { return {(_Float16)a}; }

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 a) {
  const uint32_t bits = (uint32_t)a.bits << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline __nv_bfloat16 __float2bfloat16_rn(float a) {
  if (a != a) return {0x7fff};
  uint32_t bits;
  std::memcpy(&bits, &a, 4);
  return {(uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

namespace emulator {

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(64 << 10);
};

inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline std::vector<int> waiting;  // fibers at the barrier
inline std::vector<int> threads;  // of the block, in the order in which they start
inline int running, started;
inline std::function<void()> body;

// A fiber takes up one thread after the other; only a thread that waits at a barrier needs a fiber of its own.
inline void work() {
  while (started < (int)threads.size()) {
    threadIdx.x = threads[started++];
    body();
  }
}

inline void resume(int fiber) {
  running = fiber;
  swapcontext(&scheduler, &fibers[fiber].context);
}

inline void launch(int grid, int block, int order) {
  std::mt19937 random(order);
  const auto arrange = [&](std::vector<int>& v) {
    if (order == 1) std::reverse(v.begin(), v.end());
    if (order > 1) std::shuffle(v.begin(), v.end(), random);
  };
  std::vector<int> blocks(grid);
  std::iota(blocks.begin(), blocks.end(), 0);
  arrange(blocks);
  gridDim.x = grid, blockDim.x = block;
  if ((int)fibers.size() < block) fibers.resize(block);
  for (int b : blocks) {
    blockIdx.x = b;
    threads.resize(block);
    std::iota(threads.begin(), threads.end(), 0);
    arrange(threads);
    started = 0;
    waiting.clear();
    for (int fiber = 0; started < block; ++fiber) {
      Fiber& f = fibers[fiber];
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = f.stack.data();
      f.context.uc_stack.ss_size = f.stack.size();
      f.context.uc_link = &scheduler;
      makecontext(&f.context, work, 0);
      resume(fiber);
    }
    while (!waiting.empty()) {
      if ((int)waiting.size() != block) std::abort();  // a barrier that some threads never reach
      auto ready = std::exchange(waiting, {});
      if (order > 1) arrange(ready);
      for (int fiber : ready) resume(fiber);
    }
  }
}

inline void barrier() {
  const unsigned thread = threadIdx.x;
  const int fiber = running;
  waiting.push_back(fiber);
  swapcontext(&fibers[fiber].context, &scheduler);
  threadIdx.x = thread;
}

template <typename... A, std::size_t... I>
void call(void (*kernel)(A...), const long long* args, std::index_sequence<I...>) {
  kernel((A)args[I]...);
}

template <typename... A>
void run(void (*kernel)(A...), int count, int grid, int block, const long long* args, int order) {
  if (count != (int)sizeof...(A)) std::abort();
  body = [=] { call(kernel, args, std::make_index_sequence<sizeof...(A)>{}); };
  launch(grid, block, order);
}

}  // namespace emulator

inline void __syncthreads() { emulator::barrier(); }

// The two warp instructions of sparse_mlp.cu. Every warp of a block executes them equally often, so that a barrier of
// the block can stand in for the exchange within the warp.

template <typename T>
T half_of(unsigned both, int which) {
  T halves[2];
  std::memcpy(halves, &both, 4);
  return halves[which];
}
inline float as_float(__half a) { return __half2float(a); }
inline float as_float(__nv_bfloat16 a) { return __bfloat162float(a); }

// mma.sync.aligned.m16n8k16.row.col, as the PTX manual lays out its fragments.
template <typename T>
void multiply(float (&acc)[4], const unsigned (&a)[4], const unsigned (&b)[2], T) {
  static unsigned all_a[1024][4], all_b[1024][2];
  const int lane = threadIdx.x % 32, base = threadIdx.x - lane;
  std::memcpy(all_a[threadIdx.x], a, sizeof a);
  std::memcpy(all_b[threadIdx.x], b, sizeof b);
  emulator::barrier();
  for (int part = 0; part < 4; ++part) {
    const int row = lane / 4 + part / 2 * 8, column = lane % 4 * 2 + part % 2;
    for (int k = 0; k < 16; ++k) {
      const unsigned x = all_a[base + row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
      const unsigned y = all_b[base + column * 4 + k % 8 / 2][k / 8];
      acc[part] += as_float(half_of<T>(x, k % 2)) * as_float(half_of<T>(y, k % 2));
    }
  }
  emulator::barrier();
}

// ldmatrix.sync.aligned.m8n8.x2.trans
template <typename T>
void load_b(unsigned (&b)[2], const T* row) {
  static const void* rows[1024];
  const int lane = threadIdx.x % 32, base = threadIdx.x - lane;
  if ((uintptr_t)row % 16) std::abort();  // the hardware would
  rows[threadIdx.x] = row;
  emulator::barrier();
  for (int part = 0; part < 2; ++part) {
    T pair[2];
    for (int k = 0; k < 2; ++k) pair[k] = ((const T*)rows[base + part * 8 + lane % 4 * 2 + k])[lane / 4];
    std::memcpy(&b[part], pair, 4);
  }
  emulator::barrier();
}
