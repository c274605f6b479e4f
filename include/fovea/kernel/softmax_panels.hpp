// SPDX-License-Identifier: MIT
#pragma once
/// @file  The four inner loops of the online softmax, each over panels of keys of one block and a tile of queries in the lanes.
///
///   score_panels   S = K Q^T for panels of up to MR keys, and the running maximum
///   mask_panel     S = visible ? S : -inf, and the maximum of what is left
///   exponentials   P = 2^(S - m) in place, the new (m, l), and the factor of the old O
///   value_panels   O^T = O^T 2^(m - m') + V^T P
///
/// Contract   S [keys][NR * W]; lanes[k] bit l: query l sees key k of the block. A masked panel takes masked products, so that NaN
///            or infinity in a value reaches only the rows that see its key.

#include <limits>

#include <fovea/simd/exp.hpp>
#include <fovea/simd/reduce.hpp>
#include <fovea/tile/gemm.hpp>

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

/// Rows that are asked for while others are worked on: where reading them would take longer than the work. Null: nothing.
template <class Acc>
struct rows_ahead {
  const Acc* rows = nullptr;
  isize stride = 0, width = 0, count = 0;
  static constexpr isize line = 64 / static_cast<isize>(sizeof(Acc));
  /// Line `x` (of 64 bytes) of row k.
  FOVEA_INLINE void ask(isize k, isize x) const {
    if (k < count && x * line < width) simd::prefetch(rows + k * stride + x * line, 64);
  }
};

/// S = K Q^T for `panels` panels of M keys and NV vectors of queries; folds the maximum into `top` [NV vectors].
template <class Arch, class Acc, int M, int NV>
FOVEA_NOINLINE void score_panels(isize panels, isize d, const Acc* k, isize k_stride, const Acc* qt, isize ld, Acc* s,
                                 Acc* top, const rows_ahead<Acc>& ahead = {}) noexcept {
  using P = simd::pack<Acc, Arch>;
  P most[NV];
  isize row[M];  // kept in registers: left alone, compilers work the addresses out again at every step
  tile::unroll<NV>([&](auto v) FOVEA_INLINE_LAMBDA { most[v] = P::load(top + v * P::size); });
  tile::unroll<M>([&](auto i) FOVEA_INLINE_LAMBDA {
    row[i] = i * k_stride;
    simd::keep_in_register(row[i]);
  });
  for (isize n = 0; n < panels; ++n, k += M * k_stride, s += M * ld) {
    P acc[M][NV];
    tile::unroll<M>([&](auto i) FOVEA_INLINE_LAMBDA {
      tile::unroll<NV>([&](auto v) FOVEA_INLINE_LAMBDA { acc[i][v] = P(Acc(0)); });
    });
    const Acc *a = k, *b = qt;
    // Few rows of queries: reading the keys and values may take longer than the products.
    const bool few = NV < softmax_tile<Arch, Acc>::NR && ahead.rows != nullptr;
    for (isize c = 0; c < d;) {
      isize last = d;
      if (few) {
        for (isize i = 0; i < M; ++i) ahead.ask(n * M + i, c / ahead.line);
        last = d - c < ahead.line ? d : c + ahead.line;
      }
      for (; c < last; ++c, ++a, b += ld) {
        P q[NV];
        tile::unroll<NV>([&](auto v) FOVEA_INLINE_LAMBDA { q[v] = P::load(b + v * P::size); });
        tile::unroll<M>([&](auto i) FOVEA_INLINE_LAMBDA {
          const P x(a[row[i]]);
          tile::unroll<NV>([&](auto v) FOVEA_INLINE_LAMBDA { acc[i][v] = simd::fma(x, q[v], acc[i][v]); });
        });
      }
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
    tile::unroll<M>([&](auto i) FOVEA_INLINE_LAMBDA {
      const P y(value[i]);
      acc[i][Edge] = simd::fma_where(live, P::load(weight + Edge * P::size), y, acc[i][Edge]);
      tile::unroll<Plain1 - Plain0>([&](auto x) FOVEA_INLINE_LAMBDA {
        acc[i][Plain0 + x] = simd::fma(y, P::load(weight + (Plain0 + x) * P::size), acc[i][Plain0 + x]);
      });
    });
  }
}

/// O^T[columns] = O^T * alpha + V^T P over the panels of a block; NV of the tile's vectors are in use.
template <class Arch, class Acc, int M, int NV>
FOVEA_NOINLINE void value_panels(const panel* list, isize panels, const Acc* v, isize v_stride, const Acc* p,
                                 const std::uint64_t* lanes, const Acc* alpha, Acc* o, isize group = 0,
                                 const rows_ahead<Acc>& ahead = {}) noexcept {
  using P = simd::pack<Acc, Arch>;
  constexpr isize ld = softmax_tile<Arch, Acc>::rows;
  constexpr std::uint64_t whole = ~std::uint64_t{0} >> (64 - P::size);
  P acc[M][NV];
  tile::unroll<NV>([&](auto x) FOVEA_INLINE_LAMBDA {
    const P a = P::load(alpha + x * P::size);
    tile::unroll<M>([&](auto i) FOVEA_INLINE_LAMBDA { acc[i][x] = P::load(o + i * ld + x * P::size) * a; });
  });
  for (isize n = 0; n < panels; ++n) {
    const isize first = list[n].first, count = list[n].count;
    if (list[n].kind == seen::whole) {
      const bool few = NV < softmax_tile<Arch, Acc>::NR && ahead.rows != nullptr;
      for (isize k = first, step = 0; k < first + count; k += step) {
        const isize left = first + count - k;
        step = few && left > 8 ? 8 : left;
        for (isize y = k; few && y < k + step; ++y) ahead.ask(y, group);
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
    for (isize k = first; k < first + count; ++k) {
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

/// s = visible ? s : -inf for a partly visible panel; the maximum over what is left goes into `top`.
template <class Arch, class Acc>
FOVEA_NOINLINE void mask_panel(isize first, isize last, const std::uint64_t* lanes, Acc* s, Acc* top) noexcept {
  using P = simd::pack<Acc, Arch>;
  constexpr int NR = softmax_tile<Arch, Acc>::NR;
  const P none(-std::numeric_limits<Acc>::infinity());
  tile::unroll<NR>([&](auto x) FOVEA_INLINE_LAMBDA {
    P m = P::load(top + x * P::size);
    for (isize k = first; k < last; ++k) {
      Acc* at = s + k * NR * P::size + x * P::size;
      const P y = simd::select(static_cast<simd::lane_bits>(lanes[k] >> (x * P::size)), P::load(at), none);
      y.store(at);
      m = simd::max(m, y);
    }
    m.store(top + x * P::size);
  });
}

/// P = 2^(S - m) in place, and the new (m, l); alpha is what the old O has to be multiplied by. NV of the tile's vectors are in use.
template <class Arch, class Acc, int NV>
FOVEA_NOINLINE void exponentials(const panel* list, isize panels, Acc* s, const Acc* top, Acc* m, Acc* l,
                                 Acc* alpha) noexcept {
  using P = simd::pack<Acc, Arch>;
  constexpr isize ld = softmax_tile<Arch, Acc>::rows;
  tile::unroll<NV>([&](auto x) FOVEA_INLINE_LAMBDA {
    const P old = P::load(m + x * P::size), next = simd::max(old, P::load(top + x * P::size));
    // Nothing visible yet, or NaN: 0.
    const P shift = simd::select_greater(next, P(static_cast<Acc>(-3e38)), next, P(Acc(0)));
    const P a = simd::exp2(old - shift);
    next.store(m + x * P::size);
    a.store(alpha + x * P::size);
    P sum = P::load(l + x * P::size) * a, other(Acc(0));
    for (isize n = 0; n < panels; ++n) {
      if (list[n].leaves_out(x)) continue;  // nobody reads it
      // Even keys of the block go to one sum and odd keys to the other, so that how a run is cut, which other rows of the tile may
      // have decided, does not change the order of a row's additions.
      isize k = list[n].first;
      const isize last = k + list[n].count;
      Acc* at = s + k * ld + x * P::size;
      const auto one = [&](P& to) FOVEA_INLINE_LAMBDA {
        const P p = simd::exp2(P::load(at) - shift);
        p.store(at);
        to = to + p;
        ++k, at += ld;
      };
      if (k % 2 != 0) one(other);
      for (; k + 4 <= last; k += 4, at += 4 * ld) {
        P p[4];
        tile::unroll<4>([&](auto y) FOVEA_INLINE_LAMBDA { p[y] = simd::exp2(P::load(at + y * ld) - shift); });
        tile::unroll<4>([&](auto y) FOVEA_INLINE_LAMBDA { p[y].store(at + y * ld); });
        sum = sum + p[0], other = other + p[1];
        sum = sum + p[2], other = other + p[3];
      }
      while (k < last) {
        one(sum);
        if (k < last) one(other);
      }
    }
    (sum + other).store(l + x * P::size);
  });
}

}  // namespace detail

}  // namespace kernel
}  // namespace FOVEA_ABI
}  // namespace fovea
