// Attention backward: probabilities are computed again from the statistics, block by block, and a work item walks the
// queries once for all of its keys, whose gradients it holds; the order of every sum is fixed. Layout as in
// attention.h.
#pragma once
#include "attention.h"

namespace llmfast::cpu::LLMFAST_VARIANT {

// Scratch memory of a work item. `d` is words<T>, `width` full vectors of head_dim floats.
template <class T>
class BackwardBuffers {
 public:
  static constexpr int64_t kRowWords = kQueryBlock / (kDot<T> ? 2 : 1);  // a row of p or ds
  const int64_t d, width, count, paired;
  const int64_t key_block = kKeyBlock * (2 * d + 2 * width) + paired;
  const int64_t dq_rows = round_up(width, kTileRows);
  const Scratch scratch;
  float *q, *q_columns, *q_pairs, *dout, *dout_columns, *dout_pairs;  // (kQueryBlock, d), transposed, pairs of rows
  float *p, *ds, *ds_pairs, *s, *dp, *dq, *maximum, *inverse, *delta, *keys;

  BackwardBuffers(int64_t head_dim, int64_t blocks)
      : d(words<T>(head_dim)),
        width(round_up(head_dim, W)),
        count(blocks),
        paired(kDot<T> ? kKeyBlock / 2 * width : 0),
        scratch(kQueryBlock * (4 * d + 2 * width + 5 * kKeyBlock + dq_rows + 3) + count * key_block + kTileRows) {
    float* next = scratch.data();
    const auto take = [&](int64_t n) {
      float* taken = next;
      next += n;
      return taken;
    };
    q = take(kQueryBlock * d);
    q_columns = take(kQueryBlock * d);
    dout = take(kQueryBlock * d);
    dout_columns = take(kQueryBlock * d);
    q_pairs = kDot<T> ? take(kQueryBlock / 2 * width) : q;
    dout_pairs = kDot<T> ? take(kQueryBlock / 2 * width) : dout;
    s = take(kQueryBlock * kKeyBlock);
    dp = take(kQueryBlock * kKeyBlock);
    p = kDot<T> ? take(kRowWords * kKeyBlock) : s;
    ds = kDot<T> ? take(kRowWords * kKeyBlock) : dp;
    ds_pairs = kDot<T> ? take(kQueryBlock * kKeyBlock / 2) : dp;
    dq = take(kQueryBlock * dq_rows);
    maximum = take(kQueryBlock);
    inverse = take(kQueryBlock);
    delta = take(kQueryBlock);
    keys = next;
  }
  // Of the item's i-th key block.
  float* k(int64_t i) const { return keys + i * key_block; }
  float* v(int64_t i) const { return k(i) + kKeyBlock * d; }
  float* dk(int64_t i) const { return v(i) + kKeyBlock * d; }
  float* dv(int64_t i) const { return dk(i) + kKeyBlock * width; }
  float* k_pairs(int64_t i) const { return kDot<T> ? dv(i) + kKeyBlock * width : k(i); }
};

// Item `split` of a head has the i-th key block of these: of every 2 * splits the split-th and the split-th from the
// end.
inline int64_t key_block_of(const AttentionBwd& a, int64_t split, int64_t i) {
  return i / 2 * 2 * a.splits + (i % 2 ? 2 * a.splits - 1 - split : split);
}

template <class T>
void load_keys(const AttentionBwd& a, int64_t batch, int64_t kv_head, int64_t first, const BackwardBuffers<T>& b,
               int64_t i) {
  const int64_t n = a.keys - first < kKeyBlock ? a.keys - first : kKeyBlock;
  const auto rows = [&](const void* x, const AttentionStrides& s, float* out) {
    const T* start = static_cast<const T*>(x) + batch * s.batch + first * s.length + kv_head * s.head;
    const int64_t distance = s.length;
    pack_rows<T>(n, kKeyBlock, a.head_dim, [=](int64_t r) { return start + r * distance; }, out, b.d);
  };
  rows(a.k, a.k_strides, b.k(i));
  rows(a.v, a.v_strides, b.v(i));
  if constexpr (kDot<T>) pair_rows(kKeyBlock, b.k(i), b.d, b.k_pairs(i), b.width);
  memset(b.dk(i), 0, 2 * kKeyBlock * b.width * sizeof(float));
}

template <class T>
void load_queries(const AttentionBwd& a, const QueryBlock& block, const BackwardBuffers<T>& b) {
  pack_block<T>(block, a, a.q, a.q_strides, a.scale < 0.0f, b.q, b.q_columns);
  pack_block<T>(block, a, a.dout, a.dout_strides, false, b.dout, b.dout_columns);
  if constexpr (kDot<T>) {
    pair_rows(kQueryBlock, b.q, b.d, b.q_pairs, b.width);
    pair_rows(kQueryBlock, b.dout, b.d, b.dout_pairs, b.width);
  }
  memset(b.dq, 0, kQueryBlock * b.dq_rows * sizeof(float));
  memset(b.maximum, 0, 3 * kQueryBlock * sizeof(float));  // rows past the end: probabilities are 0
  for (int64_t r = 0; r < block.rows; ++r) {
    const T* dout = static_cast<const T*>(a.dout) + block.offset(a, a.dout_strides, r);
    const T* out = static_cast<const T*>(a.out) + block.offset(a, r);
    const float sum = a.statistics[a.batch * a.heads * a.queries + block.statistic(a, r)];
    b.maximum[r] = sum == 0.0f ? 0.0f : a.statistics[block.statistic(a, r)];
    b.inverse[r] = sum == 0.0f ? 0.0f : 1.0f / sum;
    const auto product = [&](int64_t i, auto part) { return load(dout + i, part) * load(out + i, part); };
    b.delta[r] = reduce_sum(a.head_dim, product);
  }
}

// p = e^(scale (s - maximum)) / sum and ds = p (dp - delta) for n keys from `first`, in the forms that products take.
template <class T, bool kMasked>
void probabilities(const BackwardBuffers<T>& b, int64_t n, int64_t first, const int32_t* seen, Vec factor, Vec floor) {
  for (int64_t c = 0; c < kQueryBlock; c += W) {
    const Vec maximum = load(b.maximum + c), inverse = load(b.inverse + c), delta = load(b.delta + c);
    IntVec rest;
    memcpy(&rest, seen + c, sizeof rest);
    rest -= int32_t(first);
    const auto at = [&](int64_t j, Vec& p, Vec& ds) {
      const int64_t i = j * kQueryBlock + c;
      p = exp2_scaled(load(b.s + i) - maximum, factor, floor) * inverse;
      if constexpr (kMasked) p = rest > int32_t(j) ? p : Vec{};
      ds = p * (load(b.dp + i) - delta);
    };
    for (int64_t j = 0; j < n; j += 2) {
      Vec p, ds, p2 = {}, ds2 = {};
      at(j, p, ds);
      if (j + 1 < n) at(j + 1, p2, ds2);
      if constexpr (kDot<T>) {
        const auto row = [&](float* x, int64_t j) { return reinterpret_cast<BFloat16*>(x) + j * kQueryBlock + c; };
        store_pair(row(b.p, j), row(b.p, j + 1), p, p2);
        store_pair(row(b.ds, j), row(b.ds, j + 1), ds, ds2);
        store(b.ds_pairs + j / 2 * kQueryBlock + c, pair(ds, ds2));
      } else {
        store(b.p + j * kQueryBlock + c, p);
        store(b.ds + j * kQueryBlock + c, ds);
        if (j + 1 < n) {
          store(b.p + (j + 1) * kQueryBlock + c, p2);
          store(b.ds + (j + 1) * kQueryBlock + c, ds2);
        }
      }
    }
  }
  const int64_t row = b.kRowWords, past = round_up(n, kTileRows) - n;  // rows that fill the last tile
  memset(b.p + n * row, 0, past * row * sizeof(float));
  memset(b.ds + n * row, 0, past * row * sizeof(float));
}

template <class T>
void attention_bwd_block(const AttentionBwd& a, const Visible& visible, int64_t start, const BackwardBuffers<T>& b,
                         int64_t i) {
  constexpr int64_t kHalf = kDot<T> ? 2 : 1;
  const int64_t left = visible.any - start, n = left < kKeyBlock ? left : kKeyBlock;
  const float magnitude = __builtin_fabsf(a.scale) * 1.44269504f;
  multiply<kDot<T>, false>(n, kQueryBlock, b.d, b.k(i), b.d, b.q_columns, kQueryBlock, b.s, kQueryBlock, {});
  multiply<kDot<T>, false>(n, kQueryBlock, b.d, b.v(i), b.d, b.dout_columns, kQueryBlock, b.dp, kQueryBlock, {});
  int64_t least = visible.least[0];
  for (int64_t panel = 1; panel < kQueryBlock / kPanel; ++panel)
    least = visible.least[panel] < least ? visible.least[panel] : least;
  (start + n > least ? probabilities<T, true> : probabilities<T, false>)(b, n, start, visible.keys, splat(magnitude),
                                                                         splat(exp2_floor(magnitude)));
  const int64_t row = b.kRowWords, ld = kDot<T> ? b.width : b.d;
  multiply<kDot<T>, false>(n, a.head_dim, row, b.p, row, b.dout_pairs, ld, b.dv(i), b.width, {true, nullptr});
  multiply<kDot<T>, false>(n, a.head_dim, row, b.ds, row, b.q_pairs, ld, b.dk(i), b.width, {true, nullptr});
  multiply<kDot<T>, true>(a.head_dim, kQueryBlock, (n + kHalf - 1) / kHalf, b.k_pairs(i), ld, b.ds_pairs, kQueryBlock,
                          b.dq, kQueryBlock, {true, nullptr});
}

template <class T>
void store_scaled(const float* x, Vec scale, T* y, int64_t n) {
  sweep(n, [&](int64_t i, auto part) { store(y + i, load(x + i) * scale, part); });
}

template <class T>
void attention_bwd(const AttentionBwd& a, int64_t begin, int64_t end) {
  if (begin >= end) return;
  const int64_t key_blocks = (a.keys + kKeyBlock - 1) / kKeyBlock;
  const int64_t head_rows = a.heads / a.kv_heads * a.queries, group_rows = a.batch * a.queries * a.heads;
  const BackwardBuffers<T> b(a.head_dim, a.splits == 1 ? key_blocks : (key_blocks / (2 * a.splits) + 1) * 2);
  const Scratch transposed(kQueryBlock * b.width);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = item / a.splits, split = item % a.splits;
    const int64_t batch = head / a.kv_heads, kv_head = head % a.kv_heads;
    const auto first_key = [&](int64_t i) { return key_block_of(a, split, i) * kKeyBlock; };
    for (int64_t i = 0; first_key(i) < a.keys; ++i) load_keys<T>(a, batch, kv_head, first_key(i), b, i);
    for (int64_t first = 0; first < head_rows; first += kQueryBlock) {
      const int64_t rows = head_rows - first < kQueryBlock ? head_rows - first : kQueryBlock;
      const QueryBlock block{batch, kv_head, first, rows};
      const Visible visible(a, block);
      load_queries<T>(a, block, b);
      for (int64_t i = 0; first_key(i) < visible.any; ++i) attention_bwd_block<T>(a, visible, first_key(i), b, i);
      transpose(b.width, kQueryBlock, b.dq, kQueryBlock, transposed.data(), b.width);
      for (int64_t r = 0; r < rows; ++r) {
        const float* x = transposed.data() + r * b.width;
        const int64_t offset = block.offset(a, r);
        if (a.splits == 1)
          store_scaled(x, splat(a.scale), static_cast<T*>(a.dq) + offset, a.head_dim);
        else
          store_scaled(x, splat(a.scale), a.partial_dq + split * group_rows * a.head_dim + offset, a.head_dim);
      }
    }
    for (int64_t i = 0; first_key(i) < a.keys; ++i)
      for (int64_t j = 0; j < kKeyBlock && first_key(i) + j < a.keys; ++j) {
        const int64_t offset = ((batch * a.keys + first_key(i) + j) * a.kv_heads + kv_head) * a.head_dim;
        const Vec scale = splat(__builtin_fabsf(a.scale));
        store_scaled(b.dk(i) + j * b.width, scale, static_cast<T*>(a.dk) + offset, a.head_dim);
        store_scaled(b.dv(i) + j * b.width, splat(1.0f), static_cast<T*>(a.dv) + offset, a.head_dim);
      }
  }
}

template <class T>
void attention_bwd_combine(const AttentionBwd& a, int64_t begin, int64_t end) {
  const int64_t size = a.batch * a.queries * a.heads * a.head_dim, start = begin * a.head_dim;
  sweep((end - begin) * a.head_dim, [&](int64_t i, auto part) {
    Vec total = load(a.partial_dq + start + i, part);
    for (int64_t split = 1; split < a.splits; ++split) total += load(a.partial_dq + split * size + start + i, part);
    store(static_cast<T*>(a.dq) + start + i, total, part);
  });
}

}  // namespace llmfast::cpu::LLMFAST_VARIANT
