// SPDX-License-Identifier: MIT
#pragma once
/// @file  The T x T numbers of each step of the linear sweep: products of keys and queries inside the step, decays, normaliser.
///
///   D_ij = prod_{j<s<=i} a_s     P_ij = gain_i / den_i  D_ij q_i.k_j  (j <= i)     A_ij = beta_i D_ij u_i.k_j  (j < i)
///   den_i = a_0..a_i q_i.z + sum_{j<=i} D_ij q_i.k_j + add_i, at least floor_i;    z <- a z + k
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

/// The gates and the output factors of a block; arrays hold steps * T tokens.
template <class Acc>
struct weight_block {
  const Acc* decay;    ///< [tokens] a_t, or null: 1
  const Acc* channel;  ///< [tokens][stride] a_t of each channel, or null
  const Acc* beta;     ///< [tokens]; delta rules only
  bool normalise;
  const Acc *gain, *add, *floor;  ///< [heads][feature_rows]
  Acc* z;                         ///< [r]
  Acc* scale;                     ///< [stride] scratch: c of each channel
  Acc* keep;                      ///< [steps][stride] scratch: what steps multiply S by
};

namespace detail {

template <int T>
inline constexpr int lower = T*(T + 1) / 2;  // pairs j <= i, row by row
constexpr int pair_at(int i, int j) { return i * (i + 1) / 2 + j; }

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

/// out: q_i.k_j for j <= i, then q_i.z.
template <class Arch, class Acc, int T, bool Sum>
FOVEA_INLINE void step_products(isize r, const Acc* q, const Acc* k, isize stride, const Acc* z, Acc* out) {
  using P = simd::pack<Acc, Arch>;
  constexpr int N = lower<T> + (Sum ? T : 0);
  P acc[N];
  tile::unroll<N>([&](auto n) FOVEA_INLINE_LAMBDA { acc[n] = P(Acc(0)); });
  for (isize e = 0; e < r; e += P::size) {
    P f[T], w;
    tile::unroll<T>([&](auto j) FOVEA_INLINE_LAMBDA { f[j] = P::load(k + j * stride + e); });
    if constexpr (Sum) w = P::load(z + e);
    tile::unroll<T>([&](auto i) FOVEA_INLINE_LAMBDA {
      const P g = P::load(q + i * stride + e);
      tile::unroll<i + 1>([&](auto j)
                              FOVEA_INLINE_LAMBDA { acc[pair_at(i, j)] = simd::fma(g, f[j], acc[pair_at(i, j)]); });
      if constexpr (Sum) acc[lower<T> + i] = simd::fma(g, w, acc[lower<T> + i]);
    });
  }
  sum_lanes(acc, out);
}

/// u_i.k_j for j < i, at pair_at(i - 1, j).
template <class Arch, class Acc, int T>
FOVEA_INLINE void erase_products(isize r, const Acc* u, const Acc* k, isize stride, Acc* out) {
  using P = simd::pack<Acc, Arch>;
  constexpr int N = lower<T - 1>;
  P acc[N];
  tile::unroll<N>([&](auto n) FOVEA_INLINE_LAMBDA { acc[n] = P(Acc(0)); });
  for (isize e = 0; e < r; e += P::size)
    tile::unroll<T - 1>([&](auto i) FOVEA_INLINE_LAMBDA {
      const P g = P::load(u + (i + 1) * stride + e);
      tile::unroll<i + 1>([&](auto j) FOVEA_INLINE_LAMBDA {
        acc[pair_at(i, j)] = simd::fma(g, P::load(k + j * stride + e), acc[pair_at(i, j)]);
      });
    });
  sum_lanes(acc, out);
}

/// P and y_gain of one head and step from the products, decays already in P.
template <class Acc, int T>
FOVEA_INLINE void finish_read(const Acc* products, const Acc* state_gain, const weight_block<Acc>& w, isize token,
                              read_weights<Acc, T>& out) {
  for (int i = 0; i < T; ++i) {
    Acc factor = w.gain[token + i];
    if (w.normalise) {
      Acc den = products[lower<T> + i];
      for (int j = 0; j <= i; ++j) den += products[pair_at(i, j)];
      den += w.add[token + i];
      if (den < w.floor[token + i]) den = w.floor[token + i];
      factor = den == Acc(0) ? Acc(0) : factor / den;
    }
    out.y_gain[i] = factor * state_gain[i];
    for (int j = 0; j < T; ++j) out.P[i][j] = j <= i ? factor * products[pair_at(i, j)] : Acc(0);
  }
}

/// z <- gain z + sum_j f_j k_j
template <class Arch, class Acc, int T>
FOVEA_INLINE void advance_sum(isize r, Acc* z, Acc gain, const Acc (&f)[T], const Acc* k, isize stride) {
  using P = simd::pack<Acc, Arch>;
  for (isize e = 0; e < r; e += P::size) {
    P s = P(gain) * P::load(z + e);
    tile::unroll<T>([&](auto j) FOVEA_INLINE_LAMBDA { s = simd::fma(P(f[j]), P::load(k + j * stride + e), s); });
    s.store(z + e);
  }
}

template <class Acc>
inline constexpr Acc least_scale = Acc(1e-6);

}  // namespace detail

/// One decay per token, or none.
template <class Arch, class Acc, bool Delta, bool Decay>
FOVEA_NOINLINE void scalar_weights(const sweep_block<Acc, sweep_shape<Arch>::T>& b, weight_block<Acc> w,
                                   step_weights<Acc, sweep_shape<Arch>::T>* step,
                                   read_weights<Acc, sweep_shape<Arch>::T>* read) noexcept {
  constexpr int T = sweep_shape<Arch>::T;
  const isize ld = b.stride;
  Acc c(1);
  for (isize t = 0; t < b.steps; ++t) {
    const isize token = t * T;
    auto& s = step[t];
    Acc D[T][T], g[T], since[T];  // D_ij, a_0..a_i, decay from j to the end of the step
    for (int i = 0; i < T; ++i) {
      const Acc a = Decay ? w.decay[token + i] : Acc(1);
      for (int j = 0; j < i; ++j) D[i][j] = a * D[i - 1][j];
      D[i][i] = Acc(1);
      g[i] = i == 0 ? a : a * g[i - 1];
    }
    for (int j = 0; j < T; ++j) since[j] = D[T - 1][j];
    alignas(64) Acc products[32];
    Acc state_gain[T];
    for (int i = 0; i < T; ++i) state_gain[i] = c * g[i];
    for (isize h = 0; h < b.heads; ++h) {
      const Acc* q = b.q + h * b.q_head_stride + token * ld;
      if (w.normalise)
        detail::step_products<Arch, Acc, T, true>(b.r, q, b.k + token * ld, ld, w.z, products);
      else
        detail::step_products<Arch, Acc, T, false>(b.r, q, b.k + token * ld, ld, nullptr, products);
      if constexpr (Decay)
        for (int i = 0; i < T; ++i) {
          for (int j = 0; j <= i; ++j) products[detail::pair_at(i, j)] *= D[i][j];
          if (w.normalise) products[detail::lower<T> + i] *= g[i];
        }
      weight_block<Acc> own = w;
      own.gain += h * b.read_head_stride * T, own.add += h * b.read_head_stride * T,
          own.floor += h * b.read_head_stride * T;
      detail::finish_read<Acc, T>(products, state_gain, own, token, read[h * b.read_head_stride + t]);
    }
    if constexpr (Delta) {
      detail::erase_products<Arch, Acc, T>(b.r, b.u + token * ld, b.k + token * ld, ld, products);
      for (int i = 0; i < T; ++i) {
        s.v_gain[i] = w.beta[token + i];
        s.u_gain[i] = w.beta[token + i] * state_gain[i];
        for (int j = 0; j < i; ++j) s.A[i][j] = w.beta[token + i] * D[i][j] * products[detail::pair_at(i - 1, j)];
      }
    }
    if (w.normalise) detail::advance_sum<Arch, Acc, T>(b.r, w.z, g[T - 1], since, b.k + token * ld, ld);
    s.keep = nullptr;
    if constexpr (!Decay) {
      for (int j = 0; j < T; ++j) s.x_gain[j] = Acc(1);
      continue;
    }
    const Acc next = c * g[T - 1];
    const bool settle = t + 1 == b.steps || !(next >= detail::least_scale<Acc>);
    if (settle && next != Acc(1)) {
      Acc* keep = w.keep + t * ld;
      for (isize e = 0; e < b.r; ++e) keep[e] = next;
      s.keep = keep;
    }
    c = settle ? Acc(1) : next;
    for (int j = 0; j < T; ++j) s.x_gain[j] = settle ? since[j] : since[j] / c;
  }
}

/// One decay per token and channel. Turns k, q, u into the rows of the sweep, in place: k D_last / c', q c a_0..a_i, u c a_0..a_i.
template <class Arch, class Acc, bool Delta>
FOVEA_NOINLINE void channel_weights(const sweep_block<Acc, sweep_shape<Arch>::T>& b, weight_block<Acc> w, Acc* k_rows,
                                    Acc* q_rows, Acc* u_rows, step_weights<Acc, sweep_shape<Arch>::T>* step,
                                    read_weights<Acc, sweep_shape<Arch>::T>* read) noexcept {
  constexpr int T = sweep_shape<Arch>::T;
  using P = simd::pack<Acc, Arch>;
  const isize ld = b.stride;
  for (isize e = 0; e < b.r; e += P::size) P(Acc(1)).store(w.scale + e);
  for (isize t = 0; t < b.steps; ++t) {
    const isize token = t * T;
    auto& s = step[t];
    const Acc* a = w.channel + token * ld;
    Acc* k = k_rows + token * ld;
    Acc* u = Delta ? u_rows + token * ld : nullptr;
    Acc* next = w.keep + t * ld;
    bool settle = t + 1 == b.steps;
    for (isize e = 0; e < b.r; e += P::size) {
      P g = P::load(w.scale + e);
      tile::unroll<T>([&](auto i) FOVEA_INLINE_LAMBDA { g = g * P::load(a + i * ld + e); });
      g.store(next + e);
    }
    if (!settle)
      for (isize e = 0; e < b.r; ++e) settle = settle || !(next[e] >= detail::least_scale<Acc>);
    s.keep = settle ? next : nullptr;
    alignas(64) Acc products[32];
    for (isize h = 0; h < b.heads; ++h) {
      Acc* q = q_rows + h * b.q_head_stride + token * ld;
      constexpr int N = detail::lower<T> + T;
      P acc[N];
      tile::unroll<N>([&](auto n) FOVEA_INLINE_LAMBDA { acc[n] = P(Acc(0)); });
      for (isize e = 0; e < b.r; e += P::size) {
        P f[T], d[T], g(Acc(1));
        const P c = P::load(w.scale + e), z = w.normalise ? P::load(w.z + e) : P(Acc(0));
        tile::unroll<T>([&](auto i) FOVEA_INLINE_LAMBDA {
          d[i] = P::load(a + i * ld + e);
          tile::unroll<i>([&](auto j) FOVEA_INLINE_LAMBDA { f[j] = f[j] * d[i]; });
          f[i] = P::load(k + i * ld + e);
          const P row = P::load(q + i * ld + e);
          tile::unroll<i + 1>([&](auto j) FOVEA_INLINE_LAMBDA {
            acc[detail::pair_at(i, j)] = simd::fma(row, f[j], acc[detail::pair_at(i, j)]);
          });
          g = g * d[i];
          const P faded = row * g;
          acc[detail::lower<T> + i] = simd::fma(faded, z, acc[detail::lower<T> + i]);
          (faded * c).store(q + i * ld + e);
        });
      }
      detail::sum_lanes(acc, products);
      weight_block<Acc> own = w;
      own.gain += h * b.read_head_stride * T, own.add += h * b.read_head_stride * T,
          own.floor += h * b.read_head_stride * T;
      Acc unit[T];
      for (int i = 0; i < T; ++i) unit[i] = Acc(1);
      detail::finish_read<Acc, T>(products, unit, own, token, read[h * b.read_head_stride + t]);
    }
    P erase[detail::lower<T>];
    tile::unroll<detail::lower<T>>([&](auto n) FOVEA_INLINE_LAMBDA { erase[n] = P(Acc(0)); });
    for (isize e = 0; e < b.r; e += P::size) {
      P f[T], g(Acc(1));
      const P c = P::load(w.scale + e);
      tile::unroll<T>([&](auto i) FOVEA_INLINE_LAMBDA {
        const P d = P::load(a + i * ld + e);
        tile::unroll<i>([&](auto j) FOVEA_INLINE_LAMBDA { f[j] = f[j] * d; });
        f[i] = P::load(k + i * ld + e);
        g = g * d;
        if constexpr (Delta) {
          const P row = P::load(u + i * ld + e);
          tile::unroll<i>([&](auto j) FOVEA_INLINE_LAMBDA {
            erase[detail::pair_at(i - 1, j)] = simd::fma(row, f[j], erase[detail::pair_at(i - 1, j)]);
          });
          (row * g * c).store(u + i * ld + e);
        }
      });
      if (w.normalise) {
        P z = g * P::load(w.z + e);
        tile::unroll<T>([&](auto j) FOVEA_INLINE_LAMBDA { z = z + f[j]; });
        z.store(w.z + e);
      }
      const P to = P::load(next + e);
      tile::unroll<T>([&](auto j) FOVEA_INLINE_LAMBDA { (settle ? f[j] : f[j] / to).store(k + j * ld + e); });
      (settle ? P(Acc(1)) : to).store(w.scale + e);
    }
    if constexpr (Delta) {
      detail::sum_lanes(erase, products);
      for (int i = 0; i < T; ++i) {
        s.v_gain[i] = s.u_gain[i] = w.beta[token + i];
        for (int j = 0; j < i; ++j) s.A[i][j] = w.beta[token + i] * products[detail::pair_at(i - 1, j)];
      }
    }
    for (int j = 0; j < T; ++j) s.x_gain[j] = Acc(1);
  }
}

}  // namespace kernel
}  // namespace FOVEA_ABI
}  // namespace fovea
