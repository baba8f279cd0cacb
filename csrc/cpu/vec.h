// A vector of floats as wide as the instruction set that is being compiled for, and the functions the kernels need.
//
// Plain GCC and Clang vector extensions, so that NEON and any other target take the same path.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "kernels.h"

namespace llmfast::cpu::LLMFAST_VARIANT {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float Vec __attribute__((vector_size(W * 4)));
typedef int32_t IntVec __attribute__((vector_size(W * 4)));
typedef uint32_t UintVec __attribute__((vector_size(W * 4)));
typedef uint16_t HalfVec __attribute__((vector_size(W * 2)));

inline Vec splat(float value) { return value - Vec{}; }
inline IntVec bits(Vec v) { return (IntVec)v; }
// a > b ? a : b and a < b ? a : b, so of a NaN in a: b. Of these lines GCC 12 makes a comparison and a blend.
#if defined(__AVX512F__)
inline Vec max(Vec a, Vec b) { return (Vec)_mm512_max_ps((__m512)a, (__m512)b); }
inline Vec min(Vec a, Vec b) { return (Vec)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
inline Vec max(Vec a, Vec b) { return (Vec)_mm256_max_ps((__m256)a, (__m256)b); }
inline Vec min(Vec a, Vec b) { return (Vec)_mm256_min_ps((__m256)a, (__m256)b); }
#else
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }
#endif

inline Vec load(const float* p) {
  Vec v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Vec v) { memcpy(p, &v, sizeof v); }

inline Vec load(const BFloat16* p) {
  HalfVec half;
  memcpy(&half, p, sizeof half);
#if defined(__AVX512F__)  // GCC 12 makes two conversions and a merge of the portable line
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)half), 16);
#elif defined(__AVX2__)
  return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)half), 16);
#else
  return (Vec)(__builtin_convertvector(half, UintVec) << 16);
#endif
}
// Rounds to nearest, ties to even; a NaN stays one.
inline HalfVec round_to_bfloat16(Vec v) {
  const UintVec b = (UintVec)v;
  UintVec rounded = b + 0x7fff + ((b >> 16) & 1);
  rounded = v == v ? rounded : (b | 0x400000);
  return __builtin_convertvector(rounded >> 16, HalfVec);
}
inline void store(BFloat16* p, Vec v) {
  const HalfVec half = round_to_bfloat16(v);
  memcpy(p, &half, sizeof half);
}

// How many elements of a vector are there: all W, or the last n < W of a row.
struct Full {};
struct Part {
  int64_t n;
};
template <class T>
inline Vec load(const T* p, Full) {
  return load(p);
}
template <class T>
inline Vec load(const T* p, Part part, float other = 0.0f) {
  float lanes[W];
  for (int i = 0; i < W; ++i) lanes[i] = i < part.n ? to_float(p[i]) : other;
  return load(lanes);
}
template <class T>
inline void store(T* p, Vec v, Full) {
  store(p, v);
}
template <class T>
inline void store(T* p, Vec v, Part part) {
  T lanes[W];
  store(lanes, v);
  memcpy(p, lanes, part.n * sizeof(T));
}
// Stores past the caches, for results too large to be found there again: the memory they go to is not read first.
template <bool kStreamed, class T>
inline void put(T* p, Vec v, Full) {
#if defined(__AVX512F__)
  if constexpr (kStreamed && sizeof(T) == 4) return _mm512_stream_ps(reinterpret_cast<float*>(p), (__m512)v);
  if constexpr (kStreamed && sizeof(T) == 2)
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)round_to_bfloat16(v));
#elif defined(__AVX2__)
  if constexpr (kStreamed && sizeof(T) == 4) return _mm256_stream_ps(reinterpret_cast<float*>(p), (__m256)v);
#endif
  store(p, v);
}
template <bool kStreamed, class T>
inline void put(T* p, Vec v, Part part) {
  store(p, v, part);
}
// Whether rows of the result may be streamed: all of it is large, and every vector in it aligned.
template <class T>
inline bool streams(const void* p, int64_t rows, int64_t cols) {
  constexpr int64_t kLarge = 8 << 20;
  return rows * cols * int64_t(sizeof(T)) >= kLarge && (reinterpret_cast<uintptr_t>(p) | (cols * sizeof(T))) % 64 == 0;
}
inline void finish_streaming() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

inline Vec keep(Vec v, Full) { return v; }
inline Vec keep(Vec v, Part part) {
  float lanes[W];
  store(lanes, v);
  for (int64_t i = part.n; i < W; ++i) lanes[i] = 0.0f;
  return load(lanes);
}

// f(i, Full or Part) for every vector of a row of n elements.
template <class F>
inline void sweep(int64_t n, F f) {
  int64_t i = 0;
  for (; i + W <= n; i += W) f(i, Full{});
  if (i < n) f(i, Part{n - i});
}

// Lane i of the result is lane i ^ distance of v.
template <int distance>
inline Vec swap_lanes(Vec v) {
#if defined(__clang__)
  Vec swapped;
  for (int i = 0; i < W; ++i) swapped[i] = v[i ^ distance];
  return swapped;
#else
  IntVec from;
  for (int i = 0; i < W; ++i) from[i] = i ^ distance;
  return __builtin_shuffle(v, from);
#endif
}
inline float sum(Vec v) {
  if constexpr (W > 8) v += swap_lanes<8>(v);
  if constexpr (W > 4) v += swap_lanes<4>(v);
  v += swap_lanes<2>(v);
  v += swap_lanes<1>(v);
  return v[0];
}
inline float max(Vec v) {
  if constexpr (W > 8) v = max(v, swap_lanes<8>(v));
  if constexpr (W > 4) v = max(v, swap_lanes<4>(v));
  v = max(v, swap_lanes<2>(v));
  v = max(v, swap_lanes<1>(v));
  return v[0];
}

// Elements whose sum is one chain of additions; longer rows are sums of such sums, which round less.
constexpr int64_t kChain = 2048;

// The sum over a row of f(i, Full or Part).
template <class F>
inline float reduce_sum(int64_t n, F f) {
  float total = 0.0f;
  for (int64_t start = 0; start < n; start += kChain) {
    const int64_t end = start + kChain < n ? start + kChain : n;
    Vec a = {}, b = {}, c = {}, d = {};  // independent, as an addition takes several cycles
    int64_t i = start;
    for (; i + 4 * W <= end; i += 4 * W) {
      a += f(i, Full{});
      b += f(i + W, Full{});
      c += f(i + 2 * W, Full{});
      d += f(i + 3 * W, Full{});
    }
    for (; i + W <= end; i += W) a += f(i, Full{});
    if (i < end) b += keep(f(i, Part{end - i}), Part{end - i});
    total += sum((a + b) + (c + d));
  }
  return total;
}

// Two sums over a row in one pass: f(i, Full or Part, first, second) adds to both, and adds nothing past the end.
struct Sums {
  float first = 0.0f, second = 0.0f;
};
template <class F>
inline Sums reduce_two(int64_t n, F f) {
  Sums sums;
  for (int64_t start = 0; start < n; start += kChain) {
    const int64_t end = start + kChain < n ? start + kChain : n;
    Vec a = {}, b = {}, c = {}, d = {};
    int64_t i = start;
    for (; i + 2 * W <= end; i += 2 * W) {
      f(i, Full{}, a, b);
      f(i + W, Full{}, c, d);
    }
    for (; i + W <= end; i += W) f(i, Full{}, a, b);
    if (i < end) f(i, Part{end - i}, c, d);
    sums.first += sum(a + c);
    sums.second += sum(b + d);
  }
  return sums;
}

template <class T>
inline float reduce_max(const T* row, int64_t n) {
  Vec a = splat(-INFINITY), b = a;
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    a = max(a, load(row + i));
    b = max(b, load(row + i + W));
  }
  for (; i + W <= n; i += W) a = max(a, load(row + i));
  if (i < n) b = max(b, load(row + i, Part{n - i}, -INFINITY));
  return max(max(a, b));
}

// 2^n for integers n from -150 to 128, times v. In two factors, as a float's own exponents end at -126 and 127.
inline Vec times_power_of_two(Vec v, Vec n, IntVec integer) {
#if defined(__AVX512F__)
  (void)integer;
  return (Vec)_mm512_scalef_ps((__m512)v, (__m512)n);
#else
  (void)n;
  const IntVec half = integer >> 1;
  return v * (Vec)((half + 127) << 23) * (Vec)((integer - half + 127) << 23);
#endif
}

// e^x to about one unit in the last place: x = n ln 2 + r (Cody and Waite, Software Manual for the Elementary
// Functions, 1980), e^r by a polynomial fitted to |r| <= ln 2 / 2. Below -104 gives 0, above 88.7 infinity.
inline Vec exp(Vec x) {
  x = min(splat(89.0f), max(splat(-104.0f), x));  // in this order of arguments a NaN stays one
  const Vec shifter = splat(12582912.0f);         // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const Vec shifted = x * 1.44269504f + shifter;
  const Vec n = shifted - shifter;
  const Vec r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec q = splat(0.00139505998f);
  q = q * r + 0.00836895406f;
  q = q * r + 0.0416662060f;
  q = q * r + 0.166665182f;
  q = q * r + 0.5f;
  return times_power_of_two(q * r * r + r + 1.0f, n, bits(shifted) - bits(shifter));
}

// erf(x / sqrt 2) as x P(x^2) / Q(x^2), fitted here to where it rounds to 1: within 4e-7, as PyTorch's own is on a CPU.
// From there on it is 1 exactly: x times what is left of it would be anything but 0 where x is large.
inline Vec erf_of_root_half(Vec x) {
  const Vec t = min(splat(32.0f), x * x);  // in this order of arguments a NaN stays one
  Vec p = splat(4.38993979e-8f), q = splat(1.16931562e-6f);
  p = p * t + 1.25755168e-5f;
  q = q * t + 7.40946343e-5f;
  p = p * t + 3.43229069e-4f;
  q = q * t + 1.90086942e-3f;
  p = p * t + 9.38706100e-3f;
  q = q * t + 2.88372468e-2f;
  p = p * t + 6.84278458e-2f;
  q = q * t + 2.52427876e-1f;
  p = p * t + 7.97884524e-1f;
  q = q * t + 1.0f;
  return min(splat(1.0f), max(splat(-1.0f), x * p / q));
}

inline Vec sigmoid(Vec x) { return 1.0f / (1.0f + exp(-x)); }

inline Vec square_root(Vec v) {
  float lanes[W];
  store(lanes, v);
  for (int i = 0; i < W; ++i) lanes[i] = __builtin_sqrtf(lanes[i]);
  return load(lanes);
}

// Memory for one call of a kernel.
class Scratch {
 public:
  explicit Scratch(int64_t n) : data_(static_cast<float*>(malloc(n * sizeof(float)))) {
    if (!data_) abort();
  }
  ~Scratch() { free(data_); }
  Scratch(const Scratch&) = delete;
  float* data() const { return data_; }

 private:
  float* data_;
};

}  // namespace llmfast::cpu::LLMFAST_VARIANT
