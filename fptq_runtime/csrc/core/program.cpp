#include "core/program.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <stdexcept>
#include <tuple>

#include "core/math.h"
#include "core/pack.h"

namespace fptq {

namespace {

constexpr size_t kLine = 64;
constexpr long kMinParallelFloats = 8192;  // below these, waking the pool costs more than the work
constexpr double kMinParallelProducts = 150e3;
constexpr long kMinParallelAttention = 4096;  // of chunks · (rows + kChunkCost) · head_dim
constexpr int kChunkCost = 4;                 // rows that fetching a chunk costs as much as
constexpr int kRowPanels = 16;                // a tile's activations stay in L2 while its panels stream past
constexpr int kScratch = 1 << 14;             // floats of gate and up at once, or a panel of each for a tile
constexpr int kMinSplitChunks = 2;
constexpr int kConvChannels = 256;  // of a task: a row of them is in L1
constexpr int kExpertTasks = 4;     // for each thread, where few experts are active
constexpr int kMaxCount = 1 << 30;  // of tokens, rows, sequences and blocks
constexpr size_t kMaxPartials = size_t{16} << 20;

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::string message;
  const auto text = [](const auto& part) {
    if constexpr (std::is_arithmetic_v<std::decay_t<decltype(part)>>) return std::to_string(part);
    else return std::string(part);
  };
  ((message += text(parts)), ...);
  throw std::invalid_argument(message);
}

void check_range(const char* name, int index, long value, long end) {
  if (value < 0 || value >= end) refuse(name, "[", index, "] is ", value, ", not within 0..", end - 1);
}

std::string linear_kind(const LinearParameter& linear) {
  return "linear " + std::to_string(linear.n()) + " x " + std::to_string(linear.k());
}

int64_t weight_bytes(const LinearParameter& linear) {
  const int64_t n = linear.n(), k = linear.k();
  if (!linear.packed) return n * k * float_bytes(linear.float_weight->type);
  const PackedWeight& packed = *linear.packed;
  return n * k * packed.bits / 8 +
         n * ceil_div(linear.k(), packed.group_size) * static_cast<int64_t>(packed.bf16_scales ? 2 : 4);
}

size_t lines(size_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

}  // namespace

Program::Program(std::shared_ptr<ThreadPool> pool, const std::string& isa, const Limits& limits, const Program* sharing)
    : pool_(std::move(pool)),
      kernels_(kernels_for(isa)),
      layout_(*kernels_.layout),
      limits_(limits),
      scratch_size_(std::max(kScratch, 2 * layout_.panel_cols * kRowPanels * layout_.tile_rows)) {
  const auto positive = [](const char* name, int value, int most = kMaxCount) {
    if (value < 1 || value > most) refuse(name, " must be within 1..", most, ", not ", value);
  };
  positive("max_tokens", limits.max_tokens);
  positive("max_seqs", limits.max_seqs);
  if (limits.kept_states < 0 || limits.kept_states > kMaxCount)
    refuse("kept_states must be within 0..", kMaxCount, ", not ", limits.kept_states);
  positive("max_logits_rows", limits.max_logits_rows);
  positive("max_model_len", limits.max_model_len);
  positive("num_blocks", limits.num_blocks);
  positive("num_layers", limits.num_layers, kMaxLayers);
  positive("num_kv_heads", limits.num_kv_heads, kMaxHeads);
  positive("head_dim", limits.head_dim, kMaxHeadDim);
  if (limits.block_size < kKeyBlock || kKvChunk % limits.block_size)
    refuse("block_size must be 16, 32, 64 or 128, not ", limits.block_size);
  if (limits.num_blocks > std::numeric_limits<int32_t>::max() / limits.block_size)
    refuse("num_blocks · block_size must fit in 32 bits, num_blocks is ", limits.num_blocks);

  if (sharing) {
    const auto shape = [](const Limits& l) {
      return std::tuple(l.num_blocks, l.block_size, l.kv_type, l.num_layers, l.num_kv_heads, l.head_dim);
    };
    if (shape(sharing->limits_) != shape(limits)) refuse("a cache is shared by programs with the same limits of it");
    cache_memory_ = sharing->cache_memory_;
    cache_ = sharing->cache_;
    return;
  }
  KvCache cache{limits.kv_type, limits.block_size, limits.num_kv_heads, limits.head_dim, 0, nullptr};
  const size_t layer_bytes = limits.num_kv_heads * cache.head_bytes();
  cache.block_bytes = limits.num_layers * layer_bytes;
  size_t cache_bytes;
  if (__builtin_mul_overflow(limits.num_blocks, cache.block_bytes, &cache_bytes)) throw std::bad_alloc();
  cache.data = allocate(cache_bytes);
  cache_memory_ = std::move(memory_.back());
  memory_.pop_back();
  use_huge_pages(cache.data, cache_bytes);
  for (int layer = 0; layer < limits.num_layers; ++layer, cache.data += layer_bytes) cache_.push_back(cache);
}

// Zeroed, and touched page by page as it is used.
char* Program::allocate(size_t bytes) {
  void* memory = bytes > PTRDIFF_MAX - 2 * kLine ? nullptr : std::calloc(1, bytes + 2 * kLine);
  if (!memory) throw std::bad_alloc();
  memory_.emplace_back(static_cast<char*>(memory), std::free);
  return reinterpret_cast<char*>(lines(reinterpret_cast<size_t>(memory)));
}

const Program::Value& Program::value(int id, const char* op) const {
  if (id < 0 || id >= static_cast<int>(values_.size())) refuse(op, ": no value ", id);
  if (logits_ >= 0) refuse(op, ": the program is finished");
  return values_[id];
}

const Program::Value& Program::float_value(int id, int width, const char* op, int route) const {
  const Value& x = value(id, op);
  if (x.route != route) refuse(op, route < 0 ? " reads rows that were not dispatched" : " reads rows of another route");
  if (x.act) refuse(op, " reads floats, but its input is quantized");
  if (x.width != width) refuse(op, " reads rows of ", width, ", but its input has ", x.width);
  return x;
}

int Program::define(std::string kind, int width, bool selected, Act act, std::vector<int> reads,
                    std::vector<int> in_place) {
  if (logits_ >= 0) refuse("the program is finished");
  if (act && !(std::isfinite(*act) && *act >= 0)) refuse("a static activation scale must be positive and finite");
  const int write = static_cast<int>(values_.size());
  for (int id : reads) values_[id].last_use = static_cast<int>(ops_.size());
  values_.push_back({width, selected, act, static_cast<int>(ops_.size())});
  ops_.push_back({std::move(kind), std::move(reads), write, std::move(in_place)});
  return write;
}

void Program::record(std::function<void(const StepView&)> run) { ops_.back().run = std::move(run); }

float* Program::floats(int id, const StepView& step) const {
  return values_[id].data ? reinterpret_cast<float*>(values_[id].data) : step.logits;
}

// A quantized value's memory: codes, scales, sums, each on its own lines, sized for `capacity` rows.
size_t Program::bytes(const Value& value) const {
  const size_t rows = capacity(value);
  if (!value.act) return lines(rows * value.width * sizeof(float));
  const size_t apart = parts(value);
  return lines(layout_.codes_size(rows, value.width) + apart * layout_.codes_size(1, value.width)) +
         lines(rows * sizeof(float)) +
         lines((layout_.sums_size(rows, value.width) + apart * layout_.sums_size(1, value.width)) * sizeof(int32_t));
}

// How many experts' rows lie each in panels of their own, at most.
size_t Program::parts(const Value& value) const {
  return value.route < 0 ? 0 : std::min<size_t>(routes_[value.route]->parameter->num_experts, capacity(value));
}

Activations Program::activations(int id, const StepView& step) const {
  const Value& value = values_[id];
  const size_t rows = capacity(value);
  char* scales =
      value.data + lines(layout_.codes_size(rows, value.width) + parts(value) * layout_.codes_size(1, value.width));
  char* sums = scales + lines(rows * sizeof(float));
  return {reinterpret_cast<int8_t*>(value.data), reinterpret_cast<float*>(scales), reinterpret_cast<int32_t*>(sums),
          this->rows(id, step), value.width};
}

std::vector<Activations> Program::expert_activations(int id, const StepView& step) const {
  const std::vector<int32_t>& starts = routes_[values_[id].route]->dispatch.starts;
  Activations next = activations(id, step);
  std::vector<Activations> each(starts.size() - 1, next);
  for (size_t e = 0; e < each.size(); ++e) {
    next.rows = starts[e + 1] - starts[e];
    each[e] = next;
    if (next.rows == 0) continue;
    next.codes += layout_.codes_size(next.rows, next.k);
    next.scales += next.rows;
    next.sums += layout_.sums_size(next.rows, next.k);
  }
  return each;
}

// f(row, thread) for each row of a value. Rows of one activation panel share cache lines, so a task takes whole panels
// where there are enough of them.
template <class F>
void Program::each_row(int id, const StepView& step, F f) const {
  const int rows = this->rows(id, step);
  if (static_cast<long>(rows) * values_[id].width < kMinParallelFloats) {
    for (int row = 0; row < rows; ++row) f(row, 0);
    return;
  }
  const int tile = layout_.tile_rows;
  if (rows < 4 * tile * pool_->threads()) return pool_->run(rows, f);
  pool_->run(count_panels(rows, tile), [&](int task, int thread) {
    for (int row = panel_begin(task, rows, tile); row < panel_begin(task + 1, rows, tile); ++row) f(row, thread);
  });
}

template <class F>
void Program::record_rows(int x, int out, F f) {
  const size_t in_width = values_[x].width, width = values_[out].width;
  const Act act = values_[out].act;
  record([=, this_ = this](const StepView& step) {
    const float* in = this_->floats(x, step);
    if (!act) {
      float* y = this_->floats(out, step);
      this_->each_row(out, step, [&](int row, int) { f(in + row * in_width, y + row * width); });
      return;
    }
    if (this_->values_[out].route >= 0) {
      const Dispatch& dispatch = this_->routes_[this_->values_[out].route]->dispatch;
      std::vector<Activations> each = this_->expert_activations(out, step);
      this_->each_row(out, step, [&](int row, int thread) {
        float* scratch = this_->scratch_[thread].data();
        f(in + row * in_width, scratch);
        const int expert = dispatch.readers[row];
        this_->kernels_.quantize_row(scratch, row - dispatch.starts[expert], *act, each[expert]);
      });
      return;
    }
    Activations y = this_->activations(out, step);
    this_->each_row(out, step, [&](int row, int thread) {
      float* scratch = this_->scratch_[thread].data();
      f(in + row * in_width, scratch);
      this_->kernels_.quantize_row(scratch, row, *act, y);
    });
  });
}

int Program::embed(std::shared_ptr<const EmbeddingParameter> table) {
  vocab_ = vocab_ ? std::min(vocab_, table->vocab) : table->vocab;
  return gather(table, &StepView::token_ids);
}

int Program::embed_positions(std::shared_ptr<const EmbeddingParameter> table) {
  if (table->vocab < limits_.max_model_len)
    refuse("max_model_len ", limits_.max_model_len, " exceeds the position embedding's ", table->vocab, " positions");
  return gather(table, &StepView::positions);
}

int Program::gather(std::shared_ptr<const EmbeddingParameter> table, const int32_t* StepView::* indices) {
  const int out = define("embed", table->width, false, {}, {});
  const size_t row_bytes = table->width * float_bytes(table->type);
  record([=, this_ = this](const StepView& step) {
    float* y = this_->floats(out, step);
    this_->each_row(out, step, [&](int row, int) {
      this_->kernels_.widen_row(static_cast<const char*>(table->data.get()) + (step.*indices)[row] * row_bytes,
                                table->type, table->width, y + static_cast<size_t>(row) * table->width);
    });
  });
  return out;
}

// Columns that follow one another are copied together.
int Program::columns(const std::vector<int>& xs, const std::vector<int32_t>& index) {
  struct Run {
    int from;  // of xs; -1: zeros
    size_t column, to, count;
  };
  if (xs.empty() || index.empty() || index.size() > kMaxCount) refuse("columns: there must be some");
  const bool selected = value(xs.front(), "columns").selected;
  for (int x : xs)
    if (float_value(x, value(x, "columns").width, "columns").selected != selected)
      refuse("columns: its inputs have different rows");
  std::vector<Run> runs;
  for (size_t to = 0; to < index.size(); ++to) {
    int from = -1;
    long column = index[to];
    if (column >= 0)
      for (from = 0; from < static_cast<int>(xs.size()) && column >= values_[xs[from]].width; ++from)
        column -= values_[xs[from]].width;
    if (column < -1 || from == static_cast<int>(xs.size())) refuse("columns: there is no column ", index[to]);
    Run* last = runs.empty() ? nullptr : &runs.back();
    if (last && last->from == from && (from < 0 || last->column + last->count == static_cast<size_t>(column)))
      ++last->count;
    else runs.push_back({from, static_cast<size_t>(std::max(column, 0L)), to, 1});
  }
  const int width = static_cast<int>(index.size());
  const int out = define("columns", width, selected, {}, xs);
  record([=, this_ = this](const StepView& step) {
    this_->each_row(out, step, [&](int row, int) {
      float* y = this_->floats(out, step) + static_cast<size_t>(row) * width;
      for (const Run& run : runs) {
        if (run.from < 0) {
          std::memset(y + run.to, 0, run.count * sizeof(float));
          continue;
        }
        const size_t stride = this_->values_[xs[run.from]].width;
        std::memcpy(y + run.to, this_->floats(xs[run.from], step) + row * stride + run.column,
                    run.count * sizeof(float));
      }
    });
  });
  return out;
}

int Program::norm(int x, std::shared_ptr<const NormParameter> norm, Act act) {
  const NormView view = norm->view();
  const bool selected = float_value(x, view.n, "norm").selected;
  const int out = define("norm", view.n, selected, act, {x});
  record_rows(x, out,
              [=, keep = norm, &kernels = kernels_](const float* row, float* y) { kernels.norm_row(view, row, y); });
  return out;
}

int Program::activation(int x, const Activation& activation, Act act) {
  const Value in = value(x, "activation");
  const int in_width = in.width, width = activation.gated ? in_width / 2 : in_width;
  float_value(x, in_width, "activation", in.route);
  if (activation.gated && in_width % 2)
    refuse("a gated activation reads gate and up, but its input is ", in_width, " wide");
  if (activation.curve == Curve::kClampedSwiglu && !activation.gated) refuse("clamped_swiglu is always gated");
  if (!(activation.limit > 0)) refuse("an activation's limit must be positive, not ", activation.limit);
  const int out = define("activation", width, in.selected, act, {x});
  values_[out].route = in.route;
  values_[out].copies = in.copies;
  ops_.back().activation = activation;
  record_rows(x, out, [=, &kernels = kernels_](const float* row, float* y) {
    kernels.activate_row(activation, row, row + width, width, y);
  });
  return out;
}

int Program::add(int x, int y) {
  const Value a = value(x, "add");
  if (float_value(x, a.width, "add").selected != float_value(y, a.width, "add").selected)
    refuse("add: its inputs have different rows");
  const int out = define("add", a.width, a.selected, {}, {x, y}, {x, y});
  record([=, this_ = this](const StepView& step) {
    const float *left = this_->floats(x, step), *right = this_->floats(y, step);
    float* sum = this_->floats(out, step);
    this_->each_row(out, step, [&](int row, int) {
      const size_t at = static_cast<size_t>(row) * a.width;
      this_->kernels_.add_row(left + at, right + at, a.width, sum + at);
    });
  });
  return out;
}

int Program::scale(int x, float factor) {
  const Value in = value(x, "scale");
  float_value(x, in.width, "scale");
  if (!std::isfinite(factor)) refuse("scale: the factor must be finite, not ", factor);
  const int out = define("scale", in.width, in.selected, {}, {x}, {x});
  record_rows(x, out,
              [=, &kernels = kernels_](const float* row, float* y) { kernels.scale_row(row, factor, in.width, y); });
  return out;
}

int Program::softcap(int x, float cap) {
  const Value in = value(x, "softcap");
  float_value(x, in.width, "softcap");
  if (!(std::isfinite(cap) && cap > 0)) refuse("softcap: the cap must be positive and finite, not ", cap);
  const int out = define("softcap", in.width, in.selected, {}, {x}, {x});
  record_rows(x, out,
              [=, &kernels = kernels_](const float* row, float* y) { kernels.softcap_row(row, cap, in.width, y); });
  return out;
}

// A linear whose output only a gated activation reads becomes, tile by tile, activation(gate, up); the activation's op
// is left with the quantization.
void Program::fuse_gates() {
  for (size_t i = 0; i + 1 < ops_.size(); ++i) {
    Op &linear = ops_[i], &activation = ops_[i + 1];
    const Value& out = values_[activation.write];
    if (linear.linear && linear.linear->packed && linear.reads.size() == 1 && activation.activation &&
        activation.activation->gated && activation.reads.front() == linear.write &&
        values_[linear.write].last_use == static_cast<int>(i) + 1 && out.act && out.width % layout_.panel_cols == 0)
      fuse(linear, activation);
  }
}

// Each task multiplies a few panels of gate and the same of up, and what it made of them waits for the row's maximum as
// [panels][rows][panel_cols], so that a task writes and reads it in one stream.
void Program::fuse(Op& linear_op, Op& activation_op) {
  const auto linear = linear_op.linear;
  const Activation activation = *activation_op.activation;
  const int in = linear_op.reads.front(), x = linear_op.write, out = activation_op.write;
  const int width = values_[out].width, cols = layout_.panel_cols, panels = width / cols;
  const float act = *values_[out].act;
  values_[x].width = width;  // of gate and up in one
  linear_op.run = [=, this_ = this](const StepView& step) {
    const int m = this_->rows(x, step);
    float* y = this_->floats(x, step);
    const float* bias = linear->bias.empty() ? nullptr : linear->bias.data();
    const Cut cut = this_->cut(m, panels, linear->n(), linear->k());
    this_->max_bits_.assign(static_cast<size_t>(m) * cut.groups, 0);
    this_->each_tile(cut, m, panels, [&](int m0, int m1, int p0, int p1, int group, int thread) {
      float* scratch = this_->scratch_[thread].data();
      const int at_once = std::clamp(this_->scratch_size_ / (2 * cols * (m1 - m0)), 1, p1 - p0);
      for (int p = p0, count; p < p1; p += count) {
        count = std::min(at_once, p1 - p);
        const int columns = count * cols;
        Epilogue epilogue{bias, nullptr, scratch, 2 * columns, m0, p * cols};
        this_->multiply(*linear, in, epilogue, step, m0, m1, p, p + count);
        epilogue.column += width - columns;
        this_->multiply(*linear, in, epilogue, step, m0, m1, panels + p, panels + p + count);
        for (int i = 0; i < count; ++i) {
          const float* from = scratch + i * cols;
          float* to = y + (static_cast<size_t>(p + i) * m + m0) * cols;
          int32_t* max_bits = &this_->max_bits_[static_cast<size_t>(group) * m + m0];
          for (int row = m0; row < m1; ++row, from += 2 * columns, to += cols, ++max_bits)
            *max_bits = std::max(*max_bits, this_->kernels_.activate_row(activation, from, from + columns, cols, to));
        }
      }
    });
  };
  activation_op.kind = "quantize";
  activation_op.run = [=, this_ = this](const StepView& step) {
    const int m = this_->rows(x, step);
    const float* in = this_->floats(x, step);
    Activations y = this_->activations(out, step);
    const Cut cut = this_->cut(m, panels, linear->n(), linear->k());
    this_->each_tile(cut, m, panels, [&](int m0, int m1, int p0, int p1, int, int thread) {
      float* scales = this_->scratch_[thread].data();
      for (int row = m0; row < m1; ++row) {
        int32_t max_bits = 0;
        for (int group = 0; group < cut.groups; ++group)
          max_bits = std::max(max_bits, this_->max_bits_[static_cast<size_t>(group) * m + row]);
        scales[row - m0] = act > 0 ? act : activation_scale(max_bits);
      }
      for (int p = p0; p < p1; ++p)
        this_->kernels_.quantize_part(in + (static_cast<size_t>(p) * m + m0) * cols, cols, m0, m1, scales, p * cols,
                                      cols, y);
    });
  };
}

int Program::quantize(int x, Act act) {
  const Value in = value(x, "quantize");
  float_value(x, in.width, "quantize");
  if (!act) return x;
  const int out = define("quantize", in.width, in.selected, act, {x});
  record([=, this_ = this](const StepView& step) {
    const float* rows = this_->floats(x, step);
    Activations y = this_->activations(out, step);
    this_->each_row(out, step, [&](int row, int) {
      this_->kernels_.quantize_row(rows + static_cast<size_t>(row) * in.width, row, *act, y);
    });
  });
  return out;
}

int Program::linear(int x, std::shared_ptr<const LinearParameter> linear, std::optional<int> residual) {
  const Value in = value(x, linear->name.c_str());
  const int n = linear->n(), k = linear->k();
  if (in.width != k) refuse(linear->name, " reads rows of ", k, ", but its input has ", in.width);
  if (linear->layout() != &layout_) refuse(linear->name, ": packed for another ISA path");
  if (in.act != linear->act) refuse(linear->name, ": its input is not quantized as its `act` says");
  if (in.route >= 0) refuse(linear->name, " reads rows that were not dispatched");
  std::vector<int> reads{x};
  if (residual) {
    if (float_value(*residual, n, linear->name.c_str()).selected != in.selected)
      refuse(linear->name, ": input and residual have different rows");
    reads.push_back(*residual);
  }
  Work& work = in.selected ? row_work_ : token_work_;
  work.multiply_adds += static_cast<int64_t>(n) * k;
  work.weight_bytes += weight_bytes(*linear);
  const int out = define(linear_kind(*linear), n, in.selected, {}, reads,
                         residual && *residual != x ? std::vector<int>{*residual} : std::vector<int>{});
  ops_.back().linear = linear;
  record([=, this_ = this](const StepView& step) {
    const int m = this_->rows(out, step);
    const Epilogue epilogue{linear->bias.empty() ? nullptr : linear->bias.data(),
                            residual ? this_->floats(*residual, step) : nullptr, this_->floats(out, step), n};
    const int panels = ceil_div(n, this_->layout_.panel_cols);
    this_->each_tile(this_->cut(m, panels, n, k), m, panels, [&](int m0, int m1, int p0, int p1, int, int) {
      this_->multiply(*linear, x, epilogue, step, m0, m1, p0, p1);
    });
  });
  return out;
}

int Program::adapt(int x, int y, std::shared_ptr<const AdaptersParameter> adapters) {
  const Value in = value(x, "adapt");
  const int n = adapters->n, k = adapters->k, padded = round_up(k, kLowRankPad);
  if (in.width != k || in.route >= 0) refuse("adapt reads rows of ", k);
  if (float_value(y, n, "adapt").selected != in.selected) refuse("adapt: its inputs have different rows");
  const int slots = static_cast<int>(adapters->slots.size());
  adapter_slots_ = adapter_slots_ == 1 ? slots : std::min(adapter_slots_, slots);
  scratch_needed_ = std::max(scratch_needed_, kLowRankRows * (padded + kMaxRank) + padded);
  const int out = define("adapters", n, in.selected, {}, {x, y}, {y});
  record([=, this_ = this](const StepView& step) {
    const float* from = this_->floats(y, step);
    float* to = this_->floats(out, step);
    if (from != to) std::memcpy(to, from, static_cast<size_t>(this_->rows(out, step)) * n * sizeof(float));
    const std::vector<AdapterTile>& tiles = this_->adapter_tiles_[in.selected];
    if (tiles.empty()) return;
    const float* floats = in.act ? nullptr : this_->floats(x, step);
    const Activations codes = in.act ? this_->activations(x, step) : Activations{};
    const int count = static_cast<int>(tiles.size());
    const bool by_part = count < 2 * this_->pool_->threads();
    const auto run = [&](const AdapterTile& tile, size_t begin, size_t end, float* scratch) {
      const float* rows[kLowRankRows];
      float* columns[kLowRankRows];
      float *t = scratch + static_cast<size_t>(kLowRankRows) * padded, *plain = t + kLowRankRows * kMaxRank;
      for (int i = 0; i < tile.count; ++i) {
        float* row = scratch + static_cast<size_t>(i) * padded;
        rows[i] = row;
        if (floats) {
          std::memcpy(row, floats + static_cast<size_t>(tile.rows[i]) * k, k * sizeof(float));
        } else {  // the sums, of which there are fewer than half as many, then the codes
          int8_t* bytes = reinterpret_cast<int8_t*>(plain + padded / 2);
          this_->layout_.read_row(codes, tile.rows[i], bytes, reinterpret_cast<int32_t*>(plain));
          this_->kernels_.widen_codes(bytes, codes.scales[tile.rows[i]], k, row);
        }
        std::fill(row + k, row + padded, 0.0f);
      }
      const std::vector<AdaptersParameter::Part>& parts = adapters->slots[tile.slot];
      for (size_t p = begin; p < std::min(end, parts.size()); ++p) {
        for (int i = 0; i < tile.count; ++i) columns[i] = to + static_cast<size_t>(tile.rows[i]) * n + parts[p].first;
        this_->kernels_.low_rank_rows(parts[p].view, rows, columns, tile.count, t);
      }
    };
    const int splits = by_part ? kMaxAdapterParts : 1;
    this_->pool_->run(count * splits, [&](int task, int thread) {
      const AdapterTile& tile = tiles[task / splits];
      const size_t part = task % splits, parts = adapters->slots[tile.slot].size();
      if (by_part ? part < parts : parts > 0)
        run(tile, part, by_part ? part + 1 : parts, this_->scratch_[thread].data());
    });
  });
  return out;
}

std::vector<Program::AdapterTile> Program::adapter_tiles(const StepView& step, bool selected) const {
  std::vector<std::vector<int>> rows(adapter_slots_);
  for (int i = 0, s = 0; i < (selected ? step.rows : step.tokens); ++i) {
    const int row = selected ? step.logits_rows[i] : i;
    if (row < step.query_start_loc[s]) s = 0;
    while (row >= step.query_start_loc[s + 1]) ++s;
    if (step.adapters[s]) rows[step.adapters[s]].push_back(i);
  }
  std::vector<AdapterTile> tiles;
  for (int slot = 1; slot < adapter_slots_; ++slot) {
    for (size_t i = 0; i < rows[slot].size(); i += kLowRankRows) {
      AdapterTile tile{slot, {}, static_cast<int>(std::min<size_t>(kLowRankRows, rows[slot].size() - i))};
      std::copy_n(&rows[slot][i], tile.count, tile.rows);
      tiles.push_back(tile);
    }
  }
  return tiles;
}

void Program::multiply(const LinearParameter& linear, const float* x, const Activations& codes,
                       const Epilogue& epilogue, int m0, int m1, int p0, int p1) const {
  if (linear.float_weight) {
    kernels_.gemm_float(x, *linear.float_weight, epilogue, m0, m1, p0, p1);
  } else if (!linear.act) {
    kernels_.gemm_weight_only(x, *linear.packed, epilogue, m0, m1, p0, p1);
  } else {
    const auto gemm = linear.packed->bits == 4 ? kernels_.gemm_int4 : kernels_.gemm_int8;
    gemm(codes, *linear.packed, epilogue, m0, m1, p0, p1);
  }
}

void Program::multiply(const LinearParameter& linear, int x, const Epilogue& epilogue, const StepView& step, int m0,
                       int m1, int p0, int p1) const {
  multiply(linear, linear.act ? nullptr : floats(x, step), linear.act ? activations(x, step) : Activations{}, epilogue,
           m0, m1, p0, p1);
}

Program::Cut Program::cut(int m, int panels, int n, int k) const {
  if (m == 0) return {0, 0};
  const int row_blocks = ceil_div(count_panels(m, layout_.tile_rows), kRowPanels), threads = pool_->threads();
  if (threads == 1 || static_cast<double>(m) * n * k < kMinParallelProducts) return {row_blocks, 1};
  return {row_blocks, std::min(panels, ceil_div(4 * threads, row_blocks))};
}

// f(m0, m1, p0, p1, group, thread) for each tile of m rows by `panels` panels. The same tiles fall to the same threads
// whenever the cut is the same.
template <class F>
void Program::each_tile(const Cut& cut, int m, int panels, F f) const {
  const int tile = layout_.tile_rows, row_panels = count_panels(m, tile);
  pool_->run(cut.groups * cut.row_blocks, [&](int task, int thread) {
    const int group = task / cut.row_blocks, row_panel = task % cut.row_blocks * kRowPanels;
    f(panel_begin(row_panel, m, tile), panel_begin(std::min(row_panels, row_panel + kRowPanels), m, tile),
      static_cast<int>(static_cast<long>(panels) * group / cut.groups),
      static_cast<int>(static_cast<long>(panels) * (group + 1) / cut.groups), group, thread);
  });
}

void Program::check(const AttentionParameter& attention) const {
  const AttentionView& a = attention.view;
  if (attention.layer < 0 || attention.layer >= limits_.num_layers)
    refuse("attention layer ", attention.layer, " is outside the cache's ", limits_.num_layers, " layers");
  if (a.num_kv_heads != limits_.num_kv_heads || a.head_dim != limits_.head_dim)
    refuse("attention layer ", attention.layer, " does not fit the cache: ", a.num_kv_heads, " KV heads of ",
           a.head_dim, " against ", limits_.num_kv_heads, " of ", limits_.head_dim);
  if (a.rope_cos && attention.rope_positions < limits_.max_model_len)
    refuse("max_model_len ", limits_.max_model_len, " exceeds the rope table's ", attention.rope_positions,
           " positions");
}

int Program::rope_and_cache(int qkv, std::shared_ptr<const AttentionParameter> attention) {
  check(*attention);
  const AttentionView& a = attention->view;
  const int qkv_width = (a.num_heads + 2 * a.num_kv_heads) * a.head_dim, q_width = a.num_heads * a.head_dim;
  const int width = std::max(qkv_width, value(qkv, "rope_and_cache").width);
  if (float_value(qkv, width, "rope_and_cache").selected) refuse("rope_and_cache must come before select_rows");
  const int out = define("rope and cache", q_width, false, {}, {qkv});
  record([=, this_ = this](const StepView& step) {
    const float* in = this_->floats(qkv, step);
    float* q = this_->floats(out, step);
    const KvCache& cache = this_->cache_[attention->layer];
    this_->each_row(qkv, step, [&](int row, int thread) {
      this_->kernels_.rope_and_cache_row(attention->view, cache, step.positions[row], step.slot_mapping[row],
                                         in + static_cast<size_t>(row + 1) * width - qkv_width,
                                         q + static_cast<size_t>(row) * q_width, this_->scratch_[thread].data());
    });
  });
  return out;
}

int Program::attention(int q, std::shared_ptr<const AttentionParameter> attention, Act act, bool selected) {
  check(*attention);
  const int width = attention->view.num_heads * attention->view.head_dim;
  if (float_value(q, width, "attention").selected) refuse("attention must come before select_rows");
  const int out = define("attention", width, selected, {}, {q});
  record([=, this_ = this](const StepView& step) {
    this_->attend(*attention, this_->floats(q, step), this_->floats(out, step), selected, step);
  });
  return quantize(out, act);
}

// One task for each (sequence, KV head, some query rows). Those that would leave a thread waiting are split into parts
// of whole KV chunks, whose partial softmaxes are merged in order afterwards.
void Program::attend(const AttentionParameter& attention, const float* q, float* out, bool selected,
                     const StepView& step) {
  const AttentionView& a = attention.view;
  const KvCache& cache = cache_[attention.layer];
  const int group = a.num_heads / a.num_kv_heads;
  const int heads = std::min(group, kTileQueries), tokens = kTileQueries / heads;

  tiles_.clear();
  long work = 0;
  const auto cost = [](const AttentionTile& tile) {
    return static_cast<long>(tile.chunks) * (tile.tokens * tile.heads + kChunkCost);
  };
  const size_t width = static_cast<size_t>(a.num_heads) * a.head_dim;
  // Rows begin to end - 1 of sequence s, whose outputs lie together from row `to` on.
  const auto add = [&](int s, int begin, int end, int to) {
    for (int h = 0; h < a.num_kv_heads; ++h) {
      for (int head = 0; head < group; head += heads) {
        for (int row = begin; row < end; row += tokens) {
          AttentionTile tile{q + row * width,
                             out + (to + row - begin) * width,
                             step.block_tables + static_cast<size_t>(s) * step.table_width,
                             step.positions[row],
                             std::min(tokens, end - row),
                             h,
                             h * group + head,
                             std::min(heads, group - head),
                             0,
                             0,
                             nullptr};
          const int last = tile.position + tile.tokens - 1;
          if (a.sliding_window) tile.first_chunk = std::max(0, tile.position - a.sliding_window + 1) / kKvChunk;
          tile.chunks = last / kKvChunk - tile.first_chunk + 1;
          work += cost(tile);
          tiles_.push_back(tile);
        }
      }
    }
  };
  if (selected) {
    for (int i = 0, next; i < step.rows; i = next) {
      const int row = step.logits_rows[i];
      const int32_t* after = std::upper_bound(step.query_start_loc, step.query_start_loc + step.seqs + 1, row);
      for (next = i + 1; next < step.rows && step.logits_rows[next] == row + next - i && row + next - i < *after;)
        ++next;
      add(static_cast<int>(after - step.query_start_loc) - 1, row, row + next - i, i);
    }
  } else {
    for (int s = 0; s < step.seqs; ++s)
      add(s, step.query_start_loc[s], step.query_start_loc[s + 1], step.query_start_loc[s]);
  }

  const int threads = pool_->threads();
  if (threads == 1 || work * a.head_dim < kMinParallelAttention) {
    for (const AttentionTile& tile : tiles_)
      kernels_.attention_tile(a, cache, tile, &tile == &tiles_.back() ? nullptr : &tile + 1);
    return;
  }

  const long share = std::max(work / (4 * threads), 1L);
  const auto pieces = [&](const AttentionTile& tile) {
    return static_cast<int>(std::min<long>(tile.chunks / kMinSplitChunks, cost(tile) / share));
  };
  const auto chunk_floats = [&](const AttentionTile& tile) {
    return static_cast<size_t>(tile.tokens) * tile.heads * partial_size(cache.padded_dim());
  };
  size_t floats = 0;
  for (const AttentionTile& tile : tiles_)
    if (pieces(tile) > 1) floats += tile.chunks * chunk_floats(tile);
  const bool split = floats <= kMaxPartials;
  if (split && partials_.size() < floats) partials_.resize(floats);

  parts_.clear();
  split_.clear();
  float* next = partials_.data();
  for (AttentionTile& tile : tiles_) {
    const int parts = split ? pieces(tile) : 1;
    if (parts < 2) {
      parts_.push_back(tile);
      continue;
    }
    tile.partials = next;
    next += tile.chunks * chunk_floats(tile);
    split_.push_back(tile);
    for (int i = 0; i < parts; ++i) {
      const int chunk = tile.chunks * i / parts;
      AttentionTile part = tile;
      part.first_chunk += chunk;
      part.chunks = tile.chunks * (i + 1) / parts - chunk;
      part.partials += chunk * chunk_floats(tile);
      parts_.push_back(part);
    }
  }
  const int count = static_cast<int>(parts_.size());
  pool_->run(count, [&](int task, int) {
    kernels_.attention_tile(a, cache, parts_[task], task + 1 < count ? &parts_[task + 1] : nullptr);
  });
  pool_->run(static_cast<int>(split_.size()), [&](int task, int) { kernels_.merge_partials(a, split_[task]); });
}

template <class F>
void Program::record_states(size_t floats, int parts, double work, F f) {
  state_lengths_.resize(limits_.num_states());
  float* states = reinterpret_cast<float*>(allocate(floats * limits_.num_states() * sizeof(float)));
  states_.push_back({states, floats});
  record([=, this_ = this](const StepView& step) {
    const auto state = [&](int s) { return states + floats * step.state_slots[s]; };
    const auto count = [&](int s) { return step.query_start_loc[s + 1] - step.query_start_loc[s]; };
    for (int s = 0; s < step.seqs; ++s)
      if (count(s) == step.seq_lens[s]) std::memset(state(s), 0, floats * sizeof(float));
    const auto run = [&](int task, int) {
      const int s = task / parts;
      if (count(s)) f(step, step.query_start_loc[s], count(s), state(s), task % parts);
    };
    if (step.tokens * work >= kMinParallelFloats) return this_->pool_->run(step.seqs * parts, run);
    for (int task = 0; task < step.seqs * parts; ++task) run(task, 0);
  });
}

int Program::short_conv(int x, std::shared_ptr<const ShortConvParameter> conv) {
  const Value in = value(x, conv->name.c_str());
  float_value(x, in.width, conv->name.c_str());
  const int channels = conv->channels;
  if (in.selected) refuse(conv->name, " must come before select_rows");
  if (conv->gated ? in.width != 3 * channels : in.width < channels)
    refuse(conv->name, " reads rows of ", conv->gated ? 3 * channels : channels, ", but its input has ", in.width);
  const ShortConvView view{channels,    conv->taps,          conv->silu,
                           conv->gated, conv->weight.data(), conv->bias.empty() ? nullptr : conv->bias.data(),
                           in.width};
  const int width = conv->gated ? channels : in.width, parts = ceil_div(channels, kConvChannels);
  const int out = define("short convolution", width, false, {}, {x});
  record_states(static_cast<size_t>(channels) * (conv->taps - 1), parts, channels * conv->taps,
                [=, keep = conv, this_ = this](const StepView& step, int first, int rows, float* state, int part) {
                  const int begin = part * kConvChannels, end = std::min(channels, begin + kConvChannels);
                  const float* from = this_->floats(x, step) + static_cast<size_t>(first) * in.width;
                  float* to = this_->floats(out, step) + static_cast<size_t>(first) * width;
                  this_->kernels_.short_conv(view, from, rows, begin, end, state, to);
                  if (part == 0 && width > channels)
                    for (size_t row = 0, at = channels; row < static_cast<size_t>(rows); ++row, at += width)
                      std::memcpy(to + at, from + at, (width - channels) * sizeof(float));
                });
  return out;
}

int Program::gated_delta(int x, int ba, std::shared_ptr<const GatedDeltaParameter> delta) {
  const GatedDeltaView& view = delta->view;
  const char* name = delta->name.c_str();
  const int keys = view.key_heads * view.key_dim, values = view.value_heads * view.value_dim;
  if (float_value(x, 2 * (keys + values), name).selected || float_value(ba, 2 * view.value_heads, name).selected)
    refuse(name, " must come before select_rows");
  const int out = define("gated delta", values, false, {}, {x, ba});
  const size_t head_floats = static_cast<size_t>(view.key_dim) * view.padded_dim();
  record_states(head_floats * view.value_heads, view.value_heads, view.key_dim * values,
                [=, this_ = this](const StepView& step, int first, int rows, float* state, int head) {
                  this_->kernels_.gated_delta(
                      delta->view, this_->floats(x, step) + static_cast<size_t>(first) * 2 * (keys + values),
                      this_->floats(ba, step) + static_cast<size_t>(first) * 2 * delta->view.value_heads, rows, head,
                      state + head * head_floats, this_->floats(out, step) + static_cast<size_t>(first) * values);
                });
  return out;
}

int Program::state_space(int x, std::shared_ptr<const StateSpaceParameter> space) {
  const StateSpaceView& view = space->view;
  const int channels = view.channels(), width = view.width();
  if (float_value(x, width, space->name.c_str()).selected) refuse(space->name, " must come before select_rows");
  const int out = define("state space", channels, false, {}, {x});
  const size_t part_floats = static_cast<size_t>(view.state) * view.padded_part();
  const int parts = ceil_div(channels, view.part());
  record_states(part_floats * parts, parts, static_cast<double>(channels) * view.state,
                [=, this_ = this](const StepView& step, int first, int rows, float* state, int part) {
                  this_->kernels_.state_space(space->view, this_->floats(x, step) + static_cast<size_t>(first) * width,
                                              rows, part, state + part * part_floats,
                                              this_->floats(out, step) + static_cast<size_t>(first) * channels);
                });
  if (!view.norm_weight) return out;
  const int size = channels / view.groups, normed = define("state space norm", channels, false, {}, {x, out}, {out});
  record([=, this_ = this](const StepView& step) {
    this_->each_row(normed, step, [&](int row, int) {
      const StateSpaceView& own = space->view;
      const float* made = this_->floats(out, step) + static_cast<size_t>(row) * channels;
      float* y = this_->floats(normed, step) + static_cast<size_t>(row) * channels;
      for (int at = 0; at < channels; at += size)
        this_->kernels_.norm_row({own.norm_weight + at, nullptr, own.eps, size, false}, made + at, y + at);
      const float* z = this_->floats(x, step) + static_cast<size_t>(row + 1) * width - own.heads - channels;
      if (own.gate_last) this_->kernels_.activate_row({Curve::kSilu, true, 0}, z, y, channels, y);
    });
  });
  return normed;
}

int Program::select_rows(int x) {
  const Value in = value(x, "select_rows");
  if (float_value(x, in.width, "select_rows").selected) refuse("select_rows reads token rows");
  const int out = define("select rows", in.width, true, {}, {x});
  record([=, this_ = this](const StepView& step) {
    for (int row = 0; row < step.rows; ++row)
      std::memcpy(this_->floats(out, step) + static_cast<size_t>(row) * in.width,
                  this_->floats(x, step) + static_cast<size_t>(step.logits_rows[row]) * in.width,
                  in.width * sizeof(float));
  });
  return out;
}

int Program::route_of(int id, const char* op) const {
  const Value& routed = value(id, op);
  if (routed.route < 0 || routed.width) refuse(op, " reads what `route` made");
  return routed.route;
}

int Program::route(int logits, std::shared_ptr<const RoutingParameter> routing) {
  const RoutingParameter& r = *routing;
  const bool selected = float_value(logits, r.num_experts, "route").selected;
  const size_t most = capacity(values_[logits]) * static_cast<size_t>(r.top_k);
  if (most > kMaxCount) refuse("route: ", most, " dispatched rows are too many");
  const int out = define("route", 0, selected, {}, {logits});
  routes_.push_back(std::make_unique<Route>(Route{routing, Dispatch(capacity(values_[out]), r)}));
  values_[out].route = static_cast<int>(routes_.size()) - 1;
  scratch_needed_ = std::max(scratch_needed_, 2 * r.num_experts + r.groups);
  Route* route = routes_.back().get();
  record([=, this_ = this](const StepView& step) {
    const RoutingParameter& r = *route->parameter;
    const float* in = this_->floats(logits, step);
    Dispatch& dispatch = route->dispatch;
    this_->each_row(logits, step, [&](int row, int thread) {
      const size_t at = static_cast<size_t>(row) * r.top_k;
      choose_experts(r, in + static_cast<size_t>(row) * r.num_experts, &dispatch.experts[at], &dispatch.weights[at],
                     this_->scratch_[thread].data());
    });
    dispatch.order(this_->rows(logits, step), r.top_k);
  });
  return out;
}

int Program::dispatch(int x, int routed) {
  const int route = route_of(routed, "dispatch");
  const Value in = value(x, "dispatch");
  if (in.route >= 0 || in.selected != values_[routed].selected) refuse("dispatch: input and route have different rows");
  const int out = define("dispatch", in.width, in.selected, in.act, {x, routed});
  values_[out].route = route;
  values_[out].copies = routes_[route]->parameter->top_k;
  record([=, this_ = this](const StepView& step) {
    const Dispatch& dispatch = this_->routes_[route]->dispatch;
    if (!in.act) {
      const size_t bytes = in.width * sizeof(float);
      const float* from = this_->floats(x, step);
      float* to = this_->floats(out, step);
      this_->each_row(out, step, [&](int row, int) {
        std::memcpy(to + static_cast<size_t>(row) * in.width,
                    from + static_cast<size_t>(dispatch.sources[row]) * in.width, bytes);
      });
      return;
    }
    const Activations from = this_->activations(x, step);
    std::vector<Activations> each = this_->expert_activations(out, step);
    this_->each_row(out, step, [&](int row, int) {
      const int expert = dispatch.readers[row];
      this_->layout_.copy_row(from, dispatch.sources[row], each[expert], row - dispatch.starts[expert]);
    });
  });
  return out;
}

// Each task multiplies some rows of one expert with some of its panels: an expert's weights are read once for all of
// its rows, but for those beyond a tile's kRowPanels.
int Program::experts(int x, std::shared_ptr<const ExpertsParameter> experts, int routed) {
  const char* name = experts->name.c_str();
  const int route = route_of(routed, name);
  const Value in = value(x, name);
  const LinearParameter& first = experts->first();
  const RoutingParameter& routing = *routes_[route]->parameter;
  const int n = first.n(), k = first.k();
  if (in.width != k) refuse(name, " reads rows of ", k, ", but its input has ", in.width);
  if (in.route != route || in.copies != routing.top_k) refuse(name, " reads dispatched rows");
  if (static_cast<int>(experts->experts.size()) != routing.num_experts)
    refuse(name, " has ", experts->experts.size(), " experts, but its route ", routing.num_experts);
  if (first.layout() != &layout_) refuse(name, ": packed for another ISA path");
  if (in.act != first.act) refuse(name, ": its input is not quantized as its `act` says");
  (in.selected ? row_work_ : token_work_).multiply_adds += static_cast<int64_t>(routing.top_k) * n * k;
  const size_t work = expert_work_.size();
  expert_work_.push_back({weight_bytes(first), routing.num_experts, routing.top_k, in.selected});
  const int out = define("experts " + std::to_string(n) + " x " + std::to_string(k), n, in.selected, {}, {x, routed});
  values_[out].route = route;
  values_[out].copies = in.copies;
  record([=, this_ = this](const StepView& step) {
    const std::vector<int32_t>& starts = this_->routes_[route]->dispatch.starts;
    const std::vector<Activations> codes =
        in.act ? this_->expert_activations(x, step) : std::vector<Activations>(starts.size() - 1);
    const float* floats = in.act ? nullptr : this_->floats(x, step);
    const int panels = ceil_div(n, this_->layout_.panel_cols), tile = this_->layout_.tile_rows;
    int active = 0;
    for (size_t e = 0; e + 1 < starts.size(); ++e) active += starts[e] < starts[e + 1];
    this_->expert_work_[work].reached = active;
    if (!active) return;
    const int groups = std::min(panels, ceil_div(kExpertTasks * this_->pool_->threads(), active));
    std::vector<ExpertTile>& tiles = this_->expert_tiles_;
    tiles.clear();
    for (int e = 0; e + 1 < static_cast<int>(starts.size()); ++e) {
      const int m = starts[e + 1] - starts[e], row_panels = m ? count_panels(m, tile) : 0;
      for (int g = 0; g < groups; ++g)
        for (int r = 0; r < row_panels; r += kRowPanels)
          tiles.push_back({e, panel_begin(r, m, tile), panel_begin(std::min(row_panels, r + kRowPanels), m, tile),
                           static_cast<int>(static_cast<long>(panels) * g / groups),
                           static_cast<int>(static_cast<long>(panels) * (g + 1) / groups)});
    }
    float* y = this_->floats(out, step);
    this_->pool_->run(static_cast<int>(tiles.size()), [&](int task, int) {
      const ExpertTile& t = tiles[task];
      const LinearParameter& linear = experts->experts[t.expert];
      const size_t row = starts[t.expert];
      this_->multiply(linear, floats ? floats + row * k : nullptr, codes[t.expert],
                      {linear.bias.empty() ? nullptr : linear.bias.data(), nullptr, y + row * n, n}, t.m0, t.m1, t.p0,
                      t.p1);
    });
  });
  return out;
}

int Program::combine(int x, int routed, std::optional<int> residual) {
  const int route = route_of(routed, "combine");
  const Value in = value(x, "combine");
  float_value(x, in.width, "combine", route);
  if (in.copies != routes_[route]->parameter->top_k) refuse("combine reads dispatched rows");
  std::vector<int> reads{x, routed};
  if (residual) {
    if (float_value(*residual, in.width, "combine").selected != in.selected)
      refuse("combine: input and residual have different rows");
    reads.push_back(*residual);
  }
  const int out = define("combine", in.width, in.selected, {}, reads);
  record([=, this_ = this](const StepView& step) {
    const Route& r = *this_->routes_[route];
    const size_t width = in.width, top_k = r.parameter->top_k;
    const float *from = this_->floats(x, step), *added = residual ? this_->floats(*residual, step) : nullptr;
    float* y = this_->floats(out, step);
    this_->each_row(out, step, [&](int row, int) {
      float* sum = y + row * width;
      std::memset(sum, 0, width * sizeof(float));
      for (size_t i = row * top_k; i < (row + 1) * top_k; ++i)
        this_->kernels_.accumulate_row(from + r.dispatch.places[i] * width, r.dispatch.weights[i], in.width, sum);
      if (added) this_->kernels_.add_row(sum, added + row * width, in.width, sum);
    });
  });
  return out;
}

int Program::gate(int x, int logit) {
  const Value in = value(x, "gate");
  const size_t logits_width = value(logit, "gate").width;
  if (float_value(x, in.width, "gate").selected != float_value(logit, values_[logit].width, "gate").selected)
    refuse("gate: its inputs have different rows");
  if (logits_width != 1 && logits_width < static_cast<size_t>(in.width))
    refuse("gate: ", logits_width, " logits a row are not 1, nor enough for ", in.width);
  const int out = define("gate", in.width, in.selected, {}, {x, logit}, {x});
  record([=, this_ = this](const StepView& step) {
    const float *rows = this_->floats(x, step), *logits = this_->floats(logit, step);
    float* y = this_->floats(out, step);
    this_->each_row(out, step, [&](int row, int) {
      const size_t at = static_cast<size_t>(row) * in.width;
      const float* logit = logits + row * logits_width;
      if (logits_width == 1) return this_->kernels_.scale_row(rows + at, sigmoid(*logit), in.width, y + at);
      this_->kernels_.gate_row(rows + at, logit, in.width, y + at);
    });
  });
  return out;
}

void Program::finish(int logits) {
  const Value& result = value(logits, "finish");
  if (logits + 1 != static_cast<int>(values_.size()) || !result.selected || result.act || result.route >= 0)
    refuse("a program must end with its logits: floats of the selected rows");

  fuse_gates();

  const auto taken = [&](const Op& op) {  // the operand that the op overwrites, or -1
    for (int id : op.in_place)
      if (values_[id].last_use == static_cast<int>(&op - ops_.data())) return id;
    return -1;
  };
  std::vector<bool> in_logits(values_.size());
  for (int id = logits; id >= 0; id = taken(ops_[values_[id].op])) in_logits[id] = true;

  struct Buffer {
    char* data;
    size_t size;
  };
  std::vector<Buffer> free;
  std::vector<Buffer> of(values_.size(), Buffer{nullptr, 0});
  int widest = 0;
  for (const Op& op : ops_) {
    Value& out = values_[op.write];
    widest = std::max(widest, out.width);
    const size_t size = bytes(out);
    const int overwritten = taken(op);
    if (in_logits[op.write] || !size) {
      // the step's own array, or a route's
    } else if (overwritten >= 0) {
      of[op.write] = of[overwritten];
    } else {
      auto best = free.end();
      for (auto it = free.begin(); it != free.end(); ++it)
        if (it->size >= size && (best == free.end() || it->size < best->size)) best = it;
      if (best != free.end()) {
        of[op.write] = *best;
        free.erase(best);
      } else {
        of[op.write] = {allocate(size), size};
      }
    }
    out.data = of[op.write].data;
    if (out.data && out.last_use < 0) free.push_back(of[op.write]);
    std::vector<int> reads = op.reads;
    std::sort(reads.begin(), reads.end());
    reads.erase(std::unique(reads.begin(), reads.end()), reads.end());
    for (int id : reads)
      if (values_[id].last_use == static_cast<int>(&op - ops_.data()) && id != overwritten && of[id].data)
        free.push_back(of[id]);
  }
  scratch_.assign(pool_->threads(), std::vector<float>(std::max({widest, scratch_size_, scratch_needed_})));
  logits_ = logits;
}

void Program::check(const StepView& step) const {
  if (logits_ < 0) refuse("the program is not finished");
  if (step.logits_width != logits_width()) refuse("logits are ", logits_width(), " wide, not ", step.logits_width);
  if (step.tokens < 1 || step.tokens > limits_.max_tokens)
    refuse("a step takes 1 to ", limits_.max_tokens, " tokens, not ", step.tokens);
  if (step.seqs < 1 || step.seqs > limits_.max_seqs)
    refuse("a step takes 1 to ", limits_.max_seqs, " sequences, not ", step.seqs);
  if (step.rows < 0 || step.rows > limits_.max_logits_rows)
    refuse("a step takes at most ", limits_.max_logits_rows, " logits rows, not ", step.rows);
  if (step.query_start_loc[0] != 0) refuse("query_start_loc[0] is ", step.query_start_loc[0], ", not 0");
  for (int s = 0; s < step.seqs; ++s) {
    const int begin = step.query_start_loc[s], end = step.query_start_loc[s + 1];
    if (end < begin || end > step.tokens)
      refuse("query_start_loc[", s + 1, "] is ", end, ", not within ", begin, "..", step.tokens);
    const int length = step.seq_lens[s], count = end - begin;
    if (length < count || length > limits_.max_model_len || length < 1)
      refuse("seq_lens[", s, "] is ", length, ", not within ", std::max(1, count), "..", limits_.max_model_len);
    const int blocks = ceil_div(length, limits_.block_size);
    if (blocks > step.table_width)
      refuse("block_tables[", s, "] holds ", step.table_width, " blocks, but ", length, " tokens need ", blocks);
    const int32_t* table = step.block_tables + static_cast<size_t>(s) * step.table_width;
    for (int b = 0; b < blocks; ++b) check_range("block_tables", s, table[b], limits_.num_blocks);
    for (int row = begin; row < end; ++row) {
      const int position = length - end + row;
      if (step.positions[row] != position)
        refuse("positions[", row, "] is ", step.positions[row], ", but sequence ", s, " has position ", position,
               " there");
      const int slot = table[position / limits_.block_size] * limits_.block_size + position % limits_.block_size;
      if (step.slot_mapping[row] != slot)
        refuse("slot_mapping[", row, "] is ", step.slot_mapping[row], ", but block_tables put position ", position,
               " into slot ", slot);
    }
  }
  if (step.query_start_loc[step.seqs] != step.tokens)
    refuse("query_start_loc ends with ", step.query_start_loc[step.seqs], ", but there are ", step.tokens, " tokens");
  if (vocab_)
    for (int row = 0; row < step.tokens; ++row) check_range("token_ids", row, step.token_ids[row], vocab_);
  for (int row = 0; row < step.rows; ++row) check_range("logits_rows", row, step.logits_rows[row], step.tokens);
  for (int s = 0; s < step.seqs; ++s) check_range("state_slots", s, step.state_slots[s], limits_.num_states());
  for (int s = 0; s < step.seqs; ++s) check_range("adapters", s, step.adapters[s], adapter_slots_);
  if (!state_lengths_.empty()) check_states(step);
}

void Program::check_states(const StepView& step) const {
  std::vector<bool> taken(limits_.num_states());
  for (int s = 0; s < step.seqs; ++s) {
    const int slot = step.state_slots[s],
              start = step.seq_lens[s] - step.query_start_loc[s + 1] + step.query_start_loc[s];
    if (taken[slot]) refuse("state_slots[", s, "] is ", slot, ", another sequence's too");
    taken[slot] = true;
    if (start && state_lengths_[slot] != start)
      refuse("state_slots[", s, "] is ", slot, ", where ", state_lengths_[slot], " tokens were seen, not ", start);
  }
}

void Program::copy_state(int source, int target) {
  check_range("source", 0, source, limits_.num_states());
  check_range("target", 0, target, limits_.num_states());
  if (state_lengths_.empty() || source == target) return;
  std::lock_guard<std::mutex> lock(pool_->mutex());
  for (const States& states : states_)
    std::memcpy(states.data + states.floats * target, states.data + states.floats * source,
                states.floats * sizeof(float));
  state_lengths_[target] = state_lengths_[source];
}

void Program::step(const StepView& step) {
  check(step);
  std::lock_guard<std::mutex> lock(pool_->mutex());
  if (adapter_slots_ > 1)
    for (bool selected : {false, true}) adapter_tiles_[selected] = adapter_tiles(step, selected);
  auto then = std::chrono::steady_clock::now();
  for (Op& op : ops_) {
    op.run(step);
    const auto now = std::chrono::steady_clock::now();
    op.seconds += std::chrono::duration<double>(now - then).count();
    then = now;
  }
  if (!state_lengths_.empty())
    for (int s = 0; s < step.seqs; ++s) state_lengths_[step.state_slots[s]] = step.seq_lens[s];
  last_tokens_ = step.tokens;
  last_rows_ = step.rows;
}

Work Program::work(int tokens, int rows) const {
  check_range("tokens", 0, tokens, limits_.max_tokens + 1L);
  check_range("rows", 0, rows, limits_.max_logits_rows + 1L);
  Work work{tokens * token_work_.multiply_adds + rows * row_work_.multiply_adds,
            token_work_.weight_bytes + (rows ? row_work_.weight_bytes : 0)};
  for (const ExpertWork& w : expert_work_) {
    const double missed = 1 - static_cast<double>(w.top_k) / w.experts;  // by one row
    const bool known = tokens == last_tokens_ && rows == last_rows_;
    const double reached = known ? w.reached : w.experts * (1 - std::pow(missed, w.selected ? rows : tokens));
    work.weight_bytes += static_cast<int64_t>(std::llround(reached * static_cast<double>(w.weight_bytes)));
  }
  return work;
}

std::map<std::string, double> Program::seconds() const {
  std::lock_guard<std::mutex> lock(pool_->mutex());
  std::map<std::string, double> seconds;
  for (const Op& op : ops_) seconds[op.kind] += op.seconds;
  return seconds;
}

}  // namespace fptq
