// SPDX-License-Identifier: MIT
#pragma once
/// @file  Scratch memory of a call: a span that the caller owns, cut into 64-byte aligned pieces by one layout function.
///
/// Contract   a mechanism lays its scratch out with an `arena`; run over a null arena the same function measures it, so that
///            `workspace_size` and the layout cannot disagree. Kernels allocate nothing.

#include <cstddef>
#include <cstdint>
#include <new>
#include <span>
#include <utility>

#include <fovea/core/types.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

inline constexpr std::size_t alignment = 64;

constexpr std::size_t round_up(std::size_t x, std::size_t to) { return (x + to - 1) / to * to; }
constexpr isize ceil_div(isize a, isize b) { return (a + b - 1) / b; }

class arena {
 public:
  arena() = default;  ///< measures
  explicit arena(std::span<std::byte> memory) {
    const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
    const std::size_t skip = round_up(address, alignment) - address;
    base_ = memory.data() + skip;
    size_ = memory.size() > skip ? memory.size() - skip : 0;
  }
  /// `count` elements of T, uninitialised, 64-byte aligned; null while measuring.
  template <class T>
  T* take(isize count) {
    const std::size_t at = used_;
    used_ = round_up(used_ + static_cast<std::size_t>(count) * sizeof(T), alignment);
    if (base_ == nullptr) return nullptr;
    FOVEA_ASSERT(at + static_cast<std::size_t>(count) * sizeof(T) <= size_);
    return reinterpret_cast<T*>(base_ + at);
  }
  /// Bytes that a caller must supply for what was taken, whatever the alignment of its memory.
  std::size_t bytes() const { return used_ == 0 ? 0 : used_ + (base_ == nullptr ? alignment : 0); }

 private:
  std::byte* base_ = nullptr;
  std::size_t size_ = 0, used_ = 0;
};

/// Owned, 64-byte aligned, uninitialised bytes: states and caller-side workspaces.
class buffer {
 public:
  buffer() = default;
  explicit buffer(std::size_t bytes)
      : data_(bytes == 0 ? nullptr : static_cast<std::byte*>(::operator new (bytes, std::align_val_t{alignment}))),
        size_(bytes) {}
  /// Memory of somebody else, for as long as that lives. A copy owns what it copies.
  static buffer over(std::span<std::byte> memory) {
    buffer b;
    b.data_ = memory.data(), b.size_ = memory.size(), b.owns_ = false;
    return b;
  }
  buffer(buffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)), owns_(other.owns_) {}
  buffer& operator=(buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(owns_, other.owns_);
    return *this;
  }
  buffer(const buffer& other) : buffer(other.size_) {
    for (std::size_t i = 0; i < size_; ++i) data_[i] = other.data_[i];
  }
  buffer& operator=(const buffer& other) {
    if (this != &other) *this = buffer(other);
    return *this;
  }
  ~buffer() {
    if (owns_ && data_ != nullptr) ::operator delete (data_, std::align_val_t{alignment});
  }
  std::byte* data() const { return data_; }
  std::size_t size() const { return size_; }
  std::span<std::byte> span() const { return {data_, size_}; }

 private:
  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
  bool owns_ = true;
};

}  // namespace FOVEA_ABI
}  // namespace fovea
