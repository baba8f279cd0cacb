// Softmax over rows, forward and backward. Longer or ragged rows are walked in pieces, the forward keeping a running
// maximum and sum per thread (online softmax, https://arxiv.org/abs/1805.02867).
#include "row_loop.cuh"
#include "row_tile.cuh"

namespace llmfast::cuda {
namespace {

constexpr int kForwardThreads = 1024, kBackwardThreads = 512;

// e^(x - m) / sum. A row with +inf, NaN or nothing but -inf becomes NaN by itself: inf - inf, or 0 / 0.
template <class T, int V>
__global__ void __launch_bounds__(kForwardThreads)
    softmax_fwd_kernel(const T* x_rows, T* y_rows, int64_t cols, int64_t x_stride, RowShape shape) {
  extern __shared__ uint4 shared[];
  constexpr int n = kPerVector<T>;
  uint4* ring = shared;
  Group group(reinterpret_cast<float*>(ring + blockDim.y * shape.stages * V * blockDim.x), shape.cluster);
  RowTile<T, V, 1> tile(shape, group, ring, {x_rows}, {x_stride});
  group.start();
  for (; tile.more(); tile.advance()) {
    float e[V][n];
    float largest = Max::identity;
    tile.acquire();
#pragma unroll
    for (int i = 0; i < V; ++i) {
      unpack<T>(tile.vector(0, i, minus_infinity<T>()), e[i]);
#pragma unroll
      for (int j = 0; j < n; ++j) largest = fmaxf(largest, e[i][j]);
    }
    tile.release();
    largest = group.all_reduce<Max>(largest);
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < V; ++i) {
#pragma unroll
      for (int j = 0; j < n; ++j) total += e[i][j] = exponential<T>(e[i][j] - largest);
    }
    // What lies past the row's end is not counted, but where all is -inf it is NaN, as the whole row then is.
    total = group.all_reduce<Add>(total);
    const float reciprocal = 1.0f / total;
    T* y = y_rows + static_cast<int64_t>(tile.row) * cols;
#pragma unroll
    for (int i = 0; i < V; ++i) {
#pragma unroll
      for (int j = 0; j < n; ++j) e[i][j] = kExact<T> ? e[i][j] / total : e[i][j] * reciprocal;
      if (i < tile.owned) store<n>(y + tile.column(i), e[i]);
    }
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    softmax_bwd_kernel(const T* dy_rows, const T* y_rows, T* dx_rows, int64_t cols, int64_t dy_stride,
                       int64_t y_stride, RowShape shape) {
  extern __shared__ uint4 shared[];
  constexpr int n = kPerVector<T>;
  uint4* ring = shared;
  Group group(reinterpret_cast<float*>(ring + blockDim.y * shape.stages * 2 * V * blockDim.x), shape.cluster);
  RowTile<T, V, 2> tile(shape, group, ring, {dy_rows, y_rows}, {dy_stride, y_stride});
  group.start();
  for (; tile.more(); tile.advance()) {
    uint4 in[2][V];
    tile.acquire();
#pragma unroll
    for (int i = 0; i < V; ++i) {
      in[0][i] = tile.vector(0, i);
      in[1][i] = tile.vector(1, i);
    }
    tile.release();
    float dot = 0.0f;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      float dy[n], y[n];
      unpack<T>(in[0][i], dy);
      unpack<T>(in[1][i], y);
#pragma unroll
      for (int j = 0; j < n; ++j) dot += dy[j] * y[j];
    }
    dot = group.all_reduce<Add>(dot);
    T* dx = dx_rows + static_cast<int64_t>(tile.row) * cols;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      float dy[n], y[n];
      unpack<T>(in[0][i], dy);
      unpack<T>(in[1][i], y);
#pragma unroll
      for (int j = 0; j < n; ++j) y[j] *= dy[j] - dot;
      if (i < tile.owned) store<n>(dx + tile.column(i), y);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(512)
    softmax_fwd_loop_kernel(const T* x, T* y, int64_t rows, int64_t cols, int64_t x_stride, bool row_per_warp) {
  const LoopGroup group(row_per_warp);
  if (group.row >= rows) return;
  x += group.row * x_stride;
  y += group.row * cols;
  const Span<T> span(cols, x, y);
  float m = Max::identity, s = 0.0f;
  span.visit(group.thread, group.threads, [&](auto count, int64_t col) {
    constexpr int n = decltype(count)::value;
    float f[n];
    load<n>(x + col, f);
    float larger = m;
#pragma unroll
    for (int j = 0; j < n; ++j) larger = fmaxf(larger, f[j]);
    // A thread that has seen only -inf keeps a sum of 0: -inf - -inf would make it NaN.
    const float base = larger == Max::identity ? 0.0f : larger;
    float sum = s * exponential<T>(m - base);
#pragma unroll
    for (int j = 0; j < n; ++j) sum += exponential<T>(f[j] - base);
    s = sum;
    m = larger;
  });
  const float largest = group.template all_reduce<Max>(m);
  const float total = group.template all_reduce<Add>(s == 0.0f ? 0.0f : s * exponential<T>(m - largest));
  span.visit(group.thread, group.threads, [&](auto count, int64_t col) {
    constexpr int n = decltype(count)::value;
    float f[n];
    load<n>(x + col, f);
#pragma unroll
    for (int j = 0; j < n; ++j) f[j] = exponential<T>(f[j] - largest) / total;
    store<n>(y + col, f);
  });
}

template <class T>
__global__ void __launch_bounds__(512)
    softmax_bwd_loop_kernel(const T* dy, const T* y, T* dx, int64_t rows, int64_t cols, int64_t dy_stride,
                            int64_t y_stride, bool row_per_warp) {
  const LoopGroup group(row_per_warp);
  if (group.row >= rows) return;
  dy += group.row * dy_stride;
  y += group.row * y_stride;
  dx += group.row * cols;
  const Span<T> span(cols, dy, y, dx);
  float dot = 0.0f;
  span.visit(group.thread, group.threads, [&](auto count, int64_t col) {
    constexpr int n = decltype(count)::value;
    float a[n], b[n];
    load<n>(dy + col, a);
    load<n>(y + col, b);
#pragma unroll
    for (int j = 0; j < n; ++j) dot += a[j] * b[j];
  });
  dot = group.template all_reduce<Add>(dot);
  span.visit(group.thread, group.threads, [&](auto count, int64_t col) {
    constexpr int n = decltype(count)::value;
    float a[n], b[n];
    load<n>(dy + col, a);
    load<n>(y + col, b);
#pragma unroll
    for (int j = 0; j < n; ++j) b[j] *= a[j] - dot;
    store<n>(dx + col, b);
  });
}

}  // namespace

int softmax_fwd(const void* x, void* y, int64_t rows, int64_t cols, int64_t x_stride, DType dtype, void* stream) {
  if (rows == 0) return 0;
  Device device;
  if (int e = current_device(&device)) return e;
  return dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int size = sizeof(T);
    const T* in = static_cast<const T*>(x);
    T* out = static_cast<T*>(y);
    RowPlan plan;
    if (vector_rows(x, x_stride, rows, cols, size) && aligned16(y))
      plan = plan_rows(device, {rows, cols, size, 1, 0, kForwardThreads});
    if (plan.vectors_per_thread == 0) {
      const LoopPlan loop = plan_loop(rows, cols);
      return launch(softmax_fwd_loop_kernel<T>, loop.launch, stream, in, out, rows, cols, x_stride, loop.row_per_warp);
    }
    return dispatch_vectors(plan.vectors_per_thread, [&](auto v) {
      auto kernel = softmax_fwd_kernel<T, decltype(v)::value>;
      if (int e = fill_grid(reinterpret_cast<const void*>(kernel), device, &plan)) return e;
      return launch(kernel, plan.launch, stream, in, out, cols, x_stride, plan.shape);
    });
  });
}

int softmax_bwd(const void* dy, const void* y, void* dx, int64_t rows, int64_t cols, int64_t dy_stride,
                int64_t y_stride, DType dtype, void* stream) {
  if (rows == 0) return 0;
  Device device;
  if (int e = current_device(&device)) return e;
  return dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int size = sizeof(T);
    const T *grad = static_cast<const T*>(dy), *in = static_cast<const T*>(y);
    T* out = static_cast<T*>(dx);
    RowPlan plan;
    if (vector_rows(dy, dy_stride, rows, cols, size) && vector_rows(y, y_stride, rows, cols, size) && aligned16(dx))
      plan = plan_rows(device, {rows, cols, size, 2, 0, kBackwardThreads});
    if (plan.vectors_per_thread == 0) {
      const LoopPlan loop = plan_loop(rows, cols);
      return launch(softmax_bwd_loop_kernel<T>, loop.launch, stream, grad, in, out, rows, cols, dy_stride, y_stride,
                    loop.row_per_warp);
    }
    return dispatch_vectors(plan.vectors_per_thread, [&](auto v) {
      auto kernel = softmax_bwd_kernel<T, decltype(v)::value>;
      if (int e = fill_grid(reinterpret_cast<const void*>(kernel), device, &plan)) return e;
      return launch(kernel, plan.launch, stream, grad, in, out, cols, dy_stride, y_stride, plan.shape);
    });
  });
}

}  // namespace llmfast::cuda
