// What the C++ operators over rows of a tensor share.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>

#include "vector.h"

// Calls `operation` with a null pointer of the tensor's element type.
template <typename Operation>
void by_dtype(const torch::stable::Tensor& tensor, const Operation& operation) {
  using torch::headeronly::ScalarType;
  if (tensor.scalar_type() == ScalarType::Float)
    operation(static_cast<float*>(nullptr));
  else if (tensor.scalar_type() == ScalarType::BFloat16)
    operation(static_cast<BFloat16*>(nullptr));
  else
    STD_TORCH_CHECK(false, "the C++ operators take float32 and bfloat16");
}

// Calls `operation(row)` for each row, in parallel where there is enough to do.
template <typename Operation>
void for_rows(int64_t rows, int64_t width, const Operation& operation) {
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, width));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) operation(row);
  });
}
