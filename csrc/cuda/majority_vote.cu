// Majority vote over the answers of each prompt. A block for each prompt.
//
// Fused: grouping, counting, tie rule, shares and margin in one launch. Every rollout compares its answer with the G of
// its prompt, which lie in the first-level cache; G^2 comparisons are 1 us for G = 256.
#include "majority_vote.h"

#include "device.h"

namespace mgrpo {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;

// Votes for one answer of a prompt.
struct Tally {
  int64_t votes;
  int64_t preferred;  // votes that decide a tie
  int64_t earliest;   // index of the first voter

  __device__ bool beats(const Tally& other) const {
    if (votes != other.votes) return votes > other.votes;
    if (preferred != other.preferred) return preferred > other.preferred;
    return earliest < other.earliest;
  }
};

__device__ __forceinline__ int64_t votes_of(const MajorityVote& args, int64_t i) {
  if (args.keep && !args.keep[i]) return 0;
  if (!args.weights) return 1;
  const int64_t weight = args.wide_weights ? static_cast<const int64_t*>(args.weights)[i]
                                           : static_cast<const int32_t*>(args.weights)[i];
  return weight > 0 ? weight : 0;
}

__device__ __forceinline__ Tally tally(const MajorityVote& args, int64_t start, int64_t id) {
  Tally own = {0, 0, INT64_MAX};
  for (int64_t g = 0; g < args.group; ++g) {
    if (args.answer_ids[start + g] != id) continue;
    const int64_t votes = votes_of(args, start + g);
    if (votes > 0 && own.votes == 0) own.earliest = g;
    own.votes += votes;
    if (args.tie_break && args.tie_break[start + g]) own.preferred += votes;
  }
  return own;
}

__device__ __forceinline__ Tally best_of(Tally own, Tally* shared) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const Tally other = {shuffle_xor(own.votes, mask), shuffle_xor(own.preferred, mask),
                         shuffle_xor(own.earliest, mask)};
    if (other.beats(own)) own = other;
  }
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = own;
  __syncthreads();
  own = shared[0];
  for (int i = 1; i < kWarps; ++i)
    if (shared[i].beats(own)) own = shared[i];
  __syncthreads();
  return own;
}

__global__ void __launch_bounds__(kThreads, 4) majority_vote_kernel(MajorityVote args) {
  __shared__ Tally shared[kWarps];
  const int64_t prompt = blockIdx.x, start = prompt * args.group;
  int64_t mine = 0;
  for (int64_t g = threadIdx.x; g < args.group; g += kThreads) mine += votes_of(args, start + g);
  const int64_t total = block_sum<kThreads>(mine);
  const float kept = static_cast<float>(total > 1 ? total : 1);

  const Tally nobody = {0, 0, INT64_MAX};
  Tally best = nobody;
  for (int64_t g = threadIdx.x; g < args.group; g += kThreads) {
    const int64_t id = args.answer_ids[start + g];
    const Tally own = id < 0 ? nobody : tally(args, start, id);
    if (own.beats(best)) best = own;
    args.class_share[start + g] = static_cast<float>(own.votes) / kept;
  }
  best = best_of(best, shared);
  const int64_t label = best.votes > 0 ? args.answer_ids[start + best.earliest] : -1;

  Tally second = nobody;
  for (int64_t g = threadIdx.x; g < args.group; g += kThreads) {
    const int64_t id = args.answer_ids[start + g];
    if (id < 0 || id == label) continue;
    const Tally own = tally(args, start, id);
    if (own.beats(second)) second = own;
  }
  second = best_of(second, shared);
  if (threadIdx.x != 0) return;
  args.label[prompt] = label;
  args.share[prompt] = static_cast<float>(best.votes) / kept;
  args.margin[prompt] = static_cast<float>(best.votes - second.votes) / kept;
  args.tie[prompt] = best.votes > 0 && best.votes == second.votes;
}

// Least id and weight, for a check of the values that is off by default: one block.
__global__ void __launch_bounds__(kThreads) lowest_kernel(MajorityVote args) {
  __shared__ int64_t shared[2][kWarps];
  int64_t least[2] = {0, 0};
  for (int64_t i = threadIdx.x; i < args.num_prompts * args.group; i += kThreads) {
    const int64_t id = args.answer_ids[i];
    const int64_t weight = !args.weights       ? 0
                           : args.wide_weights ? static_cast<const int64_t*>(args.weights)[i]
                                               : static_cast<const int32_t*>(args.weights)[i];
    if (id < least[0]) least[0] = id;
    if (weight < least[1]) least[1] = weight;
  }
  for (int k = 0; k < 2; ++k) {
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
      const int64_t other = shuffle_xor(least[k], mask);
      if (other < least[k]) least[k] = other;
    }
    if (threadIdx.x % kWarp == 0) shared[k][threadIdx.x / kWarp] = least[k];
  }
  __syncthreads();
  if (threadIdx.x >= 2) return;
  int64_t all = 0;
  for (int i = 0; i < kWarps; ++i)
    if (shared[threadIdx.x][i] < all) all = shared[threadIdx.x][i];
  args.lowest[threadIdx.x] = all;
}

}  // namespace

void launch_majority_vote(const MajorityVote& args) {
  launch(majority_vote_kernel, args.num_prompts, kThreads, args.executor, args);
  if (args.lowest) launch(lowest_kernel, 1, kThreads, args.executor, args);
}

}  // namespace mgrpo
