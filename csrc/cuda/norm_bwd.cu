// Layer norm and RMS norm, backward. With x^ = (x - mean) * rstd and wdy = weight * dy,
//   dx = rstd * (wdy - mean(wdy) - x^ * mean(wdy * x^)), without mean(wdy) for RMS norm,
//   dweight = sum over rows of dy * x^, dbias = sum over rows of dy.
//
// Blocks walk rows and keep the sums of their columns in registers; each (or each cluster) writes one float32 partial,
// and a second kernel adds those up in order, so results are bitwise repeatable.
#include "row_direct.cuh"
#include "row_loop.cuh"
#include "row_tile.cuh"

namespace llmfast::cuda {
namespace {

constexpr int kThreads = 512;

template <class T>
struct Backward {
  const T *dy, *x;
  Param weight;
  const float *mean, *rstd;  // mean: layer norm only
  T* dx;
  float *partial_w = nullptr, *partial_b = nullptr;  // (partials, cols); null where not wanted
  int64_t rows, cols, dy_stride, x_stride;
  float per_column;  // 1 / cols

  Backward(const void* dy, const void* x, Param weight, const float* mean, const float* rstd, void* dx, int64_t rows,
           int64_t cols, int64_t dy_stride, int64_t x_stride)
      : dy(static_cast<const T*>(dy)),
        x(static_cast<const T*>(x)),
        weight(weight),
        mean(mean),
        rstd(rstd),
        dx(static_cast<T*>(dx)),
        rows(rows),
        cols(cols),
        dy_stride(dy_stride),
        x_stride(x_stride),
        per_column(1.0f / static_cast<float>(cols)) {}
};

// Adds up the groups' sums, by halves: region r of shared memory takes those of group r + span.
template <int V, int n>
__device__ void add_groups(float (&sum)[V][n], float* shared, const Group& group) {
  const int groups = blockDim.y;
  int span = 1;
  while (2 * span < groups) span *= 2;
  for (; span > 0 && groups > 1; span /= 2) {
    __syncthreads();  // the region may still be read: by the rows' walk, or by the step before
    const int region = group.index >= span ? group.index - span : group.index;
    float* mine = shared + static_cast<int64_t>(region) * V * n * group.threads + group.thread;
    const bool gives = group.index >= span && group.index < 2 * span;
    const bool takes = group.index < span && group.index + span < groups;
    if (gives) {
#pragma unroll
      for (int i = 0; i < V * n; ++i) mine[i * group.threads] = sum[i / n][i % n];
    }
    __syncthreads();
    if (takes) {
#pragma unroll
      for (int i = 0; i < V * n; ++i) sum[i / n][i % n] += mine[i * group.threads];
    }
  }
}

template <class Tile, int V, int n>
__device__ void write_partial(float* partials, int64_t cols, const float (&sum)[V][n], const Tile& tile, int walker) {
  float* out = partials + walker * cols;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    if (i < tile.owned) {
#pragma unroll
      for (int j = 0; j < n; j += 4) {
        *reinterpret_cast<float4*>(out + tile.column(i) + j) =
            make_float4(sum[i][j], sum[i][j + 1], sum[i][j + 2], sum[i][j + 3]);
      }
    }
  }
}

template <class T, int V, bool kRms>
__global__ void __launch_bounds__(kThreads, 1) norm_bwd_kernel(Backward<T> p, RowShape shape) {
  extern __shared__ uint4 shared[];
  constexpr int n = kPerVector<T>;
  uint4* ring = shared + shape.per_block * (n / 4);
  Group group(reinterpret_cast<float*>(ring + blockDim.y * shape.stages * 2 * V * blockDim.x), shape.cluster);
  RowTile<T, V, 2> tile(shape, group, ring, {p.dy, p.x}, {p.dy_stride, p.x_stride});
  const ParamPlanes<T> weight(reinterpret_cast<float4*>(shared), shape, group, p.weight, 1.0f);
  const int walker = blockIdx.x / shape.cluster;
  float dw[V][n] = {}, db[V][n] = {};
  float mean = 0.0f, rstd = tile.more() ? p.rstd[tile.row] : 0.0f;
  if (!kRms && tile.more()) mean = p.mean[tile.row];
  group.start();
  while (tile.more()) {
    const int next = tile.row + tile.step;
    const float next_rstd = next < p.rows ? p.rstd[next] : 0.0f;  // their latency passes while this row is computed
    const float next_mean = !kRms && next < p.rows ? p.mean[next] : 0.0f;
    tile.acquire();
    float sums[2] = {0.0f, 0.0f};  // of wdy * x^ and of wdy; dy is 0 past the row's end
#pragma unroll
    for (int i = 0; i < V; ++i) {
      float dy[n], x[n], w[n];
      unpack<T>(tile.vector(0, i), dy);
      unpack<T>(tile.vector(1, i), x);
      weight.read(group.thread + i * group.threads, w);
#pragma unroll
      for (int j = 0; j < n; ++j) {
        const float x_hat = (kRms ? x[j] : x[j] - mean) * rstd;
        const float wdy = i < tile.owned ? dy[j] * w[j] : 0.0f;
        sums[0] += wdy * x_hat;
        if (!kRms) sums[1] += wdy;
      }
      __syncwarp();  // keeps the compiler from hoisting all vectors' loads to the top, where they would not fit
    }
    group.template all_reduce<Add>(sums);
    const float correlation = sums[0] * p.per_column, shift = sums[1] * p.per_column;
    T* dx = p.dx + static_cast<int64_t>(tile.row) * p.cols;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (i < tile.owned) {
        float dy[n], x[n], w[n];
        unpack<T>(tile.vector(0, i), dy);
        unpack<T>(tile.vector(1, i), x);
        weight.read(group.thread + i * group.threads, w);
#pragma unroll
        for (int j = 0; j < n; ++j) {
          const float x_hat = (kRms ? x[j] : x[j] - mean) * rstd;
          dw[i][j] += dy[j] * x_hat;
          if (!kRms) db[i][j] += dy[j];
          w[j] = (dy[j] * w[j] - shift - x_hat * correlation) * rstd;
        }
        store<n>(dx + tile.column(i), w);
      }
      __syncwarp();
    }
    tile.release();  // only now: the row is read twice from shared memory, the sums need the registers
    mean = next_mean;
    rstd = next_rstd;
    tile.advance();
  }
  allow_next();
  float* exchange = reinterpret_cast<float*>(ring);
  if (p.partial_w != nullptr) {
    add_groups(dw, exchange, group);
    if (group.index == 0) write_partial(p.partial_w, p.cols, dw, tile, walker);
  }
  if (!kRms && p.partial_b != nullptr) {
    add_groups(db, exchange, group);
    if (group.index == 0) write_partial(p.partial_b, p.cols, db, tile, walker);
  }
}

// dx alone, for rows walked twice.
template <class T, bool kRms>
__global__ void __launch_bounds__(512) norm_bwd_dx_loop_kernel(Backward<T> p, bool row_per_warp) {
  const LoopGroup group(row_per_warp);
  if (group.row >= p.rows) return;
  const T* dy = p.dy + group.row * p.dy_stride;
  const T* x = p.x + group.row * p.x_stride;
  T* dx = p.dx + group.row * p.cols;
  const Span<T> span(p.cols, dy, x, dx);
  const float mean = kRms ? 0.0f : p.mean[group.row], rstd = p.rstd[group.row];
  float correlation = 0.0f, shift = 0.0f;
  span.visit(group.thread, group.threads, [&](auto count, int64_t col) {
    constexpr int n = decltype(count)::value;
    float g[n], f[n];
    load(dy + col, g);
    load(x + col, f);
#pragma unroll
    for (int j = 0; j < n; ++j) {
      const float wdy = g[j] * load_param(p.weight, col + j, 1.0f);
      correlation += wdy * ((f[j] - mean) * rstd);
      shift += wdy;
    }
  });
  correlation = group.template all_reduce<Add>(correlation) / static_cast<float>(p.cols);
  shift = kRms ? 0.0f : group.template all_reduce<Add>(shift) / static_cast<float>(p.cols);
  span.visit(group.thread, group.threads, [&](auto count, int64_t col) {
    constexpr int n = decltype(count)::value;
    float g[n], f[n];
    load(dy + col, g);
    load(x + col, f);
#pragma unroll
    for (int j = 0; j < n; ++j) {
      const float wdy = g[j] * load_param(p.weight, col + j, 1.0f);
      f[j] = (wdy - shift - (f[j] - mean) * rstd * correlation) * rstd;
    }
    store(dx + col, f);
  });
}

constexpr int kColumns = 32, kLanes = 16;  // of a block of the kernel below

// Partial sums of dy * x^ and dy for kColumns columns, over every gridDim.y * kLanes-th row.
template <class T, bool kRms>
__global__ void __launch_bounds__(kColumns* kLanes) norm_bwd_partials_loop_kernel(Backward<T> p) {
  const int64_t col = static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x;
  float dw = 0.0f, db = 0.0f;
  if (col < p.cols) {
#pragma unroll 4
    for (int64_t row = blockIdx.y * kLanes + threadIdx.y; row < p.rows; row += gridDim.y * kLanes) {
      const float dy = to_float(p.dy[row * p.dy_stride + col]), x = to_float(p.x[row * p.x_stride + col]);
      dw += dy * ((kRms ? x : x - p.mean[row]) * p.rstd[row]);
      db += dy;
    }
  }
  __shared__ float sums[2][kLanes][kColumns];
  sums[0][threadIdx.y][threadIdx.x] = dw;
  sums[1][threadIdx.y][threadIdx.x] = db;
  __syncthreads();
  float* partials = threadIdx.y == 0 ? p.partial_w : p.partial_b;
  if (threadIdx.y > 1 || col >= p.cols || partials == nullptr) return;
  float total = 0.0f;
  for (int i = 0; i < kLanes; ++i) total += sums[threadIdx.y][i][threadIdx.x];
  partials[blockIdx.y * p.cols + col] = total;
}

// Launches the loop kernels; *n_partials becomes how many partials they write.
template <bool kRms, class T>
int norm_bwd_loop(const Backward<T>& p, int64_t* n_partials, void* stream) {
  const LoopPlan loop = plan_loop(p.rows, p.cols);
  if (int e = launch(norm_bwd_dx_loop_kernel<T, kRms>, loop.launch, stream, p, loop.row_per_warp)) return e;
  if (p.partial_w == nullptr && p.partial_b == nullptr) return 0;
  *n_partials = std::min<int64_t>(*n_partials, ceil_div(p.rows, kLanes));
  Launch l;
  l.grid = dim3(static_cast<unsigned>(ceil_div(p.cols, kColumns)), static_cast<unsigned>(*n_partials));
  l.block = dim3(kColumns, kLanes);
  return launch(norm_bwd_partials_loop_kernel<T, kRms>, l, stream, p);
}

template <bool kRms, class T>
int norm_bwd_rows(const Backward<T>& p, const Device& device, int64_t* n_partials, void* stream) {
  constexpr int size = sizeof(T);
  const auto whole = [&](const T* rows, int64_t stride) {
    return whole_vectors(rows, stride, p.rows, p.cols * size, size);
  };
  RowPlan plan;
  if (whole(p.x, p.x_stride) && whole(p.dy, p.dy_stride) && aligned16(p.dx) && aligned16(p.partial_w) &&
      aligned16(p.partial_b))
    plan = plan_rows(device, p.rows, p.cols, size);
  if (plan.vectors_per_thread == 0) return norm_bwd_loop<kRms>(p, n_partials, stream);
  return dispatch_vectors(plan.vectors_per_thread, [&](auto v) {
    auto kernel = norm_bwd_kernel<T, decltype(v)::value, kRms>;
    if (int e = fill_grid(reinterpret_cast<const void*>(kernel), device, &plan, *n_partials)) return e;
    *n_partials = plan.launch.grid.x / plan.shape.cluster;
    return launch(kernel, plan.launch, stream, p, plan.shape);
  });
}

template <bool kRms, class T>
int norm_bwd(Backward<T> p, float* dweight, float* dbias, float* workspace, int64_t n_partials, void* stream) {
  Device device;
  if (int e = current_device(&device)) return e;
  if (n_partials < 1 && (dweight != nullptr || dbias != nullptr)) return cudaErrorInvalidValue;
  if (dweight != nullptr) p.partial_w = workspace;
  if (dbias != nullptr) p.partial_b = workspace + n_partials * p.cols;
  if (dweight == nullptr && dbias == nullptr) n_partials = INT32_MAX;  // nothing limits the blocks then
  int64_t written = p.rows == 0 ? 0 : n_partials;
  if (p.rows > 0) {
    if (int e = norm_bwd_rows<kRms>(p, device, &written, stream)) return e;
  }
  return sum_partials(p.partial_w, p.partial_b, dweight, dbias, written, p.cols, stream);
}

}  // namespace

// A block writes one partial, or a cluster of them. A multiprocessor runs one block of 512 threads, or two of a cluster
// with a block for each 8192 columns. An upper bound; the kernel may write fewer.
int64_t norm_bwd_partials(int64_t rows, int64_t cols, int sm_count) {
  int64_t cluster = 1;
  while (cluster < 4 && cluster * 16384 < cols) cluster *= 2;
  return std::max<int64_t>(1, std::min<int64_t>(rows, sm_count / cluster));
}

int layer_norm_bwd(const void* dy, const void* x, Param weight, const float* mean, const float* rstd, void* dx,
                   float* dweight, float* dbias, float* workspace, int64_t n_partials, int64_t rows, int64_t cols,
                   int64_t dy_stride, int64_t x_stride, DType dtype, void* stream) {
  return dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const Backward<T> p(dy, x, weight, mean, rstd, dx, rows, cols, dy_stride, x_stride);
    return norm_bwd<false>(p, dweight, dbias, workspace, n_partials, stream);
  });
}

int rms_norm_bwd(const void* dy, const void* x, Param weight, const float* rstd, void* dx, float* dweight,
                 float* workspace, int64_t n_partials, int64_t rows, int64_t cols, int64_t dy_stride, int64_t x_stride,
                 DType dtype, void* stream) {
  return dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const Backward<T> p(dy, x, weight, nullptr, rstd, dx, rows, cols, dy_stride, x_stride);
    return norm_bwd<true>(p, dweight, nullptr, workspace, n_partials, stream);
  });
}

}  // namespace llmfast::cuda
