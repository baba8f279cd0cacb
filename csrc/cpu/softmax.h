// Softmax over rows: three passes over a row that the cache holds after the first.
#pragma once
#include "vec.h"

namespace llmfast::cpu::LLMFAST_VARIANT {

template <class T>
void softmax_fwd(const SoftmaxFwd& a, int64_t begin, int64_t end) {
  // e^(x - max) waits here for the sum: a bfloat16 y would round it twice.
  Scratch scratch(a.cols);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    T* y = static_cast<T*>(a.y) + row * a.cols;
    const Vec maximum = splat(reduce_max(x, a.cols));
    float* e = scratch.data();
    const float total = reduce_sum(a.cols, [&](int64_t i, auto part) {
      const Vec v = exp(load(x + i, part) - maximum);
      store(e + i, v, part);
      return v;
    });
    const Vec inverse = splat(1.0f / total);
    sweep(a.cols, [&](int64_t i, auto part) { store(y + i, load(e + i, part) * inverse, part); });
  }
}

template <class T>
void softmax_bwd(const SoftmaxBwd& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* dy = static_cast<const T*>(a.dy) + row * a.dy_stride;
    const T* y = static_cast<const T*>(a.y) + row * a.y_stride;
    T* dx = static_cast<T*>(a.dx) + row * a.cols;
    const Vec dot =
        splat(reduce_sum(a.cols, [&](int64_t i, auto part) { return load(dy + i, part) * load(y + i, part); }));
    sweep(a.cols, [&](int64_t i, auto part) { store(dx + i, load(y + i, part) * (load(dy + i, part) - dot), part); });
  }
}

}  // namespace llmfast::cpu::LLMFAST_VARIANT
