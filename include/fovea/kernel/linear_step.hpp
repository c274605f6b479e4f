// SPDX-License-Identifier: MIT
#pragma once
/// @file  One token against one column panel of a state: reads every row of the state once (delta rules: twice) and writes it once.
///
///   update and read   S <- keep S + k x^T,   y_h = q_h S      for the query heads h of the group
///
/// Contract   rows of the panel are panel_width<Acc> wide; keep has step 0 (one number) or 1 (one a channel).
/// Cost       bound by the bytes of the state. Source docs/mechanisms/linear.md.

#include <fovea/kernel/linear_sweep.hpp>
#include <fovea/simd/reduce.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace kernel {

/// Rows of a panel that are asked for before they are needed, 8 KB: a state out of memory comes a fifth sooner.
inline constexpr isize step_ahead = 64;

template <class Arch, class Acc>
struct step_shape {
  static constexpr int all = static_cast<int>(panel_width<Acc> / simd::pack<Acc, Arch>::size);
  static constexpr int NR = all < 4 ? all : 4;  ///< vectors of columns at a time
  static constexpr int heads = NR * 4 + NR + 6 <= Arch::registers ? 4 : NR <= 2 ? 2 : 1;  ///< query heads at a time
};

namespace detail {

template <class Arch, class Acc, int Heads, bool Update>
FOVEA_NOINLINE void step_columns(isize r, Acc* S, const Acc* keep, isize keep_step, const Acc* k, const Acc* x,
                                 const Acc* q, isize q_stride, Acc* y, isize y_stride) noexcept {
  using P = simd::pack<Acc, Arch>;
  constexpr int NR = step_shape<Arch, Acc>::NR, H = Heads > 0 ? Heads : 1;
  constexpr int ways =
      Heads == 1 && 2 * NR * 2 + 4 <= Arch::registers ? 2 : 1;  // two chains hide the latency of the additions
  P xs[NR], acc[ways][H][NR];
  tile::unroll<NR>([&](auto n) FOVEA_INLINE_LAMBDA {
    if constexpr (Update) xs[n] = P::load(x + n * P::size);
    tile::unroll<ways * H>([&](auto h) FOVEA_INLINE_LAMBDA { acc[h / H][h % H][n] = P(Acc(0)); });
  });
  const auto row = [&](isize e, auto way) FOVEA_INLINE_LAMBDA {
    Acc* at = S + e * panel_width<Acc>;
    if constexpr (NR == step_shape<Arch, Acc>::all) simd::prefetch(at + step_ahead * panel_width<Acc>, 128);
    P s[NR];
    tile::unroll<NR>([&](auto n) FOVEA_INLINE_LAMBDA { s[n] = P::load(at + n * P::size); });
    if constexpr (Update) {
      const P c(keep[e * keep_step]), f(k[e]);
      tile::unroll<NR>([&](auto n) FOVEA_INLINE_LAMBDA {
        s[n] = simd::fma(f, xs[n], c * s[n]);
        s[n].store(at + n * P::size);
      });
    }
    if constexpr (Heads > 0)
      tile::unroll<H>([&](auto h) FOVEA_INLINE_LAMBDA {
        const P f(q[h * q_stride + e]);
        tile::unroll<NR>([&](auto n) FOVEA_INLINE_LAMBDA { acc[way][h][n] = simd::fma(f, s[n], acc[way][h][n]); });
      });
  };
  isize e = 0;
  for (; e + ways <= r; e += ways) tile::unroll<ways>([&](auto way) FOVEA_INLINE_LAMBDA { row(e + way, way); });
  for (; e < r; ++e) row(e, tile::constant<0>{});
  if constexpr (Heads > 0)
    tile::unroll<H>([&](auto h) FOVEA_INLINE_LAMBDA {
      tile::unroll<NR>([&](auto n) FOVEA_INLINE_LAMBDA {
        P sum = acc[0][h][n];
        if constexpr (ways == 2) sum = sum + acc[1][h][n];
        sum.store(y + h * y_stride + n * P::size);
      });
    });
}

}  // namespace detail

/// The panel is updated (k null: not) and then read by `heads` rows of q. x [panel], y [heads][y_stride].
template <class Arch, class Acc>
void step_panel(isize r, Acc* S, const Acc* keep, isize keep_step, const Acc* k, const Acc* x, isize heads,
                const Acc* q, isize q_stride, Acc* y, isize y_stride) noexcept {
  using P = simd::pack<Acc, Arch>;
  constexpr int NR = step_shape<Arch, Acc>::NR, most = step_shape<Arch, Acc>::heads;
  for (isize c = 0; c < panel_width<Acc>; c += NR * P::size) {
    isize h = 0;
    bool update = k != nullptr;
    do {
      const isize count = heads - h < most ? heads - h : most;
      if (count == 0) {
        detail::step_columns<Arch, Acc, 0, true>(r, S + c, keep, keep_step, k, x + c, q, q_stride, y, y_stride);
      } else {
        tile::with_constant<most>(count, [&](auto n) {
          const Acc* from = q + h * q_stride;
          Acc* to = y + h * y_stride + c;
          if (update)
            detail::step_columns<Arch, Acc, n, true>(r, S + c, keep, keep_step, k, x + c, from, q_stride, to, y_stride);
          else
            detail::step_columns<Arch, Acc, n, false>(r, S + c, keep, keep_step, k, x, from, q_stride, to, y_stride);
        });
      }
      update = false;
      h += count;
    } while (h < heads);
  }
}

}  // namespace kernel
}  // namespace FOVEA_ABI
}  // namespace fovea
