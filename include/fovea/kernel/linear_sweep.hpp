// SPDX-License-Identifier: MIT
#pragma once
/// @file  The linear recurrence over one column panel of a state, a few tokens per sweep: the loop of every causal linear mechanism.
///
///   S_t = diag(a_t) S_{t-1} + k_t x_t^T                [r x e]     x_t = v_t, or the delta rule's correction of it
///   o_t = q_t S_t                                      [e]
///
/// T tokens make a step. With u_i = k_i S and y_i = q_i S of the step's tokens in registers, S the state before the step,
///   x_i = v_gain_i v_i - u_gain_i u_i - sum_{j<i} A_ij x_j            (delta rules; else x_i = v_i)
///   o_i = y_gain_i y_i + sum_{j<=i} P_ij x_j
/// and one sweep over the rows of S adds the T outer products and forms u and y of the next T tokens. A and P are triangles of numbers
/// that the caller has made: all decays, the normaliser and the scale are in them, nothing is masked because only j <= i is computed.
///
/// Contract   k, q, u hold steps * T rows (zeros behind the last token), v and out as many. A step's `keep` (null: all ones) multiplies
///            the rows of S before its outer products are added.
/// Cost       per row of S, T = 3, four vectors: 24 fused multiply-adds, 10 loads, 4 stores; delta rules, T = 2: 24, 10, 4.
/// Numerics   each column is computed alone and in one order: the result does not depend on the panel or the vector width.
/// Source     docs/mechanisms/linear.md derives the step.

#include <fovea/simd/reduce.hpp>
#include <fovea/tile/unroll.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace kernel {

/// Tokens per step, and vectors of columns at a time: x, y (and u) of a step live in registers.
template <class Arch, bool Delta>
struct sweep_shape {
  static constexpr int T = Arch::registers >= 32 && !Delta ? 3 : 2, NR = Arch::registers >= 32 ? 4 : 2;
};
inline constexpr int step_tokens = 3;  ///< the largest T

/// Tokens of one block: a multiple of each T. S comes from the second-level cache once a block.
inline constexpr isize sweep_tokens = 126;

/// Elements of a state row's piece: 128 bytes on every machine, so that states do not depend on the instruction set.
template <class Acc>
inline constexpr isize panel_width = static_cast<isize>(128 / sizeof(Acc));

/// Pairs j <= i < n, row by row.
constexpr int pairs(int n) { return n * (n + 1) / 2; }

template <class Acc>
struct step_weights {
  Acc v_gain[step_tokens], u_gain[step_tokens];  ///< delta rules only
  Acc A[pairs(step_tokens - 1)];                 ///< A_ij at pairs(i - 1) + j
  Acc x_gain[step_tokens];                       ///< what the outer product k_j x_j^T is multiplied by
  const Acc* keep;                               ///< [r] or null
};
template <class Acc>
struct read_weights {
  Acc y_gain[step_tokens];
  Acc P[pairs(step_tokens)];  ///< P_ij at pairs(i) + j
};

/// Rows of memory that the next block will read or write: the sweep asks for them as it goes. None: null.
struct sweep_ahead {
  const void* rows = nullptr;
  isize stride = 0, bytes = 0;  ///< from row to row, and of a row
};
inline constexpr int ahead_streams = 4;

/// Up to sweep_tokens tokens of one state head.
template <class Acc>
struct sweep_block {
  isize steps, r;
  const Acc *k, *u;  ///< written with k; erased with u (delta rules only)
  isize k_stride, u_stride;
  const step_weights<Acc>* step;
  isize heads;   ///< query heads that share the state
  const Acc* q;  ///< [heads][steps * T][q_stride]
  isize q_stride, q_head_stride;
  const read_weights<Acc>* read;  ///< [heads][read_head_stride]
  isize read_head_stride;
  sweep_ahead ahead[ahead_streams] = {};
};

/// Columns of all rows: of the values, and of the outputs of each head.
template <class Acc>
struct sweep_columns {
  const Acc* v;
  isize v_stride;
  Acc* out;
  isize out_stride, out_head_stride;
};

namespace detail {

/// One sweep over the rows of S: updates with the step's tokens, reads with the next step's, or both.
template <class Arch, class Acc, int T, int NR, bool Delta, bool Update, bool Read>
FOVEA_INLINE void sweep_rows(isize r, Acc* S, isize panel_stride, const Acc* k, isize k_stride, const Acc* q,
                             isize q_stride, const Acc* u, isize u_stride, const simd::pack<Acc, Arch> (&x)[T][NR],
                             simd::pack<Acc, Arch> (&y)[T][NR], simd::pack<Acc, Arch> (&w)[T][NR]) {
  using P = simd::pack<Acc, Arch>;
  constexpr int V = static_cast<int>(panel_width<Acc> / P::size);  // vectors of a panel's row
  if constexpr (Read)
    tile::unroll<T>([&](auto i) FOVEA_INLINE_LAMBDA {
      tile::unroll<NR>([&](auto n) FOVEA_INLINE_LAMBDA {
        y[i][n] = P(Acc(0));
        if constexpr (Delta) w[i][n] = P(Acc(0));
      });
    });
  for (isize e = 0; e < r; ++e, S += panel_width<Acc>) {
    P s[NR];
    tile::unroll<NR>([&](auto n)
                         FOVEA_INLINE_LAMBDA { s[n] = P::load(S + (n / V) * panel_stride + (n % V) * P::size); });
    if constexpr (Update) {
      tile::unroll<T>([&](auto j) FOVEA_INLINE_LAMBDA {
        const P f(k[j * k_stride + e]);
        tile::unroll<NR>([&](auto n) FOVEA_INLINE_LAMBDA { s[n] = simd::fma(f, x[j][n], s[n]); });
      });
      tile::unroll<NR>([&](auto n) FOVEA_INLINE_LAMBDA { s[n].store(S + (n / V) * panel_stride + (n % V) * P::size); });
    }
    if constexpr (Read)
      tile::unroll<T>([&](auto i) FOVEA_INLINE_LAMBDA {
        const P f(q[i * q_stride + e]);
        tile::unroll<NR>([&](auto n) FOVEA_INLINE_LAMBDA { y[i][n] = simd::fma(f, s[n], y[i][n]); });
        if constexpr (Delta) {
          const P g(u[i * u_stride + e]);
          tile::unroll<NR>([&](auto n) FOVEA_INLINE_LAMBDA { w[i][n] = simd::fma(g, s[n], w[i][n]); });
        }
      });
  }
}

/// Rows of S times their factors; most are 1 but at the end of a block.
template <class Arch, class Acc, int NR>
FOVEA_NOINLINE void keep_rows(isize r, Acc* S, isize panel_stride, const Acc* keep) {
  using P = simd::pack<Acc, Arch>;
  constexpr int V = static_cast<int>(panel_width<Acc> / P::size);
  for (isize e = 0; e < r; ++e, S += panel_width<Acc>) {
    if (keep[e] == Acc(1)) continue;
    const P c(keep[e]);
    tile::unroll<NR>([&](auto n) FOVEA_INLINE_LAMBDA {
      Acc* at = S + (n / V) * panel_stride + (n % V) * P::size;
      (c * P::load(at)).store(at);
    });
  }
}

/// o_i = y_gain_i y_i + sum_{j<=i} P_ij x_j
template <class Arch, class Acc, int T, int NR>
FOVEA_INLINE void write_outputs(const read_weights<Acc>& c, const simd::pack<Acc, Arch> (&x)[T][NR],
                                const simd::pack<Acc, Arch> (&y)[T][NR], Acc* out, isize out_stride) {
  using P = simd::pack<Acc, Arch>;
  tile::unroll<T>([&](auto i) FOVEA_INLINE_LAMBDA {
    tile::unroll<NR>([&](auto n) FOVEA_INLINE_LAMBDA {
      P o = P(c.y_gain[i]) * y[i][n];
      tile::unroll<i + 1>([&](auto j) FOVEA_INLINE_LAMBDA { o = simd::fma(P(c.P[pairs(i) + j]), x[j][n], o); });
      o.store(out + i * out_stride + n * P::size);
    });
  });
}

/// The other query heads of the group: they read the state before the step updates it.
template <class Arch, class Acc, int T, int NR>
FOVEA_NOINLINE void read_step(isize r, Acc* S, isize panel_stride, const Acc* q, isize stride,
                              const read_weights<Acc>& c, const Acc* x_rows, Acc* out, isize out_stride) {
  using P = simd::pack<Acc, Arch>;
  P x[T][NR], y[T][NR], none[T][NR];
  sweep_rows<Arch, Acc, T, NR, false, false, true>(r, S, panel_stride, nullptr, 0, q, stride, nullptr, 0, none, y,
                                                   none);
  tile::unroll<T>([&](auto i) FOVEA_INLINE_LAMBDA {
    tile::unroll<NR>([&](auto n) FOVEA_INLINE_LAMBDA { x[i][n] = P::load(x_rows + (i * NR + n) * P::size); });
  });
  write_outputs<Arch, Acc, T, NR>(c, x, y, out, out_stride);
}

FOVEA_INLINE void ask_for(const sweep_ahead (&ahead)[ahead_streams], isize first, int count) {
  for (const auto& a : ahead)
    for (int i = 0; i < count && a.rows != nullptr; ++i)
      simd::prefetch(static_cast<const char*>(a.rows) + (first + i) * a.stride, a.bytes);
}

/// All steps of a block over NR vectors of columns, which may be two panels side by side.
template <class Arch, class Acc, bool Delta, int NR>
FOVEA_NOINLINE void sweep_columns_of(const sweep_block<Acc>& b, Acc* S, isize panel_stride,
                                     const sweep_columns<Acc>& to, bool asks) noexcept {
  constexpr int T = sweep_shape<Arch, Delta>::T;
  using P = simd::pack<Acc, Arch>;
  P x[T][NR], y[T][NR], u[T][NR];
  const isize kl = b.k_stride, ql = b.q_stride, ul = b.u_stride;
  sweep_rows<Arch, Acc, T, NR, Delta, false, true>(b.r, S, panel_stride, nullptr, 0, b.q, ql, b.u, ul, x, y, u);
  for (isize t = 0; t < b.steps; ++t) {
    const auto& c = b.step[t];
    if (asks) ask_for(b.ahead, t * T, T);
    const Acc* v = to.v + t * T * to.v_stride;
    tile::unroll<T>([&](auto i) FOVEA_INLINE_LAMBDA {
      tile::unroll<NR>([&](auto n) FOVEA_INLINE_LAMBDA {
        x[i][n] = P::load(v + i * to.v_stride + n * P::size);
        if constexpr (Delta) {
          x[i][n] = simd::fma(P(-c.u_gain[i]), u[i][n], P(c.v_gain[i]) * x[i][n]);
          tile::unroll<i>(
              [&](auto j) FOVEA_INLINE_LAMBDA { x[i][n] = simd::fma(P(-c.A[pairs(i - 1) + j]), x[j][n], x[i][n]); });
        }
      });
    });
    Acc* out = to.out + t * T * to.out_stride;
    write_outputs<Arch, Acc, T, NR>(b.read[t], x, y, out, to.out_stride);
    if (b.heads > 1) {
      alignas(64) Acc x_rows[T * NR * P::size];
      tile::unroll<T>([&](auto i) FOVEA_INLINE_LAMBDA {
        tile::unroll<NR>([&](auto n) FOVEA_INLINE_LAMBDA { x[i][n].store(x_rows + (i * NR + n) * P::size); });
      });
      for (isize h = 1; h < b.heads; ++h)
        read_step<Arch, Acc, T, NR>(b.r, S, panel_stride, b.q + h * b.q_head_stride + t * T * ql, ql,
                                    b.read[h * b.read_head_stride + t], x_rows, out + h * to.out_head_stride,
                                    to.out_stride);
    }
    tile::unroll<T>([&](auto i) FOVEA_INLINE_LAMBDA {
      const P gain(c.x_gain[i]);
      tile::unroll<NR>([&](auto n) FOVEA_INLINE_LAMBDA { x[i][n] = gain * x[i][n]; });
    });
    if (c.keep != nullptr) keep_rows<Arch, Acc, NR>(b.r, S, panel_stride, c.keep);
    const Acc *k = b.k + t * T * kl, *q = b.q + (t + 1) * T * ql, *w = b.u + (t + 1) * T * ul;
    if (t + 1 < b.steps)
      sweep_rows<Arch, Acc, T, NR, Delta, true, true>(b.r, S, panel_stride, k, kl, q, ql, w, ul, x, y, u);
    else
      sweep_rows<Arch, Acc, T, NR, Delta, true, false>(b.r, S, panel_stride, k, kl, q, ql, w, ul, x, y, u);
  }
}

}  // namespace detail

/// All steps of a block over the columns of panels [first, last). S is the head's state, `to` its column 0.
template <class Arch, class Acc, bool Delta>
void sweep_panels(const sweep_block<Acc>& b, Acc* S, isize first, isize last, sweep_columns<Acc> to) noexcept {
  constexpr isize V = panel_width<Acc> / simd::pack<Acc, Arch>::size, W = simd::pack<Acc, Arch>::size;
  constexpr int NR = sweep_shape<Arch, Delta>::NR;
  const isize panel_stride = b.r * panel_width<Acc>, end = last * V;
  to.v += first * panel_width<Acc>, to.out += first * panel_width<Acc>;
  for (isize c = first * V; c < end;) {
    const isize left = end - c;
    Acc* at = S + c / V * panel_stride + c % V * W;
    isize done = NR;
    if constexpr (NR > V) {
      if (left < NR) {
        detail::sweep_columns_of<Arch, Acc, Delta, static_cast<int>(V)>(b, at, panel_stride, to, c == first * V);
        done = V;
      }
    }
    if (done == NR) detail::sweep_columns_of<Arch, Acc, Delta, NR>(b, at, panel_stride, to, c == first * V);
    c += done, to.v += done * W, to.out += done * W;
  }
}

}  // namespace kernel
}  // namespace FOVEA_ABI
}  // namespace fovea
