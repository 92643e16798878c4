// A GPU's threads on a CPU, for tests where there is no GPU: every thread of a block is a coroutine that runs until it
// waits for its warp or its block. A barrier that only some threads reach ends the process with a message.
//
// Threads run one at a time, in another order at every barrier, so that a missing barrier gives a wrong result rather
// than a lucky one. Memory is the host's: the address sanitizer checks what the kernels touch.
#pragma once

#include <ucontext.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

namespace emulated {

struct Index {
  unsigned x;
};
enum class Wait { none, warp, block, done };
constexpr int kWarp = 32;

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Wait wait;
};

// The block that runs.
struct Block {
  std::vector<Thread> threads;
  std::vector<std::array<uint64_t, kWarp>> exchange;  // a word of every lane, of every warp
  std::function<void()> body;
  ucontext_t scheduler;
  unsigned current;
};

constexpr size_t kStackBytes = 128 * 1024;
inline Block block;
inline Index thread_index, block_index, block_dim, grid_dim;

inline void wait_for(Wait what) {
  const unsigned self = block.current;
  block.threads[self].wait = what;
  swapcontext(&block.threads[self].context, &block.scheduler);
}

inline void enter() {
  block.body();
  wait_for(Wait::done);
}

// Lets every thread of [first, last) that waits for `what` go on; false unless all that are left do.
inline bool release(unsigned first, unsigned last, Wait what) {
  bool any = false;
  for (unsigned i = first; i < last; ++i) {
    const Wait wait = block.threads[i].wait;
    if (wait != what && wait != Wait::done) return false;
    any |= wait == what;
  }
  for (unsigned i = first; any && i < last; ++i)
    if (block.threads[i].wait == what) block.threads[i].wait = Wait::none;
  return any;
}

inline void run_block(unsigned size) {
  if (block.threads.size() < size) block.threads.resize(size);
  block.exchange.resize((size + kWarp - 1) / kWarp);
  for (unsigned i = 0; i < size; ++i) {
    Thread& thread = block.threads[i];
    if (!thread.stack) thread.stack.reset(new char[kStackBytes]);
    getcontext(&thread.context);
    thread.context.uc_stack = {thread.stack.get(), 0, kStackBytes};
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, enter, 0);
    thread.wait = Wait::none;
  }
  for (unsigned round = 0;; ++round) {
    bool ran = false, left = false;
    for (unsigned k = 0; k < size; ++k) {
      const unsigned i = round % 2 ? size - 1 - k : k;
      if (block.threads[i].wait != Wait::none) continue;
      ran = true;
      block.current = i;
      thread_index.x = i;
      swapcontext(&block.scheduler, &block.threads[i].context);
    }
    for (unsigned first = 0; first < size; first += kWarp)
      ran |= release(first, first + kWarp < size ? first + kWarp : size, Wait::warp);
    ran |= release(0, size, Wait::block);
    for (unsigned i = 0; i < size; ++i) left |= block.threads[i].wait != Wait::done;
    if (!left) return;
    if (!ran) {
      std::fputs("emulated kernel: some threads wait at a barrier that others never reach\n", stderr);
      std::abort();
    }
  }
}

inline void launch(int64_t grid, int size, std::function<void()> body) {
  block.body = std::move(body);
  block_dim.x = static_cast<unsigned>(size);
  grid_dim.x = static_cast<unsigned>(grid);
  for (int64_t i = 0; i < grid; ++i) {
    block_index.x = static_cast<unsigned>(i);
    run_block(block_dim.x);
  }
}

template <typename T>
T shuffle_xor(T value, int mask) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a lane's word is 8 bytes");
  auto& words = block.exchange[thread_index.x / kWarp];
  const unsigned lane = thread_index.x % kWarp;
  std::memcpy(&words[lane], &value, sizeof value);
  wait_for(Wait::warp);
  std::memcpy(&value, &words[thread_index.x % kWarp ^ mask], sizeof value);
  wait_for(Wait::warp);
  return value;
}

}  // namespace emulated

#define threadIdx emulated::thread_index
#define blockIdx emulated::block_index
#define blockDim emulated::block_dim
#define gridDim emulated::grid_dim
inline void __syncthreads() { emulated::wait_for(emulated::Wait::block); }
template <typename T>
T atomicAdd(T* at, T value) {
  const T old = *at;
  *at += value;
  return old;
}
