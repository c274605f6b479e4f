// SPDX-License-Identifier: MIT
#include "pool.hpp"

#include <chrono>

#include "error.hpp"

namespace engine {

pool::pool(int threads) {
  if (threads < 1 || threads > 1024) refuse("threads is ", threads, "; wanted 1 to 1024");
  for (int t = 1; t < threads; ++t) workers_.emplace_back([this] { serve(); });
}

pool::~pool() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
    ++generation_;
  }
  wake_.notify_all();
  for (std::thread& w : workers_) w.join();
}

void pool::drain() {
  for (fovea::isize i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < total_;) call_(context_, i);
}

/// Every worker joins every loop: it is over when all of them have counted themselves out.
void pool::run(fovea::isize n, void (*f)(void*, fovea::isize), void* context) {
  call_ = f, context_ = context, total_ = n;
  next_.store(0, std::memory_order_relaxed);
  inside_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
  {
    std::lock_guard lock(mutex_);
    generation_.fetch_add(1, std::memory_order_release);
  }
  wake_.notify_all();
  drain();
  for (int tries = 0; inside_.load(std::memory_order_acquire) > 0; ++tries)
    if (tries > 2000) std::this_thread::yield();
}

void pool::serve() {
  using clock = std::chrono::steady_clock;
  for (unsigned seen = 0;;) {
    const auto start = clock::now();
    for (int tries = 0; generation_.load(std::memory_order_acquire) == seen; ++tries) {
      if (tries % 64 == 63 && clock::now() - start > std::chrono::microseconds(200)) {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_acquire) != seen; });
      }
    }
    seen = generation_.load(std::memory_order_acquire);
    if (stop_) return;
    drain();
    inside_.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace engine
