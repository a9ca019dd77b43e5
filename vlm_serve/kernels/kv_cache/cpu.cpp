// Writing keys and values into the paged KV cache. Contract: dispatch.write_kv_cache.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstring>

namespace {

using torch::stable::Tensor;

struct Source {
  const char* data;
  int64_t token_stride, head_stride;  // bytes

  explicit Source(const Tensor& tensor)
      : data(static_cast<const char*>(tensor.data_ptr())),
        token_stride(tensor.stride(0) * static_cast<int64_t>(tensor.element_size())),
        head_stride(tensor.stride(1) * static_cast<int64_t>(tensor.element_size())) {}
};

void check_cache(const Tensor& rows, const Tensor& cache) {
  STD_TORCH_CHECK(cache.is_contiguous(), "the cache must be contiguous");
  STD_TORCH_CHECK(rows.scalar_type() == cache.scalar_type(), "keys, values and cache must be of one dtype");
  STD_TORCH_CHECK(rows.dim() == 3 && cache.dim() == 4 && rows.size(1) == cache.size(1) && rows.size(2) == cache.size(3),
                  "keys and values must be [tokens, kv_heads, head_dim], the cache [blocks, kv_heads, block_size, head_dim]");
  STD_TORCH_CHECK(rows.size(2) == 1 || rows.stride(2) == 1, "the head dimension must be contiguous");
}

void write_kv_cache(const Tensor& key, const Tensor& value, const Tensor& key_cache, const Tensor& value_cache,
                    const Tensor& slot_mapping) {
  check_cache(key, key_cache);
  check_cache(value, value_cache);
  STD_TORCH_CHECK(slot_mapping.scalar_type() == torch::headeronly::ScalarType::Long && slot_mapping.is_contiguous() &&
                      slot_mapping.numel() == key.size(0) && value.size(0) == key.size(0),
                  "slot_mapping must be int64 with one slot a token");
  const int64_t tokens = key.size(0), heads = key.size(1), block_size = key_cache.size(2);
  const int64_t slots = key_cache.size(0) * block_size;
  const int64_t row_bytes = key.size(2) * static_cast<int64_t>(key.element_size());
  STD_TORCH_CHECK(value_cache.size(0) * value_cache.size(2) == slots && value_cache.size(2) == block_size,
                  "the caches must be of one shape");
  const Source keys(key), values(value);
  char* key_pages = static_cast<char*>(key_cache.data_ptr());
  char* value_pages = static_cast<char*>(value_cache.data_ptr());
  const int64_t* slot_of = static_cast<const int64_t*>(slot_mapping.data_ptr());
  for (int64_t token = 0; token < tokens; ++token)
    STD_TORCH_CHECK(slot_of[token] < slots, "a slot lies past the end of the cache");

  torch::stable::parallel_for(0, tokens, 64, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      if (slot_of[token] < 0) continue;
      const int64_t block = slot_of[token] / block_size, offset = slot_of[token] % block_size;
      for (int64_t head = 0; head < heads; ++head) {
        const int64_t row = ((block * heads + head) * block_size + offset) * row_bytes;
        std::memcpy(key_pages + row, keys.data + token * keys.token_stride + head * keys.head_stride, row_bytes);
        std::memcpy(value_pages + row, values.data + token * values.token_stride + head * values.head_stride, row_bytes);
      }
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vlm_serve, m) {
  m.def(
      "write_kv_cache(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor slot_mapping) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vlm_serve, CPU, m) { m.impl("write_kv_cache", TORCH_BOX(&write_kv_cache)); }
