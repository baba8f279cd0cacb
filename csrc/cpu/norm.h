// Layer normalisation (https://arxiv.org/abs/1607.06450) and RMS normalisation (https://arxiv.org/abs/1910.07467).
#pragma once
#include "vec.h"

namespace llmfast::cpu::LLMFAST_VARIANT {

// kCentre: layer normalisation, which takes the mean off; else RMS.
template <class T, bool kCentre, bool kStreamed>
void norm_fwd_rows(const NormFwd& a, int64_t begin, int64_t end) {
  const float n = float(a.cols);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    T* y = static_cast<T*>(a.y) + row * a.cols;
    float mean = 0.0f;
    if constexpr (kCentre) mean = reduce_sum(a.cols, [&](int64_t i, auto part) { return load(x + i, part); }) / n;
    const Sums about = reduce_two(a.cols, [&, centre = splat(mean)](int64_t i, auto part, Vec& sum, Vec& squares) {
      const Vec v = keep(load(x + i, part) - centre, part);
      sum += v;
      squares += v * v;
    });
    float variance = about.second / n;
    if constexpr (kCentre) {
      const float error = about.first / n;  // what the first sum rounded off
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
        const Vec v = (load(x + i, part) - centre) * scale;
        put<kStreamed>(y + i, v * load(weight + i, part) + load(bias + i, part), part);
      });
    } else {
      sweep(a.cols, [&](int64_t i, auto part) {
        Vec v = (load(x + i, part) - centre) * scale;
        if (weight) v *= load(weight + i, part);
        if (bias) v += load(bias + i, part);
        put<kStreamed>(y + i, v, part);
      });
    }
  }
  if (kStreamed) finish_streaming();
}

template <class T, bool kCentre>
void norm_fwd(const NormFwd& a, int64_t begin, int64_t end) {
  streams<T>(a.y, a.rows, a.cols) ? norm_fwd_rows<T, kCentre, true>(a, begin, end)
                                  : norm_fwd_rows<T, kCentre, false>(a, begin, end);
}

// dx = rstd * (wdy - mean(wdy) - x^ * mean(wdy * x^)) with wdy = weight * dy and x^ = (x - mean) * rstd; RMS has no
// mean(wdy). kRows rows are walked side by side, so that the partial sums are read and written once for all of them.
template <class T, bool kCentre, bool kStreamed, int kRows>
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
    const Sums sums = reduce_two(a.cols, [&](int64_t i, auto part, Vec& total, Vec& product) {
      Vec wdy = load(dy[r] + i, part);  // 0 past the end
      if (a.weight) wdy *= load(a.weight + i, part);
      total += wdy;
      product += wdy * (load(x[r] + i, part) - centre[r]);
    });
    mean_wdy[r] = splat(kCentre ? sums.first / float(a.cols) : 0.0f);
    correlation[r] = splat(sums.second * a.rstd[row] / float(a.cols));
  }
  sweep(a.cols, [&](int64_t i, auto part) {
    const Vec weight = a.weight ? load(a.weight + i, part) : splat(1.0f);
    Vec dw = {}, db = {};
    for (int r = 0; r < kRows; ++r) {
      const Vec g = load(dy[r] + i, part);
      const Vec x_hat = (load(x[r] + i, part) - centre[r]) * rstd[r];
      put<kStreamed>(dx[r] + i, (g * weight - mean_wdy[r] - x_hat * correlation[r]) * rstd[r], part);
      dw += g * x_hat;
      db += g;
    }
    store(dweight + i, load(dweight + i, part) + dw, part);
    if constexpr (kCentre) store(dbias + i, load(dbias + i, part) + db, part);
  });
}

template <class T, bool kCentre, bool kStreamed>
void norm_bwd_chunks(const NormBwd& a, int64_t begin, int64_t end) {
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    float* dweight = a.partial_weight + chunk * a.cols;
    float* dbias = kCentre ? a.partial_bias + chunk * a.cols : nullptr;
    memset(dweight, 0, a.cols * sizeof(float));
    if (dbias) memset(dbias, 0, a.cols * sizeof(float));
    int64_t row = chunk * a.rows_per_chunk;
    const int64_t last = row + a.rows_per_chunk < a.rows ? row + a.rows_per_chunk : a.rows;
    for (; row + 4 <= last; row += 4) norm_bwd_rows<T, kCentre, kStreamed, 4>(a, row, dweight, dbias);
    for (; row < last; ++row) norm_bwd_rows<T, kCentre, kStreamed, 1>(a, row, dweight, dbias);
  }
  if (kStreamed) finish_streaming();
}

template <class T, bool kCentre>
void norm_bwd(const NormBwd& a, int64_t begin, int64_t end) {
  streams<T>(a.dx, a.rows, a.cols) ? norm_bwd_chunks<T, kCentre, true>(a, begin, end)
                                   : norm_bwd_chunks<T, kCentre, false>(a, begin, end);
}

}  // namespace llmfast::cpu::LLMFAST_VARIANT
