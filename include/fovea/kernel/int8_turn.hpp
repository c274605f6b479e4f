// SPDX-License-Identifier: MIT
#pragma once
/// @file  Rows of queries and keys on their way to 8 bits, W at a time, a row to a lane: turned, rotated, measured, rounded.
///
///   turn_rows     t [n][W] = columns of W rows, rotated by H_b / sqrt(b) as simd::rotate_row does, and their extents
///   round_turned  [n / 4][W][4] bytes of t times a factor a row: s8, or u8 with 128 added
///
/// Contract   numbers are those of simd::rotate_row; ties go to the even integer. A row with a number that is not finite, or too long
///            to be measured, counts as zeros and its length as infinite.
/// Cost       across lanes a rotation needs no shuffles and a row's maximum no reduction.

#include <cmath>
#include <limits>

#include <fovea/kernel/int8_recipe.hpp>
#include <fovea/simd/reduce.hpp>
#include <fovea/simd/rotate_row.hpp>
#include <fovea/simd/word_moves.hpp>
#include <fovea/tile/unroll.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace kernel {
namespace detail {

/// What rounding to 8 bits wants to know of W rows: largest magnitude, squared length
/// (infinite: see above), and what the numbers in t are multiplied by.
template <class Arch>
struct row_extents {
  static constexpr isize W = simd::words<Arch>::size;
  alignas(64) float most[W], length[W], factor[W];
};

/// Sums and differences of N registers at distances 1, 2, ... < N, in the order of simd::rotate_row.
template <int N, class P>
FOVEA_INLINE void add_and_subtract(P* y) {
  const auto level = [&](auto apart) FOVEA_INLINE_LAMBDA {
    tile::unroll<N>([&](auto i) FOVEA_INLINE_LAMBDA {
      if constexpr (apart < N && (i & apart) == 0) {
        const P a = y[i], b = y[i + apart];
        y[i] = a + b, y[i + apart] = a - b;
      }
    });
  };
  level(tile::constant<1>{}), level(tile::constant<2>{}), level(tile::constant<4>{}), level(tile::constant<8>{});
}

/// Largest magnitudes and sums of squares of the lanes.
template <class Arch>
struct lane_extents {
  simd::pack<float, Arch> most[simd::float_packs<Arch>], square[simd::float_packs<Arch>];
};

/// Columns c, c + apart, ... of each stretch of N apart columns: N of them in registers. Last: times `size`, and measured.
template <class Arch, int N, bool Last>
FOVEA_NOINLINE void rotate_columns(float* t, isize n, isize apart, float size, lane_extents<Arch>* to) noexcept {
  using P = simd::pack<float, Arch>;
  constexpr isize W = row_extents<Arch>::W;
  constexpr int sums = N < 4 ? N : 4;  // side by side: one would wait for itself
  const P factor(size);
  for (int z = 0; z < simd::float_packs<Arch>; ++z) {
    P most[sums], square[sums];
    tile::unroll<sums>([&](auto i) FOVEA_INLINE_LAMBDA { most[i] = square[i] = P(0.0F); });
    for (isize first = 0; first < n; first += N * apart)
      for (isize c = first; c < first + apart; ++c) {
        float* at = t + c * W + z * P::size;
        P y[N];
        tile::unroll<N>([&](auto i) FOVEA_INLINE_LAMBDA { y[i] = P::load(at + i * apart * W); });
        add_and_subtract<N>(y);
        tile::unroll<N>([&](auto i) FOVEA_INLINE_LAMBDA {
          if constexpr (Last) {
            y[i] = y[i] * factor;
            most[i % sums] = simd::most_magnitude(most[i % sums], y[i]);
            square[i % sums] = simd::fma(y[i], y[i], square[i % sums]);
          }
          y[i].store(at + i * apart * W);
        });
      }
    tile::unroll<sums - 1>([&](auto i) FOVEA_INLINE_LAMBDA {
      most[0] = simd::max(most[0], most[i + 1]), square[0] = square[0] + square[i + 1];
    });
    if (Last) to->most[z] = most[0], to->square[z] = square[0];
  }
}

/// W rows that lie `ld` apart, and where the next W rows begin that will be wanted, as far from `at`; 0: nowhere.
struct rows_apart {
  const float* at;
  isize ld, ahead = 0;
};

/// t [n][W] = their columns; Rotate: W of them together. Lines of the rows ahead are asked for in between.
template <class Arch, bool Rotate>
FOVEA_NOINLINE void turn_columns(rows_apart rows, isize n, float* t) noexcept {
  using P = simd::pack<float, Arch>;
  constexpr isize W = row_extents<Arch>::W;
  const isize ld = rows.ld;
  const float* const part[4] = {rows.at, rows.at + W / 4 * ld, rows.at + W / 2 * ld, rows.at + 3 * W / 4 * ld};
  const auto row = [&](isize l) FOVEA_INLINE_LAMBDA { return part[l / (W / 4)] + l % (W / 4) * ld; };
  for (isize c = 0; c < n; c += W) {
    if constexpr (P::size == W) {
      if (rows.ahead != 0)
        tile::unroll<static_cast<int>(W)>([&](auto l)
                                              FOVEA_INLINE_LAMBDA { simd::prefetch_line(row(l) + rows.ahead + c); });
      P y[W];
      simd::load_turned<float, Arch>([&](isize l) FOVEA_INLINE_LAMBDA { return row(l) + c; }, y);
      if constexpr (Rotate) add_and_subtract<static_cast<int>(W)>(y);
      tile::unroll<static_cast<int>(W)>([&](auto i) FOVEA_INLINE_LAMBDA { y[i].store(t + (c + i) * W); });
    } else {
      for (isize i = 0; i < W; ++i)
        for (isize l = 0; l < W; ++l) t[(c + i) * W + l] = row(l)[c + i];
    }
  }
}

/// n: a multiple of 16.
template <class Arch>
FOVEA_NOINLINE void turn_rows(rows_apart rows, isize n, bool rotate, float* t, row_extents<Arch>& x) noexcept {
  using P = simd::pack<float, Arch>;
  constexpr isize W = row_extents<Arch>::W;
  constexpr int most_columns = Arch::registers >= 32 ? 8 : 4;
  if (rotate)
    turn_columns<Arch, true>(rows, n, t);
  else
    turn_columns<Arch, false>(rows, n, t);
  const isize block = rotate ? simd::rotation_block(n) : 1;
  isize apart = !rotate ? 1 : P::size == W ? W : 1;
  for (; block / apart > most_columns; apart *= most_columns)
    rotate_columns<Arch, most_columns, false>(t, n, apart, 1, nullptr);
  const float size = 1.0F / std::sqrt(static_cast<float>(block));
  lane_extents<Arch> all;
  tile::unroll<4>([&](auto level) FOVEA_INLINE_LAMBDA {
    if constexpr ((1 << level) <= most_columns)
      if (block / apart == 1 << level) rotate_columns<Arch, 1 << level, true>(t, n, apart, size, &all);
  });
  const P zero(0.0F), none(std::numeric_limits<float>::infinity());
  for (int z = 0; z < simd::float_packs<Arch>; ++z) {
    const simd::lane_bits broken = simd::lanes_above(all.square[z], P(std::numeric_limits<float>::max()));
    const P most = simd::select(broken, zero, simd::select_greater(all.most[z], P(1e-30F), all.most[z], zero));
    simd::select(broken, none, all.square[z]).store(x.length + z * P::size), most.store(x.most + z * P::size);
    simd::select_greater(most, zero, P(127.0F) / simd::max(P(1e-30F), most), zero).store(x.factor + z * P::size);
    for (isize c = 0; broken != 0 && c < n; ++c) {
      float* at = t + c * W + z * P::size;
      simd::select(broken, zero, P::load(at)).store(at);
    }
  }
}

/// x times factor, rounded, in the low byte of each 32-bit lane: s8, or u8 with 128 added. The sum with the large number has
/// that integer for its last bits: no conversion.
template <class Arch, bool Unsigned>
FOVEA_INLINE simd::words<Arch> low_bytes(const float* x,
                                         const simd::pack<float, Arch> (&factor)[simd::float_packs<Arch>]) {
  using P = simd::pack<float, Arch>;
  P y[simd::float_packs<Arch>];
  tile::unroll<simd::float_packs<Arch>>([&](auto z) FOVEA_INLINE_LAMBDA {
    y[z] = simd::fma(P::load(x + z * P::size), factor[z], P(int8_magic + (Unsigned ? 128.0F : 0.0F)));
  });
  return simd::bits_of<Arch>(y);
}

/// Bytes of four columns go to `to`, those of the next four `step` bytes behind. Returns the sum of each row's s8 (not for u8).
template <class Arch, bool Unsigned>
FOVEA_NOINLINE simd::words<Arch> round_turned(const float* t, isize n, const row_extents<Arch>& x, std::uint8_t* to,
                                              isize step) noexcept {
  using word = simd::words<Arch>;
  using P = simd::pack<float, Arch>;
  constexpr isize W = word::size;
  word sum = word::splat(0);
  P factor[simd::float_packs<Arch>];
  tile::unroll<simd::float_packs<Arch>>([&](auto z)
                                            FOVEA_INLINE_LAMBDA { factor[z] = P::load(x.factor + z * P::size); });
  for (isize c = 0; c < n; c += 4, to += step) {
    word y[4];
    tile::unroll<4>([&](auto i) FOVEA_INLINE_LAMBDA { y[i] = low_bytes<Arch, Unsigned>(t + (c + i) * W, factor); });
    const word four = simd::join_low_bytes(y);
    four.store(to);
    if constexpr (!Unsigned) sum = simd::dot4(sum, simd::splat_i8<Arch>(1), four);
  }
  return sum;
}

/// [n / 4][W][4] bytes -> W rows of bytes, `ld` apart.
template <class Arch>
FOVEA_INLINE void rows_of_bytes(const std::int8_t* from, isize n, std::int8_t* to, isize ld) noexcept {
  using P = simd::pack<float, Arch>;
  constexpr isize W = simd::words<Arch>::size;
  isize c = 0;
  if constexpr (P::size == W && W > 4)
    for (; c + 4 * W <= n; c += 4 * W) {
      P x[W];
      simd::load_turned<float, Arch>(
          [&](isize l) FOVEA_INLINE_LAMBDA { return reinterpret_cast<const float*>(from + (c + 4 * l) * W); }, x);
      tile::unroll<static_cast<int>(W)>(
          [&](auto l) FOVEA_INLINE_LAMBDA { x[l].store(reinterpret_cast<float*>(to + l * ld + c)); });
    }
  for (; c < n; c += 4)
    for (isize l = 0; l < W; ++l) std::memcpy(to + l * ld + c, from + c * W + 4 * l, 4);
}

}  // namespace detail
}  // namespace kernel
}  // namespace FOVEA_ABI
}  // namespace fovea
