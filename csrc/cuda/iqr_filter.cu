// Interquartile filter on trajectory entropy. A block for each scope: a prompt, or the whole batch.
//
// Fused: selection, both quartiles and the fence in one launch. The quartiles equal torch.quantile's to the bit: the
// same fp32 rank, and torch.lerp's one rounding. A small scope ranks every value against all others; a large one finds
// the values of all four ranks by their digits, eight bits at a time from the highest, in four passes over registers.
#include "iqr_filter.h"

#include "device.h"

namespace mgrpo {
namespace {

constexpr int kThreads = 512;
// n^2 comparisons against four passes: equal near here by the count of instructions. Emulated, tests reach both.
#if defined(MGRPO_EMULATE)
constexpr int64_t kMostCompared = 24;
#else
constexpr int64_t kMostCompared = 1024;
#endif
constexpr int kDigits = 256;
constexpr int kRanks = 4;
constexpr int kHeld = 32;  // keys that a thread keeps, 16 Ki of a block; the rest are read in every pass
constexpr int64_t kFewest = 4;
constexpr float kLeastIqr = 1e-6f;

// An order of the floats that is that of unsigned integers.
__device__ uint32_t key_of(float value) {
  const uint32_t bits = bits_of(value + 0.0f);  // -0 and 0 are equal
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ float value_of(uint32_t key) { return float_of(key >> 31 ? key & 0x7fffffffu : ~key); }

// The entries of one scope.
struct Scope {
  const float* entropy;
  const bool* keep;
  int64_t size;
  __device__ bool used(int64_t i) const { return !keep || keep[i]; }
};

// Values of the ranks below and above both quartiles, in shared memory.
__device__ void find_by_comparison(const Scope& scope, const int64_t* ranks, float* found) {
  for (int64_t i = threadIdx.x; i < scope.size; i += kThreads) {
    if (!scope.used(i)) continue;
    const float value = scope.entropy[i];
    int64_t rank = 0;
    for (int64_t j = 0; j < scope.size; ++j) {
      const float other = scope.entropy[j];
      rank += scope.used(j) && (other < value || (other == value && j < i));
    }
    for (int k = 0; k < kRanks; ++k)
      if (rank == ranks[k]) found[k] = value + 0.0f;
  }
  __syncthreads();
}

// State of the search for a rank's value: its highest digits, and its rank among the values that share them.
struct Search {
  uint32_t prefix;
  int64_t left;
};

struct Digits {
  int counts[kRanks][kDigits];
  Search searches[kRanks];
};

// The first search with the same digits so far, whose counts serve this one too.
__device__ int counted_as(const Search* searches, int rank) {
  int first = 0;
  while (searches[first].prefix != searches[rank].prefix) ++first;
  return first;
}

// The next digit of a search, by a warp: a lane sums eight digits' counts.
__device__ void advance(Search& search, const int* counts, int shift) {
  constexpr int kShare = kDigits / kWarp;
  const int lane = threadIdx.x % kWarp;
  const Search now = search;
  int mine = 0;
  for (int k = 0; k < kShare; ++k) mine += counts[lane * kShare + k];
  int before = 0, total = mine;
  for (int mask = 1; mask < kWarp; mask *= 2) {
    const int other = shuffle_xor(total, mask);
    if (lane & mask) before += other;
    total += other;
  }
  if (now.left < before || now.left >= before + mine) return;
  int64_t left = now.left - before;
  uint32_t digit = lane * kShare;
  while (left >= counts[digit]) left -= counts[digit++];
  search = {now.prefix | digit << shift, left};
}

__device__ void find_by_digits(const Scope& scope, const int64_t* ranks, float* found, Digits& digits) {
  uint32_t keys[kHeld], held = 0;
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const int64_t i = threadIdx.x + k * kThreads;
    const bool used = i < scope.size && scope.used(i);
    keys[k] = used ? key_of(scope.entropy[i]) : 0;
    held |= static_cast<uint32_t>(used) << k;
  }
  if (threadIdx.x < kRanks) digits.searches[threadIdx.x] = {0, ranks[threadIdx.x]};
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < kRanks * kDigits; i += kThreads) digits.counts[i / kDigits][i % kDigits] = 0;
    __syncthreads();
    uint32_t prefixes[kRanks];
    bool counts[kRanks];
#pragma unroll
    for (int r = 0; r < kRanks; ++r) {
      prefixes[r] = digits.searches[r].prefix;
      counts[r] = counted_as(digits.searches, r) == r;
    }
    const uint32_t known = shift == 24 ? 0 : ~0u << (shift + 8);
    const auto count = [&](uint32_t key) {
#pragma unroll
      for (int r = 0; r < kRanks; ++r)
        if (counts[r] && (key & known) == prefixes[r]) atomicAdd(&digits.counts[r][key >> shift & 255u], 1);
    };
#pragma unroll
    for (int k = 0; k < kHeld; ++k)
      if (held >> k & 1u) count(keys[k]);
    for (int64_t i = threadIdx.x + int64_t{kHeld} * kThreads; i < scope.size; i += kThreads)
      if (scope.used(i)) count(key_of(scope.entropy[i]));
    const int rank = threadIdx.x / kWarp;
    const int source = rank < kRanks ? counted_as(digits.searches, rank) : 0;
    __syncthreads();
    if (rank < kRanks) advance(digits.searches[rank], digits.counts[source], shift);
    __syncthreads();
  }
  if (threadIdx.x < kRanks) found[threadIdx.x] = value_of(digits.searches[threadIdx.x].prefix);
  __syncthreads();
}

__device__ float quartile(float low, float high, float weight) {
  return weight < 0.5f ? fmaf(weight, high - low, low) : fmaf(weight - 1.0f, high - low, high);
}

__global__ void __launch_bounds__(kThreads) iqr_filter_kernel(IqrFilter args) {
  __shared__ int64_t ranks[kRanks];  // below and above the first quartile, then the third
  __shared__ float found[kRanks];
  __shared__ Digits digits;
  const int64_t start = blockIdx.x * args.scope_size;
  const Scope scope = {args.entropy + start, args.keep ? args.keep + start : nullptr, args.scope_size};
  int mine = 0, wrong = 0;
  for (int64_t i = threadIdx.x; i < scope.size; i += kThreads) {
    if (!scope.used(i)) continue;
    ++mine;
    wrong += !(fabsf(scope.entropy[i]) <= FLT_MAX);
  }
  const int64_t count = block_sum<kThreads>(mine);
  const bool defined = count > 0 && block_sum<kThreads>(wrong) == 0;

  float q1 = NAN, q3 = NAN;
  if (defined) {
    const float last = static_cast<float>(count - 1), rank1 = multiply(last, 0.25f), rank3 = multiply(last, 0.75f);
    const float weight1 = rank1 - floorf(rank1), weight3 = rank3 - floorf(rank3);
    const int64_t below1 = static_cast<int64_t>(floorf(rank1)), below3 = static_cast<int64_t>(floorf(rank3));
    if (threadIdx.x == 0) {
      ranks[0] = below1;
      ranks[1] = below1 + (weight1 > 0);
      ranks[2] = below3;
      ranks[3] = below3 + (weight3 > 0);
    }
    __syncthreads();
    if (scope.size <= kMostCompared) {
      find_by_comparison(scope, ranks, found);
    } else {
      find_by_digits(scope, ranks, found, digits);
    }
    q1 = quartile(found[0], found[1], weight1);
    q3 = quartile(found[2], found[3], weight3);
  }
  if (threadIdx.x == 0) {
    args.q1[blockIdx.x] = q1;
    args.q3[blockIdx.x] = q3;
  }
  const float iqr = q3 - q1, reach = multiply(args.k, iqr);
  const bool drops = defined && count >= kFewest && iqr >= kLeastIqr;
  const float low = drops ? q1 - reach : -INFINITY, high = drops && args.two_sided ? q3 + reach : INFINITY;
  for (int64_t i = threadIdx.x; i < scope.size; i += kThreads) {
    const bool outside = scope.entropy[i] < low || scope.entropy[i] > high;
    args.kept[start + i] = scope.used(i) && !outside;
  }
}

}  // namespace

void launch_iqr_filter(const IqrFilter& args) {
  launch(iqr_filter_kernel, args.num_scopes, kThreads, args.executor, args);
}

}  // namespace mgrpo
