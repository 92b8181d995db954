#include "core/thread_pool.h"

#include <chrono>
#include <stdexcept>
#include <string>

namespace fptq {

namespace {

constexpr int kMaxThreads = 1024;
constexpr auto kSpin = std::chrono::microseconds(40);

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}

}  // namespace

ThreadPool::ThreadPool(int threads) : threads_(threads) {
  const auto cannot_start = [threads] {
    return std::invalid_argument("this machine cannot start " + std::to_string(threads) + " threads");
  };
  if (threads < 1 || threads > kMaxThreads) throw cannot_start();
  shares_.reset(new Share[threads]);
  try {
    for (int thread = 1; thread < threads; ++thread) workers_.emplace_back([this, thread] { loop(thread); });
  } catch (const std::exception&) {
    stop();
    throw cannot_start();
  }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
  {
    std::lock_guard<std::mutex> lock(sleep_mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void ThreadPool::start(int tasks, Function function, const void* context) {
  const uint32_t job = job_.load(std::memory_order_relaxed) + 1;
  function_.store(function, std::memory_order_relaxed);
  context_.store(context, std::memory_order_relaxed);
  remaining_.store(tasks, std::memory_order_relaxed);
  for (int thread = 0; thread < threads_; ++thread) {
    const uint64_t name = static_cast<uint64_t>(job) << 32, all = tasks;
    shares_[thread].end.store(name | all * (thread + 1) / threads_, std::memory_order_relaxed);
    shares_[thread].next.store(name | all * thread / threads_, std::memory_order_release);
  }
  job_.store(job);  // sequentially consistent with sleepers_: a worker going to sleep sees the job, or we see it
  if (sleepers_.load() > 0) {
    {
      std::lock_guard<std::mutex> lock(sleep_mutex_);
    }
    wake_.notify_all();
  }
  work(job, 0);
  for (int spins = 0; remaining_.load(std::memory_order_acquire) != 0; ++spins) {
    if (spins < 4096) pause();
    else std::this_thread::yield();  // a worker holding the last task may have lost its core
  }
}

void ThreadPool::work(uint32_t job, int thread) {
  const Function function = function_.load(std::memory_order_relaxed);
  const void* context = context_.load(std::memory_order_relaxed);
  for (int i = 0; i < threads_; ++i) {
    Share& share = shares_[(thread + i) % threads_];
    uint64_t next = share.next.load(std::memory_order_acquire);
    while (true) {
      const uint64_t end = share.end.load(std::memory_order_relaxed);
      if (next >> 32 != job || end >> 32 != job || next >= end) break;
      if (!share.next.compare_exchange_weak(next, next + 1, std::memory_order_acq_rel)) continue;
      function(context, static_cast<int>(static_cast<uint32_t>(next)), thread);
      remaining_.fetch_sub(1, std::memory_order_release);
      next = share.next.load(std::memory_order_acquire);
    }
  }
}

void ThreadPool::loop(int thread) {
  uint32_t seen = 0;
  while (true) {
    auto deadline = std::chrono::steady_clock::now() + kSpin;
    while (job_.load(std::memory_order_acquire) == seen && !stopping_.load(std::memory_order_relaxed)) {
      for (int i = 0; i < 16 && job_.load(std::memory_order_relaxed) == seen; ++i) pause();
      if (std::chrono::steady_clock::now() < deadline) continue;
      std::unique_lock<std::mutex> lock(sleep_mutex_);
      sleepers_.fetch_add(1);
      wake_.wait(lock, [&] { return job_.load() != seen || stopping_; });
      sleepers_.fetch_sub(1);
    }
    if (stopping_) return;
    seen = job_.load(std::memory_order_acquire);
    work(seen, thread);
  }
}

}  // namespace fptq
