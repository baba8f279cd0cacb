// What the attention kernels take. q: (batch, queries, heads, head_dim); k, v: (batch, keys, kv_heads, head_dim), each
// with strides in elements and unit stride in head_dim, which is at most 256. Query head h reads key head
// h / (heads / kv_heads). `causal` is aligned bottom right: query i sees keys j <= i + keys - queries.
#pragma once
#include <stdint.h>

namespace llmfast::cpu {

// Rows in a block of work: queries of one head after another, of all heads that share a key head.
constexpr int64_t kQueryBlock = 64;
constexpr int64_t kKeyBlock = 96;
// Decoding: the keys of one item, and the most rows (queries times heads of a group) that take that path.
constexpr int64_t kDecodeKeys = 512;
constexpr int64_t kDecodeRows = 16;

struct AttentionStrides {
  int64_t batch, length, head;
};

// out: (batch, queries, heads, head_dim), contiguous. statistics: (2, batch, heads, queries), what the backward pass
// needs: the maximum of a row's scores before `scale` (with its sign, though), and its sum of e^(score - maximum).
struct AttentionFwd {
  const void *q, *k, *v;
  AttentionStrides q_strides, k_strides, v_strides;
  void* out;
  float* statistics;  // may be null
  int64_t batch, queries, keys, heads, kv_heads, head_dim;
  float scale;
  bool causal;
};

// Rows of scores that read one key head.
static inline int64_t attention_rows(const AttentionFwd& a) { return a.heads / a.kv_heads * a.queries; }

// Items of attention_fwd: blocks of queries. Heads follow each other, and a head's blocks come long, short, long, ...
// so that a range of adjacent items costs about what another of its size does.
static inline int64_t attention_items(const AttentionFwd& a) {
  return a.batch * a.kv_heads * ((attention_rows(a) + kQueryBlock - 1) / kQueryBlock);
}

// Few queries over many keys, which are read once for all of a group's heads, when no gradient is wanted (`statistics`
// is null: its scores are rounded otherwise than those that the backward pass computes again). First attention_decode
// over attention_decode_items(a); then, if attention_splits(a) > 1, attention_combine over batch * kv_heads. How the
// keys are split depends on their number alone, so results do not depend on the number of threads.
struct AttentionDecode : AttentionFwd {
  float* workspace;  // attention_workspace(a) floats; may be null if that is 0
};
static inline bool attention_is_decode(const AttentionFwd& a) {
  return !a.statistics && attention_rows(a) <= kDecodeRows;
}
static inline int64_t attention_splits(const AttentionFwd& a) {
  return a.keys > kDecodeKeys ? (a.keys + kDecodeKeys - 1) / kDecodeKeys : 1;
}
static inline int64_t attention_decode_items(const AttentionFwd& a) {
  return a.batch * a.kv_heads * attention_splits(a);
}
static inline int64_t attention_workspace(const AttentionFwd& a) {
  return attention_splits(a) == 1 ? 0 : attention_decode_items(a) * attention_rows(a) * (a.head_dim + 2);
}

// dq, dk, dv: contiguous. An item is a key head, or where these are too few for the threads, every splits-th pair of
// key blocks of one. With splits > 1 dq is summed from `partial_dq`, (splits, batch, queries, heads, head_dim) floats,
// by attention_bwd_combine over the batch * queries * heads rows of dq; else that is null and not needed.
struct AttentionBwd {
  const void *dout, *q, *k, *v, *out;
  AttentionStrides dout_strides, q_strides, k_strides, v_strides;
  const float* statistics;
  void *dq, *dk, *dv;
  float* partial_dq;
  int64_t batch, queries, keys, heads, kv_heads, head_dim, splits;
  float scale;
  bool causal;
};
static inline int64_t attention_bwd_items(const AttentionBwd& a) { return a.batch * a.kv_heads * a.splits; }

// The fewest splits that leave the threads balanced; a causal item needs two key blocks to be as long as the others.
static inline int64_t attention_bwd_splits(int64_t batch, int64_t kv_heads, int64_t keys, int64_t threads) {
  const int64_t key_heads = batch * kv_heads, most = (keys + kKeyBlock - 1) / kKeyBlock / 2;
  int64_t splits = 1;
  while (splits < most && key_heads * splits % threads != 0 && key_heads * splits < 4 * threads) ++splits;
  return splits;
}

}  // namespace llmfast::cpu
