// Rows of logits to loss and gradient with the row in shared memory from its one read to its one write; from sm_90 on.
//
// Fused: statistics of a row, its token's loss and the row's gradient: 2 e bytes a logit, where forward and backward of
// token_logprob take 3 e. A row of 151,936 bf16 logits is 304 KB: the blocks of a cluster hold a part each, write their
// sums into each other's memory and meet at one barrier a row.
//
// A thread copies, reads and replaces its own vectors only. So no barrier guards the row, and a vector of the next row
// is asked for as soon as this row's has been written: reads and writes overlap within a block, and where a block waits
// for its last copies or for its cluster, the others of the multiprocessor continue. There are as many clusters as run
// concurrently, and each takes every n-th row. The division of a row depends on V and its type alone, so a row's bits
// depend on nothing but the row. Issue slots: 9 instructions a logit for the sums and 9 for the gradient, two thirds of
// what an H200 can issue in the time of the memory accesses.
#pragma once

#include "device.h"
#include "loss_terms.h"
#include "token_row.h"

namespace mgrpo {
namespace {

constexpr int kRowThreads = 128;  // 20 warps of five blocks; what waits for memory are copies, not threads
constexpr int kRowWarps = kRowThreads / kWarp;
constexpr int kMostBlocks = 8;  // of a cluster, on every device that has them
static_assert(kMostBlocks * kRowWarps <= kWarp, "a lane for the sums of every warp of the cluster");
constexpr int kStages = 4;  // commits a row: sums start when the first has arrived
constexpr int kBatch = 4;   // vectors of a thread between moves of its sums

// Of a row as they were read, so that nothing waits for them before it must.
struct RowState {
  int64_t target = kIgnoredTarget;
  float temperature = 1;
  bool mask = false;

  __device__ __forceinline__ bool is_active() const { return mask && target != kIgnoredTarget; }
  __device__ __forceinline__ bool is_read(int64_t vocabulary) const {
    return is_active() && target >= 0 && target < vocabulary && temperature > 0 && temperature < INFINITY;
  }
};

__device__ __forceinline__ RowState row_state(const LogitsGrpoLossForward& args, int64_t t) {
  RowState out;
  if (t >= args.rows.num_rows) return out;
  out.target = args.rows.targets[t];
  out.temperature = temperature_of(args.rows, t);
  out.mask = args.tokens.mask[t];
  return out;
}

// Sums of a warp about its largest logit.
struct alignas(16) WarpSums {
  float top, exp, exp_x;
};

enum class Fill { zero, undefined, gradient };

// Coefficients of a row's gradient: 2^x (constant + slope x), x = (z - top) log2(e) / temperature, but for the target.
struct RowOutput {
  Fill fill = Fill::zero;
  float top = 0, constant = 0, slope = 0, target = 0;
};

struct RowShared {
  WarpSums sums[2][kMostBlocks * kRowWarps];  // of the whole cluster, of this row and the one before
  RowOutput output[2];
  int counts[kRowWarps];
};
constexpr size_t kHeaderBytes = (sizeof(RowShared) + 127) / 128 * 128;

__device__ __forceinline__ Sums<false> warp_merge(Sums<false> own, float scale) {
  float top = own.top;
  for (int mask = kWarp / 2; mask > 0; mask /= 2) top = max_nan(top, shuffle_xor(top, mask));
  own.move(top, scale);
  own.exp = warp_sum(own.exp);
  own.exp_x = warp_sum(own.exp_x);
  return own;
}

constexpr int kTrip = kRowThreads * kBatch;

// A block's part of a row; slot i holds vector first + i, and -inf beyond the row's end.
template <typename T>
struct RowPart {
  static constexpr int kSize = Vector<T>::kSize;
  Vector<T>* slots;  // [room]
  int64_t first;
  int size, room;   // vectors of the part, and slots: a multiple of kTrip
  int whole;        // vectors that lie within the row
  int stage_size;

  __device__ RowPart(Vector<T>* slots, int64_t vocabulary, int rank, int part)
      : slots(slots), first(int64_t{rank} * part), room((part + kTrip - 1) / kTrip * kTrip),
        stage_size((room / kTrip + kStages - 1) / kStages * kTrip) {
    const auto share = [&](int64_t num_vectors) {
      const int64_t left = num_vectors - first;
      return left < 0 ? 0 : left < part ? static_cast<int>(left) : part;
    };
    size = share((vocabulary + kSize - 1) / kSize);
    whole = share(vocabulary / kSize);
    for (int i = size + threadIdx.x; i < room; i += kRowThreads) clear(i);
  }

  __device__ __forceinline__ void clear(int i) const {
#pragma unroll
    for (int k = 0; k < kSize; ++k) slots[i].bits[k] = T::to(-INFINITY);
  }

  // Begins to fill a slot that its thread has read for the last time, from where the part begins; `left` logits follow.
  __device__ __forceinline__ void load(int i, const typename T::Bits* from, int64_t left, bool aligned) const {
    if (aligned && i < whole)
      copy_async(slots + i, from + i * kSize);
    else
      slots[i] = load_at<T>(from, i, left, false);
  }

  __device__ __forceinline__ int stage_end(int stage, int limit) const {
    const int end = (stage + 1) * stage_size;
    return end < limit ? end : limit;
  }

  __device__ Sums<false> sums(float scale) const {
    Sums<false> out;
#pragma unroll 1
    for (int stage = 0; stage < kStages; ++stage) {
      wait_copies(kStages - 1 - stage);
      const int end = stage_end(stage, room);
#pragma unroll 1
      for (int i = stage * stage_size + threadIdx.x; i < end; i += kTrip) {
        float z[kBatch][kSize], highest = -INFINITY;
#pragma unroll
        for (int u = 0; u < kBatch; ++u) {
          widen<T>(slots[i + u * kRowThreads], z[u]);
#pragma unroll
          for (int k = 0; k < kSize; ++k) highest = max_nan(highest, z[u][k]);
        }
        out.move(max_nan(out.top, highest), scale);
#pragma unroll
        for (int k = 0; k < kBatch * kSize; ++k) out.add(z[k / kSize][k % kSize], scale);
      }
    }
    return out;
  }
};

// A token's statistics and loss, by all lanes of a warp alike; `all` are the sums of its row.
__device__ __forceinline__ RowOutput row_output(const LogitsGrpoLossForward& args, int64_t t, const RowState& state,
                                                const TokenInputs& token, float z_target, Sums<false> all,
                                                float inverse_denominator, bool writes) {
  const float inverse = 1.0f / state.temperature, scale = kLog2e / state.temperature;
  float logprob = NAN, entropy = NAN, lse = NAN, log_exp = NAN;
  if (state.is_read(args.rows.vocabulary)) {
    // The largest element adds 1: less means that every logit is -inf.
    if (all.exp < 0.5f) all.exp = all.exp_x = 0;
    log_exp = log2f(all.exp);
    logprob = kLn2 * ((z_target - all.top) * scale - log_exp);
    entropy = kLn2 * (log_exp - all.exp_x / all.exp);
    lse = all.top / state.temperature + kLn2 * log_exp;
  }
  const TokenTerms terms = token_terms(token, args.tokens, args.options, logprob, entropy, inverse_denominator);
  if (writes) {
    args.logprob[t] = logprob;
    args.entropy[t] = entropy;
    args.lse[t] = lse;
    if (args.outputs.dlogprob) args.outputs.dlogprob[t] = terms.dlogprob;
    if (args.outputs.dentropy) args.outputs.dentropy[t] = terms.dentropy;
  }
  // dz = onehot (1(j = y) - p) + p (constant + slope a), a = z - lse.
  const float onehot = logprob != -INFINITY ? terms.dlogprob : 0.0f;
  const float constant = -terms.dentropy * entropy, slope = -terms.dentropy;
  RowOutput out;
  if (onehot == 0 && constant == 0 && slope == 0) return out;
  out.fill = lse != lse ? Fill::undefined : Fill::gradient;
  const float share = inverse / all.exp, slope_x = slope * kLn2;
  out.top = all.top;
  out.constant = (constant - onehot - slope_x * log_exp) * share;
  out.slope = slope_x * share;
  // With 1 - p free of the rounding of p.
  const float x = max_nan((z_target - all.top) * scale, kNothing);
  const float complement = logprob > -INFINITY ? -expm1f(logprob) : 1.0f;
  const float others = exp2_approx(x) * fmaf(x, out.slope, (constant - slope_x * log_exp) * share);
  out.target = others + onehot * complement * inverse;
  return out;
}

// Cluster c of n takes rows c, c + n and so on; `part` vectors of a row to a block.
template <typename T>
__global__ void __launch_bounds__(kRowThreads, 5)
    logits_grpo_loss_fwd_kernel(const __grid_constant__ LogitsGrpoLossForward args, int part) {
#if defined(MGRPO_EMULATE) || __CUDA_ARCH__ >= 900
  using Bits = typename T::Bits;
  constexpr int kSize = Vector<T>::kSize;
  RowShared& shared = *reinterpret_cast<RowShared*>(dynamic_shared());
  const LogitRows& rows = args.rows;
  const int64_t num_rows = rows.num_rows, vocabulary = rows.vocabulary;
  const int size = static_cast<int>(cluster_size()), rank = static_cast<int>(cluster_rank());
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;

  const RowPart<T> mine(reinterpret_cast<Vector<T>*>(dynamic_shared() + kHeaderBytes), vocabulary, rank, part);
  const int64_t num_clusters = gridDim.x / size;
  int64_t t = blockIdx.x / size;
  // Where this block's part of a row begins, and how much of the row is there.
  const int64_t before = mine.first * kSize, left = vocabulary - before;
  const auto part_at = [&](int64_t row) { return static_cast<const Bits*>(rows.logits) + row * rows.stride + before; };
  RowState now = row_state(args, t);
  if (now.is_read(vocabulary)) {
    const Bits* row = part_at(t);
    const bool aligned = is_aligned(row);
    for (int stage = 0; stage < kStages; ++stage) {
      for (int i = stage * mine.stage_size + threadIdx.x; i < mine.stage_end(stage, mine.size); i += kRowThreads)
        mine.load(i, row, left, aligned);
      commit_copies();
    }
  }
  const LossOptions& options = args.options;
  const int64_t num_active =
      needs_count(options) ? count_active<kRowThreads>(args.tokens, 0, args.tokens.num_tokens, shared.counts) : 0;
  const float inverse_denominator = static_cast<float>(1.0 / denominator_of(options, num_active));
  cluster_barrier();  // no block writes into another before that runs

  int parity = 0, exchange = 0;
  for (; t < num_rows; parity ^= 1) {
    const RowState next = row_state(args, t + num_clusters);
    const bool is_read = now.is_read(vocabulary), is_active = now.is_active();
    TokenInputs token = {};
    float z_target = 0;
    if (warp == 0 && is_active) {
      const int64_t n = needs_sequence(args.tokens, options) ? warp_sequence_of(args.tokens, t) : 0;
      token = load_token(args.tokens, options, args.scratch, t, n);
      if (is_read) z_target = T::from(part_at(t)[now.target - before]);
    }
    const float scale = kLog2e / now.temperature;
    Sums<false> sums;
    if (is_read) {
      sums = warp_merge(mine.sums(scale), scale);
      WarpSums& own = shared.sums[exchange][rank * kRowWarps + warp];
      if (lane < size) *in_block(&own, lane) = {sums.top, sums.exp, sums.exp_x};
      cluster_barrier();
    }
    if (warp == 0) {
      RowOutput output;
      if (is_active) {
        sums = {};
        if (is_read && lane < size * kRowWarps) {
          const WarpSums other = shared.sums[exchange][lane];
          sums.top = other.top;
          sums.exp = other.exp;
          sums.exp_x = other.exp_x;
        }
        sums = warp_merge(sums, scale);
        output = row_output(args, t, now, token, z_target, sums, inverse_denominator, rank == 0 && lane == 0);
      } else if (rank == 0 && lane == 0) {
        args.logprob[t] = args.entropy[t] = args.lse[t] = 0;
        if (args.outputs.dlogprob) args.outputs.dlogprob[t] = 0;
        if (args.outputs.dentropy) args.outputs.dentropy[t] = 0;
      }
      if (lane == 0) shared.output[parity] = output;
    }
    // Whoever writes either half again has met, by then, all that read it: here, or at the barrier of the cluster.
    __syncthreads();
    exchange ^= is_read;

    const RowOutput output = shared.output[parity];
    Vector<T> flat;
#pragma unroll
    for (int k = 0; k < kSize; ++k) flat.bits[k] = T::to(output.fill == Fill::zero ? 0.0f : NAN);
    Bits* out = static_cast<Bits*>(args.dlogits) + t * vocabulary + before;
    const int64_t target_vector = now.target / kSize - mine.first;
    const int target_slot = target_vector >= 0 && target_vector < mine.size ? static_cast<int>(target_vector) : -1;
    const int target_place = static_cast<int>(now.target % kSize);
    const bool out_aligned = is_aligned(out), is_next_read = next.is_read(vocabulary);
    const Bits* next_row = part_at(is_next_read ? t + num_clusters : t);
    const bool next_aligned = is_aligned(next_row);
    const auto gradient = [&](int slot) {
      float z[kSize];
      widen<T>(mine.slots[slot], z);
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        const float x = max_nan((z[k] - output.top) * scale, kNothing);
        z[k] = exp2_approx(x) * fmaf(x, output.slope, output.constant);
      }
      if (slot == target_slot) {
#pragma unroll
        for (int k = 0; k < kSize; ++k) z[k] = k == target_place ? output.target : z[k];
      }
      return to_vector<T>(z);
    };
    // All but the last vectors of a row, and of rows that are not aligned: 16 bytes at a time, two together.
    const bool is_plain = output.fill == Fill::gradient && out_aligned && (next_aligned || !is_next_read);
    const int plain = is_plain ? mine.whole : 0;
#pragma unroll 1
    for (int stage = 0; stage < kStages; ++stage) {
      const int end = mine.stage_end(stage, mine.size), plain_end = end < plain ? end : plain;
      int i = stage * mine.stage_size + threadIdx.x;
#pragma unroll 1
      for (; i + kRowThreads < plain_end; i += 2 * kRowThreads) {
        const Vector<T> one = gradient(i), other = gradient(i + kRowThreads);
        store_vector<T>(out + i * kSize, one);
        store_vector<T>(out + (i + kRowThreads) * kSize, other);
        if (!is_next_read) continue;
        copy_async(mine.slots + i, next_row + i * kSize);
        copy_async(mine.slots + i + kRowThreads, next_row + (i + kRowThreads) * kSize);
      }
#pragma unroll 1
      for (; i < end; i += kRowThreads) {
        const Vector<T> vector = output.fill == Fill::gradient ? gradient(i) : flat;
        if (out_aligned && i < mine.whole)
          store_vector<T>(out + i * kSize, vector);
        else
          store_at<T>(out, i, left, false, vector);
        if (is_next_read) mine.load(i, next_row, left, next_aligned);
      }
      if (is_next_read) commit_copies();
    }
    t += num_clusters;
    now = next;
  }
#endif
}

// How rows are cut: blocks of a cluster, vectors and shared memory of a block, clusters at a time; no cluster where the
// kernel does not run.
struct RowPlan {
  int cluster = 0, part = 0, num_clusters = 0;
  size_t bytes = 0;
};

// With 40 KB of a row, five blocks and what they keep besides fill the 228 KB of a multiprocessor: 8 blocks for 152 K
// bf16 logits, 2 for 32 K. A longer part leaves room for fewer: 152 K fp32 logits for two, from 900 KB on one.
// Emulated, short rows are cut as well.
#if defined(MGRPO_EMULATE)
constexpr int64_t kPartBytes = 48;
#else
constexpr int64_t kPartBytes = 40 * 1024;
#endif
constexpr int64_t kMostPartBytes = 256 * 1024;  // more than any device has

template <typename T>
RowPlan plan_rows_of(const LogitRows& rows) {
  constexpr int64_t kSize = Vector<T>::kSize, kBytes = sizeof(Vector<T>);
  const int64_t num_vectors = (rows.vocabulary + kSize - 1) / kSize;
  int cluster = 1;
  while (cluster < kMostBlocks && num_vectors * kBytes > kPartBytes * cluster) cluster *= 2;
  const int64_t part = (num_vectors + cluster - 1) / cluster;
  RowPlan plan;
  if (part * kBytes > kMostPartBytes) return plan;
  plan.cluster = cluster;
  plan.part = static_cast<int>(part);
  plan.bytes = kHeaderBytes + (part + kTrip - 1) / kTrip * kTrip * kBytes;
  plan.num_clusters = resident_clusters(logits_grpo_loss_fwd_kernel<T>, cluster, kRowThreads, plan.bytes);
  if (rows.num_rows < plan.num_clusters) plan.num_clusters = static_cast<int>(rows.num_rows);
  return plan;
}

RowPlan plan_rows(const LogitRows& rows) {
  switch (rows.dtype) {
    case Dtype::f32: return plan_rows_of<F32>(rows);
    case Dtype::bf16: return plan_rows_of<Bf16>(rows);
    case Dtype::f16: break;
  }
  return plan_rows_of<F16>(rows);
}

template <typename T>
void launch_resident_rows_of(const LogitsGrpoLossForward& args, const RowPlan& plan) {
  launch_clusters(logits_grpo_loss_fwd_kernel<T>, plan.num_clusters, plan.cluster, kRowThreads, plan.bytes,
                  args.executor, args, plan.part);
}

void launch_resident_rows(const LogitsGrpoLossForward& args, const RowPlan& plan) {
  switch (args.rows.dtype) {
    case Dtype::f32: return launch_resident_rows_of<F32>(args, plan);
    case Dtype::bf16: return launch_resident_rows_of<Bf16>(args, plan);
    case Dtype::f16: return launch_resident_rows_of<F16>(args, plan);
  }
}

}  // namespace
}  // namespace mgrpo
