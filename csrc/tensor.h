// Tensors as the bindings see them: an owning handle, checked views of it, and the adapter between libtorch's stack of
// values and plain C++ functions.
//
// An argument that does not fit raises std::runtime_error naming the op, the argument and its value, which libtorch
// turns into Python's RuntimeError.
#pragma once
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "torch_abi.h"

namespace llmfast {

inline void check(int32_t error, const char* call) {
  if (error != 0) throw std::runtime_error(std::string("libtorch refused ") + call);
}
#define LLMFAST_TORCH(call) ::llmfast::check(call, #call)

enum class DType { kFloat32, kBFloat16, kFloat16, kInt64, kOther };

class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(AtenTensorOpaque* handle) : handle_(handle) {}
  Tensor(Tensor&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Tensor() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }

  explicit operator bool() const {
    bool defined = false;
    return handle_ && aoti_torch_is_defined(handle_, &defined) == 0 && defined;
  }
  void* data() const {
    void* result = nullptr;
    LLMFAST_TORCH(aoti_torch_get_data_ptr(handle_, &result));
    return result;
  }
  template <class T>
  T* data() const {
    return static_cast<T*>(data());
  }
  int64_t numel() const { return get<int64_t>(aoti_torch_get_numel); }
  int64_t dim() const { return get<int64_t>(aoti_torch_get_dim); }
  const int64_t* sizes() const { return get<int64_t*>(aoti_torch_get_sizes); }
  const int64_t* strides() const { return get<int64_t*>(aoti_torch_get_strides); }
  int32_t device_type() const { return get<int32_t>(aoti_torch_get_device_type); }
  int32_t device_index() const { return get<int32_t>(aoti_torch_get_device_index); }
  bool strided() const { return get<int32_t>(aoti_torch_get_layout) == aoti_torch_layout_strided(); }
  int32_t dtype_code() const { return get<int32_t>(aoti_torch_get_dtype); }
  DType dtype() const {
    // libtorch's own numbers, asked for once: a call costs more than the comparison.
    static const int32_t float32 = aoti_torch_dtype_float32(), bfloat16 = aoti_torch_dtype_bfloat16();
    static const int32_t float16 = aoti_torch_dtype_float16(), int64 = aoti_torch_dtype_int64();
    const int32_t code = dtype_code();
    if (code == float32) return DType::kFloat32;
    if (code == bfloat16) return DType::kBFloat16;
    return code == float16 ? DType::kFloat16 : code == int64 ? DType::kInt64 : DType::kOther;
  }
  AtenTensorOpaque* release() { return std::exchange(handle_, nullptr); }

 private:
  template <class R, class F>
  R get(F function) const {
    R result{};
    LLMFAST_TORCH(function(handle_, &result));
    return result;
  }
  AtenTensorOpaque* handle_ = nullptr;
};

inline std::string shape_text(const Tensor& t) {
  std::string text = "(";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.sizes()[i]);
  return text + ")";
}

// One argument of one op, for messages.
struct Argument {
  const char *op, *name;
  const Tensor& tensor;

  [[noreturn]] void refuse(const std::string& why) const {
    throw std::runtime_error(std::string(op) + ": " + name + " " + why);
  }
  void require(bool condition, const char* why) const {
    if (!condition) refuse(why);
  }
};

// x as rows of `cols` adjacent elements, `stride` apart.
struct Rows {
  char* data;
  int64_t rows, cols, stride;
};

// Refuses anything but a dense tensor on the device of the op, with one of the dtypes.
inline DType check_tensor(const Argument& a, std::initializer_list<DType> dtypes, int32_t device_type) {
  a.require(bool(a.tensor), "is not a tensor");
  a.require(a.tensor.strided(), "is a sparse tensor; it must be dense");
  a.require(a.tensor.device_type() == device_type, "is on another device than this kernel runs on; move it there");
  const DType dtype = a.tensor.dtype();
  for (const DType allowed : dtypes)
    if (dtype == allowed) return dtype;
  a.refuse("has a dtype that this kernel does not support here");
}

// The leading dimensions must collapse into one stride, and the last be adjacent.
inline Rows rows_of(const Argument& a) {
  const Tensor& t = a.tensor;
  const int64_t dim = t.dim(), *sizes = t.sizes(), *strides = t.strides();
  a.require(dim > 0 && sizes[dim - 1] > 0, "must have a last dimension of at least one element");
  Rows rows{t.data<char>(), t.numel() / sizes[dim - 1], sizes[dim - 1], sizes[dim - 1]};
  if (rows.rows == 0) return rows;
  a.require(sizes[dim - 1] == 1 || strides[dim - 1] == 1, "must have adjacent elements in its last dimension");
  int64_t expected = -1;  // the stride that the dimension before must have to continue the rows
  for (int64_t i = dim - 2; i >= 0; --i) {
    if (sizes[i] == 1) continue;
    if (expected < 0) rows.stride = strides[i];
    a.require(expected < 0 || strides[i] == expected, "has leading dimensions that do not form evenly spaced rows");
    expected = strides[i] * sizes[i];
  }
  return rows;
}

inline void check_same_shape(const Argument& a, const Argument& other) {
  bool same = a.tensor.dim() == other.tensor.dim();
  for (int64_t i = 0; same && i < a.tensor.dim(); ++i) same = a.tensor.sizes()[i] == other.tensor.sizes()[i];
  if (!same) a.refuse("has shape " + shape_text(a.tensor) + " but " + other.name + " " + shape_text(other.tensor));
}

// A contiguous vector of n elements.
inline void check_vector(const Argument& a, int64_t n) {
  const Tensor& t = a.tensor;
  if (t.dim() != 1 || t.sizes()[0] != n)
    a.refuse("has shape " + shape_text(t) + "; it must be (" + std::to_string(n) + ",)");
  a.require(n <= 1 || t.strides()[0] == 1, "must be contiguous");
}

inline void require_contiguous(const Argument& a) {
  const Tensor& t = a.tensor;
  int64_t expected = 1;
  for (int64_t i = t.dim() - 1; i >= 0; --i) {
    a.require(t.sizes()[i] <= 1 || t.strides()[i] == expected || t.numel() == 0, "must be contiguous");
    expected *= t.sizes()[i];
  }
}

// What cross-entropy's forward saves of each row, (2, rows), contiguous.
inline void check_statistics(const Argument& a, int64_t rows) {
  const Tensor& t = a.tensor;
  if (t.dim() != 2 || t.sizes()[0] != 2 || t.sizes()[1] != rows)
    a.refuse("has shape " + shape_text(t) + "; it must be (2, " + std::to_string(rows) + ")");
  require_contiguous(a);
}

inline Tensor empty(const int64_t* sizes, int64_t dim, int32_t dtype, const Tensor& like) {
  constexpr int64_t kMaxDim = 64;  // torch's own
  int64_t strides[kMaxDim], stride = 1;
  for (int64_t i = dim - 1; i >= 0; stride *= sizes[i] > 0 ? sizes[i] : 1, --i) strides[i] = stride;
  AtenTensorOpaque* handle = nullptr;
  LLMFAST_TORCH(aoti_torch_empty_strided(dim, sizes, strides, dtype, like.device_type(), like.device_index(), &handle));
  return Tensor(handle);
}
inline Tensor empty_float32(std::initializer_list<int64_t> sizes, const Tensor& like) {
  static const int32_t float32 = aoti_torch_dtype_float32();
  return empty(sizes.begin(), int64_t(sizes.size()), float32, like);
}
inline Tensor empty_like(const Tensor& t) { return empty(t.sizes(), t.dim(), t.dtype_code(), t); }

// From the stack: every tensor on it is the callee's to delete, and so is the box of an optional one.
template <class A>
struct Unpack;
template <>
struct Unpack<Tensor> {
  static Tensor from(StableIValue value) {
    AtenTensorOpaque* handle;
    std::memcpy(&handle, &value, sizeof handle);
    return Tensor(handle);
  }
};
struct Optional {
  Tensor tensor;
  explicit operator bool() const { return bool(tensor); }
};
template <>
struct Unpack<Optional> {
  static Optional from(StableIValue value) {
    StableIValue* box;
    std::memcpy(&box, &value, sizeof box);
    if (!box) return {};
    Optional result{Unpack<Tensor>::from(*box)};
    delete box;
    return result;
  }
};
template <>
struct Unpack<double> {
  static double from(StableIValue value) {
    double result;
    std::memcpy(&result, &value, sizeof result);
    return result;
  }
};
template <>
struct Unpack<int64_t> {
  static int64_t from(StableIValue value) { return int64_t(value); }
};
template <>
struct Unpack<bool> {
  static bool from(StableIValue value) { return (value & 0xff) != 0; }
};

inline void pack(StableIValue* stack, Tensor result) {
  AtenTensorOpaque* handle = result.release();
  stack[0] = 0;
  std::memcpy(stack, &handle, sizeof handle);
}
template <class... R>
void pack(StableIValue* stack, std::tuple<R...> results) {
  size_t i = 0;
  std::apply([&](auto&... result) { (pack(stack + i++, std::move(result)), ...); }, results);
}

template <auto kFunction>
struct Boxed;
template <class R, class... A, R (*kFunction)(A...)>
struct Boxed<kFunction> {
  static void call(StableIValue* stack, uint64_t, uint64_t) { run(stack, std::index_sequence_for<A...>{}); }

 private:
  template <size_t... I>
  static void run(StableIValue* stack, std::index_sequence<I...>) {
    // Braces: unpacked in order, and all of them owned before the first check can throw.
    std::tuple<std::decay_t<A>...> arguments{Unpack<std::decay_t<A>>::from(stack[I])...};
    if constexpr (std::is_void_v<R>)
      kFunction(std::get<I>(arguments)...);
    else
      pack(stack, kFunction(std::get<I>(arguments)...));
  }
};

struct Registration {
  const char* name;
  void (*function)(StableIValue*, uint64_t, uint64_t);
};
#define LLMFAST_EXPORT extern "C" __attribute__((visibility("default")))
#define LLMFAST_OP(function) {#function, &::llmfast::Boxed<&function>::call}

// Registers implementations for one dispatch key; the schemas are Python's (llmfast/native/schemas.py).
inline int32_t register_ops(const char* key, const std::vector<Registration>& ops) {
  TorchLibraryOpaque* library = nullptr;
  int32_t error = aoti_torch_library_init_impl("llmfast", key, "csrc/tensor.h", 0, &library);
  for (const Registration& op : ops)
    if (error == 0) error = torch_library_impl(library, op.name, op.function, kTorchAbiVersion);
  return error;
}

}  // namespace llmfast
