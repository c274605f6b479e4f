// SPDX-License-Identifier: MIT
#pragma once
/// @file  The inner loops of attention of a few query rows to keys that only they have chosen: one narrow tile, short runs of keys.
///
///   sparse_scores         S = K Q^T + bias for a panel of M neighbouring keys, and the running maximum
///   sparse_exponentials   P = 2^(S - m) in place, the new (m, l), and the factor of the old O
///   sparse_values         O^T = O^T 2^(m - m') + V^T P over runs of keys
///
/// The tile is one vector wide with AVX-512 (16 rows, 16 keys or columns: 17 loads feed 16 products): as narrow as a query block, so
/// that no work is masked, and each key is read once for the rows that chose it. Query blocks of 32 rows and more take two vectors
/// (8 keys or columns: 10 loads), as other architectures always do. So few rows use a key too briefly to wait for it: each step asks
/// for one line of what comes next (137 -> 151 and 137 -> 172 GFLOP/s for scores and values, blocks of 16 in L2).
///
/// Contract   S [keys][rows]; lanes[k] bit l: row l sees key k. Runs that are not seen whole take masked products, so that NaN or
///            infinity in a value reaches only the rows that see its key.

#include <limits>

#include <fovea/simd/exp.hpp>
#include <fovea/simd/reduce.hpp>
#include <fovea/tile/gemm.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace kernel {
namespace detail {

template <class Arch, class Acc>
struct sparse_tile {
  static constexpr isize W = simd::pack<Acc, Arch>::size;
  static constexpr int wide = tile::tile_shape<Arch, Acc>::NR, narrow = W == 16 ? 1 : wide;  // vectors of query rows
  static constexpr int MR(int vectors) { return vectors == 1 ? 16 : tile::tile_shape<Arch, Acc>::MR; }
  static constexpr isize rows = narrow * W, wide_rows = wide * W;
  static constexpr isize keys = 128;  // scores that are kept: 8 or 16 KB
  static constexpr isize line = 64 / static_cast<isize>(sizeof(Acc));
};

/// Keys of one run: slots [slot, slot + count) of S, values from `v` on.
template <class Acc>
struct sparse_run {
  const Acc* v;
  std::int16_t slot, count;
  bool masked;
};

/// Rows whose lines are asked into L2 one by one, while others are worked on. A burst would fill the core's line buffers and stop it.
struct line_feed {
  const std::byte *at = nullptr, *end = nullptr;  // of a row
  isize width = 0, pitch = 0, rows = 0;           // bytes, bytes, rows that are left
  isize every = 1;                                // steps for each line, a power of two
  FOVEA_INLINE void ask(isize step) {
    if (rows == 0 || (step & (every - 1)) != 0) return;
    simd::prefetch(at, 64);
    at += 64;
    if (at >= end) at = end + pitch - width, end += pitch, --rows;
  }
};

/// Rows k, k + stride, ... of a panel of M keys, without a register for each.
template <class Acc>
struct panel_rows {
  const char *low, *high;
  isize one, three, five, seven;
  FOVEA_INLINE panel_rows(const Acc* k, isize stride)
      : low(reinterpret_cast<const char*>(k)), one(stride * static_cast<isize>(sizeof(Acc))) {
    high = low + 8 * one, three = 3 * one, five = 5 * one, seven = 7 * one;
    for (isize* x : {&one, &three, &five, &seven}) simd::keep_in_register(*x);
  }
  template <int I>
  FOVEA_INLINE Acc at(tile::constant<I>) const {
    constexpr int r = I % 8;
    const isize step = r == 0   ? 0
                       : r == 1 ? one
                       : r == 2 ? 2 * one
                       : r == 3 ? three
                       : r == 4 ? 4 * one
                       : r == 5 ? five
                       : r == 6 ? 2 * three
                                : seven;
    return *reinterpret_cast<const Acc*>((I < 8 ? low : high) + step);
  }
  FOVEA_INLINE void next() { low += sizeof(Acc), high += sizeof(Acc); }
};

/// S of M keys from their biases [M] on, into s [M][NR vectors]; folds the maximum into `top`. Rows next, next + stride, ... are asked
/// into L1 meanwhile.
template <class Arch, class Acc, int M, int NR>
FOVEA_NOINLINE void sparse_scores(isize d, const Acc* k, isize stride, const Acc* qt, const Acc* bias, Acc* s, Acc* top,
                                  const Acc* next) noexcept {
  using T = sparse_tile<Arch, Acc>;
  using P = simd::pack<Acc, Arch>;
  constexpr isize rows = NR * P::size;
  P acc[M][NR];
  tile::unroll<M>([&](auto i) FOVEA_INLINE_LAMBDA {
    tile::unroll<NR>([&](auto v) FOVEA_INLINE_LAMBDA { acc[i][v] = P(bias[i]); });
  });
  panel_rows<Acc> a(k, stride);
  const auto step = [&]() FOVEA_INLINE_LAMBDA {
    P q[NR];
    tile::unroll<NR>([&](auto v) FOVEA_INLINE_LAMBDA { q[v] = P::load(qt + v * P::size); });
    tile::unroll<M>([&](auto i) FOVEA_INLINE_LAMBDA {
      const P x(a.at(i));
      tile::unroll<NR>([&](auto v) FOVEA_INLINE_LAMBDA { acc[i][v] = simd::fma(x, q[v], acc[i][v]); });
    });
    a.next(), qt += rows;
  };
  for (isize c = 0; c < d; next += T::line) {
    const isize last = c + T::line < d ? c + T::line : d, asked = c + M < last ? c + M : last;
    for (const Acc* ask = next; c < asked; ++c, ask += stride) simd::prefetch_line(ask), step();
    for (; c < last; ++c) step();
  }
  tile::unroll<NR>([&](auto v) FOVEA_INLINE_LAMBDA {
    P most = P::load(top + v * P::size);
    tile::unroll<M>([&](auto i) FOVEA_INLINE_LAMBDA {
      acc[i][v].store(s + i * rows + v * P::size);
      most = simd::max(most, acc[i][v]);
    });
    most.store(top + v * P::size);
  });
}

/// s = visible ? s : -inf for keys [0, count); folds the maximum of what is left into `top`. No lanes: all is visible.
template <class Arch, class Acc>
FOVEA_NOINLINE void sparse_mask(isize rows, isize count, const std::uint64_t* lanes, Acc* s, Acc* top) noexcept {
  using P = simd::pack<Acc, Arch>;
  const P none(-std::numeric_limits<Acc>::infinity());
  for (isize x = 0; x < rows; x += P::size) {
    P most = P::load(top + x);
    for (isize j = 0; j < count; ++j) {
      P y = P::load(s + j * rows + x);
      if (lanes != nullptr) y = simd::select(static_cast<simd::lane_bits>(lanes[j] >> x), y, none);
      y.store(s + j * rows + x);
      most = simd::max(most, y);
    }
    most.store(top + x);
  }
}

/// Slots [0, count) of S. alpha [rows]: what the old O has to be multiplied by.
template <class Arch, class Acc>
FOVEA_NOINLINE void sparse_exponentials(isize rows, isize count, Acc* s, const Acc* top, Acc* m, Acc* l,
                                        Acc* alpha) noexcept {
  using P = simd::pack<Acc, Arch>;
  for (isize x = 0; x < rows; x += P::size) {
    const P old = P::load(m + x), next = simd::max(old, P::load(top + x));
    // Nothing visible yet, or NaN: 0.
    const P shift = simd::select_greater(next, P(static_cast<Acc>(-3e38)), next, P(Acc(0)));
    const P a = simd::exp2(old - shift);
    next.store(m + x), a.store(alpha + x);
    P sum[2] = {P::load(l + x) * a, P(Acc(0))};  // even slots, odd slots
    Acc* at = s + x;
    isize k = 0;
    for (; k + 4 <= count; k += 4, at += 4 * rows) {
      P p[4];
      tile::unroll<4>([&](auto y) FOVEA_INLINE_LAMBDA { p[y] = simd::exp2(P::load(at + y * rows) - shift); });
      tile::unroll<4>([&](auto y) FOVEA_INLINE_LAMBDA {
        p[y].store(at + y * rows);
        sum[y % 2] = sum[y % 2] + p[y];
      });
    }
    for (; k < count; ++k, at += rows) {
      const P p = simd::exp2(P::load(at) - shift);
      p.store(at);
      sum[k % 2] = sum[k % 2] + p;
    }
    (sum[0] + sum[1]).store(l + x);
  }
}

/// M columns of O^T from `column` on; o [M][NR vectors]. lanes [slots]. The values that come `ahead` keys later are asked into L1:
/// not a whole run of keys, for rows of 512 bytes come back to the same sets after 96 lines.
template <class Arch, class Acc, int M, int NR>
FOVEA_NOINLINE void sparse_values(const sparse_run<Acc>* runs, isize count, isize column, isize stride, const Acc* p,
                                  const std::uint64_t* lanes, const Acc* alpha, Acc* o, line_feed& feed) noexcept {
  using P = simd::pack<Acc, Arch>;
  constexpr isize rows = NR * P::size, ahead = 16;
  line_feed far = feed;
  P acc[M][NR];
  tile::unroll<NR>([&](auto x) FOVEA_INLINE_LAMBDA {
    const P a = P::load(alpha + x * P::size);
    tile::unroll<M>([&](auto i) FOVEA_INLINE_LAMBDA { acc[i][x] = P::load(o + i * rows + x * P::size) * a; });
  });
  for (isize n = 0; n < count; ++n) {
    const Acc *value = runs[n].v + column, *weight = p + runs[n].slot * rows;
    const isize keys = runs[n].count;
    if (!runs[n].masked) {
      const isize last =
          keys > ahead ? keys - ahead : 0;  // from here on, what comes is the next run, or the next columns
      const Acc* ask = value + ahead * stride;
      for (isize k = 0; k < keys; ++k, value += stride, weight += rows, ask += stride) {
        if (k == last) ask = n + 1 < count ? runs[n + 1].v + column : runs[0].v + column + M;
        simd::prefetch_line(ask);
        far.ask(k);
        tile::accumulate<Arch, Acc, M, NR>(1, value, 1, stride, weight, rows, acc);
      }
      continue;
    }
    for (isize k = 0; k < keys; ++k, value += stride, weight += rows)
      tile::unroll<NR>([&](auto x) FOVEA_INLINE_LAMBDA {
        const auto live = static_cast<simd::lane_bits>(lanes[runs[n].slot + k] >> (x * P::size));
        const P w = P::load(weight + x * P::size);
        tile::unroll<M>([&](auto i)
                            FOVEA_INLINE_LAMBDA { acc[i][x] = simd::fma_where(live, w, P(value[i]), acc[i][x]); });
      });
  }
  feed = far;
  tile::unroll<M>([&](auto i) FOVEA_INLINE_LAMBDA {
    tile::unroll<NR>([&](auto x) FOVEA_INLINE_LAMBDA { acc[i][x].store(o + i * rows + x * P::size); });
  });
}

/// f(constant<M>, first) for pieces of [0, count): as many of MR as fit, then of the largest of 8, 4, 2, 1 that does.
template <int MR, class F>
FOVEA_INLINE void in_panels(isize count, F&& f) {
  isize at = 0;
  for (; at + MR <= count; at += MR) f(tile::constant<MR>{}, at);
  const auto rest = [&](auto m) FOVEA_INLINE_LAMBDA {
    if constexpr (m < MR)
      for (; at + m <= count; at += m) f(m, at);
  };
  rest(tile::constant<8>{}), rest(tile::constant<4>{}), rest(tile::constant<2>{}), rest(tile::constant<1>{});
}

}  // namespace detail
}  // namespace kernel
}  // namespace FOVEA_ABI
}  // namespace fovea
