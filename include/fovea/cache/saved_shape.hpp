// SPDX-License-Identifier: MIT
#pragma once
/// @file  The sizes of a KV store as the first fields of its saved bytes: heads, d, e, flags; the element type stands in the header.

#include <fovea/cache/write_rows.hpp>
#include <fovea/core/saved.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

inline std::int64_t saved_flags(const kv_shape& s) {
  return (s.scale == scale_per::group ? 1 : 0) + (s.values_in_keys ? 2 : 0) + (s.form == kv_form::packed ? 4 : 0) +
         (s.rotated ? 8 : 0);
}
inline std::uint32_t saved_type(const kv_shape& s) { return static_cast<std::uint32_t>(s.type); }

template <std::size_t Fields>
kv_shape saved_shape(const char* what, const saved<Fields>& s) {
  static_assert(Fields > 4);
  require(s.fields[3] >= 0 && s.fields[3] <= 15, "the saved ", what, "'s header is damaged");
  const kv_shape shape{s.fields[0],
                       s.fields[1],
                       s.fields[2],
                       static_cast<dtype>(s.header.type),
                       (s.fields[3] & 1) != 0 ? scale_per::group : scale_per::row,
                       (s.fields[3] & 2) != 0,
                       (s.fields[3] & 4) != 0 ? kv_form::packed : kv_form::rows,
                       (s.fields[3] & 8) != 0};
  check_kv_shape(what, shape);
  return shape;
}

/// Rows [0, rows) of every head from one block to another of the same shape.
inline void copy_rows(const kv_layout& from, const std::byte* source, const kv_layout& to, std::byte* target,
                      isize rows) {
  const kv_shape& s = from.shape();
  const row_writer writer(s, nullptr);
  auto* start = const_cast<std::byte*>(source);
  for (isize g = 0; g < s.heads; ++g)
    for (isize j = 0; j < rows; ++j) {
      writer.move(from.key(start, g, j), s.d, nullptr, 0, to.key(target, g, j));
      if (!s.values_in_keys) writer.move(from.value(start, g, j), s.e, nullptr, 0, to.value(target, g, j));
    }
}

}  // namespace detail
}  // namespace FOVEA_ABI
}  // namespace fovea
