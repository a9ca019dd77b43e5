// Attention of one tile: a run of a sequence's query tokens with the query heads of one key/value head.
//
// It walks the keys from position 0 in blocks of KEYS with an online softmax (arXiv 2205.14135), converting each block of
// keys and values to float32 once for all of its rows. Every row goes through the same operations in the same order
// wherever it stands in a tile, so a result depends neither on the batch nor on how a prefill was cut. Under a window it
// walks from the block of the first key that its first token sees; blocks that a row does not see yet add zeros to it,
// and so do those behind what it sees, where a later token's span that attends both ways goes on.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "attention/products.h"

namespace {

// Keys of a sequence, by position, from `begin` to before `end`.
struct Range {
  int64_t begin, end;
};

struct Task {
  int64_t sequence, kv_head, first_token, tokens, first_position;
  Range seen;  // by any of its tokens
  // Blocks begin at the same keys for every tile.
  int64_t first_block() const { return seen.begin / KEYS * KEYS; }
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
  const int32_t* spans;  // [tokens, 2], or null
  const float* slopes;  // [heads], or null
  float scale, softcap;  // a softcap of 0 is none

  // What the query of a token sees. Its span holds it, so that there is no gap.
  Range seen(int64_t token, int64_t position) const {
    Range keys{window ? std::max<int64_t>(0, position - window + 1) : 0, position + 1};
    if (spans && spans[2 * token + 1]) {
      keys.begin = std::min<int64_t>(keys.begin, spans[2 * token]);
      keys.end = std::max<int64_t>(keys.end, spans[2 * token + 1]);
    }
    return keys;
  }
  // What `tokens` of one sequence see: no other's span begins before that of the first, or ends after that of the last.
  Range seen(int64_t first_token, int64_t tokens, int64_t first_position) const {
    return {seen(first_token, first_position).begin, seen(first_token + tokens - 1, first_position + tokens - 1).end};
  }
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

// What ALiBi gives a position by a slope, both rounded to bfloat16 as their product is, see reference.py.
inline Floats alibi_bias(Floats rounded_slope, Floats position) {
  return rounded<BFloat16>(rounded_slope * rounded<BFloat16>(position));
}

// Turns a row's products into scores where that takes more than a factor: capped, and with ALiBi's part for each key,
// less that of the query, which keeps scores small.
inline void bend_scores(float* scores, float scale, float softcap, const float* slope, int64_t first_key,
                        int64_t position) {
  Floats lane_index;
  for (int lane = 0; lane < LANES; ++lane) lane_index[lane] = static_cast<float>(lane);
  const Floats rounded_slope = rounded<BFloat16>(broadcast(slope ? *slope : 0.0f));
  const Floats of_query = alibi_bias(rounded_slope, broadcast(static_cast<float>(position)));
  for (int key = 0; key < KEYS; key += LANES) {
    Floats score = load(scores + key) * scale;
    if (softcap > 0.0f) score = softcap * tanh_of(score / softcap);
    if (slope) {
      const Floats of_key = alibi_bias(rounded_slope, lane_index + static_cast<float>(first_key + key));
      score += scale * (of_key - of_query);
    }
    store(scores + key, score);
  }
}

// Turns a row's scores into weights; it sees the first `visible` of the block's keys, under a window without the first
// `passed` of them.
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

// Where a block's keys and values lie in the cache. Rows outside of what the task sees are never read: that memory may
// hold anything.
template <typename T>
struct KeyBlock {
  const T* keys[KEYS];
  const T* values[KEYS];

  void find(const Batch<T>& batch, const Task& task, int64_t first_key, const T* zeros) {
    const int begin = static_cast<int>(std::max<int64_t>(0, task.seen.begin - first_key));
    const int64_t from = first_key + begin;
    const int32_t* page = batch.block_tables + task.sequence * batch.block_table_stride + from / batch.block_size;
    int64_t offset = from % batch.block_size;
    const int count = static_cast<int>(std::min<int64_t>(KEYS, task.seen.end - first_key));
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
  const bool bent = batch.softcap > 0.0f || batch.slopes;
  const float scale = (bent ? 1.0f : batch.scale) * 1.44269504088896340736f;
  // Few rows take the values as they lie; many convert them once. The arithmetic is the same.
  const bool convert = rows > MICRO_ROWS || padded != dim;
  const int64_t length = task.seen.end, start = task.first_block();
  // The block after each, be it the next task's first, is fetched line by line as this one is read: the CPU can wait for
  // few lines at once, and would stall on more.
  KeyBlock<T> block, next;
  next.find(batch, task, start, zeros);
  for (int64_t first_key = start; first_key < length; first_key += KEYS) {
    block = next;
    if (first_key + KEYS < length)
      next.find(batch, task, first_key + KEYS, zeros);
    else if (following)
      next.find(batch, *following, following->first_block(), zeros);
    Keys<T>::transpose(block.keys, next.keys, dim, keys);
    multiply_keys(rows, depth, queries, typename Keys<T>::Right{keys, KEYS}, scores);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t token = row / batch.group, position = task.first_position + token;
      const Range seen = batch.seen(task.first_token + token, position);
      if (bent) {
        const float* slope = batch.slopes ? batch.slopes + task.kv_head * batch.group + row % batch.group : nullptr;
        bend_scores(scores + row * KEYS, batch.scale, batch.softcap, slope, first_key, position);
      }
      softmax_block<WINDOWED>(scores + row * KEYS, scale, seen.begin - first_key, seen.end - first_key, maxima + row,
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

}  // namespace
