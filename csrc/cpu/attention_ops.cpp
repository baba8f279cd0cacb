// Attention on the CPU as torch sees it: arguments checked, outputs made, blocks of work shared out to threads.
#include "../tensor.h"
#include "checks.h"
#include "kernels.h"
#include "parallel.h"

namespace llmfast::cpu {
namespace {

// Of (batch, length, heads, head_dim).
AttentionStrides strides_of(const Argument& a) {
  const Tensor& t = a.tensor;
  if (t.dim() != 4) a.refuse("has shape " + shape_text(t) + "; it must be (batch, length, heads, head_dim)");
  const int64_t* s = t.strides();
  a.require(t.sizes()[3] <= 1 || s[3] == 1 || t.numel() == 0, "must have adjacent elements in its last dimension");
  return {s[0], s[1], s[2]};
}

// Checks q, k and v against each other, and gives what forward and backward share.
AttentionFwd check_inputs(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, bool causal,
                          double scale) {
  const Argument q_arg{op, "q", q}, k_arg{op, "k", k}, v_arg{op, "v", v};
  const DType dtype = check_floats(q_arg);
  check_dtype(k_arg, dtype);
  check_dtype(v_arg, dtype);
  AttentionFwd a{};
  a.q_strides = strides_of(q_arg);
  a.k_strides = strides_of(k_arg);
  a.v_strides = strides_of(v_arg);
  check_same_shape(v_arg, k_arg);
  a.batch = q.sizes()[0], a.queries = q.sizes()[1], a.heads = q.sizes()[2], a.head_dim = q.sizes()[3];
  a.keys = k.sizes()[1], a.kv_heads = k.sizes()[2];
  if (k.sizes()[0] != a.batch || k.sizes()[3] != a.head_dim || a.kv_heads == 0 || a.heads % a.kv_heads != 0)
    k_arg.refuse("has shape " + shape_text(k) + ", which does not fit q's " + shape_text(q));
  q_arg.require(a.head_dim >= 1 && a.head_dim <= 256, "must have a head_dim of 1 to 256");
  a.q = q.data(), a.k = k.data(), a.v = v.data();
  a.causal = causal, a.scale = float(scale);
  return a;
}

// The result, and (2, batch, heads, queries) for the backward pass, or nothing if `statistics` says that none comes.
std::tuple<Tensor, Tensor> attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v, bool causal, double scale,
                                         bool statistics) {
  AttentionFwd a = check_inputs("attention_fwd", q, k, v, causal, scale);
  const AttentionKernels& kernels = attention_kernels(index_of(q.dtype()));
  Tensor out = empty_like(q);
  Tensor saved = statistics ? empty_float32({2, a.batch, a.heads, a.queries}, q) : empty_float32({0}, q);
  if (q.numel() == 0) return {std::move(out), std::move(saved)};
  a.out = out.data();
  a.statistics = statistics ? saved.data<float>() : nullptr;
  if (!attention_is_decode(a)) {
    parallel(kernels.fwd, a, attention_items(a), kGrain);
    return {std::move(out), std::move(saved)};
  }
  Tensor workspace = empty_float32({attention_workspace(a)}, q);
  const AttentionDecode decode{a, workspace.data<float>()};
  parallel(kernels.decode, decode, attention_decode_items(a), kGrain);
  if (attention_splits(a) > 1)
    parallel(kernels.decode_combine, decode, a.batch * a.kv_heads,
             attention_rows(a) * attention_splits(a) * a.head_dim);
  return {std::move(out), std::move(saved)};
}

std::tuple<Tensor, Tensor, Tensor> attention_bwd(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                                                 const Tensor& out, const Tensor& statistics, bool causal,
                                                 double scale) {
  const char* op = "attention_bwd";
  const Argument q_arg{op, "q", q}, dout_arg{op, "dout", dout}, out_arg{op, "out", out};
  const AttentionFwd f = check_inputs(op, q, k, v, causal, scale);
  for (const Argument& arg : {dout_arg, out_arg}) {
    check_dtype(arg, q.dtype());
    check_same_shape(arg, q_arg);
  }
  require_contiguous(out_arg);
  const Argument saved{op, "statistics", statistics};
  check_dtype(saved, DType::kFloat32);
  const int64_t expected[] = {2, f.batch, f.heads, f.queries};
  if (statistics.dim() != 4 || !std::equal(expected, expected + 4, statistics.sizes()))
    saved.refuse("has shape " + shape_text(statistics) + "; it must be what the forward pass gave");
  require_contiguous(saved);

  Tensor dq = empty_like(q), dk = empty_like(k), dv = empty_like(v);
  AttentionBwd a{dout.data(), f.q,
                 f.k,         f.v,
                 out.data(),  strides_of(dout_arg),
                 f.q_strides, f.k_strides,
                 f.v_strides, statistics.data<float>(),
                 dq.data(),   dk.data(),
                 dv.data()};
  a.batch = f.batch, a.queries = f.queries, a.keys = f.keys, a.heads = f.heads, a.kv_heads = f.kv_heads;
  a.head_dim = f.head_dim, a.scale = f.scale, a.causal = f.causal;
  a.splits = attention_bwd_splits(a.batch, a.kv_heads, a.keys, threads());
  Tensor partial = empty_float32({a.splits > 1 ? a.splits : 0, a.batch, a.queries, a.heads, a.head_dim}, q);
  a.partial_dq = a.splits > 1 ? partial.data<float>() : nullptr;
  const AttentionKernels& kernels = attention_kernels(index_of(q.dtype()));
  if (a.batch > 0) parallel(kernels.bwd, a, attention_bwd_items(a), kGrain);
  if (a.splits > 1) parallel(kernels.bwd_combine, a, a.batch * a.queries * a.heads, a.head_dim * a.splits);
  return {std::move(dq), std::move(dk), std::move(dv)};
}

}  // namespace

std::vector<Registration> attention_ops() { return {LLMFAST_OP(attention_fwd), LLMFAST_OP(attention_bwd)}; }

}  // namespace llmfast::cpu
