// Causal attention of a ragged batch over the paged KV cache. Contract: dispatch.paged_attention.
//
// The batch is cut into the tiles of `tile.h`, which the threads take one by one.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <optional>
#include <vector>

#include "attention/tile.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int TILE_ROWS = 96;  // rows in a tile, at least the query heads of one key/value head

template <typename T>
std::vector<Task> tasks_of(const Batch<T>& batch, const int32_t* query_start, const int32_t* kv_lengths,
                           int64_t sequences) {
  const int64_t tile_tokens = std::max<int64_t>(1, TILE_ROWS / batch.group);
  std::vector<Task> tasks;
  for (int64_t sequence = 0; sequence < sequences; ++sequence) {
    const int64_t start = query_start[sequence], end = query_start[sequence + 1];
    const int64_t first_position = kv_lengths[sequence] - (end - start);
    for (int64_t kv_head = 0; kv_head < batch.kv_heads; ++kv_head)
      for (int64_t token = start; token < end; token += tile_tokens) {
        const int64_t tokens = std::min(tile_tokens, end - token), position = first_position + token - start;
        tasks.push_back({sequence, kv_head, token, tokens, position, batch.seen(token, tokens, position)});
      }
  }
  return tasks;
}

template <typename T>
void run(const Batch<T>& batch, const std::vector<Task>& tasks) {
  // Tasks differ widely in cost (a decode, a long prefill), so threads take the next one as they come free.
  std::atomic<size_t> next{0};
  const auto threads = std::min<int64_t>(torch::stable::get_num_threads(), static_cast<int64_t>(tasks.size()));
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    static thread_local Scratch scratch;
    const auto take = [&] {
      const size_t index = next.fetch_add(1);
      return index < tasks.size() ? &tasks[index] : nullptr;
    };
    const Task* following = take();
    while (const Task* const task = following) {
      following = take();
      (batch.window ? attend<T, true> : attend<T, false>)(batch, *task, following, scratch);
    }
  });
}

const int32_t* indices(const Tensor& tensor, int64_t count, const char* what) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Int && tensor.dim() == 1 && tensor.is_contiguous() &&
                      tensor.numel() == count,
                  what);
  return static_cast<const int32_t*>(tensor.data_ptr());
}

const float* slopes_of(const Tensor& tensor, int64_t heads) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() && tensor.numel() == heads,
                  "alibi_slopes must be float32 [heads]");
  return static_cast<const float*>(tensor.data_ptr());
}

const int32_t* spans_of(const Tensor& tensor, int64_t tokens) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Int && tensor.dim() == 2 && tensor.is_contiguous() &&
                      tensor.size(0) == tokens && tensor.size(1) == 2,
                  "spans must be int32 [tokens, 2]");
  return static_cast<const int32_t*>(tensor.data_ptr());
}

template <typename T>
void paged_attention_of(const Tensor& out, const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                        const Tensor& block_tables, const Tensor& kv_lengths, const Tensor& query_start, double scale,
                        std::optional<int64_t> window, std::optional<double> softcap,
                        const std::optional<Tensor>& alibi_slopes, const std::optional<Tensor>& spans) {
  const int64_t sequences = block_tables.size(0);
  const int32_t* lengths = indices(kv_lengths, sequences, "kv_lengths must be int32 [sequences]");
  const int32_t* starts = indices(query_start, sequences + 1, "query_start must be int32 [sequences + 1]");
  Batch<T> batch;
  batch.query = static_cast<const T*>(query.data_ptr());
  batch.key_cache = static_cast<const T*>(key_cache.data_ptr());
  batch.value_cache = static_cast<const T*>(value_cache.data_ptr());
  batch.out = static_cast<T*>(out.data_ptr());
  batch.block_tables = static_cast<const int32_t*>(block_tables.data_ptr());
  batch.query_token_stride = query.stride(0);
  batch.query_head_stride = query.stride(1);
  batch.block_table_stride = block_tables.stride(0);
  batch.heads = query.size(1);
  batch.kv_heads = key_cache.size(1);
  batch.group = batch.heads / batch.kv_heads;
  batch.head_dim = query.size(2);
  batch.padded_dim = (batch.head_dim + LANES - 1) / LANES * LANES;
  batch.block_size = key_cache.size(2);
  batch.scale = static_cast<float>(scale);
  batch.softcap = static_cast<float>(softcap.value_or(0.0));
  STD_TORCH_CHECK(batch.softcap >= 0.0f && (batch.softcap > 0.0f || !softcap), "a softcap must be positive");
  batch.slopes = alibi_slopes ? slopes_of(*alibi_slopes, batch.heads) : nullptr;
  batch.spans = spans ? spans_of(*spans, query.size(0)) : nullptr;
  batch.window = window.value_or(0);
  STD_TORCH_CHECK(batch.window >= 0 && (batch.window || !window), "a window must be at least 1");

  const int64_t tokens = query.size(0), blocks = key_cache.size(0);
  int64_t granted = 0;
  for (int64_t sequence = 0; sequence < sequences; ++sequence) {
    const int64_t count = starts[sequence + 1] - starts[sequence], pages = (lengths[sequence] + batch.block_size - 1) / batch.block_size;
    STD_TORCH_CHECK(starts[sequence] == granted && count >= 0 && count <= lengths[sequence] && starts[sequence + 1] <= tokens,
                    "query_start must be prefix sums of the tokens granted");
    STD_TORCH_CHECK(pages <= block_tables.size(1), "a sequence is longer than its block table");
    granted = starts[sequence + 1];
    if (count == 0) continue;
    const int64_t position = lengths[sequence] - count;
    for (int64_t i = 0; spans && i < count; ++i) {
      const int32_t* const span = batch.spans + 2 * (starts[sequence] + i);
      const bool none = span[0] == 0 && span[1] == 0, holds = span[0] <= position + i && position + i < span[1];
      STD_TORCH_CHECK(none || (holds && span[0] >= 0 && span[1] <= lengths[sequence]),
                      "a span must hold its token, and all of it must be present");
    }
    for (int64_t page = batch.seen(starts[sequence], position).begin / batch.block_size; page < pages; ++page) {
      const int32_t block = batch.block_tables[sequence * batch.block_table_stride + page];
      STD_TORCH_CHECK(block >= 0 && block < blocks, "a block table names a block that the cache does not have");
    }
  }
  const int64_t row = batch.heads * batch.head_dim;
  std::fill(batch.out + granted * row, batch.out + tokens * row, T{});
  run(batch, tasks_of(batch, starts, lengths, sequences));
}

void paged_attention(const Tensor& out, const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                     const Tensor& block_tables, const Tensor& kv_lengths, const Tensor& query_start, double scale,
                     std::optional<int64_t> window, std::optional<double> softcap, std::optional<Tensor> alibi_slopes,
                     std::optional<Tensor> spans) {
  const ScalarType dtype = query.scalar_type();
  STD_TORCH_CHECK(out.scalar_type() == dtype && key_cache.scalar_type() == dtype && value_cache.scalar_type() == dtype,
                  "query, caches and output must be of one dtype");
  STD_TORCH_CHECK(query.dim() == 3 && key_cache.dim() == 4 && query.size(2) == key_cache.size(3) &&
                      query.size(1) % key_cache.size(1) == 0,
                  "query must be [tokens, heads, head_dim], the caches [blocks, kv_heads, block_size, head_dim]");
  STD_TORCH_CHECK(query.size(2) % 2 == 0 && query.stride(2) == 1, "the head dimension must be even and contiguous");
  STD_TORCH_CHECK(out.is_contiguous() && key_cache.is_contiguous() && value_cache.is_contiguous() &&
                      key_cache.numel() == value_cache.numel(),
                  "output and caches must be contiguous");
  STD_TORCH_CHECK(block_tables.scalar_type() == ScalarType::Int && block_tables.dim() == 2 &&
                      (block_tables.size(1) <= 1 || block_tables.stride(1) == 1),
                  "block_tables must be int32 [sequences, blocks]");
  const auto run_as = [&](auto of) {
    of(out, query, key_cache, value_cache, block_tables, kv_lengths, query_start, scale, window, softcap, alibi_slopes,
       spans);
  };
  if (dtype == ScalarType::Float)
    run_as(paged_attention_of<float>);
  else if (dtype == ScalarType::BFloat16)
    run_as(paged_attention_of<BFloat16>);
  else
    STD_TORCH_CHECK(false, "paged_attention on a CPU takes float32 and bfloat16");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vlm_serve, m) {
  m.def(
      "paged_attention(Tensor(a!) out, Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_tables, "
      "Tensor kv_lengths, Tensor query_start, float scale, int? window, float? softcap, Tensor? alibi_slopes, "
      "Tensor? spans) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vlm_serve, CPU, m) { m.impl("paged_attention", TORCH_BOX(&paged_attention)); }
