// SPDX-License-Identifier: MIT
#pragma once
/// @file  Execution policies: where the threads of a call come from. The library starts none of its own.
///
///   serial                  the calling thread
///   threads(k)              a pool of k threads (the caller is one of them), kept for the life of the object
///   openmp{k}               an OpenMP parallel region (when compiled with OpenMP)
///   executor{k, callable}   callable(n, f) runs f(0) ... f(n - 1), in any order, on up to k threads: the engine's own pool
///
/// Contract   `parallel_for(n, f)` returns when all f(i) have returned; f does not throw. Results never depend on the policy:
///            the work is cut by shape alone, and each piece is computed by one thread in a fixed order.

#include <atomic>
#include <concepts>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include <fovea/core/contract.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

template <class P>
concept execution_policy = requires(const P& p, void (*f)(isize)) {
  { p.concurrency() } -> std::convertible_to<int>;
  p.parallel_for(isize{1}, f);
};

struct serial_policy {
  int concurrency() const noexcept { return 1; }
  template <class F>
  void parallel_for(isize n, F&& f) const {
    for (isize i = 0; i < n; ++i) f(i);
  }
};
inline constexpr serial_policy serial{};

class threads {
 public:
  explicit threads(int count) : shared_(std::make_unique<shared_state>()) {
    require(count >= 1 && count <= 4096, "threads(", count, "): wanted 1 to 4096 threads");
    count_ = count;
    workers_.reserve(static_cast<std::size_t>(count - 1));
    for (int t = 1; t < count; ++t) workers_.emplace_back([s = shared_.get()] { s->serve(); });
  }
  threads(const threads&) = delete;
  threads& operator=(const threads&) = delete;
  ~threads() {
    {
      std::lock_guard lock(shared_->mutex);
      shared_->stop = true;
    }
    shared_->wake.notify_all();
    for (auto& w : workers_) w.join();
  }

  int concurrency() const noexcept { return count_; }

  template <class F>
  void parallel_for(isize n, F&& f) const {
    if (n <= 1 || count_ == 1) return serial.parallel_for(n, f);
    auto call = [](void* context, isize i) { (*static_cast<std::remove_reference_t<F>*>(context))(i); };
    shared_->run(n, call, const_cast<void*>(static_cast<const void*>(&f)));
  }

 private:
  struct shared_state {
    std::mutex entry;  // one parallel_for at a time
    std::mutex mutex;
    std::condition_variable wake, done;
    std::atomic<isize> next{0};
    isize total = 0, busy = 0;
    unsigned long generation = 0;
    bool stop = false;
    void (*call)(void*, isize) = nullptr;
    void* context = nullptr;

    void drain() {
      for (isize i; (i = next.fetch_add(1, std::memory_order_relaxed)) < total;) call(context, i);
    }
    void run(isize n, void (*c)(void*, isize), void* x) {
      std::lock_guard one(entry);
      {
        std::unique_lock lock(mutex);
        done.wait(lock, [&] { return busy == 0; });  // a late worker may still be leaving the last call
        total = n, call = c, context = x;
        next.store(0, std::memory_order_relaxed);
        ++generation;
      }
      wake.notify_all();
      drain();
      std::unique_lock lock(mutex);
      done.wait(lock, [&] { return busy == 0; });
      total = 0;
    }
    void serve() {
      unsigned long seen = 0;
      std::unique_lock lock(mutex);
      for (;;) {
        wake.wait(lock, [&] { return stop || generation != seen; });
        if (stop) return;
        seen = generation;
        ++busy;
        lock.unlock();
        drain();
        lock.lock();
        if (--busy == 0) done.notify_all();
      }
    }
  };
  int count_ = 1;
  std::unique_ptr<shared_state> shared_;
  std::vector<std::thread> workers_;
};

#if defined(_OPENMP)
struct openmp {
  int count = 0;  ///< 0: OpenMP's own choice
  int concurrency() const noexcept { return count > 0 ? count : omp_get_max_threads(); }
  template <class F>
  void parallel_for(isize n, F&& f) const {
#pragma omp parallel for schedule(dynamic, 1) num_threads(concurrency())
    for (isize i = 0; i < n; ++i) f(i);
  }
};
#endif

/// Adapts a callable `for_each(n, f)` of the engine's.
template <class ForEach>
struct executor {
  int count = 1;
  ForEach for_each;
  executor(int k, ForEach run) : count(k), for_each(std::move(run)) {
    require(k >= 1, "executor: concurrency is ", k, "; wanted at least 1");
  }
  int concurrency() const noexcept { return count; }
  template <class F>
  void parallel_for(isize n, F&& f) const {
    for_each(n, std::forward<F>(f));
  }
};

/// A count that tasks of one for_tasks wait for. Tasks are handed out in order, so that a task may wait for what tasks with smaller
/// numbers do, on any number of threads, and must not wait for others.
class progress {
 public:
  void reach(isize count) noexcept { count_.store(count, std::memory_order_release); }
  void wait(isize count) const noexcept {
    for (int tries = 0; count_.load(std::memory_order_acquire) < count; ++tries)
      if (tries > 200) std::this_thread::yield();
  }

 private:
  std::atomic<isize> count_{0};
};

/// A policy by reference with its type erased: what mechanisms receive.
class exec_ref {
 public:
  template <execution_policy P>
    requires(!std::same_as<P, exec_ref>)
  exec_ref(const P& p)  // NOLINT(google-explicit-constructor)
      : policy_(&p),
        count_(p.concurrency()),
        run_([](const void* policy, isize n, body_ref f) { static_cast<const P*>(policy)->parallel_for(n, f); }) {}

  int concurrency() const noexcept { return count_; }

  template <class F>
  void parallel_for(isize n, F&& f) const {
    run_(policy_, n, body_ref{const_cast<void*>(static_cast<const void*>(&f)), [](void* c, isize i) {
                                (*static_cast<std::remove_reference_t<F>*>(c))(i);
                              }});
  }

  /// Calls f(task, slot) for every task in [0, tasks). A slot is used by one thread at a time, so scratch memory may be
  /// indexed by it; slot < min(concurrency, tasks). Tasks are handed out in order, the next one to whoever is free.
  template <class F>
  void for_tasks(isize tasks, F&& f) const {
    const isize limit = count_;
    const isize slots = tasks < limit ? tasks : limit;
    if (slots <= 1) {
      for (isize t = 0; t < tasks; ++t) f(t, isize{0});
      return;
    }
    std::atomic<isize> next{0};
    parallel_for(slots, [&](isize slot) {
      for (isize t; (t = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) f(t, slot);
    });
  }

 private:
  struct body_ref {
    void* context;
    void (*call)(void*, isize);
    void operator()(isize i) const { call(context, i); }
  };
  const void* policy_;
  int count_;
  void (*run_)(const void*, isize, body_ref);
};

}  // namespace FOVEA_ABI
}  // namespace fovea
