// Attention's kernels for one instruction set; see variant.cpp for how it is compiled and what it must not call.
#include "attention.h"
#include "attention_bwd.h"
#include "attention_decode.h"

#define BY_DTYPE(function)                \
  {                                       \
    {                                     \
      function<float>, function<BFloat16> \
    }                                     \
  }

namespace llmfast::cpu::LLMFAST_VARIANT {

extern const AttentionKernels attention_table = {
    BY_DTYPE(attention_fwd),    BY_DTYPE(attention_bwd),     BY_DTYPE(attention_bwd_combine),
    BY_DTYPE(attention_decode), BY_DTYPE(attention_combine),
};

}  // namespace llmfast::cpu::LLMFAST_VARIANT
