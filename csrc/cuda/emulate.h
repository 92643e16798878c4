// A GPU's threads on a CPU, for tests where there is no GPU: every thread of a block is a coroutine that runs until it
// waits for its warp or its block. A barrier that only some threads reach ends the process with a message.
//
// Threads run one at a time, in another order at every barrier, so that a missing barrier gives a wrong result rather
// than a lucky one. Memory is the host's: the address sanitizer checks what the kernels touch. The blocks of a cluster
// run together, each with dynamic shared memory of its own; their kernels declare no __shared__ variable, which would
// be one for all. An asynchronous copy lands as early as it may in even threads and as late as it may in odd ones.
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
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

namespace emulated {

struct Index {
  unsigned x;
};
enum class Wait { none, warp, block, cluster, done };
constexpr int kWarp = 32;

struct Copy {
  void* to;
  const void* from;
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Wait wait;
  std::vector<std::vector<Copy>> copies;  // by commit; the last is open
};

constexpr size_t kCopyBytes = 16;

// The cluster that runs, most often of one block.
struct Cluster {
  std::vector<Thread> threads;                        // of all blocks, one after another
  std::vector<std::array<uint64_t, kWarp>> exchange;  // a word of every lane, of every warp
  std::vector<std::vector<uint64_t>> shared;          // dynamic memory of every block
  std::function<void()> body;
  ucontext_t scheduler;
  unsigned current, num_blocks;
};

constexpr size_t kStackBytes = 128 * 1024;
inline Cluster cluster;
inline Index thread_index, block_index, block_dim, grid_dim;

inline void wait_for(Wait what) {
  const unsigned self = cluster.current;
  cluster.threads[self].wait = what;
  swapcontext(&cluster.threads[self].context, &cluster.scheduler);
}

inline void enter() {
  cluster.body();
  wait_for(Wait::done);
}

// Lets every thread of [first, last) that waits for `what` go on; false unless all that are left do.
inline bool release(unsigned first, unsigned last, Wait what) {
  bool any = false;
  for (unsigned i = first; i < last; ++i) {
    const Wait wait = cluster.threads[i].wait;
    if (wait != what && wait != Wait::done) return false;
    any |= wait == what;
  }
  for (unsigned i = first; any && i < last; ++i)
    if (cluster.threads[i].wait == what) cluster.threads[i].wait = Wait::none;
  return any;
}

// Runs the cluster whose first block is `first_block`; blocks of `size` threads, whole warps where there are several.
inline void run_cluster(unsigned first_block, unsigned size, size_t shared_bytes) {
  const unsigned total = size * cluster.num_blocks;
  if (cluster.threads.size() < total) cluster.threads.resize(total);
  cluster.exchange.resize((total + kWarp - 1) / kWarp);
  cluster.shared.assign(cluster.num_blocks, std::vector<uint64_t>((shared_bytes + 7) / 8, ~uint64_t{0}));  // NaNs
  for (unsigned i = 0; i < total; ++i) {
    Thread& thread = cluster.threads[i];
    if (!thread.stack) thread.stack.reset(new char[kStackBytes]);
    getcontext(&thread.context);
    thread.context.uc_stack = {thread.stack.get(), 0, kStackBytes};
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, enter, 0);
    thread.wait = Wait::none;
    thread.copies.assign(1, {});
  }
  for (unsigned round = 0;; ++round) {
    bool ran = false, left = false;
    for (unsigned k = 0; k < total; ++k) {
      const unsigned i = round % 2 ? total - 1 - k : k;
      if (cluster.threads[i].wait != Wait::none) continue;
      ran = true;
      cluster.current = i;
      thread_index.x = i % size;
      block_index.x = first_block + i / size;
      swapcontext(&cluster.scheduler, &cluster.threads[i].context);
    }
    for (unsigned first = 0; first < total; first += kWarp)
      ran |= release(first, first + kWarp < total ? first + kWarp : total, Wait::warp);
    for (unsigned first = 0; first < total; first += size) ran |= release(first, first + size, Wait::block);
    ran |= release(0, total, Wait::cluster);
    for (unsigned i = 0; i < total; ++i) left |= cluster.threads[i].wait != Wait::done;
    if (!left) return;
    if (!ran) {
      std::fputs("emulated kernel: some threads wait at a barrier that others never reach\n", stderr);
      std::abort();
    }
  }
}

inline void launch(int64_t grid, int size, std::function<void()> body, unsigned num_blocks = 1, size_t shared = 0) {
  cluster.body = std::move(body);
  cluster.num_blocks = num_blocks;
  block_dim.x = static_cast<unsigned>(size);
  grid_dim.x = static_cast<unsigned>(grid);
  for (int64_t i = 0; i < grid; i += num_blocks) run_cluster(static_cast<unsigned>(i), block_dim.x, shared);
}

template <typename T>
T shuffle_xor(T value, int mask) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a lane's word is 8 bytes");
  auto& words = cluster.exchange[cluster.current / kWarp];
  const unsigned lane = cluster.current % kWarp;
  std::memcpy(&words[lane], &value, sizeof value);
  wait_for(Wait::warp);
  std::memcpy(&value, &words[lane ^ mask], sizeof value);
  wait_for(Wait::warp);
  return value;
}

inline unsigned rank() { return cluster.current / block_dim.x; }

inline char* shared_of(unsigned rank) { return reinterpret_cast<char*>(cluster.shared[rank].data()); }

inline void land(std::vector<Copy>& copies) {
  for (const Copy& copy : copies) std::memcpy(copy.to, copy.from, kCopyBytes);
  copies.clear();
}

inline void copy(void* to, const void* from) {
  auto& open = cluster.threads[cluster.current].copies.back();
  open.push_back({to, from});
  if (cluster.current % 2 == 0) land(open);
}

inline void commit() { cluster.threads[cluster.current].copies.emplace_back(); }

// Until at most `newer` of the latest commits are under way.
inline void wait_copies(size_t newer) {
  auto& copies = cluster.threads[cluster.current].copies;
  for (size_t i = 0; i + 1 + newer < copies.size(); ++i) land(copies[i]);
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
