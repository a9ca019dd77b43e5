// Linear layers in bfloat16 on a CPU that multiplies pairs of it (AVX512-BF16). Contract: dispatch.pack_linear.
//
// The weight lies in panels of COLUMNS outputs, [panels, in / 2, COLUMNS] pairs, so that a panel is read from end to end.
// A task is a panel times a slab of rows. While its rows are multiplied the panel after it is fetched: that one comes
// from memory, and a decode step would wait for it longer than it computes. Every output is one sum over the inputs in
// their order, in float32, so a row's result does not depend on the rows beside it.
//
// Not built where there are matrix tiles (AMX): oneDNN drives those.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>

#include "micro.h"

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t COLUMNS = MICRO_VECTORS * LANES;
constexpr int64_t SLAB_ROWS = 192;  // at most, so that their sums stay in the second-level cache
constexpr int64_t SLICE_PAIRS = 512;  // of a panel at a time, for the same reason
constexpr int64_t TASKS_PER_THREAD = 8;

// A panel from some pair on, and memory that is fetched by a line for each of its pairs.
struct Panel {
  using Left = uint32_t;
  const uint32_t* data;
  const uint32_t* ahead;
  __m512bh at(int64_t pair, int64_t column) const {
    if (column == 0) __builtin_prefetch(ahead + pair * LANES);
    return reinterpret_cast<__m512bh>(_mm512_loadu_si512(data + pair * COLUMNS + column));
  }
};

// sums[rows, COLUMNS] = x[rows, pairs] panel[pairs, COLUMNS], or += if it accumulates
template <bool ACCUMULATE>
void multiply_panel(int64_t rows, int64_t pairs, const uint32_t* x, int64_t stride, Panel panel, float* sums) {
  for (; rows >= MICRO_ROWS; rows -= MICRO_ROWS, x += MICRO_ROWS * stride, sums += MICRO_ROWS * COLUMNS) {
    multiply_micro<MICRO_ROWS, MICRO_VECTORS, ACCUMULATE>(pairs, x, stride, panel, 0, sums, COLUMNS);
    panel.ahead += pairs * LANES;
  }
  multiply_last_rows<MICRO_VECTORS, ACCUMULATE>(rows, pairs, x, stride, panel, 0, sums, COLUMNS);
}

// out[rows, columns] = sums[rows, columns of COLUMNS] + bias[columns]
void write_sums(int64_t rows, int64_t columns, const float* sums, const BFloat16* bias, BFloat16* out, int64_t stride) {
  Floats added[MICRO_VECTORS] = {};
  for (int64_t column = 0; bias && column < columns; column += LANES) added[column / LANES] = load(bias + column, columns - column);
  for (int64_t row = 0; row < rows; ++row, sums += COLUMNS, out += stride)
    if (columns == COLUMNS)
      UNROLLED for (int i = 0; i < MICRO_VECTORS; ++i) store(out + i * LANES, load(sums + i * LANES) + added[i]);
    else
      for (int64_t column = 0; column < columns; column += LANES)
        store(out + column, load(sums + column) + added[column / LANES], columns - column);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

void panel_linear(const Tensor& out, const Tensor& x, const Tensor& panels, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(x.dim() == 2 && out.dim() == 2 && panels.dim() == 4 && x.is_contiguous() && out.is_contiguous() &&
                      panels.is_contiguous(),
                  "x and out must be contiguous [rows, features], the weight [panels, in / 2, columns, 2]");
  const int64_t rows = x.size(0), pairs = panels.size(1), width = out.size(1), count = panels.size(0);
  STD_TORCH_CHECK(x.size(1) == 2 * pairs && out.size(0) == rows && panels.size(2) == COLUMNS && panels.size(3) == 2 &&
                      count == ceil_div(width, COLUMNS),
                  "x, out and the weight do not fit each other");
  for (const Tensor* tensor : {&x, &out, &panels})
    STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::BFloat16, "x, out and the weight must be bfloat16");
  if (bias)
    STD_TORCH_CHECK(bias->scalar_type() == ScalarType::BFloat16 && bias->is_contiguous() && bias->numel() == width,
                    "the bias must be bfloat16, one value an output");
  if (rows == 0) return;
  const auto* const input = static_cast<const uint32_t*>(x.data_ptr());
  const auto* const weight = static_cast<const uint32_t*>(panels.data_ptr());
  const auto* const added = bias ? static_cast<const BFloat16*>(bias->data_ptr()) : nullptr;
  auto* const output = static_cast<BFloat16*>(out.data_ptr());

  const int64_t wanted = TASKS_PER_THREAD * torch::stable::get_num_threads();
  const int64_t parts = std::max(ceil_div(rows, SLAB_ROWS), std::min(ceil_div(rows, 2 * MICRO_ROWS), ceil_div(wanted, count)));
  const int64_t slab_rows = ceil_div(rows, parts * MICRO_ROWS) * MICRO_ROWS;
  const int64_t slabs = ceil_div(rows, slab_rows), tasks = count * slabs;
  // Each thread has a run of tasks, so that the next panel in memory is the one that it needs next.
  torch::stable::parallel_for(0, tasks, ceil_div(tasks, torch::stable::get_num_threads()), [&](int64_t begin, int64_t end) {
    alignas(64) static thread_local float sums[(SLAB_ROWS + MICRO_ROWS) * COLUMNS];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t panel = task / slabs, first = task % slabs * slab_rows, here = std::min(slab_rows, rows - first);
      for (int64_t pair = 0; pair < pairs; pair += SLICE_PAIRS) {
        const int64_t depth = std::min(SLICE_PAIRS, pairs - pair);
        const uint32_t* const data = weight + (panel * pairs + pair) * COLUMNS;
        const Panel slice{data, data + depth * COLUMNS};
        (pair == 0 ? multiply_panel<false> : multiply_panel<true>)(here, depth, input + first * pairs + pair, pairs, slice, sums);
      }
      const int64_t column = panel * COLUMNS;
      write_sums(here, std::min(COLUMNS, width - column), sums, added ? added + column : nullptr,
                 output + first * width + column, width);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vlm_serve, m) {
  m.def("panel_linear(Tensor(a!) out, Tensor x, Tensor panels, Tensor? bias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vlm_serve, CPU, m) { m.impl("panel_linear", TORCH_BOX(&panel_linear)); }

#endif
