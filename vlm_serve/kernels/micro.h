// The product that all matrix kernels are made of: a few rows times a few vectors of columns, held in registers.

#pragma once

#include <cstdint>

#include "vector.h"

namespace {

#if defined(__AVX512F__)
constexpr int MICRO_ROWS = 6, MICRO_VECTORS = 4;  // accumulators that fit the registers
#else
constexpr int MICRO_ROWS = 4, MICRO_VECTORS = 2;
#endif

// Loops over registers: left rolled, their arrays would live in memory.
#define UNROLLED _Pragma("GCC unroll 16")

inline Floats multiply_add(Floats sum, float a, Floats b) { return sum + broadcast(a) * b; }

#if defined(__AVX512BF16__)
// Pairs of bfloat16, multiplied and summed by one instruction.
inline Floats multiply_add(Floats sum, uint32_t a, __m512bh b) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(a))), b);
}
#endif

// C[ROWS, VECTORS * LANES] = A[ROWS, depth] B[depth, VECTORS * LANES], or += if it accumulates
template <int ROWS, int VECTORS, bool ACCUMULATE, typename Right>
inline void multiply_micro(int64_t depth, const typename Right::Left* a, int64_t lda, const Right& b, int64_t column,
                           float* c, int64_t ldc) {
  Floats sums[ROWS][VECTORS];
  UNROLLED for (int row = 0; row < ROWS; ++row)
    UNROLLED for (int vector = 0; vector < VECTORS; ++vector)
      sums[row][vector] = ACCUMULATE ? load(c + row * ldc + vector * LANES) : Floats{};
  for (int64_t k = 0; k < depth; ++k) {
    decltype(b.at(0, 0)) columns[VECTORS];
    UNROLLED for (int vector = 0; vector < VECTORS; ++vector) columns[vector] = b.at(k, column + vector * LANES);
    UNROLLED for (int row = 0; row < ROWS; ++row)
      UNROLLED for (int vector = 0; vector < VECTORS; ++vector)
        sums[row][vector] = multiply_add(sums[row][vector], a[row * lda + k], columns[vector]);
  }
  UNROLLED for (int row = 0; row < ROWS; ++row)
    UNROLLED for (int vector = 0; vector < VECTORS; ++vector) store(c + row * ldc + vector * LANES, sums[row][vector]);
}

// As above for the rows that are left after blocks of MICRO_ROWS.
template <int VECTORS, bool ACCUMULATE, typename Right>
inline void multiply_last_rows(int64_t rows, int64_t depth, const typename Right::Left* a, int64_t lda, const Right& b,
                               int64_t column, float* c, int64_t ldc) {
  static_assert(MICRO_ROWS <= 6);
  switch (rows) {
    case 5: return multiply_micro<5, VECTORS, ACCUMULATE>(depth, a, lda, b, column, c, ldc);
    case 4: return multiply_micro<4, VECTORS, ACCUMULATE>(depth, a, lda, b, column, c, ldc);
    case 3: return multiply_micro<3, VECTORS, ACCUMULATE>(depth, a, lda, b, column, c, ldc);
    case 2: return multiply_micro<2, VECTORS, ACCUMULATE>(depth, a, lda, b, column, c, ldc);
    case 1: return multiply_micro<1, VECTORS, ACCUMULATE>(depth, a, lda, b, column, c, ldc);
  }
}

}  // namespace
