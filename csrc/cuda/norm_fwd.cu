// Layer norm (https://arxiv.org/abs/1607.06450) and RMS norm (https://arxiv.org/abs/1910.07467), forward.
//
// The variance is that of the centred row; statistics are float32. Parameters wait in shared memory as float32: blocks
// stay on their multiprocessor and walk many rows, so each parameter is read from memory once a block.
#include "row_loop.cuh"
#include "row_tile.cuh"

namespace llmfast::cuda {
namespace {

constexpr int kThreads = 768;  // leaves each 80 registers

template <class T>
struct Forward {
  const T* x;
  Param weight, bias;
  T* y;
  float *mean, *rstd;  // mean: layer norm only
  int64_t rows, cols, x_stride;
  float eps;
};

// Centres x, and returns the mean that it took off.
template <class T, int V>
__device__ float centre(float (&x)[V][kPerVector<T>], int owned, int cols, Group& group) {
  // float32 inputs are fine enough to show what the first sum rounded off: the second round takes that off too.
  constexpr int kRounds = kExact<T> ? 2 : 1;
  float mean = 0.0f;
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < V; ++i) {
#pragma unroll
      for (int j = 0; j < kPerVector<T>; ++j) sum += x[i][j];
    }
    const float part = group.all_reduce<Add>(sum) / cols;
    mean += part;
#pragma unroll
    for (int i = 0; i < V; ++i) {
#pragma unroll
      for (int j = 0; j < kPerVector<T>; ++j) x[i][j] = i < owned ? x[i][j] - part : 0.0f;
    }
  }
  return mean;
}

template <class T, int V, bool kRms>
__global__ void __launch_bounds__(kThreads) norm_fwd_kernel(Forward<T> p, RowShape shape) {
  extern __shared__ uint4 shared[];
  constexpr int n = kPerVector<T>;
  const int plane_vectors = shape.per_block * (n / 4);
  float4* planes = reinterpret_cast<float4*>(shared);
  uint4* ring = shared + plane_vectors * (kRms ? 1 : 2);
  Group group(reinterpret_cast<float*>(ring + blockDim.y * shape.stages * V * blockDim.x), shape.cluster);
  RowTile<T, V, 1> tile(shape, group, ring, {p.x}, {p.x_stride});
  const ParamPlanes<T> weight(planes, shape, group, p.weight, 1.0f);
  const ParamPlanes<T> bias(planes + plane_vectors, shape, group, kRms ? Param() : p.bias, 0.0f, !kRms);
  group.start();
  const int cols = static_cast<int>(p.cols);
  for (; tile.more(); tile.advance()) {
    float x[V][n];
    tile.acquire();
#pragma unroll
    for (int i = 0; i < V; ++i) unpack<T>(tile.vector(0, i), x[i]);
    tile.release();
    float mean = 0.0f;
    if constexpr (!kRms) mean = centre<T>(x, tile.owned, cols, group);
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < V; ++i) {
#pragma unroll
      for (int j = 0; j < n; ++j) squares += x[i][j] * x[i][j];
    }
    const float rstd = 1.0f / sqrtf(group.all_reduce<Add>(squares) / cols + p.eps);
    if (group.thread == 0 && group.rank == 0) {
      if (!kRms) p.mean[tile.row] = mean;
      p.rstd[tile.row] = rstd;
    }
    T* y = p.y + static_cast<int64_t>(tile.row) * cols;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (i < tile.owned) {
        const int vector = group.thread + i * group.threads;
        float w[n], b[n];
        weight.read(vector, w);
        if (!kRms) bias.read(vector, b);
#pragma unroll
        for (int j = 0; j < n; ++j) w[j] = x[i][j] * rstd * w[j] + (kRms ? 0.0f : b[j]);
        store<n>(y + tile.column(i), w);
      }
    }
  }
}

// The same for rows walked three times: mean, squares, result.
template <class T, bool kRms>
__global__ void __launch_bounds__(512) norm_fwd_loop_kernel(Forward<T> p, bool row_per_warp) {
  const LoopGroup group(row_per_warp);
  if (group.row >= p.rows) return;
  const T* x = p.x + group.row * p.x_stride;
  T* y = p.y + group.row * p.cols;
  const Span<T> span(p.cols, x, y);
  const float cols = static_cast<float>(p.cols);
  float mean = 0.0f;
  if constexpr (!kRms) {
    float sum = 0.0f;
    span.visit(group.thread, group.threads, [&](auto count, int64_t col) {
      float f[decltype(count)::value];
      load(x + col, f);
      for (float v : f) sum += v;
    });
    mean = group.template all_reduce<Add>(sum) / cols;
  }
  float squares = 0.0f, error = 0.0f;
  span.visit(group.thread, group.threads, [&](auto count, int64_t col) {
    float f[decltype(count)::value];
    load(x + col, f);
    for (float v : f) {
      error += v - mean;
      squares += (v - mean) * (v - mean);
    }
  });
  float variance = group.template all_reduce<Add>(squares) / cols;
  if constexpr (!kRms && kExact<T>) {  // what the first sum rounded off
    const float correction = group.template all_reduce<Add>(error) / cols;
    mean += correction;
    variance -= correction * correction;
    if (variance < 0.0f) variance = 0.0f;  // not fmaxf, which would drop NaN
  }
  const float rstd = 1.0f / sqrtf(variance + p.eps);
  if (group.thread == 0) {
    if (!kRms) p.mean[group.row] = mean;
    p.rstd[group.row] = rstd;
  }
  span.visit(group.thread, group.threads, [&](auto count, int64_t col) {
    constexpr int n = decltype(count)::value;
    float f[n];
    load(x + col, f);
#pragma unroll
    for (int j = 0; j < n; ++j) {
      f[j] = (f[j] - mean) * rstd * load_param(p.weight, col + j, 1.0f);
      if (!kRms) f[j] += load_param(p.bias, col + j, 0.0f);
    }
    store(y + col, f);
  });
}

template <bool kRms, class T>
int norm_fwd(const Forward<T>& p, void* stream) {
  if (p.rows == 0) return 0;
  Device device;
  if (int e = current_device(&device)) return e;
  constexpr int size = sizeof(T);
  RowPlan plan;
  if (vector_rows(p.x, p.x_stride, p.rows, p.cols, size) && aligned16(p.y))
    plan = plan_rows(device, {p.rows, p.cols, size, 1, kRms ? 1 : 2, kThreads});
  if (plan.vectors_per_thread == 0) {
    const LoopPlan loop = plan_loop(p.rows, p.cols);
    return launch(norm_fwd_loop_kernel<T, kRms>, loop.launch, stream, p, loop.row_per_warp);
  }
  return dispatch_vectors(plan.vectors_per_thread, [&](auto v) {
    auto kernel = norm_fwd_kernel<T, decltype(v)::value, kRms>;
    if (int e = fill_grid(reinterpret_cast<const void*>(kernel), device, &plan)) return e;
    return launch(kernel, plan.launch, stream, p, plan.shape);
  });
}

}  // namespace

int layer_norm_fwd(const void* x, Param weight, Param bias, void* y, float* mean, float* rstd, int64_t rows,
                   int64_t cols, int64_t x_stride, float eps, DType dtype, void* stream) {
  return dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const Forward<T> p{static_cast<const T*>(x), weight, bias, static_cast<T*>(y), mean, rstd, rows, cols, x_stride,
                       eps};
    return norm_fwd<false>(p, stream);
  });
}

int rms_norm_fwd(const void* x, Param weight, void* y, float* rstd, int64_t rows, int64_t cols, int64_t x_stride,
                 float eps, DType dtype, void* stream) {
  return dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const Forward<T> p{static_cast<const T*>(x), weight, Param(), static_cast<T*>(y), nullptr, rstd, rows, cols,
                       x_stride, eps};
    return norm_fwd<true>(p, stream);
  });
}

}  // namespace llmfast::cuda
