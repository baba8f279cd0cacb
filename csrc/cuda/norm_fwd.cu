// Layer norm (https://arxiv.org/abs/1607.06450) and RMS norm (https://arxiv.org/abs/1910.07467), forward.
//
// Statistics are float32; each warp takes the variance of its share of the row, centred by its own mean, and those are
// merged, so that one exchange between warps is enough.
#include "row_loop.cuh"
#include "row_stream.cuh"

namespace llmfast::cuda {
namespace {

constexpr int kStreamVectors = 4, kStreamThreads = 512;

template <class T>
struct Forward {
  const T* x;
  Param weight, bias;
  T* y;
  float *mean, *rstd;  // mean: layer norm only
  int64_t rows, cols, x_stride;
  float eps, per_column;  // per_column: 1 / cols
  bool same;              // weight and bias are there (for RMS norm, weight) and of dtype T
};

// What a warp, or all of a row's warps, know of the row. For RMS norm the sum of squares alone.
struct Moments {
  // Layer norm: a number near the mean, what it lacks, and the sum of squares about both. Where the mean is large, one
  // float32 would round it by more than the spread allows.
  float near_mean = 0.0f, rest = 0.0f, squares = 0.0f;
  float count = 0.0f;
};

// Zeros past the row's end, where i >= owned. float32 is centred before it is squared, as its rounding shows; in a
// 16-bit type it is enough to start from something near the mean, the warp's first element: even if only that
// were far off, it would widen the variance, too, and so make up for what this loses.
template <class T, int V, bool kRms>
__device__ Moments warp_moments(uint4 (&raw)[V], int owned, float count) {
  constexpr int n = kPerVector<T>;
  Moments m;
  m.count = count;
  const float inverse = count > 0.0f ? 1.0f / count : 0.0f;
  float start = 0.0f;
  if constexpr (!kRms) {
#pragma unroll
    for (int i = 0; i < (kExact<T> ? V : 1); ++i) {
      float x[n];
      unpack<T>(raw[i], x);
#pragma unroll
      for (int j = 0; j < (kExact<T> ? n : 1); ++j) start += x[j];
    }
    start = kExact<T> ? warp_reduce<Add>(start) * inverse : __shfl_sync(0xffffffffu, start, 0);
  }
  float rest = 0.0f;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    float x[n];
    unpack<T>(raw[i], x);
    const float from = i < owned ? start : 0.0f;
#pragma unroll
    for (int j = 0; j < n; ++j) {
      const float d = kRms ? x[j] : x[j] - from;
      if (!kRms) rest += d;
      m.squares += d * d;
    }
  }
  m.squares = warp_reduce<Add>(m.squares);
  if constexpr (!kRms) {
    m.near_mean = start;
    m.rest = warp_reduce<Add>(rest) * inverse;
    const float squares = m.squares - m.rest * m.rest * count;
    m.squares = squares < 0.0f ? 0.0f : squares;  // not fmaxf, which would drop NaN
  }
  return m;
}

__device__ inline float4 as_part(const Moments& m) { return make_float4(m.near_mean, m.rest, m.squares, m.count); }

// The whole of n <= kMost parts, by the formula of Chan, Golub and LeVeque for merging variances. inverse: 1 over the
// sum of their counts.
template <bool kRms, int kMost>
__device__ Moments combine_moments(const float4* parts, int n, float inverse) {
  const int lane = threadIdx.x % kMost;
  const float4 part = lane < n ? parts[lane] : float4{};
  Moments m;
  float squares = part.z;
  if constexpr (!kRms) {
    m.near_mean = parts[0].x;
    const float apart = (part.x - m.near_mean) + part.y;
    m.rest = warp_reduce<Add, kMost>(apart * part.w) * inverse;
    squares += (apart - m.rest) * (apart - m.rest) * part.w;
  }
  m.squares = warp_reduce<Add, kMost>(squares);
  return m;
}

// Elements of this thread's warp, given how many vectors the slice holds.
template <class T, int V>
__device__ float warp_count(int vectors) {
  int count = 0;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    count += min(max(vectors - static_cast<int>(threadIdx.x / 32 * 32 + i * blockDim.x), 0), 32);
  }
  return static_cast<float>(count * kPerVector<T>);
}

// The results of one vector, given the parameters of its columns.
template <class T, bool kRms>
__device__ void normalize(const uint4& raw, const Moments& m, float rstd, float (&w)[kPerVector<T>],
                          const float (&b)[kPerVector<T>], T* y) {
  constexpr int n = kPerVector<T>;
  const float shift = -m.near_mean * rstd;
  float x[n];
  unpack<T>(raw, x);
#pragma unroll
  for (int j = 0; j < n; ++j) {
    if constexpr (kExact<T>) {
      w[j] *= (kRms ? x[j] : (x[j] - m.near_mean) - m.rest) * rstd;
    } else {
      w[j] *= kRms ? x[j] * rstd : fmaf(x[j], rstd, shift);
    }
    if (!kRms) w[j] += b[j];
  }
  store<n>(y, w);
}

// The same, with parameters that lie from `params` on in weight and bias. kSame: there are all, and of dtype T.
template <class T, bool kRms, bool kSame>
__device__ void normalize(const uint4& raw, const Moments& m, float rstd, const Param& weight, const Param& bias,
                          int params, T* y) {
  constexpr int n = kPerVector<T>;
  const auto read = [&](const Param& p, float absent, float (&f)[n]) {
    if constexpr (kSame) {
      unpack<T>(*reinterpret_cast<const uint4*>(static_cast<const T*>(p.data) + params), f);
    } else {
      read_params(p, params, absent, f);
    }
  };
  float w[n], b[n];
  read(weight, 1.0f, w);
  if constexpr (!kRms) read(bias, 0.0f, b);
  normalize<T, kRms>(raw, m, rstd, w, b, y);
}

// Finishes the statistics; a 16-bit type is happy with the mean as one number.
template <class T, bool kRms>
__device__ float finish_moments(Moments& m, const Forward<T>& p, int64_t row, bool saves) {
  const float variance = m.squares * p.per_column + p.eps;
  const float rstd = kExact<T> ? 1.0f / sqrtf(variance) : rsqrtf(variance);
  if (!kRms && !kExact<T>) m.near_mean += m.rest;
  if (saves) {
    if (!kRms) p.mean[row] = kExact<T> ? m.near_mean + m.rest : m.near_mean;
    p.rstd[row] = rstd;
  }
  return rstd;
}

// How a block treats its row. kHeld: in registers. kEarly, for rows of one warp with parameters of dtype T: those are
// asked for with the row, and come while it is added up; longer rows have other warps to do so, and no registers to
// keep them in. kTwice: the row is not held, but read again.
enum class Way { kHeld, kEarly, kTwice };

template <class T, int V, bool kRms, Way kWay>
__global__ void __launch_bounds__(kWay == Way::kTwice ? kMaxTwiceThreads : kMaxDirectThreads, 2)
    norm_fwd_kernel(Forward<T> p) {
  constexpr bool kEarly = kWay == Way::kEarly, kTwice = kWay == Way::kTwice, kKeep = kTwice || (kRms && V == 4);
  constexpr int n = kPerVector<T>, kKept = kEarly ? V : 1;
  const int64_t row = direct_row();
  if (row >= p.rows) return;  // whole warps, of rows of one warp each
  const T* x = p.x + row * p.x_stride;
  T* y = p.y + row * p.cols;
  const int vectors = static_cast<int>(p.cols) / n;
  uint4 raw[V], weight[kKept], bias[kKept];
  int owned = 0;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const int v = threadIdx.x + i * blockDim.x;
    raw[i] = v < vectors ? load_row<kKeep>(x + v * n) : uint4{};
    owned += v < vectors;
    if constexpr (kEarly) {
      weight[i] = v < vectors ? static_cast<const uint4*>(p.weight.data)[v] : uint4{};
      if (!kRms) bias[i] = v < vectors ? static_cast<const uint4*>(p.bias.data)[v] : uint4{};
    }
  }
  Moments m = warp_moments<T, V, kRms>(raw, owned, warp_count<T, V>(vectors));
  if (blockDim.x > 32)
    m = combine_moments<kRms, kTwice ? 32 : kMaxDirectWarps>(exchange_parts(as_part(m)), blockDim.x / 32, p.per_column);
  const float rstd = finish_moments<T, kRms>(m, p, row, threadIdx.x == 0);
  if (!kTwice) keep_packed(raw);
  const auto finish = [&](auto same) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int v = threadIdx.x + i * blockDim.x;
      if constexpr (kTwice) {
        if (v < vectors)
          normalize<T, kRms, decltype(same)::value>(load_row<true>(x + v * n), m, rstd, p.weight, p.bias, v * n,
                                                    y + v * n);
      } else if constexpr (kEarly) {
        float w[n], b[n];
        unpack<T>(weight[i], w);
        if (!kRms) unpack<T>(bias[i], b);
        if (v < vectors) normalize<T, kRms>(raw[i], m, rstd, w, b, y + v * n);
      } else {
        if (v < vectors) normalize<T, kRms, decltype(same)::value>(raw[i], m, rstd, p.weight, p.bias, v * n, y + v * n);
        __syncwarp();  // keeps the compiler from hoisting all vectors' parameters to the top, where they would not fit
      }
    }
  };
  if (kWay != Way::kHeld || p.same) {
    finish(std::true_type());
  } else {
    finish(std::false_type());
  }
}

// Rows over clusters, see RowStream.
template <class T, bool kRms>
__global__ void __launch_bounds__(kStreamThreads, 1) norm_fwd_stream_kernel(Forward<T> p, StreamShape shape) {
  extern __shared__ uint4 shared[];
  constexpr int n = kPerVector<T>, V = kStreamVectors;
  ClusterExchange exchange(shared, shape.cluster);
  uint4* ring = shared + exchange_bytes(blockDim.x, shape.cluster) / 16;
  uint4* params = ring + shape.stages * V * blockDim.x;
  RowStream<T, V, 1, false> stream(shape, ring, {p.x}, {p.x_stride});
  const int slice = stream.end(shape.cols / n) - stream.begin;
  params = hold_params<T>(&p.weight, params, stream.begin, slice, shape.per_block);
  if (!kRms) hold_params<T>(&p.bias, params, stream.begin, slice, shape.per_block);
  const float count = warp_count<T, V>(slice), slice_count = static_cast<float>(slice * n);
  const float per_slice = 1.0f / slice_count;
  int owned = 0;
#pragma unroll
  for (int i = 0; i < V; ++i) owned += static_cast<int>(threadIdx.x + i * blockDim.x) < slice;
  exchange.start();
  stream.walk(
      [&](int stage, int) {
        uint4 raw[V];
#pragma unroll
        for (int i = 0; i < V; ++i) raw[i] = i < owned ? *stream.slot(stage, 0, i) : uint4{};
        exchange.post(as_part(warp_moments<T, V, kRms>(raw, owned, count)), [&](const float4* parts, int warps) {
          Moments m = combine_moments<kRms, 32>(parts, warps, per_slice);
          m.count = slice_count;
          return as_part(m);
        });
      },
      [&](int stage, int row) {
        Moments m = combine_moments<kRms, kMaxCluster>(exchange.collect(), shape.cluster, p.per_column);
        const float rstd = finish_moments<T, kRms>(m, p, row, threadIdx.x == 0 && exchange.rank == 0);
        T* y = p.y + static_cast<int64_t>(row) * p.cols;
        const auto finish = [&](auto same) {
#pragma unroll
          for (int i = 0; i < V; ++i) {
            const int v = threadIdx.x + i * blockDim.x;
            T* to = y + stream.vector_index(i) * n;
            if (i < owned)
              normalize<T, kRms, decltype(same)::value>(*stream.slot(stage, 0, i), m, rstd, p.weight, p.bias, v * n,
                                                        to);
          }
        };
        p.same ? finish(std::true_type()) : finish(std::false_type());
      });
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
  float rest = 0.0f;
  if constexpr (!kRms && kExact<T>) {  // what the first sum rounded off
    rest = group.template all_reduce<Add>(error) / cols;
    variance -= rest * rest;
    if (variance < 0.0f) variance = 0.0f;  // not fmaxf, which would drop NaN
  }
  const float rstd = 1.0f / sqrtf(variance + p.eps);
  if (group.thread == 0) {
    if (!kRms) p.mean[group.row] = mean + rest;
    p.rstd[group.row] = rstd;
  }
  span.visit(group.thread, group.threads, [&](auto count, int64_t col) {
    constexpr int n = decltype(count)::value;
    float f[n];
    load(x + col, f);
#pragma unroll
    for (int j = 0; j < n; ++j) {
      f[j] = ((f[j] - mean) - rest) * rstd * load_param(p.weight, col + j, 1.0f);
      if (!kRms) f[j] += load_param(p.bias, col + j, 0.0f);
    }
    store(y + col, f);
  });
}

bool is_dtype(const Param& p, DType dtype) { return p.data != nullptr && p.dtype == dtype; }

template <bool kRms, class T>
int norm_fwd(const Forward<T>& p, void* stream) {
  if (p.rows == 0) return 0;
  Device device;
  if (int e = current_device(&device)) return e;
  const int64_t vectors = p.cols / kPerVector<T>;
  const bool whole = whole_vectors(p.x, p.x_stride, p.rows, p.cols * sizeof(T), sizeof(T)) && aligned16(p.y) &&
                     aligned16(p.weight.data) && aligned16(p.bias.data);
  if (const DirectPlan plan = plan_direct(p.rows, vectors, false); whole && plan.vectors_per_thread > 0) {
    return dispatch_vectors(plan.vectors_per_thread, [&](auto v) {
      constexpr int V = decltype(v)::value;
      constexpr Way kEarly = V < 4 ? Way::kEarly : Way::kHeld;  // more would not fit the registers
      const bool early = plan.launch.block.x == 32 && p.same;
      return launch(early ? norm_fwd_kernel<T, V, kRms, kEarly> : norm_fwd_kernel<T, V, kRms, Way::kHeld>, plan.launch,
                    stream, p);
    });
  }
  if (const Launch twice = plan_twice(p.rows, vectors); whole && p.same && twice.grid.x > 0)
    return launch(norm_fwd_kernel<T, kTwiceVectors, kRms, Way::kTwice>, twice, stream, p);
  StreamPlan plan;
  // Layer norm is short of issue slots, so smaller blocks, two or more to a multiprocessor, leave fewer of them idle.
  const bool small = !kRms && vectors <= kMaxCluster * kStreamVectors * kStreamThreads / 2;
  if (whole)
    plan = plan_stream(device, {p.rows, p.cols, vectors, 1, kStreamVectors, small ? kStreamThreads / 2 : kStreamThreads,
                                param_bytes<T>(p.weight) + param_bytes<T>(p.bias)});
  if (plan.shape.cluster == 0) {
    const LoopPlan loop = plan_loop(p.rows, p.cols);
    return launch(norm_fwd_loop_kernel<T, kRms>, loop.launch, stream, p, loop.row_per_warp);
  }
  const auto kernel = norm_fwd_stream_kernel<T, kRms>;
  if (int e = fill_stream_grid(reinterpret_cast<const void*>(kernel), device, &plan)) return e;
  return launch(kernel, plan.launch, stream, p, plan.shape);
}

}  // namespace

int layer_norm_fwd(const void* x, Param weight, Param bias, void* y, float* mean, float* rstd, int64_t rows,
                   int64_t cols, int64_t x_stride, float eps, DType dtype, void* stream) {
  return dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const Forward<T> p{static_cast<const T*>(x),
                       weight,
                       bias,
                       static_cast<T*>(y),
                       mean,
                       rstd,
                       rows,
                       cols,
                       x_stride,
                       eps,
                       1.0f / static_cast<float>(cols),
                       is_dtype(weight, dtype) && is_dtype(bias, dtype)};
    return norm_fwd<false>(p, stream);
  });
}

int rms_norm_fwd(const void* x, Param weight, void* y, float* rstd, int64_t rows, int64_t cols, int64_t x_stride,
                 float eps, DType dtype, void* stream) {
  return dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const Forward<T> p{static_cast<const T*>(x),
                       weight,
                       Param(),
                       static_cast<T*>(y),
                       nullptr,
                       rstd,
                       rows,
                       cols,
                       x_stride,
                       eps,
                       1.0f / static_cast<float>(cols),
                       is_dtype(weight, dtype)};
    return norm_fwd<true>(p, stream);
  });
}

}  // namespace llmfast::cuda
