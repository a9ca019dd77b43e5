// Root-mean-square norm. Contract: dispatch.rms_norm.

#include <torch/csrc/stable/library.h>

#include <cmath>

#include "rows.h"

namespace {

using torch::stable::Tensor;

void rms_norm(const Tensor& out, const Tensor& x, const Tensor& weight, double eps) {
  const int64_t width = weight.numel(), rows = width == 0 ? 0 : x.numel() / width;
  STD_TORCH_CHECK(out.is_contiguous() && x.is_contiguous() && weight.is_contiguous() && out.numel() == x.numel() &&
                      rows * width == x.numel(),
                  "x and weight must be contiguous and of one width");
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type() && out.scalar_type() == x.scalar_type(),
                  "x and weight must be of one dtype");
  by_dtype(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* const scale = static_cast<const T*>(weight.data_ptr());
    const T* const from = static_cast<const T*>(x.data_ptr());
    T* const to = static_cast<T*>(out.data_ptr());
    for_rows(rows, width, [&](int64_t row) {
      Floats squares{};
      for (int64_t i = 0; i < width; i += LANES) {
        const Floats part = load(from + row * width + i, width - i);
        squares += part * part;
      }
      const float factor = 1.0f / std::sqrt(sum_of_lanes(squares) / static_cast<float>(width) + static_cast<float>(eps));
      for (int64_t i = 0; i < width; i += LANES) {
        const Floats part = load(from + row * width + i, width - i) * factor;
        store(to + row * width + i, part * load(scale + i, width - i), width - i);
      }
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vlm_serve, m) {
  m.def("rms_norm(Tensor(a!) out, Tensor x, Tensor weight, float eps) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vlm_serve, CPU, m) { m.impl("rms_norm", TORCH_BOX(&rms_norm)); }
