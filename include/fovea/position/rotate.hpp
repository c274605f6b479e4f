// SPDX-License-Identifier: MIT
#pragma once
/// @file  RoPE of whole tensors [B, H, n, d]: what an engine does with new keys before they enter a cache.
///
/// Contract   out has the shape of x and any storage type; out may be x itself (same memory, same strides), else they do not overlap.
///            Row i of item b stands at positions[b * batch_stride + i], or at first + i where there is no table.
/// Cost       one pass; tasks of 64 rows; no scratch.

#include <fovea/core/exec.hpp>
#include <fovea/core/workspace.hpp>
#include <fovea/position/rope.hpp>
#include <fovea/simd/convert.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

/// Where the rows of a call stand.
struct row_positions {
  const std::int32_t* data = nullptr;  ///< null: row i stands at first + i
  isize batch_stride = 0;              ///< 0: all items of the batch share [n] positions
  isize first = 0;
  isize at(isize b, isize i) const { return data != nullptr ? data[b * batch_stride + i] : first + i; }
};

namespace detail {

/// One stored row, turned in pieces that fit on the stack.
template <class Acc>
void rotate_stored(const rope& r, isize position, dtype from_type, const void* from, dtype to_type, void* to, isize d) {
  using A = simd::native;
  constexpr isize most = 128;
  const auto x = [&](isize c) {
    return static_cast<const std::byte*>(from) + c * static_cast<isize>(size_of(from_type));
  };
  const auto y = [&](isize c) { return static_cast<std::byte*>(to) + c * static_cast<isize>(size_of(to_type)); };
  Acc low[most], high[most];
  const isize half = r.width / 2;
  const auto piece = [&](const auto* cos, const auto* sin) {
    cos += position * half, sin += position * half;
    const isize step = r.pair == rope::pairing::neox ? most : most / 2;
    for (isize i = 0; i < half; i += step) {
      const isize count = half - i < step ? half - i : step;
      if (r.pair == rope::pairing::neox) {
        simd::load_row<A, Acc>(from_type, x(i), count, low);
        simd::load_row<A, Acc>(from_type, x(half + i), count, high);
        rotate_halves<1>(cos + i, sin + i, count, low, high);
        simd::store_row<A, Acc>(to_type, low, count, y(i));
        simd::store_row<A, Acc>(to_type, high, count, y(half + i));
      } else {
        simd::load_row<A, Acc>(from_type, x(2 * i), 2 * count, low);
        rotate_neighbours<1>(cos + i, sin + i, count, low);
        simd::store_row<A, Acc>(to_type, low, 2 * count, y(2 * i));
      }
    }
  };
  if (sizeof(Acc) == sizeof(double) && r.cos_f64 != nullptr)
    piece(r.cos_f64, r.sin_f64);
  else
    piece(r.cos, r.sin);
  if (from == to && from_type == to_type) return;
  for (isize c = r.width; c < d; c += most) {
    const isize count = d - c < most ? d - c : most;
    simd::load_row<A, Acc>(from_type, x(c), count, low);
    simd::store_row<A, Acc>(to_type, low, count, y(c));
  }
}

}  // namespace detail

/// out = x with every row turned.
inline void rotate(exec_ref exec, const rope& r, const tensor_ref& x, const row_positions& where,
                   const tensor_mut& out) {
  require(x.batch == out.batch && x.heads == out.heads && x.length == out.length && x.width == out.width,
          "rotate: out is ", detail::describe(out), "; wanted the shape of x, ", detail::describe(x));
  require(x.type != dtype::i8 && out.type != dtype::i8, "rotate takes float types; int8 rows belong to caches");
  if (x.batch == 0 || x.heads == 0 || x.length == 0) return;
  require(x.data != nullptr && out.data != nullptr, "rotate: ", x.data == nullptr ? "x" : "out", " is null");
  for (isize b = 0; b < x.batch; ++b)
    for (isize i = 0; i < x.length; ++i)
      require(where.at(b, i) >= 0 && where.at(b, i) < r.positions, "position of row ", i, " is ", where.at(b, i),
              "; the table has positions 0 to ", r.positions - 1);
  r.check(x.width, 0);
  const isize blocks = ceil_div(x.length, 64);
  exec.for_tasks(x.batch * x.heads * blocks, [&](isize task, isize) {
    const isize b = task / blocks / x.heads, h = task / blocks % x.heads, first = task % blocks * 64;
    for (isize i = first; i < x.length && i < first + 64; ++i) {
      const void* from = x.row(b, h, i);
      void* to = out.row(b, h, i);
      if (x.type == dtype::f64)
        detail::rotate_stored<double>(r, where.at(b, i), x.type, from, out.type, to, x.width);
      else
        detail::rotate_stored<float>(r, where.at(b, i), x.type, from, out.type, to, x.width);
    }
  });
}

}  // namespace FOVEA_ABI
}  // namespace fovea
