// Our own declarations of the entry points that llmfast uses of libtorch's stable C ABI (torch >= 2.11).
//
// They make the build independent of torch: no headers of its version, no torch at build time, and one library that
// runs on every torch since. PyTorch keeps these functions at least two years after a release:
// https://docs.pytorch.org/docs/main/notes/libtorch_stable_abi.html. A test compiles this file beside torch's own
// headers, so that a declaration that has drifted is a compile error.
#pragma once
#include <stddef.h>
#include <stdint.h>

struct AtenTensorOpaque;
struct TorchLibraryOpaque;
struct DeviceGuardOpaque;
using StableIValue = uint64_t;

extern "C" {
int32_t aoti_torch_library_init_impl(const char* ns, const char* key, const char* file, uint32_t line,
                                     TorchLibraryOpaque** library);
int32_t torch_library_impl(TorchLibraryOpaque* library, const char* name,
                           void (*function)(StableIValue* stack, uint64_t arguments, uint64_t results),
                           uint64_t abi_version);

int32_t aoti_torch_get_data_ptr(AtenTensorOpaque* tensor, void** data);
int32_t aoti_torch_get_numel(AtenTensorOpaque* tensor, int64_t* numel);
int32_t aoti_torch_get_dim(AtenTensorOpaque* tensor, int64_t* dim);
int32_t aoti_torch_get_sizes(AtenTensorOpaque* tensor, int64_t** sizes);
int32_t aoti_torch_get_strides(AtenTensorOpaque* tensor, int64_t** strides);
int32_t aoti_torch_get_dtype(AtenTensorOpaque* tensor, int32_t* dtype);
int32_t aoti_torch_get_layout(AtenTensorOpaque* tensor, int32_t* layout);
int32_t aoti_torch_get_device_type(AtenTensorOpaque* tensor, int32_t* type);
int32_t aoti_torch_get_device_index(AtenTensorOpaque* tensor, int32_t* index);
int32_t aoti_torch_is_defined(AtenTensorOpaque* tensor, bool* defined);
int32_t aoti_torch_delete_tensor_object(AtenTensorOpaque* tensor);
int32_t aoti_torch_empty_strided(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                 int32_t device_type, int32_t device_index, AtenTensorOpaque** tensor);

int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_dtype_float16();
int32_t aoti_torch_dtype_bfloat16();
int32_t aoti_torch_dtype_int64();
int32_t aoti_torch_layout_strided();
int32_t aoti_torch_device_type_cpu();
int32_t aoti_torch_device_type_cuda();

int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain, void (*function)(int64_t, int64_t, void*),
                           void* context);
int32_t torch_get_num_threads(uint32_t* threads);

int32_t aoti_torch_create_device_guard(int32_t index, DeviceGuardOpaque** guard);
int32_t aoti_torch_delete_device_guard(DeviceGuardOpaque* guard);
// Not there in a torch without CUDA, on which the library must load all the same.
__attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
}

// The version of the ABI that this file is written against, 2.11.
inline constexpr uint64_t kTorchAbiVersion = (uint64_t{2} << 56) | (uint64_t{11} << 48);
