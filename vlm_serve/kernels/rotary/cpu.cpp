// Rotary position embedding. Contract: dispatch.rotate. In bfloat16 it is to the bit what torch's three operators give.

#include <torch/csrc/stable/library.h>

#include "rows.h"

namespace {

using torch::stable::Tensor;

void rotate(const Tensor& out, const Tensor& x, const Tensor& cos, const Tensor& sin) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(2) % 2 == 0 && x.stride(2) == 1,
                  "x must be [tokens, heads, head_dim] with an even, contiguous head dimension");
  const int64_t tokens = x.size(0), heads = x.size(1), dim = x.size(2), half = dim / 2;
  const int64_t token_stride = x.stride(0), head_stride = x.stride(1);
  STD_TORCH_CHECK(out.is_contiguous() && cos.is_contiguous() && sin.is_contiguous() && out.numel() == x.numel() &&
                      cos.numel() == tokens * dim && sin.numel() == tokens * dim,
                  "cos and sin must be [tokens, 1, head_dim]");
  STD_TORCH_CHECK(cos.scalar_type() == x.scalar_type() && sin.scalar_type() == x.scalar_type() &&
                      out.scalar_type() == x.scalar_type(),
                  "x, cos and sin must be of one dtype");
  by_dtype(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* const input = static_cast<const T*>(x.data_ptr());
    const T* const cosines = static_cast<const T*>(cos.data_ptr());
    const T* const sines = static_cast<const T*>(sin.data_ptr());
    T* const output = static_cast<T*>(out.data_ptr());
    for_rows(tokens, heads * dim, [&](int64_t token) {
      const T *c = cosines + token * dim, *s = sines + token * dim;
      for (int64_t head = 0; head < heads; ++head) {
        const T* from = input + token * token_stride + head * head_stride;
        T* to = output + (token * heads + head) * dim;
        for (int64_t i = 0; i < half; i += LANES) {
          const int64_t count = half - i;
          const Floats first = load(from + i, count), second = load(from + half + i, count);
          store(to + i, rounded<T>(first * load(c + i, count)) - rounded<T>(second * load(s + i, count)), count);
          store(to + half + i,
                rounded<T>(second * load(c + half + i, count)) + rounded<T>(first * load(s + half + i, count)), count);
        }
      }
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vlm_serve, m) {
  m.def("rotate(Tensor(a!) out, Tensor x, Tensor cos, Tensor sin) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vlm_serve, CPU, m) { m.impl("rotate", TORCH_BOX(&rotate)); }
