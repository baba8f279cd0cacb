// Every kernel but attention's for one instruction set. Compiled once for each, with LLMFAST_VARIANT naming it and the
// compiler's flags choosing it. Kernels call nothing from outside but C's memcpy, memset, malloc and logf: an inline
// function of a C++ header, compiled for AVX-512 here, could be the copy that the linker keeps for all, and crash an
// older CPU.
#include "activation.h"
#include "adamw.h"
#include "cross_entropy.h"
#include "norm.h"
#include "rope.h"
#include "softmax.h"

#define BY_DTYPE(function)                \
  {                                       \
    {                                     \
      function<float>, function<BFloat16> \
    }                                     \
  }

namespace llmfast::cpu::LLMFAST_VARIANT {

template <class T>
constexpr Kernel<NormFwd> layer_norm_fwd = norm_fwd<T, true>;
template <class T>
constexpr Kernel<NormFwd> rms_norm_fwd = norm_fwd<T, false>;
template <class T>
constexpr Kernel<NormBwd> layer_norm_bwd = norm_bwd<T, true>;
template <class T>
constexpr Kernel<NormBwd> rms_norm_bwd = norm_bwd<T, false>;

extern const Kernels table = {
    BY_DTYPE(softmax_fwd),
    BY_DTYPE(softmax_bwd),
    BY_DTYPE(layer_norm_fwd),
    BY_DTYPE(rms_norm_fwd),
    BY_DTYPE(layer_norm_bwd),
    BY_DTYPE(rms_norm_bwd),
    BY_DTYPE(gelu_fwd),
    BY_DTYPE(gelu_bwd),
    BY_DTYPE(swiglu_fwd),
    BY_DTYPE(swiglu_bwd),
    BY_DTYPE(rope),
    BY_DTYPE(cross_entropy_fwd),
    BY_DTYPE(cross_entropy_bwd),
    adamw,
    column_sum,
};

}  // namespace llmfast::cpu::LLMFAST_VARIANT
