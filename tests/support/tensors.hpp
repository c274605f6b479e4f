// SPDX-License-Identifier: MIT
#pragma once
/// @file  Owning tensors of any storage type and layout, in memory whose every other byte is a guard.
///
/// Contract   memory that holds no element is filled with 0xff bytes (a NaN in every type): reading it poisons the result, and
///            `guards_intact` sees any write. An unaligned tensor starts one element behind a 64-byte boundary.

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include <fovea/core/view.hpp>
#include <fovea/core/workspace.hpp>

#include "support/compare.hpp"
#include "support/random.hpp"

namespace test {

enum class layout {
  bhnd,       ///< dense [B, H, n, w]
  bnhd,       ///< dense [B, n, H, w]
  strided,    ///< [B, H, n, w] with gaps behind rows, heads and batch items
  unaligned,  ///< dense [B, H, n, w], one element off a 64-byte boundary
};
inline constexpr layout layouts[] = {layout::bhnd, layout::bnhd, layout::strided, layout::unaligned};
inline const char* name_of(layout l) {
  return l == layout::bhnd ? "bhnd" : l == layout::bnhd ? "bnhd" : l == layout::strided ? "strided" : "unaligned";
}

class tensor {
 public:
  tensor() = default;
  tensor(dtype type, isize batch, isize heads, isize length, isize width, layout l = layout::bhnd) {
    shape_.type = type;
    shape_.batch = batch, shape_.heads = heads, shape_.length = length, shape_.width = width;
    isize row = width, head = length * width, item = heads * length * width;
    if (l == layout::bnhd) row = heads * width, head = width, item = length * heads * width;
    if (l == layout::strided) row = width + 3, head = length * row + 5, item = heads * head + 7;
    shape_.batch_stride = item, shape_.head_stride = head, shape_.row_stride = row;
    const isize elements = batch * item + (l == layout::strided ? 1 : 0);
    offset_ = guard + (l == layout::unaligned ? fovea::size_of(type) : 0);
    memory_ = fovea::buffer(offset_ + static_cast<std::size_t>(elements) * fovea::size_of(type) + guard);
    std::memset(memory_.data(), 0xff, memory_.size());
  }

  dtype type() const { return shape_.type; }
  isize batch() const { return shape_.batch; }
  isize heads() const { return shape_.heads; }
  isize length() const { return shape_.length; }
  isize width() const { return shape_.width; }
  isize size() const { return batch() * heads() * length() * width(); }

  fovea::tensor_mut ref() {
    fovea::tensor_mut v = shape_;
    v.data = memory_.data() + offset_;
    return v;
  }
  fovea::tensor_ref ref() const { return const_cast<tensor*>(this)->ref(); }
  operator fovea::tensor_mut() { return ref(); }        // NOLINT(google-explicit-constructor)
  operator fovea::tensor_ref() const { return ref(); }  // NOLINT(google-explicit-constructor)
  template <class T>
  fovea::view<T> as() {
    const fovea::tensor_mut r = ref();
    return {static_cast<T*>(r.data), r.batch, r.heads, r.length, r.width, r.batch_stride, r.head_stride, r.row_stride};
  }

  double get(isize b, isize h, isize i, isize c) const { return ref().get(b, h, i, c); }
  void set(isize b, isize h, isize i, isize c, double x) { ref().set(b, h, i, c, x); }

  /// f() for every element, in [B, H, n, w] order.
  template <class F>
  tensor& fill(F&& f) {
    const fovea::tensor_mut r = ref();
    for (isize b = 0; b < batch(); ++b)
      for (isize h = 0; h < heads(); ++h)
        for (isize i = 0; i < length(); ++i)
          for (isize c = 0; c < width(); ++c) r.set(b, h, i, c, f());
    return *this;
  }
  tensor& fill_nan() {
    return fill([] { return std::numeric_limits<double>::quiet_NaN(); });
  }
  tensor& fill_normal(random& r, double deviation = 1.0) {
    return fill([&] { return deviation * r.normal(); });
  }

  array values() const {
    array a{{batch(), heads(), length(), width()}, {}};
    a.data.reserve(static_cast<std::size_t>(size()));
    const fovea::tensor_ref r = ref();
    for (isize b = 0; b < batch(); ++b)
      for (isize h = 0; h < heads(); ++h)
        for (isize i = 0; i < length(); ++i)
          for (isize c = 0; c < width(); ++c) a.data.push_back(r.get(b, h, i, c));
    return a;
  }

  /// Every byte that belongs to no element still holds 0xff.
  bool guards_intact() const {
    std::vector<std::byte> copy = bytes();
    const fovea::tensor_ref r = ref();
    const std::size_t row = static_cast<std::size_t>(width()) * fovea::size_of(type());
    for (isize b = 0; b < batch(); ++b)
      for (isize h = 0; h < heads(); ++h)
        for (isize i = 0; i < length(); ++i)
          std::memset(copy.data() + offset_ + static_cast<std::size_t>(r.offset(b, h, i)) * fovea::size_of(type()),
                      0xff, row);
    return std::all_of(copy.begin(), copy.end(), [](std::byte x) { return x == std::byte{0xff}; });
  }
  /// All memory, guards included: to see that nothing was touched.
  std::vector<std::byte> bytes() const {
    std::vector<std::byte> copy(memory_.size());
    if (memory_.size() > 0) std::memcpy(copy.data(), memory_.data(), memory_.size());
    return copy;
  }

 private:
  static constexpr std::size_t guard = 64;
  fovea::tensor_mut shape_;
  fovea::buffer memory_;
  std::size_t offset_ = guard;
};

inline tensor normal(random& r, dtype type, isize batch, isize heads, isize length, isize width,
                     layout l = layout::bhnd, double deviation = 1.0) {
  tensor t(type, batch, heads, length, width, l);
  t.fill_normal(r, deviation);
  return t;
}
/// For an output: every element NaN.
inline tensor unwritten(dtype type, isize batch, isize heads, isize length, isize width, layout l = layout::bhnd) {
  tensor t(type, batch, heads, length, width, l);
  t.fill_nan();
  return t;
}
/// The numbers of `from`, rounded to `type`; the shape must have four dimensions, or three (then the width is 1).
inline tensor copy_of(const array& from, dtype type, layout l = layout::bhnd) {
  const auto& s = from.dims;
  tensor t(type, s.at(0), s.at(1), s.at(2), s.size() > 3 ? s[3] : 1, l);
  std::size_t at = 0;
  t.fill([&] { return from.data[at++]; });
  return t;
}
/// Rows [first, first + count) in memory of their own.
inline tensor rows_of(const tensor& from, isize first, isize count, layout l = layout::bhnd) {
  tensor t(from.type(), from.batch(), from.heads(), count, from.width(), l);
  for (isize b = 0; b < t.batch(); ++b)
    for (isize h = 0; h < t.heads(); ++h)
      for (isize i = 0; i < count; ++i)
        std::memcpy(t.ref().row(b, h, i), from.ref().row(b, h, first + i),
                    static_cast<std::size_t>(t.width()) * fovea::size_of(t.type()));
  return t;
}

/// The same bits in every element; "" or where the first difference is.
inline std::string bits_differ(const tensor& a, const tensor& b) {
  if (a.type() != b.type() || a.batch() != b.batch() || a.heads() != b.heads() || a.length() != b.length() ||
      a.width() != b.width())
    return "shapes or types differ";
  const std::size_t element = fovea::size_of(a.type());
  for (isize i = 0; i < a.batch(); ++i)
    for (isize h = 0; h < a.heads(); ++h)
      for (isize n = 0; n < a.length(); ++n) {
        const auto* x = static_cast<const std::byte*>(a.ref().row(i, h, n));
        const auto* y = static_cast<const std::byte*>(b.ref().row(i, h, n));
        for (isize c = 0; c < a.width(); ++c)
          if (std::memcmp(x + static_cast<std::size_t>(c) * element, y + static_cast<std::size_t>(c) * element,
                          element) != 0) {
            std::ostringstream out;
            out.precision(17);
            out << "[" << i << ", " << h << ", " << n << ", " << c << "]: " << a.get(i, h, n, c) << " and "
                << b.get(i, h, n, c);
            return out.str();
          }
      }
  return {};
}
inline bool same_bits(const tensor& a, const tensor& b) { return bits_differ(a, b).empty(); }

}  // namespace test

#define CHECK_SAME_BITS(a, b) CHECK(::test::bits_differ(a, b) == std::string())
