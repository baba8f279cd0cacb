// Cross entropy over rows of logits, forward and backward. The forward reads the logits once, each thread keeping a
// running maximum and sum; the backward once more, given those of the row. (Their logarithm, one number, would be
// rounded by the size of the logits, and the gradients with it.)
#include <algorithm>

#include "row_loop.cuh"
#include "row_tile.cuh"
#include "running.cuh"

namespace llmfast::cuda {
namespace {

constexpr int kMaxThreads = 512, kUnroll = 4;

__device__ inline float not_a_number() { return __int_as_float(0x7fffffff); }

// Threads for a row, each with kUnroll vectors of it, or more where it is long.
inline int row_threads(int64_t cols, int64_t element_bytes) {
  return static_cast<int>(std::min<int64_t>(ceil_div(cols * element_bytes, 16 * kUnroll * 32) * 32, kMaxThreads));
}

// From a peer's shared memory, the address `mine` has here.
__device__ inline double read_peer_double(uint32_t mine, int peer) {
  double v = 0.0;
#if __CUDA_ARCH__ >= 900
  asm volatile("{\n.reg .u32 at;\nmapa.shared::cluster.u32 at, %1, %2;\nld.shared::cluster.f64 %0, [at];\n}"
               : "=d"(v)
               : "r"(mine), "r"(peer)
               : "memory");
#endif
  return v;
}
__device__ inline unsigned read_peer_unsigned(uint32_t mine, int peer) {
  unsigned v = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("{\n.reg .u32 at;\nmapa.shared::cluster.u32 at, %1, %2;\nld.shared::cluster.u32 %0, [at];\n}"
               : "=r"(v)
               : "r"(mine), "r"(peer)
               : "memory");
#endif
  return v;
}

// A thread's share of a row. Other warps' loads hide the latency of these: holding the next vectors too was slower, as
// it takes the registers of those warps.
template <class T>
__device__ Running<T> running_sum(const T* x, int64_t cols, int thread, int threads) {
  constexpr int n = kPerVector<T>;
  const Span<T> span(cols, x);
  const uint4* vectors = reinterpret_cast<const uint4*>(x + span.head);
  const int count = static_cast<int>(span.vectors);
  Running<T> r;
  for (int i = thread; i < count; i += kUnroll * threads) {
    uint4 raw[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int v = i + u * threads;
      raw[u] = v < count ? load_streaming(vectors + v) : minus_infinity<T>();
    }
    r.add(raw);
  }
  const int64_t singles = cols - span.vectors * n;
  for (int64_t i = thread; i < singles; i += threads) {
    r.add(to_float(x[i < span.head ? i : i + span.vectors * n]));
  }
  return r;
}

// One row per block. Logits with +inf, NaN, or nothing but -inf make the loss NaN.
template <class T>
__global__ void __launch_bounds__(kMaxThreads, 3)
    cross_entropy_fwd_kernel(const T* logits, const int64_t* targets, float* losses, float* maxima, float* sums,
                             int64_t cols, int64_t stride, int64_t ignore_index) {
  constexpr float kUnit = Running<T>::kUnit;
  const int64_t row = blockIdx.x;
  const T* x = logits + row * stride;
  const int64_t target = targets[row];
  Running<T> total = running_sum(x, cols, threadIdx.x, blockDim.x);
  allow_next();
  const bool valid = target >= 0 && target < cols;
  const float target_logit = threadIdx.x == 0 && valid ? to_float(x[target]) : 0.0f;  // while the sums are put together
  total.reduce();
  if (blockDim.x > 32)
    total = Running<T>::template combine<kMaxDirectWarps>(exchange_parts(total.part()), blockDim.x / 32);
  if (threadIdx.x != 0) return;
  // The largest logit, and the sum below exactly that.
  const float largest = kExact<T> ? total.largest : to_float(from_float<T>(total.largest / kUnit));
  const float sum = kExact<T> ? total.sum : total.sum * exp2_approx(fmaf(-largest, kUnit, total.largest));
  maxima[row] = largest;
  sums[row] = sum;
  float loss = not_a_number();
  if (target == ignore_index) {
    loss = 0.0f;
  } else if (valid) {
    loss = logf(sum) + (largest - target_logit);  // not lse - x: that rounds by the size of lse
  }
  losses[row] = loss;
}

// Mean and count over the targets not ignored, by one cluster of blocks, so that the order of the sum is fixed.
__global__ void __launch_bounds__(1024) mean_loss_kernel(const float* losses, const int64_t* targets, float* mean,
                                                         float* count, int64_t rows, int64_t ignore_index) {
  constexpr int kAtOnce = 4;  // loads in flight: there is little else to hide their latency
  __shared__ double totals[32];
  __shared__ unsigned counts[32];
  await_previous();
  double total = 0.0;
  unsigned n = 0;
  const int64_t threads = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < rows; i += kAtOnce * threads) {
    float loss[kAtOnce];
    bool counts_in[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int64_t row = i + u * threads;
      counts_in[u] = row < rows && targets[row] != ignore_index;
      loss[u] = row < rows ? losses[row] : 0.0f;
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      if (counts_in[u]) total += loss[u];
      n += counts_in[u];
    }
  }
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int stage = 0; stage < 2; ++stage) {  // over the warp, then over the warps
    for (int offset = 16; offset > 0; offset /= 2) {
      total += __shfl_xor_sync(0xffffffffu, total, offset);
      n += __shfl_xor_sync(0xffffffffu, n, offset);
    }
    if (stage == 0) {
      if (lane == 0) {
        totals[warp] = total;
        counts[warp] = n;
      }
      __syncthreads();
      total = totals[lane];
      n = counts[lane];
      __syncthreads();
    }
  }
  if (gridDim.x > 1) {
    if (threadIdx.x == 0) {
      totals[0] = total;
      counts[0] = n;
    }
    cluster_barrier();
    if (blockIdx.x == 0 && threadIdx.x == 0) {
      for (int peer = 1; peer < gridDim.x; ++peer) {
        total += read_peer_double(shared_address(totals), peer);
        n += read_peer_unsigned(shared_address(counts), peer);
      }
    }
    cluster_barrier();  // peers stay until they have been read
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    *mean = n > 0 ? static_cast<float>(total / n) : 0.0f;
    *count = static_cast<float>(n);
  }
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads)
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

int cross_entropy_fwd(const void* logits, const int64_t* targets, float* loss, float* statistics, float* mean_loss,
                      float* count, int64_t rows, int64_t cols, int64_t logits_stride, int64_t ignore_index,
                      DType dtype, void* stream) {
  Device device;
  if (int e = current_device(&device)) return e;
  if (rows > 0) {
    const int e = dispatch(dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      Launch l;
      l.grid = dim3(static_cast<unsigned>(rows));
      l.block = dim3(row_threads(cols, sizeof(T)));
      return launch(cross_entropy_fwd_kernel<T>, l, stream, static_cast<const T*>(logits), targets, loss, statistics,
                    statistics + rows, cols, logits_stride, ignore_index);
    });
    if (e) return e;
  }
  Launch l;
  l.early = device.major >= 9;
  l.cluster = device.major >= 9 && rows > 4096 ? 8 : 1;
  l.grid = dim3(l.cluster);
  l.block = dim3(1024);
  return launch(mean_loss_kernel, l, stream, static_cast<const float*>(loss), targets, mean_loss, count, rows,
                ignore_index);
}

int cross_entropy_bwd(const void* logits, const int64_t* targets, const float* statistics, const float* grad,
                      const float* count, void* dlogits, int64_t rows, int64_t cols, int64_t logits_stride,
                      int64_t ignore_index, DType dtype, void* stream) {
  if (rows == 0) return 0;
  return dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    Launch l;
    l.grid = dim3(static_cast<unsigned>(rows));
    l.block = dim3(row_threads(cols, sizeof(T)));
    return launch(cross_entropy_bwd_kernel<T>, l, stream, static_cast<const T*>(logits), targets, statistics,
                  statistics + rows, grad, count, static_cast<T*>(dlogits), cols, logits_stride, ignore_index);
  });
}

}  // namespace llmfast::cuda
