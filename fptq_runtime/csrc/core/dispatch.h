// The kernels of one ISA, and the choice of one at run time.
#pragma once

#include <string>
#include <vector>

#include "core/kernels.h"
#include "core/views.h"

namespace fptq {

constexpr int kSampleBlock = 512;  // tokens that the sampler weighs together

// What an ISA provides: arch/kernels.cpp, or a table of its own. Row functions touch one row; rows may run on any
// thread.
struct Kernels {
  const char* isa;
  const Layout* layout;  // of what the GEMMs and the row quantizer read and write
  const char* gemm_int4_name;
  const char* gemm_int8_name;
  const char* gemm_float_name;
  GemmFn gemm_int4;
  GemmFn gemm_int8;
  FloatGemmFn gemm_float;
  WeightOnlyGemmFn gemm_weight_only;
  MultiplyFn multiply;
  QuantizeRowFn quantize_row;
  QuantizePartFn quantize_part;
  void (*widen_row)(const void* x, FloatType type, int n, float* out);
  void (*norm_row)(const NormView& norm, const float* x, float* out);
  // n outputs of n gates (or of what has none) and as many of up. Returns the bits of max|out|.
  int32_t (*activate_row)(const Activation&, const float* x, const float* up, int n, float* out);
  void (*add_row)(const float* x, const float* y, int n, float* out);  // these three: out may be an operand
  void (*scale_row)(const float* x, float factor, int n, float* out);
  void (*accumulate_row)(const float* x, float factor, int n, float* out);   // out += x · factor
  void (*gate_row)(const float* x, const float* logits, int n, float* out);  // x · sigmoid; out may be x
  void (*softcap_row)(const float* x, float cap, int n, float* out);
  void (*widen_codes)(const int8_t* codes, float scale, int n, float* out);
  // y[i] += scale · up · (down · x[i]) for `rows` rows, each in one order whatever the others are. x is padded as the
  // view says; t: room for kLowRankRows · rank.
  void (*low_rank_rows)(const LowRankView&, const float* const* x, float* const* y, int rows, float* t);
  // `keys`: room for num_kv_heads · head_dim.
  void (*rope_and_cache_row)(const AttentionView&, const KvCache&, int position, int slot, const float* qkv, float* q,
                             float* keys);
  void (*attention_tile)(const AttentionView&, const KvCache&, const AttentionTile&, const AttentionTile* next);
  void (*merge_partials)(const AttentionView&, const AttentionTile&);
  // Of `rows` tokens of one sequence, whose state they move on: channels begin to end - 1, the state [taps -
  // 1][channels]; one value head, or one part, the state that head's or part's.
  void (*short_conv)(const ShortConvView&, const float* x, int rows, int begin, int end, float* state, float* out);
  void (*gated_delta)(const GatedDeltaView&, const float* x, const float* ba, int rows, int head, float* state,
                      float* out);
  void (*state_space)(const StateSpaceView&, const float* x, int rows, int part, float* state, float* out);
  // x where the token's bit (t % 32 of word t / 32) is set, else -inf.
  void (*mask_row)(const float* x, const uint32_t* mask, int n, float* out);
  // Of each block of a row, its largest value and (sums not null) Σ 2^((x - that) · log2_scale). False: one is NaN.
  bool (*scan_row)(const float* x, int n, float log2_scale, float* maxima, float* sums);
  // w = 2^((x - top) · log2_scale) over n <= kSampleBlock values x <= top. Returns the sum.
  float (*weigh_block)(const float* x, int n, float top, float log2_scale, float* w);
  // The values >= bound, with their ids (first_id onwards where ids is null), in order; in place is fine. Returns how
  // many. Room for 16 values more than there are results is needed.
  int (*select_at_least)(const float* x, const int32_t* ids, int first_id, int n, float bound, float* out,
                         int32_t* out_ids);
};

// ISAs compiled in that this CPU and operating system run, best first; "generic" is always the last.
std::vector<std::string> available_isas();

// SHA-256 of what the kernels were compiled from.
const char* sources();

// The named ISA, or the best where `isa` is empty. Throws std::invalid_argument for an unknown or unavailable one.
const Kernels& kernels_for(const std::string& isa);

}  // namespace fptq
