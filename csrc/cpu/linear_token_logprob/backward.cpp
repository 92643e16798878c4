// Gradients of hidden states, weight and bias; see forward.cpp.
#include "problem.h"

namespace mgrpo {
namespace MGRPO_ISA {
namespace {

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
// For cores that multiply and convert bf16.
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
    // Nothing else writes the tokens past the last panel, which dweight sums, or dhidden without a vocabulary.
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
bool backward(const LinearTokenLogprobBackward& args, Core<E> core) {
  return Backward<S, E>(args, core).run();
}

}  // namespace

bool linear_token_logprob_bwd(const LinearTokenLogprobBackward& args) {
  return dispatch(args.head, [&](auto element, auto core) { return backward<decltype(element)>(args, core); });
}

}  // namespace MGRPO_ISA
}  // namespace mgrpo
