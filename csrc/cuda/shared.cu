// What the kernels' files share: how rows are laid over threads, blocks and clusters, and the second stage of column
// sums (partials, one row per block of the first stage, are summed in a fixed order).
#include "row_stream.cuh"

namespace llmfast::cuda {
namespace {

constexpr int kMaxGroup = 512, kMaxVectors = 4 * kMaxGroup;
constexpr int64_t kMaxRows = 1 << 30;  // row numbers, and those of the rows to come, are ints

// Blocks per row. Slices are half as large as they can be while clusters allow: two blocks, with the weights in shared
// memory, then fit a multiprocessor, and one computes while the other waits for its sums.
int choose_cluster(const Device& device, int64_t vectors) {
  const int widest = device.major >= 9 ? 8 : 1;
  int cluster = 1;
  while (cluster < widest && ceil_div(vectors, cluster) > kMaxVectors / 2) cluster *= 2;
  return ceil_div(vectors, cluster) <= kMaxVectors ? cluster : 0;
}

int group_threads(int64_t vectors, int per_thread) { return static_cast<int>(ceil_div(vectors, 32 * per_thread)) * 32; }

int choose_vectors_per_thread(int64_t vectors) {
  if (vectors <= 64) return 2;
  if (vectors <= 96) return 3;
  const int by3 = group_threads(vectors, 3), by4 = group_threads(vectors, 4);
  return by3 <= kMaxGroup && by3 * 3 < by4 * 4 ? 3 : 4;  // whichever leaves fewer vectors unused
}

size_t shared_bytes(int element_bytes, const RowPlan& plan, int threads, int groups, int stages) {
  const int64_t weights = int64_t{plan.shape.per_block} * (16 / element_bytes) * 4;
  const int64_t ring = int64_t{groups} * stages * 2 * plan.vectors_per_thread * threads * 16;
  return weights + ring + int64_t{groups} * scratch_floats(threads, plan.shape.cluster) * 4;
}

constexpr int kColumns = 32, kLanes = 16;  // of a block: 128-byte reads, and 16 sums of each column side by side

__global__ void __launch_bounds__(kColumns* kLanes)
    sum_partials_kernel(const float* first, const float* second, float* first_out, float* second_out, int64_t n,
                        int64_t cols) {
  await_previous();
  const float* in = blockIdx.y == 0 ? first : second;
  float* out = blockIdx.y == 0 ? first_out : second_out;
  if (out == nullptr) return;
  const int64_t col = static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x;
  float total = 0.0f;
  if (col < cols) {
#pragma unroll 8
    for (int64_t i = threadIdx.y; i < n; i += kLanes) total += in[i * cols + col];
  }
  __shared__ float sums[kLanes][kColumns];
  sums[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y == 0 && col < cols) {
    for (int i = 1; i < kLanes; ++i) total += sums[i][threadIdx.x];
    out[col] = total;
  }
}

}  // namespace

RowPlan plan_rows(const Device& device, int64_t rows, int64_t cols, int element_bytes) {
  RowPlan plan;
  const int64_t vectors = cols * element_bytes / 16;
  const int cluster = choose_cluster(device, vectors);
  if (cluster == 0 || rows > kMaxRows) return plan;
  const int64_t per_block = ceil_div(vectors, cluster);
  plan.shape = {static_cast<int>(rows), static_cast<int>(vectors), static_cast<int>(per_block), cluster, 0};
  plan.vectors_per_thread = choose_vectors_per_thread(per_block);
  const int threads = group_threads(per_block, plan.vectors_per_thread);
  int groups = kMaxGroup / threads;
  if (threads > 32) groups = std::min(groups, 15);  // a named barrier each, of 16, the first being the block's
  if (cluster > 1) groups = 1;                      // the cluster's barrier is for all threads of its blocks
  const int64_t rows_each = ceil_div(rows, device.multiprocessors);  // few rows: rather on all multiprocessors
  groups = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(groups, rows_each)));
  // A cluster's blocks are one group each: two of them should fit a multiprocessor, which has 1 KiB more than a block
  // may use, and sets as much aside for every block.
  const size_t whole = device.max_smem, half = (whole + 1024) / 2 - 1024;
  for (size_t budget : {cluster > 1 ? half : whole, whole}) {
    for (int g = groups; g > 0; g /= 2) {
      for (int stages = 3; stages >= 2; --stages) {
        const size_t smem = shared_bytes(element_bytes, plan, threads, g, stages);
        if (smem > budget) continue;
        plan.shape.stages = stages;
        plan.launch.block = dim3(threads, g);
        plan.launch.smem = smem;
        plan.launch.cluster = cluster;
        return plan;
      }
    }
  }
  plan.vectors_per_thread = 0;
  return plan;
}

StreamPlan plan_stream(const Device& device, const StreamNeeds& needs) {
  StreamPlan plan;
  const int most = needs.vectors_per_thread * needs.max_threads;
  if (device.major < 9 || needs.vectors == 0 || needs.rows > kMaxRows || needs.vectors > int64_t{kMaxCluster} * most)
    return plan;
  int cluster = 2;
  while (ceil_div(needs.vectors, cluster) > most) cluster *= 2;
  const int per_block = static_cast<int>(ceil_div(needs.vectors, cluster));
  const int threads = group_threads(per_block, needs.vectors_per_thread);
  const int64_t fixed = needs.param_bytes * per_block + 32 + exchange_bytes(threads, cluster);
  const int64_t row = int64_t{16} * needs.inputs * needs.vectors_per_thread * threads;
  // Small blocks: rather two to a multiprocessor, each with as much set aside for it as plan_rows says.
  const bool two = threads <= 512 && fixed + 3 * row <= (device.max_smem + 1024) / 2 - 1024;
  for (int stages : {4, 3, 2}) {
    const int64_t smem = fixed + stages * row;
    if (smem > device.max_smem || (two && stages == 4)) continue;
    plan.shape = {static_cast<int>(needs.rows), static_cast<int>(needs.cols), per_block, cluster, stages};
    plan.launch.block = dim3(threads);
    plan.launch.smem = static_cast<size_t>(smem);
    plan.launch.cluster = cluster;
    break;
  }
  return plan;
}

int multiprocessors(int device) {
  Device facts;
  return device_facts(device, &facts) == 0 ? facts.multiprocessors : 0;
}

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int sum_partials(const float* first, const float* second, float* first_out, float* second_out, int64_t n_partials,
                 int64_t cols, void* stream) {
  if (first_out == nullptr && second_out == nullptr) return 0;
  Device device;
  if (int e = current_device(&device)) return e;
  Launch l;
  l.early = device.major >= 9;
  l.grid = dim3(static_cast<unsigned>(ceil_div(cols, kColumns)), second_out == nullptr ? 1 : 2);
  l.block = dim3(kColumns, kLanes);
  return launch(sum_partials_kernel, l, stream, first, second, first_out, second_out, n_partials, cols);
}

}  // namespace llmfast::cuda
