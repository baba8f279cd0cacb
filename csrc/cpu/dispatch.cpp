// Which instruction set's table of kernels runs.
#include <cstring>

#include "kernels.h"

namespace llmfast::cpu {

#define LLMFAST_DECLARE(name)   \
  namespace name {              \
  extern const Kernels table;   \
  }

LLMFAST_DECLARE(baseline)
#if defined(__x86_64__)
LLMFAST_DECLARE(avx2)
LLMFAST_DECLARE(avx512)
LLMFAST_DECLARE(avx512_bf16)
static const Kernels* const kTables[] = {&baseline::table, &avx2::table, &avx512::table, &avx512_bf16::table};
#else  // NEON is the baseline of 64-bit Arm
static const Kernels* const kTables[] = {&baseline::table};
#endif

static bool runs_here(const Kernels& table) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!strcmp(table.name, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512cd");
  if (!strcmp(table.name, "avx512")) return avx512;
  if (!strcmp(table.name, "avx512_bf16")) return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  return !strcmp(table.name, "baseline");
}

static const Kernels* best() {
  const Kernels* chosen = kTables[0];
  for (const Kernels* table : kTables)
    if (runs_here(*table)) chosen = table;
  return chosen;
}

static const Kernels* selected = best();

const Kernels& kernels() { return *selected; }

bool select_variant(const char* name) {
  for (const Kernels* table : kTables) {
    if (!strcmp(table->name, name) && runs_here(*table)) {
      selected = table;
      return true;
    }
  }
  return false;
}

}  // namespace llmfast::cpu
