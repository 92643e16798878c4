// Mean or sum of the token entropies of each trajectory, and its gradient.
//
// Fused: mask, sum, count and division, in one read of the tokens; masked runs are not read. Sixteen fp32 sums a
// block, added up in one order that the threads do not change; blocks add up in fp64. A sequence whose boundaries lie
// outside the tokens gives NaN, and gradient 0.
#include "trajectory_entropy.h"

#include <algorithm>
#include <cmath>

#include "simd.h"
#include "threads.h"

namespace mgrpo {
namespace {

using namespace portable;

typedef uint8_t u8v __attribute__((vector_size(kLanes)));

constexpr int64_t kBlock = 512;
constexpr int kChunk = 4 * kLanes;
constexpr uint64_t kEightTrue = 0x0101010101010101u;
static_assert(kChunk == 16, "a chunk's mask is two words");

struct Sequence {
  int64_t begin, end;
  bool valid;
};

Sequence sequence(const Trajectories& args, int64_t n) {
  if (!args.cu_seqlens) return {n * args.num_tokens, (n + 1) * args.num_tokens, true};
  const int64_t begin = args.cu_seqlens[n], end = args.cu_seqlens[n + 1];
  return {begin, end, 0 <= begin && begin <= end && end <= args.num_tokens};
}

int64_t total_tokens(const Trajectories& args) {
  return args.cu_seqlens ? args.num_tokens : args.num_sequences * args.num_tokens;
}

// The mask of a chunk, a byte a token.
struct Bits {
  uint64_t words[2];
  bool none() const { return (words[0] | words[1]) == 0; }
  bool all() const { return words[0] == kEightTrue && words[1] == kEightTrue; }
};

Bits bits_of(const bool* mask) {
  Bits bits;
  std::memcpy(&bits, mask, sizeof bits);
  return bits;
}

// Adds a chunk of tokens to four sums.
template <typename T>
void add(f32v* sums, const T* tokens) {
  for (int i = 0; i < 4; ++i) sums[i] += load(tokens + i * kLanes);
}

// The same for those that the mask keeps: the others are cut to zero bits, whatever they hold.
template <typename T>
void add_kept(f32v* sums, const T* tokens, const bool* mask) {
  for (int i = 0; i < 4; ++i) {
    u8v kept;
    std::memcpy(&kept, mask + i * kLanes, sizeof kept);
    sums[i] += (f32v)((u32v)load(tokens + i * kLanes) & (0u - __builtin_convertvector(kept, u32v)));
  }
}

template <typename T>
void add_tail(f32v* sums, const T* tokens, const bool* mask, int64_t count) {
  float lanes[kChunk] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = !mask || mask[i] ? to_float(tokens[i]) : 0.0f;
  add(sums, lanes);
}

template <typename T>
double sum(const T* tokens, const bool* mask, int64_t size) {
  double total = 0;
  for (int64_t start = 0; start < size; start += kBlock) {
    const int64_t end = std::min(start + kBlock, size);
    f32v sums[4] = {};
    int64_t t = start;
    for (; t + kChunk <= end; t += kChunk) {
      if (!mask || bits_of(mask + t).all()) {
        add(sums, tokens + t);
      } else if (!bits_of(mask + t).none()) {
        add_kept(sums, tokens + t, mask + t);
      }
    }
    if (t < end) add_tail(sums, tokens + t, mask ? mask + t : nullptr, end - t);
    total += reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
  return total;
}

int64_t count(const bool* mask, int64_t size) {
  int64_t total = 0, t = 0;
  for (; t + kChunk <= size; t += kChunk) {
    const Bits bits = bits_of(mask + t);
    // The top byte of the product is the sum of all eight.
    total += static_cast<int64_t>((bits.words[0] + bits.words[1]) * kEightTrue >> 56);
  }
  for (; t < size; ++t) total += mask[t];
  return total;
}

// The divisor of the sum.
int64_t divisor(const Trajectories& args, const Sequence& part) {
  if (!args.mean) return 1;
  const int64_t size = part.end - part.begin;
  return std::max<int64_t>(args.mask ? count(args.mask + part.begin, size) : size, 1);
}

template <typename T>
void forward(const Trajectories& args, const T* tokens, float* entropy) {
#pragma omp parallel for schedule(static) num_threads(args.executor) \
    if (total_tokens(args) >= kLeastParallelReads)
  for (int64_t n = 0; n < args.num_sequences; ++n) {
    const Sequence part = sequence(args, n);
    if (!part.valid) {
      entropy[n] = NAN;
      continue;
    }
    const bool* mask = args.mask ? args.mask + part.begin : nullptr;
    const float total = static_cast<float>(sum(tokens + part.begin, mask, part.end - part.begin));
    entropy[n] = total / static_cast<float>(divisor(args, part));
  }
}

// Whether the sequences cover every token, each of them once.
bool covers(const Trajectories& args) {
  const int64_t* ends = args.cu_seqlens;
  return !ends || (ends[0] == 0 && ends[args.num_sequences] == args.num_tokens &&
                   std::is_sorted(ends, ends + args.num_sequences + 1));
}

// `each` where the mask keeps, 0 elsewhere.
template <typename T>
void fill_kept(T* out, const bool* mask, int64_t size, T each) {
  int64_t t = 0;
  for (; t + kChunk <= size; t += kChunk) {
    const Bits bits = bits_of(mask + t);
    if (bits.all() || bits.none()) {
      std::fill(out + t, out + t + kChunk, bits.all() ? each : T{});
    } else {
      const T choice[2] = {T{}, each};
      for (int64_t i = t; i < t + kChunk; ++i) out[i] = choice[mask[i]];
    }
  }
  for (; t < size; ++t) out[t] = mask[t] ? each : T{};
}

template <typename T>
void backward(const Trajectories& args, const float* dentropy, T* dtokens) {
  if (!covers(args)) std::memset(dtokens, 0, sizeof(T) * args.num_tokens);
#pragma omp parallel for schedule(static) num_threads(args.executor) \
    if (total_tokens(args) >= kLeastParallelReads)
  for (int64_t n = 0; n < args.num_sequences; ++n) {
    const Sequence part = sequence(args, n);
    if (!part.valid) continue;
    const T each = from_float<T>(dentropy[n] / static_cast<float>(divisor(args, part)));
    if (!args.mask) {
      std::fill(dtokens + part.begin, dtokens + part.end, each);
      continue;
    }
    fill_kept(dtokens + part.begin, args.mask + part.begin, part.end - part.begin, each);
  }
}

}  // namespace

void launch_trajectory_entropy_fwd(const Trajectories& args, const void* tokens, Dtype dtype, float* entropy) {
  switch (dtype) {
    case Dtype::f32: return forward(args, static_cast<const float*>(tokens), entropy);
    case Dtype::bf16: return forward(args, static_cast<const bf16*>(tokens), entropy);
    case Dtype::f16: return forward(args, static_cast<const f16*>(tokens), entropy);
  }
}

void launch_trajectory_entropy_bwd(const Trajectories& args, const float* dentropy, Dtype dtype, void* dtokens) {
  switch (dtype) {
    case Dtype::f32: return backward(args, dentropy, static_cast<float*>(dtokens));
    case Dtype::bf16: return backward(args, dentropy, static_cast<bf16*>(dtokens));
    case Dtype::f16: return backward(args, dentropy, static_cast<f16*>(dtokens));
  }
}

}  // namespace mgrpo
