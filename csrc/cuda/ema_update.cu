// Moving average of a list of weights, in place. A block for each run of elements of one tensor.
//
// Fused: widening, mix, rounding to nearest, stochastic or compensated, and the copy for the rollout engine: each list
// is read once and each written once, from 6 bytes a parameter (bf16, stochastic) to 14 (fp32 with a bf16 copy).
//
// One launch, with the descriptors of hundreds of tensors as the kernel's argument. A table on the device would need
// memory that outlives the launch (every replay of a captured graph), filled by an asynchronous copy. The argument is
// copied at the launch, and a graph holds its own copy.
#include "ema_update.h"

#include <algorithm>

#include "device.h"

namespace mgrpo {
namespace {

constexpr int kThreads = 256;
constexpr int kWidth = 8;  // elements of a thread at a time: 16 bytes of bf16
constexpr int kTrips = 4;
constexpr int64_t kRun = int64_t{kThreads} * kWidth * kTrips;

struct Entry {
  void* momentum;
  const void* policy;
  void* compensation;
  void* publish;
  uint32_t first_block;  // of this launch; the next entry's ends the tensor's blocks
  uint16_t last_run;     // elements of its last block, less 1
  uint8_t momentum_dtype : 2, policy_dtype : 2, publish_dtype : 2, vectors : 1;  // all addresses multiples of 16
};
static_assert(sizeof(Entry) == 40 && kRun <= 65536, "as many entries as fit");

// An argument of 32,764 bytes needs CUDA 12.1 and driver 530. Short lists take 4 KiB, whose copy is faster. Emulated
// launches are short, so that tests run several.
#if defined(MGRPO_EMULATE)
constexpr int kFewEntries = 3, kMostEntries = 5;
#elif CUDART_VERSION >= 12010
constexpr int kFewEntries = 100, kMostEntries = 816;
#else
constexpr int kFewEntries = 100, kMostEntries = 100;
#endif

struct Common {
  double weight;
  const double* decay;
  uint64_t seed;
  const int64_t* step_at;
  uint32_t step;
  uint32_t first_index;  // of entries[0] in the whole list: random bits belong to a tensor's place there
  uint32_t num_blocks;
  int32_t num_entries;
  bool stochastic;
};

template <int kEntries, bool kHasOffsets>
struct Launch {
  Common common;
  Entry entries[kEntries];
};
template <int kEntries>
struct Launch<kEntries, true> : Launch<kEntries, false> {
  uint64_t offsets[kEntries];
};

// With offsets 48 bytes an entry in place of 40.
constexpr int kFewShards = kFewEntries * 5 / 6, kMostShards = kMostEntries * 5 / 6;
static_assert(sizeof(Launch<kFewEntries, false>) <= 4096 && sizeof(Launch<kMostEntries, false>) <= 32764 &&
                  sizeof(Launch<kFewShards, true>) <= 4096 && sizeof(Launch<kMostShards, true>) <= 32764,
              "the kernel's argument");

struct Blend {
  bool keeps, copies, from_old;
  float coefficient;
};

__device__ Blend blend_of(const Common& args) {
  double weight = args.weight;
  if (args.decay) weight = *args.decay >= 0 && *args.decay <= 1 ? 1 - *args.decay : static_cast<double>(NAN);
  const float share = static_cast<float>(weight);
  const bool from_old = share < 0.5f;
  return {weight == 0, weight == 1, from_old, from_old ? share : share - 1.0f};
}

// Eight elements as they lie in memory: half of it for 16-bit types.
struct Raw {
  Vector<F32> words[2];
};

__device__ __forceinline__ Raw load_raw(const void* from, Dtype dtype, int64_t i, bool vectors, int count) {
  Raw raw = {};
  if (vectors && count == kWidth) {
    if (dtype == Dtype::f32) {
      raw.words[0] = load_vector<F32>(static_cast<const uint32_t*>(from) + i);
      raw.words[1] = load_vector<F32>(static_cast<const uint32_t*>(from) + i + 4);
    } else {
      raw.words[0] = load_vector<F32>(reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(from) + i));
    }
    return raw;
  }
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    if (k >= count) break;
    if (dtype == Dtype::f32)
      raw.words[k / 4].bits[k % 4] = static_cast<const uint32_t*>(from)[i + k];
    else
      raw.words[0].bits[k / 2] |= uint32_t{static_cast<const uint16_t*>(from)[i + k]} << (k % 2 * 16);
  }
  return raw;
}

__device__ __forceinline__ void widen(const Raw& raw, Dtype dtype, float (&out)[kWidth]) {
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    const uint32_t pair = raw.words[0].bits[k / 2];
    const uint16_t half = static_cast<uint16_t>(k % 2 ? pair >> 16 : pair);
    if (dtype == Dtype::f32)
      out[k] = float_of(raw.words[k / 4].bits[k % 4]);
    else
      out[k] = dtype == Dtype::bf16 ? from_bf16(half) : from_f16(half);
  }
}

// Stores the values; `halves` are theirs in a 16-bit type.
__device__ __forceinline__ void store(void* to, bool wide, const float (&values)[kWidth],
                                      const uint16_t (&halves)[kWidth], int64_t i, bool vectors, int count) {
  if (vectors && count == kWidth) {
    Raw raw;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) raw.words[k / 4].bits[k % 4] = bits_of(values[k]);
    if (wide) {
      store_vector(static_cast<uint32_t*>(to) + i, raw.words[0]);
      store_vector(static_cast<uint32_t*>(to) + i + 4, raw.words[1]);
      return;
    }
#pragma unroll
    for (int k = 0; k < kWidth; k += 2) raw.words[0].bits[k / 2] = halves[k] | uint32_t{halves[k + 1]} << 16;
    store_vector(reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(to) + i), raw.words[0]);
    return;
  }
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    if (k >= count) break;
    if (wide)
      static_cast<uint32_t*>(to)[i + k] = bits_of(values[k]);
    else
      static_cast<uint16_t*>(to)[i + k] = halves[k];
  }
}

// Philox 4x32-10 (Salmon et al. 2011): four words of 32 random bits.
__device__ __forceinline__ void philox(uint64_t quad, uint32_t step, uint32_t tensor, uint64_t seed,
                                       uint32_t (&words)[4]) {
  uint32_t c0 = static_cast<uint32_t>(quad), c1 = static_cast<uint32_t>(quad >> 32), c2 = step, c3 = tensor;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t left_high = high_product(c0, 0xd2511f53u), left = c0 * 0xd2511f53u;
    const uint32_t right_high = high_product(c2, 0xcd9e8d57u), right = c2 * 0xcd9e8d57u;
    c0 = right_high ^ c1 ^ k0;
    c1 = right;
    c2 = left_high ^ c3 ^ k1;
    c3 = left;
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

// Words of the kWidth elements from `element` on, a multiple of 4 unless kShifts.
template <bool kShifts>
__device__ __forceinline__ void draw(uint64_t element, uint32_t step, uint32_t tensor, uint64_t seed,
                                     uint32_t (&words)[kWidth]) {
  constexpr int kDrawn = kWidth + (kShifts ? 4 : 0);
  uint32_t drawn[kDrawn];
#pragma unroll
  for (int first = 0; first < kDrawn; first += 4) {
    uint32_t quad[4];
    philox(element / 4 + first / 4, step, tensor, seed, quad);
#pragma unroll
    for (int k = 0; k < 4; ++k) drawn[first + k] = quad[k];
  }
  if (kShifts) {
    // By 1 and by 2, because an index that is no constant would put the array into memory.
#pragma unroll
    for (int shift = 1; shift <= 2; ++shift) {
#pragma unroll
      for (int k = 0; k + shift < kDrawn; ++k) drawn[k] = element & shift ? drawn[k + shift] : drawn[k];
    }
  }
#pragma unroll
  for (int k = 0; k < kWidth; ++k) words[k] = drawn[k];
}

// bf16, up with the probability of the dropped fraction.
__device__ __forceinline__ uint16_t round_stochastically(float value, uint32_t random) {
  const uint32_t bits = bits_of(value);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  if (value != value) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  return static_cast<uint16_t>((finite ? bits + (random & 0xffffu) : bits) >> 16);
}

__device__ __forceinline__ void narrow(const float (&values)[kWidth], Dtype dtype, uint16_t (&halves)[kWidth]) {
#pragma unroll
  for (int k = 0; k < kWidth; ++k) halves[k] = dtype == Dtype::bf16 ? to_bf16(values[k]) : to_f16(values[k]);
}

template <int kEntries, bool kHasOffsets>
__global__ void __launch_bounds__(kThreads)
    ema_update_kernel(const __grid_constant__ Launch<kEntries, kHasOffsets> list) {
  const Common& args = list.common;
  // The last entry that starts at or before this block; an empty tensor starts where the next one does.
  int low = 0, high = args.num_entries;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (list.entries[middle].first_block <= blockIdx.x)
      low = middle;
    else
      high = middle;
  }
  const Entry entry = list.entries[low];
  const uint32_t end_block = low + 1 < args.num_entries ? list.entries[low + 1].first_block : args.num_blocks;
  const Dtype momentum_dtype = static_cast<Dtype>(entry.momentum_dtype);
  const Dtype policy_dtype = static_cast<Dtype>(entry.policy_dtype);
  const Blend blend = blend_of(args);
  const bool stochastic = args.stochastic && momentum_dtype == Dtype::bf16;
  const uint32_t step = args.step_at ? static_cast<uint32_t>(*args.step_at) : args.step;
  uint64_t offset = 0;
  if constexpr (kHasOffsets) offset = list.offsets[low];
  const int64_t start = static_cast<int64_t>(blockIdx.x - entry.first_block) * kRun;
  const int64_t end = start + (blockIdx.x + 1 == end_block ? entry.last_run + 1 : kRun);
  for (int trip = 0; trip < kTrips; ++trip) {
    const int64_t i = start + (static_cast<int64_t>(trip) * kThreads + threadIdx.x) * kWidth;
    if (i >= end) return;
    const int count = end - i < kWidth ? static_cast<int>(end - i) : kWidth;
    const Raw raw_old = load_raw(entry.momentum, momentum_dtype, i, entry.vectors, count);
    float old[kWidth], latest[kWidth], mixed[kWidth];
    uint16_t halves[kWidth];
    widen(raw_old, momentum_dtype, old);
    if (!blend.keeps) {
      const Raw raw_latest = load_raw(entry.policy, policy_dtype, i, entry.vectors, count);
      if (entry.compensation) {
        float term[kWidth];
        widen(load_raw(entry.compensation, Dtype::bf16, i, entry.vectors, count), Dtype::bf16, term);
#pragma unroll
        for (int k = 0; k < kWidth; ++k) old[k] += term[k];
      }
      widen(raw_latest, policy_dtype, latest);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        mixed[k] = fmaf(blend.coefficient, latest[k] - old[k], blend.from_old ? old[k] : latest[k]);
        if (blend.copies) mixed[k] = latest[k];
      }
      if (stochastic) {
        uint32_t words[kWidth];
        if (offset % 4 == 0)
          draw<false>(offset + i, step, args.first_index + low, args.seed, words);
        else
          draw<kHasOffsets>(offset + i, step, args.first_index + low, args.seed, words);
#pragma unroll
        for (int k = 0; k < kWidth; ++k) halves[k] = round_stochastically(mixed[k], words[k]);
      } else if (momentum_dtype != Dtype::f32) {
        narrow(mixed, momentum_dtype, halves);
      }
      store(entry.momentum, momentum_dtype == Dtype::f32, mixed, halves, i, entry.vectors, count);
#pragma unroll
      for (int k = 0; k < kWidth; ++k)
        old[k] = momentum_dtype == Dtype::f32    ? mixed[k]
                 : momentum_dtype == Dtype::bf16 ? from_bf16(halves[k])
                                                 : from_f16(halves[k]);
      if (entry.compensation) {
#pragma unroll
        for (int k = 0; k < kWidth; ++k) halves[k] = to_bf16(mixed[k] - old[k]);
        store(entry.compensation, false, mixed, halves, i, entry.vectors, count);
      }
    }
    if (entry.publish) {
      const Dtype dtype = static_cast<Dtype>(entry.publish_dtype);
      if (dtype != Dtype::f32) narrow(old, dtype, halves);
      store(entry.publish, dtype == Dtype::f32, old, halves, i, entry.vectors, count);
    }
  }
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Launches for as many tensors from `first` on as fit; returns the first remaining one.
template <int kEntries, bool kHasOffsets>
int64_t launch_some(const EmaUpdate& args, int64_t first) {
  Launch<kEntries, kHasOffsets> here = {};
  here.common = {args.weight, args.decay, args.seed, args.step_at, args.step, static_cast<uint32_t>(first), 0, 0,
                 args.stochastic};
  int64_t num_blocks = 0, i = first;
  for (; i < args.num_tensors && i - first < kEntries; ++i) {
    const EmaTensor& tensor = args.tensors[i];
    const int64_t blocks = (tensor.count + kRun - 1) / kRun;
    if (num_blocks + blocks > INT32_MAX) {
      if (i == first) throw std::runtime_error("mgrpo_kernels: a tensor of more than 2^44 elements");
      break;
    }
    Entry& entry = here.entries[i - first];
    entry.momentum = tensor.momentum;
    entry.policy = tensor.policy;
    entry.compensation = tensor.compensation;
    entry.publish = tensor.publish;
    entry.first_block = static_cast<uint32_t>(num_blocks);
    entry.last_run = static_cast<uint16_t>((tensor.count + kRun - 1) % kRun);
    entry.momentum_dtype = static_cast<uint8_t>(tensor.momentum_dtype) & 3;
    entry.policy_dtype = static_cast<uint8_t>(tensor.policy_dtype) & 3;
    entry.publish_dtype = static_cast<uint8_t>(tensor.publish_dtype) & 3;
    entry.vectors = aligned(tensor.momentum) && aligned(tensor.policy) && aligned(tensor.compensation) &&
                    aligned(tensor.publish);
    if constexpr (kHasOffsets) here.offsets[i - first] = tensor.offset;
    num_blocks += blocks;
  }
  here.common.num_blocks = static_cast<uint32_t>(num_blocks);
  here.common.num_entries = static_cast<int32_t>(i - first);
  launch(ema_update_kernel<kEntries, kHasOffsets>, num_blocks, kThreads, args.executor, here);
  return i;
}

template <int kFew, int kMost, bool kHasOffsets>
void launch_all(const EmaUpdate& args) {
  for (int64_t next = 0; next < args.num_tensors;)
    next = args.num_tensors - next <= kFew ? launch_some<kFew, kHasOffsets>(args, next)
                                           : launch_some<kMost, kHasOffsets>(args, next);
}

}  // namespace

void launch_ema_update(const EmaUpdate& args) {
  if (args.has_offsets)
    launch_all<kFewShards, kMostShards, true>(args);
  else
    launch_all<kFewEntries, kMostEntries, false>(args);
}

}  // namespace mgrpo
