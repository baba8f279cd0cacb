// Which instruction set's kernels run.
#include <cstring>

#include "kernels.h"

namespace llmfast::cpu {
namespace {

struct Variant {
  const char* name;
  const Kernels* kernels;
  const AttentionKernels* attention[2];
};

}  // namespace

#define LLMFAST_DECLARE(name)                                          \
  namespace name {                                                     \
  extern const Kernels table;                                          \
  extern const AttentionKernels attention_float32, attention_bfloat16; \
  }

// The slowest first.
LLMFAST_DECLARE(baseline)
#if defined(__x86_64__)
LLMFAST_DECLARE(avx2)
LLMFAST_DECLARE(avx512)
LLMFAST_DECLARE(avx512_bf16)
static const Variant kVariants[] = {
    {"baseline", &baseline::table, {&baseline::attention_float32, &baseline::attention_bfloat16}},
    {"avx2", &avx2::table, {&avx2::attention_float32, &avx2::attention_bfloat16}},
    {"avx512", &avx512::table, {&avx512::attention_float32, &avx512::attention_bfloat16}},
    // Only matrix products have bfloat16 instructions.
    {"avx512_bf16", &avx512::table, {&avx512::attention_float32, &avx512_bf16::attention_bfloat16}},
};
#else  // NEON is the baseline of 64-bit Arm
static const Variant kVariants[] = {
    {"baseline", &baseline::table, {&baseline::attention_float32, &baseline::attention_bfloat16}}};
#endif

static bool runs_here(const char* name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!strcmp(name, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512cd");
  if (!strcmp(name, "avx512")) return avx512;
  if (!strcmp(name, "avx512_bf16")) return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  return !strcmp(name, "baseline");
}

static const Variant* best() {
  const Variant* chosen = kVariants;
  for (const Variant& variant : kVariants)
    if (runs_here(variant.name)) chosen = &variant;
  return chosen;
}

static const Variant* selected = best();

const Kernels& kernels() { return *selected->kernels; }
const AttentionKernels& attention_kernels(int dtype) { return *selected->attention[dtype]; }
const char* variant_name() { return selected->name; }

bool select_variant(const char* name) {
  for (const Variant& variant : kVariants) {
    if (!strcmp(variant.name, name) && runs_here(name)) {
      selected = &variant;
      return true;
    }
  }
  return false;
}

}  // namespace llmfast::cpu
