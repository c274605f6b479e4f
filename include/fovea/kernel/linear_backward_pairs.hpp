// SPDX-License-Identifier: MIT
#pragma once
/// @file  Products of the tokens of one chunk with each other: lower triangular matrices with decays, and their derivatives.
///
///   T_ij = sum_c x_ic k_jc w_c(i, j),   j <= i (or j < i),   w(i, j) = a_{j+1} ... a_i
///
/// Scalar decays: a table w and plain products by stripes of 16 rows that leave the empty triangle out. One decay a channel: the
/// products run down the columns, so that no quotient and no exponent of either sign is formed.
///
/// Contract   at most 64 tokens. Elements above the diagonal that a function writes are 0; those of `dT` are not read.

#include <fovea/simd/transpose.hpp>
#include <fovea/tile/gemm.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace kernel {

template <class Arch, class Acc>
struct chunk_pairs {
  using P = simd::pack<Acc, Arch>;
  static constexpr isize stripe = 16;
  static isize last_of(isize first, isize n) { return first + stripe < n ? first + stripe : n; }

  static FOVEA_INLINE Acc dot(const Acc* a, const Acc* b, isize n) {
    P sum(Acc(0));
    for (isize c = 0; c < n; c += P::size)
      sum = simd::fma(simd::load_n<P>(a + c, n - c), simd::load_n<P>(b + c, n - c), sum);
    return simd::reduce_add(sum);
  }
  static FOVEA_INLINE Acc sum(const Acc* a, isize n) {
    P all(Acc(0));
    for (isize c = 0; c < n; c += P::size) all = all + simd::load_n<P>(a + c, n - c);
    return simd::reduce_add(all);
  }
  /// to[c][i] = from[i][c]
  FOVEA_NOINLINE static void turn(const Acc* from, isize rows, isize columns, isize ld, Acc* to, isize to_ld) {
    isize i = 0;
    for (; i + P::size <= rows; i += P::size) {
      const Acc* lines[P::size];
      for (isize l = 0; l < P::size; ++l) lines[l] = from + (i + l) * ld;
      simd::rows_to_columns<Acc, Arch>(lines, columns, Acc(1), to + i, to_ld);
    }
    for (; i < rows; ++i)
      for (isize c = 0; c < columns; ++c) to[c * to_ld + i] = from[i * ld + c];
  }

  /// w(i, j); 1 everywhere below the diagonal where a is null.
  static void table(isize n, const Acc* a, Acc* w, isize ld) {
    for (isize i = 0; i < n; ++i) {
      Acc* row = w + i * ld;
      for (isize j = 0; j < i; ++j) row[j] = a != nullptr ? row[j - ld] * a[i] : Acc(1);
      row[i] = Acc(1);
      for (isize j = i + 1; j < n; ++j) row[j] = Acc(0);
    }
  }

  /// out = a b^T below the diagonal, b turned.
  static void lower_product(isize n, isize width, const Acc* a, isize a_ld, const Acc* b, isize b_ld, Acc* out,
                            isize ld) {
    for (isize i = 0; i < n; i += stripe) {
      const isize end = last_of(i, n);
      tile::gemm<Arch, Acc>(end - i, end, width, a + i * a_ld, a_ld, 1, b, b_ld, out + i * ld, ld, false);
    }
  }
  static void scalar(isize n, isize r, const Acc* x, isize x_ld, const Acc* k_turned, isize k_ld, const Acc* w,
                     isize w_ld, isize strict, Acc* out, isize ld) {
    lower_product(n, r, x, x_ld, k_turned, k_ld, out, ld);
    weigh(n, w, w_ld, strict, out, ld);
  }
  /// dx += T k, dk += T^T x with T = w dT, which dT becomes.
  static void scalar_back(isize n, isize r, const Acc* x, const Acc* k, isize row_ld, const Acc* w, isize w_ld, Acc* dT,
                          isize ld, Acc* dx, Acc* dk) {
    weigh(n, w, w_ld, 0, dT, ld);
    for (isize i = 0; i < n; i += stripe) {
      const isize end = last_of(i, n);
      tile::gemm<Arch, Acc>(end - i, r, end, dT + i * ld, ld, 1, k, row_ld, dx + i * row_ld, row_ld, true);
    }
    transposed_times(n, r, dT, ld, x, row_ld, dk, row_ld);
  }
  /// out += t^T x, t zero above the diagonal
  static void transposed_times(isize n, isize width, const Acc* t, isize ld, const Acc* x, isize x_ld, Acc* out,
                               isize out_ld) {
    for (isize j = 0; j < n; j += stripe)
      tile::gemm<Arch, Acc>(last_of(j, n) - j, width, n - j, t + j * ld + j, 1, ld, x + j * x_ld, x_ld,
                            out + j * out_ld, out_ld, true);
  }

  static void channel(isize n, isize r, const Acc* x, const Acc* k, const Acc* a, isize ld, isize strict, Acc* out,
                      isize out_ld, Acc* line) {
    for (isize j = 0; j < n; ++j) {
      for (isize i = 0; i < j + strict; ++i) out[i * out_ld + j] = Acc(0);
      for (isize c = 0; c < r; ++c) line[c] = k[j * ld + c];
      for (isize i = j; i < n; ++i) {
        P sum(Acc(0));
        for (isize c = 0; c < r; c += P::size) {
          P y = simd::load_n<P>(line + c, r - c);
          if (i > j) simd::store_n(line + c, y = y * simd::load_n<P>(a + i * ld + c, r - c), r - c);
          sum = simd::fma(y, simd::load_n<P>(x + i * ld + c, r - c), sum);
        }
        if (i >= j + strict) out[i * out_ld + j] = simd::reduce_add(sum);
      }
    }
  }
  /// `line` holds r elements.
  static void channel_back(isize n, isize r, const Acc* x, const Acc* k, const Acc* a, isize ld, isize strict,
                           const Acc* dT, isize dT_ld, Acc* dx, Acc* dk, Acc* line) {
    for (isize j = 0; j < n; ++j) {
      for (isize c = 0; c < r; ++c) line[c] = k[j * ld + c];
      for (isize i = j; i < n; ++i) {
        const P t(i >= j + strict ? dT[i * dT_ld + j] : Acc(0));
        for (isize c = 0; c < r; c += P::size) {
          P y = simd::load_n<P>(line + c, r - c);
          if (i > j) simd::store_n(line + c, y = y * simd::load_n<P>(a + i * ld + c, r - c), r - c);
          simd::store_n(dx + i * ld + c, simd::fma(t, y, simd::load_n<P>(dx + i * ld + c, r - c)), r - c);
        }
      }
      for (isize c = 0; c < r; c += P::size) {
        P sum(Acc(0));
        for (isize i = n - 1; i >= j + strict; --i) {
          sum = simd::fma(P(dT[i * dT_ld + j]), simd::load_n<P>(x + i * ld + c, r - c), sum);
          if (i > j) sum = sum * simd::load_n<P>(a + i * ld + c, r - c);
        }
        simd::store_n(dk + j * ld + c, simd::load_n<P>(dk + j * ld + c, r - c) + sum, r - c);
      }
    }
  }

  /// x of (1 - t) x = given, t strictly lower, in place.
  static void solve_lower(isize n, isize e, const Acc* t, isize ld, Acc* x, isize x_ld) {
    for (isize i0 = 0; i0 < n; i0 += stripe) {
      const isize end = last_of(i0, n);
      tile::gemm<Arch, Acc>(end - i0, e, i0, t + i0 * ld, ld, 1, x, x_ld, x + i0 * x_ld, x_ld, true);
      for (isize i = i0 + 1; i < end; ++i) rows_into(i0, i, e, t + i * ld, 1, x, x_ld, x + i * x_ld);
    }
  }
  /// x of (1 - t)^T x = given, in place.
  static void solve_upper(isize n, isize e, const Acc* t, isize ld, Acc* x, isize x_ld) {
    for (isize i0 = (n - 1) / stripe * stripe; n > 0 && i0 >= 0; i0 -= stripe) {
      const isize end = last_of(i0, n);
      tile::gemm<Arch, Acc>(end - i0, e, n - end, t + end * ld + i0, 1, ld, x + end * x_ld, x_ld, x + i0 * x_ld, x_ld,
                            true);
      for (isize j = end - 2; j >= i0; --j) rows_into(j + 1, end, e, t + j, ld, x, x_ld, x + j * x_ld);
    }
  }

 private:
  static void weigh(isize n, const Acc* w, isize w_ld, isize strict, Acc* t, isize ld) {
    for (isize i = 0; i < n; ++i) {
      const isize end = last_of(i / stripe * stripe, n);
      for (isize j = 0; j <= i; ++j) t[i * ld + j] *= w[i * w_ld + j];
      for (isize j = i + 1 - strict; j < end; ++j) t[i * ld + j] = Acc(0);
    }
  }
  /// to += sum over j of t[j * step] x[j]
  static void rows_into(isize first, isize last, isize e, const Acc* t, isize step, const Acc* x, isize x_ld, Acc* to) {
    for (isize c = 0; c < e; c += P::size) {
      P sum = simd::load_n<P>(to + c, e - c);
      for (isize j = first; j < last; ++j)
        sum = simd::fma(P(t[j * step]), simd::load_n<P>(x + j * x_ld + c, e - c), sum);
      simd::store_n(to + c, sum, e - c);
    }
  }
};

}  // namespace kernel
}  // namespace FOVEA_ABI
}  // namespace fovea
