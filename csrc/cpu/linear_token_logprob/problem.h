// Shared by both directions: sizes, packing and the product of the weight and the hidden states.
#pragma once

#include <math.h>
#include <omp.h>

#include "arena.h"
#include "gemm.h"
#include "linear_token_logprob.h"
#include "vector_math.h"

namespace mgrpo {
namespace MGRPO_ISA {
namespace {

constexpr float kFloor = -1e4f;  // e to this is 0; products with it are finite, unlike those with -inf
constexpr int64_t kFloat = sizeof(float);

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

// The budget, or a quarter more than a call needs for any tile: with less, tiles would be small and slow and save
// little.
inline int64_t bytes_allowed(const LinearHead& head, int64_t needed_bytes) {
  return most(head.budget_bytes, needed_bytes + needed_bytes / 4);
}

inline int threads_within(const LinearHead& head, int64_t room_bytes, int64_t scratch_bytes) {
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

// The result of run(S{}, core), S the type of the inputs. bf16 stays bf16 where the processor multiplies it; all else is
// multiplied as fp32.
template <typename Run>
bool dispatch(const LinearHead& head, Run run) {
  const Core<float> fma = {sweep_fma, false};
  switch (head.dtype) {
    case Dtype::f32: return run(float{}, fma);
    case Dtype::f16: return run(f16{}, fma);
    case Dtype::bf16: break;
  }
#if defined(__AVX512F__)
  if (head.level >= 4) return run(bf16{}, Core<bf16>{sweep_amx, true});
  if (head.level == 3) return run(bf16{}, Core<bf16>{sweep_dot, false});
#endif
  return run(bf16{}, fma);
}

}  // namespace
}  // namespace MGRPO_ISA
}  // namespace mgrpo
