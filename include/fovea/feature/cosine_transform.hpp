// SPDX-License-Identifier: MIT
#pragma once
/// @file  Orthonormal discrete cosine transforms of a block of rows, of any width.
///
///   type 2    y = C x,      C[k, n] = s_k cos(pi (2 n + 1) k / 2 d),   s_0 = sqrt(1/d), s_k = sqrt(2/d)
///   type 3    y = C^T x     the inverse of type 2
///
/// A width d = leaf 2^L is halved L times by butterflies; what is left is a dense product with a leaf x leaf matrix over all rows
/// of the block at once (tile::gemm). L = 0, the plain dense product, is the same code. Unnormalised sums of N terms:
///
///   II_N  = interleave(II_N/2 (x_n + x_N-1-n),  IV_N/2 (x_n - x_N-1-n))           III_N: the same read backwards
///   IV_N:  a_n = x_n cos(t_n) + x_N-1-n sin(t_n),  b_n = (-1)^n (x_N-1-n cos(t_n) - x_n sin(t_n)),  t_n = pi (2 n + 1) / 4 N
///          A = II_N/2 (a), B = II_N/2 (b):  y_0 = A_0,  y_2j = A_j + B_N/2-j,  y_2j-1 = A_j - B_N/2-j,  y_N-1 = -B_0
///
/// Contract   rows of d elements, contiguous, in `x`; the result is in `y` [rows x d]; x is overwritten; x and y apart.
/// Cost       d leaf + O(d log(d / leaf)) multiply-adds a row; the table holds 2 leaf^2 + d numbers.
/// Numerics   every step is a rotation or a butterfly (no division by small cosines): error grows like log d, not d.
/// Source     Plonka and Tasche, Fast and numerically stable algorithms for discrete cosine transforms, 2005.

#include <cmath>
#include <memory>
#include <vector>

#include <fovea/core/contract.hpp>
#include <fovea/tile/gemm.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace feature {

namespace detail {

/// Where the halving stops: measured on blocks of 16 rows, docs/mechanisms/dijiang.md.
constexpr isize cosine_leaf(isize d) {
  isize leaf = d;
  while (leaf % 2 == 0 && leaf >= 64) leaf /= 2;
  return leaf;
}

template <class T>
struct cosine_table {
  isize width = 0, leaf = 0;
  std::vector<T> type2, type3, type4;  // [leaf x leaf], unnormalised, as right-hand sides: y = x type2
  std::vector<T> rotation;             // cos, sin of t_n for the IV of width/2, then width/4, ...

  cosine_table(isize d, isize leaf_width) : width(d), leaf(leaf_width) {
    const auto size = static_cast<std::size_t>(leaf * leaf);
    type2.resize(size), type3.resize(size), type4.resize(size);
    for (isize n = 0; n < leaf; ++n)
      for (isize k = 0; k < leaf; ++k) {
        const auto nk = static_cast<std::size_t>(n * leaf + k), kn = static_cast<std::size_t>(k * leaf + n);
        type2[nk] = type3[kn] = static_cast<T>(cosine((2 * n + 1) * k, 2 * leaf));
        type4[nk] = static_cast<T>(cosine((2 * n + 1) * (2 * k + 1), 4 * leaf));
      }
    for (isize N = d / 2; N > leaf; N /= 2)
      for (isize part = 0; part < 2; ++part)
        for (isize n = 0; n < N / 2; ++n)
          rotation.push_back(static_cast<T>(cosine(part == 0 ? 2 * n + 1 : 2 * N - (2 * n + 1), 4 * N)));
  }
  /// cos(pi p / q), with the angle reduced as an integer first.
  static double cosine(isize p, isize q) {
    p %= 2 * q;
    if (p > q) p = 2 * q - p;
    const bool negative = 2 * p > q;
    if (negative) p = q - p;
    const double angle = 3.14159265358979323846 * static_cast<double>(p) / static_cast<double>(q);
    const double c =
        4 * p > q ? std::sin(3.14159265358979323846 * static_cast<double>(q - 2 * p) / (2 * static_cast<double>(q)))
                  : std::cos(angle);
    return negative ? -c : c;
  }
};

/// One block of rows through the butterflies. Both buffers have rows of `ld` elements; each member reads a, leaves its result in
/// b and uses a as scratch.
template <class Arch, class T>
struct cosine_block {
  const cosine_table<T>& table;
  isize rows, ld;

  void dense(const std::vector<T>& m, const T* a, T* b) const {
    tile::gemm<Arch, T>(rows, table.leaf, table.leaf, a, ld, 1, m.data(), table.leaf, b, ld, false);
  }
  void type2(isize N, T* a, T* b) const {
    if (N == table.leaf) return dense(table.type2, a, b);
    const isize M = N / 2;
    for (isize r = 0; r < rows; ++r) fold(M, a + r * ld, b + r * ld);
    type2(M, b, a);
    type4(M, b + M, a + M);
    for (isize r = 0; r < rows; ++r) interleave(M, a + r * ld, b + r * ld);
  }
  void type3(isize N, T* a, T* b) const {
    if (N == table.leaf) return dense(table.type3, a, b);
    const isize M = N / 2;
    for (isize r = 0; r < rows; ++r) split(M, a + r * ld, b + r * ld);
    type3(M, b, a);
    type4(M, b + M, a + M);
    for (isize r = 0; r < rows; ++r) unfold(M, a + r * ld, b + r * ld);
  }
  void type4(isize N, T* a, T* b) const {
    if (N == table.leaf) return dense(table.type4, a, b);
    const isize M = N / 2;
    const T* turn = table.rotation.data() + (table.width - 2 * N);
    for (isize r = 0; r < rows; ++r) rotate(M, turn, a + r * ld, b + r * ld);
    type2(M, b, a);
    type2(M, b + M, a + M);
    for (isize r = 0; r < rows; ++r) combine(M, a + r * ld, b + r * ld);
  }

 private:
  static FOVEA_INLINE void fold(isize M, const T* FOVEA_RESTRICT a, T* FOVEA_RESTRICT b) {
    for (isize n = 0; n < M; ++n) {
      const T x = a[n], y = a[2 * M - 1 - n];
      b[n] = x + y;
      b[M + n] = x - y;
    }
  }
  static FOVEA_INLINE void unfold(isize M, const T* FOVEA_RESTRICT a, T* FOVEA_RESTRICT b) {
    for (isize n = 0; n < M; ++n) b[n] = a[n] + a[M + n];
    for (isize n = 0; n < M; ++n) b[M + n] = a[M - 1 - n] - a[2 * M - 1 - n];
  }
  static FOVEA_INLINE void interleave(isize M, const T* FOVEA_RESTRICT a, T* FOVEA_RESTRICT b) {
    for (isize n = 0; n < M; ++n) {
      b[2 * n] = a[n];
      b[2 * n + 1] = a[M + n];
    }
  }
  static FOVEA_INLINE void split(isize M, const T* FOVEA_RESTRICT a, T* FOVEA_RESTRICT b) {
    for (isize n = 0; n < M; ++n) {
      b[n] = a[2 * n];
      b[M + n] = a[2 * n + 1];
    }
  }
  static FOVEA_INLINE void rotate(isize M, const T* FOVEA_RESTRICT turn, const T* FOVEA_RESTRICT a,
                                  T* FOVEA_RESTRICT b) {
    for (isize n = 0; n < M; ++n) {
      const T x = a[n], y = a[2 * M - 1 - n], c = turn[n], s = turn[M + n];
      b[n] = x * c + y * s;
      b[M + n] = y * c - x * s;
    }
    for (isize n = 1; n < M; n += 2) b[M + n] = -b[M + n];
  }
  static FOVEA_INLINE void combine(isize M, const T* FOVEA_RESTRICT a, T* FOVEA_RESTRICT b) {
    b[0] = a[0];
    for (isize j = 1; j < M; ++j) {
      const T x = a[j], y = a[2 * M - j];
      b[2 * j - 1] = x - y;
      b[2 * j] = x + y;
    }
    b[2 * M - 1] = -a[M];
  }
};

}  // namespace detail

/// The tables of one width, shared by copies; `float` and `double` arithmetic.
class cosine_transform {
 public:
  cosine_transform() = default;
  /// `leaf` 0: chosen by width; it must be the width halved zero or more times.
  explicit cosine_transform(isize width, isize leaf = 0) {
    require(width >= 1 && width <= 4096, "cosine_transform: the width is ", width, "; wanted 1 to 4096");
    if (leaf == 0) leaf = detail::cosine_leaf(width);
    isize check = width;
    while (check > leaf && check % 2 == 0) check /= 2;
    require(check == leaf, "cosine_transform: leaf ", leaf, " is not ", width, " halved some number of times");
    single_ = std::make_shared<const detail::cosine_table<float>>(width, leaf);
    wide_ = std::make_shared<const detail::cosine_table<double>>(width, leaf);
  }
  isize width() const { return single_ ? single_->width : 0; }
  isize leaf() const { return single_ ? single_->leaf : 0; }
  double macs() const {  // of one row
    double total = static_cast<double>(leaf() * width());
    for (isize n = leaf(); n < width(); n *= 2) total += 1.5 * static_cast<double>(width());
    return total;
  }
  template <class T>
  const detail::cosine_table<T>& table() const {
    if constexpr (std::is_same_v<T, double>)
      return *wide_;
    else
      return *single_;
  }
  double scale(isize k) const { return std::sqrt((k == 0 ? 1.0 : 2.0) / static_cast<double>(width())); }

 private:
  std::shared_ptr<const detail::cosine_table<float>> single_;
  std::shared_ptr<const detail::cosine_table<double>> wide_;
};

/// Unnormalised: the caller multiplies element k by scale(k), after type 2 and before type 3.
template <class Arch, class T>
void cosine_type2(const detail::cosine_table<T>& table, isize rows, T* x, T* y) noexcept {
  detail::cosine_block<Arch, T>{table, rows, table.width}.type2(table.width, x, y);
}
template <class Arch, class T>
void cosine_type3(const detail::cosine_table<T>& table, isize rows, T* x, T* y) noexcept {
  detail::cosine_block<Arch, T>{table, rows, table.width}.type3(table.width, x, y);
}

}  // namespace feature
}  // namespace FOVEA_ABI
}  // namespace fovea
