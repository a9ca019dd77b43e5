// Root-mean-square norm, rounded where the reference is. Contracts: dispatch.rms_norm, dispatch.add_rms_norm.

#include <torch/csrc/stable/library.h>

#include <cmath>

#include "rows.h"

namespace {

using torch::stable::Tensor;

template <typename T>
void norm_row(T* to, const T* from, const T* scale, int64_t width, double eps, float offset) {
  Floats squares{};
  for (int64_t i = 0; i < width; i += LANES) {
    const Floats part = load(from + i, width - i);
    squares += part * part;
  }
  const float factor = 1.0f / std::sqrt(sum_of_lanes(squares) / static_cast<float>(width) + static_cast<float>(eps));
  for (int64_t i = 0; i < width; i += LANES) {
    const Floats normal = load(from + i, width - i) * factor, weight = load(scale + i, width - i);
    store(to + i, offset == 0.0f ? rounded<T>(normal) * weight : normal * (weight + offset), width - i);
  }
}

void check(const Tensor& out, const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(out.is_contiguous() && x.is_contiguous() && weight.is_contiguous() && out.numel() == x.numel() &&
                      (weight.numel() == 0 ? 0 : x.numel() / weight.numel() * weight.numel()) == x.numel(),
                  "x and weight must be contiguous and of one width");
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type() && out.scalar_type() == x.scalar_type(),
                  "x and weight must be of one dtype");
}

int64_t rows_of(const Tensor& x, int64_t width) { return width == 0 ? 0 : x.numel() / width; }

void rms_norm(const Tensor& out, const Tensor& x, const Tensor& weight, double eps, double offset) {
  check(out, x, weight);
  const int64_t width = weight.numel();
  by_dtype(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* const scale = static_cast<const T*>(weight.data_ptr());
    const T* const from = static_cast<const T*>(x.data_ptr());
    T* const to = static_cast<T*>(out.data_ptr());
    for_rows(rows_of(x, width), width, [&](int64_t row) {
      norm_row(to + row * width, from + row * width, scale, width, eps, static_cast<float>(offset));
    });
  });
}

void add_rms_norm(const Tensor& out, const Tensor& residual, const Tensor& x, const Tensor& weight, double eps,
                  double offset) {
  check(out, x, weight);
  check(residual, x, weight);
  const int64_t width = weight.numel();
  by_dtype(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* const scale = static_cast<const T*>(weight.data_ptr());
    const T* const from = static_cast<const T*>(x.data_ptr());
    T* const sums = static_cast<T*>(residual.data_ptr());
    T* const to = static_cast<T*>(out.data_ptr());
    for_rows(rows_of(x, width), width, [&](int64_t row) {
      T* const sum = sums + row * width;
      for (int64_t i = 0; i < width; i += LANES)
        store(sum + i, load(sum + i, width - i) + load(from + row * width + i, width - i), width - i);
      norm_row(to + row * width, sum, scale, width, eps, static_cast<float>(offset));
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vlm_serve, m) {
  m.def("rms_norm(Tensor(a!) out, Tensor x, Tensor weight, float eps, float offset) -> ()");
  m.def("add_rms_norm(Tensor(a!) out, Tensor(b!) residual, Tensor x, Tensor weight, float eps, float offset) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vlm_serve, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
}
