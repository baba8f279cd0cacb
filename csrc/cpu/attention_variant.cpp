// Attention's kernels for one instruction set; see variant.cpp for how it is compiled and what it must not call.
#include "attention.h"
#include "attention_bwd.h"
#include "attention_decode.h"

namespace llmfast::cpu::LLMFAST_VARIANT {

template <class T>
constexpr AttentionKernels table_of = {attention_fwd<T>, attention_bwd<T>, attention_bwd_combine<T>,
                                       attention_decode<T>, attention_combine<T>};

#if !defined(__AVX512BF16__)  // which float32 has no use for
extern const AttentionKernels attention_float32 = table_of<float>;
#endif
extern const AttentionKernels attention_bfloat16 = table_of<BFloat16>;

}  // namespace llmfast::cpu::LLMFAST_VARIANT
