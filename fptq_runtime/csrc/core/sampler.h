// Draws tokens from rows of logits. kernels/base.py's SampleInput says which.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/dispatch.h"
#include "core/thread_pool.h"

namespace fptq {

// kernels/base.py's PARAMETERS, field by field.
struct SampleParameters {
  uint64_t seed;
  double temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty;
  int64_t top_k;
};
static_assert(sizeof(SampleParameters) == 64);

// kernels/base.py's SampleInput and SampleOutput: D draws of R rows. A size is -1 until an array sets it.
struct SampleView {
  float* logits;                       // [R][V]; edited for the time of a draw
  const SampleParameters* parameters;  // [D]
  const int32_t* rows;                 // [D], ascending
  const int32_t* token_ids;            // [D], -1: draw
  const int64_t* positions;            // [D]
  const int32_t* num_logprobs;         // [D], -1: none
  const int32_t* mask_rows;            // [D], -1: none
  const uint32_t* masks;               // [masks][words]
  const int32_t* bias_start;           // [D + 1]
  const int32_t* bias_ids;             // [biases]
  const float* bias_values;            // [biases]
  const int32_t* history_start;        // [D + 1]
  const int32_t* output_start;         // [D]
  const int32_t* history;              // [tokens]
  int32_t* out_ids;                    // [D]
  double* out_logprobs;                // [D]
  int32_t* top_ids;                    // [D][width]
  double* top_logprobs;                // [D][width]
  int num_rows = -1, vocab = -1, draws = -1, biases = -1, tokens = -1, num_masks = -1, words = -1, width = -1;
};

class Sampler {
 public:
  Sampler(std::shared_ptr<ThreadPool> pool, const std::string& isa);
  ~Sampler();
  Sampler(const Sampler&) = delete;
  Sampler& operator=(const Sampler&) = delete;
  // Checks every index, then draws, a row a task. Throws std::invalid_argument, and then nothing was written.
  void run(const SampleView& view);

 private:
  class Worker;

  const std::shared_ptr<ThreadPool> pool_;
  std::vector<std::unique_ptr<Worker>> workers_;  // one a thread
};

}  // namespace fptq
