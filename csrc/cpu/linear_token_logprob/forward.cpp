// Sums over the vocabulary, and the gradients of hidden states and weight, without the logits [T, V] in memory.
//
// Tokens are vector lanes: a tile of transposed logits [rows of the weight, tokens] is a product of the weight as it
// lies and of the hidden states packed once, so that maximum, sums and gradient are vertical operations on a tile that
// still sits in the second-level cache. Fused: bias, softcap, temperature, sums of e^x and e^x x, the target's logit.
// Forward reads the weight once, 2 V D bytes in bf16. Backward walks tiles of the vocabulary: it computes the logits
// again, reads the tile of the weight a second time, out of the last-level cache, for dhidden, and writes dweight once,
// past the caches: 4 V D bytes of memory traffic. Materialised logits would add some 20 T V, and take 12 T V of memory.
//
// A result never depends on the number of threads: slices of the vocabulary are merged in their order, and each
// element of a product adds up along K in order, in groups that begin at multiples of 64.
#include <cfloat>

#include "problem.h"

namespace mgrpo {
namespace MGRPO_ISA {
namespace {

// Sums of kLanes tokens, as in LinearTokenLogprobForward.
struct Sums {
  f32v top, exp, exp_x, finite_x, num_finite;
};
constexpr int64_t kNumSums = 5;

MGRPO_INLINE Sums no_sums() { return {splat(-FLT_MAX), f32v{}, f32v{}, f32v{}, f32v{}}; }

MGRPO_INLINE Sums load_sums(const float* p, int64_t stride) {
  return {load(p), load(p + stride), load(p + 2 * stride), load(p + 3 * stride), load(p + 4 * stride)};
}

MGRPO_INLINE void store_sums(float* p, int64_t stride, const Sums& sums) {
  store(p, sums.top);
  store(p + stride, sums.exp);
  store(p + 2 * stride, sums.exp_x);
  store(p + 3 * stride, sums.finite_x);
  store(p + 4 * stride, sums.num_finite);
}

MGRPO_INLINE Sums shift(const Sums& sums, f32v top) {
  const f32v gap = max(splat(kFloor), sums.top - top), weight = exp_or_zero(gap);
  return {top, weight * sums.exp, weight * (sums.exp_x + sums.exp * gap),
          sums.finite_x + sums.num_finite * (sums.top - top), sums.num_finite};
}

MGRPO_INLINE Sums merge(const Sums& a, const Sums& b) {
  const f32v top = max(a.top, b.top);
  const Sums left = shift(a, top), right = shift(b, top);
  return {top, left.exp + right.exp, left.exp_x + right.exp_x, left.finite_x + right.finite_x,
          left.num_finite + right.num_finite};
}

// Sums over `rows` logits of kLanes tokens, 16 floats apart; bias and softcap are written back.
template <bool kChanged, bool kCertainty>
MGRPO_INLINE Sums tile_sums(float* c, int64_t rows, const float* bias, float softcap, f32v temperature) {
  constexpr int kChains = 4;
  f32v chain[kChains];
  for (f32v& top : chain) top = splat(-FLT_MAX);
  for (int64_t j = 0; j < rows; j += kChains)
#pragma GCC unroll 4
    for (int k = 0; k < kChains; ++k) {
      if (j + k >= rows) break;
      float* at = c + (j + k) * kTile;
      f32v v = load(at);
      if (kChanged) {
        if (bias) v += bias[j + k];
        if (softcap > 0) v = softcapped(v, softcap);
        store(at, v);
      }
      chain[k] = max(chain[k], v);
    }
  // Finite for -inf alone, and for a NaN, whose sum of e^x x turns NaN in any case.
  const f32v top = max(max(max(chain[0], chain[1]), max(chain[2], chain[3])), splat(-FLT_MAX));
  const f32v inverse = 1.0f / temperature;
  f32v exp[kChains] = {}, exp_x[kChains] = {}, finite_x[kChains] = {}, num_finite[kChains] = {};
  for (int64_t j = 0; j < rows; j += kChains)
#pragma GCC unroll 4
    for (int k = 0; k < kChains; ++k) {
      if (j + k >= rows) break;
      const f32v all = (load(c + (j + k) * kTile) - top) * inverse, x = max(splat(kFloor), all);
      const f32v e = exp_or_zero(x);
      exp[k] += e;
      exp_x[k] += e * x;
      if (kCertainty) {
        const i32v finite = all != splat(-INFINITY);
        finite_x[k] += select(finite, all, f32v{});
        num_finite[k] += select(finite, splat(1.0f), f32v{});
      }
    }
  const auto total = [](const f32v(&part)[kChains]) { return (part[0] + part[1]) + (part[2] + part[3]); };
  return {max(top / temperature, splat(-FLT_MAX)), total(exp), total(exp_x), total(finite_x), total(num_finite)};
}

template <bool kChanged, bool kCertainty>
void add_tile(const LinearHead& head, float* c, int64_t rows, const float* bias, const float* temperature, float* sums,
              int64_t stride) {
  for (int64_t i = 0; i < kTile; i += kLanes) {
    const Sums tile = tile_sums<kChanged, kCertainty>(c + i, rows, bias, head.softcap, load(temperature + i));
    store_sums(sums + i, stride, merge(load_sums(sums + i, stride), tile));
  }
}

template <typename S, typename E>
bool forward(const LinearTokenLogprobForward& args, Core<E> core) {
  constexpr int64_t kMostSlices = 1024;
  const LinearHead& head = args.head;
  const Problem<S, E> problem(head, core);
  const Sizes<E>& sizes = problem.sizes;
  const int64_t padded = sizes.panels * kTile, block = sizes.block_panels;
  Layout layout;
  const int64_t at_packed = layout.add(sizes.packed_bytes()), at_temperatures = layout.add(padded * kFloat);
  // Slices of the vocabulary depend on the problem and the budget alone; the rest of the budget bounds the threads.
  const int64_t slice_bytes = kNumSums * padded * kFloat, allowed = bytes_allowed(head, layout.bytes);
  const int64_t most_slices = most(1, least(kMostSlices, (allowed - layout.bytes) / 4 / most(1, slice_bytes)));
  const int64_t slice_rows = blocks_of(blocks_of(head.vocabulary, sizes.rows), most_slices) * sizes.rows;
  const int64_t num_slices = blocks_of(head.vocabulary, most(1, slice_rows));
  const int64_t at_partial = layout.add(num_slices * slice_bytes);
  const int64_t logits_bytes = sizes.logits_bytes(sizes.rows), scratch_bytes = sizes.rows_bytes() + logits_bytes;
  const int num_threads = threads_within(head, allowed - layout.bytes, scratch_bytes);
  const int64_t at_scratch = layout.add(num_threads * scratch_bytes);

  const Arena arena(layout.bytes);
  if (!arena) return false;
  float* temperatures = arena.at<float>(at_temperatures);
  for (int64_t t = 0; t < padded; ++t) temperatures[t] = temperature_of(head, t);
  for (int64_t t = 0; t < head.num_tokens; ++t) args.z_target[t] = 0.0f;
  const bool changed = head.bias || head.softcap > 0, certainty = args.finite_x;
  const auto add = changed ? (certainty ? add_tile<true, true> : add_tile<true, false>)
                           : (certainty ? add_tile<false, true> : add_tile<false, false>);

#pragma omp parallel num_threads(num_threads)
  {
    core.begin();
    E* a = arena.at<E>(at_scratch + omp_get_thread_num() * scratch_bytes + logits_bytes);
    float* c = arena.at<float>(at_scratch + omp_get_thread_num() * scratch_bytes);
    E* packed = arena.at<E>(at_packed);
    problem.pack_hidden(packed);
#pragma omp for schedule(dynamic, 1)
    for (int64_t slice = 0; slice < num_slices; ++slice) {
      float* sums = arena.at<float>(at_partial + slice * slice_bytes);
      for (int64_t t = 0; t < padded; t += kLanes) store_sums(sums + t, padded, no_sums());
      const int64_t end = least(head.vocabulary, (slice + 1) * slice_rows);
      for (int64_t row = slice * slice_rows; row < end; row += sizes.rows) {
        const int64_t rows = least(sizes.rows, end - row);
        for (int64_t first = 0; first < sizes.panels; first += block) {
          const int64_t last = least(sizes.panels, first + block);
          problem.logits(row, rows, first, last, packed, a, c, sizes.rows);
          for (int64_t p = first; p < last; ++p)
            add(head, c + (p - first) * sizes.rows * kTile, rows, head.bias ? head.bias + row : nullptr,
                temperatures + p * kTile, sums + p * kTile, padded);
          for (int64_t t = first * kTile; t < least(head.num_tokens, last * kTile); ++t) {
            const int64_t j = head.targets[t] - row;
            if (j < 0 || j >= rows) continue;
            args.z_target[t] = c[((t / kTile - first) * sizes.rows + j) * kTile + t % kTile] / temperatures[t];
          }
        }
      }
    }
    core.end();
#pragma omp for schedule(static)
    for (int64_t p = 0; p < sizes.panels; ++p) {
      float merged[kNumSums * kTile];
      for (int64_t i = 0; i < kTile; i += kLanes) {
        Sums sums = no_sums();
        for (int64_t slice = 0; slice < num_slices; ++slice)
          sums = merge(sums, load_sums(arena.at<float>(at_partial + slice * slice_bytes) + p * kTile + i, padded));
        sums.exp = select(sums.exp_x == sums.exp_x, sums.exp, sums.exp_x);
        store_sums(merged + i, kTile, sums);
      }
      float* const outputs[kNumSums] = {args.top, args.exp, args.exp_x, args.finite_x, args.num_finite};
      const int64_t count = least(kTile, head.num_tokens - p * kTile);
      for (int64_t i = 0; i < (certainty ? kNumSums : 3); ++i)
        std::memcpy(outputs[i] + p * kTile, merged + i * kTile, size_t(count) * kFloat);
    }
  }
  return true;
}

}  // namespace

bool linear_token_logprob_fwd(const LinearTokenLogprobForward& args) {
  return dispatch(args.head, [&](auto element, auto core) { return forward<decltype(element)>(args, core); });
}

}  // namespace MGRPO_ISA
}  // namespace mgrpo
