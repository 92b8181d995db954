#include "core/sampler.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>

#include "core/math.h"

namespace fptq {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kGreedyBelow = 1e-5;
constexpr int kBins = 1024;
constexpr int kFewMembers = 256;  // so few are sorted rather than binned
constexpr int kSlack = 16;        // what select_at_least may write beyond its results

// Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011): Philox4x64-10, its first word, as numpy has it.
uint64_t philox(uint64_t key, uint64_t counter) {
  uint64_t c[4] = {counter + 1, counter == UINT64_MAX, 0, 0}, k[2] = {key, 0};  // numpy counts before it draws
  for (int round = 0; round < 10; ++round) {
    const unsigned __int128 a = static_cast<unsigned __int128>(0xD2E7470EE14C6C93u) * c[0];
    const unsigned __int128 b = static_cast<unsigned __int128>(0xCA5A826395121157u) * c[2];
    const uint64_t next[4] = {static_cast<uint64_t>(b >> 64) ^ c[1] ^ k[0], static_cast<uint64_t>(b),
                              static_cast<uint64_t>(a >> 64) ^ c[3] ^ k[1], static_cast<uint64_t>(a)};
    std::memcpy(c, next, sizeof c);
    k[0] += 0x9E3779B97F4A7C15u;
    k[1] += 0xBB67AE8584CAA73Bu;
  }
  return c[0];
}

// The smallest float >= x.
float round_up_to_float(double x) {
  if (x < -FLT_MAX) return -FLT_MAX;
  const float f = static_cast<float>(x);
  return static_cast<double>(f) < x ? std::nextafter(f, kInfinity) : f;
}

// Where a running sum exceeds that fraction of the whole; never a weight of 0. left: what remains of the fraction
// within that weight.
template <class Weight>
int invert(const Weight* weights, int n, double fraction, double* left = nullptr) {
  double total = 0;
  for (int i = 0; i < n; ++i) total += weights[i];
  const double target = fraction * total;
  double below = 0;
  int at = 0;
  for (int i = 0; i < n; ++i) {
    if (!(weights[i] > 0)) continue;
    at = i;
    if (below + weights[i] > target) break;
    below += weights[i];
  }
  if (left) *left = std::clamp((target - below) / weights[at], 0.0, 1 - 0x1p-53);
  return at;
}

}  // namespace

// One thread's memory, and the work on one row.
class Sampler::Worker {
 public:
  explicit Worker(const Kernels& kernels) : kernels_(kernels) {}

  void run(const SampleView& view, int d) {
    view.out_ids[d] = -1;
    float* x = view.logits + static_cast<size_t>(view.rows[d]) * view.vocab;
    resize(view.vocab);
    if (view.mask_rows[d] >= 0) x = masked(x, view.masks + static_cast<size_t>(view.mask_rows[d]) * view.words);
    scanned_ = nullptr;
    const int num_top = std::min(view.num_logprobs[d], view.vocab);
    double log_sum = 0;
    float top = 0;
    if (num_top >= 0) {
      if (!scan(x, kLog2E)) return;
      top = top_;
      log_sum = own_log(total(1.0));
      if (num_top > 0) rank(x, num_top);
      for (int i = 0; i < num_top; ++i) {
        view.top_ids[static_cast<size_t>(d) * view.width + i] = ids_[order_[i]];
        view.top_logprobs[static_cast<size_t>(d) * view.width + i] =
            (static_cast<double>(xs_[order_[i]]) - top) - log_sum;
      }
    }
    int token = view.token_ids[d];
    if (token < 0) {
      edit(view, d, x);
      token = draw(x, view.parameters[d], view.positions[d]);
      for (auto e = edits_.rbegin(); e != edits_.rend(); ++e) x[e->id] = e->value;
      edits_.clear();
      if (token < 0) return;
    }
    if (num_top >= 0) view.out_logprobs[d] = (static_cast<double>(x[token]) - top) - log_sum;
    view.out_ids[d] = token;
  }

 private:
  // Orders candidates: the larger value, and on ties the lower id, first.
  struct Better {
    const float* x;
    bool operator()(int a, int b) const { return x[a] != x[b] ? x[a] > x[b] : a < b; }
  };
  struct Edit {
    int id;
    float value;  // before
  };

  void resize(int vocab) {
    if (vocab == vocab_) return;
    vocab_ = vocab;
    blocks_ = (vocab + kSampleBlock - 1) / kSampleBlock;
    maxima_.resize(blocks_);
    sums_.resize(blocks_);
    scaled_.resize(blocks_);
    xs_.reset(new float[vocab + kSlack]);  // not zeroed: pages that no row needs are never touched
    ids_.reset(new int32_t[vocab + kSlack]);
    weights_.reset(new float[vocab + kSlack]);
    masked_.reset();
  }

  // A copy of the row with -inf for what the mask does not allow.
  float* masked(const float* x, const uint32_t* mask) {
    if (!masked_) masked_.reset(new float[vocab_]);
    kernels_.mask_row(x, mask, vocab_, masked_.get());
    return masked_.get();
  }

  void set(float* x, int id, float value) {
    edits_.push_back({id, x[id]});
    x[id] = value;
  }

  // Bias (-inf suppresses), then penalties.
  void edit(const SampleView& view, int d, float* x) {
    const SampleParameters& p = view.parameters[d];
    for (int i = view.bias_start[d]; i < view.bias_start[d + 1]; ++i)
      set(x, view.bias_ids[i], x[view.bias_ids[i]] + view.bias_values[i]);
    const int32_t* history = view.history;
    const int begin = view.history_start[d], end = view.history_start[d + 1], output = view.output_start[d];
    if (begin == end) return;
    counts_.resize(view.vocab);  // all 0 between uses
    if (p.repetition_penalty != 1) {
      const float penalty = static_cast<float>(p.repetition_penalty);
      for (int i = begin; i < end; ++i) {
        const int id = history[i];
        if (counts_[id]++ == 0) set(x, id, x[id] > 0 ? x[id] / penalty : x[id] * penalty);
      }
      for (int i = begin; i < end; ++i) counts_[history[i]] = 0;
    }
    if (p.presence_penalty != 0 || p.frequency_penalty != 0) {
      for (int i = output; i < end; ++i) ++counts_[history[i]];
      for (int i = output; i < end; ++i) {
        const int id = history[i];
        if (counts_[id] == 0) continue;
        set(x, id, x[id] - static_cast<float>(p.presence_penalty + p.frequency_penalty * counts_[id]));
        counts_[id] = 0;
      }
    }
  }

  // Block maxima and, log2_scale not 0, sums. False where the row has no finite maximum, or a NaN.
  bool scan(const float* x, double log2_scale) {
    const float scale = static_cast<float>(log2_scale);
    if (scanned_ == x && edits_.empty() && (scale == 0 || scale == scanned_scale_)) return true;
    if (!kernels_.scan_row(x, vocab_, scale, maxima_.data(), scale == 0 ? nullptr : sums_.data())) return false;
    top_ = *std::max_element(maxima_.begin(), maxima_.end());
    scanned_ = x;
    scanned_scale_ = scale;
    return std::isfinite(top_);
  }

  // Σ exp((x - top) / temperature); scaled_ is each block's part of it.
  double total(double temperature) {
    double sum = 0;
    for (int b = 0; b < blocks_; ++b) {
      scaled_[b] = sums_[b] == 0 ? 0 : sums_[b] * own_exp((static_cast<double>(maxima_[b]) - top_) / temperature);
      sum += scaled_[b];
    }
    return sum;
  }

  // Token id, or -1 where logits are not finite. min_p, top_k and top_p in that order, each on what the one before it
  // left; then the token at which the running sum over the kept ids, ascending, exceeds uniform · their sum.
  int draw(const float* x, const SampleParameters& p, int64_t position) {
    const bool greedy = p.temperature < kGreedyBelow;
    const bool top_k = p.top_k > 0 && p.top_k < vocab_, cut = p.min_p > 0 || top_k, top_p = p.top_p < 1;
    if (!scan(x, greedy || cut ? 0 : kLog2E / p.temperature)) return -1;
    if (greedy) return first_best(x);
    log2_scale_ = static_cast<float>(kLog2E / p.temperature);
    const double uniform = static_cast<double>(philox(p.seed, position) >> 11) * 0x1p-53;
    double all = cut ? 0 : total(p.temperature);
    if (!cut && !top_p) {
      double left;
      const int b = invert(scaled_.data(), blocks_, uniform, &left), begin = b * kSampleBlock;
      const int n = std::min(kSampleBlock, vocab_ - begin);
      kernels_.weigh_block(x + begin, n, maxima_[b], log2_scale_, weights_.get());
      return begin + invert(weights_.get(), n, left);
    }
    float bound = -FLT_MAX;
    if (p.min_p > 0) bound = round_up_to_float(top_ + p.temperature * own_log(p.min_p));
    if (top_k) bound = std::max(bound, bound_of_best(x, static_cast<int>(p.top_k)));
    if (!cut) bound = bound_of_weight((1 - p.top_p) * all / vocab_, p.temperature);
    collect(x, bound);
    if (top_k && p.top_k < count_) {
      order_all();
      std::nth_element(order_.begin(), order_.begin() + (p.top_k - 1), order_.end(), Better{xs_.get()});
      keep(order_[p.top_k - 1]);
    }
    if (top_p) {
      if (cut) all = weigh();
      const double enough = p.top_p * all;
      narrow(enough, p.temperature);
      keep(last_of_nucleus(enough));
    }
    weigh();
    double left;
    const int chunk = invert(chunks_.data(), static_cast<int>(chunks_.size()), uniform, &left);
    const int begin = chunk * kSampleBlock, n = std::min(kSampleBlock, count_ - begin);
    return ids_[begin + invert(weights_.get() + begin, n, left)];
  }

  int first_best(const float* x) const {
    int b = 0;
    while (maxima_[b] != top_) ++b;
    int i = b * kSampleBlock;
    while (x[i] != top_) ++i;
    return i;
  }

  // The k best values of a scanned row into order_, the best first, the lower id first on ties.
  void rank(const float* x, int k) {
    collect(x, bound_of_best(x, k));
    order_all();
    std::partial_sort(order_.begin(), order_.begin() + k, order_.end(), Better{xs_.get()});
  }

  // A value that at least k others reach, and few more.
  float bound_of_best(const float* x, int k) {
    if (k <= blocks_) {  // so many blocks have a maximum at or above the bound
      scaled_.assign(maxima_.begin(), maxima_.end());
      std::nth_element(scaled_.begin(), scaled_.begin() + (k - 1), scaled_.end(), std::greater<double>());
      return static_cast<float>(scaled_[k - 1]);
    }
    // Counted by sign, exponent and first bits of the mantissa, in an order that is that of the values.
    std::vector<int> bins(1 << 12);
    for (int i = 0; i < vocab_; ++i) {
      uint32_t bits;
      std::memcpy(&bits, x + i, sizeof bits);
      ++bins[(bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u)) >> 20];
    }
    uint32_t bin = 1 << 12;
    for (int above = 0; above < k; above += bins[bin]) --bin;
    const uint32_t bits = (bin << 20) ^ (bin >> 11 ? 0x80000000u : 0xffffffffu);
    float bound;
    std::memcpy(&bound, &bits, sizeof bound);
    return bound >= -FLT_MAX ? bound : -kInfinity;
  }

  // A value below that of every token of at least that weight, rounding allowed for.
  float bound_of_weight(double weight, double temperature) const {
    if (!(weight > 0)) return -FLT_MAX;
    const double bound = top_ + temperature * (own_log(weight) - 1e-3);
    return round_up_to_float(bound - 1e-6 * (std::fabs(top_) + std::fabs(bound)));
  }

  void collect(const float* x, float bound) {
    bound_ = bound;
    count_ = 0;
    for (int b = 0; b < blocks_; ++b) {
      if (!(maxima_[b] >= bound)) continue;
      const int begin = b * kSampleBlock;
      count_ += kernels_.select_at_least(x + begin, nullptr, begin, std::min(kSampleBlock, vocab_ - begin), bound,
                                         xs_.get() + count_, ids_.get() + count_);
    }
  }

  void order_all() {
    order_.resize(count_);
    std::iota(order_.begin(), order_.end(), 0);
  }

  // Drops every candidate that is worse than this one.
  void keep(int last) {
    const float bound = xs_[last];
    const int better_or_equal = select(0, last + 1, bound, 0);
    count_ = better_or_equal + select(last + 1, count_, std::nextafter(bound, kInfinity), better_or_equal);
  }

  // Moves the candidates of [begin, end) that reach the bound to `to` and following. Returns how many.
  int select(int begin, int end, float bound, int to) {
    return kernels_.select_at_least(xs_.get() + begin, ids_.get() + begin, 0, end - begin, bound, xs_.get() + to,
                                    ids_.get() + to);
  }

  // Weights of the candidates, relative to the best token; the sum of each block of them into chunks_. Returns Σ.
  double weigh() {
    double sum = 0;
    chunks_.clear();
    for (int i = 0; i < count_; i += kSampleBlock) {
      chunks_.push_back(kernels_.weigh_block(xs_.get() + i, std::min(kSampleBlock, count_ - i), top_, log2_scale_,
                                             weights_.get() + i));
      sum += chunks_.back();
    }
    return sum;
  }

  // Drops candidates that cannot belong to a nucleus of that weight: all that weigh less than t together weigh less
  // than t · count. Leaves the weights of the others.
  void narrow(double enough, double temperature) {
    while (true) {
      const double spare = weigh() - enough;
      const int before = count_;
      if (before < 2 * kFewMembers || spare <= 0) return;
      const float bound = bound_of_weight(spare / before, temperature);
      count_ = select(0, before, bound_ = bound, 0);
      if (count_ == before) return;
      if (count_ > before * 0.7) break;
    }
    weigh();
  }

  // The last of the fewest best candidates that weigh enough: found among those of one bin of values, binned again
  // while they are many.
  int last_of_nucleus(double enough) {
    double above = 0;
    order_all();
    double low = bound_, high = top_;
    while (static_cast<int>(order_.size()) > kFewMembers && low < high) {
      const int members = static_cast<int>(order_.size());
      const double scale = kBins / (high - low);
      double weights[kBins + 1] = {};  // by bin; rounding may put the highest into one more
      bins_.resize(members);
      for (int m = 0; m < members; ++m) bins_[m] = static_cast<int>((xs_[order_[m]] - low) * scale);
      for (int m = 0; m < members; ++m) weights[bins_[m]] += weights_[order_[m]];
      int bin = kBins;
      for (; bin > 0 && above + weights[bin] < enough; --bin) above += weights[bin];
      int left = 0;
      for (int m = 0; m < members; ++m)
        if (bins_[m] == bin) order_[left++] = order_[m];
      if (left == 0) return worst();  // the weights fall short of enough, by rounding
      order_.resize(left);
      low = kInfinity, high = -kInfinity;
      for (int i : order_) low = std::min<double>(low, xs_[i]), high = std::max<double>(high, xs_[i]);
    }
    if (low < high) std::sort(order_.begin(), order_.end(), Better{xs_.get()});
    for (int i : order_) {
      above += weights_[i];
      if (above >= enough) return i;
    }
    return order_.back();
  }

  int worst() const {
    int at = 0;
    for (int i = 1; i < count_; ++i)
      if (xs_[i] <= xs_[at]) at = i;
    return at;
  }

  const Kernels& kernels_;
  int vocab_ = 0, blocks_ = 0;
  // Of the row as last scanned, by block.
  const float* scanned_ = nullptr;
  float scanned_scale_ = 0, top_ = 0;
  std::vector<float> maxima_, sums_;
  std::vector<double> scaled_;
  // Candidates in the order of their ids.
  int count_ = 0;
  float bound_ = 0;  // which all of them reach
  float log2_scale_ = 0;
  std::unique_ptr<float[]> xs_, weights_, masked_;
  std::unique_ptr<int32_t[]> ids_;
  std::vector<double> chunks_;
  std::vector<int> order_, bins_;
  std::vector<Edit> edits_;
  std::vector<uint32_t> counts_;
};

Sampler::Sampler(std::shared_ptr<ThreadPool> pool, const std::string& isa) : pool_(std::move(pool)) {
  const Kernels& kernels = kernels_for(isa);
  for (int thread = 0; thread < pool_->threads(); ++thread) workers_.push_back(std::make_unique<Worker>(kernels));
}

Sampler::~Sampler() = default;

namespace {

[[noreturn]] void refuse(const char* name, int index, long value) {
  throw std::invalid_argument(std::string(name) + "[" + std::to_string(index) + "] is " + std::to_string(value) +
                              ", out of range");
}

void check_range(const char* name, int index, long value, long begin, long end) {
  if (value < begin || value >= end) refuse(name, index, value);
}

void check(const SampleView& v) {
  if (v.vocab < 1) throw std::invalid_argument("logits have no columns");
  check_range("bias_start", 0, v.bias_start[0], 0, 1);
  check_range("history_start", 0, v.history_start[0], 0, 1);
  if (v.num_masks > 0 && v.words != (v.vocab + 31) / 32)
    throw std::invalid_argument("masks have " + std::to_string(v.words) + " words for a vocabulary of " +
                                std::to_string(v.vocab));
  for (int d = 0; d < v.draws; ++d) {
    const SampleParameters& p = v.parameters[d];
    check_range("rows", d, v.rows[d], d ? v.rows[d - 1] + 1 : 0, v.num_rows);
    check_range("token_ids", d, v.token_ids[d], -1, v.vocab);
    check_range("num_logprobs", d, v.num_logprobs[d], -1, v.width + 1L);
    check_range("mask_rows", d, v.mask_rows[d], -1, v.num_masks);
    check_range("bias_start", d + 1, v.bias_start[d + 1], v.bias_start[d], v.biases + 1L);
    check_range("history_start", d + 1, v.history_start[d + 1], v.history_start[d], v.tokens + 1L);
    check_range("output_start", d, v.output_start[d], v.history_start[d], v.history_start[d + 1] + 1L);
    if (!(p.temperature >= 0 && p.temperature <= 100 && p.top_p > 0 && p.top_p <= 1 && p.min_p >= 0 && p.min_p <= 1 &&
          p.top_k >= 0 && p.repetition_penalty > 0 && std::isfinite(p.repetition_penalty) &&
          std::isfinite(p.presence_penalty) && std::isfinite(p.frequency_penalty)))
      throw std::invalid_argument("parameters[" + std::to_string(d) + "] are out of range");
  }
  for (int i = 0; i < v.biases; ++i) check_range("bias_ids", i, v.bias_ids[i], 0, v.vocab);
  for (int i = 0; i < v.tokens; ++i) check_range("history", i, v.history[i], 0, v.vocab);
}

}  // namespace

void Sampler::run(const SampleView& view) {
  check(view);
  std::lock_guard<std::mutex> lock(pool_->mutex());
  pool_->run(view.draws, [&](int d, int thread) { workers_[thread]->run(view, d); });
}

}  // namespace fptq
