// Mean or sum of the token entropies of each trajectory, and its gradient. A block for each sequence.
//
// Fused: mask, sum, count and division in one launch; one read of the tokens and of the mask. A sequence whose
// boundaries lie outside the tokens gives NaN, and its tokens gradient 0.
#include "trajectory_entropy.h"

#include "device.h"

namespace mgrpo {
namespace {

constexpr int kThreads = 256;

struct Sequence {
  int64_t begin, end;
  bool valid;
};

__device__ Sequence sequence(const Trajectories& args, int64_t n) {
  if (!args.cu_seqlens) return {n * args.num_tokens, (n + 1) * args.num_tokens, true};
  const int64_t begin = args.cu_seqlens[n], end = args.cu_seqlens[n + 1];
  return {begin, end, 0 <= begin && begin <= end && end <= args.num_tokens};
}

// The divisor of the sum.
__device__ float divisor(const Trajectories& args, const Sequence& part) {
  int64_t count = part.end - part.begin;
  if (args.mask) {
    int mine = 0;
    for (int64_t t = part.begin + threadIdx.x; t < part.end; t += kThreads) mine += args.mask[t];
    count = block_sum<kThreads>(mine);
  }
  return args.mean && count > 1 ? static_cast<float>(count) : 1.0f;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    trajectory_entropy_fwd_kernel(Trajectories args, const typename T::Bits* tokens, float* entropy) {
  const int64_t n = blockIdx.x;
  const Sequence part = sequence(args, n);
  float mine = 0;
  if (part.valid)
    for (int64_t t = part.begin + threadIdx.x; t < part.end; t += kThreads)
      if (!args.mask || args.mask[t]) mine += T::from(tokens[t]);
  const float total = block_sum<kThreads>(mine), share = divisor(args, part);
  if (threadIdx.x == 0) entropy[n] = part.valid ? total / share : NAN;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    trajectory_entropy_bwd_kernel(Trajectories args, const float* dentropy, typename T::Bits* dtokens) {
  const int64_t n = blockIdx.x;
  const Sequence part = sequence(args, n);
  if (!part.valid) return;
  const float each = dentropy[n] / divisor(args, part);
  for (int64_t t = part.begin + threadIdx.x; t < part.end; t += kThreads)
    dtokens[t] = T::to(!args.mask || args.mask[t] ? each : 0.0f);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) clear_kernel(typename T::Bits* out, int64_t size) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < size) out[i] = T::to(0.0f);
}

template <typename T>
void forward(const Trajectories& args, const void* tokens, float* entropy) {
  launch(trajectory_entropy_fwd_kernel<T>, args.num_sequences, kThreads, args.executor, args,
         static_cast<const typename T::Bits*>(tokens), entropy);
}

template <typename T>
void backward(const Trajectories& args, const float* dentropy, void* dtokens) {
  auto* out = static_cast<typename T::Bits*>(dtokens);
  // Invalid boundaries, which only the device sees, may leave tokens without a sequence.
  if (args.cu_seqlens)
    launch(clear_kernel<T>, (args.num_tokens + kThreads - 1) / kThreads, kThreads, args.executor, out, args.num_tokens);
  launch(trajectory_entropy_bwd_kernel<T>, args.num_sequences, kThreads, args.executor, args, dentropy, out);
}

}  // namespace

void launch_trajectory_entropy_fwd(const Trajectories& args, const void* tokens, Dtype dtype, float* entropy) {
  switch (dtype) {
    case Dtype::f32: return forward<F32>(args, tokens, entropy);
    case Dtype::bf16: return forward<Bf16>(args, tokens, entropy);
    case Dtype::f16: return forward<F16>(args, tokens, entropy);
  }
}

void launch_trajectory_entropy_bwd(const Trajectories& args, const float* dentropy, Dtype dtype, void* dtokens) {
  switch (dtype) {
    case Dtype::f32: return backward<F32>(args, dentropy, dtokens);
    case Dtype::bf16: return backward<Bf16>(args, dentropy, dtokens);
    case Dtype::f16: return backward<F16>(args, dentropy, dtokens);
  }
}

}  // namespace mgrpo
