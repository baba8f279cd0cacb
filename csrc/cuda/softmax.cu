// Softmax over rows, forward and backward. Longer or ragged rows are walked in pieces, the forward keeping a running
// maximum and sum per thread (online softmax, https://arxiv.org/abs/1805.02867).
#include "row_loop.cuh"
#include "row_stream.cuh"
#include "running.cuh"

namespace llmfast::cuda {
namespace {

constexpr int kStreamVectors = 4;  // of each input a thread of the backward, see RowStream
constexpr int kClusterVectors = 8, kClusterThreads = 512, kBackwardThreads = 512;

// What the backward sums: over the elements of one vector that are of the row.
template <class T, bool kRagged>
__device__ float masked_dot(const uint4& dy_raw, const uint4& y_raw, const Cover<T, kRagged>& cover, int v) {
  constexpr int n = kPerVector<T>;
  float dy[n], y[n], dot = 0.0f;
  unpack<T>(dy_raw, dy);
  unpack<T>(y_raw, y);
  if constexpr (kRagged) {  // otherwise only whole vectors of zeros are not of the row
    cover.mask(v, dy, 0.0f);
    cover.mask(v, y, 0.0f);
  }
#pragma unroll
  for (int j = 0; j < n; ++j) dot += dy[j] * y[j];
  return dot;
}

template <class T, bool kRagged>
__device__ void store_gradient(T* dx, const Cover<T, kRagged>& cover, int v, const uint4& dy_raw, const uint4& y_raw,
                               float dot) {
  constexpr int n = kPerVector<T>;
  float dy[n], y[n];
  unpack<T>(dy_raw, dy);
  unpack<T>(y_raw, y);
#pragma unroll
  for (int j = 0; j < n; ++j) y[j] *= dy[j] - dot;
  cover.store(dx, v, y);
}

// The same bits, which the compiler cannot know: it would otherwise keep the floats unpacked from them a first time,
// for which there are too few registers.
__device__ inline uint4 disguised(const uint4& v) {
  const unsigned zero = blockDim.z - 1;
  return {v.x ^ zero, v.y ^ zero, v.z ^ zero, v.w ^ zero};
}

// kTwice: the row is read again, rather than held.
template <class T, int V, bool kRagged, bool kTwice>
__global__ void __launch_bounds__(kTwice ? kMaxTwiceThreads : kMaxDirectThreads, 2)
    softmax_fwd_kernel(const T* x, T* y, int rows, int cols, int64_t x_stride) {
  constexpr int n = kPerVector<T>;
  const int64_t row = direct_row();
  if (row >= rows) return;  // whole warps, of rows of one warp each
  x += row * x_stride;
  y += row * cols;
  const Cover<T, kRagged> cover(x, cols);
  uint4 raw[V];
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const int v = threadIdx.x + i * blockDim.x;
    raw[i] = v < cover.vectors ? load_row<true>(cover.at(x, v)) : uint4{};
  }
#pragma unroll
  for (int i = 0; i < V; ++i) raw[i] = cover.masked(threadIdx.x + i * blockDim.x, raw[i]);
  Running<T> total;
  total.add(raw);
  total.reduce();
  if (blockDim.x > 32)
    total = Running<T>::template combine<kTwice ? 32 : kMaxDirectWarps>(exchange_parts(total.part()), blockDim.x / 32);
  const Normalizer<T> normalized(total);
  if (!kTwice) keep_packed(raw);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const int v = threadIdx.x + i * blockDim.x;
    if (v < cover.vectors) {
      float e[n];
      unpack<T>(kTwice ? load_row<true>(cover.at(x, v)) : raw[i], e);
#pragma unroll
      for (int j = 0; j < n; ++j) e[j] = normalized(e[j]);
      cover.store(y, v, e);
    }
  }
}

template <class T, int V, bool kRagged>
__global__ void __launch_bounds__(1024)
    softmax_bwd_kernel(const T* dy, const T* y, T* dx, int rows, int cols, int64_t dy_stride, int64_t y_stride) {
  const int64_t row = direct_row();
  if (row >= rows) return;  // whole warps, of rows of one warp each
  dy += row * dy_stride;
  y += row * y_stride;
  dx += row * cols;
  const Cover<T, kRagged> cover(dy, cols);
  uint4 in[2][V];
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const int v = threadIdx.x + i * blockDim.x;
    in[0][i] = v < cover.vectors ? load_row<false>(cover.at(dy, v)) : uint4{};
    in[1][i] = v < cover.vectors ? load_row<false>(cover.at(y, v)) : uint4{};
  }
  float dot = 0.0f;
#pragma unroll
  for (int i = 0; i < V; ++i) dot += masked_dot(in[0][i], in[1][i], cover, threadIdx.x + i * blockDim.x);
  dot = warp_reduce<Add>(dot);
  if (blockDim.x > 32) {
    __shared__ float parts[32];
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = dot;
    __syncthreads();
    const int lane = threadIdx.x % 32;
    dot = warp_reduce<Add>(lane < blockDim.x / 32 ? parts[lane] : 0.0f);
  }
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const int v = threadIdx.x + i * blockDim.x;
    if (v < cover.vectors) store_gradient(dx, cover, v, disguised(in[0][i]), disguised(in[1][i]), dot);
  }
}

// A longer row, one to a cluster, in slices that its blocks hold in shared memory: bytes in flight cost no registers
// there, and the several blocks of a multiprocessor load while one waits for the sums of its cluster.
template <class T, bool kRagged>
__global__ void __launch_bounds__(kClusterThreads, 2)
    softmax_fwd_cluster_kernel(const T* x, T* y, int cols, int64_t x_stride, int per_block) {
  extern __shared__ uint4 shared[];
  constexpr int n = kPerVector<T>, V = kClusterVectors;
  ClusterExchange exchange(shared, kMaxCluster);
  uint4* slots = shared + exchange_bytes(blockDim.x, kMaxCluster) / 16 + threadIdx.x;
  const int64_t row = blockIdx.x / kMaxCluster;
  x += row * x_stride;
  y += row * cols;
  const Cover<T, kRagged> cover(x, cols);
  const int first = exchange.rank * per_block + threadIdx.x;
  const int stop = min(cover.vectors, (exchange.rank + 1) * per_block);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const int v = first + i * blockDim.x;
    if (v < stop) copy_async(shared_address(slots + i * blockDim.x), cover.at(x, v));
  }
  exchange.start();
  asm volatile("cp.async.wait_all;" ::: "memory");
  uint4 raw[V];
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const int v = first + i * blockDim.x;
    raw[i] = v < stop ? cover.masked(v, slots[i * blockDim.x]) : minus_infinity<T>();
  }
  Running<T> total;
  total.add(raw);
  total.reduce();
  exchange.post(total.part(),
                [](const float4* parts, int warps) { return Running<T>::template combine<32>(parts, warps).part(); });
  const Normalizer<T> normalized(Running<T>::template combine<kMaxCluster>(exchange.collect(), kMaxCluster));
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const int v = first + i * blockDim.x;
    if (v >= stop) break;
    float e[n];
    unpack<T>(slots[i * blockDim.x], e);
#pragma unroll
    for (int j = 0; j < n; ++j) e[j] = normalized(e[j]);
    cover.store(y, v, e);
  }
}

// Rows over clusters, see RowStream.
template <class T, bool kRagged>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    softmax_bwd_stream_kernel(const T* dy_rows, const T* y_rows, T* dx_rows, int64_t dy_stride, int64_t y_stride,
                              StreamShape shape) {
  extern __shared__ uint4 shared[];
  constexpr int V = kStreamVectors;
  ClusterExchange exchange(shared, shape.cluster);
  RowStream<T, V, 2, kRagged> stream(shape, shared + exchange_bytes(blockDim.x, shape.cluster) / 16, {dy_rows, y_rows},
                                     {dy_stride, y_stride});
  exchange.start();
  stream.walk(
      [&](int stage, int row) {
        const Cover<T, kRagged> cover(dy_rows + row * dy_stride, shape.cols);
        const int stop = stream.end(cover.vectors);
        float dot = 0.0f;
#pragma unroll
        for (int i = 0; i < V; ++i) {
          if (stream.vector_index(i) >= stop) break;
          dot += masked_dot(*stream.slot(stage, 0, i), *stream.slot(stage, 1, i), cover, stream.vector_index(i));
        }
        exchange.post(make_float4(warp_reduce<Add>(dot), 0.0f, 0.0f, 0.0f), [](const float4* parts, int warps) {
          return make_float4(sum_parts<32>(parts, warps).x, 0.0f, 0.0f, 0.0f);
        });
      },
      [&](int stage, int row) {
        const Cover<T, kRagged> cover(dy_rows + row * dy_stride, shape.cols);
        const int stop = stream.end(cover.vectors);
        T* dx = dx_rows + static_cast<int64_t>(row) * shape.cols;
        const float dot = sum_parts<kMaxCluster>(exchange.collect(), shape.cluster).x;
#pragma unroll
        for (int i = 0; i < V; ++i) {
          if (stream.vector_index(i) >= stop) break;
          store_gradient(dx, cover, stream.vector_index(i), *stream.slot(stage, 0, i), *stream.slot(stage, 1, i), dot);
        }
      });
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

// How rows of several tensors lie over 16-byte boundaries.
struct Layout {
  int64_t vectors = 0;  // that a row covers at most; 0 where the tensors' rows do not all lie alike
  bool ragged = false;  // some rows begin or end within a vector
};

template <class T>
Layout row_layout(int64_t rows, int64_t cols, const void* first, int64_t stride, const void* second,
                  int64_t second_stride, const void* out) {
  constexpr int64_t size = sizeof(T);
  const auto phase = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16; };
  const auto alike = [&](const void* p, int64_t p_stride) {
    return phase(p) == phase(first) && (rows == 1 || (p_stride - stride) * size % 16 == 0);
  };
  Layout layout;
  if (cols > INT32_MAX / 2 || !alike(second, second_stride) || !alike(out, cols)) return layout;
  layout.ragged = !whole_vectors(first, stride, rows, cols * size, size);
  layout.vectors = ceil_div(cols * size + (layout.ragged ? 16 - size : 0), 16);
  return layout;
}

// As plan_direct, in blocks of up to 1024 threads.
DirectPlan plan_backward(int64_t rows, int64_t vectors, bool ragged) {
  DirectPlan plan = plan_direct(rows, vectors, ragged);
  if (plan.vectors_per_thread > 0 || vectors == 0 || vectors > 4 * 1024 || rows > INT32_MAX) return plan;
  plan.vectors_per_thread = 4;
  plan.launch.block = dim3(static_cast<unsigned>(ceil_div(vectors, 128) * 32));
  plan.launch.grid = dim3(static_cast<unsigned>(rows));
  return plan;
}

// The launch of softmax_fwd_cluster_kernel, and the slice of a block; 0 where the rows do not fit.
Launch plan_cluster(const Device& device, int64_t rows, int64_t vectors, int* per_block) {
  Launch l;
  const int64_t slice = ceil_div(vectors, kMaxCluster);
  const bool fits = device.major >= 9 && slice <= kClusterVectors * kClusterThreads && rows <= INT32_MAX / kMaxCluster;
  *per_block = fits ? static_cast<int>(slice) : 0;
  l.cluster = kMaxCluster;
  l.grid = dim3(static_cast<unsigned>(rows * kMaxCluster));
  l.block = dim3(static_cast<unsigned>(ceil_div(slice, 32 * kClusterVectors) * 32));
  l.smem = exchange_bytes(l.block.x, kMaxCluster) + size_t{16} * kClusterVectors * l.block.x;
  return l;
}

}  // namespace

int softmax_fwd(const void* x, void* y, int64_t rows, int64_t cols, int64_t x_stride, DType dtype, void* stream) {
  if (rows == 0) return 0;
  Device device;
  if (int e = current_device(&device)) return e;
  return dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const T* in = static_cast<const T*>(x);
    T* out = static_cast<T*>(y);
    const Layout layout = row_layout<T>(rows, cols, x, x_stride, x, x_stride, y);
    const DirectPlan direct = plan_direct(rows, layout.vectors, layout.ragged);
    const int n_rows = static_cast<int>(rows), n_cols = static_cast<int>(cols);
    const auto go = [&](auto kernel, const Launch& l) {
      return launch(kernel, l, stream, in, out, n_rows, n_cols, x_stride);
    };
    if (direct.vectors_per_thread > 0) {
      if (layout.ragged) return go(softmax_fwd_kernel<T, 4, true, false>, direct.launch);
      return dispatch_vectors(direct.vectors_per_thread, [&](auto v) {
        return go(softmax_fwd_kernel<T, decltype(v)::value, false, false>, direct.launch);
      });
    }
    if (const Launch twice = plan_twice(rows, layout.vectors); !layout.ragged && twice.grid.x > 0)
      return go(softmax_fwd_kernel<T, kTwiceVectors, false, true>, twice);
    int per_block = 0;
    const Launch cluster = plan_cluster(device, rows, layout.vectors, &per_block);
    if (per_block == 0) {
      const LoopPlan loop = plan_loop(rows, cols);
      return launch(softmax_fwd_loop_kernel<T>, loop.launch, stream, in, out, rows, cols, x_stride, loop.row_per_warp);
    }
    const auto kernel = layout.ragged ? softmax_fwd_cluster_kernel<T, true> : softmax_fwd_cluster_kernel<T, false>;
    int at_once = 0;  // asked for the shared memory that this allows the kernel
    if (int e = resident(reinterpret_cast<const void*>(kernel), device, cluster, &at_once)) return e;
    return launch(kernel, cluster, stream, in, out, n_cols, x_stride, per_block);
  });
}

int softmax_bwd(const void* dy, const void* y, void* dx, int64_t rows, int64_t cols, int64_t dy_stride,
                int64_t y_stride, DType dtype, void* stream) {
  if (rows == 0) return 0;
  Device device;
  if (int e = current_device(&device)) return e;
  return dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const T *grad = static_cast<const T*>(dy), *in = static_cast<const T*>(y);
    T* out = static_cast<T*>(dx);
    const Layout layout = row_layout<T>(rows, cols, dy, dy_stride, y, y_stride, dx);
    const DirectPlan direct = plan_backward(rows, layout.vectors, layout.ragged);
    if (direct.vectors_per_thread > 0) {
      const auto go = [&](auto kernel) {
        return launch(kernel, direct.launch, stream, grad, in, out, static_cast<int>(rows), static_cast<int>(cols),
                      dy_stride, y_stride);
      };
      if (layout.ragged) return go(softmax_bwd_kernel<T, 4, true>);
      return dispatch_vectors(direct.vectors_per_thread,
                              [&](auto v) { return go(softmax_bwd_kernel<T, decltype(v)::value, false>); });
    }
    StreamPlan plan = plan_stream(device, {rows, cols, layout.vectors, 2, kStreamVectors, kBackwardThreads, 0});
    if (plan.shape.cluster == 0) {
      const LoopPlan loop = plan_loop(rows, cols);
      return launch(softmax_bwd_loop_kernel<T>, loop.launch, stream, grad, in, out, rows, cols, dy_stride, y_stride,
                    loop.row_per_warp);
    }
    const auto kernel = layout.ragged ? softmax_bwd_stream_kernel<T, true> : softmax_bwd_stream_kernel<T, false>;
    if (int e = fill_stream_grid(reinterpret_cast<const void*>(kernel), device, &plan)) return e;
    return launch(kernel, plan.launch, stream, grad, in, out, dy_stride, y_stride, plan.shape);
  });
}

}  // namespace llmfast::cuda
