// SPDX-License-Identifier: MIT
#pragma once
/// @file  Views and Eigen: one head of a view as a matrix map [n, d], and a row-major matrix as a view [1, 1, n, d]. No copies.
///
///   as_eigen(v, b, h) *= 0.5F;                         writes through to the view's memory
///   prefill(serial, exact, as_view(Q), as_view(K), as_view(V), as_view(O));
///
/// Contract   float and double, row-major. The map and the view live no longer than the memory that they point to.

#include <type_traits>

#include <Eigen/Core>

#include <fovea/core/contract.hpp>
#include <fovea/core/view.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

template <class T>
using row_major_matrix = Eigen::Matrix<std::remove_const_t<T>, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

/// Map of memory of T; const where T is const.
template <class T>
using head_map = Eigen::Map<std::conditional_t<std::is_const_v<T>, const row_major_matrix<T>, row_major_matrix<T>>,
                            Eigen::Unaligned, Eigen::OuterStride<>>;

template <class T>
  requires std::is_floating_point_v<std::remove_const_t<T>> head_map<T> as_eigen(const view<T>& v, isize b, isize h) {
    require(b >= 0 && b < v.batch && h >= 0 && h < v.heads, "as_eigen: batch item ", b, ", head ", h,
            " of a view with ", v.batch, " and ", v.heads);
    return head_map<T>(v.row(b, h, 0), v.length, v.width, Eigen::OuterStride<>(v.row_stride));
  }

namespace detail {
template <class Matrix>
concept row_major_direct = bool(Matrix::IsRowMajor) && Matrix::InnerStrideAtCompileTime == 1 && requires(Matrix& m) {
  m.data();
};
}  // namespace detail

/// A row-major matrix, map or block of rows, as [1, 1, rows, cols].
template <class Matrix>
  requires detail::row_major_direct<Matrix>
auto as_view(Matrix& m) {
  using element_type = std::remove_pointer_t<decltype(m.data())>;
  return view<element_type>{m.data(), 1, 1, m.rows(), m.cols(), 0, 0, m.outerStride()};
}

}  // namespace FOVEA_ABI
}  // namespace fovea
