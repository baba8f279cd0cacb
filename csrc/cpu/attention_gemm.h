// Matrix products for attention, on blocks that the caches hold, and the packing of their operands.
//
// Operands are made of 4-byte words. A word is a float, or where the instruction set multiplies pairs of bfloat16
// (kDot), two of them that are adjacent in the dimension that is summed over.
#pragma once
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "attention_args.h"
#include "vec.h"

namespace llmfast::cpu::LLMFAST_VARIANT {

// Rows and vectors of a tile that registers hold: 32 of them, or 16.
#if defined(__AVX512F__)
constexpr int kTileRows = 4, kTileVecs = 4;
#elif defined(__AVX2__)
constexpr int kTileRows = 6, kTileVecs = 2;
#elif defined(__aarch64__)
constexpr int kTileRows = 6, kTileVecs = 4;
#else
constexpr int kTileRows = 4, kTileVecs = 2;
#endif
constexpr int64_t kPanel = kTileVecs * W;
static_assert(kQueryBlock % kPanel == 0 && kKeyBlock % kTileRows == 0 && kKeyBlock % 2 == 0);

#if defined(__AVX512BF16__)
typedef uint16_t HalfPairs __attribute__((vector_size(W * 4)));
#endif

template <class T>
#if defined(__AVX512BF16__)
constexpr bool kDot = sizeof(T) == 2;
#else
constexpr bool kDot = false;
#endif

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

template <bool kPairs>
inline Vec multiply_add(Vec c, const float* a, Vec b) {
#if defined(__AVX512BF16__)
  if constexpr (kPairs) {
    int32_t word;
    memcpy(&word, a, sizeof word);
    return (Vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32(word), (__m512bh)b);
  }
#endif
  return c + splat(*a) * b;
}

// What a product is added to: nothing, or c times `alpha` by columns (1 if null).
struct Into {
  bool add;
  const float* alpha;
};

// c[m][n] (+)= sum over k of a[m][k] b[k][n] for kTileRows rows and kVecs vectors of columns. `a` is stored by rows, or
// by columns (kColumns).
template <bool kPairs, bool kColumns, int kVecs>
inline void tile(int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
                 Into into) {
  Vec acc[kTileRows][kVecs];
#pragma GCC unroll 8
  for (int m = 0; m < kTileRows; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < kVecs; ++n) {
      acc[m][n] = into.add ? load(c + m * ldc + n * W) : Vec{};
      if (into.alpha) acc[m][n] *= load(into.alpha + n * W);
    }
  for (int64_t i = 0; i < k; ++i) {
    Vec row[kVecs];
#pragma GCC unroll 8
    for (int n = 0; n < kVecs; ++n) row[n] = load(b + i * ldb + n * W);
#pragma GCC unroll 8
    for (int m = 0; m < kTileRows; ++m)
#pragma GCC unroll 8
      for (int n = 0; n < kVecs; ++n)
        acc[m][n] = multiply_add<kPairs>(acc[m][n], kColumns ? a + i * lda + m : a + m * lda + i, row[n]);
  }
#pragma GCC unroll 8
  for (int m = 0; m < kTileRows; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < kVecs; ++n) store(c + m * ldc + n * W, acc[m][n]);
}

// As tile, for any number of rows, which is rounded up to full tiles.
template <bool kPairs, bool kColumns, int kVecs>
void multiply_panel(int64_t rows, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                    int64_t ldc, Into into) {
  for (int64_t m = 0; m < rows; m += kTileRows)
    tile<kPairs, kColumns, kVecs>(k, kColumns ? a + m : a + m * lda, lda, b, ldb, c + m * ldc, ldc, into);
}

// And for any number of columns, which is rounded up to full vectors.
template <bool kPairs, bool kColumns>
void multiply(int64_t rows, int64_t cols, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
              int64_t ldc, Into into) {
  int64_t n = 0;
  for (; n + kPanel <= round_up(cols, W); n += kPanel)
    multiply_panel<kPairs, kColumns, kTileVecs>(rows, k, a, lda, b + n, ldb, c + n, ldc, into);
  for (; n + 2 * W <= round_up(cols, W); n += 2 * W)
    multiply_panel<kPairs, kColumns, 2>(rows, k, a, lda, b + n, ldb, c + n, ldc, into);
  if (n < cols) multiply_panel<kPairs, kColumns, 1>(rows, k, a, lda, b + n, ldb, c + n, ldc, into);
}

// Words that hold n adjacent elements, in full vectors.
template <class T>
constexpr int64_t words(int64_t n) {
  return round_up(kDot<T> ? (n + 1) / 2 : n, W);
}

// row(r), r < n, of head_dim elements, as words. Beyond them: zeros, up to `padded` rows of `ld` words.
template <class T, class Row>
void pack_rows(int64_t n, int64_t padded, int64_t head_dim, Row row, float* out, int64_t ld) {
  for (int64_t r = 0; r < n; ++r, out += ld) {
    const T* x = row(r);
    if constexpr (kDot<T> || sizeof(T) == 4) {
      memcpy(out, x, head_dim * sizeof(T));
      memset(reinterpret_cast<char*>(out) + head_dim * sizeof(T), 0, ld * 4 - head_dim * sizeof(T));
    } else {
      sweep(head_dim, [&](int64_t i, auto part) { store(out + i, load(x + i, part)); });
      memset(out + round_up(head_dim, W), 0, (ld - round_up(head_dim, W)) * 4);
    }
  }
  memset(out, 0, (padded - n) * ld * 4);
}

// Turns the signs of n words that pack_rows has made.
template <class T>
inline void negate(int64_t n, float* rows) {
  const int32_t signs = int32_t(kDot<T> ? 0x80008000 : 0x80000000);
  for (int64_t i = 0; i < n; i += W) store(rows + i, (Vec)(bits(load(rows + i)) ^ signs));
}

#if defined(__AVX512BF16__)
// Two vectors of floats as one of bfloat16 pairs, or as rows of bfloat16.
inline Vec pair(Vec first, Vec second) {
  const HalfPairs order = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                           8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  return (Vec)_mm512_permutexvar_epi16((__m512i)order, both);
}
inline void store_pair(BFloat16* first_row, BFloat16* second_row, Vec first, Vec second) {
  const __m256i half = (__m256i)_mm512_cvtneps_pbh((__m512)first), half2 = (__m256i)_mm512_cvtneps_pbh((__m512)second);
  memcpy(first_row, &half, sizeof half);
  memcpy(second_row, &half2, sizeof half2);
}
#else
inline Vec pair(Vec, Vec) { abort(); }  // kDot is false
inline void store_pair(BFloat16*, BFloat16*, Vec, Vec) { abort(); }
#endif

// Packed rows of bfloat16 pairs -> words of two rows below each other: out[r / 2][i] = (in[r][i], in[r + 1][i]).
inline void pair_rows(int64_t rows, const float* in, int64_t ld, float* out, int64_t ld_out) {
  for (int64_t r = 0; r < rows; r += 2, out += ld_out) {
    const BFloat16* first = reinterpret_cast<const BFloat16*>(in + r * ld);
    const BFloat16* second = reinterpret_cast<const BFloat16*>(in + (r + 1) * ld);
    for (int64_t i = 0; i < ld_out; i += W)
      store(out + i, (Vec)(((UintVec)load(first + i) >> 16) | (UintVec)load(second + i)));
  }
}

// Lanes of a and b in turn: from their first halves, or from their second halves.
inline Vec interleave_low(Vec a, Vec b) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#elif defined(__AVX2__)
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#else
  return __builtin_shufflevector(a, b, 0, 4, 1, 5);
#endif
}
inline Vec interleave_high(Vec a, Vec b) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(__AVX2__)
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  return __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
}

// out[c][r] = in[r][c] for W rows and W columns of words: log2(W) rounds of perfect shuffles.
inline void transpose_square(const float* in, int64_t ld, float* out, int64_t ld_out) {
  Vec v[W], u[W];
#pragma GCC unroll 16
  for (int r = 0; r < W; ++r) v[r] = load(in + r * ld);
#pragma GCC unroll 4
  for (int round = 1; round < W; round *= 2) {
#pragma GCC unroll 8
    for (int r = 0; r < W / 2; ++r) {
      u[2 * r] = interleave_low(v[r], v[r + W / 2]);
      u[2 * r + 1] = interleave_high(v[r], v[r + W / 2]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < W; ++r) v[r] = u[r];
  }
#pragma GCC unroll 16
  for (int r = 0; r < W; ++r) store(out + r * ld_out, v[r]);
}
inline void transpose(int64_t rows, int64_t cols, const float* in, int64_t ld, float* out, int64_t ld_out) {
  for (int64_t r = 0; r < rows; r += W)
    for (int64_t c = 0; c < cols; c += W) transpose_square(in + r * ld + c, ld, out + c * ld_out + r, ld_out);
}

// 2^(x factor) for x <= 0, to about one unit in the last place, with `floor` = exp2_floor(factor) at or below which it
// is 0. One multiplication does the scaling of scores and the change of base, and its rounding does not count.
inline float exp2_floor(float factor) { return factor > 1e-30f ? -127.0f / factor : -1e32f; }
inline Vec exp2_scaled(Vec x, Vec factor, Vec floor) {
  x = max(floor, x);                                // a NaN stays
  const Vec shifter = splat(12582912.0f + 127.0f);  // 1.5 * 2^23 rounds to an integer; with 127 its low bits are 2^n's
  const Vec shifted = x * factor + shifter;
  const Vec n = shifted - shifter;
  const Vec r = x * factor - n;
  Vec p = splat(1.534581242594868e-4f);  // fitted to |r| <= 1/2
  p = p * r + 1.3399930903688073e-3f;
  p = p * r + 9.618489071726799e-3f;
  p = p * r + 5.550328642129898e-2f;
  p = p * r + 2.4022646248340607e-1f;
  p = p * r + 6.931471824645996e-1f;
  p = p * r + 1.0f;
  return p * (Vec)(bits(shifted) << 23);
}

}  // namespace llmfast::cpu::LLMFAST_VARIANT
