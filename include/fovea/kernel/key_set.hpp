// SPDX-License-Identifier: MIT
#pragma once
/// @file  What a loop over keys is given: the rows of one KV head and what may be seen of them, and the query rows that share it.
///
/// Contract   nothing is owned. Rows come back where they lie, if they are stored as the loop computes; else converted into scratch.

#include <type_traits>

#include <fovea/core/rows.hpp>
#include <fovea/mask/mask.hpp>
#include <fovea/position/rope.hpp>
#include <fovea/score/score.hpp>
#include <fovea/simd/convert.hpp>
#include <fovea/simd/rotate_row.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace kernel {

/// Keys and values of one KV head, and what may be seen of them.
template <class Acc>
struct key_set {
  row_source k, v;  ///< rows of d, rows of e
  isize count = 0;
  isize first = 0;                       ///< keys before it are left out by online_softmax: a part of a split
  const fovea::mask* visible = nullptr;  ///< null: everything
  const fovea::score* modify = nullptr;  ///< null: nothing
  const Acc* bias = nullptr;             ///< [count] added to the score of each key, nats; null: nothing
  mask_site site;                        ///< b, n, m, H, G; h is filled in per row
};

/// Rows r = h * n + i of the query group that shares one KV head.
struct query_rows {
  tensor_ref q;
  isize b = 0, first_head = 0;
  isize first = 0, last = 0;                ///< [first, last) of group * n
  const rope* turn = nullptr;               ///< rows are turned to their positions as they are loaded; null: they stay
  const std::int32_t* positions = nullptr;  ///< [n] position of query i; null: first_position + i
  isize first_position = 0;
  bool rotated = false;  ///< the keys are (row_source::rotated): so are the rows, after they were turned

  isize position(isize i) const noexcept { return positions != nullptr ? positions[i] : first_position + i; }
};

/// Query i of head h as Acc, turned to its position: where it lies if nothing has to be done, else in `scratch` [d].
template <class Arch, class Acc>
const Acc* load_query(const query_rows& rows, isize h, isize i, isize d, Acc* scratch) noexcept {
  const void* from = rows.q.row(rows.b, h, i);
  if (rows.turn == nullptr && !rows.rotated) return simd::row_as<Arch, Acc>(rows.q.type, from, d, scratch);
  if constexpr (std::is_same_v<Acc, float>)
    if (rows.turn == nullptr && rows.q.type == dtype::f32)
      return simd::rotate_row<Arch>(static_cast<const float*>(from), scratch, d), scratch;
  simd::load_row<Arch, Acc>(rows.q.type, from, d, scratch);
  if (rows.turn != nullptr) rotate(*rows.turn, rows.position(i), scratch);
  if constexpr (std::is_same_v<Acc, float>)  // rotated keys are int8, and those never meet doubles
    if (rows.rotated) simd::rotate_row<Arch>(scratch, d);
  return scratch;
}

/// Are rows [j0, j1) of a source read where they lie? They are if they are Acc, in one stretch. A row stride of a multiple of 4 KB
/// would put all rows of a panel into one set of the L1 cache: those are copied too.
template <class Acc>
bool read_in_place(const row_source& from, isize j0, isize j1) noexcept {
  return from.form == row_form::plain && from.type == dtype_of<Acc> && from.at(j0).count >= j1 - j0 &&
         from.row_bytes % 4096 != 0;
}

/// Rows [j0, j1) of a source as Acc: where they lie, if they are stored so in one stretch; else converted into `scratch` [rows][width].
template <class Arch, class Acc>
FOVEA_NOINLINE const Acc* block_of_rows(const row_source& from, isize j0, isize j1, isize width, Acc* scratch,
                                        isize& stride) noexcept {
  if (from.form != row_form::plain) {
    stride = width;
    for (isize j = j0; j < j1; ++j) simd::load_packed_row<Arch, Acc>(from, j, width, scratch + (j - j0) * width);
    return scratch;
  }
  stretch s = from.at(j0);
  if (read_in_place<Acc>(from, j0, j1)) {
    stride = from.row_bytes / static_cast<isize>(sizeof(Acc));
    return reinterpret_cast<const Acc*>(s.data);
  }
  stride = width;
  Acc* to = scratch;
  for (isize j = j0; j < j1;) {
    const isize last = s.count < j1 - j ? j + s.count : j1;
    for (; j < last; ++j, to += width, s.data += from.row_bytes, s.scales += from.scale_row) {
      if (from.type == dtype::i8)
        simd::load_scaled_row<Arch, Acc>(s.data, s.scales, from.scale_row, width, to);
      else
        simd::load_row<Arch, Acc>(from.type, s.data, width, to);
    }
    if (j < j1) s = from.at(j);
  }
  return scratch;
}

}  // namespace kernel
}  // namespace FOVEA_ABI
}  // namespace fovea
