// Element types, 16-byte vectors, warp reductions, and launching.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
#include <map>
#include <mutex>
#include <tuple>
#include <type_traits>

#include "kernels.h"

namespace llmfast::cuda {

// ---- Elements ----

template <class T>
constexpr int kPerVector = 16 / sizeof(T);

template <class T>
constexpr bool kExact = std::is_same_v<T, float>;  // rounding to 16 bits hides fast approximations, to 32 it does not

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

__device__ inline void unpack_word(uint32_t w, float* f, float) { f[0] = __uint_as_float(w); }
__device__ inline void unpack_word(uint32_t w, float* f, __half) {
  float2 pair = __half22float2(*reinterpret_cast<__half2*>(&w));
  f[0] = pair.x;
  f[1] = pair.y;
}
__device__ inline void unpack_word(uint32_t w, float* f, __nv_bfloat16) {  // a bfloat16 is the top half of a float
  f[0] = __uint_as_float(w << 16);
  f[1] = __uint_as_float(w & 0xffff0000u);
}

__device__ inline uint32_t pack_word(const float* f, float) { return __float_as_uint(f[0]); }
__device__ inline uint32_t pack_word(const float* f, __half) {
  __half2 pair = __floats2half2_rn(f[0], f[1]);
  return *reinterpret_cast<uint32_t*>(&pair);
}
__device__ inline uint32_t pack_word(const float* f, __nv_bfloat16) {
  __nv_bfloat162 pair = __floats2bfloat162_rn(f[0], f[1]);
  return *reinterpret_cast<uint32_t*>(&pair);
}

template <class T>
__device__ void unpack(const uint4& v, float (&f)[kPerVector<T>]) {
  constexpr int n = 4 / sizeof(T);
  unpack_word(v.x, f, T());
  unpack_word(v.y, f + n, T());
  unpack_word(v.z, f + 2 * n, T());
  unpack_word(v.w, f + 3 * n, T());
}

template <class T>
__device__ uint4 pack(const float (&f)[kPerVector<T>]) {
  constexpr int n = 4 / sizeof(T);
  return {pack_word(f, T()), pack_word(f + n, T()), pack_word(f + 2 * n, T()), pack_word(f + 3 * n, T())};
}

// A vector of -inf, what a maximum and a sum of exponentials ignore.
template <class T>
__device__ uint4 minus_infinity() {
  uint32_t w = kExact<T> ? 0xff800000u : std::is_same_v<T, __half> ? 0xfc00fc00u : 0xff80ff80u;
  return {w, w, w, w};
}

// N consecutive elements, N being 1 or a whole aligned vector.
template <int N, class T>
__device__ void load(const T* p, float (&f)[N]) {
  if constexpr (N == 1) {
    f[0] = to_float(*p);
  } else {
    static_assert(N == kPerVector<T>);
    unpack<T>(*reinterpret_cast<const uint4*>(p), f);
  }
}

template <int N, class T>
__device__ void store(T* p, const float (&f)[N]) {
  if constexpr (N == 1) {
    *p = from_float<T>(f[0]);
  } else {
    static_assert(N == kPerVector<T>);
    *reinterpret_cast<uint4*>(p) = pack<T>(f);
  }
}

// Parameters are few and stay in cache, so their loads are scalar: any dtype and alignment by one path.
__device__ inline float load_param(const Param& p, int64_t i, float absent) {
  if (p.data == nullptr) return absent;
  if (p.dtype == DType::f32) return __ldg(static_cast<const float*>(p.data) + i);
  if (p.dtype == DType::f16) return __half2float(static_cast<const __half*>(p.data)[i]);
  return __bfloat162float(static_cast<const __nv_bfloat16*>(p.data)[i]);
}

// ---- Arithmetic ----

__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

constexpr float kLog2E = 1.4426950408889634f;

template <class T>
__device__ float exponential(float x) {
  if constexpr (kExact<T>) return expf(x);
  return exp2_approx(x * kLog2E);
}

struct Add {
  static constexpr float identity = 0.0f;
  __device__ static float apply(float a, float b) { return a + b; }
};

// Drops NaN, as fmaxf does: the exponentials of the row bring it back.
struct Max {
  static constexpr float identity = -__builtin_huge_valf();
  __device__ static float apply(float a, float b) { return fmaxf(a, b); }
};

// A butterfly over each kLanes lanes, so that all of them hold the same bits.
template <class Op, int kLanes = 32>
__device__ float warp_reduce(float v) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) v = Op::apply(v, __shfl_xor_sync(0xffffffffu, v, offset));
  return v;
}

// ---- Overlap of one kernel's end with the next one's launch ----

// This block has no more long work: the next kernel, if launched early, may take its place.
__device__ inline void allow_next() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Until all that the kernel before has written can be read.
__device__ inline void await_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- Host: devices and launches ----

struct Device {
  int id, major, multiprocessors, max_smem;
};

inline int device_facts(int id, Device* out) {
  constexpr int kMost = 64;
  static Device known[kMost];
  static std::atomic<bool> ready[kMost];
  if (id < kMost && ready[id].load(std::memory_order_acquire)) {
    *out = known[id];
    return 0;
  }
  Device d{id, 0, 0, 0};
  if (cudaError_t e = cudaDeviceGetAttribute(&d.major, cudaDevAttrComputeCapabilityMajor, id)) return e;
  if (cudaError_t e = cudaDeviceGetAttribute(&d.multiprocessors, cudaDevAttrMultiProcessorCount, id)) return e;
  if (cudaError_t e = cudaDeviceGetAttribute(&d.max_smem, cudaDevAttrMaxSharedMemoryPerBlockOptin, id)) return e;
  static std::mutex writing;
  std::lock_guard<std::mutex> lock(writing);
  if (id < kMost && !ready[id].load(std::memory_order_relaxed)) {
    known[id] = d;
    ready[id].store(true, std::memory_order_release);
  }
  *out = d;
  return 0;
}

inline int current_device(Device* out) {
  int id = 0;
  if (cudaError_t e = cudaGetDevice(&id)) return e;
  return device_facts(id, out);
}

struct Launch {
  dim3 grid, block;
  size_t smem = 0;
  int cluster = 1;
  bool early = false;  // may start while the kernel before it ends; must then call await_previous. Needs sm_90
};

inline cudaLaunchConfig_t launch_config(const Launch& l, void* stream, cudaLaunchAttribute* attributes) {
  cudaLaunchConfig_t config{};
  config.gridDim = l.grid;
  config.blockDim = l.block;
  config.dynamicSmemBytes = l.smem;
  config.stream = static_cast<cudaStream_t>(stream);
  if (l.cluster > 1) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = l.cluster;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  }
  if (l.early) {
    cudaLaunchAttribute& early = attributes[config.numAttrs++];
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
  }
  config.attrs = attributes;
  return config;
}

template <class... P>
int launch(void (*kernel)(P...), const Launch& l, void* stream, P... args) {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = launch_config(l, stream, attributes);
  cudaError_t e = cudaLaunchKernelEx(&config, kernel, args...);
  if (e != cudaSuccess) cudaGetLastError();  // reported here; must not surface again in the caller's next check
  return e;
}

// How many clusters (blocks, where the cluster is 1) of this launch the device runs at once. The answers are kept, as
// asking takes microseconds; the first question also allows the kernel the shared memory it may use.
inline int resident(const void* kernel, const Device& device, const Launch& l, int* count) {
  using Key = std::tuple<const void*, int, int, int, size_t>;
  static std::map<Key, int> known;
  static std::mutex guard;
  std::lock_guard<std::mutex> lock(guard);
  const int threads = l.block.x * l.block.y;
  const Key key{kernel, device.id, l.cluster, threads, l.smem};
  if (auto it = known.find(key); it != known.end()) {
    *count = it->second;
    return 0;
  }
  if (l.smem > 48 * 1024) {
    if (cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.max_smem))
      return e;
  }
  int n = 0;
  if (l.cluster > 1) {
    cudaLaunchAttribute attributes[2];
    cudaLaunchConfig_t config = launch_config(l, nullptr, attributes);
    config.gridDim = dim3(l.cluster);
    if (cudaError_t e = cudaOccupancyMaxActiveClusters(&n, kernel, &config)) return e;
  } else {
    if (cudaError_t e = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&n, kernel, threads, l.smem)) return e;
    n *= device.multiprocessors;
  }
  if (n == 0) return cudaErrorLaunchOutOfResources;
  *count = known[key] = n;
  return 0;
}

template <class T>
struct Type {
  using type = T;
};

template <class F>
int dispatch(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f(Type<float>());
    case DType::f16:
      return f(Type<__half>());
    case DType::bf16:
      return f(Type<__nv_bfloat16>());
  }
  return cudaErrorInvalidValue;
}

inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Sums (n_partials, cols) over its first dimension, in order; a launcher in shared.cu. Null outputs are passed over.
int sum_partials(const float* first, const float* second, float* first_out, float* second_out, int64_t n_partials,
                 int64_t cols, void* stream);

}  // namespace llmfast::cuda
