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

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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

// x W^T + b, by panels of outputs and slabs of rows.
class Product {
 public:
  Product(const Tensor& x, const Tensor& panels, const std::optional<Tensor>& bias, int64_t width)
      : rows_(x.size(0)), pairs_(panels.size(1)), width_(width), panels_(panels.size(0)) {
    STD_TORCH_CHECK(x.dim() == 2 && panels.dim() == 4 && x.is_contiguous() && panels.is_contiguous() &&
                        x.size(1) == 2 * pairs_ && panels.size(2) == COLUMNS && panels.size(3) == 2 &&
                        panels_ == ceil_div(width, COLUMNS),
                    "x must be contiguous [rows, in], the weight [panels, in / 2, columns, 2] of as many outputs");
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16 && panels.scalar_type() == ScalarType::BFloat16,
                    "x and the weight must be bfloat16");
    STD_TORCH_CHECK(!bias || (bias->scalar_type() == ScalarType::BFloat16 && bias->is_contiguous() && bias->numel() == width),
                    "the bias must be bfloat16, one value an output");
    x_ = static_cast<const uint32_t*>(x.data_ptr());
    weight_ = static_cast<const uint32_t*>(panels.data_ptr());
    bias_ = bias ? static_cast<const BFloat16*>(bias->data_ptr()) : nullptr;
  }

  // Calls `task(panel, first row, rows)` for `panels` panels and all rows, in parallel.
  template <typename Task>
  void for_tasks(int64_t panels, const Task& task) const {
    if (rows_ == 0) return;
    const int64_t threads = torch::stable::get_num_threads(), wanted = ceil_div(TASKS_PER_THREAD * threads, panels);
    const int64_t parts = std::max(ceil_div(rows_, SLAB_ROWS), std::min(ceil_div(rows_, 2 * MICRO_ROWS), wanted));
    const int64_t slab_rows = ceil_div(rows_, parts * MICRO_ROWS) * MICRO_ROWS, slabs = ceil_div(rows_, slab_rows);
    // Each thread has a run of tasks, so that the next panel in memory is the one that it needs next.
    torch::stable::parallel_for(0, panels * slabs, ceil_div(panels * slabs, threads), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i % slabs * slab_rows;
        task(i / slabs, first, std::min(slab_rows, rows_ - first));
      }
    });
  }

  // One task's part of the result -> out[rows, columns of the panel]. Panel `next` is fetched meanwhile.
  void compute(int64_t panel, int64_t next, int64_t first, int64_t rows, BFloat16* out, int64_t stride) const {
    alignas(64) static thread_local float sums[SLAB_ROWS * COLUMNS];
    for (int64_t pair = 0; pair < pairs_; pair += SLICE_PAIRS) {
      const int64_t depth = std::min(SLICE_PAIRS, pairs_ - pair);
      const bool is_last = pair + depth == pairs_;
      const Panel slice{at(panel, pair), is_last ? at(next, 0) : at(panel, pair + depth)};
      (pair == 0 ? multiply_panel<false> : multiply_panel<true>)(rows, depth, x_ + first * pairs_ + pair, pairs_, slice, sums);
    }
    const int64_t column = panel * COLUMNS;
    write_sums(rows, std::min(COLUMNS, width_ - column), sums, bias_ ? bias_ + column : nullptr, out, stride);
  }

  int64_t panels() const { return panels_; }

 private:
  const uint32_t* at(int64_t panel, int64_t pair) const { return weight_ + (panel * pairs_ + pair) * COLUMNS; }

  int64_t rows_, pairs_, width_, panels_;
  const uint32_t *x_, *weight_;
  const BFloat16* bias_;
};

BFloat16* output_of(const Tensor& out, const Tensor& x) {
  STD_TORCH_CHECK(out.dim() == 2 && out.is_contiguous() && out.scalar_type() == ScalarType::BFloat16 &&
                      out.size(0) == x.size(0),
                  "out must be contiguous bfloat16, a row for each of x");
  return static_cast<BFloat16*>(out.data_ptr());
}

void panel_linear(const Tensor& out, const Tensor& x, const Tensor& panels, const std::optional<Tensor>& bias) {
  BFloat16* const to = output_of(out, x);
  const int64_t width = out.size(1);
  const Product product(x, panels, bias, width);
  product.for_tasks(product.panels(), [&](int64_t panel, int64_t first, int64_t rows) {
    product.compute(panel, panel + 1, first, rows, to + first * width + panel * COLUMNS, width);
  });
}

// The gate's outputs are the first half of the panels. Both halves are rounded before they meet, and the gate's SiLU, as
// in two operators.
void panel_silu_and_mul(const Tensor& out, const Tensor& x, const Tensor& panels, const std::optional<Tensor>& bias) {
  BFloat16* const to = output_of(out, x);
  const int64_t width = out.size(1);
  STD_TORCH_CHECK(width % COLUMNS == 0, "a panel must not have outputs of both halves");
  const Product product(x, panels, bias, 2 * width);
  const int64_t half = product.panels() / 2;
  product.for_tasks(half, [&](int64_t panel, int64_t first, int64_t rows) {
    alignas(64) static thread_local BFloat16 gate[SLAB_ROWS * COLUMNS], up[SLAB_ROWS * COLUMNS];
    product.compute(panel, half + panel, first, rows, gate, COLUMNS);
    product.compute(half + panel, panel + 1, first, rows, up, COLUMNS);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t i = row * COLUMNS; i < (row + 1) * COLUMNS; i += LANES)
        store(to + (first + row) * width + panel * COLUMNS + i % COLUMNS,
              rounded<BFloat16>(silu(load(gate + i))) * load(up + i));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vlm_serve, m) {
  m.def("panel_linear(Tensor(a!) out, Tensor x, Tensor panels, Tensor? bias) -> ()");
  m.def("panel_silu_and_mul(Tensor(a!) out, Tensor x, Tensor panels, Tensor? bias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vlm_serve, CPU, m) {
  m.impl("panel_linear", TORCH_BOX(&panel_linear));
  m.impl("panel_silu_and_mul", TORCH_BOX(&panel_silu_and_mul));
}

#endif
