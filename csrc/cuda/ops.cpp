// The CUDA ops as torch sees them: arguments checked, outputs made, kernels put on torch's current stream.
#include "../tensor.h"
#include "kernels.h"

namespace llmfast {
namespace {

// Makes the tensors' device current for the launch, and gives its stream and size.
class Device {
 public:
  explicit Device(const Argument& first) : op_(first.op), index_(first.tensor.device_index()) {
    LLMFAST_TORCH(aoti_torch_create_device_guard(index_, &guard_));
    LLMFAST_TORCH(aoti_torch_get_current_cuda_stream(index_, &stream_));
  }
  ~Device() { aoti_torch_delete_device_guard(guard_); }
  Device(const Device&) = delete;

  void* stream() const { return stream_; }
  int multiprocessors() const { return cuda::multiprocessors(index_); }
  void same(const Argument& a) const {
    a.require(a.tensor.device_index() == index_, "is on another GPU than the first tensor; move it there");
  }
  void check(int error) const {
    if (error != 0) throw std::runtime_error(std::string(op_) + ": CUDA error: " + cuda::error_text(error));
  }

 private:
  const char* op_;
  int32_t index_;
  DeviceGuardOpaque* guard_ = nullptr;
  void* stream_ = nullptr;
};

cuda::DType kernel_dtype(DType dtype) {
  if (dtype == DType::kFloat16) return cuda::DType::f16;
  return dtype == DType::kBFloat16 ? cuda::DType::bf16 : cuda::DType::f32;
}
DType check_floats(const Argument& a) {
  return check_tensor(a, {DType::kFloat32, DType::kFloat16, DType::kBFloat16}, aoti_torch_device_type_cuda());
}
void check_dtype(const Device& device, const Argument& a, DType dtype) {
  check_tensor(a, {dtype}, aoti_torch_device_type_cuda());
  device.same(a);
}

cuda::Param parameter(const Device& device, const Argument& a, int64_t n) {
  if (!a.tensor) return {};
  const DType dtype = check_floats(a);
  device.same(a);
  check_vector(a, n);
  return {a.tensor.data(), kernel_dtype(dtype)};
}

const float* statistic(const Device& device, const Argument& a, int64_t rows) {
  check_dtype(device, a, DType::kFloat32);
  check_vector(a, rows);
  return a.tensor.data<float>();
}

const float* scalar(const Device& device, const Argument& a) {
  check_dtype(device, a, DType::kFloat32);
  a.require(a.tensor.numel() == 1, "must hold one element");
  return a.tensor.data<float>();
}

Rows rows_like(const Device& device, const Argument& a, const Argument& other, DType dtype) {
  check_dtype(device, a, dtype);
  check_same_shape(a, other);
  return rows_of(a);
}

Tensor softmax_fwd(const Tensor& x) {
  const Argument arg{"softmax_fwd", "x", x};
  const auto dtype = check_floats(arg);
  const Rows rows = rows_of(arg);
  const Device device(arg);
  Tensor y = empty_like(x);
  device.check(
      cuda::softmax_fwd(rows.data, y.data(), rows.rows, rows.cols, rows.stride, kernel_dtype(dtype), device.stream()));
  return y;
}

Tensor softmax_bwd(const Tensor& dy, const Tensor& y) {
  const Argument arg{"softmax_bwd", "y", y};
  const auto dtype = check_floats(arg);
  const Rows ys = rows_of(arg);
  const Device device(arg);
  const Rows dys = rows_like(device, {"softmax_bwd", "dy", dy}, arg, dtype);
  Tensor dx = empty_like(y);
  device.check(cuda::softmax_bwd(dys.data, ys.data, dx.data(), ys.rows, ys.cols, dys.stride, ys.stride,
                                 kernel_dtype(dtype), device.stream()));
  return dx;
}

// What every norm begins with: its rows, whose dtype the result has.
struct NormRows {
  const Argument arg;
  const DType dtype;
  const Rows rows;
  const Device device;

  NormRows(const char* op, const Tensor& x)
      : arg{op, "x", x}, dtype(check_floats(arg)), rows(rows_of(arg)), device(arg) {}

  cuda::Param parameter(const char* name, const Optional& p) const {
    return llmfast::parameter(device, {arg.op, name, p.tensor}, rows.cols);
  }
};

std::tuple<Tensor, Tensor, Tensor> layer_norm_fwd(const Tensor& x, const Optional& weight, const Optional& bias,
                                                  double eps) {
  const NormRows in("layer_norm_fwd", x);
  const cuda::Param w = in.parameter("weight", weight), b = in.parameter("bias", bias);
  const Rows& xs = in.rows;
  Tensor y = empty_like(x), mean = empty_float32({xs.rows}, x), rstd = empty_float32({xs.rows}, x);
  in.device.check(cuda::layer_norm_fwd(xs.data, w, b, y.data(), mean.data<float>(), rstd.data<float>(), xs.rows,
                                       xs.cols, xs.stride, float(eps), kernel_dtype(in.dtype), in.device.stream()));
  return {std::move(y), std::move(mean), std::move(rstd)};
}

std::tuple<Tensor, Tensor> rms_norm_fwd(const Tensor& x, const Optional& weight, double eps) {
  const NormRows in("rms_norm_fwd", x);
  const cuda::Param w = in.parameter("weight", weight);
  const Rows& xs = in.rows;
  Tensor y = empty_like(x), rstd = empty_float32({xs.rows}, x);
  in.device.check(cuda::rms_norm_fwd(xs.data, w, y.data(), rstd.data<float>(), xs.rows, xs.cols, xs.stride, float(eps),
                                     kernel_dtype(in.dtype), in.device.stream()));
  return {std::move(y), std::move(rstd)};
}

// And what the backward adds, with its results: `parameters` of them have gradients.
struct NormBackward : NormRows {
  const Rows dys;
  const cuda::Param w;
  const float* const rstds;
  const int64_t partials;
  Tensor dx, dw, workspace;

  NormBackward(const char* op, const Tensor& dy, const Tensor& x, const Optional& weight, const Tensor& rstd,
               int parameters)
      : NormRows(op, x),
        dys(rows_like(device, {op, "dy", dy}, arg, dtype)),
        w(parameter("weight", weight)),
        rstds(statistic(device, {op, "rstd", rstd}, rows.rows)),
        partials(cuda::norm_bwd_partials(rows.rows, rows.cols, device.multiprocessors())),
        dx(empty_like(x)),
        dw(empty_float32({rows.cols}, x)),
        workspace(empty_float32({parameters * partials, rows.cols}, x)) {}
};

std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd(const Tensor& dy, const Tensor& x, const Optional& weight,
                                                  const Tensor& mean, const Tensor& rstd) {
  NormBackward in("layer_norm_bwd", dy, x, weight, rstd, 2);
  const Rows& xs = in.rows;
  const float* means = statistic(in.device, {in.arg.op, "mean", mean}, xs.rows);
  Tensor db = empty_float32({xs.cols}, x);
  in.device.check(cuda::layer_norm_bwd(in.dys.data, xs.data, in.w, means, in.rstds, in.dx.data(), in.dw.data<float>(),
                                       db.data<float>(), in.workspace.data<float>(), in.partials, xs.rows, xs.cols,
                                       in.dys.stride, xs.stride, kernel_dtype(in.dtype), in.device.stream()));
  return {std::move(in.dx), std::move(in.dw), std::move(db)};
}

std::tuple<Tensor, Tensor> rms_norm_bwd(const Tensor& dy, const Tensor& x, const Optional& weight, const Tensor& rstd) {
  NormBackward in("rms_norm_bwd", dy, x, weight, rstd, 1);
  const Rows& xs = in.rows;
  in.device.check(cuda::rms_norm_bwd(in.dys.data, xs.data, in.w, in.rstds, in.dx.data(), in.dw.data<float>(),
                                     in.workspace.data<float>(), in.partials, xs.rows, xs.cols, in.dys.stride,
                                     xs.stride, kernel_dtype(in.dtype), in.device.stream()));
  return {std::move(in.dx), std::move(in.dw)};
}

Tensor bias_gelu_fwd(const Tensor& x, const Optional& bias, bool tanh) {
  const Argument arg{"bias_gelu_fwd", "x", x};
  const auto dtype = check_floats(arg);
  const Rows rows = rows_of(arg);
  const Device device(arg);
  const cuda::Param b = parameter(device, {"bias_gelu_fwd", "bias", bias.tensor}, rows.cols);
  Tensor y = empty_like(x);
  device.check(cuda::bias_gelu_fwd(rows.data, b, y.data(), rows.rows, rows.cols, rows.stride, tanh, kernel_dtype(dtype),
                                   device.stream()));
  return y;
}

// dbias is empty where there is no bias.
std::tuple<Tensor, Tensor> bias_gelu_bwd(const Tensor& dy, const Tensor& x, const Optional& bias, bool tanh) {
  const char* op = "bias_gelu_bwd";
  const Argument arg{op, "x", x};
  const auto dtype = check_floats(arg);
  const Rows xs = rows_of(arg);
  const Device device(arg);
  const Rows dys = rows_like(device, {op, "dy", dy}, arg, dtype);
  const cuda::Param b = parameter(device, {op, "bias", bias.tensor}, xs.cols);
  const int64_t partials = bias ? cuda::bias_gelu_bwd_partials(xs.rows, xs.cols, device.multiprocessors()) : 1;
  Tensor dx = empty_like(x), db = empty_float32({bias ? xs.cols : 0}, x);
  Tensor workspace = empty_float32({bias ? partials : 0, xs.cols}, x);
  device.check(cuda::bias_gelu_bwd(dys.data, xs.data, b, dx.data(), bias ? db.data<float>() : nullptr,
                                   workspace.data<float>(), partials, xs.rows, xs.cols, dys.stride, xs.stride, tanh,
                                   kernel_dtype(dtype), device.stream()));
  return {std::move(dx), std::move(db)};
}

const int64_t* check_targets(const Device& device, const Argument& a, int64_t rows) {
  check_dtype(device, a, DType::kInt64);
  check_vector(a, rows);
  return a.tensor.data<int64_t>();
}

Rows check_logits(const Argument& a) {
  a.require(a.tensor.dim() == 2, "must have two dimensions, (rows, classes)");
  return rows_of(a);
}

// The mean loss, () float32; per row the maximum and the sum of exponentials, (2, rows); the targets that count, ().
std::tuple<Tensor, Tensor, Tensor> cross_entropy_fwd(const Tensor& logits, const Tensor& targets,
                                                     int64_t ignore_index) {
  const char* op = "cross_entropy_fwd";
  const Argument arg{op, "logits", logits};
  const auto dtype = check_floats(arg);
  const Rows rows = check_logits(arg);
  const Device device(arg);
  const int64_t* ids = check_targets(device, {op, "targets", targets}, rows.rows);
  Tensor mean = empty_float32({}, logits), count = empty_float32({}, logits);
  Tensor statistics = empty_float32({2, rows.rows}, logits), losses = empty_float32({rows.rows}, logits);
  device.check(cuda::cross_entropy_fwd(rows.data, ids, losses.data<float>(), statistics.data<float>(),
                                       mean.data<float>(), count.data<float>(), rows.rows, rows.cols, rows.stride,
                                       ignore_index, kernel_dtype(dtype), device.stream()));
  return {std::move(mean), std::move(statistics), std::move(count)};
}

Tensor cross_entropy_bwd(const Tensor& grad, const Tensor& logits, const Tensor& targets, const Tensor& statistics,
                         const Tensor& count, int64_t ignore_index) {
  const char* op = "cross_entropy_bwd";
  const Argument arg{op, "logits", logits}, stats{op, "statistics", statistics};
  const auto dtype = check_floats(arg);
  const Rows rows = check_logits(arg);
  const Device device(arg);
  const int64_t* ids = check_targets(device, {op, "targets", targets}, rows.rows);
  check_dtype(device, stats, DType::kFloat32);
  check_statistics(stats, rows.rows);
  const float *g = scalar(device, {op, "grad", grad}), *n = scalar(device, {op, "count", count});
  Tensor dlogits = empty_like(logits);
  device.check(cuda::cross_entropy_bwd(rows.data, ids, statistics.data<float>(), g, n, dlogits.data(), rows.rows,
                                       rows.cols, rows.stride, ignore_index, kernel_dtype(dtype), device.stream()));
  return dlogits;
}

}  // namespace
}  // namespace llmfast

LLMFAST_EXPORT const char* llmfast_source_hash() { return LLMFAST_SOURCE_HASH; }
LLMFAST_EXPORT int32_t llmfast_register() {
  if (!aoti_torch_get_current_cuda_stream) return 1;  // a torch without CUDA
  using namespace llmfast;
  return llmfast::register_ops("CUDA", {
                                           LLMFAST_OP(softmax_fwd),
                                           LLMFAST_OP(softmax_bwd),
                                           LLMFAST_OP(layer_norm_fwd),
                                           LLMFAST_OP(layer_norm_bwd),
                                           LLMFAST_OP(rms_norm_fwd),
                                           LLMFAST_OP(rms_norm_bwd),
                                           LLMFAST_OP(bias_gelu_fwd),
                                           LLMFAST_OP(bias_gelu_bwd),
                                           LLMFAST_OP(cross_entropy_fwd),
                                           LLMFAST_OP(cross_entropy_bwd),
                                       });
}
