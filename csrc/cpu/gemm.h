// Matrix products on tiles of 16 rows x 64 bytes, the shape of an AMX register; every other core shares the layout.
//
// A tile is 16 x 16 words of 32 bits; a word is one fp32, or two bf16 that are neighbours in the reduction.
//   A [M, K], tile [row][word]: row-major pieces.    B [K, N], tile [word][column]: the transpose, so that a core
//   multiplies a word of a row of A by 16 neighbouring columns of B.    C [M, N] fp32 in panels [N / 16][M][16].
// Tiles of one row block (A) or of one panel (B) follow each other along K. A sweep multiplies up to two row blocks by
// many panels; every element of C adds its products in the order of K, so blocking never changes a bit.
#pragma once

#include <cstdint>

#include "simd.h"

namespace mgrpo {
namespace MGRPO_ISA {
namespace {

constexpr int64_t kTile = 16;
constexpr int64_t kTileBytes = 1024;
// Along K: two row blocks of A take 32 KiB and stay in the first-level cache, past which AMX streams B and C.
constexpr int64_t kBlockTiles = 16;

template <typename E>
constexpr int64_t kDepth = 64 / sizeof(E);  // elements of K in a tile
template <typename E>
constexpr int64_t kTileSize = kTileBytes / sizeof(E);

template <typename E>
struct Sweep {
  const E* a;
  int64_t a_stride;   // elements between row blocks
  int64_t row_blocks;  // 1 or 2
  const E* b;
  int64_t b_stride;  // elements between panels
  int64_t num_panels;
  int64_t num_tiles;  // along K
  float* c;
  int64_t c_stride;  // elements between panels
  bool accumulate;
};

// fp32 by fused multiply-add: kFmaRows rows x P panels in registers. Every kSumTiles tiles, 64 products, they join C:
// one long sum over K would lose several times the accuracy of a library's blocked product.
constexpr int64_t kSumTiles = 4;

#if defined(__AVX512F__)
constexpr int kFmaRows = 8, kFmaPanels = 2;
#elif defined(__AVX2__)
constexpr int kFmaRows = 4, kFmaPanels = 1;
#else
constexpr int kFmaRows = 2, kFmaPanels = 1;
#endif

template <int P>
void fma_block(const Sweep<float>& s, const float* a, const float* b, float* c) {
  constexpr int kParts = int(kTile) / kLanes, kColumns = P * kParts;
  const auto offset = [](int v, int64_t stride) { return v / kParts * stride + v % kParts * kLanes; };
  const int64_t b_stride = s.b_stride, c_stride = s.c_stride;
  for (int64_t t = 0; t < most(1, s.num_tiles); t += kSumTiles) {
    f32v acc[kFmaRows][kColumns] = {};
    for (int64_t i = t; i < least(s.num_tiles, t + kSumTiles); ++i, a += kTileSize<float>)
      for (int w = 0; w < kTile; ++w, b += kTile) {
        f32v column[kColumns];
#pragma GCC unroll 8
        for (int v = 0; v < kColumns; ++v) column[v] = load(b + offset(v, b_stride));
#pragma GCC unroll 8
        for (int r = 0; r < kFmaRows; ++r)
#pragma GCC unroll 8
          for (int v = 0; v < kColumns; ++v) acc[r][v] += a[r * kTile + w] * column[v];
      }
    const bool first = t == 0 && !s.accumulate;
#pragma GCC unroll 8
    for (int r = 0; r < kFmaRows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kColumns; ++v) {
        float* to = c + r * kTile + offset(v, c_stride);
        store(to, first ? acc[r][v] : load(to) + acc[r][v]);
      }
  }
}

void sweep_fma(const Sweep<float>& s) {
  for (int64_t p = 0; p < s.num_panels;) {
    const bool wide = p + kFmaPanels <= s.num_panels;
    for (int64_t r = 0; r < s.row_blocks * kTile; r += kFmaRows) {
      const float* a = s.a + r / kTile * s.a_stride + r % kTile * kTile;
      const float* b = s.b + p * s.b_stride;
      float* c = s.c + p * s.c_stride + r * kTile;
      if (wide)
        fma_block<kFmaPanels>(s, a, b, c);
      else
        fma_block<1>(s, a, b, c);
    }
    p += wide ? kFmaPanels : 1;
  }
}

#if defined(__AVX512F__)

// bf16 pairs by VDPBF16PS: 8 rows x P panels in registers.

#define MGRPO_BF16 __attribute__((target("avx512bf16")))

template <int P>
MGRPO_BF16 void dot_block(const Sweep<bf16>& s, const bf16* a, const bf16* b, float* c) {
  constexpr int kRows = 8;
  __m512 acc[kRows][P];
  for (int r = 0; r < kRows; ++r)
    for (int p = 0; p < P; ++p)
      acc[r][p] = s.accumulate ? _mm512_load_ps(c + p * s.c_stride + r * kTile) : _mm512_setzero_ps();
  for (int64_t t = 0; t < s.num_tiles; ++t, a += kTileSize<bf16>, b += kTileSize<bf16>)
    for (int w = 0; w < kTile; ++w) {
      __m512bh column[P];
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) column[p] = (__m512bh)_mm512_load_si512(b + p * s.b_stride + w * kDepth<bf16>);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        int32_t pair;
        std::memcpy(&pair, a + r * kDepth<bf16> + w * 2, sizeof pair);
        const __m512bh row = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) acc[r][p] = _mm512_dpbf16_ps(acc[r][p], row, column[p]);
      }
    }
  for (int r = 0; r < kRows; ++r)
    for (int p = 0; p < P; ++p) _mm512_store_ps(c + p * s.c_stride + r * kTile, acc[r][p]);
}

void sweep_dot(const Sweep<bf16>& s) {
  for (int64_t p = 0; p < s.num_panels; p += 2)
    for (int64_t r = 0; r < s.row_blocks * kTile; r += 8) {
      const bf16* a = s.a + r / kTile * s.a_stride + r % kTile * kDepth<bf16>;
      const bf16* b = s.b + p * s.b_stride;
      float* c = s.c + p * s.c_stride + r * kTile;
      if (p + 2 <= s.num_panels)
        dot_block<2>(s, a, b, c);
      else
        dot_block<1>(s, a, b, c);
    }
}

// bf16 pairs by AMX: 2 x 2 tiles of C in registers 0..3, A in 4 and 5, B in 6 and 7.

#define MGRPO_AMX __attribute__((target("amx-tile,amx-bf16")))

struct TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

MGRPO_AMX __attribute__((noinline)) void amx_begin() {
  TileConfig config = {};
  config.palette = 1;
  for (int i = 0; i < 8; ++i) config.row_bytes[i] = 64, config.rows[i] = 16;
  // The barrier keeps the stores: GCC 12 declares that the instruction reads 8 bytes of the 64.
  asm volatile("" ::"r"(&config) : "memory");
  _tile_loadconfig(&config);
}

MGRPO_AMX __attribute__((noinline)) void amx_end() { _tile_release(); }

template <bool kTwoRows, bool kTwoPanels>
MGRPO_AMX MGRPO_INLINE void amx_block(const Sweep<bf16>& s, const bf16* b, float* c) {
  constexpr int64_t kRowBytes = 64;
  const bf16* a = s.a;
  if (s.accumulate) {
    _tile_stream_loadd(0, c, kRowBytes);
    if (kTwoRows) _tile_stream_loadd(2, c + kTile * kTile, kRowBytes);
    if (kTwoPanels) _tile_stream_loadd(1, c + s.c_stride, kRowBytes);
    if (kTwoRows && kTwoPanels) _tile_stream_loadd(3, c + s.c_stride + kTile * kTile, kRowBytes);
  } else {
    _tile_zero(0);
    if (kTwoRows) _tile_zero(2);
    if (kTwoPanels) _tile_zero(1);
    if (kTwoRows && kTwoPanels) _tile_zero(3);
  }
  for (int64_t t = 0; t < s.num_tiles; ++t, a += kTileSize<bf16>, b += kTileSize<bf16>) {
    _tile_stream_loadd(6, b, kRowBytes);
    _tile_loadd(4, a, kRowBytes);
    _tile_dpbf16ps(0, 4, 6);
    if (kTwoPanels) _tile_stream_loadd(7, b + s.b_stride, kRowBytes);
    if (kTwoPanels) _tile_dpbf16ps(1, 4, 7);
    if (kTwoRows) _tile_loadd(5, a + s.a_stride, kRowBytes);
    if (kTwoRows) _tile_dpbf16ps(2, 5, 6);
    if (kTwoRows && kTwoPanels) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, kRowBytes);
  if (kTwoRows) _tile_stored(2, c + kTile * kTile, kRowBytes);
  if (kTwoPanels) _tile_stored(1, c + s.c_stride, kRowBytes);
  if (kTwoRows && kTwoPanels) _tile_stored(3, c + s.c_stride + kTile * kTile, kRowBytes);
}

template <bool kTwoRows>
MGRPO_AMX MGRPO_INLINE void amx_rows(const Sweep<bf16>& s) {
  int64_t p = 0;
  for (; p + 2 <= s.num_panels; p += 2) amx_block<kTwoRows, true>(s, s.b + p * s.b_stride, s.c + p * s.c_stride);
  if (p < s.num_panels) amx_block<kTwoRows, false>(s, s.b + p * s.b_stride, s.c + p * s.c_stride);
}

MGRPO_AMX __attribute__((noinline)) void sweep_amx(const Sweep<bf16>& s) {
  asm volatile("" ::: "memory");  // the tile loads do not tell the compiler which memory they read
  if (s.row_blocks == 2)
    amx_rows<true>(s);
  else
    amx_rows<false>(s);
}

#endif  // __AVX512F__

// What a core needs around its sweeps, for packed elements of type E.
template <typename E>
struct Core {
  void (*sweep)(const Sweep<E>&);
  bool amx;

  void begin() const {
#if defined(__AVX512F__)
    if (amx) amx_begin();
#endif
  }
  void end() const {
#if defined(__AVX512F__)
    if (amx) amx_end();
#endif
  }
};

// Packing. `S` is the type in memory, `E` the packed one: equal, or E is float.

// 64 bytes from `count` elements; zeros follow where there are fewer.
template <typename S>
MGRPO_INLINE void copy_words(const S* from, int64_t count, float* to) {
  for (int64_t i = 0; i < kTile; i += kLanes) {
    const int64_t here = count - i;
    store(to + i, here >= kLanes ? load(from + i) : here > 0 ? load_part(from + i, int(here), 0.0f) : f32v{});
  }
}

MGRPO_INLINE void copy_words(const bf16* from, int64_t count, bf16* to) {
  if (count >= kDepth<bf16>) {
    std::memcpy(to, from, 64);
  } else {
    std::memset(to, 0, 64);
    if (count > 0) std::memcpy(to, from, size_t(count) * sizeof(bf16));
  }
}

// 16 x 16 words of 32 bits.
void transpose(const void* in, void* out) {
#if defined(__AVX512F__)
  __m512i m[16], n[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) m[i] = _mm512_load_si512(static_cast<const char*>(in) + 64 * i);
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    n[i] = _mm512_unpacklo_epi32(m[i], m[i + 1]);
    n[i + 1] = _mm512_unpackhi_epi32(m[i], m[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      m[i + 2 * j] = _mm512_unpacklo_epi64(n[i + j], n[i + j + 2]);
      m[i + 2 * j + 1] = _mm512_unpackhi_epi64(n[i + j], n[i + j + 2]);
    }
  // Lane l (of 128 bits) of m[4 q + c] now holds column 4 l + c of the rows 4 q to 4 q + 3.
  char* to = static_cast<char*>(out);
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i even = _mm512_shuffle_i32x4(m[c], m[4 + c], 0x88), odd = _mm512_shuffle_i32x4(m[c], m[4 + c], 0xdd);
    const __m512i even2 = _mm512_shuffle_i32x4(m[8 + c], m[12 + c], 0x88);
    const __m512i odd2 = _mm512_shuffle_i32x4(m[8 + c], m[12 + c], 0xdd);
    _mm512_store_si512(to + 64 * c, _mm512_shuffle_i32x4(even, even2, 0x88));
    _mm512_store_si512(to + 64 * (4 + c), _mm512_shuffle_i32x4(odd, odd2, 0x88));
    _mm512_store_si512(to + 64 * (8 + c), _mm512_shuffle_i32x4(even, even2, 0xdd));
    _mm512_store_si512(to + 64 * (12 + c), _mm512_shuffle_i32x4(odd, odd2, 0xdd));
  }
#else
  const uint32_t* from = static_cast<const uint32_t*>(in);
  uint32_t* to = static_cast<uint32_t*>(out);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) to[16 * j + i] = from[16 * i + j];
#endif
}

// A tiles of 16 rows, of which `rows` exist, and `columns` of K from row-major memory. Row after row within a tile:
// the processor then prefetches 16 streams, and memory is read twice as fast as along one row.
template <typename S, typename E>
void pack_rows(const S* from, int64_t ld, int64_t rows, int64_t columns, E* to) {
  for (int64_t k = 0; k < columns; k += kDepth<E>, to += kTileSize<E>)
    if (rows >= kTile && columns - k >= kDepth<E>)
#pragma GCC unroll 16
      for (int64_t r = 0; r < kTile; ++r) copy_words(from + r * ld + k, kDepth<E>, to + r * kDepth<E>);
    else
      for (int64_t r = 0; r < kTile; ++r) copy_words(from + r * ld + k, r < rows ? columns - k : 0, to + r * kDepth<E>);
}

// B tiles of a panel whose 16 columns, of which `rows` exist, are rows in memory: K is contiguous there.
template <typename S, typename E>
void pack_transposed(const S* from, int64_t ld, int64_t rows, int64_t columns, E* to) {
  alignas(64) E tile[kTileSize<E>];
  for (int64_t k = 0; k < columns; k += kDepth<E>, to += kTileSize<E>) {
    for (int64_t r = 0; r < kTile; ++r)
      copy_words(from + r * ld + k, r < rows ? columns - k : 0, tile + r * kDepth<E>);
    transpose(tile, to);
  }
}

// One word row of B for one panel, from `rows` rows and `columns` columns of memory with K along the rows.
template <typename S>
MGRPO_INLINE void pack_word_row(const S* from, int64_t, int64_t rows, int64_t columns, float* to) {
  copy_words(from, rows > 0 ? columns : 0, to);
}

MGRPO_INLINE void pack_word_row(const bf16* from, int64_t ld, int64_t rows, int64_t columns, bf16* to) {
  bf16 even[kTile] = {}, odd[kTile] = {};
  const bf16 *low = from, *high = from + ld;
  if (rows < 2 || columns < kTile) {
    const size_t bytes = size_t(least(columns, kTile)) * sizeof(bf16);
    if (rows > 0) std::memcpy(even, low, bytes);
    if (rows > 1) std::memcpy(odd, high, bytes);
    low = even, high = odd;
  }
  for (int64_t i = 0; i < kTile; i += kLanes) {
    u16v a, b;
    std::memcpy(&a, low + i, sizeof a);
    std::memcpy(&b, high + i, sizeof b);
    const u32v words = __builtin_convertvector(a, u32v) | __builtin_convertvector(b, u32v) << 16;
    std::memcpy(to + 2 * i, &words, sizeof words);
  }
}

// The same for two whole panels.
template <typename S>
MGRPO_INLINE void pack_word_rows(const S* from, int64_t, float* to, int64_t panel) {
  copy_words(from, kTile, to);
  copy_words(from + kTile, kTile, to + panel);
}

MGRPO_INLINE void pack_word_rows(const bf16* from, int64_t ld, bf16* to, int64_t panel) {
#if defined(__AVX512F__)
  alignas(64) static const int16_t kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                               8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  const __m512i even = _mm512_loadu_si512(from), odd = _mm512_loadu_si512(from + ld);
  _mm512_store_si512(to, _mm512_permutex2var_epi16(even, low, odd));
  _mm512_store_si512(to + panel, _mm512_permutex2var_epi16(even, high, odd));
#else
  pack_word_row(from, ld, 2, kTile, to);
  pack_word_row(from + kTile, ld, 2, kTile, to + panel);
#endif
}

// B panels [columns / 16] of `depth` tiles along K from memory with K along the rows, of which `rows` exist.
template <typename S, typename E>
void pack_columns(const S* from, int64_t ld, int64_t rows, int64_t columns, int64_t depth, E* to) {
  constexpr int64_t kStep = 4 / sizeof(E);  // rows of K in a word
  const int64_t panel = depth * kTileSize<E>;
  for (int64_t w = 0; w < depth * kTile; ++w) {
    const S* row = from + w * kStep * ld;
    E* out = to + w * kDepth<E>;
    int64_t j = 0;
    if (rows - w * kStep >= kStep)
      for (; j + 2 * kTile <= columns; j += 2 * kTile) pack_word_rows(row + j, ld, out + j / kTile * panel, panel);
    for (; j < columns; j += kTile)
      pack_word_row(row + j, ld, rows - w * kStep, columns - j, out + j / kTile * panel);
  }
}

}  // namespace
}  // namespace MGRPO_ISA
}  // namespace mgrpo
