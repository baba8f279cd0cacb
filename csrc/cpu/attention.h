// Attention (https://arxiv.org/abs/1706.03762) forward without a matrix of scores, after FlashAttention-2
// (https://arxiv.org/abs/2307.08691). Everything is transposed: queries lie in the lanes of vectors, so that the
// softmax over keys needs no sums across lanes, and k and v are read one value at a time, which needs no packing in
// panels.
#pragma once
#include "attention_gemm.h"

namespace llmfast::cpu::LLMFAST_VARIANT {

// One query block: its rows (queries of the heads that share a key head) and the keys that they see.
struct QueryBlock {
  int64_t batch, kv_head, first, rows;

  template <class Args>
  int64_t head(const Args& a, int64_t r) const {
    return kv_head * (a.heads / a.kv_heads) + (first + r) / a.queries;
  }
  template <class Args>
  int64_t query(const Args& a, int64_t r) const {
    return (first + r) % a.queries;
  }
  // Where row r starts in a tensor of these strides, and in contiguous ones.
  template <class Args>
  int64_t offset(const Args& a, const AttentionStrides& s, int64_t r) const {
    return batch * s.batch + query(a, r) * s.length + head(a, r) * s.head;
  }
  template <class Args>
  int64_t offset(const Args& a, int64_t r) const {
    return ((batch * a.queries + query(a, r)) * a.heads + head(a, r)) * a.head_dim;
  }
  template <class Args>
  int64_t statistic(const Args& a, int64_t r) const {
    return (batch * a.heads + head(a, r)) * a.queries + query(a, r);
  }
};

// How many keys each row of a query block sees, and the least and most of each panel's rows.
struct Visible {
  int32_t keys[kQueryBlock];
  int64_t least[kQueryBlock / kPanel], most[kQueryBlock / kPanel], any;

  template <class Args>
  Visible(const Args& a, const QueryBlock& block) : any(0) {
    for (int64_t r = 0; r < kQueryBlock; ++r) {  // rows past the end see what the last one does
      const int64_t query = block.query(a, r < block.rows ? r : block.rows - 1);
      const int64_t last = a.causal ? query + a.keys - a.queries + 1 : a.keys;
      const int64_t seen = last > 0 ? last : 0, panel = r / kPanel;
      keys[r] = int32_t(seen);
      if (r % kPanel == 0 || seen < least[panel]) least[panel] = seen;
      if (r % kPanel == 0 || seen > most[panel]) most[panel] = seen;
      if (seen > any) any = seen;
    }
  }
};

// The rows of a block in a tensor, padded with zeros to kQueryBlock, as words and transposed.
template <class T, class Args>
inline void pack_block(const QueryBlock& block, const Args& a, const void* x, const AttentionStrides& strides,
                       bool negative, float* rows, float* columns) {
  const int64_t d = words<T>(a.head_dim);
  const auto row = [&](int64_t r) { return static_cast<const T*>(x) + block.offset(a, strides, r); };
  pack_rows<T>(block.rows, kQueryBlock, a.head_dim, row, rows, d);
  if (negative) negate<T>(kQueryBlock * d, rows);
  transpose(kQueryBlock, d, rows, d, columns, kQueryBlock);
}

// Probabilities (relative to the new maximum) of one panel in place of its scores s, (n, kPanel) at a distance of
// kQueryBlock, for keys from `first`; the factor for what has been summed up before goes to `alpha`.
template <bool kPairs, bool kMasked>
inline void softmax_panel(float* s, int64_t n, int64_t first, const int32_t* seen, Vec factor, Vec floor,
                          float* maximum, float* sum, float* alpha) {
  for (int v = 0; v < kTileVecs; ++v, s += W, seen += W, maximum += W, sum += W, alpha += W) {
    const Vec old = load(maximum);
    Vec highest = old, highest2 = old;
    IntVec rest;  // keys that these rows still see
    memcpy(&rest, seen, sizeof rest);
    rest -= int32_t(first);
    for (int64_t j = 0; j < n; ++j) {
      Vec x = load(s + j * kQueryBlock);
      if constexpr (kMasked) {
        x = rest > int32_t(j) ? x : splat(-INFINITY);
        store(s + j * kQueryBlock, x);
      }
      (j % 2 ? highest2 : highest) = max(j % 2 ? highest2 : highest, x);
    }
    highest = max(highest, highest2);
    const Vec base = highest == -INFINITY ? Vec{} : highest;
    const auto probability = [&](int64_t j) {
      const Vec p = exp2_scaled(load(s + j * kQueryBlock) - base, factor, floor);
      if constexpr (kMasked) return rest > int32_t(j) ? p : Vec{};  // which a scale of 0 makes 1
      return p;
    };
    Vec total = {}, total2 = {};
    int64_t j = 0;
    for (; j + 2 <= n; j += 2) {
      const Vec p = probability(j), p2 = probability(j + 1);
      total += p;
      total2 += p2;
      if constexpr (kPairs) {
        store(s + j / 2 * kQueryBlock, pair(p, p2));  // over rows that have been read
      } else {
        store(s + j * kQueryBlock, p);
        store(s + (j + 1) * kQueryBlock, p2);
      }
    }
    if (j < n) {
      const Vec p = probability(j);
      total += p;
      store(s + (kPairs ? j / 2 : j) * kQueryBlock, kPairs ? pair(p, Vec{}) : p);
    }
    const Vec fade = exp2_scaled(old - base, factor, floor);
    store(alpha, fade);
    store(maximum, highest);
    store(sum, load(sum) * fade + (total + total2));
  }
}

// One head's keys and values in words: packed when a block of them is first needed, and kept while work is on the same
// head, if that does not take too much memory; else only the last block is kept.
template <class T>
class PackedKeys {
 public:
  static constexpr int64_t kMost = 1 << 22;  // words
  explicit PackedKeys(const AttentionFwd& a)
      : a_(a),
        d_(words<T>(a.head_dim)),
        v_stride_(round_up(a.head_dim, W)),
        block_(kKeyBlock * d_ + kKeyBlock / (kDot<T> ? 2 : 1) * v_stride_),
        blocks_((a.keys + kKeyBlock - 1) / kKeyBlock),
        all_(blocks_ * block_ <= kMost),
        size_((all_ ? blocks_ : 1) * block_),
        scratch_(size_ + kTileRows + (kDot<T> ? kKeyBlock * d_ : 0)) {}

  void select(const QueryBlock& q) {
    if (q.batch == batch_ && q.kv_head == head_) return;
    batch_ = q.batch;
    head_ = q.kv_head;
    packed_ = 0;
  }
  // Rows of k, d() apart, and rows (of bfloat16 pairs: pairs of rows) of v, v_stride() apart.
  const float* keys(int64_t block) {
    float* k = scratch_.data() + (all_ ? block * block_ : 0);
    if (!all_ || block >= packed_) {
      const int64_t first = block * kKeyBlock, n = a_.keys - first < kKeyBlock ? a_.keys - first : kKeyBlock;
      float* v = k + kKeyBlock * d_;
      const auto rows = [&](const void* x, const AttentionStrides& s, float* out) {
        const T* start = static_cast<const T*>(x) + batch_ * s.batch + first * s.length + head_ * s.head;
        const int64_t distance = s.length;
        pack_rows<T>(n, round_up(n, kKeyBlock), a_.head_dim, [=](int64_t r) { return start + r * distance; }, out, d_);
      };
      rows(a_.k, a_.k_strides, k);
      if constexpr (kDot<T>) {
        float* v_rows = scratch_.data() + size_;
        rows(a_.v, a_.v_strides, v_rows);
        pair_rows(kKeyBlock, v_rows, d_, v, v_stride_);
      } else {
        rows(a_.v, a_.v_strides, v);
      }
      packed_ = block + 1;
    }
    return k;
  }
  const float* values(const float* keys) const { return keys + kKeyBlock * d_; }
  int64_t d() const { return d_; }
  int64_t v_stride() const { return v_stride_; }

 private:
  const AttentionFwd& a_;
  const int64_t d_, v_stride_, block_, blocks_;
  const bool all_;
  const int64_t size_;
  const Scratch scratch_;
  int64_t batch_ = -1, head_ = -1, packed_ = 0;
};

template <class T>
void attention_fwd(const AttentionFwd& a, int64_t begin, int64_t end) {
  if (begin >= end) return;
  constexpr int kHalf = kDot<T> ? 2 : 1;
  PackedKeys<T> packed(a);
  const int64_t d = packed.d(), width = round_up(a.head_dim, W), out_rows = round_up(width, kTileRows);
  const Scratch scratch(kQueryBlock * (2 * d + kKeyBlock + 2 * out_rows + 3));
  float *rows = scratch.data(), *columns = rows + kQueryBlock * d, *scores = columns + kQueryBlock * d;
  float *out = scores + kQueryBlock * kKeyBlock, *out_transposed = out + kQueryBlock * out_rows;
  float *maximum = out_transposed + kQueryBlock * out_rows, *sum = maximum + kQueryBlock, *alpha = sum + kQueryBlock;
  const float magnitude = __builtin_fabsf(a.scale) * 1.44269504f;
  const Vec factor = splat(magnitude), floor = splat(exp2_floor(magnitude));
  const int64_t head_rows = attention_rows(a), blocks = (head_rows + kQueryBlock - 1) / kQueryBlock;

  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = item / blocks, turn = item % blocks;
    const int64_t first = (turn % 2 ? turn / 2 : blocks - 1 - turn / 2) * kQueryBlock;
    const QueryBlock block{head / a.kv_heads, head % a.kv_heads, first,
                           head_rows - first < kQueryBlock ? head_rows - first : kQueryBlock};
    const Visible visible(a, block);
    packed.select(block);
    pack_block<T>(block, a, a.q, a.q_strides, a.scale < 0.0f, rows, columns);  // a negative scale is that of -q
    for (int64_t r = 0; r < kQueryBlock; ++r) maximum[r] = -INFINITY, sum[r] = 0.0f;
    memset(out, 0, kQueryBlock * out_rows * sizeof(float));

    for (int64_t start = 0; start < visible.any; start += kKeyBlock) {
      const float* keys = packed.keys(start / kKeyBlock);
      for (int64_t c = 0; c < block.rows; c += kPanel) {
        const int64_t left = visible.most[c / kPanel] - start, n = left < kKeyBlock ? left : kKeyBlock;
        if (n <= 0) continue;
        float* s = scores + c;
        multiply_panel<kDot<T>, false, kTileVecs>(n, d, keys, d, columns + c, kQueryBlock, s, kQueryBlock, {});
        const bool masked = start + n > visible.least[c / kPanel];
        (masked ? softmax_panel<kDot<T>, true> : softmax_panel<kDot<T>, false>)(s, n, start, visible.keys + c, factor,
                                                                                floor, maximum + c, sum + c, alpha + c);
        multiply_panel<kDot<T>, true, kTileVecs>(a.head_dim, (n + kHalf - 1) / kHalf, packed.values(keys),
                                                 packed.v_stride(), s, kQueryBlock, out + c, kQueryBlock,
                                                 {true, alpha + c});
      }
    }

    for (int64_t c = 0; c < kQueryBlock; c += W) {
      const Vec total = load(sum + c);
      store(alpha + c, total == 0.0f ? Vec{} : 1.0f / total);
    }
    transpose(width, kQueryBlock, out, kQueryBlock, out_transposed, width);
    for (int64_t r = 0; r < block.rows; ++r) {
      T* y = static_cast<T*>(a.out) + block.offset(a, r);
      const float* x = out_transposed + r * width;
      const Vec inverse = splat(alpha[r]);
      sweep(a.head_dim, [&](int64_t i, auto part) { store(y + i, load(x + i) * inverse, part); });
      if (a.statistics) {
        a.statistics[block.statistic(a, r)] = maximum[r];
        a.statistics[a.batch * a.heads * a.queries + block.statistic(a, r)] = sum[r];
      }
    }
  }
}

}  // namespace llmfast::cpu::LLMFAST_VARIANT
