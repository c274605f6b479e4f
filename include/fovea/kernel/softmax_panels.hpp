// SPDX-License-Identifier: MIT
#pragma once
/// @file  The four inner loops of the online softmax, each over panels of keys of one block and a tile of queries in the lanes.
///
///   score_panels   S = K Q^T for panels of up to MR keys, and the running maximum
///   mask_vector    S = visible ? S : -inf, and the maximum of what is left
///   exponentials   P = 2^(S - m) in place, the new (m, l), and the factor of the old O
///   value_panels   O^T = O^T 2^(m - m') + V^T P
///
/// Contract   S [keys][NR * W]; lanes[k] bit l: query l sees key k of the block. A masked panel takes masked products, so that NaN
///            or infinity in a value reaches only the rows that see its key.

#include <bit>
#include <limits>

#include <fovea/kernel/row_requests.hpp>
#include <fovea/simd/exp.hpp>
#include <fovea/simd/reduce.hpp>
#include <fovea/tile/gemm.hpp>
#include <fovea/tile/panel_rows.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace kernel {
namespace detail {

/// 6 x 4 with 32 registers: 10 loads feed 24 products, which leaves the core room where 8 x 2 (10 for 16) does not, most of all
/// when another thread shares it; 6 x 2 with 16 registers.
template <class Arch, class Acc>
struct softmax_tile {
  static constexpr bool wide = std::is_same_v<Acc, float> && Arch::registers >= 32 && simd::pack<Acc, Arch>::size <= 16;
  static constexpr int MR = wide ? 6 : tile::tile_shape<Arch, Acc>::MR, NR = wide ? 4 : tile::tile_shape<Arch, Acc>::NR;
  static constexpr isize W = simd::pack<Acc, Arch>::size, rows = NR * W;  // queries of a tile
  static constexpr isize keys = wide ? 96 : 128;                          // keys of a block: S stays in L1
  static constexpr isize most_panels = keys;
  /// Keys of a panel of scores for so many vectors: as many chains of products as hide each other's latency.
  static constexpr int panel_keys(int vectors) { return !wide || vectors == NR ? MR : vectors > 1 ? 8 : 16; }
  static_assert(rows <= 64);
};

/// What the vectors of a tile see of a run of keys.
enum class seen : std::uint8_t {
  whole,    ///< everything
  rising,   ///< nothing before vector `edge`, part of it, everything behind (the causal diagonal)
  falling,  ///< everything before vector `edge`, part of it, nothing behind (the far side of a window)
  ragged    ///< anything
};

/// A run of keys inside a block: [first, first + count) of the block.
struct panel {
  std::int16_t first, count;
  seen kind = seen::whole;
  std::int8_t edge = 0;
  bool same(seen k, int e) const { return kind == k && edge == e; }
  /// No row of vector x sees a key of the run.
  bool leaves_out(int x) const { return (kind == seen::rising && x < edge) || (kind == seen::falling && x > edge); }
};

/// Keys [first, last) that vectors [v0, v1) of the tile see, some lanes of them or all.
struct keys_alike {
  isize first, last, v0, v1;
  std::uint64_t all;  ///< lanes that see every key
};
/// From key k on, which some lane sees: keys seen by the same vectors, at least a panel of them, if nobody's key ends it.
template <class T>
keys_alike alike(const std::uint64_t* lanes, isize k, isize last, std::uint64_t every) noexcept {
  const auto low = [](std::uint64_t bits) { return static_cast<isize>(std::countr_zero(bits)) / T::W; };
  const auto high = [](std::uint64_t bits) { return static_cast<isize>(63 - std::countl_zero(bits)) / T::W + 1; };
  const std::uint64_t bits = lanes[k];
  keys_alike x{k, k + 1, low(bits), high(bits), bits};
  while (bits == every && x.last < last && lanes[x.last] == every) ++x.last;
  for (; x.last < last && lanes[x.last] != 0; ++x.last) {
    const std::uint64_t next = lanes[x.last];
    const isize v0 = low(next), v1 = high(next);
    const bool same = v0 == x.v0 && v1 == x.v1 && (next == every) == (bits == every);
    if (!same && x.last - x.first >= T::MR) break;
    x.v0 = v0 < x.v0 ? v0 : x.v0, x.v1 = v1 > x.v1 ? v1 : x.v1, x.all &= next;
  }
  return x;
}

/// Steps of few vectors, with each of which lines are asked for: columns of a panel of scores, keys of a run of values.
inline constexpr isize score_step = 4, value_step = 4;

/// S = K Q^T for `panels` panels of M keys and NV vectors of queries; folds the maximum into `top` [NV vectors].
template <class Arch, class Acc, int M, int NV>
FOVEA_NOINLINE void score_panels(isize panels, isize d, const Acc* k, isize k_stride, const Acc* qt, isize ld, Acc* s,
                                 Acc* top, paced_requests& ahead, later& next) noexcept {
  using P = simd::pack<Acc, Arch>;
  P most[NV];
  tile::unroll<NV>([&](auto v) FOVEA_INLINE_LAMBDA { most[v] = P::load(top + v * P::size); });
  for (isize n = 0; n < panels; ++n, k += M * k_stride, s += M * ld) {
    next.ask();
    P acc[M][NV];
    tile::unroll<M>([&](auto i) FOVEA_INLINE_LAMBDA {
      tile::unroll<NV>([&](auto v) FOVEA_INLINE_LAMBDA { acc[i][v] = P(Acc(0)); });
    });
    tile::panel_rows<Acc> a(k, k_stride);
    const Acc* b = qt;
    const auto products = [&](isize columns) FOVEA_INLINE_LAMBDA {
      for (; columns > 0; --columns, a.next(), b += ld) {
        P q[NV];
        tile::unroll<NV>([&](auto v) FOVEA_INLINE_LAMBDA { q[v] = P::load(b + v * P::size); });
        tile::unroll<M>([&](auto i) FOVEA_INLINE_LAMBDA {
          const P x(a.at(i));
          tile::unroll<NV>([&](auto v) FOVEA_INLINE_LAMBDA { acc[i][v] = simd::fma(x, q[v], acc[i][v]); });
        });
      }
    };
    // Few rows of queries: reading the keys and values may take longer than the products.
    if (NV < softmax_tile<Arch, Acc>::NR && ahead.any()) {
      for (isize c = 0; c < d; c += score_step) {
        ahead.ask();
        products(d - c < score_step ? d - c : score_step);
      }
    } else {
      products(d);
    }
    tile::unroll<M>([&](auto i) FOVEA_INLINE_LAMBDA {
      tile::unroll<NV>([&](auto v) FOVEA_INLINE_LAMBDA {
        acc[i][v].store(s + i * ld + v * P::size);
        most[v] = simd::max(most[v], acc[i][v]);
      });
    });
  }
  tile::unroll<NV>([&](auto v) FOVEA_INLINE_LAMBDA { most[v].store(top + v * P::size); });
}

/// acc += V^T P over a run of keys: vector Edge by lanes, vectors [Plain0, Plain1) whole.
template <class Arch, class Acc, int M, int NV, int Edge, int Plain0, int Plain1>
FOVEA_INLINE void edge_values(isize first, isize count, const Acc* v, isize v_stride, const Acc* p,
                              const std::uint64_t* lanes, simd::pack<Acc, Arch> (&acc)[M][NV]) noexcept {
  using P = simd::pack<Acc, Arch>;
  for (isize k = first; k < first + count; ++k) {
    const Acc *value = v + k * v_stride, *weight = p + k * softmax_tile<Arch, Acc>::rows;
    const auto live = static_cast<simd::lane_bits>(lanes[k] >> (Edge * P::size));
    P edge = P::load(weight + Edge * P::size), plain[Plain1 - Plain0 + 1];
    tile::unroll<Plain1 - Plain0>([&](auto x)
                                      FOVEA_INLINE_LAMBDA { plain[x] = P::load(weight + (Plain0 + x) * P::size); });
    tile::unroll<M>([&](auto i) FOVEA_INLINE_LAMBDA {
      const P y(value[i]);
      acc[i][Edge] = simd::fma_where(live, edge, y, acc[i][Edge]);
      tile::unroll<Plain1 - Plain0>(
          [&](auto x) FOVEA_INLINE_LAMBDA { acc[i][Plain0 + x] = simd::fma(y, plain[x], acc[i][Plain0 + x]); });
    });
  }
}

/// O^T[columns] = O^T * alpha + V^T P over the panels of a block; NV of the tile's vectors are in use. No alpha: O is not read.
template <class Arch, class Acc, int M, int NV>
FOVEA_NOINLINE void value_panels(const panel* list, isize panels, const Acc* v, isize v_stride, const Acc* p,
                                 const std::uint64_t* lanes, const Acc* alpha, Acc* o, paced_requests& ahead) noexcept {
  using P = simd::pack<Acc, Arch>;
  constexpr isize ld = softmax_tile<Arch, Acc>::rows;
  constexpr std::uint64_t whole = ~std::uint64_t{0} >> (64 - P::size);
  P acc[M][NV];
  tile::unroll<NV>([&](auto x) FOVEA_INLINE_LAMBDA {
    const P a = alpha != nullptr ? P::load(alpha + x * P::size) : P(Acc(0));
    tile::unroll<M>([&](auto i) FOVEA_INLINE_LAMBDA {
      acc[i][x] = alpha != nullptr ? P::load(o + i * ld + x * P::size) * a : P(Acc(0));
    });
  });
  for (isize n = 0; n < panels; ++n) {
    const isize first = list[n].first, count = list[n].count;
    if (list[n].kind == seen::whole) {
      const bool few = NV < softmax_tile<Arch, Acc>::NR && ahead.any();
      for (isize k = first, step = 0; k < first + count; k += step) {
        const isize left = first + count - k;
        step = few && left > value_step ? value_step : left;
        if (few) ahead.ask();
        tile::accumulate<Arch, Acc, M, NV>(step, v + k * v_stride, 1, v_stride, p + k * ld, ld, acc);
      }
      continue;
    }
    constexpr bool full = NV == softmax_tile<Arch, Acc>::NR;  // fewer vectors are rare: the general loop serves them
    tile::unroll<full ? NV : 0>([&](auto edge) FOVEA_INLINE_LAMBDA {
      if (list[n].same(seen::rising, edge))
        edge_values<Arch, Acc, M, NV, edge, edge + 1, NV>(first, count, v, v_stride, p, lanes, acc);
      else if (list[n].same(seen::falling, edge))
        edge_values<Arch, Acc, M, NV, edge, 0, edge>(first, count, v, v_stride, p, lanes, acc);
    });
    if (full && list[n].kind != seen::ragged) continue;
    for (isize k = first; full && k < first + count; ++k) {  // ragged: a masked product is as fast as a plain one
      const Acc *value = v + k * v_stride, *weight = p + k * ld;
      P w[NV];
      tile::unroll<NV>([&](auto x) FOVEA_INLINE_LAMBDA { w[x] = P::load(weight + x * P::size); });
      tile::unroll<M>([&](auto i) FOVEA_INLINE_LAMBDA {
        const P y(value[i]);
        tile::unroll<NV>([&](auto x) FOVEA_INLINE_LAMBDA {
          const auto live = static_cast<simd::lane_bits>(lanes[k] >> (x * P::size));
          acc[i][x] = simd::fma_where(live, w[x], y, acc[i][x]);
        });
      });
    }
    for (isize k = first; !full && k < first + count; ++k) {
      const Acc* value = v + k * v_stride;
      tile::unroll<NV>([&](auto x) FOVEA_INLINE_LAMBDA {
        const std::uint64_t live = (lanes[k] >> (x * P::size)) & whole;
        if (live == 0) return;
        const P w = P::load(p + k * ld + x * P::size);
        tile::unroll<M>([&](auto i) FOVEA_INLINE_LAMBDA {
          acc[i][x] = simd::fma_where(static_cast<simd::lane_bits>(live), w, P(value[i]), acc[i][x]);
        });
      });
    }
  }
  tile::unroll<M>([&](auto i) FOVEA_INLINE_LAMBDA {
    tile::unroll<NV>([&](auto x) FOVEA_INLINE_LAMBDA { acc[i][x].store(o + i * ld + x * P::size); });
  });
}

/// s = visible ? s : -inf for vector x of keys [first, last); the maximum over what is left goes into `top`.
template <class Arch, class Acc>
FOVEA_NOINLINE void mask_vector(isize first, isize last, isize x, const std::uint64_t* lanes, Acc* s,
                                Acc* top) noexcept {
  using P = simd::pack<Acc, Arch>;
  constexpr isize ld = softmax_tile<Arch, Acc>::rows;
  const P none(-std::numeric_limits<Acc>::infinity());
  P m = P::load(top + x * P::size);
  Acc* at = s + first * ld + x * P::size;
  for (isize k = first; k < last; ++k, at += ld) {
    const P y = simd::select(static_cast<simd::lane_bits>(lanes[k] >> (x * P::size)), P::load(at), none);
    y.store(at);
    m = simd::max(m, y);
  }
  m.store(top + x * P::size);
}

/// S of one vector of the tile becomes P = power(S); returns l, which was multiplied by alpha, plus the sum.
template <class Arch, class Acc, class Power>
FOVEA_INLINE simd::pack<Acc, Arch> raise_vector(const panel* list, isize panels, int x, Acc* s, const Power& power,
                                                simd::pack<Acc, Arch> sum) noexcept {
  using P = simd::pack<Acc, Arch>;
  constexpr isize ld = softmax_tile<Arch, Acc>::rows;
  P other(Acc(0));
  for (isize n = 0; n < panels; ++n) {
    if (list[n].leaves_out(x)) continue;  // nobody reads it
    // Even keys of the block go to one sum and odd keys to the other, so that how a run is cut, which other rows of the tile may
    // have decided, does not change the order of a row's additions.
    isize k = list[n].first;
    const isize last = k + list[n].count;
    Acc* at = s + k * ld + x * P::size;
    const auto one = [&](P& to) FOVEA_INLINE_LAMBDA {
      const P p = power(P::load(at));
      p.store(at);
      to = to + p;
      ++k, at += ld;
    };
    if (k % 2 != 0) one(other);
    for (; k + 4 <= last; k += 4, at += 4 * ld) {
      P p[4];
      tile::unroll<4>([&](auto y) FOVEA_INLINE_LAMBDA { p[y] = power(P::load(at + y * ld)); });
      tile::unroll<4>([&](auto y) FOVEA_INLINE_LAMBDA { p[y].store(at + y * ld); });
      sum = sum + p[0], other = other + p[1];
      sum = sum + p[2], other = other + p[3];
    }
    while (k < last) {
      one(sum);
      if (k < last) one(other);
    }
  }
  return sum + other;
}

/// P = 2^(S - m) in place, and the new (m, l); alpha is what the old O has to be multiplied by. NV of the tile's vectors are in use.
template <class Arch, class Acc, int NV>
FOVEA_NOINLINE void exponentials(const panel* list, isize panels, Acc* s, const Acc* top, Acc* m, Acc* l,
                                 Acc* alpha) noexcept {
  using P = simd::pack<Acc, Arch>;
  using power = simd::exp2_shifted<Acc, Arch>;
  for (int x = 0; x < NV; ++x) {
    const P old = P::load(m + x * P::size), next = simd::max(old, power::shift_for(P::load(top + x * P::size)));
    // Nothing visible yet, or NaN: 0.
    const P shift = simd::select_greater(next, P(static_cast<Acc>(-3e38)), next, P(Acc(0)));
    const P a = simd::exp2(old - shift), scaled = P::load(l + x * P::size) * a;
    next.store(m + x * P::size);
    a.store(alpha + x * P::size);
    P sum;
    if (power::near(shift))
      sum = raise_vector<Arch, Acc>(list, panels, x, s, power(shift), scaled);
    else if constexpr (std::is_constructible_v<typename power::far_form, P>)
      sum = raise_vector<Arch, Acc>(list, panels, x, s, typename power::far_form(shift), scaled);
    sum.store(l + x * P::size);
  }
}

}  // namespace detail

}  // namespace kernel
}  // namespace FOVEA_ABI
}  // namespace fovea
