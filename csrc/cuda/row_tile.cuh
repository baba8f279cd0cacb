// Rows held in registers: how the backward kernels of the norms read, reduce and share out whole, aligned rows.
//
// A row belongs to a group of threads: a warp, part of a block, a block, or a cluster of blocks that exchange their
// sums through distributed shared memory. Thread t of a group owns the 16-byte vectors t, t + threads, ... of its
// block's slice. Groups walk the rows, each thread copying its own vectors of the rows to come into shared memory
// (cp.async): no other thread reads them, so that needs no barrier, and bytes in flight cost no registers.
#pragma once

#include <algorithm>

#include "common.cuh"

namespace llmfast::cuda {

struct RowShape {
  int rows;
  int vectors;    // of 16 bytes, in a row
  int per_block;  // of those, the slice of one block of the cluster
  int cluster;
  int stages;  // rows in flight per group, 2 or 3
};

// ---- Groups and their reductions ----

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ inline void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// Sums cross the cluster as asynchronous stores that count their bytes at the receiver's barrier. The cluster's own
// barrier would do, but its release also waits for the stores of whole rows to global memory, a microsecond each time.
__device__ inline void init_byte_barrier(uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ inline void expect_bytes(uint32_t barrier, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
#endif
}

__device__ inline void wait_bytes(uint32_t barrier, int phase) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(barrier),
      "r"(phase)
      : "memory");
#endif
}

// Two floats into the peer's shared memory at the address `mine` has here, counted at the barrier likewise.
__device__ inline void send_to_peer(uint32_t mine, uint32_t barrier, int peer, float a, float b) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .u32 at, counter;\n"
      "mapa.shared::cluster.u32 at, %0, %2;\nmapa.shared::cluster.u32 counter, %1, %2;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [at], {%3, %4}, [counter];\n}" ::"r"(mine),
      "r"(barrier), "r"(peer), "f"(a), "f"(b)
      : "memory");
#endif
}

// Floats of scratch a group needs: two byte barriers, and two buffers of two values from each warp of the cluster.
__host__ __device__ inline int scratch_floats(int threads, int cluster) { return 4 + 4 * cluster * (threads / 32); }

struct Group {
  int thread, threads, index, cluster, rank;
  float* scratch;
  int reductions = 0;

  __device__ Group(float* all_scratch, int cluster)
      : thread(threadIdx.x),
        threads(blockDim.x),
        index(threadIdx.y),
        cluster(cluster),
        rank(cluster > 1 ? blockIdx.x % cluster : 0),
        scratch(all_scratch + threadIdx.y * scratch_floats(blockDim.x, cluster)) {}

  // Before the first reduction: the block's shared memory is ready, and the cluster's blocks have all started.
  __device__ void start() {
    if (cluster > 1) {
      if (thread == 0) {
        init_byte_barrier(shared_address(scratch));
        init_byte_barrier(shared_address(scratch) + 8);
      }
      cluster_barrier();
    } else {
      __syncthreads();
    }
  }

  // Reduces over the group; all its threads get the same bits. One barrier is enough, as two buffers alternate: whoever
  // writes a buffer again has passed the barrier of the other, at which all had finished reading this one.
  template <class Op, int K>
  __device__ void all_reduce(float (&v)[K]) {
    static_assert(K <= 2);
#pragma unroll
    for (int k = 0; k < K; ++k) v[k] = warp_reduce<Op>(v[k]);
    if (threads == 32 && cluster == 1) return;
    const int warps = threads / 32, lane = thread % 32, n = warps * cluster, buffer = reductions & 1;
    float2* slots = reinterpret_cast<float2*>(scratch + 4) + buffer * n;
    float2* mine = slots + rank * warps + thread / 32;
    if (cluster == 1) {
      if (lane == 0) *mine = make_float2(v[0], v[K - 1]);
      asm volatile("bar.sync %0, %1;" ::"r"(index + 1), "r"(threads) : "memory");
    } else {
      const uint32_t barrier = shared_address(scratch) + 8 * buffer;
      if (thread == 0) expect_bytes(barrier, n * static_cast<int>(sizeof(float2)));
      if (lane < cluster) send_to_peer(shared_address(mine), barrier, lane, v[0], v[K - 1]);
      wait_bytes(barrier, (reductions >> 1) & 1);
    }
    ++reductions;
    float2 total = make_float2(Op::identity, Op::identity);
#pragma unroll 1
    for (int i = lane; i < n; i += 32) {
      const float2 part = slots[i];
      total.x = Op::apply(total.x, part.x);
      total.y = Op::apply(total.y, part.y);
    }
    v[0] = warp_reduce<Op>(total.x);
    if constexpr (K == 2) v[1] = warp_reduce<Op>(total.y);
  }
};

// ---- Tiles ----

__device__ inline void copy_async(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

__device__ inline void wait_copies(int stages) {
  if (stages == 2) {
    asm volatile("cp.async.wait_group 1;" ::: "memory");
  } else {
    asm volatile("cp.async.wait_group 2;" ::: "memory");
  }
}

// One group's walk over its rows: V vectors a thread of each of K inputs (float/half/bfloat16 T).
template <class T, int V, int K>
struct RowTile {
  static constexpr int kElements = kPerVector<T>;

  const T* in[K];
  int64_t stride[K];
  int row, step, rows;
  int stages, slot = 0;
  int first;  // this thread's first vector in the row; the next ones are `threads` further each
  int owned;  // how many of its V vectors lie inside the row
  int threads;
  uint4* slots;

  __device__ RowTile(const RowShape& shape, const Group& g, uint4* ring, const T* const (&rows_of)[K],
                     const int64_t (&strides)[K])
      : rows(shape.rows), stages(shape.stages), threads(g.threads) {
    const int begin = g.rank * shape.per_block;
    const int slice = min(shape.per_block, shape.vectors - begin);
    first = begin + g.thread;
    owned = slice > g.thread ? min(V, (slice - g.thread + threads - 1) / threads) : 0;
    slots = ring + static_cast<int64_t>(g.index) * stages * K * V * threads + g.thread;
    // Neighbouring groups of a block take rows far apart, so that a last, partial round is spread over all blocks.
    const int walkers = gridDim.x / shape.cluster;
    row = g.index * walkers + blockIdx.x / shape.cluster;
    step = walkers * blockDim.y;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      in[k] = rows_of[k];
      stride[k] = strides[k];
    }
    for (int s = 0; s < stages; ++s) fetch(row + s * step, s);
  }

  __device__ void fetch(int wanted, int into) {
    if (wanted < rows) {
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const T* from = in[k] + wanted * stride[k] + static_cast<int64_t>(first) * kElements;
        const uint32_t to = shared_address(slots + (into * K + k) * V * threads);
#pragma unroll
        for (int i = 0; i < V; ++i) {
          if (i < owned) copy_async(to + i * threads * 16, from + i * threads * kElements);
        }
      }
    }
    commit_copies();  // an empty group, past the end, keeps the count of groups that the wait relies on
  }

  // Waits for this row. `vector` may then be used until `release`, which starts the copy that takes the row's place.
  __device__ void acquire() { wait_copies(stages); }

  __device__ void release() { fetch(row + stages * step, slot); }

  // Vector i of input k, zeros where the row has ended.
  __device__ uint4 vector(int k, int i) const {
    return i < owned ? slots[((slot * K + k) * V + i) * threads] : uint4{0, 0, 0, 0};
  }

  __device__ bool more() const { return row < rows; }

  __device__ void advance() {
    row += step;
    slot = slot + 1 == stages ? 0 : slot + 1;
  }

  __device__ int64_t column(int i) const { return static_cast<int64_t>(first + i * threads) * kElements; }
};

// Parameters of a block's slice, as float32 in shared memory. Four consecutive ones make a float4, and those at the
// same place of all vectors a plane: so the lanes of a warp read consecutive float4s.
template <class T>
struct ParamPlanes {
  static constexpr int kPlanes = kPerVector<T> / 4;
  float4* planes;
  int per_block;

  __device__ ParamPlanes(float4* at, const RowShape& shape, const Group& g, const Param& p, float absent)
      : planes(at), per_block(shape.per_block) {
    const int64_t begin = static_cast<int64_t>(g.rank) * per_block;
    const int n = (min(per_block, static_cast<int>(shape.vectors - begin))) * kPerVector<T>;
    float* out = reinterpret_cast<float*>(planes);
    for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < n; i += blockDim.x * blockDim.y) {
      const int vector = i / kPerVector<T>, element = i % kPerVector<T>;
      out[((element / 4) * per_block + vector) * 4 + element % 4] = load_param(p, begin * kPerVector<T> + i, absent);
    }
  }

  // Past the slice this reads its last vector, to be multiplied by nothing: what follows is another thread's to write.
  __device__ void read(int vector_in_slice, float (&f)[kPerVector<T>]) const {
    const int vector = min(vector_in_slice, per_block - 1);
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
      *reinterpret_cast<float4*>(f + 4 * plane) = planes[plane * per_block + vector];
    }
  }
};

// ---- Host: how rows are shared out ----

struct RowPlan {
  RowShape shape{};
  int vectors_per_thread = 0;  // 2, 3 or 4; 0: the rows do not fit, and a kernel must walk them in pieces
  Launch launch;
};

// The plan but for its grid, which needs the kernel (fill_grid), for two inputs and the weights of a slice in shared
// memory. Callers have checked alignment.
RowPlan plan_rows(const Device& device, int64_t rows, int64_t cols, int element_bytes);

// As many blocks as run at once, and no more than there are rows for.
inline int fill_grid(const void* kernel, const Device& device, RowPlan* plan, int64_t at_most = INT64_MAX) {
  int walkers = 0;
  if (int e = resident(kernel, device, plan->launch, &walkers)) return e;
  const int64_t useful = std::min(at_most, ceil_div(plan->shape.rows, static_cast<int>(plan->launch.block.y)));
  plan->launch.grid = dim3(static_cast<unsigned>(std::min<int64_t>(walkers, useful)) * plan->shape.cluster);
  return 0;
}

template <class F>
int dispatch_vectors(int vectors_per_thread, F&& f) {
  switch (vectors_per_thread) {
    case 2:
      return f(std::integral_constant<int, 2>());
    case 3:
      return f(std::integral_constant<int, 3>());
    case 4:
      return f(std::integral_constant<int, 4>());
  }
  return cudaErrorInvalidValue;
}

}  // namespace llmfast::cuda
