// A persistent pool for jobs of microseconds: workers spin briefly for the next job, then sleep.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace fptq {

class ThreadPool {
 public:
  // The caller of run() counts as one. Throws std::invalid_argument where there are none, or more than can be started.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return threads_; }

  // Calls fn(task, thread) for every task in [0, tasks), on the caller and the workers, and returns when all are done.
  // Each thread starts on a contiguous share of its own (so that a weight panel meets the same cache at every step)
  // and then helps the others. fn must not throw. One job at a time: hold `mutex()` around a sequence of runs.
  template <class F>
  void run(int tasks, const F& fn) {
    if (tasks <= 1 || threads_ == 1) {
      for (int task = 0; task < tasks; ++task) fn(task, 0);
      return;
    }
    start(
        tasks, [](const void* context, int task, int thread) { (*static_cast<const F*>(context))(task, thread); }, &fn);
  }

  std::mutex& mutex() { return run_mutex_; }

 private:
  using Function = void (*)(const void* context, int task, int thread);

  // Tasks next..end of a job; the upper halves of both name that job. A worker that is late for its own job, while the
  // next one is being dealt out, meets another name in one of them or fails to claim, and runs nothing.
  struct alignas(64) Share {
    std::atomic<uint64_t> next{0};
    std::atomic<uint64_t> end{0};
  };

  void start(int tasks, Function function, const void* context);
  void work(uint32_t job, int thread);
  void loop(int thread);
  void stop();

  const int threads_;
  std::unique_ptr<Share[]> shares_;
  std::atomic<Function> function_{nullptr};
  std::atomic<const void*> context_{nullptr};
  alignas(64) std::atomic<uint32_t> job_{0};
  alignas(64) std::atomic<int> remaining_{0};
  std::atomic<bool> stopping_{false};
  std::atomic<int> sleepers_{0};
  std::mutex sleep_mutex_, run_mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
};

}  // namespace fptq
