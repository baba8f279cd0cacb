// Layer normalisation (https://arxiv.org/abs/1607.06450) and RMS normalisation (https://arxiv.org/abs/1910.07467).
#pragma once
#include "vec.h"

namespace llmfast::cpu::LLMFAST_VARIANT {

// The sums of x - centre and of its square over a row, in one pass.
struct Moments {
  float sum = 0.0f, squares = 0.0f;

  template <class T>
  void add(const T* x, int64_t n, Vec centre) {
    Vec s0 = {}, s1 = {}, q0 = {}, q1 = {};
    int64_t i = 0;
    for (; i + 2 * W <= n; i += 2 * W) {
      const Vec v0 = load(x + i) - centre, v1 = load(x + i + W) - centre;
      s0 += v0;
      s1 += v1;
      q0 += v0 * v0;
      q1 += v1 * v1;
    }
    sweep(n - i, [&](int64_t j, auto part) {
      const Vec v = keep(load(x + i + j, part) - centre, part);
      s0 += v;
      q0 += v * v;
    });
    sum = LLMFAST_VARIANT::sum(s0 + s1);
    squares = LLMFAST_VARIANT::sum(q0 + q1);
  }
};

// kCentre: layer normalisation, which takes the mean off; else RMS.
template <class T, bool kCentre>
void norm_fwd(const NormFwd& a, int64_t begin, int64_t end) {
  const float n = float(a.cols);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    T* y = static_cast<T*>(a.y) + row * a.cols;
    float mean = 0.0f;
    if constexpr (kCentre) mean = reduce_sum(a.cols, [&](int64_t i, auto part) { return load(x + i, part); }) / n;
    Moments moments;
    moments.add(x, a.cols, splat(mean));
    float variance = moments.squares / n;
    if constexpr (kCentre) {
      const float error = moments.sum / n;  // what the first sum rounded off
      mean += error;
      variance -= error * error;
      a.mean[row] = mean;
    }
    const Vec centre = splat(mean);
    const float rstd = 1.0f / __builtin_sqrtf(variance + a.eps);
    a.rstd[row] = rstd;
    const Vec scale = splat(rstd);
    const float *weight = a.weight, *bias = a.bias;
    if (weight && bias) {
      sweep(a.cols, [&](int64_t i, auto part) {
        store(y + i, (load(x + i, part) - centre) * scale * load(weight + i, part) + load(bias + i, part), part);
      });
    } else {
      sweep(a.cols, [&](int64_t i, auto part) {
        Vec v = (load(x + i, part) - centre) * scale;
        if (weight) v *= load(weight + i, part);
        if (bias) v += load(bias + i, part);
        store(y + i, v, part);
      });
    }
  }
}

// dx = rstd * (wdy - mean(wdy) - x^ * mean(wdy * x^)) with wdy = weight * dy and x^ = (x - mean) * rstd; RMS has no
// mean(wdy). kRows rows are walked side by side, so that the partial sums are read and written once for all of them.
template <class T, bool kCentre, int kRows>
void norm_bwd_rows(const NormBwd& a, int64_t first, float* dweight, float* dbias) {
  const T *dy[kRows], *x[kRows];
  T* dx[kRows];
  Vec centre[kRows], rstd[kRows], mean_wdy[kRows], correlation[kRows];
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = first + r;
    dy[r] = static_cast<const T*>(a.dy) + row * a.dy_stride;
    x[r] = static_cast<const T*>(a.x) + row * a.x_stride;
    dx[r] = static_cast<T*>(a.dx) + row * a.cols;
    centre[r] = splat(kCentre ? a.mean[row] : 0.0f);
    rstd[r] = splat(a.rstd[row]);
    Vec total = {}, product = {}, total2 = {}, product2 = {};
    const auto add = [&](int64_t i, auto part, Vec& t, Vec& p) {
      Vec wdy = load(dy[r] + i, part);
      if (a.weight) wdy *= load(a.weight + i, part);
      t += wdy;
      p += wdy * (load(x[r] + i, part) - centre[r]);
    };
    int64_t i = 0;
    for (; i + 2 * W <= a.cols; i += 2 * W) {
      add(i, Full{}, total, product);
      add(i + W, Full{}, total2, product2);
    }
    sweep(a.cols - i, [&](int64_t j, auto part) { add(i + j, part, total, product); });  // wdy is 0 past the end
    mean_wdy[r] = splat(kCentre ? sum(total + total2) / float(a.cols) : 0.0f);
    correlation[r] = splat(sum(product + product2) * a.rstd[row] / float(a.cols));
  }
  sweep(a.cols, [&](int64_t i, auto part) {
    const Vec weight = a.weight ? load(a.weight + i, part) : splat(1.0f);
    Vec dw = {}, db = {};
    for (int r = 0; r < kRows; ++r) {
      const Vec g = load(dy[r] + i, part);
      const Vec x_hat = (load(x[r] + i, part) - centre[r]) * rstd[r];
      store(dx[r] + i, (g * weight - mean_wdy[r] - x_hat * correlation[r]) * rstd[r], part);
      dw += g * x_hat;
      db += g;
    }
    store(dweight + i, load(dweight + i, part) + dw, part);
    if constexpr (kCentre) store(dbias + i, load(dbias + i, part) + db, part);
  });
}

template <class T, bool kCentre>
void norm_bwd(const NormBwd& a, int64_t begin, int64_t end) {
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    float* dweight = a.partial_weight + chunk * a.cols;
    float* dbias = kCentre ? a.partial_bias + chunk * a.cols : nullptr;
    memset(dweight, 0, a.cols * sizeof(float));
    if (dbias) memset(dbias, 0, a.cols * sizeof(float));
    int64_t row = chunk * a.rows_per_chunk;
    const int64_t last = row + a.rows_per_chunk < a.rows ? row + a.rows_per_chunk : a.rows;
    for (; row + 4 <= last; row += 4) norm_bwd_rows<T, kCentre, 4>(a, row, dweight, dbias);
    for (; row < last; ++row) norm_bwd_rows<T, kCentre, 1>(a, row, dweight, dbias);
  }
}

}  // namespace llmfast::cpu::LLMFAST_VARIANT
