// GELU (https://arxiv.org/abs/1606.08415) after an optional bias, and SwiGLU (https://arxiv.org/abs/2002.05202).
#pragma once
#include "vec.h"

namespace llmfast::cpu::LLMFAST_VARIANT {

// tanh(u) = 2 sigmoid(2u) - 1, so GPT-2's 0.5 x (1 + tanh(u)), u = sqrt(2/pi) (x + 0.044715 x^3), is x sigmoid(2u).
constexpr float kTwoRootTwoOverPi = 1.5957691216f;
constexpr float kCubic = 0.044715f;

template <bool kTanh>
inline Vec gelu(Vec x) {
  if constexpr (kTanh) return x * sigmoid(kTwoRootTwoOverPi * (x + kCubic * x * x * x));
  const Vec half = 0.5f * x;
  return half + half * erf_of_root_half(x);
}

// sigmoid(x) for x >= -80 and its derivative, without the cancellation of 1 - sigmoid for large x. Below, where both
// are less than 1e-34, callers take -80 for x, also where they multiply by it.
struct Sigmoid {
  Vec value, slope;
  explicit Sigmoid(Vec x) {
    const Vec t = exp(-x);
    value = 1.0f / (1.0f + t);
    slope = t * value * value;
  }
};

template <bool kTanh>
inline Vec gelu_slope(Vec x) {
  if constexpr (kTanh) {
    x = min(splat(15.0f), max(splat(-9.6f), x));  // 0 or 1 from there on; s takes -78 and more
    const Sigmoid s(kTwoRootTwoOverPi * (x + kCubic * x * x * x));
    return s.value + x * s.slope * kTwoRootTwoOverPi * (1.0f + 3.0f * kCubic * x * x);
  }
  return 0.5f + 0.5f * erf_of_root_half(x) + x * 0.39894228f * exp(-0.5f * x * x);
}

template <class T, bool kTanh>
void gelu_rows(const Gelu& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    T* y = static_cast<T*>(a.y) + row * a.cols;
    sweep(a.cols, [&](int64_t i, auto part) {
      Vec v = load(x + i, part);
      if (a.bias) v += load(a.bias + i, part);
      store(y + i, gelu<kTanh>(v), part);
    });
  }
}

template <class T>
void gelu_fwd(const Gelu& a, int64_t begin, int64_t end) {
  a.tanh ? gelu_rows<T, true>(a, begin, end) : gelu_rows<T, false>(a, begin, end);
}

template <class T, bool kTanh, int kRows>
void gelu_bwd_rows(const GeluBwd& a, int64_t first, float* dbias) {
  const T *dy[kRows], *x[kRows];
  T* dx[kRows];
  for (int r = 0; r < kRows; ++r) {
    dy[r] = static_cast<const T*>(a.dy) + (first + r) * a.dy_stride;
    x[r] = static_cast<const T*>(a.x) + (first + r) * a.x_stride;
    dx[r] = static_cast<T*>(a.dx) + (first + r) * a.cols;
  }
  const float* added = a.bias;
  sweep(a.cols, [=](int64_t i, auto part) {
    const Vec bias = added ? load(added + i, part) : Vec{};
    Vec total = {};
    for (int r = 0; r < kRows; ++r) {
      const Vec g = load(dy[r] + i, part) * gelu_slope<kTanh>(load(x[r] + i, part) + bias);
      store(dx[r] + i, g, part);
      total += g;
    }
    if (dbias) store(dbias + i, load(dbias + i, part) + total, part);
  });
}

template <class T, bool kTanh>
void gelu_bwd_chunks(const GeluBwd& a, int64_t begin, int64_t end) {
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    float* dbias = a.partial_bias ? a.partial_bias + chunk * a.cols : nullptr;
    if (dbias) memset(dbias, 0, a.cols * sizeof(float));
    int64_t row = chunk * a.rows_per_chunk;
    const int64_t last = row + a.rows_per_chunk < a.rows ? row + a.rows_per_chunk : a.rows;
    for (; row + 4 <= last; row += 4) gelu_bwd_rows<T, kTanh, 4>(a, row, dbias);
    for (; row < last; ++row) gelu_bwd_rows<T, kTanh, 1>(a, row, dbias);
  }
}

template <class T>
void gelu_bwd(const GeluBwd& a, int64_t begin, int64_t end) {
  a.tanh ? gelu_bwd_chunks<T, true>(a, begin, end) : gelu_bwd_chunks<T, false>(a, begin, end);
}

template <class T>
void swiglu_fwd(const SwiGLU& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride;
    const T* up = static_cast<const T*>(a.up) + row * a.up_stride;
    T* y = static_cast<T*>(a.y) + row * a.cols;
    sweep(a.cols, [&](int64_t i, auto part) {
      const Vec g = load(gate + i, part);
      store(y + i, g * sigmoid(g) * load(up + i, part), part);
    });
  }
}

// silu'(g) = sigmoid(g) + g sigmoid'(g)
template <class T>
void swiglu_bwd(const SwiGLUBwd& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* dy = static_cast<const T*>(a.dy) + row * a.dy_stride;
    const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride;
    const T* up = static_cast<const T*>(a.up) + row * a.up_stride;
    T* dgate = static_cast<T*>(a.dgate) + row * a.cols;
    T* dup = static_cast<T*>(a.dup) + row * a.cols;
    sweep(a.cols, [&](int64_t i, auto part) {
      const Vec d = load(dy + i, part), g = max(splat(-80.0f), load(gate + i, part));
      const Sigmoid s(g);
      store(dgate + i, d * load(up + i, part) * (s.value + g * s.slope), part);
      store(dup + i, d * g * s.value, part);
    });
  }
}

}  // namespace llmfast::cpu::LLMFAST_VARIANT
