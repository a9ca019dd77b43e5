// The products of a tile of attention with a block of keys and values, and the transposition of keys that they need.

#pragma once

#include <algorithm>
#include <cstdint>

#include "micro.h"

namespace {

constexpr int KEYS = 64;  // keys in a block

inline void fetch(const void* address) { __builtin_prefetch(address, 0, 2); }  // into the second-level cache

// The right-hand side of a product: float32 rows end to end, or rows of any type where they lie in the cache.
struct Matrix {
  using Left = float;
  const float* data;
  int64_t stride;
  Floats at(int64_t k, int64_t column) const { return load(data + k * stride + column); }
};

// While a line of a row is read, the same line of the row in `ahead` is fetched.
template <typename T>
struct CacheRows {
  using Left = float;
  const T* const* rows;
  const T* const* ahead;
  Floats at(int64_t k, int64_t column) const {
    if (column % (64 / sizeof(T)) == 0) fetch(ahead[k] + column);
    return load(rows[k] + column);
  }
  Floats at(int64_t k, int64_t column, int64_t count) const {
    if (column % (64 / sizeof(T)) == 0) fetch(ahead[k] + column);
    return load(rows[k] + column, count);
  }
};

#if defined(__AVX512BF16__)
// Pairs of bfloat16 as they are.
struct PairMatrix {
  using Left = uint32_t;
  const uint32_t* data;
  int64_t stride;
  __m512bh at(int64_t k, int64_t column) const {
    return reinterpret_cast<__m512bh>(_mm512_loadu_si512(data + k * stride + column));
  }
};
#endif

template <int VECTORS, bool ACCUMULATE, typename Right>
void multiply_columns(int64_t rows, int64_t depth, const typename Right::Left* a, int64_t lda, const Right& b,
                      int64_t column, float* c, int64_t ldc) {
  for (; rows >= MICRO_ROWS; rows -= MICRO_ROWS, a += MICRO_ROWS * lda, c += MICRO_ROWS * ldc)
    multiply_micro<MICRO_ROWS, VECTORS, ACCUMULATE>(depth, a, lda, b, column, c, ldc);
  multiply_last_rows<VECTORS, ACCUMULATE>(rows, depth, a, lda, b, column, c, ldc);
}

// scores[rows, KEYS] = queries[rows, depth] keys[depth, KEYS]
template <typename Right>
void multiply_keys(int64_t rows, int64_t depth, const typename Right::Left* queries, const Right& keys, float* scores) {
  for (int64_t column = 0; column < KEYS; column += MICRO_VECTORS * LANES)
    multiply_columns<MICRO_VECTORS, false>(rows, depth, queries, depth, keys, column, scores + column, KEYS);
}

// out[rows, width] += weights[rows, KEYS] values[KEYS, width]
template <typename Right>
void add_values(int64_t rows, int64_t width, const float* weights, const Right& values, float* out) {
  int64_t column = 0;
  for (; column + MICRO_VECTORS * LANES <= width; column += MICRO_VECTORS * LANES)
    multiply_columns<MICRO_VECTORS, true>(rows, KEYS, weights, KEYS, values, column, out + column, width);
  for (; column < width; column += LANES)
    multiply_columns<1, true>(rows, KEYS, weights, KEYS, values, column, out + column, width);
}

#if defined(__AVX512F__)
// 16 rows of 32-bit words, from each those that the mask names -> 16 columns.
inline void transpose_words(const void* const* rows, int64_t word, __mmask16 mask, __m512i* columns) {
  __m512i a[16], b[16];
  UNROLLED for (int i = 0; i < 16; ++i) a[i] = _mm512_maskz_loadu_epi32(mask, static_cast<const int32_t*>(rows[i]) + word);
  UNROLLED for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  UNROLLED for (int i = 0; i < 16; i += 4)
    UNROLLED for (int j = 0; j < 2; ++j) {
      a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
      a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
    }
  UNROLLED for (int i = 0; i < 4; ++i)
    UNROLLED for (int j = 0; j < 16; j += 8) {
      b[i + j] = _mm512_shuffle_i32x4(a[i + j], a[i + j + 4], 0x88);
      b[i + j + 4] = _mm512_shuffle_i32x4(a[i + j], a[i + j + 4], 0xdd);
    }
  UNROLLED for (int i = 0; i < 8; ++i) {
    columns[i] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88);
    columns[i + 8] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd);
  }
}

// Each column of 16 keys' words goes to `put(column, word, first key)`. Lines of `ahead` are fetched as those of `rows`
// are read.
template <typename T, typename Put>
inline void transpose_blocks(const T* const* rows, const T* const* ahead, int64_t words, const Put& put) {
  for (int64_t word = 0; word < words; word += 16) {
    const auto count = std::min<int64_t>(16, words - word);
    const auto mask = static_cast<__mmask16>((1u << count) - 1);
    for (int key = 0; key < KEYS; key += 16) {
      for (int i = 0; i < 16; ++i) fetch(reinterpret_cast<const uint32_t*>(ahead[key + i]) + word);
      __m512i columns[16];
      transpose_words(reinterpret_cast<const void* const*>(rows + key), word, mask, columns);
      UNROLLED for (int i = 0; i < 16; ++i)
        if (i < count) put(columns[i], word + i, key);
    }
  }
}

#endif

}  // namespace
