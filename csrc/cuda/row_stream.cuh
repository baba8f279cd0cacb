// Rows longer than a block holds, in slices over a cluster of blocks that exchange their sums through distributed
// shared memory. Clusters walk the rows, each thread copying its own vectors of the rows to come into shared memory
// (cp.async): no other thread reads them, so that needs no barrier, and bytes in flight cost no registers. A row is
// read twice from there: once for its sums, and again once those of the other blocks have come, by when the next row's
// are already on their way. So the exchange, which takes microseconds, holds nobody up.
#pragma once

#include "row_direct.cuh"
#include "row_tile.cuh"

namespace llmfast::cuda {

constexpr int kMaxCluster = 8;

struct StreamShape {
  int rows, cols;
  int per_block;  // vectors of a block's slice
  int cluster;
  int stages;  // rows in shared memory, 2 to 4
};

// Four floats into the peer's shared memory at the address `mine` has here, counted at the barrier likewise.
__device__ inline void send_part(uint32_t mine, uint32_t barrier, int peer, const float4& v) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .u32 at, counter;\n"
      "mapa.shared::cluster.u32 at, %0, %2;\nmapa.shared::cluster.u32 counter, %1, %2;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [at], {%3, %4, %5, %6}, [counter];\n}" ::"r"(
          mine),
      "r"(barrier), "r"(peer), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
      : "memory");
#endif
}

// Rows after which the buffers of the exchange repeat. A warp posts row r + 4 having collected r + 2, so all warps have
// posted r + 2, and had collected r before they did.
constexpr int kExchangeBuffers = 4;

__host__ __device__ inline int exchange_bytes(int threads, int cluster) {
  return kExchangeBuffers * (8 + (threads / 32 + cluster) * static_cast<int>(sizeof(float4)));
}

// Sums in two steps: warp 0 merges those of its block and sends them to all blocks of the cluster.
struct ClusterExchange {
  uint4* shared;  // exchange_bytes of it: barriers, buffers of the blocks' parts, buffers of the warps' parts
  int cluster, rank, warps;
  int posted = 0, collected = 0;

  __device__ ClusterExchange(uint4* shared, int cluster)
      : shared(shared), cluster(cluster), rank(blockIdx.x % cluster), warps(blockDim.x / 32) {}

  __device__ uint32_t barrier(int buffer) const { return shared_address(shared) + 8 * buffer; }
  __device__ float4* block_parts(int buffer) const {
    return reinterpret_cast<float4*>(shared + kExchangeBuffers / 2) + buffer * cluster;
  }
  __device__ float4* warp_parts(int buffer) const { return block_parts(kExchangeBuffers) + buffer * warps; }

  // Also makes what the block has written to shared memory before it known to all its threads.
  __device__ void start() {
    if (threadIdx.x == 0) {
      for (int i = 0; i < kExchangeBuffers; ++i) init_byte_barrier(barrier(i));
    }
    cluster_barrier();
  }

  // This warp's part of a row's sums, the same in all lanes. merge(parts, n): one part out of n.
  template <class F>
  __device__ void post(const float4& part, F&& merge) {
    const int i = posted++ % kExchangeBuffers, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (lane == 0) warp_parts(i)[warp] = part;
    __syncwarp();
    // Others only arrive. They come here twice more only after warp 0 has left, so two barriers are enough.
    if (warp > 0) {
      asm volatile("bar.arrive %0, %1;" ::"r"(1 + i % 2), "r"(blockDim.x) : "memory");
      return;
    }
    asm volatile("bar.sync %0, %1;" ::"r"(1 + i % 2), "r"(blockDim.x) : "memory");
    const float4 all = merge(warp_parts(i), warps);
    if (lane == 0) expect_bytes(barrier(i), cluster * static_cast<int>(sizeof(float4)));
    if (lane < cluster) send_part(shared_address(block_parts(i) + rank), barrier(i), lane, all);
  }

  // All blocks' parts, in order, of the oldest row posted and not yet collected.
  __device__ const float4* collect() {
    const int i = collected % kExchangeBuffers;
    wait_bytes(barrier(i), collected / kExchangeBuffers % 2);
    ++collected;
    return block_parts(i);
  }
};

// A block's walk over its slices of rows, V vectors a thread of each of K inputs that lie alike over 16-byte
// boundaries.
template <class T, int V, int K, bool kRagged>
struct RowStream {
  static constexpr int n = kPerVector<T>;

  const T* in[K];
  int64_t stride[K];
  StreamShape shape;
  int begin, row, step;
  uint4* slots;

  __device__ RowStream(const StreamShape& shape, uint4* ring, const T* const (&rows_of)[K], const int64_t (&strides)[K])
      : shape(shape),
        begin(blockIdx.x % shape.cluster * shape.per_block),
        row(blockIdx.x / shape.cluster),
        step(gridDim.x / shape.cluster),
        slots(ring + threadIdx.x) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      in[k] = rows_of[k];
      stride[k] = strides[k];
    }
    for (int s = 0; s < shape.stages; ++s) fetch(row + s * step, s);
  }

  // Vector i of this thread, counted in the row; those at `end` and beyond are not of this slice.
  __device__ int vector_index(int i) const { return begin + threadIdx.x + i * blockDim.x; }

  __device__ int end(int vectors) const { return min(vectors, begin + shape.per_block); }

  __device__ void fetch(int wanted, int into) {
    if (wanted < shape.rows) {
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const T* from = in[k] + wanted * stride[k];
        const Cover<T, kRagged> cover(from, shape.cols);
        const int stop = end(cover.vectors);
#pragma unroll
        for (int i = 0; i < V; ++i) {
          if (vector_index(i) < stop) copy_async(shared_address(slot(into, k, i)), cover.at(from, vector_index(i)));
        }
      }
    }
    commit_copies();  // an empty group, past the end, keeps the count of groups that the wait relies on
  }

  __device__ uint4* slot(int stage, int k, int i) const {
    return slots + static_cast<int64_t>((stage * K + k) * V + i) * blockDim.x;
  }

  // sums(stage, row) for each row as it arrives, to post them; finish(stage, row) for it after sums of the next.
  template <class F, class G>
  __device__ void walk(F&& sums, G&& finish) {
    int stage = 0, last_stage = 0;
    for (bool first = true;; first = false) {
      const bool more = row < shape.rows;
      if (more) {
        // The row before has not given its place to another yet.
        if (shape.stages == 4) {
          asm volatile("cp.async.wait_group 2;" ::: "memory");
        } else if (shape.stages == 3) {
          asm volatile("cp.async.wait_group 1;" ::: "memory");
        } else {
          asm volatile("cp.async.wait_group 0;" ::: "memory");
        }
        sums(stage, row);
      }
      if (!first) {
        const int last = row - step;
        finish(last_stage, last);
        fetch(last + shape.stages * step, last_stage);
      }
      if (!more) break;
      last_stage = stage;
      stage = stage + 1 == shape.stages ? 0 : stage + 1;
      row += step;
    }
  }
};

// ---- Host ----

struct StreamPlan {
  StreamShape shape{};  // cluster 0: the rows do not fit
  Launch launch;
};

struct StreamNeeds {
  int64_t rows, cols, vectors;  // vectors: the most that a row covers
  int inputs, vectors_per_thread, max_threads;
  int64_t param_bytes;  // kept in shared memory, for each vector of a slice
};

StreamPlan plan_stream(const Device& device, const StreamNeeds& needs);

// As many clusters as run at once, and no more than there are rows.
inline int fill_stream_grid(const void* kernel, const Device& device, StreamPlan* plan, int64_t at_most = INT32_MAX) {
  int clusters = 0;
  if (int e = resident(kernel, device, plan->launch, &clusters)) return e;
  clusters = static_cast<int>(std::min<int64_t>(at_most, std::min(clusters, plan->shape.rows)));
  plan->launch.grid = dim3(static_cast<unsigned>(clusters * plan->shape.cluster));
  return 0;
}

}  // namespace llmfast::cuda
