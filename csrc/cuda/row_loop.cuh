// Rows walked in pieces: the path of rows that are ragged, misaligned, or too long for registers.
#pragma once

#include "common.cuh"

namespace llmfast::cuda {

// Columns of one row as whole vectors and single elements. Rows of all tensors that are walked together start at the
// same distance from a 16-byte boundary, or only single elements are used.
template <class T>
struct Span {
  static constexpr int kElements = kPerVector<T>;
  int64_t cols, head, vectors;

  template <class... P>
  __device__ Span(int64_t cols, const T* first, const P*... others) : cols(cols), head(cols), vectors(0) {
    const unsigned phase = reinterpret_cast<uintptr_t>(first) % 16;
    if (((reinterpret_cast<uintptr_t>(others) % 16 == phase) && ... && true)) {
      head = min(cols, static_cast<int64_t>((16 - phase) % 16 / sizeof(T)));
      vectors = (cols - head) / kElements;
    }
  }

  // f(N, column) for this thread's share: N = integral_constant of 1 or kElements, columns column .. column + N - 1.
  template <class F>
  __device__ void visit(int thread, int threads, F&& f) const {
#pragma unroll 2
    for (int64_t i = thread; i < vectors; i += threads) {
      f(std::integral_constant<int, kElements>(), head + i * kElements);
    }
    const int64_t singles = cols - vectors * kElements;
    for (int64_t i = thread; i < singles; i += threads) {
      f(std::integral_constant<int, 1>(), i < head ? i : i + vectors * kElements);
    }
  }
};

// A row per warp (short rows, several warps a block) or per block.
struct LoopGroup {
  int thread, threads;
  int64_t row;

  __device__ explicit LoopGroup(bool row_per_warp)
      : thread(row_per_warp ? threadIdx.x % 32 : threadIdx.x),
        threads(row_per_warp ? 32 : blockDim.x),
        row(row_per_warp ? static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32 : blockIdx.x) {}

  template <class Op>
  __device__ float all_reduce(float v) const {
    __shared__ float sums[32];
    v = warp_reduce<Op>(v);
    if (threads == 32) return v;
    const int warp = thread / 32, lane = thread % 32;
    if (lane == 0) sums[warp] = v;
    __syncthreads();
    v = warp_reduce<Op>(lane < threads / 32 ? sums[lane] : Op::identity);
    __syncthreads();  // sums may be written again
    return v;
  }
};

struct LoopPlan {
  Launch launch;
  bool row_per_warp;
};

inline LoopPlan plan_loop(int64_t rows, int64_t cols) {
  LoopPlan plan;
  plan.row_per_warp = cols <= 1024;
  const int threads = plan.row_per_warp ? 128 : cols <= 8192 ? 256 : 512;
  plan.launch.block = dim3(threads);
  plan.launch.grid = dim3(static_cast<unsigned>(plan.row_per_warp ? ceil_div(rows, threads / 32) : rows));
  return plan;
}

}  // namespace llmfast::cuda
