// SPDX-License-Identifier: MIT
#pragma once
/// @file  How the keys and values of one sequence lie in memory: the one description that every KV store shares, and what calls take.
///
///   block of `rows` tokens   keys [heads, rows, d], values [heads, rows, e], scales of keys [heads, rows, s], scales of values (int8)
///
/// A contiguous store is one such block, a ring is one, a page of a pool is one, and so is the cache inside a `state` (heads = B G).
///
/// Contract   a kv_sequence never owns; an engine may fill one for memory of its own (cache/sequences.hpp has makers).
/// Layout     each of the four parts starts at a multiple of 8 bytes, and the block is a multiple of 8 bytes long; packed: of 64.

#include <fovea/core/contract.hpp>
#include <fovea/core/rows.hpp>
#include <fovea/core/workspace.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

/// What an int8 scale stands for.
enum class scale_per : unsigned char { row, group };

/// How int8 rows lie: one after the other, or interleaved as the integer products of decoding read them (core/rows.hpp).
enum class kv_form : unsigned char { rows, packed };

/// The sizes of a store's rows.
struct kv_shape {
  isize heads = 1;  ///< KV heads, G
  isize d = 0, e = 0;
  dtype type = dtype::f32;
  scale_per scale = scale_per::row;  ///< int8 only; group: of 32 elements
  /// Values are the first e elements of the keys and not stored again (the absorbed form of multi-head latent attention).
  bool values_in_keys = false;
  kv_form form = kv_form::rows;  ///< packed: int8 with a scale a row only, values apart from keys
  /// int8 only: keys go through a Walsh-Hadamard rotation before they are rounded, which halves what rounding costs; calls rotate q.
  bool rotated = false;

  isize scales_of(isize width) const {
    return type != dtype::i8 ? 0 : scale == scale_per::row ? 1 : ceil_div(width, scale_group);
  }
  bool operator==(const kv_shape&) const = default;
};

/// One sequence for a call: where KV head 0 lies, how far it is to the next one, and which tokens are there.
struct kv_sequence {
  row_source k = {}, v = {};
  isize k_head_bytes = 0, v_head_bytes = 0;    ///< from a KV head to the next
  isize k_head_scales = 0, v_head_scales = 0;  ///< the same for int8 scales, in floats
  isize heads = 0, d = 0, e = 0;
  isize length = 0;   ///< rows that there are
  isize kept = 0;     ///< rows [0, kept) are tokens [0, kept) ...
  isize dropped = 0;  ///< ... and row j >= kept is token j + dropped: so many were dropped in between

  isize tokens() const { return length + dropped; }
  row_source keys(isize g) const { return of_head(k, g * k_head_bytes, g * k_head_scales); }
  row_source values(isize g) const { return of_head(v, g * v_head_bytes, g * v_head_scales); }

 private:
  static row_source of_head(row_source s, isize bytes, isize scales) {
    if (s.data != nullptr) s.data += bytes;
    if (s.scales != nullptr) s.scales += scales;
    return s;
  }
};

class kv_layout {
 public:
  kv_layout() = default;
  kv_layout(const kv_shape& s, isize rows) : shape_(s), rows_(rows) {
    const auto real = [](isize x) { return static_cast<double>(x); };
    require(real(s.heads) * (real(rows) + packed_rows) * (real(s.d) + real(s.e) + 8) * 9 < 0x1p62, "room for ", rows,
            " tokens of ", s.heads, " KV heads, ", s.d, " and ", s.e, " wide, is more than memory can be");
    const auto size = static_cast<isize>(size_of(s.type));
    const bool packed = s.form == kv_form::packed;
    slots_ = packed ? ceil_div(rows, packed_rows) * packed_rows : rows;
    k_row_ = packed ? ceil_div(s.d, 4) * 4 : s.d * size, v_row_ = s.values_in_keys ? k_row_ : s.e * size;
    k_scales_ = s.scales_of(s.d), v_scales_ = s.values_in_keys ? k_scales_ : s.scales_of(s.e);
    const isize count = s.heads * slots_, scale = static_cast<isize>(sizeof(float));
    const isize k_end = padded(count * k_row_);
    v_at_ = s.values_in_keys ? 0 : k_end;
    k_scales_at_ = s.values_in_keys ? k_end : k_end + padded(count * v_row_);
    const isize k_scales_end = k_scales_at_ + padded(count * k_scales_ * scale);
    v_scales_at_ = s.values_in_keys ? k_scales_at_ : k_scales_end;
    bytes_ = s.values_in_keys ? k_scales_end : k_scales_end + padded(count * v_scales_ * scale);
  }

  const kv_shape& shape() const { return shape_; }
  isize rows() const { return rows_; }
  std::size_t bytes() const { return static_cast<std::size_t>(bytes_); }
  isize k_row_bytes() const { return k_row_; }
  isize v_row_bytes() const { return v_row_; }

  /// A row in a block: its elements, and its scales (null but for int8). Packed: data is where row 0 of its head lies, slot the row.
  struct place {
    std::byte* data;
    float* scales;
    isize bytes, scale_count;
    row_form form = row_form::plain;
    isize slot = 0;
  };
  place key(std::byte* block, isize head, isize row) const {
    return at(block, 0, k_scales_at_, k_row_, k_scales_, head, row, row_form::packed_keys);
  }
  place value(std::byte* block, isize head, isize row) const {
    return at(block, v_at_, v_scales_at_, v_row_, v_scales_, head, row, row_form::packed_values);
  }

  /// `heads` KV heads of the block from `first_head` on, as if all rows were tokens in order; stores set what differs.
  kv_sequence sequence(const std::byte* block, isize first_head, isize heads, isize length) const {
    kv_sequence s;
    auto* start = const_cast<std::byte*>(block);
    const place k = key(start, first_head, 0), v = value(start, first_head, 0);
    s.k.data = k.data, s.v.data = v.data, s.k.scales = k.scales, s.v.scales = v.scales;
    s.k.type = s.v.type = shape_.type;
    s.k.row_bytes = k_row_, s.v.row_bytes = v_row_, s.k.scale_row = k_scales_, s.v.scale_row = v_row_scales();
    s.k_head_bytes = slots_ * k_row_, s.v_head_bytes = slots_ * v_row_;
    s.k_head_scales = slots_ * k_scales_, s.v_head_scales = slots_ * v_scales_;
    s.k.form = k.form, s.v.form = v.form, s.k.rotated = shape_.rotated;
    s.heads = heads, s.d = shape_.d, s.e = shape_.e, s.length = length;
    return s;
  }

 private:
  isize v_row_scales() const { return v_scales_; }
  isize padded(isize bytes) const {
    const isize to = shape_.form == kv_form::packed ? 64 : 8;
    return ceil_div(bytes, to) * to;
  }
  place at(std::byte* block, isize data, isize scales, isize row_bytes, isize count, isize head, isize row,
           row_form packed) const {
    const row_form form = shape_.form == kv_form::packed ? packed : row_form::plain;
    if (block == nullptr) return {nullptr, nullptr, row_bytes, count, form, row};
    const isize index = head * slots_ + row;
    auto* const few = count == 0 ? nullptr : reinterpret_cast<float*>(block + scales) + index * count;
    if (form == row_form::plain) return {block + data + index * row_bytes, few, row_bytes, count};
    return {block + data + head * slots_ * row_bytes, few, row_bytes, count, form, row};
  }

  kv_shape shape_;
  isize rows_ = 0, slots_ = 0, k_row_ = 0, v_row_ = 0, k_scales_ = 0, v_scales_ = 0;
  isize v_at_ = 0, k_scales_at_ = 0, v_scales_at_ = 0, bytes_ = 0;
};

}  // namespace FOVEA_ABI
}  // namespace fovea
