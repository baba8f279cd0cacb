// Cross entropy over rows of logits, forward and backward. The forward reads the logits once, each thread keeping a
// running maximum and sum (online softmax, https://arxiv.org/abs/1805.02867); the backward once more, given lse.
#include <algorithm>

#include "row_loop.cuh"

namespace llmfast::cuda {
namespace {

constexpr int kMaxThreads = 512, kUnroll = 4;

__device__ inline float not_a_number() { return __int_as_float(0x7fffffff); }

// Threads for a row, each with kUnroll vectors of it or more.
inline int row_threads(int64_t cols, int64_t element_bytes) {
  const int64_t wanted = ceil_div(cols * element_bytes, 16 * kUnroll * 32) * 32;
  return static_cast<int>(std::min<int64_t>(std::max<int64_t>(wanted, 32), kMaxThreads));
}

// A maximum and the sum of exponentials below it. Nothing but -inf seen: a sum of 0.
struct Running {
  float largest = Max::identity, sum = 0.0f;

  template <class T, int N>
  __device__ void add(const float (&x)[N]) {
    float larger = largest;
#pragma unroll
    for (int j = 0; j < N; ++j) larger = fmaxf(larger, x[j]);
    const float base = larger == Max::identity ? 0.0f : larger;  // -inf - -inf would be NaN
    float added = 0.0f;
#pragma unroll
    for (int j = 0; j < N; ++j) added += exponential<T>(x[j] - base);
    sum = sum * exponential<T>(largest - base) + added;
    largest = larger;
  }
};

template <class T>
__device__ Running running_sum(const T* x, int64_t cols, int thread, int threads) {
  constexpr int n = kPerVector<T>;
  const Span<T> span(cols, x);
  Running r;
  for (int64_t i = thread; i < span.vectors; i += kUnroll * threads) {
    uint4 raw[kUnroll];
    float f[kUnroll * n];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t v = i + u * threads;
      raw[u] = v < span.vectors ? __ldg(reinterpret_cast<const uint4*>(x + span.head) + v) : minus_infinity<T>();
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) unpack<T>(raw[u], *reinterpret_cast<float(*)[n]>(f + u * n));
    r.template add<T>(f);
  }
  const int64_t singles = cols - span.vectors * n;
  for (int64_t i = thread; i < singles; i += threads) {
    float f[1];
    load(x + (i < span.head ? i : i + span.vectors * n), f);
    r.template add<T>(f);
  }
  return r;
}

// One row per block. Logits with +inf, NaN, or nothing but -inf make the loss NaN.
template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    cross_entropy_fwd_kernel(const T* logits, const int64_t* targets, float* losses, float* lses, int64_t cols,
                             int64_t stride, int64_t ignore_index) {
  const int64_t row = blockIdx.x;
  const T* x = logits + row * stride;
  const LoopGroup group(false);
  const Running r = running_sum(x, cols, group.thread, group.threads);
  const float largest = group.template all_reduce<Max>(r.largest);
  const float part = r.sum == 0.0f ? 0.0f : r.sum * exponential<T>(r.largest - largest);
  const float total = group.template all_reduce<Add>(part);
  if (group.thread != 0) return;
  const int64_t target = targets[row];
  const float log_total = logf(total);
  lses[row] = largest + log_total;
  float loss = not_a_number();
  if (target == ignore_index) {
    loss = 0.0f;
  } else if (target >= 0 && target < cols) {
    loss = log_total + (largest - to_float(x[target]));  // not lse - x: that rounds by the size of lse
  }
  losses[row] = loss;
}

// Mean and count over the targets not ignored, by one block, so that the order of the sum is fixed.
__global__ void __launch_bounds__(1024)
    mean_loss_kernel(const float* losses, const int64_t* targets, float* mean, float* count, int64_t rows,
                     int64_t ignore_index) {
  double total = 0.0;
  unsigned n = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < rows; i += blockDim.x) {
    if (targets[i] != ignore_index) {
      total += losses[i];
      ++n;
    }
  }
  __shared__ double totals[1024];
  __shared__ unsigned counts[1024];
  totals[threadIdx.x] = total;
  counts[threadIdx.x] = n;
  for (int half = blockDim.x / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) {
      totals[threadIdx.x] += totals[threadIdx.x + half];
      counts[threadIdx.x] += counts[threadIdx.x + half];
    }
  }
  if (threadIdx.x == 0) {
    *mean = counts[0] > 0 ? static_cast<float>(totals[0] / counts[0]) : 0.0f;
    *count = static_cast<float>(counts[0]);
  }
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    cross_entropy_bwd_kernel(const T* __restrict__ logits, const int64_t* __restrict__ targets,
                             const float* __restrict__ lses, const float* grad, const float* count,
                             T* __restrict__ dlogits, int64_t cols, int64_t stride, int64_t ignore_index) {
  constexpr int n = kPerVector<T>;
  const int64_t row = blockIdx.x;
  const T* x = logits + row * stride;
  T* dx = dlogits + row * cols;
  const Span<T> span(cols, x, dx);
  const int64_t target = targets[row];
  const bool ignored = target == ignore_index;
  const bool valid = target >= 0 && target < cols;
  const float lse = lses[row];
  const float scale = valid ? *grad / fmaxf(*count, 1.0f) : not_a_number();
  const auto gradient = [&](float v, int64_t col) {
    return ignored ? 0.0f : (exponential<T>(v - lse) - (col == target ? 1.0f : 0.0f)) * scale;
  };
  for (int64_t i = threadIdx.x; i < span.vectors; i += kUnroll * blockDim.x) {
    uint4 raw[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t v = i + u * blockDim.x;
      if (v < span.vectors && !ignored) raw[u] = __ldg(reinterpret_cast<const uint4*>(x + span.head) + v);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t v = i + u * blockDim.x, col = span.head + v * n;
      if (v >= span.vectors) break;
      float f[n];
      unpack<T>(raw[u], f);
#pragma unroll
      for (int j = 0; j < n; ++j) f[j] = gradient(f[j], col + j);
      store(dx + col, f);
    }
  }
  const int64_t singles = cols - span.vectors * n;
  for (int64_t i = threadIdx.x; i < singles; i += blockDim.x) {
    const int64_t col = i < span.head ? i : i + span.vectors * n;
    dx[col] = from_float<T>(gradient(to_float(x[col]), col));
  }
}

}  // namespace

int cross_entropy_fwd(const void* logits, const int64_t* targets, float* loss, float* lse, float* mean_loss,
                      float* count, int64_t rows, int64_t cols, int64_t logits_stride, int64_t ignore_index,
                      DType dtype, void* stream) {
  if (rows > 0) {
    const int e = dispatch(dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      Launch l;
      l.grid = dim3(static_cast<unsigned>(rows));
      l.block = dim3(row_threads(cols, sizeof(T)));
      return launch(cross_entropy_fwd_kernel<T>, l, stream, static_cast<const T*>(logits), targets, loss, lse, cols,
                    logits_stride, ignore_index);
    });
    if (e) return e;
  }
  Launch l;
  l.grid = dim3(1);
  l.block = dim3(1024);
  return launch(mean_loss_kernel, l, stream, static_cast<const float*>(loss), targets, mean_loss, count, rows,
                ignore_index);
}

int cross_entropy_bwd(const void* logits, const int64_t* targets, const float* lse, const float* grad,
                      const float* count, void* dlogits, int64_t rows, int64_t cols, int64_t logits_stride,
                      int64_t ignore_index, DType dtype, void* stream) {
  if (rows == 0) return 0;
  return dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    Launch l;
    l.grid = dim3(static_cast<unsigned>(rows));
    l.block = dim3(row_threads(cols, sizeof(T)));
    return launch(cross_entropy_bwd_kernel<T>, l, stream, static_cast<const T*>(logits), targets, lse, grad, count,
                  static_cast<T*>(dlogits), cols, logits_stride, ignore_index);
  });
}

}  // namespace llmfast::cuda
