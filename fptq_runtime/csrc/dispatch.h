// The kernels of one ISA, and the choice of one at run time.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"
#include "views.h"

namespace fptq {

// What kernels.cpp provides, compiled once per ISA. Row functions touch one row; rows may run on any thread.
struct Kernels {
  const char* isa;
  const char* gemm_int4_name;
  const char* gemm_int8_name;
  const char* gemm_float_name;
  GemmFn gemm_int4;
  GemmFn gemm_int8;
  FloatGemmFn gemm_float;
  QuantizeRowFn quantize_row;
  void (*widen_row)(const void* x, FloatType type, int n, float* out);
  void (*norm_row)(const NormView& norm, const float* x, float* out);
  void (*silu_mul_row)(const float* x, int n, float* out);   // x [2n]: silu(x[:n]) · x[n:]
  void (*gelu_tanh_row)(const float* x, int n, float* out);
  void (*rope_and_cache_row)(const AttentionView&, const KvCache&, int position, int slot, const float* qkv, float* q);
  void (*attention_tile)(const AttentionView&, const KvCache&, const AttentionTile&, const AttentionTile* next);
  void (*merge_partials)(const AttentionView&, const AttentionTile&);
};

// ISAs compiled in that this CPU and operating system run, best first; "generic" is always the last.
std::vector<std::string> available_isas();

// The named ISA, or the best where `isa` is empty. Throws std::invalid_argument for an unknown or unavailable one.
const Kernels& kernels_for(const std::string& isa);

}  // namespace fptq
