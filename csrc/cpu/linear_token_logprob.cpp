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
#include "linear_token_logprob.h"

#include <cfloat>
#include <cstdlib>

#include <math.h>
#include <omp.h>
#include <sys/mman.h>

#include "gemm.h"

namespace mgrpo {
namespace MGRPO_ISA {
namespace {

constexpr float kFloor = -1e4f;  // e to this is 0; products with it are finite, unlike those with -inf
constexpr int64_t kFloat = sizeof(float);

// Offsets into one allocation.
struct Layout {
  int64_t bytes = 0;

  int64_t add(int64_t size) {
    const int64_t at = bytes;
    bytes += blocks_of(size, 64) * 64;
    return at;
  }
};

// The huge pages inside a range of memory. Fresh memory costs a fault a page: in pages of 4 KiB, met at the first
// store, those of dweight took as long as two of the three products; in huge pages and ahead, a fifth of that.
class HugePages {
 public:
  static constexpr int64_t kBytes = 1 << 21;

  HugePages(const void* from, int64_t bytes)
      : first_((reinterpret_cast<uintptr_t>(from) + kBytes - 1) / kBytes),
        last_(most(first_, (reinterpret_cast<uintptr_t>(from) + uintptr_t(bytes)) / kBytes)) {}

  // Advice that the system does not know or cannot take changes nothing but speed.
  void ask() const {
#if defined(MADV_HUGEPAGE)
    const size_t bytes = size_t((last_ - first_) * kBytes);
    if (bytes) madvise(reinterpret_cast<void*>(first_ * kBytes), bytes, MADV_HUGEPAGE);
#endif
  }

  // Inside a parallel region: maps them, and keeps what they hold.
  void fault_in() const {
#if defined(__linux__)
    constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, of Linux 5.14
#pragma omp for schedule(dynamic, 4) nowait
    for (int64_t page = first_; page < last_; ++page)
      madvise(reinterpret_cast<void*>(page * kBytes), size_t(kBytes), kPopulateWrite);
#endif
  }

 private:
  int64_t first_, last_;
};

// All temporaries of a call.
class Arena {
 public:
  explicit Arena(int64_t bytes) {
    const int64_t alignment = bytes < HugePages::kBytes ? 64 : HugePages::kBytes;
    if (posix_memalign(&data_, size_t(alignment), size_t(most(bytes, 64)))) data_ = nullptr;
    HugePages(data_, data_ ? bytes : 0).ask();
  }
  ~Arena() { std::free(data_); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  explicit operator bool() const { return data_ != nullptr; }
  template <typename T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(static_cast<char*>(data_) + offset);
  }

 private:
  void* data_ = nullptr;
};

// e^x for x <= 88, exactly 0 below -87, to 7e-8: p = e^(z - lse) should lose no more than z itself does. By
// x = n ln 2 + r with ln 2 in two parts, then 1 + r + r^2 Q(r) with a minimax Q. A NaN gives any number.
MGRPO_INLINE f32v exp_or_zero(f32v x) {
  const f32v magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const f32v shifted = x * kLog2e + magic, n = shifted - magic;
  const f32v r = x - n * 0.693359375f + n * 2.12194440e-4f;
  f32v q = splat(1.38145406e-3f);
  q = q * r + 8.36874545e-3f;
  q = q * r + 4.16683890e-2f;
  q = q * r + 1.66665211e-1f;
  q = q * r + 4.99999940e-1f;
  const f32v p = q * (r * r) + r + 1.0f;
  return x < splat(-87.0f) ? splat(0.0f) : (f32v)((u32v)p + ((u32v)shifted << 23));
}

// c tanh(v / c) to 2e-7, for the error of a large logit is one of its probability: by e^-2|u|, and by a minimax
// polynomial where that cancels.
MGRPO_INLINE f32v softcapped(f32v v, float softcap) {
  const f32v u = v / softcap, a = abs(u), e = exp_or_zero(-2.0f * a), square = a * a;
  f32v q = splat(-5.70498593e-3f);
  q = q * square + 2.06390861e-2f;
  q = q * square - 5.37397154e-2f;
  q = q * square + 1.33314416e-1f;
  q = q * square - 3.33332807e-1f;
  const f32v size = a < 0.625f ? q * square * a + a : (1.0f - e) / (1.0f + e);
  const f32v capped = as_float(as_int(size) | (as_int(u) & INT32_MIN)) * softcap;
  return u == u ? capped : u;
}

// Sizes in tiles and panels of a problem whose packed elements are of type E.
template <typename E>
struct Sizes {
  int64_t panels;         // of 16 tokens
  int64_t token_tiles;    // of kDepth<E> tokens
  int64_t hidden_tiles;   // of kDepth<E> hidden elements
  int64_t hidden_panels;  // of 16 hidden elements
  // What goes through the second-level cache together:
  int64_t block_panels;  // of tokens
  int64_t depth;         // tiles along D: the hidden states of a block take up to 1.25 MiB
  int64_t rows;          // of the vocabulary, in 64s: their logits take 64 KiB, more where depth does not cover D

  explicit Sizes(const LinearHead& head)
      : panels(blocks_of(head.num_tokens, kTile)),
        token_tiles(blocks_of(head.num_tokens, kDepth<E>)),
        hidden_tiles(blocks_of(head.hidden_size, kDepth<E>)),
        hidden_panels(blocks_of(head.hidden_size, kTile)),
        block_panels(most(1, least(panels, 32))),
        depth(least(least(1280 / block_panels, 128) / kBlockTiles, blocks_of(hidden_tiles, kBlockTiles)) * kBlockTiles),
        rows(depth < hidden_tiles ? 256 : most(64, least(256, 1024 / block_panels / 64 * 64))) {}

  int64_t packed_bytes() const { return panels * hidden_tiles * kTileBytes; }
  int64_t rows_bytes() const { return 2 * kBlockTiles * kTileBytes; }  // two row blocks of A
  int64_t logits_bytes(int64_t num_rows) const { return num_rows * block_panels * kTile * kFloat; }
};

// The budget, or a quarter more than what a call needs whatever its tile: with less, tiles too small would be slow and
// save little.
int64_t bytes_allowed(const LinearHead& head, int64_t needed_bytes) {
  return most(head.budget_bytes, needed_bytes + needed_bytes / 4);
}

int threads_within(const LinearHead& head, int64_t room_bytes, int64_t scratch_bytes) {
  return int(most(1, least(head.num_threads, room_bytes / scratch_bytes)));
}

MGRPO_INLINE float temperature_of(const LinearHead& head, int64_t token) {
  if (token >= head.num_tokens) return 1.0f;
  return head.temperatures ? head.temperatures[token] : head.temperature;
}

template <typename S, typename E>
struct Problem {
  const LinearHead& head;
  Core<E> core;
  Sizes<E> sizes;

  Problem(const LinearHead& problem_head, Core<E> problem_core)
      : head(problem_head), core(problem_core), sizes(problem_head) {}

  const S* hidden(int64_t token) const { return static_cast<const S*>(head.hidden) + token * head.hidden_stride; }
  const S* weight(int64_t row) const { return static_cast<const S*>(head.weight) + row * head.weight_stride; }

  // Inside a parallel region: the hidden states as B of the logits.
  void pack_hidden(E* packed) const {
#pragma omp for schedule(static)
    for (int64_t p = 0; p < sizes.panels; ++p)
      pack_transposed(hidden(p * kTile), head.hidden_stride, least(kTile, head.num_tokens - p * kTile),
                      head.hidden_size, packed + p * sizes.hidden_tiles * kTileSize<E>);
  }

  // Products of `rows` rows of the weight with the tokens of panels [first, last): C panels of `rows_padded` rows.
  // A block of A is packed right before its sweep, into the first-level cache. (Fetching the next one meanwhile did not
  // pay: the sweep fills the way from the second-level cache.)
  void logits(int64_t row, int64_t rows, int64_t first, int64_t last, const E* packed, E* a, float* c,
              int64_t rows_padded) const {
    constexpr int64_t kStride = kBlockTiles * kTileSize<E>;
    const int64_t b_stride = sizes.hidden_tiles * kTileSize<E>;
    for (int64_t from = 0; from < sizes.hidden_tiles; from += sizes.depth)
      for (int64_t r = 0; r < rows; r += 2 * kTile) {
        const int64_t row_blocks = least(2, blocks_of(rows - r, kTile));
        const int64_t end = least(sizes.hidden_tiles, from + sizes.depth);
        for (int64_t k = from; k < end; k += kBlockTiles) {
          const int64_t num_tiles = least(kBlockTiles, end - k), column = k * kDepth<E>;
          for (int64_t i = 0; i < row_blocks; ++i)
            pack_rows(weight(row + r + i * kTile) + column, head.weight_stride, least(kTile, rows - r - i * kTile),
                      least(head.hidden_size - column, num_tiles * kDepth<E>), a + i * kStride);
          core.sweep({a, kStride, row_blocks, packed + first * b_stride + k * kTileSize<E>, b_stride, last - first,
                      num_tiles, c + r * kTile, rows_padded * kTile, k > 0});
        }
      }
  }
};

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
  // Slices of the vocabulary follow from the problem and the budget alone; what they leave bounds the threads.
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

// Per-token inputs of the gradient, in blocks of 16 tokens: one load a lane, zeros where absent or padded.
struct TokenCoefficients {
  float inverse[kTile], inverse_rest[kTile];  // 1 / temperature to twice the precision
  float lse[kTile], constant[kTile], slope[kTile], onehot[kTile], uniform[kTile], live[kTile];
  int64_t target[kTile];
};

void gather(const LinearTokenLogprobBackward& args, int64_t first, TokenCoefficients* out) {
  const auto at = [](const float* values, int64_t t) { return values ? values[t] : 0.0f; };
  for (int64_t i = 0; i < kTile; ++i) {
    const int64_t t = first + i;
    const bool live = t < args.head.num_tokens;
    const double inverse = 1.0 / double(temperature_of(args.head, t));
    out->inverse[i] = float(inverse);
    out->inverse_rest[i] = float(inverse - double(out->inverse[i]));
    out->lse[i] = live ? args.lse[t] : 0.0f;
    out->constant[i] = live ? args.constant[t] : 0.0f;
    out->slope[i] = live ? at(args.slope, t) : 0.0f;
    out->onehot[i] = live ? at(args.onehot, t) : 0.0f;
    out->uniform[i] = live ? at(args.uniform, t) : 0.0f;
    out->live[i] = live ? 1.0f : 0.0f;
    out->target[i] = live ? args.head.targets[t] : -1;
  }
}

// Gradient of `rows` logits (from row `row` on) of 16 tokens: tiles of A of dlogits^T [rows, tokens], where `a` points
// at these tokens, and row blocks are a_stride elements apart. dbias [rows][kLanes] gathers the sums over tokens.
template <typename E>
void tile_gradient(const LinearHead& head, const TokenCoefficients& token, float* c, int64_t row, int64_t rows, E* a,
                   int64_t a_stride, float* dbias) {
  for (int64_t i = 0; i < kTile; i += kLanes) {
    const f32v inverse = load(token.inverse + i), inverse_rest = load(token.inverse_rest + i);
    const f32v lse = load(token.lse + i), constant = load(token.constant + i);
    const f32v slope = load(token.slope + i), onehot = load(token.onehot + i), uniform = load(token.uniform + i);
    const i32v live = load(token.live + i) != f32v{};
    int32_t relative[kLanes];
    for (int64_t k = 0; k < kLanes; ++k) {
      const int64_t j = token.target[i + k] - row;
      relative[k] = j >= 0 && j < rows ? int32_t(j) : -1;
    }
    i32v target;
    std::memcpy(&target, relative, sizeof target);
    for (int64_t j = 0; j < rows; ++j) {
      f32v v = load(c + j * kTile + i);
      if (head.bias) v += head.bias[row + j];
      if (head.softcap > 0) v = softcapped(v, head.softcap);
      const i32v excluded = v == splat(-INFINITY);
      const f32v x = select(excluded, splat(kFloor), max(splat(kFloor), v * inverse - lse + v * inverse_rest));
      f32v dz = exp_or_zero(x) * (constant + slope * x);
      dz -= select(excluded, f32v{}, uniform);
      dz += select(target == isplat(int32_t(j)), onehot, f32v{});
      if (head.softcap > 0) {
        const f32v tanh = v / head.softcap;
        dz *= 1.0f - tanh * tanh;
      }
      dz = select(live, dz * inverse, f32v{});
      if (dbias) store(dbias + j * kLanes, load(dbias + j * kLanes) + dz);
      store(a + j / kTile * a_stride + j % kTile * kDepth<E> + i, dz);
    }
  }
}

// Rows and columns exchanged: from A tiles of dlogits^T (see tile_gradient) to those of dlogits [16 tokens, rows].
template <typename E>
void flip(const E* a, int64_t a_stride, int64_t rows, E* out) {
  constexpr int64_t kStep = 4 / sizeof(E);
  alignas(64) E words[kTileSize<E>];
  for (int64_t j = 0; j < rows; j += kDepth<E>, out += kTileSize<E>) {
    for (int64_t w = 0; w < kTile; ++w) {
      const int64_t k = j + w * kStep;
      pack_word_row(a + k / kTile * a_stride + k % kTile * kDepth<E>, kDepth<E>, kStep, kTile,
                    words + w * kDepth<E>);
    }
    transpose(words, out);
  }
}

// Row-major `out` from C panels. Whole lines go past the caches: each is written once and not read again.
template <typename S>
MGRPO_INLINE void write_rest(const float* c, int64_t c_stride, int64_t from, int64_t columns, S* out) {
  for (int64_t k = from; k < columns; k += kLanes) {
    const f32v v = load(c + k / kTile * c_stride + k % kTile);
    if (columns - k >= kLanes)
      store(out + k, v);
    else
      store_part(out + k, v, int(columns - k));
  }
}

template <typename S>
void write_rows(const float* c, int64_t c_stride, int64_t rows, int64_t columns, S* out, int64_t ld) {
  for (int64_t r = 0; r < rows; ++r, c += kTile, out += ld) {
    int64_t k = 0;
#if defined(__AVX512F__)
    if (sizeof(S) == 4 && reinterpret_cast<uintptr_t>(out) % 64 == 0)
      for (; k + kTile <= columns; k += kTile)
        _mm512_stream_ps(reinterpret_cast<float*>(out + k), (__m512)load(c + k / kTile * c_stride));
#endif
    write_rest(c, c_stride, k, columns, out);
  }
}

#if defined(__AVX512F__)
// For cores that multiply bf16, and so convert it too.
MGRPO_BF16 void write_rows_bf16(const float* c, int64_t c_stride, int64_t rows, int64_t columns, bf16* out,
                                int64_t ld) {
  for (int64_t r = 0; r < rows; ++r, c += kTile, out += ld) {
    int64_t k = 0;
    if (reinterpret_cast<uintptr_t>(out) % 64 == 0)
      for (; k + 2 * kTile <= columns; k += 2 * kTile) {
        const float* from = c + k / kTile * c_stride;
        const __m512bh line = _mm512_cvtne2ps_pbh(_mm512_load_ps(from + c_stride), _mm512_load_ps(from));
        _mm512_stream_si512(reinterpret_cast<__m512i*>(out + k), (__m512i)line);
      }
    write_rest(c, c_stride, k, columns, out);
  }
}
#endif

// The backward of one tile of the vocabulary at a time; every method runs inside the parallel region.
template <typename S, typename E>
struct Backward {
  static constexpr int64_t kTaskRows = 256;

  const LinearTokenLogprobBackward& args;
  const LinearHead& head;
  Problem<S, E> problem;
  const Sizes<E>& sizes;
  int num_threads;
  int64_t rows_max;       // of the vocabulary: a tile
  int64_t inner_rows;     // of the vocabulary: a task of the gradient of logits
  int64_t column_panels;  // of D: a task of dhidden, and what dweight takes at once
  int64_t group_rows;     // of the vocabulary: what dweight takes at once
  Layout layout;
  int64_t at_packed, at_columns, at_accumulator, at_tokens, at_by_row, at_by_token, at_scratch;
  int64_t by_row_bytes, accumulator_bytes, scratch_bytes, allowed;

  Backward(const LinearTokenLogprobBackward& backward_args, Core<E> core)
      : args(backward_args), head(backward_args.head), problem(head, core), sizes(problem.sizes) {
    column_panels = most(2, least(32, sizes.hidden_panels / (4 * head.num_threads) / 2 * 2));
    group_rows = sizes.token_tiles > kBlockTiles ? kTaskRows : 2 * kTile;
    rows_max = least(1024 * most(2, head.num_threads), blocks_of(head.vocabulary, 2 * kTile) * 2 * kTile);
    for (plan(); layout.bytes > allowed && rows_max > sizes.rows; plan())
      rows_max = most(sizes.rows, rows_max / 2 / sizes.rows * sizes.rows);
  }

  void plan() {
    layout = Layout();
    inner_rows = least(sizes.rows, rows_max);
    by_row_bytes = rows_max * sizes.token_tiles * 64;
    accumulator_bytes = args.dhidden ? sizes.hidden_panels * sizes.panels * kTile * kTile * kFloat : 0;
    scratch_bytes = most(sizes.rows_bytes() + sizes.logits_bytes(inner_rows) + inner_rows * kLanes * kFloat,
                         column_panels * most(kBlockTiles * kTileBytes, group_rows * kTile * kFloat));
    at_packed = layout.add(sizes.packed_bytes());
    at_columns = layout.add(args.dweight ? sizes.hidden_panels * sizes.token_tiles * kTileBytes : 0);
    at_accumulator = layout.add(accumulator_bytes);
    at_tokens = layout.add(sizes.panels * int64_t(sizeof(TokenCoefficients)));
    allowed = bytes_allowed(head, layout.bytes);
    at_by_row = layout.add(by_row_bytes);
    at_by_token = layout.add(args.dhidden ? sizes.panels * rows_max * 64 : 0);
    num_threads = threads_within(head, allowed - layout.bytes, scratch_bytes);
    at_scratch = layout.add(num_threads * scratch_bytes);
  }

  // dlogits of inner_rows rows and all tokens, both ways round.
  void gradient_task(int64_t tile, int64_t row, int64_t rows, const E* packed, const TokenCoefficients* tokens,
                     char* scratch, E* by_row, E* by_token) const {
    E* a = reinterpret_cast<E*>(scratch);
    float* c = reinterpret_cast<float*>(scratch + sizes.rows_bytes());
    float* dbias = args.dbias ? c + sizes.block_panels * inner_rows * kTile : nullptr;
    if (dbias) std::memset(dbias, 0, size_t(rows * kLanes) * kFloat);
    const int64_t a_stride = sizes.token_tiles * kTileSize<E>, offset = row - tile;
    for (int64_t first = 0; first < sizes.panels; first += sizes.block_panels) {
      const int64_t last = least(sizes.panels, first + sizes.block_panels);
      problem.logits(row, rows, first, last, packed, a, c, inner_rows);
      for (int64_t p = first; p < last; ++p) {
        const int64_t t = p * kTile;
        E* to = by_row + offset / kTile * a_stride + t / kDepth<E> * kTileSize<E> + t % kDepth<E>;
        tile_gradient(head, tokens[p], c + (p - first) * inner_rows * kTile, row, rows, to, a_stride, dbias);
        for (int64_t j = rows; j % kDepth<E>; ++j)
          std::memset(static_cast<void*>(to + j / kTile * a_stride + j % kTile * kDepth<E>), 0, kTile * sizeof(E));
        if (args.dhidden)
          flip(to, a_stride, rows, by_token + (p * rows_max + offset) / kDepth<E> * kTileSize<E>);
      }
    }
    for (int64_t j = 0; dbias && j < rows; ++j) args.dbias[row + j] = reduce_add(load(dbias + j * kLanes));
  }

  // A block of columns of dhidden, over the rows of the tile.
  void dhidden_task(int64_t tile, int64_t rows, int64_t panel, const E* by_token, E* b, float* accumulator) const {
    const int64_t column = panel * kTile, panels = least(column_panels, sizes.hidden_panels - panel);
    const int64_t c_stride = sizes.panels * kTile * kTile;
    for (int64_t j = 0; j < rows; j += kBlockTiles * kDepth<E>) {
      const int64_t num_tiles = least(kBlockTiles, blocks_of(rows - j, kDepth<E>));
      pack_columns(problem.weight(tile + j) + column, head.weight_stride, rows - j,
                   least(head.hidden_size - column, panels * kTile), num_tiles, b);
      for (int64_t p = 0; p < sizes.panels; p += 2)
        problem.core.sweep({by_token + (p * rows_max + j) / kDepth<E> * kTileSize<E>,
                            rows_max / kDepth<E> * kTileSize<E>, least(2, sizes.panels - p), b,
                            num_tiles * kTileSize<E>, panels, num_tiles,
                            accumulator + panel * c_stride + p * kTile * kTile, c_stride, tile + j > 0});
    }
  }

  // dweight of some rows of the tile, C in the second-level cache.
  void dweight_task(int64_t tile, int64_t from, int64_t to, const E* by_row, const E* columns, float* c) const {
    const int64_t a_stride = sizes.token_tiles * kTileSize<E>, c_stride = group_rows * kTile;
    for (int64_t panel = 0; panel < sizes.hidden_panels; panel += column_panels) {
      const int64_t panels = least(column_panels, sizes.hidden_panels - panel);
      for (int64_t row = from; row < to; row += group_rows) {
        const int64_t rows = least(group_rows, to - row);
        for (int64_t k = 0; k == 0 || k < sizes.token_tiles; k += kBlockTiles)  // once for no tokens: zeros
          for (int64_t j = 0; j < rows; j += 2 * kTile)
            problem.core.sweep({by_row + (row + j) / kTile * a_stride + k * kTileSize<E>, a_stride,
                                least(2, blocks_of(rows - j, kTile)),
                                columns + panel * a_stride + k * kTileSize<E>, a_stride, panels,
                                least(kBlockTiles, sizes.token_tiles - k), c + j * kTile, c_stride, k > 0});
        write(c, c_stride, rows, least(head.hidden_size - panel * kTile, panels * kTile),
              static_cast<S*>(args.dweight) + (tile + row) * args.dweight_stride + panel * kTile);
      }
    }
  }

  void write(const float* c, int64_t c_stride, int64_t rows, int64_t columns, S* out) const {
#if defined(__AVX512F__)
    if constexpr (sizeof(E) == 2) return write_rows_bf16(c, c_stride, rows, columns, out, args.dweight_stride);
#endif
    write_rows(c, c_stride, rows, columns, out, args.dweight_stride);
  }

  template <typename Out>
  void write_dhidden(const float* accumulator) const {
#pragma omp for schedule(static)
    for (int64_t p = 0; p < sizes.panels; ++p)
      write_rows(accumulator + p * kTile * kTile, sizes.panels * kTile * kTile,
                 least(kTile, head.num_tokens - p * kTile), head.hidden_size,
                 static_cast<Out*>(args.dhidden) + p * kTile * args.dhidden_stride, args.dhidden_stride);
  }

  bool run() const {
    const Arena arena(layout.bytes);
    if (!arena) return false;
    const HugePages dweight_pages(args.dweight,
                                  args.dweight ? head.vocabulary * args.dweight_stride * int64_t(sizeof(S)) : 0);
    dweight_pages.ask();
    E *packed = arena.at<E>(at_packed), *columns = arena.at<E>(at_columns);
    E *by_row = arena.at<E>(at_by_row), *by_token = arena.at<E>(at_by_token);
    float* accumulator = arena.at<float>(at_accumulator);
    TokenCoefficients* tokens = arena.at<TokenCoefficients>(at_tokens);
    for (int64_t p = 0; p < sizes.panels; ++p) gather(args, p * kTile, tokens + p);
    // Nothing writes the tokens past the last panel, which dweight adds up; nothing dhidden without a vocabulary.
    const bool tokens_padded = sizes.panels * kTile < sizes.token_tiles * kDepth<E>;
    if (tokens_padded) std::memset(static_cast<void*>(by_row), 0, size_t(by_row_bytes));
    if (head.vocabulary == 0) std::memset(accumulator, 0, size_t(accumulator_bytes));

#pragma omp parallel num_threads(num_threads)
    {
      dweight_pages.fault_in();
      problem.core.begin();
      char* scratch = arena.at<char>(at_scratch + omp_get_thread_num() * scratch_bytes);
      problem.pack_hidden(packed);
      if (args.dweight) {
#pragma omp for schedule(static)
        for (int64_t p = 0; p < sizes.hidden_panels; p += 2)
          pack_columns(problem.hidden(0) + p * kTile, head.hidden_stride, head.num_tokens,
                       least(2 * kTile, head.hidden_size - p * kTile), sizes.token_tiles,
                       columns + p * sizes.token_tiles * kTileSize<E>);
      }
      for (int64_t tile = 0; tile < head.vocabulary; tile += rows_max) {
        const int64_t rows = least(rows_max, head.vocabulary - tile);
#pragma omp for schedule(dynamic, 1)
        for (int64_t j = 0; j < rows; j += inner_rows)
          gradient_task(tile, tile + j, least(inner_rows, rows - j), packed, tokens, scratch, by_row, by_token);
        const int64_t dhidden_tasks = args.dhidden ? blocks_of(sizes.hidden_panels, column_panels) : 0;
        const int64_t dweight_tasks = args.dweight ? blocks_of(rows, kTaskRows) : 0;
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < dhidden_tasks + dweight_tasks; ++task) {
          const int64_t j = (task - dhidden_tasks) * kTaskRows;
          if (task < dhidden_tasks)
            dhidden_task(tile, rows, task * column_panels, by_token, reinterpret_cast<E*>(scratch), accumulator);
          else
            dweight_task(tile, j, least(rows, j + kTaskRows), by_row, columns, reinterpret_cast<float*>(scratch));
        }
      }
      problem.core.end();
      if (args.dhidden && args.dhidden_dtype == Dtype::f32)
        write_dhidden<float>(accumulator);
      else if (args.dhidden)
        write_dhidden<S>(accumulator);
#if defined(__AVX512F__)
      _mm_sfence();
#endif
    }
    return true;
  }
};

template <typename S, typename E>
bool run(const LinearTokenLogprobForward& args, Core<E> core) {
  return forward<S, E>(args, core);
}

template <typename S, typename E>
bool run(const LinearTokenLogprobBackward& args, Core<E> core) {
  return Backward<S, E>(args, core).run();
}

// bf16 stays bf16 where the processor multiplies it; all else is multiplied as fp32.
template <typename Args>
bool dispatch(const Args& args) {
  const Core<float> fma = {sweep_fma, false};
  switch (args.head.dtype) {
    case Dtype::f32: return run<float>(args, fma);
    case Dtype::f16: return run<f16>(args, fma);
    case Dtype::bf16: break;
  }
#if defined(__AVX512F__)
  if (args.head.level >= 4) return run<bf16>(args, Core<bf16>{sweep_amx, true});
  if (args.head.level == 3) return run<bf16>(args, Core<bf16>{sweep_dot, false});
#endif
  return run<bf16>(args, fma);
}

}  // namespace

bool linear_token_logprob_fwd(const LinearTokenLogprobForward& args) { return dispatch(args); }
bool linear_token_logprob_bwd(const LinearTokenLogprobBackward& args) { return dispatch(args); }

}  // namespace MGRPO_ISA
}  // namespace mgrpo
