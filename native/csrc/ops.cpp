// The operators for the CPU, on libtorch's stable ABI: check what the kernels rely on, allocate the results, and call
// the kernels for the best instruction set of the machine. The main package has the schemas (cbam/ops/library.py), and
// checks everything that a caller can get wrong.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <array>
#include <atomic>
#include <cstring>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#ifdef CBAM_X86
#include <cpuid.h>
#endif

#include "arguments.h"

namespace {

using namespace cbam;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

// --- the instruction set ---

const std::array<const Level*, 3> levels = {
    &level_portable,
#ifdef CBAM_X86
    &level_avx2,
    &level_avx512,
#else
    nullptr,
    nullptr,
#endif
};

int best_level() {
#ifdef CBAM_X86
  __builtin_cpu_init();
  unsigned a, b, c = 0, d;  // clang has no name for F16C
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &a, &b, &c, &d) &&
              (c & bit_F16C);
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return avx512 ? 2 : avx2 ? 1 : 0;
#else
  return 0;
#endif
}

std::atomic<int> level{best_level()};

// --- tensors to pointers ---

Type type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Half: return Type::f16;
    case ScalarType::BFloat16: return Type::bf16;
    case ScalarType::Float: return Type::f32;
    case ScalarType::Double: return Type::f64;
    default: STD_TORCH_CHECK(false, "cbam: expected float16, bfloat16, float32 or float64");
  }
}

ScalarType accumulator(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Parameter parameter(const Maybe& t, int64_t count, const char* name) {
  if (!t) return {};
  STD_TORCH_CHECK(t->is_cpu() && t->numel() == count && t->is_contiguous(), "cbam: ", name,
                  " must be contiguous, on the CPU, with ", count, " elements, got ", t->numel());
  return {t->const_data_ptr(), type_of(*t)};
}

struct Layout {
  bool planes, rows;  // NCHW, channels_last; a map of one channel, or of one pixel, is both
};

Layout layout(const Tensor& x) {
  int64_t C = x.size(1), H = x.size(2), W = x.size(3);
  auto steps = [&](int64_t dim, int64_t step) { return x.size(dim) == 1 || x.stride(dim) == step; };
  return {steps(0, C * H * W) && steps(1, H * W) && steps(2, W) && steps(3, 1),
          steps(0, C * H * W) && steps(1, 1) && steps(2, W * C) && steps(3, C)};
}

// Whether the channels of a pixel are adjacent. Of the maps that have both layouts, those of one channel count as NCHW,
// the others, of one pixel, as channels_last.
bool channels_last(const Tensor& x) {
  auto [planes, rows] = layout(x);
  STD_TORCH_CHECK(planes || rows, "cbam: a feature map must be dense, NCHW or channels_last");
  return rows && !(planes && x.size(1) == 1);
}

void expect_map(const Tensor& x) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4 && x.numel() > 0, "cbam: expected a map (N, C, H, W) on the CPU");
}

// Compilers choose the layouts of what they make. x in one that kernels take: its own, where it is one.
Tensor dense(const Tensor& x) {
  expect_map(x);
  auto [planes, rows] = layout(x);
  return planes || rows ? x : torch::stable::contiguous(x);
}

// Another map in the layout of x.
Tensor like(const Tensor& t, const Tensor& x, const char* name) {
  bool same = t.is_cpu() && t.scalar_type() == x.scalar_type() && t.dim() == 4;
  for (int64_t d = 0; same && d < 4; d++) same = t.size(d) == x.size(d);
  STD_TORCH_CHECK(same, "cbam: ", name, " must have the shape and type of x");
  auto [planes, rows] = layout(t);
  bool wanted = channels_last(x);
  if (wanted ? rows : planes) return t;
  using torch::headeronly::MemoryFormat;
  return torch::stable::contiguous(t, wanted ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// A contiguous tensor. torch's new_empty takes four times as long, and a training step makes twenty of them.
template <class Sizes>
Tensor make(const Sizes& sizes, ScalarType type) {
  constexpr int MOST = 4;
  int64_t dims = int64_t(sizes.size()), strides[MOST], step = 1;
  STD_TORCH_CHECK(dims <= MOST, "cbam: a parameter of more than four dimensions");
  for (int64_t d = dims - 1; d >= 0; d--) {
    strides[d] = step;
    step *= sizes.begin()[d];
  }
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes.begin(), strides, int32_t(type),
                                                  aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

// A result if `wanted`, else an empty tensor.
Tensor result(bool wanted, std::initializer_list<int64_t> sizes, ScalarType type) {
  return make(wanted ? sizes : std::initializer_list<int64_t>{0}, type);
}

// A contiguous copy of a spatial kernel, which is not contiguous in a channels_last network. For so few elements this
// loop takes a fraction of the time of torch's operators.
Tensor in_order(const Tensor& t) {
  Tensor out = make(t.sizes(), t.scalar_type());
  int64_t size = type_of(t) == Type::f64 ? 8 : type_of(t) == Type::f32 ? 4 : 2;
  const char* from = (const char*)t.const_data_ptr();
  char* to = (char*)out.mutable_data_ptr();
  for (int64_t i = 0; i < t.size(0); i++)
    for (int64_t j = 0; j < t.size(1); j++)
      for (int64_t k = 0; k < t.size(2); k++)
        for (int64_t l = 0; l < t.size(3); l++, to += size) {
          int64_t place = i * t.stride(0) + j * t.stride(1) + k * t.stride(2) + l * t.stride(3);
          std::memcpy(to, from + place * size, size);
        }
  return out;
}

// Replaces parameters that are not contiguous by contiguous copies.
template <class... Parts>
void make_contiguous(Parts&... parts) {
  auto one = [](Maybe& t) {
    if (t && !t->is_contiguous()) t = t->is_cpu() && t->dim() == 4 ? in_order(*t) : torch::stable::contiguous(*t);
  };
  (one(parts), ...);
}

void* pointer(const Tensor& t) { return t.numel() ? t.mutable_data_ptr() : nullptr; }

// --- the arguments that forward and backward share ---

void run_parallel(int64_t count, Work work, void* context) {
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, 1, work, context));
}

void describe_map(Block& b, const Tensor& x, bool relu) {
  b.N = x.size(0), b.C = x.size(1), b.H = x.size(2), b.W = x.size(3);
  STD_TORCH_CHECK(b.H * b.W <= INT32_MAX, "cbam: a map of more than 2^31 - 1 pixels");
  b.rows = channels_last(x);
  b.relu = relu;
  b.threads = run_parallel;
  b.width = torch::stable::get_num_threads();
}

Norm norm(const Maybe& gamma, const Maybe& beta, int64_t count, bool batch, double eps) {
  Norm n;
  n.gamma = parameter(gamma, count, "gamma");
  n.beta = parameter(beta, count, "beta");
  n.batch = batch && gamma;
  n.eps = eps;
  return n;
}

void running(Norm& n, const Maybe& mean, const Maybe& var, int64_t count) {
  if (!n.gamma.data || n.batch) return;
  STD_TORCH_CHECK(mean && var, "cbam: a norm needs the statistics of the batch, or mean and var");
  n.mean = parameter(mean, count, "mean");
  n.var = parameter(var, count, "var");
}

Channel channel(const Maybe& w1, const Maybe& b1, const Maybe& w2, const Maybe& b2, bool avg, bool max, double gain,
                int64_t C) {
  Channel part;
  if (!w1) return part;
  STD_TORCH_CHECK(w2 && (avg || max), "cbam: the channel gate needs w1, w2 and a pool");
  part.hidden = w1->numel() / C;
  part.w1 = parameter(w1, part.hidden * C, "w1");
  part.b1 = parameter(b1, part.hidden, "b1");
  part.w2 = parameter(w2, part.hidden * C, "w2");
  part.b2 = parameter(b2, C, "b2");
  part.avg = avg, part.max = max, part.gain = gain;
  return part;
}

Spatial spatial(const Maybe& kernel, const Maybe& gamma, const Maybe& beta, bool batch, double eps, double gain) {
  Spatial part;
  if (!kernel) return part;
  part.side = kernel->size(3);
  STD_TORCH_CHECK(part.side % 2 == 1, "cbam: the spatial kernel must be odd");
  part.kernel = parameter(kernel, 2 * part.side * part.side, "kernel");
  part.norm = norm(gamma, beta, 1, batch, eps);
  part.gain = gain;
  return part;
}

// --- cbam::tail ---

using Forwarded = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The arguments of a forward, without the memory for its results.
Forward told(const Tensor& x, const Maybe& shortcut, const Maybe& gamma, const Maybe& beta, const Maybe& mean,
             const Maybe& var, bool bn_batch, double bn_eps, const Maybe& w1, const Maybe& b1, const Maybe& w2,
             const Maybe& b2, bool avg_pool, bool max_pool, double channel_gain, const Maybe& kernel,
             const Maybe& s_gamma, const Maybe& s_beta, const Maybe& s_mean, const Maybe& s_var, bool s_batch,
             double s_eps, double spatial_gain, bool relu) {
  Forward f{};
  describe_map(f, x, relu);
  f.norm = norm(gamma, beta, f.C, bn_batch, bn_eps);
  running(f.norm, mean, var, f.C);
  f.channel = channel(w1, b1, w2, b2, avg_pool, max_pool, channel_gain, f.C);
  f.spatial = spatial(kernel, s_gamma, s_beta, s_batch, s_eps, spatial_gain);
  running(f.spatial.norm, s_mean, s_var, 1);
  f.x = x.const_data_ptr();
  f.shortcut = shortcut ? shortcut->const_data_ptr() : nullptr;
  return f;
}

void compute(const Forward& f, const Tensor& x) { levels[level]->forward[int(type_of(x))](f); }

Forwarded tail(Tensor x, Maybe shortcut, Maybe gamma, Maybe beta, Maybe mean, Maybe var, bool bn_batch, double bn_eps,
               Maybe w1, Maybe b1, Maybe w2, Maybe b2, bool avg_pool, bool max_pool, double channel_gain, Maybe kernel,
               Maybe s_gamma, Maybe s_beta, Maybe s_mean, Maybe s_var, bool s_batch, double s_eps,
               double spatial_gain, bool relu, bool save) {
  x = dense(x);
  if (shortcut) shortcut = like(*shortcut, x, "the shortcut");
  make_contiguous(gamma, beta, mean, var, w1, b1, w2, b2, kernel, s_gamma, s_beta, s_mean, s_var);
  Forward f = told(x, shortcut, gamma, beta, mean, var, bn_batch, bn_eps, w1, b1, w2, b2, avg_pool, max_pool,
                   channel_gain, kernel, s_gamma, s_beta, s_mean, s_var, s_batch, s_eps, spatial_gain, relu);
  ScalarType A = accumulator(x);
  bool gated = f.channel.w1.data, normed = f.norm.gamma.data, mapped = f.spatial.kernel.data;
  bool extremum = save && gated && max_pool;
  Tensor out = torch::stable::empty_like(x);
  Tensor m = result(save && (gated || normed), {f.N, f.C}, A);
  Tensor e = result(extremum, {f.N, f.C}, x.scalar_type());
  Tensor k = result(extremum, {f.N, f.C}, ScalarType::Int);
  Tensor mu = result(normed && (save || f.norm.batch), {f.C}, A);
  Tensor v = result(normed && (save || f.norm.batch), {f.C}, A);
  Tensor gate = result(save && gated, {f.N, f.C}, A);
  Tensor s = result(save && mapped, {f.N, 1, f.H, f.W}, A);
  Tensor s_mu = result(mapped && (save || f.spatial.norm.batch), {1}, ScalarType::Double);
  Tensor s_v = result(mapped && (save || f.spatial.norm.batch), {1}, ScalarType::Double);
  f.out = pointer(out), f.m = pointer(m), f.e = pointer(e), f.k = (int32_t*)pointer(k);
  f.mu = pointer(mu), f.v = pointer(v), f.gate = pointer(gate), f.s = pointer(s);
  f.s_mu = (double*)pointer(s_mu), f.s_v = (double*)pointer(s_v);
  compute(f, x);
  return {out, m, e, k, mu, v, gate, s, s_mu, s_v};
}

// --- cbam::tail_inference, and cbam::tail_ in place ---

void infer(const Tensor& x, void* out, Maybe shortcut, Maybe shortcut_gamma, Maybe shortcut_beta, Maybe shortcut_mean,
           Maybe shortcut_var, double shortcut_eps, Maybe gamma, Maybe beta, Maybe mean, Maybe var, double bn_eps,
           Maybe w1, Maybe b1, Maybe w2, Maybe b2, bool avg_pool, bool max_pool, double channel_gain, Maybe kernel,
           Maybe s_gamma, Maybe s_beta, Maybe s_mean, Maybe s_var, double s_eps, double spatial_gain, bool relu) {
  if (shortcut) shortcut = like(*shortcut, x, "the shortcut");
  make_contiguous(shortcut_gamma, shortcut_beta, shortcut_mean, shortcut_var, gamma, beta, mean, var, w1, b1, w2, b2,
                  kernel, s_gamma, s_beta, s_mean, s_var);
  Forward f = told(x, shortcut, gamma, beta, mean, var, false, bn_eps, w1, b1, w2, b2, avg_pool, max_pool,
                   channel_gain, kernel, s_gamma, s_beta, s_mean, s_var, false, s_eps, spatial_gain, relu);
  if (shortcut) f.shortcut_norm = norm(shortcut_gamma, shortcut_beta, f.C, false, shortcut_eps);
  running(f.shortcut_norm, shortcut_mean, shortcut_var, f.C);
  f.out = out;
  compute(f, x);
}

// The two operators, with the arguments of `infer`.
template <class>
struct Inference;
template <class... Rest>
struct Inference<void(const Tensor&, void*, Rest...)> {
  static Tensor tail_inference(Tensor x, Rest... rest) {
    x = dense(x);
    Tensor out = torch::stable::empty_like(x);
    infer(x, out.mutable_data_ptr(), rest...);
    return out;
  }

  // Safe in place: only the last pass writes, and it reads each element of x just before it overwrites it.
  static void tail_(Tensor x, Rest... rest) {
    Tensor map = dense(x);
    infer(map, map.mutable_data_ptr(), rest...);
    if (map.data_ptr() != x.data_ptr()) torch::stable::copy_(x, map);
  }
};

// --- cbam::track_ ---

template <class F>
auto of_type(const Tensor& t, F f) {
  void* data = t.mutable_data_ptr();
  switch (type_of(t)) {
    case Type::f16: return f((torch::headeronly::Half*)data);
    case Type::bf16: return f((torch::headeronly::BFloat16*)data);
    case Type::f32: return f((float*)data);
    default: return f((double*)data);
  }
}

// running = (1 - momentum) running + momentum factor batch, in double.
void move(const Tensor& running, const Tensor& batch, double momentum, double factor) {
  int64_t count = running.numel();
  STD_TORCH_CHECK(running.is_cpu() && batch.is_cpu() && running.dim() == 1 && batch.dim() == 1 &&
                      batch.numel() == count, "cbam: running statistics must have an element for each channel");
  int64_t step = running.stride(0), batch_step = batch.stride(0);
  of_type(running, [&](auto* old) {
    using T = std::remove_pointer_t<decltype(old)>;
    using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;  // no conversion from double to 16 bits
    of_type(batch, [&](const auto* found) {
      for (int64_t c = 0; c < count; c++) {
        double was = double(old[c * step]), now = double(found[c * batch_step]) * factor;
        old[c * step] = T(Wide(was + momentum * (now - was)));
      }
    });
  });
}

void track_(std::vector<Tensor> running, std::vector<Tensor> fresh, std::vector<double> momenta, int64_t count) {
  for (size_t i = 0; i < momenta.size(); i++) {
    move(running.at(2 * i), fresh.at(2 * i), momenta[i], 1);
    move(running.at(2 * i + 1), fresh.at(2 * i + 1), momenta[i], double(count) / double(count - 1));
  }
}

// --- cbam::tail_backward ---

using Backwarded =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

const void* saved(const Tensor& t, int64_t count, ScalarType type, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.numel() == count && t.is_contiguous() && t.scalar_type() == type, "cbam: ", name,
                  " is not what the forward saved");
  return t.const_data_ptr();
}

Backwarded tail_backward(Tensor grad, Tensor x, Maybe out, Maybe gamma, Maybe beta, bool bn_batch, double bn_eps,
                         Maybe w1, Maybe b1, Maybe w2, Maybe b2, bool avg_pool, bool max_pool, double channel_gain,
                         Maybe kernel, Maybe s_gamma, Maybe s_beta, bool s_batch, double s_eps, double spatial_gain,
                         bool relu, Tensor m, Tensor e, Tensor k, Tensor mu, Tensor v, Tensor gate, Tensor s,
                         Tensor s_mu, Tensor s_v, bool need_x, bool need_shortcut) {
  STD_TORCH_CHECK(!relu || out, "cbam: the gradient of the ReLU needs out");
  x = dense(x);
  grad = like(grad, x, "the gradient");
  if (relu) out = like(*out, x, "out");
  make_contiguous(gamma, beta, w1, b1, w2, b2, kernel, s_gamma, s_beta);
  Backward b{};
  describe_map(b, x, relu);
  b.norm = norm(gamma, beta, b.C, bn_batch, bn_eps);
  b.channel = channel(w1, b1, w2, b2, avg_pool, max_pool, channel_gain, b.C);
  b.spatial = spatial(kernel, s_gamma, s_beta, s_batch, s_eps, spatial_gain);
  ScalarType A = accumulator(x);
  bool gated = b.channel.w1.data, normed = b.norm.gamma.data, mapped = b.spatial.kernel.data;
  b.grad = grad.const_data_ptr();
  b.x = x.const_data_ptr();
  b.out = relu ? out->const_data_ptr() : nullptr;
  if (gated) {
    b.m = saved(m, b.N * b.C, A, "m");
    b.gate = saved(gate, b.N * b.C, A, "gate");
  }
  if (gated && max_pool) {
    b.e = saved(e, b.N * b.C, x.scalar_type(), "e");
    b.k = (const int32_t*)saved(k, b.N * b.C, ScalarType::Int, "k");
  }
  if (normed) b.mu = saved(mu, b.C, A, "mu"), b.v = saved(v, b.C, A, "v");
  if (mapped) {
    b.s = saved(s, b.N * b.H * b.W, A, "s");
    b.s_mu = (const double*)saved(s_mu, 1, ScalarType::Double, "s_mu");
    b.s_v = (const double*)saved(s_v, 1, ScalarType::Double, "s_v");
  }

  // The masked gradient is computed if the shortcut needs it or pass 3 reads it.
  bool masked = relu && (need_x || need_shortcut);
  Tensor none = result(false, {}, x.scalar_type()), g = masked ? torch::stable::empty_like(x) : none;
  Tensor dx = need_x ? torch::stable::empty_like(x) : result(false, {}, x.scalar_type());
  auto like = [&](const Maybe& p) {
    return p ? make(p->sizes(), A) : result(false, {}, A);
  };
  Tensor dgamma = like(gamma), dbeta = like(beta), dw1 = like(w1), db1 = like(b1), dw2 = like(w2), db2 = like(b2);
  Tensor dkernel = like(kernel), ds_gamma = like(s_gamma), ds_beta = like(s_beta);
  b.dx = pointer(dx), b.g = pointer(g), b.dgamma = pointer(dgamma), b.dbeta = pointer(dbeta);
  b.dw1 = pointer(dw1), b.db1 = pointer(db1), b.dw2 = pointer(dw2), b.db2 = pointer(db2);
  b.dkernel = pointer(dkernel), b.ds_gamma = pointer(ds_gamma), b.ds_beta = pointer(ds_beta);
  levels[level]->backward[int(type_of(x))](b);
  return {dx, need_shortcut ? g : none, dgamma, dbeta, dw1, db1, dw2, db2, dkernel, ds_gamma, ds_beta};
}

}  // namespace

// For tests: selects instruction set 0 (portable), 1 (AVX2) or 2 (AVX-512) if the machine has it, and returns the one
// in use. -1 changes nothing.
extern "C" __attribute__((visibility("default"))) int cbam_native_level(int wanted) {
  if (wanted >= 0 && wanted <= best_level()) level = wanted;
  return level;
}

STABLE_TORCH_LIBRARY_IMPL(cbam, CPU, library) {
  library.impl("tail", TORCH_BOX(&tail));
  library.impl("tail_inference", TORCH_BOX(&Inference<decltype(infer)>::tail_inference));
  library.impl("tail_", TORCH_BOX(&Inference<decltype(infer)>::tail_));
  library.impl("track_", TORCH_BOX(&track_));
  library.impl("tail_backward", TORCH_BOX(&tail_backward));
}
