// SPDX-License-Identifier: MIT
#pragma once
/// @file  kv_sequence for memory that an engine owns: strided views, paged memory of any order, a ring.
///
///   sequence_of(k, v, b)                              item b of views [B, G, m, d] and [B, G, m, e]
///   paged_sequence(shape, k, v, page, table, tokens)  pages anywhere: k and v apart, or interleaved (then v.data = k.data + offset)
///   ring_sequence(shape, k, v, first, size, tokens)   token t >= first in slot first + (t - first) % size
///   some_heads(sequence, first, count, step)          KV heads first, first + step, ...: what one of several calls over a store takes
///
/// Contract   nothing is copied and nothing owned: memory and table stay where they are until the call is over. Strides are in bytes,
///            those of scales in floats.

#include <span>

#include <fovea/cache/ring.hpp>
#include <fovea/core/contract.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

/// Item b of two views.
inline kv_sequence sequence_of(const tensor_ref& k, const tensor_ref& v, isize b = 0) {
  detail::check_tensor("k", k), detail::check_tensor("v", v);
  require(b >= 0 && b < k.batch && v.batch == k.batch && v.heads == k.heads && v.length == k.length, "item ", b,
          " of k ", detail::describe(k), " and v ", detail::describe(v), "; batch, heads and length must be equal");
  kv_sequence s;
  if (k.length > 0) s.k = rows_of(k, b, 0), s.v = rows_of(v, b, 0);
  s.k.type = k.type, s.v.type = v.type;
  const auto bytes = [](const tensor_ref& t) { return t.head_stride * static_cast<isize>(size_of(t.type)); };
  s.k_head_bytes = bytes(k), s.v_head_bytes = bytes(v);
  s.heads = k.heads, s.d = k.width, s.e = v.width, s.length = k.length;
  return s;
}

/// Where rows of keys (or of values) lie: row r of KV head g of page x is at data + x page_bytes + g head_bytes + r row_bytes.
struct row_memory {
  const void* data = nullptr;
  isize page_bytes = 0, head_bytes = 0, row_bytes = 0;
  const float* scales = nullptr;  ///< int8
  isize page_scales = 0, head_scales = 0;

  /// Pages [pages, heads, page, width] of one tensor, behind each other.
  static row_memory heads_first(const void* data, const kv_shape& s, isize page, isize width,
                                const float* scales = nullptr) {
    const isize row = width * static_cast<isize>(size_of(s.type)), few = s.scales_of(width);
    return {data, s.heads * page * row, page * row, row, scales, s.heads * page * few, page * few};
  }
};

namespace detail {
inline kv_sequence sequence_in(const kv_shape& s, const row_memory& k, const row_memory& v, isize length) {
  kv_sequence x;
  x.heads = s.heads, x.d = s.d, x.e = s.e, x.length = length;
  const auto fill = [&](row_source& to, const row_memory& from, isize width) {
    to.data = static_cast<const std::byte*>(from.data), to.type = s.type, to.row_bytes = from.row_bytes;
    to.scales = from.scales, to.scale_row = s.scales_of(width);
    to.page_bytes = from.page_bytes, to.page_scales = from.page_scales;
  };
  fill(x.k, k, s.d), fill(x.v, v, s.e);
  x.k.rotated = s.rotated;
  if (s.form == kv_form::packed) x.k.form = row_form::packed_keys, x.v.form = row_form::packed_values;
  x.k_head_bytes = k.head_bytes, x.v_head_bytes = v.head_bytes;
  x.k_head_scales = k.head_scales, x.v_head_scales = v.head_scales;
  return x;
}
}  // namespace detail

/// `table` holds ceil(tokens / page) page numbers, or more.
inline kv_sequence paged_sequence(const kv_shape& s, const row_memory& k, const row_memory& v, isize page,
                                  std::span<const std::int32_t> table, isize tokens) {
  require(page >= 1 && tokens >= 0, "paged_sequence: ", tokens, " tokens in pages of ", page,
          "; wanted at least 0 and 1");
  const isize pages = static_cast<isize>(table.size());
  require(pages >= ceil_div(tokens, page), "paged_sequence: the table has ", pages, " pages of ", page, " tokens; ",
          tokens, " tokens need ", ceil_div(tokens, page));
  kv_sequence x = detail::sequence_in(s, k, v, tokens);
  x.k.table = x.v.table = table.data(), x.k.page = x.v.page = page;
  return x;
}

/// The last `size` tokens and the first `first` of a sequence that has seen `tokens`.
inline kv_sequence ring_sequence(const kv_shape& s, const row_memory& k, const row_memory& v, isize first, isize size,
                                 isize tokens) {
  require(first >= 0 && size >= 1 && tokens >= 0, "ring_sequence: first, size, tokens are ", first, ", ", size, ", ",
          tokens, "; wanted at least 0, 1, 0");
  ring_index index;
  index.first = first, index.size = size;
  index.append(tokens);
  return index.view(detail::sequence_in(s, k, v, 0));
}

/// `count` of the KV heads of `all`, `step` apart; the rows stay where they are.
inline kv_sequence some_heads(const kv_sequence& all, isize first, isize count, isize step = 1) {
  require(first >= 0 && count >= 0 && step >= 1 && (count == 0 || first + (count - 1) * step < all.heads),
          "some_heads: ", count, " heads from ", first, " on, ", step, " apart; the sequence has ", all.heads);
  kv_sequence x = all;
  x.k = all.keys(first), x.v = all.values(first), x.heads = count;
  x.k_head_bytes *= step, x.v_head_bytes *= step, x.k_head_scales *= step, x.v_head_scales *= step;
  return x;
}

}  // namespace FOVEA_ABI
}  // namespace fovea
