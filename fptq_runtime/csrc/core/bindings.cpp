// The module: parameters, programs and the pool. A step's and a draw's arrays arrive as the dataclasses that hold them;
// arrays.h checks dtype, contiguity and shape, program.cpp and sampler.cpp every index.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <climits>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "core/arrays.h"
#include "core/float_matrix.h"
#include "core/math.h"
#include "core/pack.h"
#include "core/program.h"
#include "core/sampler.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace fptq {

void bind_gemm(nb::module_& m);

using Description = std::vector<std::tuple<std::string, std::string, std::string>>;

// A structured element, member by member, as numpy describes one.
struct Members {
  Description description;  // (name, type, offset) each
  std::string format = "T{";
  template <class T>
  Members add(const char* name, T SampleParameters::*, size_t offset) && {
    const ElementType type = element_type<T>();
    description.emplace_back(name, type.name, std::to_string(offset));
    format += type.format + ":" + name + ":";
    return std::move(*this);
  }
};

const Members& parameters() {
#define MEMBER(name) add(#name, &SampleParameters::name, offsetof(SampleParameters, name))
  static const Members members = Members{}
                                     .MEMBER(seed)
                                     .MEMBER(temperature)
                                     .MEMBER(top_p)
                                     .MEMBER(min_p)
                                     .MEMBER(repetition_penalty)
                                     .MEMBER(presence_penalty)
                                     .MEMBER(frequency_penalty)
                                     .MEMBER(top_k);
#undef MEMBER
  return members;
}

template <>
ElementType element_type<SampleParameters>() {
  return {"void", parameters().format + "}"};
}

namespace {

using StepDim = Dim<StepView>;
const StepDim kM{"M", &StepView::tokens}, kS{"S", &StepView::seqs}, kR{"R", &StepView::rows};
const std::vector<Field<StepView>> kStepInput{
    {"token_ids", &StepView::token_ids, {kM}},
    {"positions", &StepView::positions, {kM}},
    {"slot_mapping", &StepView::slot_mapping, {kM}},
    {"query_start_loc", &StepView::query_start_loc, {kS + 1}},
    {"seq_lens", &StepView::seq_lens, {kS}},
    {"block_tables", &StepView::block_tables, {kS, StepDim{"blocks", &StepView::table_width}}},
    {"logits_rows", &StepView::logits_rows, {kR}},
    {"state_slots", &StepView::state_slots, {kS}},
    {"adapters", &StepView::adapters, {kS}},
};
const Field<StepView> kStepLogits{"logits", &StepView::logits, {kR, StepDim{"V", &StepView::logits_width}}};

using SampleDim = Dim<SampleView>;
const SampleDim kD{"D", &SampleView::draws}, kBiases{"biases", &SampleView::biases};
const std::vector<Field<SampleView>> kSampleInput{
    {"parameters", &SampleView::parameters, {kD}},
    {"rows", &SampleView::rows, {kD}},
    {"token_ids", &SampleView::token_ids, {kD}},
    {"positions", &SampleView::positions, {kD}},
    {"num_logprobs", &SampleView::num_logprobs, {kD}},
    {"mask_rows", &SampleView::mask_rows, {kD}},
    {"masks", &SampleView::masks, {SampleDim{"masks", &SampleView::num_masks}, SampleDim{"words", &SampleView::words}}},
    {"bias_start", &SampleView::bias_start, {kD + 1}},
    {"bias_ids", &SampleView::bias_ids, {kBiases}},
    {"bias_values", &SampleView::bias_values, {kBiases}},
    {"history_start", &SampleView::history_start, {kD + 1}},
    {"output_start", &SampleView::output_start, {kD}},
    {"history", &SampleView::history, {SampleDim{"tokens", &SampleView::tokens}}},
};
const SampleDim kWidth{"width", &SampleView::width};
const std::vector<Field<SampleView>> kSampleOutput{
    {"token_ids", &SampleView::out_ids, {kD}},
    {"logprobs", &SampleView::out_logprobs, {kD}},
    {"top_ids", &SampleView::top_ids, {kD, kWidth}},
    {"top_logprobs", &SampleView::top_logprobs, {kD, kWidth}},
};
const Field<SampleView> kSampleLogits{
    "logits", &SampleView::logits, {SampleDim{"R", &SampleView::num_rows}, SampleDim{"V", &SampleView::vocab}}};

template <class View>
Description describe(const std::vector<Field<View>>& fields) {
  Description description;
  for (const Field<View>& field : fields) description.push_back(field.describe());
  return description;
}

// What an array holds, and the array with it.
template <class T, class Array>
std::shared_ptr<const T> held(const Array& array) {
  return {std::make_shared<Array>(array), static_cast<const T*>(array.data())};
}

KvType kv_type(const std::string& name) {
  if (name == "float32") return KvType::kFloat32;
  if (name == "bf16") return KvType::kBfloat16;
  if (name == "int8") return KvType::kInt8;
  throw std::invalid_argument("kv_dtype must be float32, bf16 or int8, not " + name);
}

Curve curve(const std::string& name) {
  if (name == "silu") return Curve::kSilu;
  if (name == "gelu_tanh") return Curve::kGeluTanh;
  if (name == "gelu") return Curve::kGelu;
  if (name == "relu") return Curve::kRelu;
  if (name == "relu2") return Curve::kRelu2;
  if (name == "clamped_swiglu") return Curve::kClampedSwiglu;
  throw std::invalid_argument("curve must be silu, gelu_tanh, gelu, relu, relu2 or clamped_swiglu, not " + name);
}

// The form of a q/k norm by its weight's size: shared [head_dim], each head's own or all heads as one row, the last two
// [heads · head_dim]. Throws std::invalid_argument.
HeadNormView head_norm(const std::shared_ptr<const NormParameter>& norm, bool own, int heads, int head_dim) {
  if (!norm) return {};
  HeadNormView view{norm->view(), 0};
  const size_t size = norm->weight.size(), one = head_dim, all = static_cast<size_t>(heads) * head_dim;
  if (size != all && (own || size != one))
    throw std::invalid_argument(
        "a q or k norm's weight must be [head_dim], [heads, head_dim] or [heads · head_dim] of " +
        std::to_string(heads) + " heads of " + std::to_string(head_dim) + ", but it has " + std::to_string(size) +
        " numbers");
  if (own) {
    view.norm.n = head_dim;
    view.stride = head_dim;
  }
  return view;
}

using RopeTable = std::optional<nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>>;

std::shared_ptr<AttentionParameter> make_attention(int layer, int num_heads, int num_kv_heads, int head_dim,
                                                   float softmax_scale, int sliding_window, const RopeTable& rope_cos,
                                                   const RopeTable& rope_sin, std::vector<float> alibi_slopes,
                                                   std::vector<float> sinks, float softcap,
                                                   std::shared_ptr<NormParameter> q_norm, bool q_norm_own,
                                                   std::shared_ptr<NormParameter> k_norm, bool k_norm_own,
                                                   bool norm_after_rope) {
  if (num_heads > kMaxHeads) throw std::invalid_argument("num_heads must be at most " + std::to_string(kMaxHeads));
  if (num_heads < 1 || num_kv_heads < 1 || num_heads % num_kv_heads)
    throw std::invalid_argument("num_heads must be a multiple of num_kv_heads, not " + std::to_string(num_heads) +
                                " of " + std::to_string(num_kv_heads));
  if (head_dim < 1 || head_dim > kMaxHeadDim)
    throw std::invalid_argument("head_dim must be at most " + std::to_string(kMaxHeadDim) + ", not " +
                                std::to_string(head_dim));
  const size_t rope_pairs = rope_cos ? rope_cos->shape(1) : 0;
  if (rope_cos.has_value() != rope_sin.has_value() ||
      (rope_cos && (rope_cos->shape(0) != rope_sin->shape(0) || rope_pairs != rope_sin->shape(1) || rope_pairs < 1 ||
                    rope_pairs > static_cast<size_t>(head_dim) / 2 || rope_cos->shape(0) > INT_MAX)))
    throw std::invalid_argument("rope tables must be [positions, at most " + std::to_string(head_dim / 2) +
                                "], both alike");
  if (layer < 0) throw std::invalid_argument("layer must be at least 0, not " + std::to_string(layer));
  if (sliding_window < 0) throw std::invalid_argument("sliding_window must be positive");
  for (const auto* values : {&alibi_slopes, &sinks})
    if (!values->empty() && values->size() != static_cast<size_t>(num_heads))
      throw std::invalid_argument(std::string(values == &sinks ? "sinks" : "alibi_slopes") + " must be [num_heads]");
  if (!(softcap >= 0)) throw std::invalid_argument("softcap must be positive");
  auto attention = std::make_shared<AttentionParameter>();
  attention->layer = layer;
  if (rope_cos) {
    attention->rope_positions = static_cast<int>(rope_cos->shape(0));
    attention->rope_cos = held<float>(*rope_cos);
    attention->rope_sin = held<float>(*rope_sin);
  }
  attention->alibi_slopes = std::move(alibi_slopes);
  attention->sinks = std::move(sinks);
  attention->q_norm = q_norm;
  attention->k_norm = k_norm;
  const auto data = [](const std::vector<float>& values) { return values.empty() ? nullptr : values.data(); };
  attention->view = {num_heads,
                     num_kv_heads,
                     head_dim,
                     softmax_scale,
                     sliding_window,
                     static_cast<int>(2 * rope_pairs),
                     attention->rope_cos.get(),
                     attention->rope_sin.get(),
                     data(attention->alibi_slopes),
                     data(attention->sinks),
                     softcap,
                     head_norm(q_norm, q_norm_own, num_heads, head_dim),
                     head_norm(k_norm, k_norm_own, num_kv_heads, head_dim),
                     norm_after_rope};
  return attention;
}

std::shared_ptr<LinearParameter> make_linear(std::string name, std::shared_ptr<PackedWeight> packed,
                                             std::shared_ptr<FloatWeight> float_weight, std::vector<float> bias,
                                             Act act) {
  if (!packed == !float_weight) throw std::invalid_argument(name + ": give one weight");
  if (float_weight && act) throw std::invalid_argument(name + ": float weights need a float input");
  auto linear =
      std::make_shared<LinearParameter>(LinearParameter{std::move(name), packed, float_weight, std::move(bias), act});
  if (!linear->bias.empty() && linear->bias.size() != static_cast<size_t>(linear->n()))
    throw std::invalid_argument(linear->name + ": bias must be [N]");
  return linear;
}

using AdapterParts = std::vector<std::tuple<int, FloatMatrix, FloatMatrix, std::vector<float>>>;

FactorType factor_type(const FloatMatrix& matrix, const char* name) {
  if (matrix.dtype() == nb::dtype<int8_t>()) return FactorType::kInt8;
  return static_cast<FactorType>(float_type(matrix, name));
}

// A matrix as [blocks of `width` columns][rows][width], padded with zeros.
std::shared_ptr<void> column_blocks(const FloatMatrix& matrix, FactorType type, int width) {
  const size_t rows = matrix.shape(0), columns = matrix.shape(1), size = factor_bytes(type);
  std::shared_ptr<void> made(allocate_lines(rows * round_up(static_cast<int>(columns), width) * size), std::free);
  char* to = static_cast<char*>(made.get());
  for (size_t begin = 0; begin < columns; begin += width) {
    const size_t count = std::min<size_t>(width, columns - begin);
    for (size_t r = 0; r < rows; ++r, to += width * size) {
      std::memcpy(to, static_cast<const char*>(matrix.data()) + (r * columns + begin) * size, count * size);
      std::memset(to + count * size, 0, (width - count) * size);
    }
  }
  return made;
}

void set_adapter(AdaptersParameter& adapters, ThreadPool& pool, int slot, const AdapterParts& parts) {
  if (slot < 1 || slot >= static_cast<int>(adapters.slots.size()))
    throw std::invalid_argument("there is no slot " + std::to_string(slot));
  if (parts.size() > kMaxAdapterParts)
    throw std::invalid_argument("an adapter has at most " + std::to_string(kMaxAdapterParts) + " parts of a linear");
  std::vector<AdaptersParameter::Part> made;
  for (const auto& [first, down, up, scales] : parts) {
    const FactorType down_type = factor_type(down, "down"), up_type = factor_type(up, "up");
    const int rank = static_cast<int>(down.shape(0)), n = static_cast<int>(up.shape(1));
    if (rank < 1 || rank > kMaxRank || up.shape(0) != down.shape(0))
      throw std::invalid_argument("an adapter's rank must be within 1.." + std::to_string(kMaxRank) + ", not " +
                                  std::to_string(rank));
    if (down.shape(1) != static_cast<size_t>(adapters.k) || first < 0 || n < 1 || first > adapters.n - n)
      throw std::invalid_argument("an adapter's down must be [r, K] and its up [r, N] of the linear");
    if (scales.size() != down.shape(0)) throw std::invalid_argument("an adapter has a scale for each of its rank");
    const int k = round_up(adapters.k, kLowRankPad);
    AdaptersParameter::Part part{
        first, {}, column_blocks(down, down_type, k), column_blocks(up, up_type, kLowRankColumns), scales};
    part.view = {rank, k, n, down_type, up_type, part.scales.data(), part.down.get(), part.up.get()};
    made.push_back(std::move(part));  // a moved vector keeps its data
  }
  nb::gil_scoped_release release;
  std::lock_guard<std::mutex> lock(pool.mutex());
  adapters.slots[slot] = std::move(made);
}

// Expert e's rows are rows e · padded to e · padded + n of the packed weight, padded being n rounded up to whole
// panels.
std::shared_ptr<ExpertsParameter> make_experts(std::string name, std::shared_ptr<PackedWeight> packed,
                                               std::shared_ptr<FloatWeight> float_weight,
                                               const std::vector<float>& bias, Act act, int count, int n) {
  if (!packed == !float_weight) throw std::invalid_argument(name + ": give one weight");
  if (float_weight && act) throw std::invalid_argument(name + ": float weights need a float input");
  const Layout& layout = packed ? *packed->layout : *float_weight->layout;
  const int padded = n < 1 || n > 1 << 26 ? 0 : round_up(n, layout.panel_cols);
  if (count < 1 || !padded || (packed ? packed->n : float_weight->n) != static_cast<int64_t>(count) * padded)
    throw std::invalid_argument(name + ": the weight must hold every expert's rows in whole panels");
  if (!bias.empty() && bias.size() != static_cast<size_t>(count) * n)
    throw std::invalid_argument(name + ": bias must be [experts · N]");
  auto experts = std::make_shared<ExpertsParameter>(ExpertsParameter{std::move(name), {}});
  for (size_t e = 0; e < static_cast<size_t>(count); ++e) {
    LinearParameter one{experts->name + "." + std::to_string(e), {}, {}, {}, act};
    if (!bias.empty()) one.bias.assign(bias.begin() + e * n, bias.begin() + (e + 1) * n);
    if (packed) {
      auto* part = new PackedWeight(*packed);
      part->n = n;
      part->data += e * layout.weight_size(padded, packed->k, packed->bits);
      const size_t scales = static_cast<size_t>(padded) * ceil_div(packed->k, packed->group_size);
      part->scales = static_cast<char*>(packed->scales) + e * scales * (packed->bf16_scales ? 2 : 4);
      one.packed = {part, [packed](const PackedWeight* p) { delete p; }};
    } else {
      auto* part = new FloatWeight(*float_weight);
      part->n = n;
      part->data = static_cast<char*>(float_weight->data) +
                   e * layout.float_size(padded, float_weight->k) * float_bytes(float_weight->type);
      one.float_weight = {part, [float_weight](const FloatWeight* p) { delete p; }};
    }
    experts->experts.push_back(std::move(one));
  }
  return experts;
}

std::shared_ptr<RoutingParameter> make_routing(int num_experts, int top_k, const std::string& scoring, bool normalise,
                                               float scale, std::vector<float> bias, int groups, int top_groups,
                                               int group_best, float jitter) {
  if (num_experts < 1 || num_experts > 1 << 16 || top_k < 1 || top_k > num_experts)
    throw std::invalid_argument("top_k must be within 1..num_experts, not " + std::to_string(top_k) + " of " +
                                std::to_string(num_experts));
  const std::map<std::string, Scoring> known{
      {"softmax", Scoring::kSoftmax}, {"sigmoid", Scoring::kSigmoid}, {"sparsemixer", Scoring::kSparsemixer}};
  const auto found = known.find(scoring);
  if (found == known.end())
    throw std::invalid_argument("scoring must be softmax, sigmoid or sparsemixer, not " + scoring);
  if (!bias.empty() && bias.size() != static_cast<size_t>(num_experts))
    throw std::invalid_argument("a routing's bias must be [num_experts]");
  if (groups < 1 || num_experts % groups || top_groups < 1 || top_groups > groups || group_best < 1 ||
      group_best > num_experts / groups || top_k > top_groups * (num_experts / groups))
    throw std::invalid_argument("groups must be of equal size, and those that stay must have top_k experts");
  return std::make_shared<RoutingParameter>(RoutingParameter{num_experts, top_k, found->second, normalise, scale,
                                                             std::move(bias), groups, top_groups, group_best, jitter});
}

std::shared_ptr<ShortConvParameter> make_short_conv(std::string name, int channels, int taps, bool silu, bool gated,
                                                    std::vector<float> weight, std::vector<float> bias) {
  if (channels < 1 || channels > 1 << 24 || taps < 1 || taps > 64)
    throw std::invalid_argument(name + ": " + std::to_string(taps) + " taps of " + std::to_string(channels) +
                                " channels cannot be");
  if (weight.size() != static_cast<size_t>(channels) * taps)
    throw std::invalid_argument(name + ": weight must be [taps, channels]");
  if (!bias.empty() && bias.size() != static_cast<size_t>(channels))
    throw std::invalid_argument(name + ": bias must be [channels]");
  return std::make_shared<ShortConvParameter>(
      ShortConvParameter{std::move(name), channels, taps, silu, gated, std::move(weight), std::move(bias)});
}

std::shared_ptr<GatedDeltaParameter> make_gated_delta(std::string name, int key_heads, int value_heads, int key_dim,
                                                      int value_dim, float eps, std::vector<float> a_log,
                                                      std::vector<float> dt_bias, std::vector<float> norm_weight) {
  if (value_heads < 1 || value_heads > kMaxHeads || key_heads < 1 || value_heads % key_heads)
    throw std::invalid_argument(name + ": value_heads must be a multiple of key_heads, not " +
                                std::to_string(value_heads) + " of " + std::to_string(key_heads));
  if (key_dim < 1 || key_dim > kMaxHeadDim || value_dim < 1 || value_dim > kMaxHeadDim)
    throw std::invalid_argument(name + ": a head's dimensions must be within 1.." + std::to_string(kMaxHeadDim));
  for (const auto* values : {&a_log, &dt_bias})
    if (values->size() != static_cast<size_t>(value_heads))
      throw std::invalid_argument(name + ": a_log and dt_bias must be [value_heads]");
  if (norm_weight.size() != static_cast<size_t>(value_dim))
    throw std::invalid_argument(name + ": norm_weight must be [value_dim]");
  auto delta = std::make_shared<GatedDeltaParameter>(
      GatedDeltaParameter{std::move(name), std::move(a_log), std::move(dt_bias), std::move(norm_weight), {}});
  delta->view = {key_heads,
                 value_heads,
                 key_dim,
                 value_dim,
                 eps,
                 delta->a_log.data(),
                 delta->dt_bias.data(),
                 delta->norm_weight.data()};
  return delta;
}

std::shared_ptr<StateSpaceParameter> make_state_space(std::string name, int heads, int head_dim, int groups, int state,
                                                      float dt_min, float dt_max, float eps, bool gate_last,
                                                      std::vector<float> a_log, std::vector<float> d,
                                                      std::vector<float> dt_bias, std::vector<float> norm_weight) {
  if (heads < 1 || heads > 1 << 20 || groups < 1 || heads % groups)
    throw std::invalid_argument(name + ": heads must be a multiple of groups, not " + std::to_string(heads) + " of " +
                                std::to_string(groups));
  if (head_dim < 1 || head_dim > kMaxHeadDim || state < 1 || state > 1 << 12)
    throw std::invalid_argument(name + ": a head's state must be within 1.." + std::to_string(1 << 12) + " of 1.." +
                                std::to_string(kMaxHeadDim));
  const size_t count = heads;
  const bool own = a_log.size() != count;
  if (own && (a_log.size() != count * state || head_dim != 1 || groups != 1))
    throw std::invalid_argument(name + ": a_log must be [heads], or [state, heads] of heads with one channel");
  if (d.size() != count || dt_bias.size() != count)
    throw std::invalid_argument(name + ": d and dt_bias must be [heads]");
  if (!norm_weight.empty() && norm_weight.size() != count * head_dim)
    throw std::invalid_argument(name + ": norm_weight must be [heads * head_dim]");
  for (float& each : a_log) each = static_cast<float>(-own_exp(each));
  auto space = std::make_shared<StateSpaceParameter>(StateSpaceParameter{
      std::move(name), std::move(a_log), std::move(d), std::move(dt_bias), std::move(norm_weight), {}});
  space->view = {heads,
                 head_dim,
                 groups,
                 state,
                 dt_min,
                 dt_max,
                 eps,
                 own,
                 gate_last,
                 space->a.data(),
                 space->d.data(),
                 space->dt_bias.data(),
                 space->norm_weight.empty() ? nullptr : space->norm_weight.data()};
  return space;
}

}  // namespace
}  // namespace fptq

NB_MODULE(_native, m) {
  using namespace fptq;

  m.def("available_isas", &available_isas, "ISA paths that this build and this CPU have, best first.");
  m.def("sources", &sources, "SHA-256 of what the kernels were compiled from: of one all ISAs compute the same bits.");
  m.def(
      "kernel_names",
      [](const std::string& isa) {
        const Kernels& kernels = kernels_for(isa);
        return std::vector<std::string>{kernels.isa, kernels.gemm_int4_name, kernels.gemm_int8_name,
                                        kernels.gemm_float_name};
      },
      "isa"_a, "[ISA path, int4 GEMM, int8 GEMM, float GEMM]. Empty: the best path. Raises ValueError.");
  m.def(
      "kv_token_bytes",
      [](const std::string& kv_dtype, int num_kv_heads, int head_dim) {
        if (num_kv_heads < 1 || num_kv_heads > kMaxHeads || head_dim < 1 || head_dim > kMaxHeadDim)
          throw std::invalid_argument("a cache of " + std::to_string(num_kv_heads) + " KV heads of " +
                                      std::to_string(head_dim) + " cannot be");
        const KvCache one{kv_type(kv_dtype), 1, num_kv_heads, head_dim, 0, nullptr};
        return num_kv_heads * one.head_bytes();
      },
      "kv_dtype"_a, "num_kv_heads"_a, "head_dim"_a, "What a layer's cache takes for a token.");

  bind_gemm(m);

  nb::class_<ThreadPool>(m, "ThreadPool")
      .def(nb::init<int>(), "threads"_a)
      .def_prop_ro("threads", &ThreadPool::threads);

  nb::class_<EmbeddingParameter>(m, "Embedding")
      .def(
          "__init__",
          [](EmbeddingParameter* self, const FloatMatrix& table) {
            const FloatType type = float_type(table, "an embedding");
            new (self) EmbeddingParameter{held<void>(table), type, static_cast<int>(table.shape(0)),
                                          static_cast<int>(table.shape(1))};
          },
          "table"_a, nb::sig("def __init__(self, table: numpy.typing.NDArray[numpy.floating | numpy.int16]) -> None"),
          "table [vocab, width]: float32, float16, or the bits of bfloat16 as int16; read where it lies.");

  nb::class_<NormParameter>(m, "Norm").def(
      "__init__",
      [](NormParameter* self, std::vector<float> weight, std::vector<float> bias, float eps, bool layer) {
        if (!bias.empty() && bias.size() != weight.size())
          throw std::invalid_argument("a norm's bias must be as wide as its weight");
        new (self) NormParameter{std::move(weight), std::move(bias), eps, layer};
      },
      "weight"_a, "bias"_a, "eps"_a, "layer"_a);

  nb::class_<LinearParameter>(m, "Linear")
      .def(nb::new_(&make_linear), "name"_a, "packed"_a.none(), "float_weight"_a.none(), "bias"_a, "act"_a.none());

  nb::class_<AdaptersParameter>(m, "Adapters")
      .def(nb::new_([](const LinearParameter& linear, int slots) {
             if (slots < 1 || slots > 1 << 16) throw std::invalid_argument("there must be a slot");
             auto adapters = std::make_shared<AdaptersParameter>(AdaptersParameter{linear.n(), linear.k(), {}});
             adapters->slots.resize(slots + 1);
             return adapters;
           }),
           "linear"_a, "slots"_a)
      .def("set", &set_adapter, "pool"_a, "slot"_a, "parts"_a,
           nb::sig("def set(self, pool: ThreadPool, slot: int, parts: list[tuple[int, "
                   "numpy.typing.NDArray[numpy.floating | numpy.int16 | numpy.int8], "
                   "numpy.typing.NDArray[numpy.floating | numpy.int16 | numpy.int8], "
                   "list[float]]]) -> None"),
           "parts: (first column, down [r, K], up transposed [r, N], scales [r]) each; none: the slot adds nothing. "
           "Waits "
           "for a step that runs. Raises ValueError.");

  nb::class_<ExpertsParameter>(m, "Experts")
      .def(nb::new_(&make_experts), "name"_a, "packed"_a.none(), "float_weight"_a.none(), "bias"_a, "act"_a.none(),
           "count"_a, "n"_a);

  nb::class_<RoutingParameter>(m, "Routing")
      .def(nb::new_(&make_routing), nb::kw_only(), "num_experts"_a, "top_k"_a, "scoring"_a, "normalise"_a, "scale"_a,
           "bias"_a, "groups"_a, "top_groups"_a, "group_best"_a, "jitter"_a);

  nb::class_<AttentionParameter>(m, "Attention")
      .def(nb::new_(&make_attention), nb::kw_only(), "layer"_a, "num_heads"_a, "num_kv_heads"_a, "head_dim"_a,
           "softmax_scale"_a, "sliding_window"_a, "rope_cos"_a.none(), "rope_sin"_a.none(), "alibi_slopes"_a, "sinks"_a,
           "softcap"_a, "q_norm"_a.none(), "q_norm_own"_a, "k_norm"_a.none(), "k_norm_own"_a, "norm_after_rope"_a);

  nb::class_<ShortConvParameter>(m, "ShortConv")
      .def(nb::new_(&make_short_conv), "name"_a, "channels"_a, "taps"_a, "silu"_a, "gated"_a, "weight"_a, "bias"_a);

  nb::class_<GatedDeltaParameter>(m, "GatedDelta")
      .def(nb::new_(&make_gated_delta), "name"_a, "key_heads"_a, "value_heads"_a, "key_dim"_a, "value_dim"_a, "eps"_a,
           "a_log"_a, "dt_bias"_a, "norm_weight"_a);

  nb::class_<StateSpaceParameter>(m, "StateSpace")
      .def(nb::new_(&make_state_space), "name"_a, "heads"_a, "head_dim"_a, "groups"_a, "state"_a, "dt_min"_a,
           "dt_max"_a, "eps"_a, "gate_last"_a, "a_log"_a, "d"_a, "dt_bias"_a, "norm_weight"_a);

  nb::class_<Program>(m, "Program")
      .def(
          "__init__",
          [](Program* self, std::shared_ptr<ThreadPool> pool, const std::string& isa, int max_tokens, int max_seqs,
             int max_logits_rows, int max_model_len, int num_blocks, int block_size, const std::string& kv_dtype,
             int num_layers, int num_kv_heads, int head_dim, int kept_states, const Program* sharing) {
            new (self) Program(std::move(pool), isa,
                               Limits{max_tokens, max_seqs, max_logits_rows, max_model_len, num_blocks, block_size,
                                      kv_type(kv_dtype), num_layers, num_kv_heads, head_dim, kept_states},
                               sharing);
          },
          "pool"_a, "isa"_a, nb::kw_only(), "max_tokens"_a, "max_seqs"_a, "max_logits_rows"_a, "max_model_len"_a,
          "num_blocks"_a, "block_size"_a, "kv_dtype"_a, "num_layers"_a, "num_kv_heads"_a, "head_dim"_a,
          "kept_states"_a = 0, "sharing"_a.none() = nb::none())
      .def("embed", &Program::embed, "table"_a)
      .def("embed_positions", &Program::embed_positions, "table"_a)
      .def("columns", &Program::columns, "xs"_a, "index"_a)
      .def("norm", &Program::norm, "x"_a, "norm"_a, "act"_a.none())
      .def("quantize", &Program::quantize, "x"_a, "act"_a.none())
      .def("linear", &Program::linear, "x"_a, "linear"_a, "residual"_a.none())
      .def("adapt", &Program::adapt, "x"_a, "y"_a, "adapters"_a)
      .def(
          "activation",
          [](Program& program, int x, const std::string& name, bool gated, float limit, Act act) {
            return program.activation(x, {curve(name), gated, limit}, act);
          },
          "x"_a, "curve"_a, "gated"_a, "limit"_a, "act"_a.none())
      .def("add", &Program::add, "x"_a, "y"_a)
      .def("scale", &Program::scale, "x"_a, "factor"_a)
      .def("softcap", &Program::softcap, "x"_a, "cap"_a)
      .def("rope_and_cache", &Program::rope_and_cache, "qkv"_a, "attention"_a)
      .def("attention", &Program::attention, "q"_a, "attention"_a, "act"_a.none(), "selected"_a)
      .def("short_conv", &Program::short_conv, "x"_a, "conv"_a)
      .def("gated_delta", &Program::gated_delta, "x"_a, "ba"_a, "delta"_a)
      .def("state_space", &Program::state_space, "x"_a, "space"_a)
      .def("select_rows", &Program::select_rows, "x"_a)
      .def("route", &Program::route, "logits"_a, "routing"_a)
      .def("dispatch", &Program::dispatch, "x"_a, "routed"_a)
      .def("experts", &Program::experts, "x"_a, "experts"_a, "routed"_a)
      .def("combine", &Program::combine, "x"_a, "routed"_a, "residual"_a.none())
      .def("gate", &Program::gate, "x"_a, "logit"_a)
      .def("finish", &Program::finish, "logits"_a)
      .def("copy_state", &Program::copy_state, "source"_a, "target"_a)
      .def_prop_ro("logits_width", &Program::logits_width)
      .def_prop_ro(
          "blocks",
          [](const Program& program) {
            return nb::ndarray<nb::numpy, uint8_t, nb::ndim<2>>(program.blocks(),
                                                                {program.num_blocks(), program.block_bytes()});
          },
          nb::rv_policy::reference_internal, "Keys and values, [blocks, bytes].")
      .def_prop_ro("seconds", &Program::seconds, "Spent in all steps so far, by kind of op.")
      .def(
          "work",
          [](const Program& program, int tokens, int rows) {
            const Work work = program.work(tokens, rows);
            return std::pair(work.multiply_adds, work.weight_bytes);
          },
          "tokens"_a, "rows"_a, "(multiply-adds, bytes of weights) of a step's linears.")
      .def(
          "step",
          [](Program& program, nb::handle batch, nb::handle logits) {
            HeldArrays held;
            StepView view;
            held.read(kStepInput, batch, view);
            held.read(kStepLogits, logits, view);
            nb::gil_scoped_release release;
            program.step(view);
          },
          "batch"_a, "logits"_a,
          nb::sig("def step(self, batch: fptq_runtime.kernels.base.StepInput, "
                  "logits: fptq_runtime.kernels.base.Float32Array) -> None"),
          "Run a StepInput into float32 logits [R, V]. Raises ValueError before writing.");

  nb::class_<Sampler>(m, "Sampler")
      .def(
          "__init__",
          [](Sampler* self, std::shared_ptr<ThreadPool> pool, const std::string& isa) {
            new (self) Sampler(std::move(pool), isa);
          },
          "pool"_a, "isa"_a)
      .def(
          "run",
          [](Sampler& sampler, nb::handle logits, nb::handle batch, nb::handle out) {
            HeldArrays held;
            SampleView view;
            held.read(kSampleLogits, logits, view);
            held.read(kSampleInput, batch, view);
            held.read(kSampleOutput, out, view);
            nb::gil_scoped_release release;
            sampler.run(view);
          },
          "logits"_a, "batch"_a, "out"_a,
          nb::sig("def run(self, logits: fptq_runtime.kernels.base.Float32Array, "
                  "batch: fptq_runtime.kernels.base.SampleInput, "
                  "out: fptq_runtime.kernels.base.SampleOutput) -> None"),
          "Draw a SampleInput from float32 logits [R, V] into a SampleOutput. Raises ValueError before writing.");

  m.def(
      "contracts",
      [] {
        return std::map<std::string, Description>{{"StepInput", describe(kStepInput)},
                                                  {"SampleInput", describe(kSampleInput)},
                                                  {"SampleOutput", describe(kSampleOutput)},
                                                  {"PARAMETERS", parameters().description}};
      },
      "What kernels/base.py's dataclasses of arrays must hold, (name, dtype, shape) each; offset for PARAMETERS.");
}
