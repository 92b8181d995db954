// Where rows go among experts, as kernels/base.py's Routing says it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fptq {

enum class Scoring { kSoftmax, kSigmoid, kSparsemixer };

struct RoutingParameter {
  int num_experts, top_k;
  Scoring scoring;
  bool normalise;
  float scale;
  std::vector<float> bias;  // [num_experts] or empty
  int groups, top_groups, group_best;
  float jitter;
};

// Of one row's logits [num_experts] the chosen experts, ascending, and their weights, [top_k] each. scratch:
// 2 · num_experts + groups.
void choose_experts(const RoutingParameter& routing, const float* logits, int32_t* experts, float* weights,
                    float* scratch);

// A step's dispatched rows: those of one expert together, the experts and an expert's rows in ascending order.
struct Dispatch {
  std::vector<int32_t> experts;  // [rows · top_k], of each row ascending
  std::vector<float> weights;    // alike
  std::vector<int32_t> places;   // alike: where the row lies once it is dispatched
  std::vector<int32_t> sources;  // [rows · top_k]: which row a dispatched one is
  std::vector<int32_t> readers;  // alike: the expert that reads it
  std::vector<int32_t> starts;   // [num_experts + 1]: each expert's first dispatched row

  Dispatch(size_t rows, const RoutingParameter& routing);
  // Makes the others of the experts of so many rows.
  void order(size_t rows, int top_k);
};

}  // namespace fptq
