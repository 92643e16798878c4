// Sums over the vocabulary, and the gradients of hidden states and weight, without the logits [T, V] in memory.
//
// Tokens are vector lanes: a tile of transposed logits [rows of the weight, tokens] is a product of the weight as it
// lies and of the hidden states packed once, so that maximum, sums and gradient are vertical operations on a tile that
// still sits in the second-level cache. Fused: bias, softcap, temperature, sums of e^x and e^x x, the target's logit.
// Forward reads the weight once (2 V D bytes in bf16). Backward reads it once, computes the logits again and writes
// dweight once, past the caches (6 V D bytes in bf16, instead of the 4 T V that logits would add several times).
//
// A result never depends on the number of threads: slices of the vocabulary are merged in their order, and each
// element of a product adds up along K in order.
#include "linear_token_logprob.h"

#include <cfloat>
#include <cstdlib>
#include <omp.h>
#include <math.h>

#include "gemm.h"

namespace mgrpo {
MGRPO_DECLARE_LINEAR_TOKEN_LOGPROB(MGRPO_ISA)
}

namespace mgrpo {
namespace MGRPO_ISA {
namespace {

constexpr float kFloor = -1e4f;  // e to this is 0; products with it are finite, unlike those with -inf
constexpr int64_t kBlockPanels = 32;  // 512 tokens: a block of K of them takes half a second-level cache
constexpr int64_t kMostSlices = 256;

class Buffer {
 public:
  explicit Buffer(int64_t bytes) : data_(std::aligned_alloc(64, size_t(blocks_of(most(bytes, 1), 64) * 64))) {}
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  explicit operator bool() const { return data_ != nullptr; }
  template <typename T>
  T* as(int64_t offset_bytes = 0) const {
    return reinterpret_cast<T*>(static_cast<char*>(data_) + offset_bytes);
  }

 private:
  void* data_;
};

// exp(x) for x <= 88, exactly 0 below -87.3. A NaN gives any number.
MGRPO_INLINE f32v exp_or_zero(f32v x) {
  const f32v y = x * kLog2e;
  return y < splat(kLeastExponent) ? splat(0.0f) : exp2_in_range(clamp_exponent(y));
}

// Sizes in tiles and panels of a problem whose packed elements are of type E.
template <typename E>
struct Sizes {
  int64_t panels;         // of 16 tokens
  int64_t token_tiles;    // of kDepth<E> tokens
  int64_t tokens;         // padded: token_tiles * kDepth<E>
  int64_t hidden_tiles;   // of kDepth<E> hidden elements
  int64_t hidden_panels;  // of 16 hidden elements

  explicit Sizes(const LinearHead& head)
      : panels(blocks_of(head.num_tokens, kTile)),
        token_tiles(blocks_of(head.num_tokens, kDepth<E>)),
        tokens(token_tiles * kDepth<E>),
        hidden_tiles(blocks_of(head.hidden_size, kDepth<E>)),
        hidden_panels(blocks_of(head.hidden_size, kTile)) {}

  int64_t packed_bytes() const { return panels * hidden_tiles * kTileBytes; }
  int64_t block_panels() const { return least(panels, kBlockPanels); }
};

constexpr int64_t kRowsBytes = 2 * kBlockTiles * kTileBytes;  // two row blocks of A, one block of K

// 1 / temperature of every token, padded with 1.
void invert_temperatures(const LinearHead& head, int64_t padded, float* inverse) {
  for (int64_t t = 0; t < padded; ++t)
    inverse[t] = t >= head.num_tokens ? 1.0f : 1.0f / (head.temperatures ? head.temperatures[t] : head.temperature);
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
  void logits(int64_t row, int64_t rows, int64_t first, int64_t last, const E* packed, E* a, float* c,
              int64_t rows_padded) const {
    for (int64_t k = 0; k < sizes.hidden_tiles; k += kBlockTiles) {
      const int64_t num_tiles = least(kBlockTiles, sizes.hidden_tiles - k);
      const int64_t column = k * kDepth<E>, columns = least(head.hidden_size - column, num_tiles * kDepth<E>);
      for (int64_t r = 0; r < rows; r += 2 * kTile) {
        const int64_t row_blocks = least(2, blocks_of(rows - r, kTile));
        for (int64_t i = 0; i < row_blocks; ++i)
          pack_rows(weight(row + r + i * kTile) + column, head.weight_stride, least(kTile, rows - r - i * kTile),
                    columns, a + i * kBlockTiles * kTileSize<E>);
        core.sweep({a, kBlockTiles * kTileSize<E>, row_blocks,
                    packed + (first * sizes.hidden_tiles + k) * kTileSize<E>, sizes.hidden_tiles * kTileSize<E>,
                    last - first, num_tiles, c + r * kTile, rows_padded * kTile, k > 0});
      }
    }
  }
};

// Rows of the vocabulary that go through the caches together.
int64_t rows_at_once(int64_t panels) { return panels <= 16 ? 128 : 256; }

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
MGRPO_INLINE Sums tile_sums(float* c, int64_t rows, const float* bias, float softcap, f32v inverse) {
  constexpr int kChains = 4;
  f32v top[kChains];
  for (f32v& chain : top) chain = splat(-INFINITY);
  for (int64_t j = 0; j < rows; j += kChains)
#pragma GCC unroll 4
    for (int k = 0; k < kChains; ++k) {
      if (j + k >= rows) break;
      float* at = c + (j + k) * kTile;
      f32v v = load(at);
      if (kChanged) {
        if (bias) v += bias[j + k];
        if (softcap > 0) v = cap_logits(v, softcap);
        store(at, v);
      }
      top[k] = max(top[k], v);
    }
  Sums out;
  // A finite stand-in for the top of -inf alone, or of a NaN, whose sum of e^x x turns NaN in any case.
  out.top = max(max(max(top[0], top[1]), max(top[2], top[3])) * inverse, splat(-FLT_MAX));
  f32v exp[kChains] = {}, exp_x[kChains] = {}, finite_x[kChains] = {}, num_finite[kChains] = {};
  for (int64_t j = 0; j < rows; j += kChains)
#pragma GCC unroll 4
    for (int k = 0; k < kChains; ++k) {
      if (j + k >= rows) break;
      const f32v all = load(c + (j + k) * kTile) * inverse - out.top, x = max(splat(kFloor), all);
      const f32v e = exp_or_zero(x);
      exp[k] += e;
      exp_x[k] += e * x;
      if (kCertainty) {
        const i32v finite = all != splat(-INFINITY);
        finite_x[k] += select(finite, all, f32v{});
        num_finite[k] += select(finite, splat(1.0f), f32v{});
      }
    }
  out.exp = (exp[0] + exp[1]) + (exp[2] + exp[3]);
  out.exp_x = (exp_x[0] + exp_x[1]) + (exp_x[2] + exp_x[3]);
  out.finite_x = (finite_x[0] + finite_x[1]) + (finite_x[2] + finite_x[3]);
  out.num_finite = (num_finite[0] + num_finite[1]) + (num_finite[2] + num_finite[3]);
  return out;
}

template <bool kChanged, bool kCertainty>
void add_tile(const LinearHead& head, float* c, int64_t rows, const float* bias, const float* inverse, float* sums,
              int64_t stride) {
  for (int64_t i = 0; i < kTile; i += kLanes) {
    const Sums tile = tile_sums<kChanged, kCertainty>(c + i, rows, bias, head.softcap, load(inverse + i));
    store_sums(sums + i, stride, merge(load_sums(sums + i, stride), tile));
  }
}

template <typename S, typename E>
bool forward(const LinearTokenLogprobForward& args, Core<E> core) {
  const LinearHead& head = args.head;
  const Problem<S, E> problem(head, core);
  const Sizes<E>& sizes = problem.sizes;
  const int64_t padded = sizes.panels * kTile, block = sizes.block_panels();
  int64_t rows_max = rows_at_once(block);
  const int64_t slice_bytes = kNumSums * padded * int64_t(sizeof(float));
  int64_t scratch_bytes = kRowsBytes + rows_max * block * kTile * int64_t(sizeof(float));
  const auto left = [&] {
    return head.budget_bytes - sizes.packed_bytes() - padded * int64_t(sizeof(float)) -
           head.num_threads * scratch_bytes;
  };
  while (rows_max > 2 * kTile && left() < slice_bytes) {
    rows_max /= 2;
    scratch_bytes = kRowsBytes + rows_max * block * kTile * int64_t(sizeof(float));
  }
  const int64_t num_tiles = blocks_of(head.vocabulary, rows_max);
  const int64_t slice_tiles = blocks_of(num_tiles, most(1, least(kMostSlices, left() / most(slice_bytes, 1))));
  const int64_t num_slices = blocks_of(num_tiles, slice_tiles);

  const Buffer packed(sizes.packed_bytes()), inverse(padded * int64_t(sizeof(float)));
  const Buffer partial(num_slices * slice_bytes), scratch(head.num_threads * scratch_bytes);
  if (!packed || !inverse || !partial || !scratch) return false;
  invert_temperatures(head, padded, inverse.as<float>());
  std::memset(args.z_target, 0, size_t(head.num_tokens) * sizeof(float));
  const bool changed = head.bias || head.softcap > 0, certainty = args.finite_x;
  const auto add = changed ? (certainty ? add_tile<true, true> : add_tile<true, false>)
                           : (certainty ? add_tile<false, true> : add_tile<false, false>);

#pragma omp parallel num_threads(head.num_threads)
  {
    core.begin();
    E* a = scratch.as<E>(omp_get_thread_num() * scratch_bytes);
    float* c = scratch.as<float>(omp_get_thread_num() * scratch_bytes + kRowsBytes);
    problem.pack_hidden(packed.as<E>());
#pragma omp for schedule(dynamic, 1)
    for (int64_t slice = 0; slice < num_slices; ++slice) {
      float* sums = partial.as<float>(slice * slice_bytes);
      for (int64_t t = 0; t < padded; t += kLanes) store_sums(sums + t, padded, no_sums());
      const int64_t end = least(head.vocabulary, (slice + 1) * slice_tiles * rows_max);
      for (int64_t row = slice * slice_tiles * rows_max; row < end; row += rows_max) {
        const int64_t rows = least(rows_max, end - row);
        for (int64_t first = 0; first < sizes.panels; first += block) {
          const int64_t last = least(sizes.panels, first + block);
          problem.logits(row, rows, first, last, packed.as<E>(), a, c, rows_max);
          for (int64_t p = first; p < last; ++p)
            add(head, c + (p - first) * rows_max * kTile, rows, head.bias ? head.bias + row : nullptr,
                inverse.as<float>() + p * kTile, sums + p * kTile, padded);
          for (int64_t t = first * kTile; t < least(head.num_tokens, last * kTile); ++t) {
            const int64_t j = head.targets[t] - row;
            if (j < 0 || j >= rows) continue;
            args.z_target[t] =
                c[((t / kTile - first) * rows_max + j) * kTile + t % kTile] * inverse.as<float>()[t];
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
          sums = merge(sums, load_sums(partial.as<float>(slice * slice_bytes) + p * kTile + i, padded));
        sums.exp = select(sums.exp_x == sums.exp_x, sums.exp, sums.exp_x);
        store_sums(merged + i, kTile, sums);
      }
      float* const outputs[kNumSums] = {args.top, args.exp, args.exp_x, args.finite_x, args.num_finite};
      const int64_t count = least(kTile, head.num_tokens - p * kTile);
      for (int64_t i = 0; i < (certainty ? kNumSums : 3); ++i)
        std::memcpy(outputs[i] + p * kTile, merged + i * kTile, size_t(count) * sizeof(float));
    }
  }
  return true;
}

// Per-token inputs of the gradient, in blocks of 16 tokens: one load a lane, zeros where absent or padded.
struct TokenCoefficients {
  float inverse[kTile], lse[kTile], constant[kTile], slope[kTile], onehot[kTile], uniform[kTile], live[kTile];
  int64_t target[kTile];
};

void gather(const LinearTokenLogprobBackward& args, const float* inverse, int64_t first, TokenCoefficients* out) {
  const auto at = [](const float* values, int64_t t) { return values ? values[t] : 0.0f; };
  for (int64_t i = 0; i < kTile; ++i) {
    const int64_t t = first + i;
    const bool live = t < args.head.num_tokens;
    out->inverse[i] = inverse[t];
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
    const f32v inverse = load(token.inverse + i), lse = load(token.lse + i), constant = load(token.constant + i);
    const f32v slope = load(token.slope + i), onehot = load(token.onehot + i), uniform = load(token.uniform + i);
    const i32v live = load(token.live + i) != f32v{};
    int32_t relative[kLanes];
    for (int64_t k = 0; k < kLanes; ++k) {
      const int64_t j = token.target[i + k] - row;
      relative[k] = j >= 0 && j < rows ? int32_t(j) : -1;
    }
    i32v target;
    std::memcpy(&target, relative, sizeof target);
    const float cap_inverse = head.softcap > 0 ? 1.0f / head.softcap : 0.0f;
    for (int64_t j = 0; j < rows; ++j) {
      f32v v = load(c + j * kTile + i);
      if (head.bias) v += head.bias[row + j];
      if (head.softcap > 0) v = cap_logits(v, head.softcap);
      const f32v x = max(splat(kFloor), v * inverse - lse);
      f32v dz = exp_or_zero(x) * (constant + slope * x);
      dz -= select(v == splat(-INFINITY), f32v{}, uniform);
      dz += select(target == isplat(int32_t(j)), onehot, f32v{});
      const f32v tanh = v * cap_inverse;
      if (head.softcap > 0) dz *= 1.0f - tanh * tanh;
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

// Row-major out from C panels; each line of dweight is written once and not read again, so past the caches.
template <typename S>
MGRPO_INLINE void write_row(const float* c, int64_t c_stride, int64_t columns, S* out) {
  int64_t k = 0;
#if defined(__AVX512F__)
  constexpr int64_t kLine = 64 / sizeof(S);
  if (reinterpret_cast<uintptr_t>(out) % 64 == 0)
    for (; k + kLine <= columns; k += kLine) {
      alignas(64) S line[kLine];
      for (int64_t i = 0; i < kLine; i += kLanes) store(line + i, load(c + (k + i) / kTile * c_stride));
      _mm512_stream_si512(reinterpret_cast<__m512i*>(out + k), _mm512_load_si512(line));
    }
#endif
  for (; k < columns; k += kLanes) {
    const f32v v = load(c + k / kTile * c_stride + k % kTile);
    if (columns - k >= kLanes)
      store(out + k, v);
    else
      store_part(out + k, v, int(columns - k));
  }
}

template <typename S>
void write_rows(const float* c, int64_t c_stride, int64_t rows, int64_t columns, S* out, int64_t ld) {
  for (int64_t r = 0; r < rows; ++r) write_row(c + r * kTile, c_stride, columns, out + r * ld);
}

// The backward of one tile of the vocabulary at a time; every method runs inside the parallel region.
template <typename S, typename E>
struct Backward {
  static constexpr int64_t kRowsMax = 2048;

  const LinearTokenLogprobBackward& args;
  const LinearHead& head;
  Problem<S, E> problem;
  const Sizes<E>& sizes;
  int64_t block;         // panels of tokens at once
  int64_t inner_rows;    // of the vocabulary: logits in the second-level cache
  int64_t rows_max;      // of the vocabulary: a tile
  int64_t dhidden_panels, dweight_panels;  // columns of a task
  int64_t scratch_bytes;

  int64_t tile_bytes() const { return 2 * rows_max * sizes.tokens * int64_t(sizeof(E)); }
  int64_t accumulator_bytes() const {
    return args.dhidden ? sizes.hidden_panels * sizes.panels * kTile * kTile * int64_t(sizeof(float)) : 0;
  }
  int64_t columns_bytes() const {
    return args.dweight ? sizes.hidden_panels * sizes.token_tiles * kTileBytes : 0;
  }
  int64_t coefficients_bytes() const { return sizes.panels * int64_t(sizeof(TokenCoefficients)); }

  Backward(const LinearTokenLogprobBackward& backward_args, Core<E> core)
      : args(backward_args), head(backward_args.head), problem(head, core), sizes(problem.sizes) {
    block = sizes.block_panels();
    inner_rows = rows_at_once(block);
    dhidden_panels = most(2, least(16, blocks_of(sizes.hidden_panels, 8 * head.num_threads) * 2));
    dweight_panels = most(2, least(32, (1 << 20) / (sizes.token_tiles * kTileBytes) / 2 * 2));
    rows_max = kRowsMax;
    for (;;) {
      scratch_bytes = most(kRowsBytes + (block * kTile + kLanes) * inner_rows * int64_t(sizeof(float)),
                           most(dhidden_panels * kBlockTiles * kTileBytes, dweight_panels * 2 * kTileBytes));
      const int64_t bytes = sizes.packed_bytes() + columns_bytes() + accumulator_bytes() + coefficients_bytes() +
                            tile_bytes() + head.num_threads * scratch_bytes;
      if (bytes <= head.budget_bytes || rows_max == 2 * kTile) break;
      rows_max /= 2;
      inner_rows = least(inner_rows, rows_max);
    }
    rows_max = least(rows_max, blocks_of(head.vocabulary, 2 * kTile) * 2 * kTile);
    inner_rows = least(inner_rows, rows_max);
  }

  // dlogits of inner_rows rows and all tokens, both ways round.
  void gradient_task(int64_t tile, int64_t row, int64_t rows, const E* packed, const TokenCoefficients* tokens,
                     char* scratch, E* by_row, E* by_token) const {
    E* a = reinterpret_cast<E*>(scratch);
    float* c = reinterpret_cast<float*>(scratch + kRowsBytes);
    float* dbias = args.dbias ? c + block * inner_rows * kTile : nullptr;
    if (dbias) std::memset(dbias, 0, size_t(rows * kLanes) * sizeof(float));
    const int64_t a_stride = sizes.token_tiles * kTileSize<E>, offset = row - tile;
    for (int64_t first = 0; first < sizes.panels; first += block) {
      const int64_t last = least(sizes.panels, first + block);
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
    const int64_t column = panel * kTile, panels = least(dhidden_panels, sizes.hidden_panels - panel);
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

  // dweight of some rows of the tile.
  void dweight_task(int64_t tile, int64_t from, int64_t to, const E* by_row, const E* columns, float* c) const {
    const int64_t a_stride = sizes.token_tiles * kTileSize<E>, c_stride = 2 * kTile * kTile;
    for (int64_t panel = 0; panel < sizes.hidden_panels; panel += dweight_panels) {
      const int64_t panels = least(dweight_panels, sizes.hidden_panels - panel);
      for (int64_t j = from; j < to; j += 2 * kTile) {
        for (int64_t k = 0; k < sizes.token_tiles; k += kBlockTiles)
          problem.core.sweep({by_row + j / kTile * a_stride + k * kTileSize<E>, a_stride,
                              least(2, blocks_of(to - j, kTile)), columns + (panel * sizes.token_tiles + k) * kTileSize<E>,
                              a_stride, panels, least(kBlockTiles, sizes.token_tiles - k), c, c_stride, k > 0});
        write_rows(c, c_stride, least(2 * kTile, to - j), least(head.hidden_size - panel * kTile, panels * kTile),
                   static_cast<S*>(args.dweight) + (tile + j) * args.dweight_stride + panel * kTile,
                   args.dweight_stride);
      }
    }
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
    constexpr int64_t kTaskRows = 256;
    const Buffer packed(sizes.packed_bytes()), columns(columns_bytes()), accumulator(accumulator_bytes());
    const Buffer coefficients(coefficients_bytes()), scratch(head.num_threads * scratch_bytes);
    const Buffer by_row(tile_bytes() / 2), by_token(tile_bytes() / 2);
    const Buffer inverse(sizes.tokens * int64_t(sizeof(float)));
    if (!packed || !columns || !accumulator || !coefficients || !scratch || !by_row || !by_token || !inverse)
      return false;
    invert_temperatures(head, sizes.tokens, inverse.as<float>());
    for (int64_t p = 0; p < sizes.panels; ++p)
      gather(args, inverse.as<float>(), p * kTile, coefficients.as<TokenCoefficients>() + p);
    // Tokens past the last panel are never written and must be 0 in dweight's sums; so must dhidden without a vocabulary.
    std::memset(by_row.as<void>(), 0, size_t(tile_bytes() / 2));
    std::memset(accumulator.as<void>(), 0, size_t(accumulator_bytes()));

#pragma omp parallel num_threads(head.num_threads)
    {
      problem.core.begin();
      char* mine = scratch.as<char>(omp_get_thread_num() * scratch_bytes);
      problem.pack_hidden(packed.as<E>());
      if (args.dweight) {
#pragma omp for schedule(static)
        for (int64_t p = 0; p < sizes.hidden_panels; ++p)
          pack_columns(problem.hidden(0) + p * kTile, head.hidden_stride, head.num_tokens,
                       least(kTile, head.hidden_size - p * kTile), sizes.token_tiles,
                       columns.as<E>() + p * sizes.token_tiles * kTileSize<E>);
      }
      for (int64_t tile = 0; tile < head.vocabulary; tile += rows_max) {
        const int64_t rows = least(rows_max, head.vocabulary - tile);
#pragma omp for schedule(dynamic, 1)
        for (int64_t j = 0; j < rows; j += inner_rows)
          gradient_task(tile, tile + j, least(inner_rows, rows - j), packed.as<E>(),
                        coefficients.as<TokenCoefficients>(), mine, by_row.as<E>(), by_token.as<E>());
        const int64_t dhidden_tasks = args.dhidden ? blocks_of(sizes.hidden_panels, dhidden_panels) : 0;
        const int64_t dweight_tasks = args.dweight ? blocks_of(rows, kTaskRows) : 0;
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < dhidden_tasks + dweight_tasks; ++task) {
          const int64_t j = (task - dhidden_tasks) * kTaskRows;
          if (task < dhidden_tasks)
            dhidden_task(tile, rows, task * dhidden_panels, by_token.as<E>(), reinterpret_cast<E*>(mine),
                         accumulator.as<float>());
          else
            dweight_task(tile, j, least(rows, j + kTaskRows), by_row.as<E>(), columns.as<E>(),
                         reinterpret_cast<float*>(mine));
        }
      }
      problem.core.end();
      if (args.dhidden && args.dhidden_dtype == Dtype::f32)
        write_dhidden<float>(accumulator.as<float>());
      else if (args.dhidden)
        write_dhidden<S>(accumulator.as<float>());
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
