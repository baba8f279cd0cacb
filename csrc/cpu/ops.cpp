// The CPU ops as torch sees them: arguments checked, outputs made, work shared out to threads.
#include "../tensor.h"
#include "checks.h"
#include "kernels.h"
#include "parallel.h"

namespace llmfast::cpu {

std::vector<Registration> attention_ops();  // attention_ops.cpp

namespace {

// A vector of n float32, from one of float32 or bfloat16; null where there is none.
class Parameter {
 public:
  Parameter(const Argument& a, int64_t n) {
    if (!a.tensor) return;
    const DType dtype = check_floats(a);
    check_vector(a, n);
    data_ = a.tensor.data<float>();
    if (dtype != DType::kBFloat16) return;
    converted_.resize(n);
    const BFloat16* source = a.tensor.data<BFloat16>();
    for (int64_t i = 0; i < n; ++i) converted_[i] = to_float(source[i]);
    data_ = converted_.data();
  }
  const float* data() const { return data_; }

 private:
  std::vector<float> converted_;
  const float* data_ = nullptr;
};

const float* statistic(const Argument& a, int64_t rows) {
  check_dtype(a, DType::kFloat32);
  check_vector(a, rows);
  return a.tensor.data<float>();
}

Tensor softmax_fwd(const Tensor& x) {
  const Argument arg{"softmax_fwd", "x", x};
  const DType dtype = check_floats(arg);
  const Rows rows = rows_of(arg);
  Tensor y = empty_like(x);
  parallel(kernels().softmax_fwd.kernel[index_of(dtype)], {rows.data, rows.stride, y.data(), rows.cols}, rows.rows,
           rows.cols);
  return y;
}

Tensor softmax_bwd(const Tensor& dy, const Tensor& y) {
  const Argument arg{"softmax_bwd", "y", y};
  const DType dtype = check_floats(arg);
  const Rows ys = rows_of(arg), dys = rows_like({"softmax_bwd", "dy", dy}, arg, dtype);
  Tensor dx = empty_like(y);
  parallel(kernels().softmax_bwd.kernel[index_of(dtype)],
           {dys.data, ys.data, dys.stride, ys.stride, dx.data(), ys.cols}, ys.rows, ys.cols);
  return dx;
}

std::tuple<Tensor, Tensor, Tensor> norm_fwd(const char* op, const ByDtype<NormFwd>& kernel, const Tensor& x,
                                            const Tensor& weight, const Tensor& bias, double eps) {
  const Argument arg{op, "x", x};
  const DType dtype = check_floats(arg);
  const Rows rows = rows_of(arg);
  const Parameter w({op, "weight", weight}, rows.cols), b({op, "bias", bias}, rows.cols);
  Tensor y = empty_like(x), mean = empty_float32({rows.rows}, x), rstd = empty_float32({rows.rows}, x);
  parallel(kernel.kernel[index_of(dtype)],
           {rows.data, rows.stride, w.data(), b.data(), y.data(), mean.data<float>(), rstd.data<float>(), rows.rows,
            rows.cols, float(eps)},
           rows.rows, rows.cols);
  return {std::move(y), std::move(mean), std::move(rstd)};
}

std::tuple<Tensor, Tensor, Tensor> norm_bwd(const char* op, const ByDtype<NormBwd>& kernel, const Tensor& dy,
                                            const Tensor& x, const Tensor& weight, const Tensor* mean,
                                            const Tensor& rstd) {
  const Argument arg{op, "x", x};
  const DType dtype = check_floats(arg);
  const Rows xs = rows_of(arg), dys = rows_like({op, "dy", dy}, arg, dtype);
  const Parameter w({op, "weight", weight}, xs.cols);
  const float* means = mean ? statistic({op, "mean", *mean}, xs.rows) : nullptr;
  const float* rstds = statistic({op, "rstd", rstd}, xs.rows);
  const Chunks chunks(xs.rows);
  Tensor dx = empty_like(x);
  Tensor dw = empty_float32({chunks.count, xs.cols}, x), db = empty_float32({mean ? chunks.count : 0, xs.cols}, x);
  parallel(kernel.kernel[index_of(dtype)],
           {dys.data, xs.data, dys.stride, xs.stride, w.data(), means, rstds, dx.data(), dw.data<float>(),
            db.data<float>(), xs.rows, xs.cols, chunks.rows_per_chunk},
           chunks.count, chunks.rows_per_chunk * xs.cols);
  if (!mean) return {std::move(dx), sum_partials(dw, chunks, xs.cols), std::move(db)};
  return {std::move(dx), sum_partials(dw, chunks, xs.cols), sum_partials(db, chunks, xs.cols)};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_fwd(const Tensor& x, const Optional& weight, const Optional& bias,
                                                  double eps) {
  return norm_fwd("layer_norm_fwd", kernels().layer_norm_fwd, x, weight.tensor, bias.tensor, eps);
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd(const Tensor& dy, const Tensor& x, const Optional& weight,
                                                  const Tensor& mean, const Tensor& rstd) {
  return norm_bwd("layer_norm_bwd", kernels().layer_norm_bwd, dy, x, weight.tensor, &mean, rstd);
}

std::tuple<Tensor, Tensor> rms_norm_fwd(const Tensor& x, const Optional& weight, double eps) {
  auto [y, mean, rstd] = norm_fwd("rms_norm_fwd", kernels().rms_norm_fwd, x, weight.tensor, Tensor(), eps);
  return {std::move(y), std::move(rstd)};
}

std::tuple<Tensor, Tensor> rms_norm_bwd(const Tensor& dy, const Tensor& x, const Optional& weight, const Tensor& rstd) {
  auto [dx, dw, db] = norm_bwd("rms_norm_bwd", kernels().rms_norm_bwd, dy, x, weight.tensor, nullptr, rstd);
  return {std::move(dx), std::move(dw)};
}

Tensor bias_gelu_fwd(const Tensor& x, const Optional& bias, bool tanh) {
  const Argument arg{"bias_gelu_fwd", "x", x};
  const DType dtype = check_floats(arg);
  const Rows rows = rows_of(arg);
  const Parameter b({"bias_gelu_fwd", "bias", bias.tensor}, rows.cols);
  Tensor y = empty_like(x);
  parallel(kernels().gelu_fwd.kernel[index_of(dtype)], {rows.data, rows.stride, b.data(), y.data(), rows.cols, tanh},
           rows.rows, rows.cols);
  return y;
}

// dbias is empty where there is no bias.
std::tuple<Tensor, Tensor> bias_gelu_bwd(const Tensor& dy, const Tensor& x, const Optional& bias, bool tanh) {
  const char* op = "bias_gelu_bwd";
  const Argument arg{op, "x", x};
  const DType dtype = check_floats(arg);
  const Rows xs = rows_of(arg), dys = rows_like({op, "dy", dy}, arg, dtype);
  const Parameter b({op, "bias", bias.tensor}, xs.cols);
  const Chunks chunks(xs.rows);
  Tensor dx = empty_like(x), partial = empty_float32({bias ? chunks.count : 0, xs.cols}, x);
  parallel(kernels().gelu_bwd.kernel[index_of(dtype)],
           {dys.data, xs.data, dys.stride, xs.stride, b.data(), dx.data(), bias ? partial.data<float>() : nullptr,
            xs.rows, xs.cols, chunks.rows_per_chunk, tanh},
           chunks.count, chunks.rows_per_chunk * xs.cols);
  if (!bias) return {std::move(dx), empty_float32({0}, x)};
  return {std::move(dx), sum_partials(partial, chunks, xs.cols)};
}

Tensor swiglu_fwd(const Tensor& gate, const Tensor& up) {
  const Argument arg{"swiglu_fwd", "gate", gate};
  const DType dtype = check_floats(arg);
  const Rows gates = rows_of(arg), ups = rows_like({"swiglu_fwd", "up", up}, arg, dtype);
  Tensor y = empty_like(gate);
  parallel(kernels().swiglu_fwd.kernel[index_of(dtype)],
           {gates.data, ups.data, gates.stride, ups.stride, y.data(), gates.cols}, gates.rows, gates.cols);
  return y;
}

std::tuple<Tensor, Tensor> swiglu_bwd(const Tensor& dy, const Tensor& gate, const Tensor& up) {
  const char* op = "swiglu_bwd";
  const Argument arg{op, "gate", gate};
  const DType dtype = check_floats(arg);
  const Rows gates = rows_of(arg), ups = rows_like({op, "up", up}, arg, dtype);
  const Rows dys = rows_like({op, "dy", dy}, arg, dtype);
  Tensor dgate = empty_like(gate), dup = empty_like(gate);
  parallel(kernels().swiglu_bwd.kernel[index_of(dtype)],
           {dys.data, gates.data, ups.data, dys.stride, gates.stride, ups.stride, dgate.data(), dup.data(), gates.cols},
           gates.rows, gates.cols);
  return {std::move(dgate), std::move(dup)};
}

Tensor rope(const Tensor& x, const Tensor& cos, const Tensor& sin, bool inverse) {
  const Argument arg{"rope", "x", x};
  const DType dtype = check_floats(arg);
  if (x.dim() != 4 || x.sizes()[3] % 2 != 0)
    arg.refuse("has shape " + shape_text(x) + "; it must be (batch, length, heads, head_dim), head_dim even");
  const int64_t *sizes = x.sizes(), *strides = x.strides(), length = sizes[1], heads = sizes[2], head_dim = sizes[3];
  arg.require(head_dim <= 1 || strides[3] == 1 || x.numel() == 0, "must have adjacent elements in its last dimension");
  for (const Argument& table : {Argument{"rope", "cos", cos}, Argument{"rope", "sin", sin}}) {
    check_dtype(table, DType::kFloat32);
    const Tensor& t = table.tensor;
    if (t.dim() != 2 || t.sizes()[0] != length || t.sizes()[1] != head_dim / 2)
      table.refuse("has shape " + shape_text(t) + "; it must be (" + std::to_string(length) + ", " +
                   std::to_string(head_dim / 2) + ")");
    require_contiguous(table);
  }
  Tensor y = empty_like(x);
  if (x.numel() == 0) return y;
  parallel(kernels().rope.kernel[index_of(dtype)],
           {x.data(), strides[0], strides[1], strides[2], cos.data<float>(), sin.data<float>(), y.data(), length, heads,
            head_dim, inverse ? -1.0f : 1.0f},
           sizes[0] * length, heads * head_dim);
  return y;
}

const int64_t* check_targets(const Argument& a, const Rows& logits, int64_t ignore_index, int64_t& count) {
  check_dtype(a, DType::kInt64);
  check_vector(a, logits.rows);
  const int64_t* targets = a.tensor.data<int64_t>();
  count = 0;
  for (int64_t row = 0; row < logits.rows; ++row) {
    if (targets[row] == ignore_index) continue;
    if (targets[row] < 0 || targets[row] >= logits.cols)
      a.refuse("holds " + std::to_string(targets[row]) + " at row " + std::to_string(row) + "; it must be below " +
               std::to_string(logits.cols) + ", the number of classes, or ignore_index");
    ++count;
  }
  return targets;
}

// The mean loss, () float32; per row the maximum and the sum of exponentials, (2, rows); the targets that count, ().
std::tuple<Tensor, Tensor, Tensor> cross_entropy_fwd(const Tensor& logits, const Tensor& targets,
                                                     int64_t ignore_index) {
  const Argument arg{"cross_entropy_fwd", "logits", logits};
  const DType dtype = check_floats(arg);
  arg.require(logits.dim() == 2, "must have two dimensions, (rows, classes)");
  const Rows rows = rows_of(arg);
  int64_t count = 0;
  const int64_t* ids = check_targets({"cross_entropy_fwd", "targets", targets}, rows, ignore_index, count);
  Tensor loss = empty_float32({}, logits), statistics = empty_float32({2, rows.rows}, logits);
  Tensor valid = empty_float32({}, logits);
  std::vector<float> losses(rows.rows);
  float* maximum = statistics.data<float>();
  parallel(kernels().cross_entropy_fwd.kernel[index_of(dtype)],
           {rows.data, rows.stride, ids, ignore_index, losses.data(), maximum, maximum + rows.rows, rows.cols},
           rows.rows, rows.cols);
  double total = 0.0;
  for (const float value : losses) total += value;
  *loss.data<float>() = float(total / double(std::max<int64_t>(1, count)));
  *valid.data<float>() = float(count);
  return {std::move(loss), std::move(statistics), std::move(valid)};
}

Tensor cross_entropy_bwd(const Tensor& grad, const Tensor& logits, const Tensor& targets, const Tensor& statistics,
                         const Tensor& count, int64_t ignore_index) {
  const char* op = "cross_entropy_bwd";
  const Argument arg{op, "logits", logits}, stats{op, "statistics", statistics};
  const DType dtype = check_floats(arg);
  arg.require(logits.dim() == 2, "must have two dimensions, (rows, classes)");
  const Rows rows = rows_of(arg);
  int64_t valid = 0;
  const int64_t* ids = check_targets({op, "targets", targets}, rows, ignore_index, valid);
  check_dtype(stats, DType::kFloat32);
  check_statistics(stats, rows.rows);
  for (const Argument& scalar : {Argument{op, "grad", grad}, Argument{op, "count", count}}) {
    check_dtype(scalar, DType::kFloat32);
    scalar.require(scalar.tensor.numel() == 1, "must hold one element");
  }
  Tensor dlogits = empty_like(logits);
  const float* maximum = statistics.data<float>();
  const float scale = *grad.data<float>() / std::max(1.0f, *count.data<float>());
  parallel(kernels().cross_entropy_bwd.kernel[index_of(dtype)],
           {rows.data, rows.stride, ids, ignore_index, maximum, maximum + rows.rows, scale, dlogits.data(), rows.rows,
            rows.cols},
           rows.rows, rows.cols);
  return dlogits;
}

void adamw_(const Tensor& parameter, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq,
            double learning_rate, double beta1, double beta2, double eps, double weight_decay, double correction1,
            double correction2, double grad_scale) {
  const Argument first{"adamw_", "parameter", parameter};
  const auto data = [&](const Argument& a) {
    check_dtype(a, DType::kFloat32);
    check_same_shape(a, first);
    require_contiguous(a);
    return a.tensor.data<float>();
  };
  parallel(kernels().adamw,
           {data(first), data({"adamw_", "grad", grad}), data({"adamw_", "exp_avg", exp_avg}),
            data({"adamw_", "exp_avg_sq", exp_avg_sq}), float(learning_rate), float(beta1), float(beta2), float(eps),
            float(weight_decay), float(correction1), float(correction2), float(grad_scale)},
           parameter.numel(), 1);
}

}  // namespace
}  // namespace llmfast::cpu

LLMFAST_EXPORT const char* llmfast_source_hash() { return LLMFAST_SOURCE_HASH; }
LLMFAST_EXPORT const char* llmfast_cpu_variant() { return llmfast::cpu::variant_name(); }
LLMFAST_EXPORT bool llmfast_cpu_select(const char* name) { return llmfast::cpu::select_variant(name); }
LLMFAST_EXPORT int32_t llmfast_register() {
  using namespace llmfast::cpu;
  std::vector<llmfast::Registration> ops = {
      LLMFAST_OP(softmax_fwd),       LLMFAST_OP(softmax_bwd),   LLMFAST_OP(layer_norm_fwd),
      LLMFAST_OP(layer_norm_bwd),    LLMFAST_OP(rms_norm_fwd),  LLMFAST_OP(rms_norm_bwd),
      LLMFAST_OP(bias_gelu_fwd),     LLMFAST_OP(bias_gelu_bwd), LLMFAST_OP(swiglu_fwd),
      LLMFAST_OP(swiglu_bwd),        LLMFAST_OP(rope),          LLMFAST_OP(cross_entropy_fwd),
      LLMFAST_OP(cross_entropy_bwd), LLMFAST_OP(adamw_),
  };
  for (const auto& op : attention_ops()) ops.push_back(op);
  return llmfast::register_ops("CPU", ops);
}
