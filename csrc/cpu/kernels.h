// What the CPU kernels compute, as one table of functions for each instruction set, without anything of torch's.
//
// Every function takes its arguments as a struct and a range of its work (rows, unless said otherwise), so that the
// caller decides how many threads there are. A "row" is `cols` adjacent elements; `*_stride` is the distance between
// rows in elements. Statistics, parameters and their gradients are float32.
#pragma once
#include <stdint.h>
#include <string.h>

#include "attention_args.h"

namespace llmfast::cpu {

struct BFloat16 {
  uint16_t bits;
};

static inline float to_float(float value) { return value; }
static inline float to_float(BFloat16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  memcpy(&result, &bits, sizeof result);
  return result;
}

struct SoftmaxFwd {
  const void* x;
  int64_t x_stride;
  void* y;
  int64_t cols;
};

// dx = y * (dy - sum(dy * y))
struct SoftmaxBwd {
  const void *dy, *y;
  int64_t dy_stride, y_stride;
  void* dx;
  int64_t cols;
};

struct NormFwd {
  const void* x;
  int64_t x_stride;
  const float *weight, *bias;  // either may be null
  void* y;
  float *mean, *rstd;  // RMS normalisation has no mean
  int64_t rows, cols;
  float eps;
};

// Works on chunks of rows: each has its own partial sums for the gradients of weight and bias, (chunks, cols).
struct NormBwd {
  const void *dy, *x;
  int64_t dy_stride, x_stride;
  const float *weight, *mean, *rstd;
  void* dx;
  float *partial_weight, *partial_bias;
  int64_t rows, cols, rows_per_chunk;
};

struct Gelu {
  const void* x;
  int64_t x_stride;
  const float* bias;  // may be null
  void* y;
  int64_t cols;
  bool tanh;
};

// Works on chunks of rows, as NormBwd does; partial_bias may be null.
struct GeluBwd {
  const void *dy, *x;
  int64_t dy_stride, x_stride;
  const float* bias;
  void* dx;
  float* partial_bias;
  int64_t rows, cols, rows_per_chunk;
  bool tanh;
};

struct SwiGLU {
  const void *gate, *up;
  int64_t gate_stride, up_stride;
  void* y;
  int64_t cols;
};

struct SwiGLUBwd {
  const void *dy, *gate, *up;
  int64_t dy_stride, gate_stride, up_stride;
  void *dgate, *dup;
  int64_t cols;
};

// x: (batch, length, heads, head_dim) with strides in elements and unit stride in the last dimension; y: contiguous.
// Works on the batch * length positions. `direction` is 1, or -1 to turn back, which is the gradient.
struct Rope {
  const void* x;
  int64_t batch_stride, length_stride, head_stride;
  const float *cos, *sin;  // (length, head_dim / 2)
  void* y;
  int64_t length, heads, head_dim;
  float direction;
};

// Per row: the loss (0 where ignored, NaN where the target is outside the row), the maximum, and the sum of e^(x -
// max).
struct CrossEntropyFwd {
  const void* logits;
  int64_t stride;
  const int64_t* targets;
  int64_t ignore_index;
  float *loss, *maximum, *sum;
  int64_t cols;
};

struct CrossEntropyBwd {
  const void* logits;
  int64_t stride;
  const int64_t* targets;
  int64_t ignore_index;
  const float *maximum, *sum;
  float scale;  // the upstream gradient over the number of targets that count
  void* dlogits;
  int64_t rows, cols;
};

// Works on elements. The gradient is multiplied by `grad_scale` first; corrections are 1 - beta^step.
struct AdamW {
  float* parameter;
  const float* grad;
  float *exp_avg, *exp_avg_sq;
  float learning_rate, beta1, beta2, eps, weight_decay, correction1, correction2, grad_scale;
};

// Columns: out[c] = sum over chunks of partial[chunk][c], in their order.
struct ColumnSum {
  const float* partial;
  float* out;
  int64_t chunks, cols;
};

template <class Args>
using Kernel = void (*)(const Args&, int64_t begin, int64_t end);

// Index 0 is float32, index 1 bfloat16.
template <class Args>
struct ByDtype {
  Kernel<Args> kernel[2];
};

struct Kernels {
  ByDtype<SoftmaxFwd> softmax_fwd;
  ByDtype<SoftmaxBwd> softmax_bwd;
  ByDtype<NormFwd> layer_norm_fwd, rms_norm_fwd;
  ByDtype<NormBwd> layer_norm_bwd, rms_norm_bwd;
  ByDtype<Gelu> gelu_fwd;
  ByDtype<GeluBwd> gelu_bwd;
  ByDtype<SwiGLU> swiglu_fwd;
  ByDtype<SwiGLUBwd> swiglu_bwd;
  ByDtype<Rope> rope;
  ByDtype<CrossEntropyFwd> cross_entropy_fwd;
  ByDtype<CrossEntropyBwd> cross_entropy_bwd;
  Kernel<AdamW> adamw;
  Kernel<ColumnSum> column_sum;
};

// Of one dtype.
struct AttentionKernels {
  Kernel<AttentionFwd> fwd;
  Kernel<AttentionBwd> bwd, bwd_combine;
  Kernel<AttentionDecode> decode, decode_combine;
};

// The tables for this CPU, or for the instruction set that `select_variant` has named.
const Kernels& kernels();
const AttentionKernels& attention_kernels(int dtype);
const char* variant_name();

// Returns false if this CPU, or this build, does not have the instruction set `name`.
bool select_variant(const char* name);

}  // namespace llmfast::cpu
