// SPDX-License-Identifier: MIT
#pragma once
/// @file  The few numbers of each step of the linear sweep: products of keys and queries inside the step, decays, normaliser.
///
///   D_ij = prod_{j<s<=i} a_s     P_ij = f_i D_ij q_i.k_j  (j <= i)     A_ij = beta_i D_ij u_i.k_j  (j < i)
///   z_i = a_i z_{i-1} + k_i      f_i = gain_i / (q_i.z_i + add_i, at least floor_i), or gain_i where nothing is divided
///
/// Contract   exponents are never positive: only products of decays inside a step are formed. A denominator of exactly 0 gives 0.
/// Numerics   the state is kept as S = c S~ with c (a number, or one per channel) the decay since the block began, so that no step but
///            the last, and those where c falls below 1e-6, multiplies S. A decay of 0 is such a step and stays exact.
/// Source     docs/mechanisms/linear.md

#include <fovea/kernel/linear_sweep.hpp>
#include <fovea/simd/reduce.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace kernel {

enum class row_sum : unsigned char { none, divide, report };  ///< what becomes of q_i.z_i

/// The gates and the output factors of a block of `tokens` <= steps * T tokens; arrays by token have room for whole vectors.
template <class Acc>
struct weight_block {
  isize tokens;
  const Acc* decay;    ///< [steps * T] a_t, or null: 1
  const Acc* channel;  ///< [steps * T][stride] a_t of each channel, or null
  const Acc* beta;     ///< [steps * T]; delta rules only
  row_sum sum;
  const Acc *gain, *add, *floor;  ///< [heads][head_tokens]
  Acc *factor, *sums;             ///< [heads][head_tokens]: f_i; q_i.z_i where reported
  isize head_tokens;
  Acc* z;         ///< [r]
  Acc* faded;     ///< [r] the product of all decays so far; with `channel` only
  Acc* scale;     ///< [stride] scratch: c of each channel
  Acc* keep;      ///< [steps][stride] scratch: what steps multiply S by
  Acc* products;  ///< [product_room] scratch
  isize stride;
};

/// Products of a block: pairs of each step, and a vector behind them.
inline constexpr isize product_room = sweep_tokens / 2 * (pairs(2) + pairs(1)) + 32;

namespace detail {

template <class Acc>
inline constexpr Acc least_scale = Acc(1e-6);

/// N horizontal sums, a register's worth at a time; `out` has room for N rounded up to a register.
template <int N, class Acc, class Arch>
FOVEA_INLINE void sum_lanes(const simd::pack<Acc, Arch> (&x)[N], Acc* out) {
  using P = simd::pack<Acc, Arch>;
  constexpr int W = static_cast<int>(P::size);
  tile::unroll<(N + W - 1) / W>([&](auto g) FOVEA_INLINE_LAMBDA {
    P group[W];
    tile::unroll<W>([&](auto i) FOVEA_INLINE_LAMBDA { group[i] = x[g * W + i < N ? g * W + i : N - 1]; });
    simd::sum_each(group).store(out + g * W);
  });
}

/// Rows that a step's products are made of.
template <class Acc>
struct step_rows {
  const Acc *k, *q, *u;
  isize r, k_stride, q_stride, u_stride;
  FOVEA_INLINE void advance(isize tokens) { k += tokens * k_stride, q += tokens * q_stride, u += tokens * u_stride; }
};

/// Of each of G steps: q_i.k_j for j <= i (if Read), then u_i.k_j for j < i (if Erase).
template <class Arch, class Acc, int T, int G, bool Read, bool Erase>
FOVEA_INLINE void products_of(const step_rows<Acc>& x, Acc* out) {
  using P = simd::pack<Acc, Arch>;
  constexpr int reads = Read ? pairs(T) : 0, N = reads + (Erase ? pairs(T - 1) : 0);
  P acc[G * N];
  tile::unroll<G * N>([&](auto n) FOVEA_INLINE_LAMBDA { acc[n] = P(Acc(0)); });
  for (isize e = 0; e < x.r; e += P::size)
    tile::unroll<G>([&](auto g) FOVEA_INLINE_LAMBDA {
      P f[T];
      tile::unroll<T>([&](auto j) FOVEA_INLINE_LAMBDA { f[j] = P::load(x.k + (g * T + j) * x.k_stride + e); });
      tile::unroll<T>([&](auto i) FOVEA_INLINE_LAMBDA {
        if constexpr (Read) {
          const P row = P::load(x.q + (g * T + i) * x.q_stride + e);
          tile::unroll<i + 1>([&](auto j) FOVEA_INLINE_LAMBDA {
            acc[g * N + pairs(i) + j] = simd::fma(row, f[j], acc[g * N + pairs(i) + j]);
          });
        }
        if constexpr (Erase && i > 0) {
          const P row = P::load(x.u + (g * T + i) * x.u_stride + e);
          tile::unroll<i>([&](auto j) FOVEA_INLINE_LAMBDA {
            acc[g * N + reads + pairs(i - 1) + j] = simd::fma(row, f[j], acc[g * N + reads + pairs(i - 1) + j]);
          });
        }
      });
    });
  sum_lanes(acc, out);
}

/// The same of all steps, one after the other.
template <class Arch, class Acc, int T, bool Read, bool Erase>
FOVEA_NOINLINE void step_products(step_rows<Acc> x, isize steps, Acc* out) noexcept {
  constexpr int N = (Read ? pairs(T) : 0) + (Erase ? pairs(T - 1) : 0),
                W = static_cast<int>(simd::pack<Acc, Arch>::size), G = W / N > 1 ? W / N : 1;
  isize t = 0;
  for (; t + G <= steps; t += G, x.advance(G * T)) products_of<Arch, Acc, T, G, Read, Erase>(x, out + t * N);
  for (; t < steps; ++t, x.advance(T)) products_of<Arch, Acc, T, 1, Read, Erase>(x, out + t * N);
}

/// z_i = a_i z_{i-1} + k_i, sums_i = q_i.z_i for W tokens, or for the `left` < W last ones.
template <class Arch, class Acc, int Decay, bool All>
FOVEA_INLINE void row_sums_of(const step_rows<Acc>& x, const Acc* a, isize a_stride, Acc* z, Acc* sums, isize left) {
  using P = simd::pack<Acc, Arch>;
  constexpr int W = static_cast<int>(P::size);
  P acc[W];
  tile::unroll<W>([&](auto i) FOVEA_INLINE_LAMBDA { acc[i] = P(Acc(0)); });
  for (isize e = 0; e < x.r; e += W) {
    P s = P::load(z + e);
    tile::unroll<W>([&](auto i) FOVEA_INLINE_LAMBDA {
      if (!All && i >= left) return;
      const P k = P::load(x.k + i * x.k_stride + e);
      if constexpr (Decay == 0)
        s = s + k;
      else
        s = simd::fma(Decay == 1 ? P(a[i]) : P::load(a + i * a_stride + e), s, k);
      acc[i] = simd::fma(P::load(x.q + i * x.q_stride + e), s, acc[i]);
    });
    s.store(z + e);
  }
  simd::sum_each(acc).store(sums);
}

template <class Arch, class Acc, int Decay>
FOVEA_NOINLINE void row_sums(step_rows<Acc> x, const Acc* a, isize a_stride, isize tokens, Acc* z, Acc* sums) noexcept {
  constexpr isize W = simd::pack<Acc, Arch>::size;
  isize t = 0;
  const isize step = Decay == 1 ? W : W * a_stride;
  for (; t + W <= tokens; t += W, x.advance(W), a += Decay == 0 ? 0 : step)
    row_sums_of<Arch, Acc, Decay, true>(x, a, a_stride, z, sums + t, W);
  if (t < tokens) row_sums_of<Arch, Acc, Decay, false>(x, a, a_stride, z, sums + t, tokens - t);
}

/// f_i of each token and head; z moves to the end of the block.
template <class Arch, class Acc>
FOVEA_NOINLINE void output_factors(const sweep_block<Acc>& b, const weight_block<Acc>& w) noexcept {
  using P = simd::pack<Acc, Arch>;
  for (isize h = 0; h < b.heads; ++h) {
    const Acc *gain = w.gain + h * w.head_tokens, *add = w.add + h * w.head_tokens,
              *floor = w.floor + h * w.head_tokens;
    Acc *factor = w.factor + h * w.head_tokens, *z = w.z;
    if (h + 1 < b.heads && w.sum != row_sum::none) {  // all heads start with the same z
      for (isize e = 0; e < b.r; e += P::size) P::load(w.z + e).store(w.scale + e);
      z = w.scale;
    }
    const step_rows<Acc> x{b.k, b.q + h * b.q_head_stride, b.u, b.r, b.k_stride, b.q_stride, b.u_stride};
    Acc* sums = w.sum == row_sum::report ? w.sums + h * w.head_tokens : factor;
    if (w.sum != row_sum::none) {
      if (w.channel != nullptr)
        row_sums<Arch, Acc, 2>(x, w.channel, w.stride, w.tokens, z, sums);
      else if (w.decay != nullptr)
        row_sums<Arch, Acc, 1>(x, w.decay, 1, w.tokens, z, sums);
      else
        row_sums<Arch, Acc, 0>(x, nullptr, 0, w.tokens, z, sums);
    }
    for (isize t = 0; t < w.tokens; t += P::size) {
      P f = P::load(gain + t);
      if (w.sum == row_sum::divide) {
        const P zero(Acc(0)),
            den = simd::max(P::load(floor + t), P::load(sums + t) + P::load(add + t));  // NaN survives
        f = f / den;
        f = simd::select_greater(den, zero, f, simd::select_greater(zero, den, f, den));
      }
      f.store(factor + t);
    }
  }
}

}  // namespace detail

/// One decay per token, or none.
template <class Arch, class Acc, bool Delta, bool Decay>
FOVEA_NOINLINE void scalar_weights(const sweep_block<Acc>& b, const weight_block<Acc>& w, step_weights<Acc>* step,
                                   read_weights<Acc>* read) noexcept {
  constexpr int T = sweep_shape<Arch, Delta>::T, reads = pairs(T), N = reads + (Delta ? pairs(T - 1) : 0);
  detail::output_factors<Arch, Acc>(b, w);
  for (isize h = b.heads - 1; h >= 0; --h) {
    const detail::step_rows<Acc> x{b.k, b.q + h * b.q_head_stride, b.u, b.r, b.k_stride, b.q_stride, b.u_stride};
    const Acc* factor = w.factor + h * w.head_tokens;
    read_weights<Acc>* to = read + h * b.read_head_stride;
    if (Delta && h == 0)
      detail::step_products<Arch, Acc, T, true, Delta>(x, b.steps, w.products);
    else
      detail::step_products<Arch, Acc, T, true, false>(x, b.steps, w.products);
    const isize stride = h == 0 ? N : reads;
    Acc c(1);
    for (isize t = 0; t < b.steps; ++t) {
      const isize token = t * T;
      const Acc* p = w.products + t * stride;
      Acc D[T][T], g[T];  // D_ij; c a_0..a_i
      tile::unroll<T>([&](auto i) FOVEA_INLINE_LAMBDA {
        const Acc a = Decay ? w.decay[token + i] : Acc(1), f = factor[token + i];
        g[i] = Decay ? a * (i == 0 ? c : g[i == 0 ? 0 : i - 1]) : Acc(1);
        D[i][i] = Acc(1);
        tile::unroll<i>([&](auto j) FOVEA_INLINE_LAMBDA { D[i][j] = Decay ? a * D[i - 1][j] : Acc(1); });
        tile::unroll<i + 1>([&](auto j) FOVEA_INLINE_LAMBDA {
          to[t].P[pairs(i) + j] = Decay && i != j ? f * (D[i][j] * p[pairs(i) + j]) : f * p[pairs(i) + j];
        });
        to[t].y_gain[i] = Decay ? f * g[i] : f;
      });
      const Acc next = g[T - 1];
      const bool settle = Decay && (t + 1 == b.steps || !(next >= detail::least_scale<Acc>));
      c = settle ? Acc(1) : next;
      if (h > 0) continue;
      auto& s = step[t];
      if constexpr (Delta)
        tile::unroll<T>([&](auto i) FOVEA_INLINE_LAMBDA {
          const Acc beta = w.beta[token + i];
          s.v_gain[i] = beta, s.u_gain[i] = Decay ? beta * g[i] : beta;
          tile::unroll<i>([&](auto j) FOVEA_INLINE_LAMBDA {
            const Acc product = p[reads + pairs(i - 1) + j];
            s.A[pairs(i - 1) + j] = Decay ? beta * (D[i][j] * product) : beta * product;
          });
        });
      s.keep = nullptr;
      const Acc rise = Decay ? Acc(1) / c : Acc(1);
      tile::unroll<T>([&](auto j) FOVEA_INLINE_LAMBDA { s.x_gain[j] = Decay ? D[T - 1][j] * rise : Acc(1); });
      if (!settle) continue;
      if (next == Acc(1)) continue;
      Acc* keep = w.keep + t * w.stride;
      for (isize e = 0; e < b.r; ++e) keep[e] = next;
      s.keep = keep;
    }
  }
}

namespace detail {

/// One step and head of channel_weights: products with decays, q rows c a_0..a_i q. The last head also turns k and u, and c into the
/// next step's. Returns whether a channel settles.
template <class Arch, class Acc, int T, bool Delta, bool Last>
FOVEA_INLINE bool channel_step(isize r, bool settle_all, const Acc* a, isize stride, Acc* q, isize q_stride, Acc* k,
                               isize k_stride, Acc* u, isize u_stride, Acc* scale, Acc* keep, Acc* out) {
  using P = simd::pack<Acc, Arch>;
  constexpr int reads = pairs(T), N = reads + (Delta && Last ? pairs(T - 1) : 0);
  const P least(least_scale<Acc>), one(Acc(1));
  P acc[N], fallen(Acc(-1));
  tile::unroll<N>([&](auto n) FOVEA_INLINE_LAMBDA { acc[n] = P(Acc(0)); });
  for (isize e = 0; e < r; e += P::size) {
    P f[T], g = P::load(scale + e);
    tile::unroll<T>([&](auto i) FOVEA_INLINE_LAMBDA {
      const P d = P::load(a + i * stride + e);
      g = g * d;
      tile::unroll<i>([&](auto j) FOVEA_INLINE_LAMBDA { f[j] = f[j] * d; });
      f[i] = P::load(k + i * k_stride + e);
      const P row = P::load(q + i * q_stride + e);
      tile::unroll<i + 1>([&](auto j)
                              FOVEA_INLINE_LAMBDA { acc[pairs(i) + j] = simd::fma(row, f[j], acc[pairs(i) + j]); });
      (row * g).store(q + i * q_stride + e);
      if constexpr (Delta && Last) {
        const P erase = P::load(u + i * u_stride + e);
        tile::unroll<i>([&](auto j) FOVEA_INLINE_LAMBDA {
          acc[reads + pairs(i - 1) + j] = simd::fma(erase, f[j], acc[reads + pairs(i - 1) + j]);
        });
        (erase * g).store(u + i * u_stride + e);
      }
    });
    if constexpr (Last) {
      P rise = one, kept = g, next = one;
      if (!settle_all) {
        kept = simd::select_greater(least, g, g, one), next = simd::select_greater(least, g, one, g);
        rise = simd::reciprocal(next);
        fallen = simd::max(least - g, fallen);
      }
      kept.store(keep + e), next.store(scale + e);
      tile::unroll<T>([&](auto j) FOVEA_INLINE_LAMBDA { (f[j] * rise).store(k + j * k_stride + e); });
    }
  }
  sum_lanes(acc, out);
  return Last && (settle_all || simd::highest(fallen) > Acc(0));
}

}  // namespace detail

/// One decay per token and channel. Turns k, q, u into the rows of the sweep, in place: k D_last / c', q c a_0..a_i, u c a_0..a_i.
template <class Arch, class Acc, bool Delta>
FOVEA_NOINLINE void channel_weights(const sweep_block<Acc>& b, const weight_block<Acc>& w, Acc* k_rows, Acc* q_rows,
                                    Acc* u_rows, step_weights<Acc>* step, read_weights<Acc>* read) noexcept {
  constexpr int T = sweep_shape<Arch, Delta>::T, reads = pairs(T);
  using P = simd::pack<Acc, Arch>;
  detail::output_factors<Arch, Acc>(b, w);
  for (isize e = 0; e < b.r; e += P::size) P(Acc(1)).store(w.scale + e);
  for (isize t = 0; t < b.steps; ++t) {
    const isize token = t * T;
    Acc *k = k_rows + token * b.k_stride, *u = Delta ? u_rows + token * b.u_stride : nullptr,
        *keep = w.keep + t * w.stride;
    auto& s = step[t];
    for (isize h = b.heads - 1; h >= 0; --h) {
      Acc *q = q_rows + h * b.q_head_stride + token * b.q_stride, *products = w.products;
      const Acc *a = w.channel + token * w.stride, *factor = w.factor + h * w.head_tokens + token;
      bool settles = false;
      if (h > 0)
        detail::channel_step<Arch, Acc, T, Delta, false>(b.r, false, a, w.stride, q, b.q_stride, k, b.k_stride, u,
                                                         b.u_stride, w.scale, keep, products);
      else
        settles = detail::channel_step<Arch, Acc, T, Delta, true>(b.r, t + 1 == b.steps, a, w.stride, q, b.q_stride, k,
                                                                  b.k_stride, u, b.u_stride, w.scale, keep, products);
      read_weights<Acc>& to = read[h * b.read_head_stride + t];
      tile::unroll<T>([&](auto i) FOVEA_INLINE_LAMBDA {
        to.y_gain[i] = factor[i];
        tile::unroll<i + 1>([&](auto j)
                                FOVEA_INLINE_LAMBDA { to.P[pairs(i) + j] = factor[i] * products[pairs(i) + j]; });
      });
      if (h > 0) continue;
      s.keep = settles ? keep : nullptr;
      for (isize e = 0; settles && e < b.r; ++e) w.faded[e] *= keep[e];
    }
    tile::unroll<T>([&](auto i) FOVEA_INLINE_LAMBDA {
      s.x_gain[i] = Acc(1);
      if constexpr (Delta) {
        const Acc beta = w.beta[token + i];
        s.v_gain[i] = s.u_gain[i] = beta;
        tile::unroll<i>(
            [&](auto j) FOVEA_INLINE_LAMBDA { s.A[pairs(i - 1) + j] = beta * w.products[reads + pairs(i - 1) + j]; });
      }
    });
  }
}

}  // namespace kernel
}  // namespace FOVEA_ABI
}  // namespace fovea
