// gelu(x + bias), forward and backward (https://arxiv.org/abs/1606.08415): x * Phi(x) by erf, or GPT-2's tanh formula.
//
// A thread keeps its columns and walks the rows, so that the bias is read once and its gradient is summed in registers;
// blocks write float32 partials of that, which a second kernel adds up in order.
#include <algorithm>

#include "common.cuh"

namespace llmfast::cuda {
namespace {

constexpr int kThreads = 256, kRows = 4;  // rows in flight a thread
constexpr float kSqrt2OverPi = 0.7978845608028654f, kCubic = 0.044715f;
constexpr float kInvSqrt2 = 0.7071067811865475f, kInvSqrt2Pi = 0.3989422804014327f;

__device__ inline float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float sigmoid_approx(float x) { return reciprocal_approx(1.0f + exp2_approx(x * -kLog2E)); }

// Phi(x) as the sigmoid of an odd polynomial, fitted (minimax on |x| < 5.7) to its logit: relative error 1e-4, below a
// 16-bit type's rounding also where Phi is small; an erf accurate to the same absolute error would not be. Beyond, Phi
// falls more slowly than it should, from 6e-9.
__device__ inline float normal_cdf_approx(float x) {
  const float t = fminf(x * x, 32.49f);
  float p = -2.32770811e-11f;
  p = fmaf(p, t, 3.26981285e-9f);
  p = fmaf(p, t, -1.88905157e-7f);
  p = fmaf(p, t, 5.65033331e-6f);
  p = fmaf(p, t, -8.22297903e-5f);
  p = fmaf(p, t, -2.28392837e-4f);
  p = fmaf(p, t, 7.30593101e-2f);
  p = fmaf(p, t, 1.59550194f);
  return sigmoid_approx(x * p);
}

template <class T, bool kTanh>
__device__ float gelu(float x) {
  if constexpr (kTanh) {
    const float u = kSqrt2OverPi * (x + kCubic * x * x * x);
    return kExact<T> ? 0.5f * x * (1.0f + tanhf(u)) : x * sigmoid_approx(2.0f * u);  // 1 + tanh u = 2 sigmoid(2 u)
  } else {
    return kExact<T> ? 0.5f * x * (1.0f + erff(x * kInvSqrt2)) : x * normal_cdf_approx(x);
  }
}

template <class T, bool kTanh>
__device__ float gelu_derivative(float x) {
  if constexpr (kTanh) {
    const float u = kSqrt2OverPi * (x + kCubic * x * x * x), du = kSqrt2OverPi * (1.0f + 3.0f * kCubic * x * x);
    if constexpr (kExact<T>) {
      const float t = tanhf(u);
      return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * du;
    } else {
      const float s = sigmoid_approx(2.0f * u);
      return s + 2.0f * x * s * (1.0f - s) * du;
    }
  } else {
    if constexpr (kExact<T>) {
      return 0.5f * (1.0f + erff(x * kInvSqrt2)) + x * kInvSqrt2Pi * expf(-0.5f * x * x);
    } else {
      return normal_cdf_approx(x) + x * kInvSqrt2Pi * exp2_approx(x * x * (-0.5f * kLog2E));
    }
  }
}

template <class T>
struct Work {
  const T *dy, *x;  // dy: backward only
  Param bias;
  T* out;
  float* partials;  // (gridDim.y, cols), or null
  int64_t rows, cols, dy_stride, x_stride;
};

// N elements at p, or zeros.
template <int N, class T>
__device__ void load_if(bool inside, const T* p, float (&f)[N]) {
#pragma unroll
  for (int j = 0; j < N; ++j) f[j] = 0.0f;
  if (inside) load<N>(p, f);
}

template <class T, int N>
__device__ void load_bias(const Work<T>& w, int64_t col, float (&bias)[N]) {
#pragma unroll
  for (int j = 0; j < N; ++j) bias[j] = load_param(w.bias, col + j, 0.0f);
}

// N columns a thread: a vector of them, or 1 where rows are ragged.
template <class T, bool kTanh, int N>
__global__ void __launch_bounds__(kThreads) bias_gelu_fwd_kernel(Work<T> w) {
  const int64_t col = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * N;
  if (col >= w.cols) return;
  float bias[N];
  load_bias(w, col, bias);
  const int64_t step = static_cast<int64_t>(gridDim.y) * blockDim.y;
  for (int64_t row = blockIdx.y * blockDim.y + threadIdx.y; row < w.rows; row += kRows * step) {
    float x[kRows][N];
#pragma unroll
    for (int r = 0; r < kRows; ++r) load_if(row + r * step < w.rows, w.x + (row + r * step) * w.x_stride + col, x[r]);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int j = 0; j < N; ++j) x[r][j] = gelu<T, kTanh>(x[r][j] + bias[j]);
      if (row + r * step < w.rows) store<N>(w.out + (row + r * step) * w.cols + col, x[r]);
    }
  }
}

// Sums over the block's threadIdx.y, in order.
template <class T, int N>
__device__ void write_partials(const Work<T>& w, int64_t col, const float (&sum)[N]) {
  __shared__ float sums[N][kThreads];
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll
  for (int j = 0; j < N; ++j) sums[j][thread] = sum[j];
  __syncthreads();
  if (threadIdx.y > 0 || col >= w.cols) return;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    float total = 0.0f;
    for (int i = 0; i < blockDim.y; ++i) total += sums[j][i * blockDim.x + threadIdx.x];
    w.partials[blockIdx.y * w.cols + col + j] = total;
  }
}

template <class T, bool kTanh, int N>
__global__ void __launch_bounds__(kThreads) bias_gelu_bwd_kernel(Work<T> w) {
  constexpr int kAtOnce = kRows / 2;  // two inputs, so half the rows for as many bytes in flight
  const int64_t col = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * N;
  float bias[N] = {}, sum[N] = {};
  if (col < w.cols) load_bias(w, col, bias);
  const int64_t step = static_cast<int64_t>(gridDim.y) * blockDim.y;
  const int64_t end = col < w.cols ? w.rows : 0;
  for (int64_t row = blockIdx.y * blockDim.y + threadIdx.y; row < end; row += kAtOnce * step) {
    float dy[kAtOnce][N], x[kAtOnce][N];
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) {
      const int64_t at = row + r * step;
      load_if(at < end, w.dy + at * w.dy_stride + col, dy[r]);
      load_if(at < end, w.x + at * w.x_stride + col, x[r]);
    }
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) {
      const bool inside = row + r * step < end;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        dy[r][j] *= gelu_derivative<T, kTanh>(x[r][j] + bias[j]);
        if (inside) sum[j] += dy[r][j];
      }
      if (inside) store<N>(w.out + (row + r * step) * w.cols + col, dy[r]);
    }
  }
  allow_next();
  if (w.partials != nullptr) write_partials(w, col, sum);
}

// Blocks cover a warp's width of columns (fewer where there are fewer) by as many rows as make kThreads.
inline Launch plan_launch(int64_t rows, int64_t cols, int per_thread, int64_t most_row_blocks) {
  const int64_t columns = ceil_div(cols, per_thread);
  unsigned width = 1;
  while (width < 32 && width < columns) width *= 2;
  Launch l;
  l.block = dim3(width, kThreads / width);
  const int64_t row_blocks = std::min(most_row_blocks, ceil_div(rows, l.block.y * kRows));
  l.grid = dim3(static_cast<unsigned>(ceil_div(columns, width)), static_cast<unsigned>(row_blocks));
  return l;
}

// How many blocks share the rows of a column, for some eight blocks on every multiprocessor.
int64_t row_blocks(int64_t cols, int per_thread, int sm_count) {
  return std::max<int64_t>(1, int64_t{8} * sm_count / ceil_div(cols, 32 * per_thread));  // far below 65536
}

// f(N): N columns a thread.
template <class T, class F>
int dispatch_width(bool vectors, F&& f) {
  if (vectors) return f(std::integral_constant<int, kPerVector<T>>());
  return f(std::integral_constant<int, 1>());
}

template <class F>
int dispatch_formula(bool tanh_formula, F&& f) {
  return tanh_formula ? f(std::true_type()) : f(std::false_type());
}

template <class T>
bool can_use_vectors(const Work<T>& w) {
  const auto fits = [&](const void* p, int64_t stride) {
    return aligned16(p) && (w.rows == 1 || stride * int64_t{sizeof(T)} % 16 == 0);
  };
  return fits(w.x, w.x_stride) && fits(w.dy, w.dy_stride) && aligned16(w.out) && w.cols % kPerVector<T> == 0;
}

}  // namespace

int bias_gelu_fwd(const void* x, Param bias, void* y, int64_t rows, int64_t cols, int64_t x_stride, bool tanh_formula,
                  DType dtype, void* stream) {
  if (rows == 0) return 0;
  return dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const Work<T> w{nullptr, static_cast<const T*>(x), bias, static_cast<T*>(y), nullptr, rows, cols, 0, x_stride};
    return dispatch_width<T>(can_use_vectors(w), [&](auto n) {
      constexpr int N = decltype(n)::value;
      return dispatch_formula(tanh_formula, [&](auto tanh) {
        const Launch l = plan_launch(rows, cols, N, 65535);  // many blocks: the hardware shares them out evenly
        return launch(bias_gelu_fwd_kernel<T, decltype(tanh)::value, N>, l, stream, w);
      });
    });
  });
}

int64_t bias_gelu_bwd_partials(int64_t rows, int64_t cols, int sm_count) {
  // With the widest vectors, which need the most blocks per column; no fewer rows a block than its threads.
  return std::max<int64_t>(1, std::min(row_blocks(cols, 8, sm_count), ceil_div(rows, 8)));
}

int bias_gelu_bwd(const void* dy, const void* x, Param bias, void* dx, float* dbias, float* workspace,
                  int64_t n_partials, int64_t rows, int64_t cols, int64_t dy_stride, int64_t x_stride,
                  bool tanh_formula, DType dtype, void* stream) {
  Device device;
  if (int e = current_device(&device)) return e;
  if (dbias != nullptr && n_partials < 1) return cudaErrorInvalidValue;
  int64_t written = 0;
  if (rows > 0) {
    const int e = dispatch(dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      const Work<T> w{static_cast<const T*>(dy),
                      static_cast<const T*>(x),
                      bias,
                      static_cast<T*>(dx),
                      dbias == nullptr ? nullptr : workspace,
                      rows,
                      cols,
                      dy_stride,
                      x_stride};
      return dispatch_width<T>(can_use_vectors(w), [&](auto n) {
        constexpr int N = decltype(n)::value;
        return dispatch_formula(tanh_formula, [&](auto tanh) {
          const int64_t most = row_blocks(cols, N, device.multiprocessors);
          const Launch l = plan_launch(rows, cols, N, dbias == nullptr ? most : std::min(most, n_partials));
          written = l.grid.y;
          return launch(bias_gelu_bwd_kernel<T, decltype(tanh)::value, N>, l, stream, w);
        });
      });
    });
    if (e) return e;
  }
  return sum_partials(workspace, nullptr, dbias, nullptr, written, cols, stream);
}

}  // namespace llmfast::cuda
