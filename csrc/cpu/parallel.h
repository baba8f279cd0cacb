// Runs a kernel's range of work on torch's own threads: no second pool, and torch.set_num_threads holds for it too.
#pragma once
#include <algorithm>

#include "../tensor.h"
#include "kernels.h"

namespace llmfast::cpu {

// Elements of work below which another thread costs more than it saves.
constexpr int64_t kGrain = 16384;

template <class Args>
struct Task {
  Kernel<Args> kernel;
  const Args* args;
};

// Contiguous shares of `items`, each of `work` elements.
template <class Args>
void parallel(Kernel<Args> kernel, const Args& args, int64_t items, int64_t work) {
  if (items == 0) return;
  Task<Args> task{kernel, &args};
  const auto run = [](int64_t begin, int64_t end, void* context) {
    const auto& t = *static_cast<Task<Args>*>(context);
    t.kernel(*t.args, begin, end);
  };
  LLMFAST_TORCH(torch_parallel_for(0, items, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, work)), run, &task));
}

inline int64_t threads() {
  uint32_t n = 1;
  LLMFAST_TORCH(torch_get_num_threads(&n));
  return n;
}

// Rows in chunks, one partial sum of `cols` floats each, then the sum of the partials: two short chains of additions
// round less than one long one. Their lengths depend on the shape alone, and so do the results' bits.
struct Chunks {
  int64_t count, rows_per_chunk;

  explicit Chunks(int64_t rows) {
    rows_per_chunk = std::max<int64_t>(64, (rows + 255) / 256);
    count = (rows + rows_per_chunk - 1) / rows_per_chunk;
  }
};

inline Tensor sum_partials(const Tensor& partial, const Chunks& chunks, int64_t cols) {
  Tensor out = empty_float32({cols}, partial);
  parallel(kernels().column_sum, ColumnSum{partial.data<float>(), out.data<float>(), chunks.count, cols}, cols,
           chunks.count / 8);  // a few additions an element: more threads pay late
  return out;
}

}  // namespace llmfast::cpu
