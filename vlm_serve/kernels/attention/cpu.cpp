// Causal attention of a ragged batch over the paged KV cache. Contract: dispatch.paged_attention.
//
// A task is a run of a sequence's query tokens with the query heads of one key/value head: a tile of rows. It walks
// the keys from position 0 in blocks of KEYS with an online softmax (arXiv 2205.14135), converting each block of keys
// and values to float32 once for all of its rows. Every row goes through the same operations in the same order
// wherever it stands in a tile, so a result depends neither on the batch nor on how a prefill was cut. Under a window it
// walks from the block of the first key that its first token sees; blocks that a row does not see yet add zeros to it.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <optional>
#include <vector>

#include "attention/products.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int TILE_ROWS = 96;  // rows in a tile, at least the query heads of one key/value head
struct Task {
  int64_t sequence, kv_head, first_token, tokens, first_position;
  int64_t length() const { return first_position + tokens; }  // keys that the tile's last token sees
};

template <typename T>
struct Batch {
  const T* query;
  const T* key_cache;
  const T* value_cache;
  T* out;
  const int32_t* block_tables;
  int64_t query_token_stride, query_head_stride, block_table_stride;
  int64_t heads, kv_heads, group, head_dim, padded_dim, block_size;
  int64_t window;  // keys that a query sees, 0 for all before it

  int64_t first_seen(int64_t position) const { return window ? std::max<int64_t>(0, position - window + 1) : 0; }
  // Blocks begin at the same keys for every tile.
  int64_t first_block(const Task& task) const { return first_seen(task.first_position) / KEYS * KEYS; }
  float scale;
};

// Floats of a thread's own, aligned to cache lines, kept between calls.
class Scratch {
 public:
  float* take(size_t count) {
    float* const taken = next_;
    next_ += (count + 15) / 16 * 16;
    return taken;
  }
  void reserve(size_t count) {
    if (buffer_.size() < count + 16) buffer_.resize(count + 16);
    const auto address = reinterpret_cast<uintptr_t>(buffer_.data());
    next_ = reinterpret_cast<float*>((address + 63) / 64 * 64);
  }

 private:
  std::vector<float> buffer_;
  float* next_ = nullptr;
};

// How queries and keys are held for their product: in float32, the keys as [head_dim, KEYS].
template <typename T>
struct Keys {
  using Element = float;
  using Right = Matrix;
  static int64_t depth(int64_t head_dim) { return head_dim; }

  static void put_query(const T* from, int64_t head_dim, Element* to) {
    for (int64_t d = 0; d < head_dim; ++d) to[d] = to_float(from[d]);
  }

  static void transpose(const T* const* rows, const T* const* ahead, int64_t head_dim, Element* to) {
#if defined(__AVX512F__)
    const int64_t words = head_dim * static_cast<int64_t>(sizeof(T)) / 4;
    transpose_blocks(rows, ahead, words, [to](__m512i column, int64_t word, int key) {
      if constexpr (sizeof(T) == 4) {
        _mm512_storeu_si512(to + word * KEYS + key, column);
      } else {
        _mm512_storeu_si512(to + 2 * word * KEYS + key, _mm512_slli_epi32(column, 16));
        _mm512_storeu_si512(to + (2 * word + 1) * KEYS + key, _mm512_and_si512(column, _mm512_set1_epi32(0xffff0000)));
      }
    });
#else
    for (int key = 0; key < KEYS; ++key)
      for (int64_t d = 0; d < head_dim; ++d) to[d * KEYS + key] = to_float(rows[key][d]);
#endif
  }
};

#if defined(__AVX512BF16__)
// In pairs of bfloat16 as they are, the keys as [head_dim / 2, KEYS].
template <>
struct Keys<BFloat16> {
  using Element = uint32_t;
  using Right = PairMatrix;
  static int64_t depth(int64_t head_dim) { return head_dim / 2; }

  static void put_query(const BFloat16* from, int64_t head_dim, Element* to) { std::memcpy(to, from, head_dim * 2); }

  static void transpose(const BFloat16* const* rows, const BFloat16* const* ahead, int64_t head_dim, Element* to) {
    transpose_blocks(rows, ahead, head_dim / 2, [to](__m512i column, int64_t word, int key) {
      _mm512_storeu_si512(to + word * KEYS + key, column);
    });
  }
};
#endif

// rows[KEYS] of head_dim -> to[KEYS, padded_dim] in float32, padded with zeros.
template <typename T>
void convert_values(const CacheRows<T>& rows, int64_t head_dim, int64_t padded_dim, float* to) {
  for (int key = 0; key < KEYS; ++key)
    for (int64_t d = 0; d < head_dim; d += LANES) store(to + key * padded_dim + d, rows.at(key, d, head_dim - d));
}

// Turns a row's scores into weights; `visible` of the block's keys are not in the row's future, and under a window
// the first `passed` of them lie before what it sees.
template <bool WINDOWED>
inline void softmax_block(float* scores, float scale, int64_t passed, int64_t visible, float* maximum_so_far, float* sums,
                          float* out, int64_t width) {
  Floats lane_index;
  for (int lane = 0; lane < LANES; ++lane) lane_index[lane] = static_cast<float>(lane);
  Floats highest = broadcast(-std::numeric_limits<float>::infinity());
  for (int key = 0; key < KEYS; key += LANES) {
    const Floats unseen = broadcast(-std::numeric_limits<float>::infinity());
    const Floats index = lane_index + static_cast<float>(key);
    Floats seen = index < static_cast<float>(visible) ? load(scores + key) * scale : unseen;
    if constexpr (WINDOWED) seen = index < static_cast<float>(passed) ? unseen : seen;
    store(scores + key, seen);
    highest = maximum(highest, seen);
  }
  const float before = *maximum_so_far;
  const float now = std::max(before, maximum_of_lanes(highest));
  if (WINDOWED && now == -std::numeric_limits<float>::infinity()) {
    std::fill_n(scores, KEYS, 0.0f);  // not exp2(-inf + inf)
    return;
  }
  Floats sum = load(sums);
  if (now > before) {
    const Floats rescale = exp2_of_negative(broadcast(before - now));
    sum *= rescale;
    for (int64_t d = 0; d < width; d += LANES) store(out + d, load(out + d) * rescale);
    *maximum_so_far = now;
  }
  for (int key = 0; key < KEYS; key += LANES) {
    const Floats weight = exp2_of_negative(load(scores + key) - now);
    store(scores + key, weight);
    sum += weight;
  }
  store(sums, sum);
}

// Where a block's keys and values lie in the cache. Rows past the length, and those before the first key that is seen,
// are never read: that memory may hold anything.
template <typename T>
struct KeyBlock {
  const T* keys[KEYS];
  const T* values[KEYS];

  void find(const Batch<T>& batch, const Task& task, int64_t first_key, const T* zeros) {
    const int64_t first_seen = batch.first_seen(task.first_position), length = task.length();
    const int begin = static_cast<int>(std::max<int64_t>(0, first_seen - first_key));
    const int64_t from = first_key + begin;
    const int32_t* page = batch.block_tables + task.sequence * batch.block_table_stride + from / batch.block_size;
    int64_t offset = from % batch.block_size;
    const int count = static_cast<int>(std::min<int64_t>(KEYS, length - first_key));
    std::fill(keys, keys + begin, zeros);
    std::fill(values, values + begin, zeros);
    for (int key = begin; key < count; ++page, offset = 0) {
      const int64_t page_start = (*page * batch.kv_heads + task.kv_head) * batch.block_size;
      for (; key < count && offset < batch.block_size; ++key, ++offset) {
        keys[key] = batch.key_cache + (page_start + offset) * batch.head_dim;
        values[key] = batch.value_cache + (page_start + offset) * batch.head_dim;
      }
    }
    std::fill(keys + count, keys + KEYS, zeros);
    std::fill(values + count, values + KEYS, zeros);
  }
};

// `following` is what the thread does after it, if anything.
template <typename T, bool WINDOWED>
void attend(const Batch<T>& batch, const Task& task, const Task* following, Scratch& scratch) {
  const int64_t dim = batch.head_dim, padded = batch.padded_dim, rows = task.tokens * batch.group;
  const int64_t depth = Keys<T>::depth(dim);
  scratch.reserve(rows * (depth + padded + KEYS + LANES + 1) + KEYS * (depth + padded) + dim + 8 * 16);
  auto* const queries = reinterpret_cast<typename Keys<T>::Element*>(scratch.take(rows * depth));
  float* const out = scratch.take(rows * padded);
  float* const scores = scratch.take(rows * KEYS);
  float* const sums = scratch.take(rows * LANES);
  float* const maxima = scratch.take(rows);
  auto* const keys = reinterpret_cast<typename Keys<T>::Element*>(scratch.take(KEYS * depth));
  float* const values = scratch.take(KEYS * padded);
  const T* const zeros = reinterpret_cast<const T*>(scratch.take(dim));
  std::fill_n(const_cast<T*>(zeros), dim, T{});
  std::fill_n(out, rows * padded, 0.0f);
  std::fill_n(sums, rows * LANES, 0.0f);
  std::fill_n(maxima, rows, -std::numeric_limits<float>::infinity());

  for (int64_t row = 0; row < rows; ++row) {
    const int64_t token = task.first_token + row / batch.group;
    const int64_t head = task.kv_head * batch.group + row % batch.group;
    const T* from = batch.query + token * batch.query_token_stride + head * batch.query_head_stride;
    Keys<T>::put_query(from, dim, queries + row * depth);
  }

  // The softmax is taken to base 2, which is cheaper: 2**(x log2 e) = e**x.
  const float scale = batch.scale * 1.44269504088896340736f;
  // Few rows take the values as they lie; many convert them once. The arithmetic is the same.
  const bool convert = rows > MICRO_ROWS || padded != dim;
  const int64_t length = task.length(), start = batch.first_block(task);
  // The block after each, be it the next task's first, is fetched line by line as this one is read: the CPU can wait for
  // few lines at once, and would stall on more.
  KeyBlock<T> block, next;
  next.find(batch, task, start, zeros);
  for (int64_t first_key = start; first_key < length; first_key += KEYS) {
    block = next;
    if (first_key + KEYS < length)
      next.find(batch, task, first_key + KEYS, zeros);
    else if (following)
      next.find(batch, *following, batch.first_block(*following), zeros);
    Keys<T>::transpose(block.keys, next.keys, dim, keys);
    multiply_keys(rows, depth, queries, typename Keys<T>::Right{keys, KEYS}, scores);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t visible = task.first_position + row / batch.group + 1 - first_key;
      softmax_block<WINDOWED>(scores + row * KEYS, scale, visible - batch.window, visible, maxima + row,
                              sums + row * LANES, out + row * padded, padded);
    }
    const CacheRows<T> block_values{block.values, next.values};
    if (convert) {
      convert_values(block_values, dim, padded, values);
      add_values(rows, padded, scores, Matrix{values, padded}, out);
    } else {
      add_values(rows, padded, scores, block_values, out);
    }
  }

  for (int64_t row = 0; row < rows; ++row) {
    const int64_t token = task.first_token + row / batch.group;
    const int64_t head = task.kv_head * batch.group + row % batch.group;
    T* to = batch.out + (token * batch.heads + head) * dim;
    const float inverse = 1.0f / sum_of_lanes(load(sums + row * LANES));
    for (int64_t d = 0; d < dim; d += LANES) store(to + d, load(out + row * padded + d) * inverse, dim - d);
  }
}

std::vector<Task> tasks_of(const int32_t* query_start, const int32_t* kv_lengths, int64_t sequences, int64_t kv_heads,
                           int64_t group) {
  const int64_t tile_tokens = std::max<int64_t>(1, TILE_ROWS / group);
  std::vector<Task> tasks;
  for (int64_t sequence = 0; sequence < sequences; ++sequence) {
    const int64_t start = query_start[sequence], end = query_start[sequence + 1];
    const int64_t first_position = kv_lengths[sequence] - (end - start);
    for (int64_t kv_head = 0; kv_head < kv_heads; ++kv_head)
      for (int64_t token = start; token < end; token += tile_tokens)
        tasks.push_back({sequence, kv_head, token, std::min(tile_tokens, end - token), first_position + token - start});
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

template <typename T>
void paged_attention_of(const Tensor& out, const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                        const Tensor& block_tables, const Tensor& kv_lengths, const Tensor& query_start, double scale,
                        std::optional<int64_t> window) {
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
  batch.window = window.value_or(0);
  STD_TORCH_CHECK(batch.window >= 0 && (batch.window || !window), "a window must be at least 1");

  const int64_t tokens = query.size(0), blocks = key_cache.size(0);
  int64_t granted = 0;
  for (int64_t sequence = 0; sequence < sequences; ++sequence) {
    const int64_t count = starts[sequence + 1] - starts[sequence], pages = (lengths[sequence] + batch.block_size - 1) / batch.block_size;
    STD_TORCH_CHECK(starts[sequence] == granted && count >= 0 && count <= lengths[sequence] && starts[sequence + 1] <= tokens,
                    "query_start must be prefix sums of the tokens granted");
    STD_TORCH_CHECK(pages <= block_tables.size(1), "a sequence is longer than its block table");
    for (int64_t page = batch.first_seen(lengths[sequence] - count) / batch.block_size; page < pages; ++page) {
      const int32_t block = batch.block_tables[sequence * batch.block_table_stride + page];
      STD_TORCH_CHECK(block >= 0 && block < blocks, "a block table names a block that the cache does not have");
    }
    granted = starts[sequence + 1];
  }
  const int64_t row = batch.heads * batch.head_dim;
  std::fill(batch.out + granted * row, batch.out + tokens * row, T{});
  run(batch, tasks_of(starts, lengths, sequences, batch.kv_heads, batch.group));
}

void paged_attention(const Tensor& out, const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                     const Tensor& block_tables, const Tensor& kv_lengths, const Tensor& query_start, double scale,
                     std::optional<int64_t> window) {
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
  if (dtype == ScalarType::Float)
    paged_attention_of<float>(out, query, key_cache, value_cache, block_tables, kv_lengths, query_start, scale, window);
  else if (dtype == ScalarType::BFloat16)
    paged_attention_of<BFloat16>(out, query, key_cache, value_cache, block_tables, kv_lengths, query_start, scale, window);
  else
    STD_TORCH_CHECK(false, "paged_attention on a CPU takes float32 and bfloat16");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vlm_serve, m) {
  m.def(
      "paged_attention(Tensor(a!) out, Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_tables, "
      "Tensor kv_lengths, Tensor query_start, float scale, int? window) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vlm_serve, CPU, m) { m.impl("paged_attention", TORCH_BOX(&paged_attention)); }
