// SPDX-License-Identifier: MIT
#pragma once
/// @file  The engine's threads, as fovea and the dense layers take them: any type with concurrency() and parallel_for is an executor.
///
/// A decode step is about 150 short parallel loops. Workers therefore wait awake for a moment before they sleep: waking a sleeping
/// thread costs as much as such a loop.
///
/// Contract   parallel_for(n, f) returns when f(0) ... f(n - 1) have returned; the caller is one of the threads; f does not throw.

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include <fovea/core/types.hpp>

namespace engine {

class pool {
 public:
  explicit pool(int threads);
  pool(const pool&) = delete;
  pool& operator=(const pool&) = delete;
  ~pool();

  int concurrency() const noexcept { return static_cast<int>(workers_.size()) + 1; }
  template <class F>
  void parallel_for(fovea::isize n, F&& f) const {
    if (n <= 1 || workers_.empty()) {
      for (fovea::isize i = 0; i < n; ++i) f(i);
      return;
    }
    const_cast<pool*>(this)->run(
        n, [](void* context, fovea::isize i) { (*static_cast<std::remove_reference_t<F>*>(context))(i); },
        const_cast<void*>(static_cast<const void*>(&f)));
  }

 private:
  void run(fovea::isize n, void (*f)(void*, fovea::isize), void* context);
  void serve();
  void drain();

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<unsigned> generation_{0};  ///< of the loop that workers may join
  std::atomic<int> inside_{0};           ///< workers that have not left the last loop
  std::atomic<bool> stop_{false};
  std::atomic<fovea::isize> next_{0};
  fovea::isize total_ = 0;
  void (*call_)(void*, fovea::isize) = nullptr;
  void* context_ = nullptr;
};

}  // namespace engine
