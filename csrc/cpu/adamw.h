// AdamW (https://arxiv.org/abs/1711.05101): weights and both moments in one pass.
#pragma once
#include "vec.h"

namespace llmfast::cpu::LLMFAST_VARIANT {

inline void adamw(const AdamW& a, int64_t begin, int64_t end) {
  const Vec decay = splat(1.0f - a.learning_rate * a.weight_decay), step = splat(a.learning_rate / a.correction1);
  const Vec root = splat(1.0f / __builtin_sqrtf(a.correction2)), scale = splat(a.grad_scale), eps = splat(a.eps);
  const Vec keep1 = splat(a.beta1), add1 = splat(1.0f - a.beta1), keep2 = splat(a.beta2), add2 = splat(1.0f - a.beta2);
  sweep(end - begin, [&](int64_t offset, auto part) {
    const int64_t i = begin + offset;
    const Vec g = load(a.grad + i, part) * scale;
    const Vec m = load(a.exp_avg + i, part) * keep1 + g * add1;
    const Vec v = load(a.exp_avg_sq + i, part) * keep2 + g * g * add2;
    store(a.exp_avg + i, m, part);
    store(a.exp_avg_sq + i, v, part);
    store(a.parameter + i, load(a.parameter + i, part) * decay - step * m / (square_root(v) * root + eps), part);
  });
}

inline void column_sum(const ColumnSum& a, int64_t begin, int64_t end) {
  sweep(end - begin, [&](int64_t offset, auto part) {
    Vec total = {};
    for (int64_t chunk = 0; chunk < a.chunks; ++chunk) total += load(a.partial + chunk * a.cols + begin + offset, part);
    store(a.out + begin + offset, total, part);
  });
}

}  // namespace llmfast::cpu::LLMFAST_VARIANT
