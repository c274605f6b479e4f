// SPDX-License-Identifier: MIT
/// @file  Counts every operator new of the program; under a sanitiser, which has operators of its own, nothing is counted.

#include "cache/allocations.hpp"

#include <atomic>
#include <cstdlib>
#include <new>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define FOVEA_TEST_SANITISED
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) || __has_feature(memory_sanitizer)
#define FOVEA_TEST_SANITISED
#endif
#endif

namespace {
std::atomic<long> count{0};
}  // namespace

long cache_test::allocations() { return count; }

#if !defined(FOVEA_TEST_SANITISED)
namespace {
void* take(std::size_t size, std::size_t alignment) {
  ++count;
  void* const p = alignment == 0 ? std::malloc(size > 0 ? size : 1)
                                 : std::aligned_alloc(alignment, (size + alignment) / alignment * alignment);
  if (p == nullptr) throw std::bad_alloc();
  return p;
}
}  // namespace

void* operator new(std::size_t size) { return take(size, 0); }
void* operator new(std::size_t size, std::align_val_t alignment) {
  return take(size, static_cast<std::size_t>(alignment));
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, std::size_t) noexcept { std::free(p); }
void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete(void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }
#endif
