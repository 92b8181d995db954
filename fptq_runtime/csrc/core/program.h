// A model's step as a straight line of ops over buffers, recorded once and run with one call.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/dispatch.h"
#include "core/routing.h"
#include "core/thread_pool.h"

namespace fptq {

constexpr int kMaxRank = 512, kMaxAdapterParts = 8;  // of an adapter, and of it for one linear

// How a linear's input is quantized: nothing: float; 0: dynamic per token; else the static scale.
using Act = std::optional<float>;

struct LinearParameter {
  std::string name;
  std::shared_ptr<const PackedWeight> packed;  // one of the two
  std::shared_ptr<const FloatWeight> float_weight;
  std::vector<float> bias;  // [N] or empty
  Act act;
  const Layout* layout() const { return packed ? packed->layout : float_weight->layout; }
  int n() const { return packed ? packed->n : float_weight->n; }
  int k() const { return packed ? packed->k : float_weight->k; }
};

// Linears of equal size, each of which reads the rows that are dispatched to it.
struct ExpertsParameter {
  std::string name;
  std::vector<LinearParameter> experts;
  const LinearParameter& first() const { return experts.front(); }
};

// What adapters add to a linear: of each slot the parts, which write different columns; slot 0 adds nothing.
struct AdaptersParameter {
  struct Part {
    int first;  // column
    LowRankView view;
    std::shared_ptr<void> down, up;
    std::vector<float> scales;
  };
  int n, k;
  std::vector<std::vector<Part>> slots;
};

struct NormParameter {
  std::vector<float> weight, bias;  // bias may be empty
  float eps;
  bool layer;
  NormView view() const {
    return {weight.data(), bias.empty() ? nullptr : bias.data(), eps, static_cast<int>(weight.size()), layer};
  }
};

struct EmbeddingParameter {
  std::shared_ptr<const void> data;  // [vocab][width]
  FloatType type;
  int vocab, width;
};

struct AttentionParameter {
  int layer;
  AttentionView view;  // its pointers lead to the members below
  int rope_positions;
  std::shared_ptr<const float> rope_cos, rope_sin;  // [positions][rope_dim / 2] or null
  std::vector<float> alibi_slopes, sinks;
  std::shared_ptr<const NormParameter> q_norm, k_norm;
};

struct ShortConvParameter {
  std::string name;
  int channels, taps;
  bool silu, gated;
  std::vector<float> weight, bias;  // [taps][channels]; [channels] or empty
};

struct GatedDeltaParameter {
  std::string name;
  std::vector<float> a_log, dt_bias, norm_weight;
  GatedDeltaView view;  // its pointers lead to the members above
};

struct StateSpaceParameter {
  std::string name;
  std::vector<float> a, d, dt_bias, norm_weight;
  StateSpaceView view;  // its pointers lead to the members above
};

struct Limits {
  int max_tokens, max_seqs, max_logits_rows, max_model_len, num_blocks, block_size;
  KvType kv_type;
  int num_layers, num_kv_heads, head_dim, kept_states;

  int num_states() const { return max_seqs + kept_states; }
};

// kernels/base.py's StepInput, and the logits. A size is -1 until an array sets it.
struct StepView {
  const int32_t* token_ids;        // [M]
  const int32_t* positions;        // [M]
  const int32_t* slot_mapping;     // [M]
  const int32_t* query_start_loc;  // [S + 1]
  const int32_t* seq_lens;         // [S]
  const int32_t* block_tables;     // [S][table_width]
  const int32_t* logits_rows;      // [R]
  const int32_t* state_slots;      // [S]
  const int32_t* adapters;         // [S]
  float* logits;                   // [R][logits_width]
  int tokens = -1, seqs = -1, table_width = -1, rows = -1, logits_width = -1;
};

struct Work {
  int64_t multiply_adds, weight_bytes;
};

// Every recording function returns the id of the value it defines and throws std::invalid_argument where an operand
// does not fit. Not thread-safe, but programs on several threads may share a pool.
class Program {
 public:
  // sharing: whose keys and values it reads and writes, rather than its own.
  Program(std::shared_ptr<ThreadPool> pool, const std::string& isa, const Limits& limits, const Program* sharing);
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  int embed(std::shared_ptr<const EmbeddingParameter> table);
  int embed_positions(std::shared_ptr<const EmbeddingParameter> table);
  int columns(const std::vector<int>& xs, const std::vector<int32_t>& index);
  int norm(int x, std::shared_ptr<const NormParameter> norm, Act act);
  int quantize(int x, Act act);
  int linear(int x, std::shared_ptr<const LinearParameter> linear, std::optional<int> residual);
  // y + what the rows' adapters make of x, which a linear made y of.
  int adapt(int x, int y, std::shared_ptr<const AdaptersParameter> adapters);
  int activation(int x, const Activation& activation, Act act);
  int add(int x, int y);
  int scale(int x, float factor);
  int softcap(int x, float cap);
  int rope_and_cache(int qkv, std::shared_ptr<const AttentionParameter> attention);
  // `selected`: for the rows that need logits alone.
  int attention(int q, std::shared_ptr<const AttentionParameter> attention, Act act, bool selected);
  // These two keep a state of each sequence, from step to step.
  int short_conv(int x, std::shared_ptr<const ShortConvParameter> conv);
  int gated_delta(int x, int ba, std::shared_ptr<const GatedDeltaParameter> delta);
  int state_space(int x, std::shared_ptr<const StateSpaceParameter> space);
  int select_rows(int x);
  // These make and read dispatched rows, which no others but `activation` take.
  int route(int logits, std::shared_ptr<const RoutingParameter> routing);
  int dispatch(int x, int routed);
  int experts(int x, std::shared_ptr<const ExpertsParameter> experts, int routed);
  int combine(int x, int routed, std::optional<int> residual);
  int gate(int x, int logit);
  // Ends the recording with the last value as logits, fuses what can be, and allocates the buffers.
  void finish(int logits);

  int logits_width() const { return values_.at(logits_).width; }
  // Keys and values, all layers of a block together, [num_blocks][block_bytes].
  char* blocks() const { return cache_.front().data; }
  size_t num_blocks() const { return limits_.num_blocks; }
  size_t block_bytes() const { return cache_.front().block_bytes; }

  // Checks every index, then runs. Throws std::invalid_argument, and then nothing was written.
  void step(const StepView& step);
  // Between steps: what recurrent ops keep in slot `source` they keep in slot `target`, too.
  void copy_state(int source, int target);

  // Spent in all steps so far, by kind of op ("attention", "linear N x K", …).
  std::map<std::string, double> seconds() const;
  // What the linears of a step of that many tokens and logits rows must do, however they do it: the last step, where it
  // had as many, or one whose tokens go to any expert alike.
  Work work(int tokens, int rows) const;

 private:
  struct Value {
    int width;
    bool selected;  // rows are logits_rows, not tokens
    Act act;
    int op;                // that writes it
    int route = -1;        // of dispatched rows, or the value of `route` itself, which has no floats
    int copies = 1;        // of each row
    int last_use = -1;     // op
    char* data = nullptr;  // null for the logits, and what they overwrite, which lie in the step's own array
  };
  struct Op {
    std::string kind;
    std::vector<int> reads;
    int write;
    std::vector<int> in_place;  // values that the result may overwrite
    std::function<void(const StepView&)> run{};
    std::shared_ptr<const LinearParameter> linear{};  // of a linear, or
    std::optional<Activation> activation{};           // of an activation: what fuse_gates() looks for
    double seconds = 0;                               // in all steps so far
  };
  struct Route {
    std::shared_ptr<const RoutingParameter> parameter;
    Dispatch dispatch;
  };
  // Of the linears of a route's experts, for each expert; `selected`: for the rows of logits. reached: experts that the
  // last step read.
  struct ExpertWork {
    int64_t weight_bytes;
    int experts, top_k;
    bool selected;
    int reached = 0;
  };
  // Rows of one adapter.
  struct AdapterTile {
    int slot, rows[kLowRankRows], count;
  };
  struct ExpertTile {
    int expert, m0, m1, p0, p1;
  };
  using Memory = std::unique_ptr<char, void (*)(void*)>;

  int define(std::string kind, int width, bool selected, Act act, std::vector<int> reads,
             std::vector<int> in_place = {});
  void record(std::function<void(const StepView&)> run);
  // The op just defined is out = f(row of x), quantized if `out` is; f writes floats.
  template <class F>
  void record_rows(int x, int out, F f);
  // Rows of the table for the step's array of indices.
  int gather(std::shared_ptr<const EmbeddingParameter> table, const int32_t* StepView::* indices);
  const Value& value(int id, const char* op) const;
  const Value& float_value(int id, int width, const char* op, int route = -1) const;
  int route_of(int id, const char* op) const;
  void check(const AttentionParameter& attention) const;
  void check(const StepView& step) const;
  void check_states(const StepView& step) const;
  // Records f(first row, rows, state, part) for each part of each sequence: the op's own floats of the sequence's slot,
  // zeros where it begins.
  template <class F>
  void record_states(size_t floats, int parts, double work, F f);
  size_t capacity(const Value& value) const {
    return static_cast<size_t>(value.copies) * (value.selected ? limits_.max_logits_rows : limits_.max_tokens);
  }
  size_t bytes(const Value& value) const;
  size_t parts(const Value& value) const;
  char* allocate(size_t bytes);

  int rows(int id, const StepView& step) const {
    return values_[id].copies * (values_[id].selected ? step.rows : step.tokens);
  }
  float* floats(int id, const StepView& step) const;
  Activations activations(int id, const StepView& step) const;
  // Of dispatched rows, each expert's.
  std::vector<Activations> expert_activations(int id, const StepView& step) const;
  template <class F>
  void each_row(int id, const StepView& step, F f) const;
  // How a linear is shared out: blocks of kRowPanels row panels by groups of weight panels.
  struct Cut {
    int row_blocks, groups;
  };
  Cut cut(int m, int panels, int n, int k) const;
  template <class F>
  void each_tile(const Cut& cut, int m, int panels, F f) const;
  void multiply(const LinearParameter& linear, const float* x, const Activations& codes, const Epilogue& epilogue,
                int m0, int m1, int p0, int p1) const;
  void multiply(const LinearParameter& linear, int x, const Epilogue& epilogue, const StepView& step, int m0, int m1,
                int p0, int p1) const;
  // Of a step's tokens, or of its logits rows.
  std::vector<AdapterTile> adapter_tiles(const StepView& step, bool selected) const;
  void fuse_gates();
  void fuse(Op& linear, Op& activation);
  void attend(const AttentionParameter& attention, const float* q, float* out, bool selected, const StepView& step);

  const std::shared_ptr<ThreadPool> pool_;
  const Kernels& kernels_;
  const Layout& layout_;
  const Limits limits_;
  const int scratch_size_;  // floats, of each thread; more where a row is wider
  std::vector<Memory> memory_;
  std::shared_ptr<char> cache_memory_;
  std::vector<KvCache> cache_;  // a layer each
  std::vector<Value> values_;
  std::vector<Op> ops_;
  Work token_work_{}, row_work_{};  // of one token, of one logits row; the bytes are a step's
  std::vector<ExpertWork> expert_work_;
  int last_tokens_ = -1, last_rows_ = -1;
  struct States {
    float* data;    // [num_states][floats]
    size_t floats;  // of a slot
  };
  std::vector<States> states_;      // of each recurrent op
  std::vector<int> state_lengths_;  // tokens that each slot's states have seen; empty without recurrent ops
  std::vector<std::unique_ptr<Route>> routes_;
  std::vector<ExpertTile> expert_tiles_;
  std::vector<AdapterTile> adapter_tiles_[2];  // of the step's tokens and of its logits rows
  int adapter_slots_ = 1;
  int scratch_needed_ = 0;
  std::vector<std::vector<float>> scratch_;  // for each thread
  std::vector<int32_t> max_bits_;            // [rows][groups of a cut], between a gated linear and its quantization
  std::vector<AttentionTile> tiles_, parts_, split_;
  std::vector<float> partials_;
  int vocab_ = 0;
  int logits_ = -1;
};

}  // namespace fptq
