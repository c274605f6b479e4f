// SPDX-License-Identifier: MIT
#pragma once
/// @file  How the keys and values of one sequence lie in memory: the one description that every KV store shares, and what calls take.
///
///   block of `rows` tokens   keys [heads, rows, d], values [heads, rows, e], scales of keys [heads, rows, s], scales of values (int8)
///
/// A contiguous store is one such block, a ring is one, a page of a pool is one, and so is the cache inside a `state` (heads = B G).
///
/// Contract   a kv_sequence never owns; an engine may fill one for memory of its own (cache/sequences.hpp has makers).
/// Layout     each of the four parts starts at a multiple of 8 bytes, and the block is a multiple of 8 bytes long.

#include <fovea/core/rows.hpp>
#include <fovea/core/workspace.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

/// What an int8 scale stands for.
enum class scale_per : unsigned char { row, group };

/// The sizes of a store's rows.
struct kv_shape {
  isize heads = 1;  ///< KV heads, G
  isize d = 0, e = 0;
  dtype type = dtype::f32;
  scale_per scale = scale_per::row;  ///< int8 only; group: of 32 elements
  /// Values are the first e elements of the keys and not stored again (the absorbed form of multi-head latent attention).
  bool values_in_keys = false;

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
    const auto size = static_cast<isize>(size_of(s.type));
    k_row_ = s.d * size, v_row_ = s.values_in_keys ? k_row_ : s.e * size;
    k_scales_ = s.scales_of(s.d), v_scales_ = s.values_in_keys ? k_scales_ : s.scales_of(s.e);
    const isize count = s.heads * rows, scale = static_cast<isize>(sizeof(float));
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

  /// A row in a block: its elements, and its scales (null but for int8).
  struct place {
    std::byte* data;
    float* scales;
    isize bytes, scale_count;
  };
  place key(std::byte* block, isize head, isize row) const {
    return at(block, 0, k_scales_at_, k_row_, k_scales_, head * rows_ + row);
  }
  place value(std::byte* block, isize head, isize row) const {
    return at(block, v_at_, v_scales_at_, v_row_, v_scales_, head * rows_ + row);
  }

  /// `heads` KV heads of the block from `first_head` on, as if all rows were tokens in order; stores set what differs.
  kv_sequence sequence(const std::byte* block, isize first_head, isize heads, isize length) const {
    kv_sequence s;
    auto* start = const_cast<std::byte*>(block);
    const place k = key(start, first_head, 0), v = value(start, first_head, 0);
    s.k.data = k.data, s.v.data = v.data, s.k.scales = k.scales, s.v.scales = v.scales;
    s.k.type = s.v.type = shape_.type;
    s.k.row_bytes = k_row_, s.v.row_bytes = v_row_, s.k.scale_row = k_scales_, s.v.scale_row = v_row_scales();
    s.k_head_bytes = rows_ * k_row_, s.v_head_bytes = rows_ * v_row_;
    s.k_head_scales = rows_ * k_scales_, s.v_head_scales = rows_ * v_scales_;
    s.heads = heads, s.d = shape_.d, s.e = shape_.e, s.length = length;
    return s;
  }

 private:
  isize v_row_scales() const { return v_scales_; }
  static isize padded(isize bytes) { return ceil_div(bytes, 8) * 8; }
  place at(std::byte* block, isize data, isize scales, isize row, isize count, isize index) const {
    if (block == nullptr) return {nullptr, nullptr, row, count};
    return {block + data + index * row, count == 0 ? nullptr : reinterpret_cast<float*>(block + scales) + index * count,
            row, count};
  }

  kv_shape shape_;
  isize rows_ = 0, k_row_ = 0, v_row_ = 0, k_scales_ = 0, v_scales_ = 0;
  isize v_at_ = 0, k_scales_at_ = 0, v_scales_at_ = 0, bytes_ = 0;
};

}  // namespace FOVEA_ABI
}  // namespace fovea
