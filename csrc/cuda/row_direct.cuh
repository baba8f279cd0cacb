// Rows of a warp or a block, one row each: the shape of the forward kernels where the row fits a block. The blocks are
// many and small, so that the hardware hands rows to whichever multiprocessor has room: those that share a memory path
// with more neighbours take fewer, which a fixed share of the rows for each cannot do. A row is held in registers, or,
// where that would leave room for one block only, read a second time from the first-level cache. Rows of a cluster of
// blocks: row_stream.cuh.
#pragma once

#include <algorithm>

#include "common.cuh"

namespace llmfast::cuda {

constexpr int kMaxDirectThreads = 512, kMaxDirectWarps = kMaxDirectThreads / 32;
constexpr int kMaxTwiceThreads = 1024, kTwiceVectors = 4;  // of rows read twice

// Read once by a kernel that writes no rows. One that does reads 8 % less a second this way: it takes load_row.
__device__ inline uint4 load_streaming(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// A vector of a row that is written back elsewhere. kKeep, in both caches: measured 2 to 4 % faster for softmax and RMS
// norm even where nobody reads it again, but not for layer norm, nor for rows of up to three vectors a thread.
template <bool kKeep>
__device__ uint4 load_row(const void* p) {
  if constexpr (!kKeep) return __ldg(static_cast<const uint4*>(p));
  uint64_t policy;
  uint4 v;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("ld.global.L1::evict_last.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p), "l"(policy));
  return v;
}

// The aligned 16-byte vectors that cover a row. Where it is ragged, the first and the last may also hold elements
// beside it. (Reading those is safe: an aligned vector never crosses into another page.)
template <class T, bool kRagged>
struct Cover {
  static constexpr int n = kPerVector<T>;
  int lead, end;  // elements of vector 0 before the row; where the row ends, counted from vector 0
  int vectors;

  __device__ Cover(const T* row, int cols)
      : lead(kRagged ? reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T) : 0),
        end(lead + cols),
        vectors(kRagged ? (end + n - 1) / n : cols / n) {}

  __device__ bool whole(int v) const { return !kRagged || (v * n >= lead && (v + 1) * n <= end); }

  // What is not of the row becomes `fill`; that holds for vectors past the end, too.
  __device__ void mask(int v, float (&f)[n], float fill) const {
#pragma unroll
    for (int j = 0; j < n; ++j) {
      if constexpr (!kRagged) {
        f[j] = v < vectors ? f[j] : fill;
      } else if (!whole(v)) {
        f[j] = v * n + j < lead || v * n + j >= end ? fill : f[j];
      }
    }
  }

  // Vector v as read from `from`, -inf in place of what is not of the row.
  __device__ uint4 masked(int v, const uint4& from) const {
    if (v >= vectors) return minus_infinity<T>();
    if (whole(v)) return from;
    float f[n];
    unpack<T>(from, f);
    mask(v, f, Max::identity);
    return pack<T>(f);  // exact
  }

  __device__ const T* at(const T* row, int v) const { return row - lead + static_cast<int64_t>(v) * n; }

  __device__ void store(T* row, int v, const float (&f)[n]) const {
    T* to = row - lead + static_cast<int64_t>(v) * n;
    if (whole(v)) {
      *reinterpret_cast<uint4*>(to) = pack<T>(f);
    } else {
#pragma unroll
      for (int j = 0; j < n; ++j) {
        if (v * n + j >= lead && v * n + j < end) to[j] = from_float<T>(f[j]);
      }
    }
  }
};

// Makes the compiler unpack these again where they are used next, rather than keep the floats, for which there are too
// few registers.
template <int V>
__device__ void keep_packed(uint4 (&raw)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i) asm volatile("" : "+r"(raw[i].x), "+r"(raw[i].y), "+r"(raw[i].z), "+r"(raw[i].w));
}

// Consecutive parameters from column `col`, a multiple of n, in global or shared memory aligned to 16 bytes.
template <int n>
__device__ void read_params(const Param& p, int64_t col, float absent, float (&f)[n]) {
  if (p.data == nullptr) {
#pragma unroll
    for (int j = 0; j < n; ++j) f[j] = absent;
  } else if (p.dtype == DType::f32) {
#pragma unroll
    for (int j = 0; j < n; j += 4) {
      *reinterpret_cast<float4*>(f + j) = *reinterpret_cast<const float4*>(static_cast<const float*>(p.data) + col + j);
    }
  } else {
    using Words = std::conditional_t<n == 8, uint4, uint2>;
    union {
      Words all;
      uint32_t word[n / 2];
    } v;
    v.all = *reinterpret_cast<const Words*>(static_cast<const uint16_t*>(p.data) + col);
#pragma unroll
    for (int j = 0; j < n; j += 2) {
      if (p.dtype == DType::f16) {
        unpack_word(v.word[j / 2], f + j, __half());
      } else {
        unpack_word(v.word[j / 2], f + j, __nv_bfloat16());
      }
    }
  }
}

// Copies the parameters of a block's slice into shared memory, in their own dtype: *p then lies there. 8 bytes at once,
// as half a vector of float32 columns with 16-bit parameters takes no more. Returns where the next may lie.
template <class T>
__device__ uint4* hold_params(Param* p, uint4* to, int begin, int slice, int per_block) {
  if (p->data == nullptr) return to;
  const int bytes = kPerVector<T> * (p->dtype == DType::f32 ? 4 : 2);  // of the parameters of one vector
  const uint2* from = reinterpret_cast<const uint2*>(static_cast<const char*>(p->data) + int64_t{begin} * bytes);
#pragma unroll 4
  for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < slice * bytes / 8; i += blockDim.x * blockDim.y) {
    reinterpret_cast<uint2*>(to)[i] = __ldg(from + i);
  }
  p->data = to;
  return to + (per_block * bytes + 15) / 16;
}

// This thread's row: blocks of (32, 4) threads hold four, others one.
__device__ inline int64_t direct_row() { return static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; }

// All warps' parts of the block's row, in order; to be called once. Not for a row of one warp.
__device__ inline const float4* exchange_parts(const float4& part) {
  __shared__ float4 parts[32];
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = part;
  __syncthreads();
  return parts;
}

// The sums of n <= kMost parts' first and second values.
template <int kMost>
__device__ float2 sum_parts(const float4* parts, int n) {
  const int lane = threadIdx.x % kMost;
  const float4 part = lane < n ? parts[lane] : float4{};
  return make_float2(warp_reduce<Add, kMost>(part.x), warp_reduce<Add, kMost>(part.y));
}

// ---- Host ----

// Bytes that hold_params wants for each vector of a slice.
template <class T>
int64_t param_bytes(const Param& p) {
  return p.data == nullptr ? 0 : kPerVector<T> * (p.dtype == DType::f32 ? 4 : 2);
}

struct DirectPlan {
  int vectors_per_thread = 0;  // 2, 3 or 4 (always 4 where ragged); 0: the row does not fit a block
  Launch launch;
};

// 8 vectors a thread were slower: they take so many registers that too few rows are in flight.
inline DirectPlan plan_direct(int64_t rows, int64_t vectors, bool ragged) {
  DirectPlan plan;
  if (vectors == 0 || vectors > 4 * kMaxDirectThreads || rows > INT32_MAX) return plan;
  const auto threads = [&](int v) { return static_cast<int>(ceil_div(vectors, 32 * v)) * 32; };
  // Whichever leaves fewer vectors unused, and otherwise the more loads in flight.
  const bool three = threads(3) <= kMaxDirectThreads && threads(3) * 3 < threads(4) * 4;
  plan.vectors_per_thread = ragged ? 4 : vectors <= 64 ? 2 : three ? 3 : 4;
  const int n = threads(plan.vectors_per_thread), rows_each = n == 32 ? 4 : 1;
  plan.launch.block = dim3(n, rows_each);
  plan.launch.grid = dim3(static_cast<unsigned>(ceil_div(rows, rows_each)));
  return plan;
}

// The block of a row that is read twice, kTwiceVectors a thread; no grid where the row does not fit.
inline Launch plan_twice(int64_t rows, int64_t vectors) {
  Launch l;
  l.grid = dim3(0);
  if (vectors == 0 || vectors > kTwiceVectors * kMaxTwiceThreads || rows > INT32_MAX) return l;
  l.block = dim3(static_cast<unsigned>(ceil_div(vectors, 32 * kTwiceVectors) * 32));
  l.grid = dim3(static_cast<unsigned>(rows));
  return l;
}

// Whether rows start on 16-byte boundaries and hold whole vectors.
inline bool whole_vectors(const void* p, int64_t stride, int64_t rows, int64_t row_bytes, int64_t element_bytes) {
  return aligned16(p) && row_bytes % 16 == 0 && (rows == 1 || stride * element_bytes % 16 == 0);
}

}  // namespace llmfast::cuda
