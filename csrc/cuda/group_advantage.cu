// Advantage of each rollout within its group. A warp for each group.
//
// Fused: selection, mean, deviation in a second pass, and normalisation, in one launch without a synchronisation;
// 4 B + 1 B read and 4 B written a rollout, all of it from the first-level cache after the first pass.
#include "group_advantage.h"

#include "device.h"

namespace mgrpo {
namespace {

constexpr int kThreads = 128;
constexpr float kEps = 1e-6f;

// Sum of f(reward) over the kept rollouts of a group, the same in every lane.
template <typename F>
__device__ float sum_kept(const float* rewards, const bool* keep, int64_t group, int lane, F f) {
  float total = 0;
  for (int64_t g = lane; g < group; g += kWarp)
    if (!keep || keep[g]) total += f(rewards[g]);
  return warp_sum(total);
}

__global__ void __launch_bounds__(kThreads) group_advantage_kernel(GroupAdvantage args) {
  const int64_t prompt = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (prompt >= args.num_prompts) return;  // a whole warp
  const int lane = threadIdx.x % kWarp;
  const float* rewards = args.rewards + prompt * args.group;                 // [G]
  const bool* keep = args.keep ? args.keep + prompt * args.group : nullptr;  // [G]
  float* out = args.advantage + prompt * args.group;                         // [G]

  const float size = sum_kept(rewards, keep, args.group, lane, [](float) { return 1.0f; });
  const float mean = sum_kept(rewards, keep, args.group, lane, [](float r) { return r; }) / size;
  // Equal to one of them, NaN apart, means equal to all.
  float first = -INFINITY;
  for (int64_t g = lane; g < args.group; g += kWarp)
    if (!keep || keep[g]) first = max_nan(first, rewards[g]);
  for (int mask = kWarp / 2; mask > 0; mask /= 2) first = max_nan(first, shuffle_xor(first, mask));
  const float num_others = sum_kept(rewards, keep, args.group, lane, [&](float r) { return r == first ? 0.0f : 1.0f; });

  float centre = mean, factor = 1, divisor = 1;
  if (args.mode == AdvantageMode::std) {
    const float squares =
        sum_kept(rewards, keep, args.group, lane, [&](float r) { return (r - mean) * (r - mean); });
    divisor = sqrtf(squares / (size - 1)) + kEps;
  } else if (args.mode == AdvantageMode::leave_one_out) {
    factor = size;
    divisor = size - 1;
  } else if (args.mode == AdvantageMode::sign) {
    centre = 0.5f;  // 2 r - 1, to the bit
    factor = 2;
  }
  const bool learns = size >= 2 && num_others > 0;
  for (int64_t g = lane; g < args.group; g += kWarp)
    out[g] = learns && (!keep || keep[g]) ? (rewards[g] - centre) * factor / divisor : 0.0f;
}

}  // namespace

void launch_group_advantage(const GroupAdvantage& args) {
  constexpr int kGroups = kThreads / kWarp;
  launch(group_advantage_kernel, (args.num_prompts + kGroups - 1) / kGroups, kThreads, args.executor, args);
}

}  // namespace mgrpo
