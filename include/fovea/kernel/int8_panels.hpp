// SPDX-License-Identifier: MIT
#pragma once
/// @file  The inner loops of attention in int8, each over groups of four keys of one block and a tile of queries in the lanes.
///
///   int8_scores        S = round(64 (scale k8 . q8 + log2(v scale))), 16 bits, two keys in a register, and the maximum
///   int8_weights       p = u8(255 2^((S - max) / 64)), and what 16 keys each give to the denominator
///   int8_values        O^T = O^T + 2^(block max - m) v8^T p
///   exact_sum          the denominator of some keys in f32, where p is too coarse for it
///
/// Contract   S [keys / 4][2][rows][2]: of four keys the first and third side by side, then the others; p [keys / 4][rows][4]; a score
///            of -32768 is one that is hidden.
///            All integers are the same on every instruction set.

#include <fovea/kernel/int8_rows.hpp>
#include <fovea/simd/word_moves.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace kernel {
namespace detail {

template <class Arch>
struct int8_tile {
  static constexpr bool wide = Arch::registers >= 32;
  static constexpr int NR = wide ? 4 : 2, MR = wide ? 6 : 4;  // vectors of queries; columns of values
  static constexpr isize W = simd::words<Arch>::size, rows = NR * W;
  static_assert(rows <= 64);
};

/// Groups [first, first + count) of four keys each; vectors [v0, v1) of the tile see some of them.
struct int8_run {
  std::int16_t first, count;
  std::int8_t v0, v1;
  bool masked;  // not every row of those vectors sees every key
};

enum class int8_scoring { plain, masked, loose };

/// What int8_scores reads of a block of keys and a tile of queries, from the first vector on.
struct int8_operands {
  const std::int8_t* k;        // [keys][dp]
  const std::int32_t* offset;  // [keys]
  const float *k_scale, *k_shift, *fold;
  const std::uint8_t* q;  // [dp / 4][rows][4]
  const float* q_scale;   // times 64 scale log2(e)
  const std::uint64_t* lanes;
  int shift;  // of the first vector in `lanes`
};

/// Scores of `count` groups from `first` on and NV vectors. Width: dp, or 0 for any. loose: floats into `f` [keys][rows] in octaves, no fold, no maximum.
template <class Arch, int NV, int8_scoring Kind, isize Width = 0>
FOVEA_NOINLINE void int8_scores(const int8_operands& x, isize first, isize count, isize dp, std::int16_t* s,
                                std::int16_t* top, float* f) noexcept {
  using word = simd::words<Arch>;
  using P = simd::pack<float, Arch>;
  constexpr int F = simd::float_packs<Arch>;
  constexpr isize W = word::size, rows = int8_tile<Arch>::rows;
  const std::int32_t* const offset = x.offset;
  const float *const k_scale = x.k_scale, *const k_shift = x.k_shift, *const fold = x.fold, *const q_scale = x.q_scale;
  constexpr int plain = Kind == int8_scoring::loose ? std::bit_cast<std::int32_t>(int8_magic) : 0;
  word most[NV];
  tile::unroll<NV>([&](auto v) FOVEA_INLINE_LAMBDA { most[v] = word::load(top + 2 * W * v); });
  for (isize j = 4 * first; j < 4 * (first + count); j += 4) {
    word acc[4][NV];
    tile::unroll<4>([&](auto i) FOVEA_INLINE_LAMBDA {
      tile::unroll<NV>([&](auto v) FOVEA_INLINE_LAMBDA { acc[i][v] = word::splat(offset[j + i] - plain); });
    });
    const std::int8_t* k[4];
    tile::unroll<4>([&](auto i) FOVEA_INLINE_LAMBDA { k[i] = x.k + (j + i) * dp; });
    const std::uint8_t* q = x.q;
    const auto step = [&](isize c) FOVEA_INLINE_LAMBDA {  // four channels
      word u[NV];
      tile::unroll<NV>([&](auto v) FOVEA_INLINE_LAMBDA { u[v] = word::load(q + c * rows + 4 * W * v); });
      tile::unroll<4>([&](auto i) FOVEA_INLINE_LAMBDA {
        const word y = simd::splat4<Arch>(k[i] + c);
        tile::unroll<NV>([&](auto v) FOVEA_INLINE_LAMBDA {
          acc[i][v] = simd::dot4(acc[i][v], u[v], y);
          simd::keep(acc[i][v]);
        });
      });
    };
    // No branch, where the width is known: the end of a short loop is mispredicted once for each four keys (8 % of the time, d = 64).
    if constexpr (Width > 0) {
      FOVEA_UNROLL
      for (isize c = 0; c < Width; c += 4) step(c);
    } else {
      for (isize c = 0; c < dp; c += 4) step(c);
    }
    float level[4];  // in memory of its own: each product takes it as a broadcast operand
    for (int i = 0; i < 4; ++i) level[i] = fold[j + i] + int8_magic;
    tile::unroll<NV>([&](auto v) FOVEA_INLINE_LAMBDA {
      word rounded[4];
      tile::unroll<4>([&](auto i) FOVEA_INLINE_LAMBDA {
        P y[F];
        tile::unroll<F>([&](auto z) FOVEA_INLINE_LAMBDA {
          const P b = P::load(q_scale + v * W + z * P::size);
          if constexpr (Kind == int8_scoring::loose) {
            const P a = simd::to_float(acc[i][v], z) * P(k_scale[j + i]);
            (a * (b * P(1.0F / int8_grid))).store(f + (j + i) * rows + v * W + z * P::size);
          } else {
            // The sum is the integer of a float near int8_magic, and so is the score: no conversion either way.
            const P a = simd::fma(simd::as_floats(acc[i][v], z), P(k_scale[j + i]), P(k_shift[j + i]));
            y[z] = simd::fma(a, b, P(level[i]));
            if constexpr (Kind == int8_scoring::masked) {
              const auto live = static_cast<simd::lane_bits>(x.lanes[j + i] >> (x.shift + v * W + z * P::size));
              y[z] = simd::select(live, y[z], P(int8_magic - 32768));
            }
          }
        });
        if constexpr (Kind != int8_scoring::loose) rounded[i] = simd::bits_of<Arch>(y);
      });
      if constexpr (Kind != int8_scoring::loose)
        tile::unroll<2>([&](auto h) FOVEA_INLINE_LAMBDA {
          const word pair = simd::join_i16(rounded[h], rounded[h + 2]);
          pair.store(s + (j + 2 * h) * rows + 2 * v * W);
          most[v] = simd::max_i16(most[v], pair);
        });
    });
  }
  tile::unroll<NV>([&](auto v) FOVEA_INLINE_LAMBDA { most[v].store(top + 2 * W * v); });
}

/// Weights of 16 keys for one vector: p, and the sums of p weight that make the denominator.
template <class Arch, int8_recipe R>
FOVEA_INLINE void int8_part_weights(isize first, isize count, const std::int16_t* s, simd::words<Arch> top,
                                    const std::uint8_t* weight, isize lane, std::uint8_t* p, simd::words<Arch>& low,
                                    simd::words<Arch>& high) noexcept {
  using word = simd::words<Arch>;
  constexpr isize rows = int8_tile<Arch>::rows;
  for (isize g = first; g < first + count; ++g) {
    word y[2];
    tile::unroll<2>([&](auto h) FOVEA_INLINE_LAMBDA {
      y[h] = simd::exp2_i16(simd::sub_i16(top, word::load(s + (2 * g + h) * rows * 2)));
      y[h] =
          simd::add_i16(y[h], R.dither ? word::load(int8_dithers<R.keys>.at[g][h][lane]) : simd::splat_i16<Arch>(64));
    });
    const word four = simd::join_u8(y[0], y[1]);
    four.store(p + g * rows * 4);
    low = simd::dot4(low, four, simd::splat4<Arch>(weight + 8 * g));
    high = simd::dot4(high, four, simd::splat4<Arch>(weight + 8 * g + 4));
  }
}

/// Sum of 255 2^((S - top) / 64) / scale over groups of keys, for one vector.
template <class Arch>
FOVEA_NOINLINE void exact_sum(isize first, isize count, const std::int16_t* s, const std::int16_t* top,
                              const float* inverse, float* sum) noexcept {
  constexpr isize rows = int8_tile<Arch>::rows;
  using P = simd::pack<float, Arch>;
  using word = simd::words<Arch>;
  constexpr int F = simd::float_packs<Arch>;
  P all[F];
  tile::unroll<F>([&](auto z) FOVEA_INLINE_LAMBDA { all[z] = P::load(sum + z * P::size); });
  const word most = word::load(top);
  for (isize h = 2 * first; h < 2 * (first + count); ++h) {
    const word d = simd::sub_i16(word::load(s + h * rows * 2), most), both[2] = {simd::low_i16(d), simd::high_i16(d)};
    const float* at = inverse + h / 2 * 4 + h % 2;
    for (isize i = 0; i < 2; ++i)
      tile::unroll<F>([&](auto z) FOVEA_INLINE_LAMBDA {
        // The saturated difference of a hidden score is 2^-512 or less: 0.
        const P p = simd::exp2(simd::to_float(both[i], z) * P(1.0F / int8_grid));
        all[z] = simd::fma(p, P(255.0F * at[2 * i]), all[z]);
      });
  }
  tile::unroll<F>([&](auto z) FOVEA_INLINE_LAMBDA { all[z].store(sum + z * P::size); });
}

/// O^T [columns][rows] += beta v8^T p over runs of groups; v8 from the first column on, `stride` bytes from group to group.
/// Whole: there is one run, of all vectors. Fold: of the recipe; else `channel` holds the scales of the columns.
template <class Arch, int M, int NV, bool Fold, bool Whole>
FOVEA_NOINLINE void int8_values(const int8_run* runs, isize count, const std::int8_t* v, isize stride,
                                const std::uint8_t* p, const float* beta, const float* channel, float* o) noexcept {
  using word = simd::words<Arch>;
  using P = simd::pack<float, Arch>;
  constexpr int F = simd::float_packs<Arch>;
  constexpr isize W = word::size, rows = int8_tile<Arch>::rows;
  word acc[M][NV];
  tile::unroll<M>([&](auto i) FOVEA_INLINE_LAMBDA {
    tile::unroll<NV>([&](auto x) FOVEA_INLINE_LAMBDA { acc[i][x] = word::splat(0); });
  });
  for (isize n = 0; n < (Whole ? 1 : count); ++n) {
    const std::int8_t* value = v + runs[n].first * stride;
    const std::uint8_t* weight = p + runs[n].first * rows * 4;
    if (Whole || (runs[n].v0 == 0 && runs[n].v1 == NV)) {
      for (isize g = runs[n].count; g > 0; --g, value += stride, weight += rows * 4) {
        word u[NV];
        tile::unroll<NV>([&](auto x) FOVEA_INLINE_LAMBDA { u[x] = word::load(weight + 4 * W * x); });
        tile::unroll<M>([&](auto i) FOVEA_INLINE_LAMBDA {
          const word y = simd::splat4<Arch>(value + 4 * i);
          tile::unroll<NV>([&](auto x) FOVEA_INLINE_LAMBDA {
            acc[i][x] = simd::dot4(acc[i][x], u[x], y);
            simd::keep(acc[i][x]);
          });
        });
      }
      continue;
    }
    // Under a diagonal the last vectors see what the first ones do not.
    tile::unroll<Whole ? 0 : NV - 1>([&](auto x) FOVEA_INLINE_LAMBDA {
      constexpr int first = x + 1;
      if (runs[n].v0 != first || runs[n].v1 != NV) return;
      for (isize g = runs[n].count; g > 0; --g, value += stride, weight += rows * 4) {
        word u[NV];
        tile::unroll<NV - first>([&](auto y)
                                     FOVEA_INLINE_LAMBDA { u[first + y] = word::load(weight + 4 * W * (first + y)); });
        tile::unroll<M>([&](auto i) FOVEA_INLINE_LAMBDA {
          const word four = simd::splat4<Arch>(value + 4 * i);
          tile::unroll<NV - first>([&](auto y) FOVEA_INLINE_LAMBDA {
            acc[i][first + y] = simd::dot4(acc[i][first + y], u[first + y], four);
            simd::keep(acc[i][first + y]);
          });
        });
      }
    });
    if (!Whole && runs[n].v1 == NV) continue;
    tile::unroll<Whole ? 0 : NV>([&](auto x) FOVEA_INLINE_LAMBDA {
      if (x < runs[n].v0 || x >= runs[n].v1) return;
      for (isize g = 0; g < runs[n].count; ++g) {
        const word u = word::load(weight + g * rows * 4 + 4 * W * x);
        tile::unroll<M>([&](auto i) FOVEA_INLINE_LAMBDA {
          acc[i][x] = simd::dot4(acc[i][x], u, simd::splat4<Arch>(value + g * stride + 4 * i));
          simd::keep(acc[i][x]);
        });
      }
    });
  }
  tile::unroll<NV>([&](auto x) FOVEA_INLINE_LAMBDA {
    tile::unroll<F>([&](auto z) FOVEA_INLINE_LAMBDA {
      const P b = P::load(beta + x * W + z * P::size);
      tile::unroll<M>([&](auto i) FOVEA_INLINE_LAMBDA {
        float* at = o + i * rows + x * W + z * P::size;
        const P sum = simd::to_float(acc[i][x], z);
        simd::fma(Fold ? sum : sum * P(channel[i]), b, P::load(at)).store(at);
      });
    });
  });
}

/// Scores in octaves (f32) of one vector -> 16 bits below their own maximum: the same grid as int8_scores, at any height. Bit
/// `shift` + l of lanes: lane l sees the key.
template <class Arch>
FOVEA_NOINLINE void int8_from_floats(isize first, isize count, float* f, const float* fold, const std::uint64_t* lanes,
                                     isize shift, std::int16_t* s, float* height) noexcept {
  using word = simd::words<Arch>;
  using P = simd::pack<float, Arch>;
  constexpr int F = simd::float_packs<Arch>;
  constexpr isize rows = int8_tile<Arch>::rows;
  const P magic(12582912.0F), none(-std::numeric_limits<float>::infinity());
  P most[F], broken[F];
  tile::unroll<F>([&](auto z) FOVEA_INLINE_LAMBDA { most[z] = none, broken[z] = P(0.0F); });
  for (isize j = 4 * first; j < 4 * (first + count); ++j)
    tile::unroll<F>([&](auto z) FOVEA_INLINE_LAMBDA {
      float* at = f + j * rows + z * P::size;
      P y = simd::select(static_cast<simd::lane_bits>(lanes[j] >> (shift + z * P::size)), P::load(at), none);
      y = simd::fma(y, P(static_cast<float>(int8_grid)), P(fold[j]));
      const P sound = simd::max(P(-1e30F), y);  // NaN survives, -inf does not
      broken[z] = broken[z] + (sound - sound);  // 0, or NaN where the score is NaN or +inf
      const P near = (simd::max(P(-4e6F), simd::min(P(4e6F), y)) + magic) - magic;
      y = simd::select_greater(y, P(-4e6F), simd::select_greater(P(4e6F), y, near, y), y);
      y.store(at);
      most[z] = simd::max(most[z], y);
    });
  for (isize h = 2 * first; h < 2 * (first + count); ++h) {
    word pair[2];
    for (isize i = 0; i < 2; ++i) {
      P y[F];
      tile::unroll<F>([&](auto z) FOVEA_INLINE_LAMBDA {  // NaN gives -32768
        y[z] = simd::max(P::load(f + (h / 2 * 4 + h % 2 + 2 * i) * rows + z * P::size) - most[z], P(-32768.0F));
      });
      pair[i] = simd::to_nearest<Arch>(y);
    }
    simd::join_i16(pair[0], pair[1]).store(s + h * rows * 2);
  }
  tile::unroll<F>([&](auto z) FOVEA_INLINE_LAMBDA { (most[z] + broken[z]).store(height + z * P::size); });
}

}  // namespace detail
}  // namespace kernel
}  // namespace FOVEA_ABI
}  // namespace fovea
