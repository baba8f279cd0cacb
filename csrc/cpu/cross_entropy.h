// Cross-entropy over rows of logits, which are read from memory once in each direction.
#pragma once
#include "vec.h"

namespace llmfast::cpu::LLMFAST_VARIANT {

// Elements that stay in the first-level cache between finding their maximum and summing their exponentials.
constexpr int64_t kBlock = 2048;

template <class T>
void cross_entropy_fwd(const CrossEntropyFwd& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.logits) + row * a.stride;
    const int64_t target = a.targets[row];
    float maximum = -INFINITY, total = 0.0f;
    for (int64_t start = 0; start < a.cols && target != a.ignore_index; start += kBlock) {
      const int64_t n = a.cols - start < kBlock ? a.cols - start : kBlock;
      const float block = reduce_max(x + start, n);
      if (block > maximum) {
        total *= sum(exp(splat(maximum - block))) / W;
        maximum = block;
      }
      const Vec base = splat(maximum == -INFINITY ? 0.0f : maximum);
      total += reduce_sum(n, [&](int64_t i, auto part) { return exp(load(x + start + i, part) - base); });
    }
    a.maximum[row] = maximum;
    a.sum[row] = total;
    if (target == a.ignore_index)
      a.loss[row] = 0.0f;
    else if (target < 0 || target >= a.cols)
      a.loss[row] = NAN;
    else
      a.loss[row] = (maximum - to_float(x[target])) + logf(total);
  }
}

template <class T, bool kStreamed>
void cross_entropy_bwd_rows(const CrossEntropyBwd& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.logits) + row * a.stride;
    T* dx = static_cast<T*>(a.dlogits) + row * a.cols;
    const int64_t target = a.targets[row];
    if (target == a.ignore_index) {
      memset(dx, 0, a.cols * sizeof(T));
      continue;
    }
    const bool valid = target >= 0 && target < a.cols;
    const Vec maximum = splat(a.maximum[row]), factor = splat(valid ? a.scale / a.sum[row] : NAN);
    const int64_t special = valid ? target / W * W : -1;  // the vector that holds the target
    sweep(a.cols, [&](int64_t i, auto part) {
      Vec g = exp(load(x + i, part) - maximum) * factor;
      if (i == special) g[target - special] -= a.scale;
      put<kStreamed>(dx + i, g, part);
    });
  }
  if (kStreamed) finish_streaming();
}

template <class T>
void cross_entropy_bwd(const CrossEntropyBwd& a, int64_t begin, int64_t end) {
  streams<T>(a.dlogits, a.rows, a.cols) ? cross_entropy_bwd_rows<T, true>(a, begin, end)
                                        : cross_entropy_bwd_rows<T, false>(a, begin, end);
}

}  // namespace llmfast::cpu::LLMFAST_VARIANT
