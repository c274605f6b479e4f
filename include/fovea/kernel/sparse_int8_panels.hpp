// SPDX-License-Identifier: MIT
#pragma once
/// @file  The inner loops of attention in int8 of one narrow tile of query rows to groups of four keys that only it has chosen.
///
///   sparse_int8_scores    S = round(64 (scale k8 . q8) + fold), 16 bits, two keys in a register, and the maximum
///   sparse_int8_weights   p = u8(255 2^((S - max) / 64)) of one vector of rows, and the denominator
///   sparse_int8_values    O^T = O^T + 2^(max - m) v8^T p
///
/// The tile is 16 rows: one vector of AVX-512, with 16 keys (or columns) a step of four channels (or keys): 17 loads for 16 products.
///
/// Contract   slots are groups of four keys, at most 32; S [slot][2][rows][2]: the first and third key side by side, then the others;
///            p [slot][rows][4]; -32768 is a score that is hidden. `group[slot]` is where its keys lie in the head.
///            `plain`: every row may depend on the scales of all 16 keys of the slot's part (kernel/int8_rows.hpp), so that the
///            denominator is counted in integers; else in f32.

#include <fovea/kernel/int8_panels.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace kernel {
namespace detail {

template <class Arch>
struct sparse_int8_tile {
  static constexpr isize W = simd::words<Arch>::size, rows = 16;
  static constexpr int NV = static_cast<int>(rows / W),
                       MR = W == 16 ? 16 : 4;  // vectors of rows; keys or columns of a step
  static constexpr isize slots = 32, keys = 4 * slots;
};

/// Four keys of a head in a tile's list.
struct int8_slot_keys {
  std::int32_t group;
  bool plain;
};

/// M keys from `j` on (a multiple of four) into the slots from `s` on; folds the maximum of pairs into `top` [2 rows]. Masked: bit r of
/// lanes[i]: row r sees key j + i. Width: dp, or 0 for any.
template <class Arch, int M, bool Masked, isize Width>
FOVEA_NOINLINE void sparse_int8_scores(const int8_head& x, isize j, const std::uint8_t* q, const float* q_scale,
                                       const std::uint16_t* lanes, const std::int8_t* next, std::int16_t* s,
                                       std::int16_t* top) noexcept {
  using T = sparse_int8_tile<Arch>;
  using word = simd::words<Arch>;
  using P = simd::pack<float, Arch>;
  constexpr int F = simd::float_packs<Arch>, NV = T::NV;
  constexpr isize W = T::W;
  word acc[M][NV];
  tile::unroll<M>([&](auto i) FOVEA_INLINE_LAMBDA {
    tile::unroll<NV>([&](auto v) FOVEA_INLINE_LAMBDA { acc[i][v] = word::splat(x.offset[j + i]); });
  });
  const std::int8_t* k[M / 4];
  isize one = Width > 0 ? Width : x.dp, three = 3 * one;
  tile::unroll<M / 4>([&](auto i) FOVEA_INLINE_LAMBDA { k[i] = x.k + (j + 4 * i) * one; });
  if constexpr (Width == 0) simd::keep_in_register(one), simd::keep_in_register(three);
  const std::int8_t* ahead = next;
  const auto step = [&](isize c) FOVEA_INLINE_LAMBDA {  // four channels
    simd::prefetch_line(ahead + (c / 4) * 64);
    word u[NV];
    tile::unroll<NV>([&](auto v) FOVEA_INLINE_LAMBDA { u[v] = word::load(q + c * T::rows + 4 * W * v); });
    tile::unroll<M>([&](auto i) FOVEA_INLINE_LAMBDA {
      constexpr int r = i % 4;
      const word y = simd::splat4<Arch>(k[i / 4] + (r == 0 ? 0 : r == 1 ? one : r == 2 ? 2 * one : three) + c);
      tile::unroll<NV>([&](auto v) FOVEA_INLINE_LAMBDA {
        acc[i][v] = simd::dot4(acc[i][v], u[v], y);
        simd::keep(acc[i][v]);
      });
    });
  };
  if constexpr (Width > 0) {  // no branch to mispredict: int8_panels.hpp
    FOVEA_UNROLL
    for (isize c = 0; c < Width; c += 4) step(c);
  } else {
    for (isize c = 0; c < x.dp; c += 4, q += 4 * T::rows, ahead += 64) {
      step(0);
      tile::unroll<M / 4>([&](auto i) FOVEA_INLINE_LAMBDA { k[i] += 4; });
    }
  }
  alignas(64) float level[M];  // in memory: each product takes it as a broadcast operand
  for (int i = 0; i < M; ++i) level[i] = x.fold[j + i] + int8_magic;
  const float *const scale = x.k_scale + j, *const shift = x.k_shift + j;
  tile::unroll<NV>([&](auto v) FOVEA_INLINE_LAMBDA {
    word most = word::load(top + 2 * W * v);
    tile::unroll<M / 4>([&](auto g) FOVEA_INLINE_LAMBDA {
      word rounded[4];
      tile::unroll<4>([&](auto i) FOVEA_INLINE_LAMBDA {
        constexpr int key = 4 * g + i;
        P y[F];
        tile::unroll<F>([&](auto z) FOVEA_INLINE_LAMBDA {
          const P a = simd::fma(simd::as_floats(acc[key][v], z), P(scale[key]), P(shift[key]));
          y[z] = simd::fma(a, P::load(q_scale + v * W + z * P::size), P(level[key]));
          if constexpr (Masked)
            y[z] = simd::select(static_cast<simd::lane_bits>(lanes[key] >> (v * W + z * P::size)), y[z],
                                P(int8_magic - 32768));
        });
        rounded[i] = simd::bits_of<Arch>(y);
      });
      tile::unroll<2>([&](auto h) FOVEA_INLINE_LAMBDA {
        const word pair = simd::join_i16(rounded[h], rounded[h + 2]);
        pair.store(s + (2 * g + h) * T::rows * 2 + 2 * v * W);
        most = simd::max_i16(most, pair);
      });
    });
    most.store(top + 2 * W * v);
  });
}

/// Sum of 255 2^((S - top) / 64) / scale over slots [first, last), onto `sum`, for one vector of rows.
template <class Arch>
FOVEA_NOINLINE void sparse_int8_exact_sum(const int8_slot_keys* slot, isize first, isize last, const float* inverse,
                                          const std::int16_t* s, const std::int16_t* top, float* sum) noexcept {
  using T = sparse_int8_tile<Arch>;
  using P = simd::pack<float, Arch>;
  using word = simd::words<Arch>;
  constexpr int F = simd::float_packs<Arch>;
  P all[F];
  tile::unroll<F>([&](auto z) FOVEA_INLINE_LAMBDA { all[z] = P::load(sum + z * P::size); });
  const word most = word::load(top);
  for (isize h = 2 * first; h < 2 * last; ++h) {
    const word d = simd::sub_i16(word::load(s + h * T::rows * 2), most),
               both[2] = {simd::low_i16(d), simd::high_i16(d)};
    const float* at = inverse + 4 * isize{slot[h / 2].group} + h % 2;
    for (isize i = 0; i < 2; ++i)
      tile::unroll<F>([&](auto z) FOVEA_INLINE_LAMBDA {
        // The saturated difference of a hidden score is 2^-512 or less: 0.
        const P p = simd::exp2(simd::to_float(both[i], z) * P(1.0F / int8_grid));
        all[z] = simd::fma(p, P(255.0F * at[2 * i]), all[z]);
      });
  }
  tile::unroll<F>([&](auto z) FOVEA_INLINE_LAMBDA { all[z].store(sum + z * P::size); });
}

/// p of slots [0, count) for the vector of rows from `lane` on, and their denominator in `sum` [W].
template <class Arch>
FOVEA_NOINLINE void sparse_int8_weights(const int8_head& x, const int8_slot_keys* slot, isize count, isize lane,
                                        const std::int16_t* s, const std::int16_t* top, std::uint8_t* p,
                                        float* sum) noexcept {
  using T = sparse_int8_tile<Arch>;
  using P = simd::pack<float, Arch>;
  using word = simd::words<Arch>;
  constexpr int F = simd::float_packs<Arch>;
  constexpr isize W = T::W;
  const word most = word::load(top);
  float coarsest = 0;
  P all[F];
  tile::unroll<F>([&](auto z) FOVEA_INLINE_LAMBDA { all[z] = P(0.0F); });
  for (isize n = 0; n < count;) {
    const isize part = slot[n].group / 4, first = n;
    const bool counts = slot[n].plain && x.parts[part].step > 0;
    word low = word::splat(0), high = low;
    for (; n < count && slot[n].group / 4 == part && (slot[n].plain && x.parts[part].step > 0) == counts; ++n) {
      word y[2];
      tile::unroll<2>([&](auto h) FOVEA_INLINE_LAMBDA {
        y[h] = simd::exp2_i16(simd::sub_i16(most, word::load(s + (2 * n + h) * T::rows * 2)));
        y[h] = simd::add_i16(y[h], word::load(int8_dithers<static_cast<int>(T::keys)>.at[n][h][lane]));
      });
      const word four = simd::join_u8(y[0], y[1]);
      four.store(p + n * T::rows * 4);
      const std::uint8_t* weight = x.weight + isize{slot[n].group} * 8;
      low = simd::dot4(low, four, simd::splat4<Arch>(weight));
      high = simd::dot4(high, four, simd::splat4<Arch>(weight + 4));
    }
    if (counts) {
      const P step(x.parts[part].step);
      coarsest = x.parts[part].coarsest > coarsest ? x.parts[part].coarsest : coarsest;
      tile::unroll<F>([&](auto z) FOVEA_INLINE_LAMBDA {
        all[z] = simd::fma(simd::fma(simd::to_float(high, z), P(256.0F), simd::to_float(low, z)), step, all[z]);
      });
    } else {
      alignas(64) float mass[W] = {};
      sparse_int8_exact_sum<Arch>(slot, first, n, x.inverse, s, top, mass);
      tile::unroll<F>([&](auto z) FOVEA_INLINE_LAMBDA { all[z] = all[z] + P::load(mass + z * P::size); });
    }
  }
  // A sum of a few steps of p of a key with tiny values: p has lost too much of it.
  P coarse(0.0F);
  const P least(coarsest * int8_least_sum);
  tile::unroll<F>([&](auto z) FOVEA_INLINE_LAMBDA {
    all[z].store(sum + z * P::size);
    coarse = simd::max(coarse, simd::select_greater(least, all[z], P(1.0F), P(0.0F)));
  });
  if (!(simd::highest(coarse) > 0)) return;
  alignas(64) float again[W] = {};
  sparse_int8_exact_sum<Arch>(slot, 0, count, x.inverse, s, top, again);
  for (isize l = 0; l < W; ++l)
    if (sum[l] < coarsest * int8_least_sum) sum[l] = again[l];
}

/// M columns of O^T [columns][rows] from the first one that `v` shows on: O += beta v8^T p over slots; v [group][ep][4].
template <class Arch, int M>
FOVEA_NOINLINE void sparse_int8_values(const int8_slot_keys* slot, isize count, const std::int8_t* v, isize ep,
                                       const std::uint8_t* p, const float* beta, float* o) noexcept {
  using T = sparse_int8_tile<Arch>;
  using word = simd::words<Arch>;
  using P = simd::pack<float, Arch>;
  constexpr int F = simd::float_packs<Arch>, NV = T::NV;
  constexpr isize W = T::W;
  word acc[M][NV];
  tile::unroll<M>([&](auto i) FOVEA_INLINE_LAMBDA {
    tile::unroll<NV>([&](auto x) FOVEA_INLINE_LAMBDA { acc[i][x] = word::splat(0); });
  });
  for (isize n = 0; n < count; ++n, p += 4 * T::rows) {
    const std::int8_t* value = v + isize{slot[n].group} * 4 * ep;
    simd::prefetch_line(v + isize{slot[n + 4 < count ? n + 4 : n].group} * 4 * ep);
    word u[NV];
    tile::unroll<NV>([&](auto x) FOVEA_INLINE_LAMBDA { u[x] = word::load(p + 4 * W * x); });
    tile::unroll<M>([&](auto i) FOVEA_INLINE_LAMBDA {
      const word y = simd::splat4<Arch>(value + 4 * i);
      tile::unroll<NV>([&](auto x) FOVEA_INLINE_LAMBDA {
        acc[i][x] = simd::dot4(acc[i][x], u[x], y);
        simd::keep(acc[i][x]);
      });
    });
  }
  tile::unroll<NV>([&](auto x) FOVEA_INLINE_LAMBDA {
    tile::unroll<F>([&](auto z) FOVEA_INLINE_LAMBDA {
      const P b = P::load(beta + x * W + z * P::size);
      tile::unroll<M>([&](auto i) FOVEA_INLINE_LAMBDA {
        float* at = o + i * T::rows + x * W + z * P::size;
        simd::fma(simd::to_float(acc[i][x], z), b, P::load(at)).store(at);
      });
    });
  });
}

}  // namespace detail
}  // namespace kernel
}  // namespace FOVEA_ABI
}  // namespace fovea
