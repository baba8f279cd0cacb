// What the CUDA half of the extension offers: launchers over raw device pointers, in plain C++ that g++ can read.
//
// Every launcher puts kernels on `stream` (a cudaStream_t) of the current device and returns a cudaError_t as an int,
// 0 for success. None allocates, synchronises or reads device memory from the host, so all can be captured in a graph.
// Inputs have unit stride in a row and any stride between rows, counted in elements; outputs are contiguous. Any
// pointer aligned to its element is right; rows whose starts are all aligned to 16 bytes are fast. Arithmetic is f32.
// rows == 0 is fine everywhere; cols is 1 .. 2^31 - 1. Results are bitwise repeatable: no atomics.
#pragma once

#include <cstdint>

namespace llmfast::cuda {

enum class DType { f32, f16, bf16 };

// A contiguous vector of parameters, one per column, or none (data == nullptr).
struct Param {
  const void* data = nullptr;
  DType dtype = DType::f32;
};

// Streaming multiprocessors of a device, for the functions below that size workspaces; 0 where there is no such device.
int multiprocessors(int device);

// What a launcher's return value means.
const char* error_text(int error);

// y = softmax(x) over each row. x: (rows, cols); y the same shape and dtype.
int softmax_fwd(const void* x, void* y, int64_t rows, int64_t cols, int64_t x_stride, DType dtype, void* stream);

// dx = y * (dy - sum(dy * y)). dy, y: (rows, cols); dx the same.
int softmax_bwd(const void* dy, const void* y, void* dx, int64_t rows, int64_t cols, int64_t dy_stride,
                int64_t y_stride, DType dtype, void* stream);

// y = (x - mean) * rstd * weight + bias, rstd = 1 / sqrt(var + eps). x, y: (rows, cols); mean, rstd: (rows,) f32.
int layer_norm_fwd(const void* x, Param weight, Param bias, void* y, float* mean, float* rstd, int64_t rows,
                   int64_t cols, int64_t x_stride, float eps, DType dtype, void* stream);

// y = x * rstd * weight, rstd = 1 / sqrt(mean(x^2) + eps). rstd: (rows,) f32.
int rms_norm_fwd(const void* x, Param weight, void* y, float* rstd, int64_t rows, int64_t cols, int64_t x_stride,
                 float eps, DType dtype, void* stream);

// Partial sums that a norm's backward wants: its workspace is 2 * norm_bwd_partials * cols floats (for rms_norm_bwd,
// half of it), aligned to 16 bytes; none is needed where neither dweight nor dbias is asked for. At least 1.
int64_t norm_bwd_partials(int64_t rows, int64_t cols, int sm_count);

// dy, x: (rows, cols); mean, rstd as the forward gave them -> dx: (rows, cols) of dtype; dweight, dbias: (cols,) f32,
// each may be null. n_partials: what workspace was sized for.
int layer_norm_bwd(const void* dy, const void* x, Param weight, const float* mean, const float* rstd, void* dx,
                   float* dweight, float* dbias, float* workspace, int64_t n_partials, int64_t rows, int64_t cols,
                   int64_t dy_stride, int64_t x_stride, DType dtype, void* stream);

// As layer_norm_bwd, without mean and bias.
int rms_norm_bwd(const void* dy, const void* x, Param weight, const float* rstd, void* dx, float* dweight,
                 float* workspace, int64_t n_partials, int64_t rows, int64_t cols, int64_t dy_stride, int64_t x_stride,
                 DType dtype, void* stream);

// loss = lse - logits[target], lse = log(sum(exp(logits))), (rows,) f32: 0 where target == ignore_index and NaN where
// it is otherwise outside [0, cols). statistics: (2, rows) f32, each row's largest logit, then the sum of exponentials
// below it. mean_loss, count: one f32 each, over the targets not ignored; mean 0 if there are none. logits:
// (rows, cols); targets: (rows,).
int cross_entropy_fwd(const void* logits, const int64_t* targets, float* loss, float* statistics, float* mean_loss,
                      float* count, int64_t rows, int64_t cols, int64_t logits_stride, int64_t ignore_index,
                      DType dtype, void* stream);

// dlogits = (softmax(logits) - onehot(target)) * grad / max(count, 1); rows of 0 where the target is ignored, of NaN
// where it is out of range. grad, count: one f32 each, in device memory; statistics as the forward gave them.
int cross_entropy_bwd(const void* logits, const int64_t* targets, const float* statistics, const float* grad,
                      const float* count, void* dlogits, int64_t rows, int64_t cols, int64_t logits_stride,
                      int64_t ignore_index, DType dtype, void* stream);

// y = gelu(x + bias): x * Phi(x) by erf, or GPT-2's tanh formula. x, y: (rows, cols).
int bias_gelu_fwd(const void* x, Param bias, void* y, int64_t rows, int64_t cols, int64_t x_stride, bool tanh_formula,
                  DType dtype, void* stream);

// The workspace of bias_gelu_bwd is this many times cols floats, aligned to 16 bytes; at least 1.
int64_t bias_gelu_bwd_partials(int64_t rows, int64_t cols, int sm_count);

// dx = dy * gelu'(x + bias); dbias: (cols,) f32, the sum of dx (unrounded) over rows, or null.
int bias_gelu_bwd(const void* dy, const void* x, Param bias, void* dx, float* dbias, float* workspace,
                  int64_t n_partials, int64_t rows, int64_t cols, int64_t dy_stride, int64_t x_stride,
                  bool tanh_formula, DType dtype, void* stream);

}  // namespace llmfast::cuda
