// Advantage of each rollout within its group.
//
// Fused: selection, mean, deviation in a second pass, and normalisation, in one read of the rewards [B, G] and one
// write. The kept rewards of a group are packed first, so that no sum carries a mask.
#include "group_advantage.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "simd.h"
#include "threads.h"

namespace mgrpo {
namespace {

using namespace portable;

constexpr float kEps = 1e-6f;

// Sum of f over the values, in one fixed order.
template <typename F>
float sum(const float* values, int64_t size, F f) {
  f32v lanes = splat(0.0f);
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) lanes += f(load(values + i));
  float total = reduce_add(lanes);
  for (; i < size; ++i) total += f(values[i]);
  return total;
}

// Packs the kept rewards; returns their number.
int64_t pack(const float* rewards, const bool* keep, int64_t size, float* packed) {
  int64_t num_kept = 0;
  for (int64_t g = 0; g < size; ++g) {
    packed[num_kept] = rewards[g];
    num_kept += keep[g];
  }
  return num_kept;
}

// A NaN differs from everything.
bool all_equal(const float* values, int64_t size) {
  int differs = 0;
  for (int64_t i = 0; i < size; ++i) differs |= values[i] != values[0];
  return !differs;
}

// advantage = (reward - centre) * factor / divisor.
struct Rule {
  float centre, factor, divisor;
};

Rule rule(AdvantageMode mode, const float* values, int64_t size) {
  // 2 r - 1, to the bit.
  if (mode == AdvantageMode::sign) return {0.5f, 2.0f, 1.0f};
  const float others = static_cast<float>(size - 1);
  const float mean = sum(values, size, [](auto value) { return value; }) / static_cast<float>(size);
  if (mode == AdvantageMode::mean) return {mean, 1.0f, 1.0f};
  if (mode == AdvantageMode::leave_one_out) return {mean, static_cast<float>(size), others};
  const float squares = sum(values, size, [mean](auto value) { return (value - mean) * (value - mean); });
  return {mean, 1.0f, std::sqrt(squares / others) + kEps};
}

void one_group(const GroupAdvantage& args, int64_t prompt, float* scratch) {
  const int64_t start = prompt * args.group;
  const float* rewards = args.rewards + start;
  const bool* keep = args.keep ? args.keep + start : nullptr;
  float* out = args.advantage + start;
  const int64_t size = keep ? pack(rewards, keep, args.group, scratch) : args.group;
  const float* values = keep ? scratch : rewards;
  if (size < 2 || all_equal(values, size)) {
    std::fill(out, out + args.group, 0.0f);
    return;
  }
  const Rule r = rule(args.mode, values, size);
  for (int64_t g = 0; g < args.group; ++g) {
    const float advantage = (rewards[g] - r.centre) * r.factor / r.divisor;
    out[g] = !keep || keep[g] ? advantage : 0.0f;
  }
}

}  // namespace

void launch_group_advantage(const GroupAdvantage& args) {
#pragma omp parallel num_threads(args.executor) if (args.num_prompts * args.group >= kLeastParallelReads)
  {
    std::vector<float> scratch(args.keep ? args.group : 0);
#pragma omp for schedule(static)
    for (int64_t prompt = 0; prompt < args.num_prompts; ++prompt) one_group(args, prompt, scratch.data());
  }
}

}  // namespace mgrpo
