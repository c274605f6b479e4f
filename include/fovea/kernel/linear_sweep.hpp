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
/// and one sweep over the rows of S adds the T outer products and forms u and y of the next T tokens. A and P are [T x T] numbers
/// that the caller has made: all decays, the normaliser and the scale are in them, nothing is masked because only j <= i is computed.
///
/// Contract   the panel is `columns` wide with rows `panel_stride` apart; k, q, u hold steps * T rows (zeros behind the last token).
///            A step's `keep` (null: all ones) multiplies the rows of S before its outer products are added.
/// Cost       per row of S, T = 4, two vectors: 16 (delta: 24) fused multiply-adds, 10 (14) loads, 2 stores.
/// Numerics   each column is computed alone and in one order: the result does not depend on the panel or the vector width.
/// Source     docs/mechanisms/linear.md derives the step.

#include <fovea/simd/pack.hpp>
#include <fovea/tile/unroll.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace kernel {

/// Tokens per step and vectors per row: x, y (and u) of a step live in registers.
template <class Arch>
struct sweep_shape {
  static constexpr int T = Arch::registers >= 32 ? 4 : 2, NR = 2;
};

/// Elements of a state row's piece: 128 bytes on every machine, so that states do not depend on the instruction set.
template <class Acc>
inline constexpr isize panel_width = static_cast<isize>(128 / sizeof(Acc));

template <class Acc, int T>
struct step_weights {
  Acc v_gain[T], u_gain[T], x_gain[T];  ///< x_gain: what the outer product k_j x_j^T is multiplied by
  Acc A[T][T];
  const Acc* keep;
};
template <class Acc, int T>
struct read_weights {
  Acc y_gain[T];
  Acc P[T][T];
};

/// Up to feature_rows tokens of one state head.
template <class Acc, int T>
struct sweep_block {
  isize steps, r;
  isize stride;      ///< of the rows of k, q and u
  const Acc *k, *u;  ///< written with k; erased with u (delta rules only)
  const step_weights<Acc, T>* step;
  isize heads;   ///< query heads that share the state
  const Acc* q;  ///< [heads][feature_rows][stride]
  isize q_head_stride;
  const read_weights<Acc, T>* read;  ///< [heads][steps]
  isize read_head_stride;
};

namespace detail {

/// One sweep over the rows of S: updates with the step's tokens, reads with the next step's, or both.
template <class Arch, class Acc, int T, int NR, bool Delta, bool Update, bool Read, bool Keep>
FOVEA_INLINE void sweep_rows(isize r, Acc* S, const Acc* keep, const Acc* k, const Acc* q, const Acc* u, isize stride,
                             const simd::pack<Acc, Arch> (&x)[T][NR], simd::pack<Acc, Arch> (&y)[T][NR],
                             simd::pack<Acc, Arch> (&w)[T][NR]) {
  using P = simd::pack<Acc, Arch>;
  if constexpr (Read)
    tile::unroll<T>([&](auto i) FOVEA_INLINE_LAMBDA {
      tile::unroll<NR>([&](auto n) FOVEA_INLINE_LAMBDA {
        y[i][n] = P(Acc(0));
        if constexpr (Delta) w[i][n] = P(Acc(0));
      });
    });
  for (isize e = 0; e < r; ++e, S += panel_width<Acc>) {
    P s[NR];
    tile::unroll<NR>([&](auto n) FOVEA_INLINE_LAMBDA { s[n] = P::load(S + n * P::size); });
    if constexpr (Keep) {
      const P c(keep[e]);
      tile::unroll<NR>([&](auto n) FOVEA_INLINE_LAMBDA { s[n] = c * s[n]; });
    }
    if constexpr (Update) {
      tile::unroll<T>([&](auto j) FOVEA_INLINE_LAMBDA {
        const P f(k[j * stride + e]);
        tile::unroll<NR>([&](auto n) FOVEA_INLINE_LAMBDA { s[n] = simd::fma(f, x[j][n], s[n]); });
      });
      tile::unroll<NR>([&](auto n) FOVEA_INLINE_LAMBDA { s[n].store(S + n * P::size); });
    }
    if constexpr (Read)
      tile::unroll<T>([&](auto i) FOVEA_INLINE_LAMBDA {
        const P f(q[i * stride + e]);
        tile::unroll<NR>([&](auto n) FOVEA_INLINE_LAMBDA { y[i][n] = simd::fma(f, s[n], y[i][n]); });
        if constexpr (Delta) {
          const P g(u[i * stride + e]);
          tile::unroll<NR>([&](auto n) FOVEA_INLINE_LAMBDA { w[i][n] = simd::fma(g, s[n], w[i][n]); });
        }
      });
  }
}

/// o_i = y_gain_i y_i + sum_{j<=i} P_ij x_j
template <class Arch, class Acc, int T, int NR>
FOVEA_INLINE void write_outputs(const read_weights<Acc, T>& c, const simd::pack<Acc, Arch> (&x)[T][NR],
                                const simd::pack<Acc, Arch> (&y)[T][NR], Acc* out, isize out_stride) {
  using P = simd::pack<Acc, Arch>;
  tile::unroll<T>([&](auto i) FOVEA_INLINE_LAMBDA {
    tile::unroll<NR>([&](auto n) FOVEA_INLINE_LAMBDA {
      P o = P(c.y_gain[i]) * y[i][n];
      tile::unroll<i + 1>([&](auto j) FOVEA_INLINE_LAMBDA { o = simd::fma(P(c.P[i][j]), x[j][n], o); });
      o.store(out + i * out_stride + n * P::size);
    });
  });
}

/// The other query heads of the group: they read the state before the step updates it.
template <class Arch, class Acc, int T, int NR>
FOVEA_NOINLINE void read_step(isize r, Acc* S, const Acc* q, isize stride, const read_weights<Acc, T>& c,
                              const Acc* x_rows, Acc* out, isize out_stride) {
  using P = simd::pack<Acc, Arch>;
  P x[T][NR], y[T][NR], none[T][NR];
  sweep_rows<Arch, Acc, T, NR, false, false, true, false>(r, S, nullptr, nullptr, q, nullptr, stride, none, y, none);
  tile::unroll<T>([&](auto i) FOVEA_INLINE_LAMBDA {
    tile::unroll<NR>([&](auto n) FOVEA_INLINE_LAMBDA { x[i][n] = P::load(x_rows + (i * NR + n) * P::size); });
  });
  write_outputs<Arch, Acc, T, NR>(c, x, y, out, out_stride);
}

}  // namespace detail

/// All steps of a block over NR vectors of columns. v [steps * T][v_stride], out [heads][steps * T][out_stride] are those columns.
template <class Arch, class Acc, bool Delta>
FOVEA_NOINLINE void sweep_panel(const sweep_block<Acc, sweep_shape<Arch>::T>& b, Acc* S, const Acc* v, isize v_stride,
                                Acc* out, isize out_stride, isize out_head_stride) noexcept {
  constexpr int T = sweep_shape<Arch>::T, NR = sweep_shape<Arch>::NR;
  using P = simd::pack<Acc, Arch>;
  P x[T][NR], y[T][NR], u[T][NR];
  const isize ld = b.stride;
  detail::sweep_rows<Arch, Acc, T, NR, Delta, false, true, false>(b.r, S, nullptr, nullptr, b.q, b.u, ld, x, y, u);
  for (isize t = 0; t < b.steps; ++t) {
    const auto& c = b.step[t];
    const Acc* vt = v + t * T * v_stride;
    tile::unroll<T>([&](auto i) FOVEA_INLINE_LAMBDA {
      tile::unroll<NR>([&](auto n) FOVEA_INLINE_LAMBDA {
        x[i][n] = P::load(vt + i * v_stride + n * P::size);
        if constexpr (Delta) {
          x[i][n] = P(c.v_gain[i]) * x[i][n] - P(c.u_gain[i]) * u[i][n];
          tile::unroll<i>([&](auto j) FOVEA_INLINE_LAMBDA { x[i][n] = x[i][n] - P(c.A[i][j]) * x[j][n]; });
        }
      });
    });
    Acc* ot = out + t * T * out_stride;
    detail::write_outputs<Arch, Acc, T, NR>(b.read[t], x, y, ot, out_stride);
    if (b.heads > 1) {
      alignas(64) Acc x_rows[T * NR * P::size];
      tile::unroll<T>([&](auto i) FOVEA_INLINE_LAMBDA {
        tile::unroll<NR>([&](auto n) FOVEA_INLINE_LAMBDA { x[i][n].store(x_rows + (i * NR + n) * P::size); });
      });
      for (isize h = 1; h < b.heads; ++h)
        detail::read_step<Arch, Acc, T, NR>(b.r, S, b.q + h * b.q_head_stride + t * T * ld, ld,
                                            b.read[h * b.read_head_stride + t], x_rows, ot + h * out_head_stride,
                                            out_stride);
    }
    tile::unroll<T>([&](auto i) FOVEA_INLINE_LAMBDA {
      tile::unroll<NR>([&](auto n) FOVEA_INLINE_LAMBDA { x[i][n] = P(c.x_gain[i]) * x[i][n]; });
    });
    const Acc *k = b.k + t * T * ld, *q = b.q + (t + 1) * T * ld, *w = b.u + (t + 1) * T * ld;
    if (t + 1 < b.steps) {
      if (c.keep == nullptr)
        detail::sweep_rows<Arch, Acc, T, NR, Delta, true, true, false>(b.r, S, nullptr, k, q, w, ld, x, y, u);
      else
        detail::sweep_rows<Arch, Acc, T, NR, Delta, true, true, true>(b.r, S, c.keep, k, q, w, ld, x, y, u);
    } else if (c.keep == nullptr) {
      detail::sweep_rows<Arch, Acc, T, NR, Delta, true, false, false>(b.r, S, nullptr, k, q, w, ld, x, y, u);
    } else {
      detail::sweep_rows<Arch, Acc, T, NR, Delta, true, false, true>(b.r, S, c.keep, k, q, w, ld, x, y, u);
    }
  }
}

}  // namespace kernel
}  // namespace FOVEA_ABI
}  // namespace fovea
