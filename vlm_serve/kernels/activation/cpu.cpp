// SiLU of the gate, rounded, times the other half. Contract: dispatch.silu_and_mul.

#include <torch/csrc/stable/library.h>

#include "rows.h"

namespace {

using torch::stable::Tensor;

void silu_and_mul(const Tensor& out, const Tensor& gate_up) {
  const int64_t width = out.dim() == 0 ? 0 : out.size(out.dim() - 1), rows = width == 0 ? 0 : out.numel() / width;
  STD_TORCH_CHECK(out.is_contiguous() && gate_up.is_contiguous() && gate_up.numel() == 2 * out.numel() &&
                      out.scalar_type() == gate_up.scalar_type(),
                  "gate_up must be contiguous and twice as wide as the output");
  by_dtype(out, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* const from = static_cast<const T*>(gate_up.data_ptr());
    T* const to = static_cast<T*>(out.data_ptr());
    for_rows(rows, width, [&](int64_t row) {
      const T *gate = from + 2 * row * width, *up = gate + width;
      for (int64_t i = 0; i < width; i += LANES)
        store(to + row * width + i, rounded<T>(silu(load(gate + i, width - i))) * load(up + i, width - i), width - i);
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vlm_serve, m) { m.def("silu_and_mul(Tensor(a!) out, Tensor gate_up) -> ()"); }

STABLE_TORCH_LIBRARY_IMPL(vlm_serve, CPU, m) { m.impl("silu_and_mul", TORCH_BOX(&silu_and_mul)); }
