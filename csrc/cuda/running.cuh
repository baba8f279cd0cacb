// A maximum and the sum of exponentials below it, as softmax and cross entropy keep them while they read a row once
// (online softmax, https://arxiv.org/abs/1805.02867).
#pragma once

#include "row_direct.cuh"

namespace llmfast::cuda {

template <class T>
__device__ float packed_max(const uint4& v) {
  const uint32_t word[4] = {v.x, v.y, v.z, v.w};
  if constexpr (kExact<T>) {
    return fmaxf(fmaxf(__uint_as_float(v.x), __uint_as_float(v.y)), fmaxf(__uint_as_float(v.z), __uint_as_float(v.w)));
  } else {
    using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
    const Pair* pair = reinterpret_cast<const Pair*>(word);
    const Pair most = __hmax2(__hmax2(pair[0], pair[1]), __hmax2(pair[2], pair[3]));  // drops NaN, as fmaxf
    return fmaxf(to_float(most.x), to_float(most.y));
  }
}

// Of 16-bit types the exponents are kept in base 2, so that each needs one multiply-add; the maximum is then that of
// the logits times log2(e), rounded, and the exact difference from that: no digits are lost where logits are large.
template <class T>
struct Running {
  static constexpr float kUnit = kExact<T> ? 1.0f : kLog2E;
  float largest = Max::identity, sum = 0.0f;  // +inf and NaN make the sum NaN; nothing but -inf seen: 0

  __device__ static float power(float exponent) {
    if constexpr (kExact<T>) return expf(exponent);
    return exp2_approx(exponent);
  }

  // Raises the maximum to at least x. Returns what exponents are to be taken from.
  __device__ float raise(float x) {
    const float larger = fmaxf(largest, x * kUnit);
    const float base = larger == Max::identity ? 0.0f : larger;  // -inf - -inf would be NaN
    if (sum != 0.0f) sum *= power(largest - base);
    largest = larger;
    return base;
  }

  __device__ void add(float x) {
    const float base = raise(x);
    sum += power(fmaf(x, kUnit, -base));
  }

  template <int K>
  __device__ void add(const uint4 (&raw)[K]) {
    constexpr int n = kPerVector<T>;
    float most = packed_max<T>(raw[0]);
#pragma unroll
    for (int k = 1; k < K; ++k) most = fmaxf(most, packed_max<T>(raw[k]));
    const float base = raise(most);
    float added[4] = {};  // shorter chains round less, and wait less
#pragma unroll
    for (int k = 0; k < K; ++k) {
      float x[n];
      unpack<T>(raw[k], x);
#pragma unroll
      for (int j = 0; j < n; ++j) added[j % 4] += power(fmaf(x[j], kUnit, -base));
    }
    sum += (added[0] + added[1]) + (added[2] + added[3]);
  }

  // To be that of all of the warp, or of each kLanes lanes.
  template <int kLanes = 32>
  __device__ void reduce() {
    const float all = warp_reduce<Max, kLanes>(largest);
    sum = warp_reduce<Add, kLanes>(sum == 0.0f ? 0.0f : sum * power(largest - all));
    largest = all;
  }

  __device__ float4 part() const { return make_float4(largest, sum, 0.0f, 0.0f); }

  // The whole of n <= kMost parts.
  template <int kMost>
  __device__ static Running combine(const float4* parts, int n) {
    const int lane = threadIdx.x % kMost;
    Running r;
    if (lane < n) {
      r.largest = parts[lane].x;
      r.sum = parts[lane].y;
    }
    r.template reduce<kMost>();
    return r;
  }
};

// e^x over the sum, for many x. A row with +inf, NaN or nothing but -inf becomes NaN by itself: a NaN sum, or
// -inf - -inf.
template <class T>
struct Normalizer {
  float largest, scale;

  __device__ explicit Normalizer(const Running<T>& r)
      : largest(r.largest), scale(kExact<T> ? r.sum : log2_approx(r.sum)) {}

  __device__ float operator()(float x) const {
    if constexpr (kExact<T>) return expf(x - largest) / scale;
    return exp2_approx(fmaf(x, kLog2E, -largest) - scale);
  }
};

}  // namespace llmfast::cuda
