// SPDX-License-Identifier: MIT
#pragma once
/// @file  The linear recurrence over column panels of a state, a few tokens per sweep: the loop of every causal linear mechanism.
///
///   S_t = diag(a_t) S_{t-1} + k_t x_t^T                [r x e]     x_t = v_t, or the delta rule's correction of it
///   o_t = q_t S_t                                      [e]
///
/// T tokens make a step, and one sweep over the rows of S does the whole step: a piece of a row is loaded, takes the T outer products one
/// after the other, is read by q_t right behind the product of token t, and is stored. Nothing is masked, no product of q and k is formed.
/// Delta rules need u_t = u_t S before token t: the sweep also reads the finished piece with the u rows of the next step, and
///   x_t = v_gain_t v_t - u_gain_t u_t           first token of a step
///   x_t = v_gain_t v_t - u_gain_t u_t - A_t x_{t-1}            second token, A_t = beta_t a_t (u_t.k_{t-1})
/// The state is held as S = c S~ with c the decays since the block began: see kernel/linear_weights.hpp.
///
/// Contract   `settles` marks tokens before whose update S~ is multiplied by a row `keep` (c has been given to S~); `finish` multiplies S~
///            behind the last token. Null: never. `ahead`: memory that the caller reads or writes next; it is only asked for.
/// Cost       per row of S, T = 3, four vectors: 24 fused multiply-adds, 10 loads, 4 stores; delta rules, T = 2: 24, 10, 4.
/// Numerics   each column is computed alone and in one order: the result does not depend on the panel or the vector width, nor, without
///            the delta rule, on T.
/// Source     docs/mechanisms/linear.md derives the step.

#include <fovea/simd/reduce.hpp>
#include <fovea/tile/unroll.hpp>

#if defined(__clang__)
#define FOVEA_UNROLL_4 _Pragma("unroll 4")
#elif defined(__GNUC__)
#define FOVEA_UNROLL_4 _Pragma("GCC unroll 4")
#else
#define FOVEA_UNROLL_4
#endif

namespace fovea {
inline namespace FOVEA_ABI {
namespace kernel {

/// Tokens per step, vectors of columns at a time, query heads at a time: x, o (and u) of a step live in registers.
template <class Arch, bool Delta, bool Grouped>
struct sweep_shape {
  static constexpr bool wide = Arch::registers >= 32;
  static constexpr int T = Delta || Grouped ? 2 : 3, NR = wide && !Grouped ? 4 : 2, heads = wide ? 4 : Delta ? 1 : 2;
};

/// Tokens of one block. S comes from the second-level cache once a block.
inline constexpr isize sweep_tokens = 126;

/// Elements of a state row's piece: 128 bytes on every machine, so that states do not depend on the instruction set.
template <class Acc>
inline constexpr isize panel_width = static_cast<isize>(128 / sizeof(Acc));

/// Rows that the next block needs: a line of 64 bytes is asked for with each row of S, while the products leave the load ports idle.
struct sweep_ahead {
  const char* at;
  isize rows, lines, stride;  ///< lines of a row, bytes between rows

  static sweep_ahead of(const void* first, isize rows, isize width, isize stride) {
    const auto* p = static_cast<const char*>(first);
    if (width == stride) return {p, (rows * width + 63) / 64, 1, 64};
    return {p, rows, (width + 63) / 64, stride};
  }
};

/// Up to sweep_tokens tokens of one state head.
template <class Acc>
struct sweep_block {
  isize tokens, r;
  const Acc *k, *u;  ///< written with k; erased with u (delta rules only)
  isize k_stride, u_stride;
  isize heads;   ///< query heads that share the state; 0: nobody reads it (not for delta rules)
  const Acc* q;  ///< [heads][tokens][q_stride]
  isize q_stride, q_head_stride;
  const Acc* x_gain;               ///< [tokens] what k_t x_t^T is multiplied by; null: 1
  const Acc* y_gain;               ///< [heads][tokens] what q_t S~ is multiplied by; null: 1
  isize gain_head_stride;          ///<
  const Acc *v_gain, *u_gain, *A;  ///< [tokens], delta rules only; A of the odd tokens
  const unsigned char* settles;    ///< [tokens] or null
  const Acc *keep, *finish;        ///< [tokens][keep_stride], [r] with keep_step apart; finish may be null
  isize keep_stride, keep_step;    ///< keep_step 0: one number for all rows
  const sweep_ahead* ahead;        ///< [aheads]
  isize aheads;
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

/// Where a vector of a row lies: NR vectors may span two panels.
template <class P>
FOVEA_INLINE isize vector_at(int n, isize panel_stride) {
  constexpr int V = static_cast<int>(panel_width<typename P::value_type> / P::size);
  return (n / V) * panel_stride + (n % V) * P::size;
}

/// How far the requests for a block's `ahead` have come, and the lines that one sweep asks for: `count` in a row, then `jump` bytes on.
struct ahead_place {
  isize set = 0, row = 0;
};
struct ahead_lines {
  const char* at;
  isize count, jump;
};

template <class Acc>
FOVEA_INLINE ahead_lines next_lines(const sweep_block<Acc>& b, ahead_place& p, const void* none) {
  while (p.set < b.aheads && p.row >= b.ahead[p.set].rows) ++p.set, p.row = 0;
  if (p.set >= b.aheads) return {static_cast<const char*>(none), b.r, 0};
  const sweep_ahead& a = b.ahead[p.set];
  const isize rows = b.r < a.lines ? 1 : b.r / a.lines;
  const char* at = a.at + p.row * a.stride;
  p.row += rows;
  if (a.lines == 1 && a.stride == 64) return {at, b.r, 0};
  return {at, a.lines, a.stride - a.lines * 64};
}

/// One sweep over the rows of S: T tokens update (x), H heads read each (o), and T rows of u read the result (w), as asked for.
template <class Arch, class Acc, int T, int NR, int H, bool Store, bool Next>
FOVEA_INLINE void sweep_rows(isize r, Acc* S, isize panel_stride, const Acc* k, isize k_stride, const Acc* q,
                             isize q_stride, isize q_head_stride, const Acc* u, isize u_stride,
                             const simd::pack<Acc, Arch> (&x)[T][NR], simd::pack<Acc, Arch> (&o)[H > 0 ? H : 1][T][NR],
                             simd::pack<Acc, Arch> (&w)[T][NR], ahead_lines ahead) {
  using P = simd::pack<Acc, Arch>;
  tile::unroll<T * NR>([&](auto i) FOVEA_INLINE_LAMBDA {
    tile::unroll<H>([&](auto h) FOVEA_INLINE_LAMBDA { o[h][i / NR][i % NR] = P(Acc(0)); });
    if constexpr (Next) w[i / NR][i % NR] = P(Acc(0));
  });
  for (isize e = 0; e < r; ahead.at += ahead.jump) {
    const isize end = e + ahead.count < r ? e + ahead.count : r;
    FOVEA_UNROLL_4
    for (; e < end; ++e, S += panel_width<Acc>) {
      simd::prefetch(ahead.at, 64), ahead.at += 64;
      P s[NR];
      tile::unroll<NR>([&](auto n) FOVEA_INLINE_LAMBDA { s[n] = P::load(S + vector_at<P>(n, panel_stride)); });
      tile::unroll<T>([&](auto t) FOVEA_INLINE_LAMBDA {
        const P f(k[t * k_stride + e]);
        tile::unroll<NR>([&](auto n) FOVEA_INLINE_LAMBDA { s[n] = simd::fma(f, x[t][n], s[n]); });
        tile::unroll<H>([&](auto h) FOVEA_INLINE_LAMBDA {
          const P g(q[h * q_head_stride + t * q_stride + e]);
          tile::unroll<NR>([&](auto n) FOVEA_INLINE_LAMBDA { o[h][t][n] = simd::fma(g, s[n], o[h][t][n]); });
        });
      });
      if constexpr (Store)
        tile::unroll<NR>([&](auto n) FOVEA_INLINE_LAMBDA { s[n].store(S + vector_at<P>(n, panel_stride)); });
      if constexpr (Next)
        tile::unroll<T>([&](auto t) FOVEA_INLINE_LAMBDA {
          const P g(u[t * u_stride + e]);
          tile::unroll<NR>([&](auto n) FOVEA_INLINE_LAMBDA { w[t][n] = simd::fma(g, s[n], w[t][n]); });
        });
    }
  }
}

/// w_t = u_t S~ for T rows.
template <class Arch, class Acc, int T, int NR>
FOVEA_NOINLINE void read_rows(isize r, const Acc* S, isize panel_stride, const Acc* u, isize u_stride, Acc* w) {
  using P = simd::pack<Acc, Arch>;
  P acc[T][NR];
  tile::unroll<T * NR>([&](auto i) FOVEA_INLINE_LAMBDA { acc[i / NR][i % NR] = P(Acc(0)); });
  for (isize e = 0; e < r; ++e, S += panel_width<Acc>) {
    P s[NR];
    tile::unroll<NR>([&](auto n) FOVEA_INLINE_LAMBDA { s[n] = P::load(S + vector_at<P>(n, panel_stride)); });
    tile::unroll<T>([&](auto t) FOVEA_INLINE_LAMBDA {
      const P g(u[t * u_stride + e]);
      tile::unroll<NR>([&](auto n) FOVEA_INLINE_LAMBDA { acc[t][n] = simd::fma(g, s[n], acc[t][n]); });
    });
  }
  tile::unroll<T * NR>([&](auto i) FOVEA_INLINE_LAMBDA { acc[i / NR][i % NR].store(w + i * P::size); });
}

/// Rows of S~ times their factors, most of them 1.
template <class Arch, class Acc, int NR>
FOVEA_NOINLINE void keep_rows(isize r, Acc* S, isize panel_stride, const Acc* keep, isize keep_step) {
  using P = simd::pack<Acc, Arch>;
  for (isize e = 0; e < r; ++e, S += panel_width<Acc>, keep += keep_step) {
    if (*keep == Acc(1)) continue;
    const P c(*keep);
    tile::unroll<NR>([&](auto n) FOVEA_INLINE_LAMBDA {
      Acc* at = S + vector_at<P>(n, panel_stride);
      (c * P::load(at)).store(at);
    });
  }
}

/// What a sweep over NR vectors of columns goes on with: S~ there, and u S~ of the next step's tokens.
template <class Arch, class Acc, int NR>
struct sweep_place {
  const sweep_block<Acc>& b;
  Acc* S;
  isize panel_stride;
  sweep_columns<Acc> to;
  ahead_lines ahead;
  alignas(64) Acc w[2 * NR * simd::pack<Acc, Arch>::size];
};

/// Heads [h, h + H) of tokens [t, t + T).
template <class Arch, class Acc, bool Delta, int T, int NR, int H, bool Store, bool Next>
FOVEA_INLINE void sweep_heads(sweep_place<Arch, Acc, NR>& at, isize t, isize h) {
  using P = simd::pack<Acc, Arch>;
  const auto& b = at.b;
  P x[T][NR], o[H > 0 ? H : 1][T][NR], w[T][NR];
  tile::unroll<T>([&](auto i) FOVEA_INLINE_LAMBDA {
    tile::unroll<NR>([&](auto n) FOVEA_INLINE_LAMBDA {
      x[i][n] = P::load(at.to.v + (t + i) * at.to.v_stride + n * P::size);
      if constexpr (Delta) {
        const P seen = P::load(at.w + (i * NR + n) * P::size);
        x[i][n] = simd::fma(P(-b.u_gain[t + i]), seen, P(b.v_gain[t + i]) * x[i][n]);
        if constexpr (i > 0) x[i][n] = simd::fma(P(-b.A[t + i]), x[i == 0 ? 0 : i - 1][n], x[i][n]);
      }
    });
  });
  if (b.x_gain != nullptr)
    tile::unroll<T>([&](auto i) FOVEA_INLINE_LAMBDA {
      const P gain(b.x_gain[t + i]);
      tile::unroll<NR>([&](auto n) FOVEA_INLINE_LAMBDA { x[i][n] = gain * x[i][n]; });
    });
  sweep_rows<Arch, Acc, T, NR, H, Store, Next>(b.r, at.S, at.panel_stride, b.k + t * b.k_stride, b.k_stride,
                                               b.q + h * b.q_head_stride + t * b.q_stride, b.q_stride, b.q_head_stride,
                                               b.u + (t + T) * b.u_stride, b.u_stride, x, o, w, at.ahead);
  if constexpr (Next)
    tile::unroll<T * NR>([&](auto i) FOVEA_INLINE_LAMBDA { w[i / NR][i % NR].store(at.w + i * P::size); });
  tile::unroll<H>([&](auto head) FOVEA_INLINE_LAMBDA {
    Acc* out = at.to.out + (h + head) * at.to.out_head_stride + t * at.to.out_stride;
    const Acc* gain = b.y_gain == nullptr ? nullptr : b.y_gain + (h + head) * b.gain_head_stride + t;
    tile::unroll<T>([&](auto i) FOVEA_INLINE_LAMBDA {
      if (gain != nullptr) {
        const P f(gain[i]);
        tile::unroll<NR>([&](auto n) FOVEA_INLINE_LAMBDA { o[head][i][n] = f * o[head][i][n]; });
      }
      tile::unroll<NR>([&](auto n)
                           FOVEA_INLINE_LAMBDA { o[head][i][n].store(out + i * at.to.out_stride + n * P::size); });
    });
  });
}

/// Tokens [t, t + T) of all heads: all but the last few heads read a copy of the update, the last ones store it.
template <class Arch, class Acc, bool Delta, bool Grouped, int T, int NR, bool Next>
FOVEA_NOINLINE void sweep_step(sweep_place<Arch, Acc, NR>& at, isize t) {
  if constexpr (!Grouped) {
    sweep_heads<Arch, Acc, Delta, T, NR, 1, true, Next>(at, t, 0);
  } else {
    constexpr int most = sweep_shape<Arch, Delta, true>::heads;
    isize h = 0;
    for (; h + most < at.b.heads; h += most) sweep_heads<Arch, Acc, Delta, T, NR, most, false, false>(at, t, h);
    tile::with_constant<most>(at.b.heads - h,
                              [&](auto n) { sweep_heads<Arch, Acc, Delta, T, NR, n, true, Next>(at, t, h); });
  }
}

/// All tokens of a block over NR vectors of columns.
template <class Arch, class Acc, bool Delta, bool Grouped, int NR>
void sweep_columns_of(const sweep_block<Acc>& b, Acc* S, isize panel_stride, const sweep_columns<Acc>& to,
                      ahead_place& ahead) noexcept {
  using shape = sweep_shape<Arch, Delta, Grouped>;
  constexpr bool narrow = NR < shape::NR && !Delta;  // half the columns: steps of 4; 6 have too many rows to point at
  constexpr int T = narrow ? 4 : shape::T, less = Delta ? 1 : narrow ? 2 : shape::T;
  sweep_place<Arch, Acc, NR> at{b, S, panel_stride, to, {}, {}};
  const auto settles = [&](isize t) { return b.settles != nullptr && b.settles[t] != 0; };
  const auto together = [&](isize t, int tokens) {  // may tokens [t, t + tokens) make a step?
    bool yes = t + tokens <= b.tokens && !(Delta && settles(t));
    for (int i = 1; i < tokens; ++i) yes = yes && !settles(t + i);
    return yes;
  };
  const auto whole = [&](isize t) { return together(t, T); };
  bool seen = false;  // is u S~ of the next step in `at`?
  for (isize t = 0; t < b.tokens;) {
    const bool step = whole(t) && (!Delta || t % T == 0);
    if constexpr (Delta) {
      const Acc* u = b.u + t * b.u_stride;
      if (!step)
        read_rows<Arch, Acc, 1, NR>(b.r, S, panel_stride, u, b.u_stride, at.w);
      else if (!seen)
        read_rows<Arch, Acc, T, NR>(b.r, S, panel_stride, u, b.u_stride, at.w);
    }
    if (settles(t)) keep_rows<Arch, Acc, NR>(b.r, S, panel_stride, b.keep + t * b.keep_stride, b.keep_step);
    seen = Delta && step && whole(t + T);
    at.ahead = next_lines(b, ahead, S);
    if (seen)
      sweep_step<Arch, Acc, Delta, Grouped, T, NR, Delta>(at, t);
    else if (step)
      sweep_step<Arch, Acc, Delta, Grouped, T, NR, false>(at, t);
    else if (less < T && together(t, less))
      sweep_step<Arch, Acc, Delta, Grouped, less, NR, false>(at, t), t += less - 1;
    else
      sweep_step<Arch, Acc, Delta, Grouped, 1, NR, false>(at, t);
    t += step ? T : 1;
  }
  if (b.finish != nullptr) keep_rows<Arch, Acc, NR>(b.r, S, panel_stride, b.finish, b.keep_step);
}

/// All tokens of a block that nobody reads, over NR vectors of columns, in steps of 6: half the products.
template <class Arch, class Acc, int NR>
FOVEA_NOINLINE void update_columns_of(const sweep_block<Acc>& b, Acc* S, isize panel_stride,
                                      const sweep_columns<Acc>& to) noexcept {
  constexpr int T = 6;
  sweep_place<Arch, Acc, NR> at{b, S, panel_stride, to, {static_cast<const char*>(static_cast<void*>(S)), b.r, 0}, {}};
  for (isize t = 0; t < b.tokens;) {
    bool step = t + T <= b.tokens;
    for (int i = 1; step && b.settles != nullptr && i < T; ++i) step = b.settles[t + i] == 0;
    if (b.settles != nullptr && b.settles[t] != 0)
      keep_rows<Arch, Acc, NR>(b.r, S, panel_stride, b.keep + t * b.keep_stride, b.keep_step);
    if (step)
      sweep_heads<Arch, Acc, false, T, NR, 0, true, false>(at, t, 0);
    else
      sweep_heads<Arch, Acc, false, 1, NR, 0, true, false>(at, t, 0);
    t += step ? T : 1;
  }
  if (b.finish != nullptr) keep_rows<Arch, Acc, NR>(b.r, S, panel_stride, b.finish, b.keep_step);
}

template <class Arch, class Acc>
void update_panels(const sweep_block<Acc>& b, Acc* S, isize first, isize last, sweep_columns<Acc> to) noexcept {
  constexpr isize V = panel_width<Acc> / simd::pack<Acc, Arch>::size, W = simd::pack<Acc, Arch>::size;
  constexpr isize most = Arch::registers >= 32 ? 4 : 2, NR = V < most ? V : most;
  const isize panel_stride = b.r * panel_width<Acc>;
  to.v += first * panel_width<Acc>;
  for (isize c = first * V; c < last * V; c += NR, to.v += NR * W)
    update_columns_of<Arch, Acc, static_cast<int>(NR)>(b, S + c / V * panel_stride + c % V * W, panel_stride, to);
}

template <class Arch, class Acc, bool Delta, bool Grouped>
void sweep_panels_of(const sweep_block<Acc>& b, Acc* S, isize first, isize last, sweep_columns<Acc> to) noexcept {
  constexpr isize V = panel_width<Acc> / simd::pack<Acc, Arch>::size, W = simd::pack<Acc, Arch>::size;
  constexpr int NR = sweep_shape<Arch, Delta, Grouped>::NR;
  const isize panel_stride = b.r * panel_width<Acc>, end = last * V;
  to.v += first * panel_width<Acc>, to.out += first * panel_width<Acc>;
  ahead_place ahead;
  for (isize c = first * V; c < end;) {
    const isize left = end - c;
    Acc* at = S + c / V * panel_stride + c % V * W;
    isize done = NR;
    if constexpr (NR > V)
      if (left < NR)
        done = V, sweep_columns_of<Arch, Acc, Delta, Grouped, static_cast<int>(V)>(b, at, panel_stride, to, ahead);
    if (done == NR) sweep_columns_of<Arch, Acc, Delta, Grouped, NR>(b, at, panel_stride, to, ahead);
    c += done, to.v += done * W, to.out += done * W;
  }
}

}  // namespace detail

/// A block over the columns of panels [first, last). S is the head's state, `to` its column 0.
template <class Arch, class Acc, bool Delta>
void sweep_panels(const sweep_block<Acc>& b, Acc* S, isize first, isize last, const sweep_columns<Acc>& to) noexcept {
  if (!Delta && b.heads == 0)
    detail::update_panels<Arch, Acc>(b, S, first, last, to);
  else if (b.heads > 1)
    detail::sweep_panels_of<Arch, Acc, Delta, true>(b, S, first, last, to);
  else
    detail::sweep_panels_of<Arch, Acc, Delta, false>(b, S, first, last, to);
}

}  // namespace kernel
}  // namespace FOVEA_ABI
}  // namespace fovea
