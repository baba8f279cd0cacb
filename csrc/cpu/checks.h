// What every binding of a CPU op checks first.
#pragma once
#include "../tensor.h"

namespace llmfast::cpu {

inline int index_of(DType dtype) { return dtype == DType::kBFloat16 ? 1 : 0; }

inline DType check_floats(const Argument& a) {
  return check_tensor(a, {DType::kFloat32, DType::kBFloat16}, aoti_torch_device_type_cpu());
}
inline void check_dtype(const Argument& a, DType dtype) { check_tensor(a, {dtype}, aoti_torch_device_type_cpu()); }

inline Rows rows_like(const Argument& a, const Argument& other, DType dtype) {
  check_dtype(a, dtype);
  check_same_shape(a, other);
  return rows_of(a);
}

}  // namespace llmfast::cpu
