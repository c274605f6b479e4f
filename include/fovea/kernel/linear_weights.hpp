// SPDX-License-Identifier: MIT
#pragma once
/// @file  The few numbers of each token of the linear sweep: decays since the block began, the delta rule's products, the normaliser.
///
///   S_t = c_t S~_t,   c_t = a_t c_{t-1}       S~ <- S~ + (k_t / c_t) x_t^T       o_t = f_t c_t q_t S~       A_t = beta_t a_t u_t.k_{t-1}
///   z_t = a_t z_{t-1} + k_t      f_t = gain_t / (q_t.z_t + add_t, at least floor_t), or gain_t where nothing is divided
///
/// c is one number, or a row with one a channel; then k, q, u rows take it in place.
///
/// Contract   no exponent is positive: decays are numbers in [0, 1]. A denominator of exactly 0 gives 0.
/// Numerics   where c falls below 1e-9 it is given to S~ (`settles`, `keep`) and starts again at 1: keys are at most 1e9 times larger,
///            and a decay of 0 forgets exactly. What is left of c at the block's end is given to S~ there.
/// Source     docs/mechanisms/linear.md

#include <fovea/kernel/linear_sweep.hpp>
#include <fovea/simd/exp.hpp>
#include <fovea/simd/reduce.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace kernel {

enum class row_sum : unsigned char { none, divide, report };  ///< what becomes of q_t.z_t

/// The gates and the output factors of a block; arrays by token have room for whole vectors.
template <class Acc>
struct weight_block {
  const Acc* decay;    ///< [tokens] a_t, or null: 1
  const Acc* channel;  ///< [tokens][stride] a_t of each channel, or null
  const Acc* beta;     ///< [tokens]; delta rules only
  row_sum sum;
  const Acc *gain, *add, *floor;  ///< [heads][head_tokens]
  Acc *factor, *sums;             ///< [heads][head_tokens] scratch: f_t c_t; q_t.z_t
  isize head_tokens;
  Acc* z;                    ///< [r]
  Acc* faded;                ///< [r] the product of all decays so far; with `channel` only
  Acc *x_gain, *u_gain, *A;  ///< [tokens] scratch
  Acc *scale, *spare;        ///< [stride] scratch
  Acc* keep;                 ///< [tokens][stride] with `channel`, else [tokens], scratch
  unsigned char* settles;    ///< [tokens] scratch
  isize stride;
};

/// Rows and their distances.
template <class Acc>
struct row_set {
  const Acc* at;
  isize stride;
};

/// The rows of a block where the caller keeps them: log-gates by channel, keys, queries of the first head.
template <class Acc>
struct direct_rows {
  row_set<Acc> gate, k, q;
  isize q_head_stride;
};

namespace detail {

template <class Acc>
inline constexpr Acc least_scale = Acc(1e-9);

/// f(i) for i < count, W of them or fewer.
template <int W, bool All, class F>
FOVEA_INLINE void each_row(isize count, F&& f) {
  tile::unroll<W>([&](auto i) FOVEA_INLINE_LAMBDA {
    if (All || i < count) f(i);
  });
}

/// out_i = x_i . y_i for W pairs of rows, or for the `count` < W last ones.
template <class Arch, class Acc, bool All>
FOVEA_INLINE void pair_products_of(isize r, row_set<Acc> x, row_set<Acc> y, isize count, Acc* out) {
  using P = simd::pack<Acc, Arch>;
  constexpr int W = static_cast<int>(P::size);
  P acc[W];
  tile::unroll<W>([&](auto i) FOVEA_INLINE_LAMBDA { acc[i] = P(Acc(0)); });
  for (isize e = 0; e < r; e += W)
    each_row<W, All>(count, [&](auto i) FOVEA_INLINE_LAMBDA {
      acc[i] = simd::fma(P::load(x.at + i * x.stride + e), P::load(y.at + i * y.stride + e), acc[i]);
    });
  simd::sum_each(acc).store(out);
}
template <class Arch, class Acc>
FOVEA_NOINLINE void pair_products(isize r, row_set<Acc> x, row_set<Acc> y, isize pairs, Acc* out) noexcept {
  constexpr isize W = simd::pack<Acc, Arch>::size;
  for (isize i = 0; i < pairs; i += W, x.at += W * x.stride, y.at += W * y.stride)
    if (pairs - i >= W)
      pair_products_of<Arch, Acc, true>(r, x, y, W, out + i);
    else
      pair_products_of<Arch, Acc, false>(r, x, y, pairs - i, out + i);
}

/// z_t = a_t z_{t-1} + k_t, sums_t = q_t.z_t for W tokens, or for the `count` < W last ones. Decay: 0 none, 1 a number, 2 a row.
template <class Arch, class Acc, int Decay, bool All>
FOVEA_INLINE void row_sums_of(isize r, row_set<Acc> q, row_set<Acc> k, row_set<Acc> a, Acc* z, isize count, Acc* sums) {
  using P = simd::pack<Acc, Arch>;
  constexpr int W = static_cast<int>(P::size);
  P acc[W];
  tile::unroll<W>([&](auto i) FOVEA_INLINE_LAMBDA { acc[i] = P(Acc(0)); });
  for (isize e = 0; e < r; e += W) {
    P s = P::load(z + e);
    each_row<W, All>(count, [&](auto i) FOVEA_INLINE_LAMBDA {
      const P key = P::load(k.at + i * k.stride + e);
      if constexpr (Decay == 0)
        s = s + key;
      else
        s = simd::fma(Decay == 1 ? P(a.at[i * a.stride]) : P::load(a.at + i * a.stride + e), s, key);
      acc[i] = simd::fma(P::load(q.at + i * q.stride + e), s, acc[i]);
    });
    s.store(z + e);
  }
  simd::sum_each(acc).store(sums);
}
template <class Arch, class Acc, int Decay>
FOVEA_NOINLINE void row_sums(isize r, row_set<Acc> q, row_set<Acc> k, row_set<Acc> a, Acc* z, isize tokens,
                             Acc* sums) noexcept {
  constexpr isize W = simd::pack<Acc, Arch>::size;
  for (isize t = 0; t < tokens; t += W, q.at += W * q.stride, k.at += W * k.stride, a.at += W * a.stride)
    if (tokens - t >= W)
      row_sums_of<Arch, Acc, Decay, true>(r, q, k, a, z, W, sums + t);
    else
      row_sums_of<Arch, Acc, Decay, false>(r, q, k, a, z, tokens - t, sums + t);
}

/// sums of tokens [first, first + count) of each head; z moves behind them, also where there is no head.
template <class Arch, class Acc>
FOVEA_NOINLINE void advance_sums(const sweep_block<Acc>& b, const weight_block<Acc>& w, isize first,
                                 isize count) noexcept {
  using P = simd::pack<Acc, Arch>;
  for (isize h = 0; h < b.heads || h == 0; ++h) {
    Acc* z = w.z;
    if (h + 1 < b.heads) {  // all heads start with the same z
      for (isize e = 0; e < b.r; e += P::size) P::load(w.z + e).store(w.spare + e);
      z = w.spare;
    }
    const row_set<Acc> k{b.k + first * b.k_stride, b.k_stride},
        q = b.heads == 0 ? k : row_set<Acc>{b.q + h * b.q_head_stride + first * b.q_stride, b.q_stride};
    Acc* sums = w.sums + h * w.head_tokens + first;
    if (w.channel != nullptr)
      row_sums<Arch, Acc, 2>(b.r, q, k, {w.channel + first * w.stride, w.stride}, z, count, sums);
    else if (w.decay != nullptr)
      row_sums<Arch, Acc, 1>(b.r, q, k, {w.decay + first, 1}, z, count, sums);
    else
      row_sums<Arch, Acc, 0>(b.r, q, k, {nullptr, 0}, z, count, sums);
  }
}

/// factor_t = f_t of each token and head.
template <class Arch, class Acc>
FOVEA_NOINLINE void output_factors(const sweep_block<Acc>& b, const weight_block<Acc>& w) noexcept {
  using P = simd::pack<Acc, Arch>;
  const P zero(Acc(0));
  for (isize h = 0; h < b.heads; ++h)
    for (isize t = h * w.head_tokens; t < h * w.head_tokens + b.tokens; t += P::size) {
      P f = P::load(w.gain + t);
      if (w.sum == row_sum::divide) {
        const P den = simd::max(P::load(w.floor + t), P::load(w.sums + t) + P::load(w.add + t));  // a NaN survives
        f = f / den;
        f = simd::select_greater(den, zero, f, simd::select_greater(zero, den, f, den));
      }
      f.store(w.factor + t);
    }
}

/// W channels of tokens [first, last) from c on. Falls: some of them fall below the least scale, and `keep` is written for all tokens.
template <class Arch, class Acc, bool Delta, bool Falls>
FOVEA_INLINE void channel_lanes(const sweep_block<Acc>& b, const weight_block<Acc>& w, isize e, isize first, isize last,
                                Acc* k, Acc* q, Acc* u) {
  using P = simd::pack<Acc, Arch>;
  const P one(Acc(1)), least(least_scale<Acc>);
  P c = P::load(w.scale + e), faded = P::load(w.faded + e);
  for (isize t = first; t < last; ++t) {
    c = c * P::load(w.channel + t * w.stride + e);
    if constexpr (Delta) (P::load(u + t * b.u_stride + e) * c).store(u + t * b.u_stride + e);
    if constexpr (Falls) {
      const P kept = simd::select_greater(least, c, c, one);
      if (simd::reduce_add(simd::select_greater(least, c, one, P(Acc(0)))) > Acc(0))
        w.settles[t] = 1, faded = faded * kept;
      kept.store(w.keep + t * w.stride + e);
      c = simd::select_greater(least, c, one, c);
    }
    for (isize h = 0; h < b.heads; ++h) {
      Acc* row = q + h * b.q_head_stride + t * b.q_stride + e;
      (P::load(row) * c).store(row);
    }
    Acc* key = k + t * b.k_stride + e;
    (P::load(key) * simd::reciprocal(c)).store(key);
  }
  c.store(w.scale + e), faded.store(w.faded + e);
}

/// A_t of the odd tokens: beta_t times the sum of u_t k_{t-1} a_t.
template <class Arch, class Acc>
FOVEA_INLINE void channel_products(const sweep_block<Acc>& b, const weight_block<Acc>& w, isize first, isize last) {
  using P = simd::pack<Acc, Arch>;
  for (isize t = first + 1; t < last; t += 2) {
    P sum(Acc(0));
    for (isize e = 0; e < b.r; e += P::size)
      sum = simd::fma(P::load(b.u + t * b.u_stride + e) * P::load(w.channel + t * w.stride + e),
                      P::load(b.k + (t - 1) * b.k_stride + e), sum);
    w.A[t] = w.beta[t] * simd::reduce_add(sum);
  }
}

/// Rows of tokens [first, last) with a decay a channel: k_t / c_t, c_t q_t, c_t u_t in place.
template <class Arch, class Acc, bool Delta>
FOVEA_NOINLINE void channel_rows(const sweep_block<Acc>& b, const weight_block<Acc>& w, isize first, isize last, Acc* k,
                                 Acc* q, Acc* u) noexcept {
  using P = simd::pack<Acc, Arch>;
  if (first == 0)
    for (isize e = 0; e < b.r; e += P::size) P(Acc(1)).store(w.scale + e);
  if constexpr (Delta) channel_products<Arch, Acc>(b, w, first, last);
  P low(Acc(0));  // lanes whose c ends below the least, or as NaN
  for (isize e = 0; e < b.r; e += P::size) {
    P c[4];  // four chains: a multiplication has a latency of four
    tile::unroll<4>([&](auto i) FOVEA_INLINE_LAMBDA { c[i] = i == 0 ? P::load(w.scale + e) : P(Acc(1)); });
    isize t = first;
    for (; t + 4 <= last; t += 4)
      tile::unroll<4>([&](auto i) FOVEA_INLINE_LAMBDA { c[i] = c[i] * P::load(w.channel + (t + i) * w.stride + e); });
    for (; t < last; ++t) c[0] = c[0] * P::load(w.channel + t * w.stride + e);
    low = low + simd::select_greater((c[0] * c[1]) * (c[2] * c[3]), P(least_scale<Acc>), P(Acc(0)), P(Acc(1)));
  }
  const bool falls = simd::reduce_add(low) > Acc(0);
  for (isize t = first; t < last; ++t) w.settles[t] = 0;
  for (isize e = 0; e < b.r; e += P::size)
    falls ? channel_lanes<Arch, Acc, Delta, true>(b, w, e, first, last, k, q, u)
          : channel_lanes<Arch, Acc, Delta, false>(b, w, e, first, last, k, q, u);
}

/// The same from rows that lie elsewhere, and from log-gates: nothing is copied, decays are not kept. False, and no harm done, where a
/// channel falls below the least scale. Token by token, so that rows are read in the order in which they lie.
template <class Arch, class Acc>
FOVEA_NOINLINE bool direct_channel_rows(const sweep_block<Acc>& b, const weight_block<Acc>& w,
                                        const direct_rows<Acc>& from, isize first, isize last, Acc* k,
                                        Acc* q) noexcept {
  using P = simd::pack<Acc, Arch>;
  const P one(Acc(1)), least(least_scale<Acc>);
  for (isize e = 0; e < b.r; e += P::size) {
    if (first == 0) one.store(w.scale + e);
    P::load(w.scale + e).store(w.spare + e);
  }
  for (isize t = first; t < last; ++t) {
    const Acc *gate = from.gate.at + t * from.gate.stride, *key = from.k.at + t * from.k.stride,
              *query = from.q.at + t * from.q.stride;
    Acc *k_row = k + t * b.k_stride, *q_row = q + t * b.q_stride;
    for (isize e = 0; e < b.r; e += P::size) {
      const P c = P::load(w.spare + e) * simd::exp(P::load(gate + e));
      c.store(w.spare + e);
      (P::load(key + e) * simd::reciprocal(c)).store(k_row + e);
      (P::load(query + e) * c).store(q_row + e);
      for (isize h = 1; h < b.heads; ++h)
        (P::load(query + h * from.q_head_stride + e) * c).store(q_row + h * b.q_head_stride + e);
    }
  }
  P low(Acc(0));  // lanes whose c ends below the least, or as NaN
  for (isize e = 0; e < b.r; e += P::size)
    low = low + simd::select_greater(P::load(w.spare + e), least, P(Acc(0)), one);
  if (simd::reduce_add(low) > Acc(0)) return false;
  for (isize e = 0; e < b.r; e += P::size) P::load(w.spare + e).store(w.scale + e);
  for (isize t = first; t < last; ++t) w.settles[t] = 0;
  return true;
}

}  // namespace detail

/// What tokens [first, first + count) of the block need of their rows: sums, products, decays by channel. Called for pieces that stay in
/// the first-level cache, in order; first is even. k, q, u: the rows of b, where they are changed.
template <class Arch, class Acc, bool Delta>
void row_weights(const sweep_block<Acc>& b, const weight_block<Acc>& w, isize first, isize count, Acc* k, Acc* q,
                 Acc* u) noexcept {
  if (w.sum != row_sum::none) detail::advance_sums<Arch, Acc>(b, w, first, count);
  if (w.channel != nullptr) return detail::channel_rows<Arch, Acc, Delta>(b, w, first, first + count, k, q, u);
  if constexpr (Delta)
    detail::pair_products<Arch, Acc>(b.r, {b.u + (first + 1) * b.u_stride, 2 * b.u_stride},
                                     {b.k + first * b.k_stride, 2 * b.k_stride}, count / 2, w.x_gain + first / 2);
}

/// row_weights for rules with a decay a channel, no sums and no erasure, from rows as they lie. False: row_weights must do it.
template <class Arch, class Acc>
bool row_weights_direct(const sweep_block<Acc>& b, const weight_block<Acc>& w, const direct_rows<Acc>& from,
                        isize first, isize count, Acc* k, Acc* q) noexcept {
  return detail::direct_channel_rows<Arch, Acc>(b, w, from, first, first + count, k, q);
}

/// Completes b behind row_weights: its gains, A, and where S~ settles.
template <class Arch, class Acc, bool Delta>
FOVEA_NOINLINE void token_weights(sweep_block<Acc>& b, const weight_block<Acc>& w) noexcept {
  using P = simd::pack<Acc, Arch>;
  detail::output_factors<Arch, Acc>(b, w);
  b.y_gain = w.factor, b.gain_head_stride = w.head_tokens;
  b.x_gain = nullptr, b.settles = nullptr, b.finish = nullptr;
  if constexpr (Delta) b.v_gain = w.beta, b.u_gain = w.beta, b.A = w.A;
  if (w.channel != nullptr) {
    b.settles = w.settles, b.keep = w.keep, b.keep_stride = w.stride, b.keep_step = 1, b.finish = w.scale;
    for (isize e = 0; e < b.r; e += P::size) (P::load(w.faded + e) * P::load(w.scale + e)).store(w.faded + e);
    return;
  }
  if constexpr (Delta)
    for (isize t = 1; t < b.tokens; t += 2) w.A[t] = w.beta[t] * w.x_gain[t / 2];
  if (w.decay == nullptr) return;
  Acc c(1);
  for (isize t = 0; t < b.tokens; ++t) {
    c *= w.decay[t];
    if constexpr (Delta) {
      w.u_gain[t] = w.beta[t] * c;
      if (t % 2 == 1) w.A[t] *= w.decay[t];
    }
    const bool falls = !(c >= detail::least_scale<Acc>);
    w.settles[t] = falls;
    if (falls) w.keep[t] = c, c = Acc(1);
    w.x_gain[t] = c;
  }
  for (isize h = 0; h < b.heads; ++h)
    for (isize t = 0; t < b.tokens; t += P::size) {
      Acc* factor = w.factor + h * w.head_tokens + t;
      (P::load(factor) * P::load(w.x_gain + t)).store(factor);
    }
  for (isize t = 0; t < b.tokens; t += P::size) (P(Acc(1)) / P::load(w.x_gain + t)).store(w.x_gain + t);
  b.x_gain = w.x_gain, b.settles = w.settles, b.keep = w.keep, b.keep_stride = 1, b.keep_step = 0;
  *w.scale = c, b.finish = w.scale;
  if constexpr (Delta) b.u_gain = w.u_gain;
}

}  // namespace kernel
}  // namespace FOVEA_ABI
}  // namespace fovea
