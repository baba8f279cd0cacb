// Rotary position embedding (https://arxiv.org/abs/2104.09864): pairs (x[i], x[i + D/2]) turned by their position's
// angle.
#pragma once
#include "vec.h"

namespace llmfast::cpu::LLMFAST_VARIANT {

template <class T>
void rope(const Rope& a, int64_t begin, int64_t end) {
  const int64_t half = a.head_dim / 2;
  const Vec direction = splat(a.direction);
  for (int64_t position = begin; position < end; ++position) {
    const int64_t t = position % a.length;
    const T* x = static_cast<const T*>(a.x) + position / a.length * a.batch_stride + t * a.length_stride;
    T* y = static_cast<T*>(a.y) + position * a.heads * a.head_dim;
    for (int64_t head = 0; head < a.heads; ++head, x += a.head_stride, y += a.head_dim) {
      sweep(half, [&](int64_t i, auto part) {
        const Vec cos = load(a.cos + t * half + i, part), sin = load(a.sin + t * half + i, part) * direction;
        const Vec first = load(x + i, part), second = load(x + half + i, part);
        store(y + i, first * cos - second * sin, part);
        store(y + half + i, second * cos + first * sin, part);
      });
    }
  }
}

}  // namespace llmfast::cpu::LLMFAST_VARIANT
