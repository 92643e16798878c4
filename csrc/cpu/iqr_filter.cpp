// Interquartile filter on trajectory entropy.
//
// Fused: selection, both quartiles and the fence, in one read of the entropies. The quartiles are selected, not sorted
// for, and equal torch.quantile's to the bit: the same fp32 rank, and torch.lerp's one rounding (it fuses product and
// sum). Hence this file is compiled without other contractions.
#include "iqr_filter.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "threads.h"

namespace mgrpo {
namespace {

constexpr int64_t kFewest = 4;
constexpr float kLeastIqr = 1e-6f;

// Linear quantile of `size` values, of which those before `begin` are in place: the least of all.
float quantile(float* values, int64_t begin, int64_t size, float fraction) {
  const float rank = static_cast<float>(size - 1) * fraction;
  const int64_t below = static_cast<int64_t>(std::floor(rank));
  std::nth_element(values + begin, values + below, values + size);
  const float weight = rank - std::floor(rank);
  const float low = values[below];
  const float high = weight > 0 ? *std::min_element(values + below + 1, values + size) : low;
  return weight < 0.5f ? std::fma(weight, high - low, low) : std::fma(weight - 1.0f, high - low, high);
}

// Packs the values that take part; returns their number, or 0 if one is non-finite.
int64_t pack(const float* entropy, const bool* keep, int64_t size, float* packed) {
  int64_t num_used = 0;
  bool finite = true;
  for (int64_t i = 0; i < size; ++i) {
    const bool used = !keep || keep[i];
    packed[num_used] = entropy[i];
    num_used += used;
    finite &= !used || std::isfinite(entropy[i]);
  }
  return finite ? num_used : 0;
}

void one_scope(const IqrFilter& args, int64_t scope, float* scratch) {
  const int64_t start = scope * args.scope_size;
  const float* entropy = args.entropy + start;
  const bool* keep = args.keep ? args.keep + start : nullptr;
  const int64_t size = pack(entropy, keep, args.scope_size, scratch);
  float q1 = NAN, q3 = NAN;
  if (size > 0) {
    q1 = quantile(scratch, 0, size, 0.25f);
    q3 = quantile(scratch, static_cast<int64_t>(static_cast<float>(size - 1) * 0.25f), size, 0.75f);
  }
  args.q1[scope] = q1;
  args.q3[scope] = q3;
  const float iqr = q3 - q1;
  const bool drops = size >= kFewest && iqr >= kLeastIqr;
  const float low = drops ? q1 - args.k * iqr : -INFINITY;
  const float high = drops && args.two_sided ? q3 + args.k * iqr : INFINITY;
  for (int64_t i = 0; i < args.scope_size; ++i) {
    const bool outside = (entropy[i] < low) | (entropy[i] > high);
    args.kept[start + i] = (!keep || keep[i]) & !outside;
  }
}

}  // namespace

void launch_iqr_filter(const IqrFilter& args) {
#pragma omp parallel num_threads(args.executor) \
    if (args.num_scopes > 1 && args.num_scopes * args.scope_size >= kLeastParallelWork)
  {
    std::vector<float> scratch(args.scope_size);
#pragma omp for schedule(static)
    for (int64_t scope = 0; scope < args.num_scopes; ++scope) one_scope(args, scope, scratch.data());
  }
}

}  // namespace mgrpo
