#include "core/routing.h"

#include <algorithm>
#include <limits>

#include "core/math.h"

namespace fptq {
namespace {

constexpr float kTaken = -std::numeric_limits<float>::infinity();

// f(i) for the `count` greatest of n values, the lower index first on ties, which are marked as taken. Where values are
// NaN it takes any, but none twice: `count` in all.
template <class F>
void take_greatest(float* values, int n, int count, const F& f) {
  for (; count > 0; --count) {
    int best = -1;
    for (int i = 0; i < n; ++i)
      if (values[i] != kTaken && (best < 0 || values[i] > values[best])) best = i;
    if (best < 0) return;
    values[best] = kTaken;
    f(best);
  }
}

// The softmax of an expert's logit among itself and those near below it.
float share_of_near(const float* logits, int n, int expert, float jitter) {
  const float own = logits[expert];
  float sum = 0;
  for (int i = 0; i < n; ++i) {
    const bool before = logits[i] > own || (logits[i] == own && i < expert);
    const bool far = (own - logits[i]) / std::max(std::abs(logits[i]), own) > 2 * jitter;
    if (!before && !far) sum += static_cast<float>(own_exp(logits[i] - own));
  }
  return 1 / sum;
}

}  // namespace

void choose_experts(const RoutingParameter& routing, const float* logits, int32_t* experts, float* weights,
                    float* scratch) {
  const int n = routing.num_experts, size = n / routing.groups, k = routing.top_k;
  float *scores = scratch, *choice = scratch + n, *groups = scratch + 2 * n;
  switch (routing.scoring) {
    case Scoring::kSoftmax: {
      float max = logits[0], sum = 0;
      for (int i = 1; i < n; ++i) max = std::max(max, logits[i]);
      for (int i = 0; i < n; ++i) sum += scores[i] = static_cast<float>(own_exp(logits[i] - max));
      for (int i = 0; i < n; ++i) scores[i] /= sum;
      break;
    }
    case Scoring::kSigmoid:
      for (int i = 0; i < n; ++i) scores[i] = sigmoid(logits[i]);
      break;
    case Scoring::kSparsemixer:
      std::copy_n(logits, n, scores);
  }
  const auto wanted = [&](int i) { return routing.bias.empty() ? scores[i] : scores[i] + routing.bias[i]; };
  for (int i = 0; i < n; ++i) choice[i] = wanted(i);
  if (routing.top_groups < routing.groups) {
    for (int g = 0; g < routing.groups; ++g) {
      groups[g] = 0;
      take_greatest(choice + g * size, size, routing.group_best, [&](int i) { groups[g] += wanted(g * size + i); });
    }
    std::fill_n(choice, n, kTaken);
    take_greatest(groups, routing.groups, routing.top_groups, [&](int g) {
      for (int i = g * size; i < (g + 1) * size; ++i) choice[i] = wanted(i);
    });
  }
  int taken = 0;
  take_greatest(choice, n, k, [&](int i) { experts[taken++] = i; });
  for (int i = 0; taken < k; ++i)  // of scores that are infinite or NaN
    if (std::find(experts, experts + taken, i) == experts + taken) experts[taken++] = i;
  std::sort(experts, experts + k);
  if (routing.scoring == Scoring::kSparsemixer)
    for (int i = 0; i < k; ++i) scores[experts[i]] = share_of_near(logits, n, experts[i], routing.jitter);
  float sum = 0;
  for (int i = 0; i < k; ++i) sum += scores[experts[i]];
  for (int i = 0; i < k; ++i)
    weights[i] = (routing.normalise ? scores[experts[i]] / sum : scores[experts[i]]) * routing.scale;
}

Dispatch::Dispatch(size_t rows, const RoutingParameter& routing)
    : experts(rows * routing.top_k),
      weights(experts.size()),
      places(experts.size()),
      sources(experts.size()),
      readers(experts.size()),
      starts(routing.num_experts + 1) {}

void Dispatch::order(size_t rows, int top_k) {
  std::fill(starts.begin(), starts.end(), 0);
  const int count = static_cast<int>(rows * top_k);
  for (int i = 0; i < count; ++i) ++starts[experts[i] + 1];
  for (size_t e = 1; e < starts.size(); ++e) starts[e] += starts[e - 1];
  std::vector<int32_t> next(starts.begin(), starts.end() - 1);
  for (int i = 0; i < count; ++i) {
    const int place = next[experts[i]]++;
    places[i] = place;
    sources[place] = i / top_k;
    readers[place] = experts[i];
  }
}

}  // namespace fptq
