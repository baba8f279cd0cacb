// Cross entropy over rows of logits, forward and backward. The forward reads the logits once, each thread keeping a
// running maximum and sum; the backward once more, given those of the row. (Their logarithm, one number, would be
// rounded by the size of the logits, and the gradients with it.)
#include <algorithm>

#include "row_loop.cuh"
#include "running.cuh"

namespace llmfast::cuda {
namespace {

constexpr int kMaxForwardThreads = 256, kMaxBackwardThreads = 512, kUnroll = 4;

__device__ inline float not_a_number() { return __int_as_float(0x7fffffff); }

// Threads for a row, each with kUnroll vectors of it or more.
inline int row_threads(int64_t cols, int64_t element_bytes, int64_t most) {
  const int64_t wanted = ceil_div(cols * element_bytes, 16 * kUnroll * 32) * 32;
  return static_cast<int>(std::min<int64_t>(std::max<int64_t>(wanted, 32), most));
}

// A thread's share of a row. The next vectors are on their way while these are added up.
template <class T>
__device__ Running<T> running_sum(const T* x, int64_t cols, int thread, int threads) {
  constexpr int n = kPerVector<T>;
  const Span<T> span(cols, x);
  const uint4* vectors = reinterpret_cast<const uint4*>(x + span.head);
  Running<T> r;
  uint4 raw[kUnroll];
  const auto load_next = [&](int64_t i) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t v = i + u * threads;
      raw[u] = v < span.vectors ? __ldg(vectors + v) : minus_infinity<T>();
    }
  };
  load_next(thread);
  for (int64_t i = thread; i < span.vectors; i += kUnroll * threads) {
    float f[kUnroll * n];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) unpack<T>(raw[u], *reinterpret_cast<float(*)[n]>(f + u * n));
    load_next(i + kUnroll * threads);
    r.add(f);
  }
  const int64_t singles = cols - span.vectors * n;
  for (int64_t i = thread; i < singles; i += threads) {
    float f[1];
    load(x + (i < span.head ? i : i + span.vectors * n), f);
    r.add(f);
  }
  return r;
}

// One row per block, of up to 32 warps. Logits with +inf, NaN, or nothing but -inf make the loss NaN.
template <class T>
__global__ void __launch_bounds__(kMaxForwardThreads, 4)
    cross_entropy_fwd_kernel(const T* logits, const int64_t* targets, float* losses, float* maxima, float* sums,
                             int64_t cols, int64_t stride, int64_t ignore_index) {
  const int64_t row = blockIdx.x;
  const T* x = logits + row * stride;
  __shared__ float4 parts[kMaxForwardThreads / 32];
  int64_t target = 0;
  float target_logit = 0.0f;
  if (threadIdx.x == 0) {  // before the row, whose time hides theirs
    target = targets[row];
    if (target >= 0 && target < cols) target_logit = to_float(x[target]);
  }
  Running<T> total = running_sum(x, cols, threadIdx.x, blockDim.x);
  allow_next();
  total.reduce();
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = total.part();
  __syncthreads();
  if (threadIdx.x >= 32) return;
  total.combine(parts, blockDim.x / 32);
  if (threadIdx.x != 0) return;
  maxima[row] = total.largest;
  sums[row] = total.sum;
  float loss = not_a_number();
  if (target == ignore_index) {
    loss = 0.0f;
  } else if (target >= 0 && target < cols) {
    loss = logf(total.sum) + (total.largest - target_logit);  // not lse - x: that rounds by the size of lse
  }
  losses[row] = loss;
}

// Mean and count over the targets not ignored, by one block, so that the order of the sum is fixed.
__global__ void __launch_bounds__(1024)
    mean_loss_kernel(const float* losses, const int64_t* targets, float* mean, float* count, int64_t rows,
                     int64_t ignore_index) {
  constexpr int kAtOnce = 8;  // loads in flight: one block has little else to hide their latency
  await_previous();
  double total = 0.0;
  unsigned n = 0;
  for (int64_t i = threadIdx.x; i < rows; i += kAtOnce * blockDim.x) {
    float loss[kAtOnce];
    bool counts[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int64_t row = i + u * blockDim.x;
      counts[u] = row < rows && targets[row] != ignore_index;
      loss[u] = row < rows ? losses[row] : 0.0f;
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      if (counts[u]) total += loss[u];
      n += counts[u];
    }
  }
  __shared__ double totals[32];
  __shared__ unsigned counts[32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int stage = 0; stage < 2; ++stage) {  // over the warp, then over the warps
    for (int offset = 16; offset > 0; offset /= 2) {
      total += __shfl_xor_sync(0xffffffffu, total, offset);
      n += __shfl_xor_sync(0xffffffffu, n, offset);
    }
    if (stage == 1) break;
    if (lane == 0) {
      totals[warp] = total;
      counts[warp] = n;
    }
    __syncthreads();
    if (warp > 0) return;
    total = totals[lane];
    n = counts[lane];
  }
  if (threadIdx.x == 0) {
    *mean = n > 0 ? static_cast<float>(total / n) : 0.0f;
    *count = static_cast<float>(n);
  }
}

template <class T>
__global__ void __launch_bounds__(kMaxBackwardThreads)
    cross_entropy_bwd_kernel(const T* __restrict__ logits, const int64_t* __restrict__ targets,
                             const float* __restrict__ maxima, const float* __restrict__ sums, const float* grad,
                             const float* count, T* __restrict__ dlogits, int64_t cols, int64_t stride,
                             int64_t ignore_index) {
  constexpr int n = kPerVector<T>;
  const int64_t row = blockIdx.x;
  const T* x = logits + row * stride;
  T* dx = dlogits + row * cols;
  const Span<T> span(cols, x, dx);
  const int64_t target = targets[row];
  const bool ignored = target == ignore_index;
  const bool valid = target >= 0 && target < cols;
  const float largest = maxima[row], sum = sums[row], reciprocal = 1.0f / sum;
  const float scale = valid ? *grad / fmaxf(*count, 1.0f) : not_a_number();
  const auto gradient = [&](float v, int64_t col) {
    const float e = exponential<T>(v - largest), p = kExact<T> ? e / sum : e * reciprocal;
    return ignored ? 0.0f : (p - (col == target ? 1.0f : 0.0f)) * scale;
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

int cross_entropy_fwd(const void* logits, const int64_t* targets, float* loss, float* statistics,
                      float* mean_loss, float* count, int64_t rows, int64_t cols, int64_t logits_stride,
                      int64_t ignore_index, DType dtype, void* stream) {
  Device device;
  if (int e = current_device(&device)) return e;
  if (rows > 0) {
    const int e = dispatch(dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      Launch l;
      l.grid = dim3(static_cast<unsigned>(rows));
      l.block = dim3(row_threads(cols, sizeof(T), kMaxForwardThreads));
      return launch(cross_entropy_fwd_kernel<T>, l, stream, static_cast<const T*>(logits), targets, loss, statistics,
                    statistics + rows, cols, logits_stride, ignore_index);
    });
    if (e) return e;
  }
  Launch l;
  l.early = device.major >= 9;
  l.grid = dim3(1);
  l.block = dim3(1024);
  return launch(mean_loss_kernel, l, stream, static_cast<const float*>(loss), targets, mean_loss, count, rows,
                ignore_index);
}

int cross_entropy_bwd(const void* logits, const int64_t* targets, const float* statistics,
                      const float* grad, const float* count, void* dlogits, int64_t rows, int64_t cols, int64_t logits_stride,
                      int64_t ignore_index, DType dtype, void* stream) {
  if (rows == 0) return 0;
  return dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    Launch l;
    l.grid = dim3(static_cast<unsigned>(rows));
    l.block = dim3(row_threads(cols, sizeof(T), kMaxBackwardThreads));
    return launch(cross_entropy_bwd_kernel<T>, l, stream, static_cast<const T*>(logits), targets, statistics,
                  statistics + rows, grad, count, static_cast<T*>(dlogits), cols, logits_stride, ignore_index);
  });
}

}  // namespace llmfast::cuda
