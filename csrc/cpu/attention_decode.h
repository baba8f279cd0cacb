// Attention of a few queries over many keys, as when text is generated: k and v are read once, without packing, for all
// query heads that share them. Long caches are split over work items, whose partial results are then combined in order.
#pragma once
#include "attention_gemm.h"

namespace llmfast::cpu::LLMFAST_VARIANT {

// Sums that registers hold, and keys between two updates of the running maximum.
constexpr int kDots = kTileVecs > 2 ? 16 : 8;
constexpr int64_t kDecodeBlock = 64;

// Rows to be read later, which are asked for one by one: those of one head lie too far apart for the hardware to
// foresee.
struct Ahead {
  const char* rows;
  int64_t n, stride, size;  // stride and size in bytes

  void ask(int64_t r) const {
    if (r >= n) return;
    for (int64_t i = 0; i < size; i += 64) __builtin_prefetch(rows + r * stride + i);
  }
};

// The sums of W vectors, in their order.
template <int kHalf = W / 2>
inline Vec sums(Vec* v) {
#pragma GCC unroll 8
  for (int i = 0; i < kHalf; ++i) v[i] = interleave_low(v[i], v[i + kHalf]) + interleave_high(v[i], v[i + kHalf]);
  if constexpr (kHalf > 1) return sums<kHalf / 2>(v);
  return v[0];
}

// scores[r][j] = q[r] . k[j] for kRows rows of q, `width` apart, and n <= kDecodeBlock keys, `stride` apart.
template <class T, int kRows>
void decode_scores(int64_t n, int64_t head_dim, const float* q, int64_t width, const T* k, int64_t stride,
                   float* scores, const Ahead& ahead) {
  constexpr int kKeys = kDots / kRows;
  for (int64_t j = 0; j < n; j += kKeys) {
    const T* key[kKeys];
    for (int i = 0; i < kKeys; ++i) {
      key[i] = k + (j + i < n ? j + i : n - 1) * stride;
      ahead.ask(j + i);
    }
    Vec acc[kDots];
#pragma GCC unroll 16
    for (int i = 0; i < kDots; ++i) acc[i] = Vec{};
    sweep(head_dim, [&](int64_t d, auto part) {
#pragma GCC unroll 16
      for (int i = 0; i < kKeys; ++i) {
        const Vec x = load(key[i] + d, part);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) acc[r * kKeys + i] += x * load(q + r * width + d);
      }
    });
    float lanes[kDots];
#pragma GCC unroll 4
    for (int i = 0; i < kDots; i += W) store(lanes + i, sums(acc + i));
    for (int r = 0; r < kRows; ++r) memcpy(scores + r * kDecodeBlock + j, lanes + r * kKeys, kKeys * sizeof(float));
  }
}

// out[r] = out[r] fade[r] + sum over j of p[r][j] v[j], for kRows rows and kVecs vectors of columns.
template <class T, int kRows, int kVecs, class P>
inline void decode_values(int64_t n, const float* p, const T* v, int64_t stride, const float* fade, float* out,
                          int64_t width, const Ahead& ahead, P part) {
  Vec acc[kRows][kVecs];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < kVecs; ++i) acc[r][i] = load(out + r * width + i * W) * splat(fade[r]);
  for (int64_t j = 0; j < n; ++j, v += stride) {
    ahead.ask(j);
#pragma GCC unroll 4
    for (int i = 0; i < kVecs; ++i) {
      const Vec x = load(v + i * W, part);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) acc[r][i] += splat(p[r * kDecodeBlock + j]) * x;
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < kVecs; ++i) store(out + r * width + i * W, acc[r][i]);
}

// What the rows of one key head have summed up.
struct DecodeRows {
  int64_t width;
  float *q, *scores, *out, *maximum, *sum, *fade;
};

// Takes n keys into rows from `r`; row r sees `seen[r]` of them at most. `next` more keys follow.
template <class T, int kRows>
void decode_rows(const DecodeRows& rows, int64_t r, int64_t n, int64_t head_dim, const int64_t* seen, const T* k,
                 int64_t k_stride, const T* v, int64_t v_stride, Vec factor, Vec floor, int64_t next) {
  const int64_t size = r == 0 ? head_dim * sizeof(T) : 0;  // the first rows ask for all
  const Ahead values{reinterpret_cast<const char*>(v), n, v_stride * int64_t(sizeof(T)), size};
  const Ahead keys{reinterpret_cast<const char*>(k + n * k_stride), next, k_stride * int64_t(sizeof(T)), size};
  float *scores = rows.scores, *out = rows.out + r * rows.width, *fade = rows.fade + r;
  decode_scores<T, kRows>(n, head_dim, rows.q + r * rows.width, rows.width, k, k_stride, scores, values);
  for (int i = 0; i < kRows; ++i) {
    float* s = scores + i * kDecodeBlock;
    const int64_t visible = seen[r + i] < n ? (seen[r + i] > 0 ? seen[r + i] : 0) : n;
    const float old = rows.maximum[r + i], block = reduce_max(s, visible), highest = old > block ? old : block;
    const Vec base = splat(highest == -INFINITY ? 0.0f : highest);
    const float total = reduce_sum(visible, [&](int64_t j, auto part) {
      const Vec p = exp2_scaled(load(s + j) - base, factor, floor);
      store(s + j, p);
      return p;
    });
    memset(s + visible, 0, (n - visible) * sizeof(float));
    float lanes[W];
    store(lanes, exp2_scaled(splat(old) - base, factor, floor));
    fade[i] = lanes[0];
    rows.maximum[r + i] = highest;
    rows.sum[r + i] = rows.sum[r + i] * lanes[0] + total;
  }
  int64_t d = 0;
  for (; d + 4 * W <= head_dim; d += 4 * W)
    decode_values<T, kRows, 4>(n, scores, v + d, v_stride, fade, out + d, rows.width, d ? Ahead{} : keys, Full{});
  for (; d + W <= head_dim; d += W)
    decode_values<T, kRows, 1>(n, scores, v + d, v_stride, fade, out + d, rows.width, d ? Ahead{} : keys, Full{});
  if (d < head_dim)
    decode_values<T, kRows, 1>(n, scores, v + d, v_stride, fade, out + d, rows.width, Ahead{}, Part{head_dim - d});
}

// The result of row r of a key head: x / sum.
template <class T>
void store_decoded(const AttentionDecode& a, int64_t key_head, int64_t r, const float* x, float sum) {
  const int64_t batch = key_head / a.kv_heads, head = key_head % a.kv_heads * (a.heads / a.kv_heads) + r / a.queries;
  T* y = static_cast<T*>(a.out) + ((batch * a.queries + r % a.queries) * a.heads + head) * a.head_dim;
  const Vec inverse = splat(sum == 0.0f ? 0.0f : 1.0f / sum);
  sweep(a.head_dim, [&](int64_t i, auto part) { store(y + i, load(x + i, part) * inverse, part); });
}

template <class T>
void attention_decode(const AttentionDecode& a, int64_t begin, int64_t end) {
  const int64_t n_rows = attention_rows(a), splits = attention_splits(a), width = round_up(a.head_dim, W);
  const Scratch scratch(n_rows * (2 * width + 3) + 4 * kDecodeBlock + W);
  float* next = scratch.data();
  DecodeRows rows{width, next, next + n_rows * width, nullptr, nullptr, nullptr, nullptr};
  rows.out = rows.scores + 4 * kDecodeBlock + W;  // the last vector of scores may reach past them
  rows.maximum = rows.out + n_rows * width;
  rows.sum = rows.maximum + n_rows;
  rows.fade = rows.sum + n_rows;
  const float magnitude = __builtin_fabsf(a.scale) * 1.44269504f;
  const Vec factor = splat(magnitude), floor = splat(exp2_floor(magnitude));
  const Vec sign = splat(a.scale < 0.0f ? -1.0f : 1.0f);
  for (int64_t item = begin; item < end; ++item) {
    // All heads of the same keys follow each other, as they lie in memory.
    const int64_t batch = item / (a.kv_heads * splits), split = item / a.kv_heads % splits, kv_head = item % a.kv_heads;
    const int64_t key_head = batch * a.kv_heads + kv_head, first = split * kDecodeKeys;
    const int64_t last = first + kDecodeKeys < a.keys ? first + kDecodeKeys : a.keys;
    const T* k = static_cast<const T*>(a.k) + batch * a.k_strides.batch + kv_head * a.k_strides.head;
    const T* v = static_cast<const T*>(a.v) + batch * a.v_strides.batch + kv_head * a.v_strides.head;
    for (int64_t r = 0; r < n_rows; ++r) {
      const int64_t head = kv_head * (a.heads / a.kv_heads) + r / a.queries;
      const T* q = static_cast<const T*>(a.q) + batch * a.q_strides.batch + r % a.queries * a.q_strides.length +
                   head * a.q_strides.head;
      sweep(a.head_dim, [&](int64_t i, auto part) { store(rows.q + r * width + i, load(q + i, part) * sign); });
      rows.maximum[r] = -INFINITY;
      rows.sum[r] = 0.0f;
    }
    memset(rows.out, 0, n_rows * width * sizeof(float));
    for (int64_t start = first; start < last; start += kDecodeBlock) {
      const int64_t n = last - start < kDecodeBlock ? last - start : kDecodeBlock;
      int64_t seen[kDecodeRows];
      for (int64_t r = 0; r < n_rows; ++r)
        seen[r] = (a.causal ? r % a.queries + a.keys - a.queries + 1 : a.keys) - start;
      const auto take = [&](auto take_rows, int64_t r) {
        take_rows(rows, r, n, a.head_dim, seen, k + start * a.k_strides.length, a.k_strides.length,
                  v + start * a.v_strides.length, a.v_strides.length, factor, floor,
                  last - start - n < kDecodeBlock ? last - start - n : kDecodeBlock);
      };
      int64_t r = 0;
      for (; r + 4 <= n_rows; r += 4) take(decode_rows<T, 4>, r);
      for (; r + 2 <= n_rows; r += 2) take(decode_rows<T, 2>, r);
      if (r < n_rows) take(decode_rows<T, 1>, r);
    }
    for (int64_t r = 0; r < n_rows; ++r) {
      if (splits == 1) {
        store_decoded<T>(a, key_head, r, rows.out + r * width, rows.sum[r]);
        continue;
      }
      float* partial = a.workspace + ((key_head * splits + split) * n_rows + r) * (a.head_dim + 2);
      partial[0] = rows.maximum[r];
      partial[1] = rows.sum[r];
      memcpy(partial + 2, rows.out + r * width, a.head_dim * sizeof(float));
    }
  }
}

template <class T>
void attention_combine(const AttentionDecode& a, int64_t begin, int64_t end) {
  const int64_t n_rows = attention_rows(a), splits = attention_splits(a), width = round_up(a.head_dim, W);
  const float magnitude = __builtin_fabsf(a.scale) * 1.44269504f;
  const Vec factor = splat(magnitude), floor = splat(exp2_floor(magnitude));
  const Scratch scratch(width);
  for (int64_t row = begin * n_rows; row < end * n_rows; ++row) {
    const int64_t key_head = row / n_rows, r = row % n_rows;
    const auto partial = [&](int64_t split) {
      return a.workspace + ((key_head * splits + split) * n_rows + r) * (a.head_dim + 2);
    };
    float maximum = -INFINITY, sum = 0.0f;
    for (int64_t split = 0; split < splits; ++split) maximum = *partial(split) > maximum ? *partial(split) : maximum;
    memset(scratch.data(), 0, width * sizeof(float));
    for (int64_t split = 0; split < splits; ++split) {
      const float* x = partial(split);
      const Vec share = exp2_scaled(splat(x[0] - (maximum == -INFINITY ? 0.0f : maximum)), factor, floor);
      float lanes[W];
      store(lanes, share);
      sum += x[1] * lanes[0];
      sweep(a.head_dim, [&](int64_t i, auto part) {
        store(scratch.data() + i, load(scratch.data() + i) + load(x + 2 + i, part) * share);
      });
    }
    store_decoded<T>(a, key_head, r, scratch.data(), sum);
  }
}

}  // namespace llmfast::cpu::LLMFAST_VARIANT
