// SPDX-License-Identifier: MIT
#pragma once
/// @file  Keys and values of one KV head, rounded to 8 bits: once a call, for all queries of the group.
///
///   k8 [m][dp]        bytes of the turned key, a scale each, and -128 times their sum (q is kept as q8 + 128)
///   v8 [m / 4][ep][4] bytes of four keys side by side, with 64 log2(scale), 1 / scale, and 1 / scale in two bytes
///
/// Contract   rows come from any source that kernels read: f32, f16, bf16, int8 with scales; one stretch, ring or pages. A key with a
///            number that is not finite, or with values too small or large for a scale, is marked, its bytes are 0: rows that see it
///            are computed in f32. Every key is rounded by itself (without `fold`: every block).
/// Cost       about 0.2 ns an element; m (dp + ep + 26) bytes.

#include <fovea/kernel/int8_turn.hpp>
#include <fovea/kernel/online_softmax.hpp>
#include <fovea/simd/word_moves.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace kernel {

/// Everything that is kept of a head. Blocks of `keys` keys; the last one is filled up with keys of zeros.
struct int8_head {
  isize d = 0, e = 0, dp = 0, ep = 0, keys = 0, blocks = 0;
  std::int8_t *k = nullptr, *v = nullptr;
  std::uint8_t* weight = nullptr;  // [m / 4][2][4] low and high byte of round(unit / scale)
  std::int32_t* offset = nullptr;  // and the bits of int8_magic
  float *k_scale = nullptr, *k_shift = nullptr, *fold = nullptr, *inverse = nullptr;  // k_shift: -int8_magic k_scale
  float* length = nullptr;   // of the key, squared; infinity: marked
  float* channel = nullptr;  // without fold: [block][ep] scales
  struct part {              // 16 keys
    float step;              // weight * step = 1 / scale; 0: the scales differ too much, take `inverse`
    float coarsest;          // largest `inverse`
  };
  part* parts = nullptr;
  float* longest = nullptr;  // [block] of `length`

  int8_head() = default;
  int8_head(arena& memory, isize m, isize width, isize values, int block_keys, bool fold_values)
      : d(width), e(values), dp(detail::int8_width(width)), ep(detail::int8_width(values)), keys(block_keys) {
    blocks = ceil_div(m, keys);
    const isize all = blocks * keys;
    k = memory.take<std::int8_t>(all * dp), v = memory.take<std::int8_t>(all * ep);
    weight = memory.take<std::uint8_t>(all * 2);
    offset = memory.take<std::int32_t>(all);
    k_scale = memory.take<float>(all), k_shift = memory.take<float>(all);
    fold = memory.take<float>(all), inverse = memory.take<float>(all);
    length = memory.take<float>(all);
    channel = memory.take<float>(fold_values ? 0 : blocks * ep);
    parts = memory.take<part>(all / detail::int8_part), longest = memory.take<float>(blocks);
  }
};

namespace detail {

/// A whole number y with 2^(y / 64) in [x, 1.035 x), for positive normal x: the logarithm of the mantissa by a parabola.
FOVEA_INLINE float grid_above(float x) noexcept {
  const auto bits = std::bit_cast<std::int32_t>(x);
  const float whole = static_cast<float>((bits >> 23) - 127), f = static_cast<float>(bits & 0x7fffff) * 0x1p-23F;
  return std::ceil((whole + f + 0.3463F * f * (1.0F - f) + 0.0095F) * static_cast<float>(int8_grid));
}

/// The same of W numbers.
template <class Arch>
FOVEA_INLINE void grid_above(const float* x, float* to) noexcept {
  using P = simd::pack<float, Arch>;
  constexpr isize W = simd::words<Arch>::size;
  std::int32_t bits[W];
  float whole[W], rest[W];
  std::memcpy(bits, x, sizeof bits);
  for (isize l = 0; l < W; ++l) whole[l] = static_cast<float>((bits[l] >> 23) - 127);
  for (isize l = 0; l < W; ++l) rest[l] = static_cast<float>(bits[l] & 0x7fffff);
  for (isize l = 0; l < W; l += P::size) {
    const P f = P::load(rest + l) * P(0x1p-23F), one(1.0F), magic(int8_magic);
    const P y = (P::load(whole + l) + f + P(0.3463F) * f * (one - f) + P(0.0095F)) * P(static_cast<float>(int8_grid)),
            near = (y + magic) - magic;
    simd::select_greater(y, near, near + one, near).store(to + l);
  }
}

template <class Arch>
FOVEA_NOINLINE void measure_rows(const float* x, isize ld, isize n, row_extents<Arch>& to) noexcept {
  using P = simd::pack<float, Arch>;
  constexpr isize L = P::size;
  const P zero(0.0F);
  for (isize first = 0; first < row_extents<Arch>::W; first += L) {
    P high[L], square[L];
    for (isize l = 0; l < L; ++l) {
      P most = zero, sum = zero;
      const float* row = x + (first + l) * ld;
      for (isize c = 0; c < n; c += L) {
        const P y = P::load(row + c);
        most = simd::most_magnitude(most, y), sum = simd::fma(y, y, sum);
      }
      high[l] = most, square[l] = sum;
    }
    const P none(std::numeric_limits<float>::infinity());
    P length = simd::sum_each(square), most = simd::max_each(high);
    length = simd::select_greater(none, length, length, none);  // NaN too
    most = simd::select_greater(none, length, simd::select_greater(most, P(1e-30F), most, zero), zero);
    length.store(to.length + first), most.store(to.most + first);
    // Rows of zeros, and those that are marked: 0.
    simd::select_greater(most, zero, P(127.0F) / simd::max(P(1e-30F), most), zero).store(to.factor + first);
  }
}

/// Largest magnitudes of W rows, in x.most, and lengths of 0: is every number finite? Otherwise x says nothing.
template <class Arch>
FOVEA_NOINLINE bool largest_of_rows(rows_apart rows, isize n, row_extents<Arch>& x) noexcept {
  using P = simd::pack<float, Arch>;
  constexpr isize L = P::size;
  constexpr int side = L < 4 ? 1 : 4;  // rows side by side
  const P zero(0.0F);
  P broken[side];
  tile::unroll<side>([&](auto i) FOVEA_INLINE_LAMBDA { broken[i] = zero; });
  for (isize first = 0; first < row_extents<Arch>::W; first += L) {
    P high[L];
    for (isize l = 0; l < L; l += side) {
      const float* row = rows.at + (first + l) * rows.ld;
      P most[side];
      tile::unroll<side>([&](auto i) FOVEA_INLINE_LAMBDA { most[i] = zero; });
      for (isize c = 0; c < n; c += L)
        tile::unroll<side>([&](auto i) FOVEA_INLINE_LAMBDA {
          const float* at = row + i * rows.ld + c;
          simd::prefetch_line(at + rows.ahead);
          const P y = P::load(at);
          most[i] = simd::most_magnitude(most[i], y), broken[i] = simd::fma(y, zero, broken[i]);  // 0, or NaN
        });
      tile::unroll<side>([&](auto i) FOVEA_INLINE_LAMBDA { high[l + i] = most[i]; });
    }
    const P most = simd::max_each(high);
    simd::select_greater(most, P(1e-30F), most, zero).store(x.most + first), zero.store(x.length + first);
  }
  tile::unroll<side - 1>([&](auto i) FOVEA_INLINE_LAMBDA { broken[0] = broken[0] + broken[i + 1]; });
  return simd::lanes_above(broken[0], zero) == 0;
}

/// x factor + shift, rounded, in 32-bit lanes; 0 + shift where the factor is 0 and x may be anything.
template <class Arch>
FOVEA_INLINE simd::words<Arch> rounded_words(const float* x, simd::pack<float, Arch> factor, float shift) noexcept {
  using P = simd::pack<float, Arch>;
  P y[simd::float_packs<Arch>];
  tile::unroll<simd::float_packs<Arch>>(
      [&](auto i) FOVEA_INLINE_LAMBDA { y[i] = simd::fma(P::load(x + i * P::size), factor, P(shift)); });
  return simd::to_nearest<Arch>(y);
}

/// A row of n floats times `factor` as bytes: s8, or u8 with 128 added. Returns lanes whose sum is the sum of the s8 (not for u8).
template <class Arch, bool Unsigned>
FOVEA_INLINE simd::words<Arch> round_row(const float* x, isize n, simd::pack<float, Arch> factor,
                                         std::uint8_t* to) noexcept {
  using word = simd::words<Arch>;
  constexpr isize W = word::size;
  constexpr float shift = Unsigned ? 128.0F : 0.0F;
  word sum = word::splat(0);
  isize c = 0;
  for (; c + 4 * W <= n; c += 4 * W) {
    word y[4];
    tile::unroll<4>([&](auto i) FOVEA_INLINE_LAMBDA { y[i] = rounded_words<Arch>(x + c + i * W, factor, shift); });
    const word four = simd::join_bytes<Unsigned>(y);
    four.store(to + c);
    if constexpr (!Unsigned) sum = simd::dot4(sum, simd::splat_i8<Arch>(1), four);
  }
  for (; c < n; c += W) {
    const word y = rounded_words<Arch>(x + c, factor, shift);
    simd::store_low_bytes(y, to + c);
    if constexpr (!Unsigned) sum = simd::add_i32(sum, y);
  }
  return sum;
}

/// Row j of any source as f32, behind it zeros up to `padded`.
template <class Arch>
FOVEA_INLINE void load_padded(const row_source& from, isize j, isize width, isize padded, float* to) noexcept {
  if (from.form != row_form::plain) {
    simd::load_packed_row<Arch, float>(from, j, width, to);
  } else {
    const stretch s = from.at(j);
    if (from.type == dtype::i8)
      simd::load_scaled_row<Arch, float>(s.data, s.scales, from.scale_row, width, to);
    else
      simd::load_row<Arch, float>(from.type, s.data, width, to);
  }
  for (isize c = width; c < padded; ++c) to[c] = 0.0F;
}
/// The same, rotated: without a copy where the row lies as f32.
template <class Arch>
FOVEA_INLINE void load_rotated(const row_source& from, isize j, isize width, isize padded, float* to) noexcept {
  if (from.form == row_form::plain && from.type == dtype::f32 && width == padded)
    return simd::rotate_row<Arch>(reinterpret_cast<const float*>(from.at(j).data), to, width);
  load_padded<Arch>(from, j, width, padded, to);
  simd::rotate_row<Arch>(to, to, width);
}
/// Are its integers what the products take?
inline bool has_codes(const row_source& s) { return s.type == dtype::i8 && s.scale_row == 1; }

/// Rounds the keys and values of blocks, one at a time. R: the recipe.
template <class Arch, int8_recipe R>
class int8_rounding {
  static constexpr isize W = simd::words<Arch>::size;
  static_assert(R.keys % W == 0 && W % 4 == 0);

 public:
  int8_rounding(arena& memory, isize d, isize e) {
    const isize dp = int8_width(d), ep = int8_width(e), wide = W * (dp > ep ? dp : ep);
    rows_ = memory.take<float>(!R.fold && R.keys * ep > wide ? R.keys * ep : wide);
    turned_ = memory.take<float>(W * dp);
    codes_ = memory.take<std::int8_t>(W * dp > 4 * ep ? W * dp : 4 * ep);
  }

  void block(const key_set<float>& set, int8_head& to, isize x) noexcept {
    const isize first = x * R.keys, last = first + R.keys < set.count ? first + R.keys : set.count;
    if (has_codes(set.k) && (set.k.rotated || !R.rotate))
      stored_keys(set.k, first, last, to);
    else
      keys(set.k, first, last, to);
    if constexpr (!R.fold)
      values_by_channel(set.v, first, last, x, to);
    else if (has_codes(set.v))
      stored_values(set.v, first, last, to);
    else
      values(set.v, first, last, to);
    for (isize j = first; j < first + R.keys; j += int8_part) weights(j, last, to);
    for (isize j = first; j < first + R.keys; ++j)
      to.k_shift[j] = -int8_magic * to.k_scale[j], to.offset[j] += std::bit_cast<std::int32_t>(int8_magic);
    simd::pack<float, Arch> longest(0.0F);  // lengths are numbers; of keys behind the last one they are 0
    for (isize j = first; j < first + R.keys; j += simd::pack<float, Arch>::size)
      longest = simd::max(longest, simd::pack<float, Arch>::load(to.length + j));
    to.longest[x] = simd::highest(longest);
  }

 private:
  static constexpr float none = std::numeric_limits<float>::infinity();

  void keys(const row_source& from, isize first, isize last, int8_head& to) noexcept {
    const bool rotate = R.rotate && !from.rotated, across = rotate && to.d == to.dp;
    row_extents<Arch> x;
    for (isize j = first, end = first + R.keys; j < end; j += W) {
      turn_rows<Arch>(rows_of(from, j, last, to.d, to.dp, rotate && !across), to.dp, across, turned_, x);
      round_turned<Arch, false>(turned_, to.dp, x, reinterpret_cast<std::uint8_t*>(codes_), 4 * W).store(to.offset + j);
      rows_of_bytes<Arch>(codes_, to.dp, to.k + j * to.dp, to.dp);
      for (isize l = 0; l < W; ++l) to.offset[j + l] *= -128;
      for (isize l = 0; l < W; ++l) to.k_scale[j + l] = x.most[l] / 127.0F;
      for (isize l = 0; l < W; ++l) to.length[j + l] = x.length[l];
    }
  }
  /// W rows from j on, with zeros up to `padded` and behind the last one: where they lie, or in rows_.
  rows_apart rows_of(const row_source& from, isize j, isize last, isize width, isize padded, bool rotate) noexcept {
    if (!rotate && from.form == row_form::plain && from.type == dtype::f32 && width == padded && j + W <= last) {
      const stretch s = from.at(j);
      const isize ld = from.row_bytes / static_cast<isize>(sizeof(float));
      if (s.count >= W) return {reinterpret_cast<const float*>(s.data), ld, s.count >= 2 * W ? W * ld : 0};
    }
    for (isize l = 0; l < W; ++l) {
      float* to = rows_ + l * padded;
      if (j + l >= last)
        std::memset(to, 0, static_cast<std::size_t>(padded) * sizeof(float));
      else if (rotate)
        load_rotated<Arch>(from, j + l, width, padded, to);
      else
        load_padded<Arch>(from, j + l, width, padded, to);
    }
    return {rows_, padded};
  }
  /// Keys that are stored as they are wanted.
  void stored_keys(const row_source& from, isize first, isize last, int8_head& to) noexcept {
    std::memset(to.k + first * to.dp, 0, static_cast<std::size_t>(R.keys * to.dp));
    gather_codes(from, first, last - first, to.d, to.k + first * to.dp, to.dp, to.k_scale + first);
    for (isize j = first; j < first + R.keys; ++j) {
      const std::int8_t* k = to.k + j * to.dp;
      std::int32_t sum = 0, square = 0;
      for (isize c = 0; c < to.dp; ++c) sum += k[c], square += k[c] * k[c];
      if (j >= last) to.k_scale[j] = 0;
      const float length = static_cast<float>(square) * to.k_scale[j] * to.k_scale[j];
      to.offset[j] = -128 * sum, to.length[j] = length < none ? length : none;
      if (!(length < none)) to.k_scale[j] = 0;
    }
  }

  void values(const row_source& from, isize first, isize last, int8_head& to) noexcept {
    using word = simd::words<Arch>;
    using P = simd::pack<float, Arch>;
    constexpr int F = simd::float_packs<Arch>;
    const isize ep = to.ep;
    row_extents<Arch> x;
    for (isize j = first, end = first + R.keys; j < end; j += W) {
      rows_apart rows = rows_of(from, j, last, to.e, ep, false);
      if (!largest_of_rows<Arch>(rows, ep, x)) rows = without_broken(rows, ep, x);
      value_scales(j, x, to);
      for (isize y = 0; y < W; y += 4) {
        auto* out = reinterpret_cast<std::uint8_t*>(to.v + (j + y) * ep);
        for (isize c = 0; c < ep; c += W) {
          word z[4];
          tile::unroll<4>([&](auto i) FOVEA_INLINE_LAMBDA {
            P factor[F];
            tile::unroll<F>([&](auto l) FOVEA_INLINE_LAMBDA { factor[l] = P(x.factor[y + i]); });
            z[i] = low_bytes<Arch, false>(rows.at + (y + i) * rows.ld + c, factor);
          });
          simd::join_low_bytes(z).store(out + 4 * c);
        }
      }
    }
  }
  /// A copy of W rows with zeros for those that are not finite, or too long to be measured.
  FOVEA_NOINLINE rows_apart without_broken(rows_apart rows, isize n, row_extents<Arch>& x) noexcept {
    measure_rows<Arch>(rows.at, rows.ld, n, x);
    for (isize l = 0; l < W; ++l)
      for (isize c = 0; c < n; ++c) rows_[l * n + c] = x.length[l] == none ? 0.0F : rows.at[l * rows.ld + c];
    return {rows_, n};
  }
  /// The scales of W measured rows, and in x.factor what they are multiplied by. Scales are powers of 2^(1/64): no rounding in the score.
  static void value_scales(isize j, row_extents<Arch>& x, int8_head& to) noexcept {
    using P = simd::pack<float, Arch>;
    constexpr float most = static_cast<float>(int8_most_fold * int8_grid);
    const P zero(0.0F), infinite(none), large(most + 0.5F);
    alignas(64) float folds[W];
    for (isize l = 0; l < W; ++l) folds[l] = x.most[l] * (1.0F / 127.0F);
    grid_above<Arch>(folds, folds);
    for (isize l = 0; l < W; l += P::size) {
      const P some = simd::select_greater(P::load(x.most + l), zero, P::load(folds + l), P(-none));
      const P fold = simd::select_greater(infinite, P::load(x.length + l), some, infinite);
      const P inverse = simd::exp2(fold * P(-1.0F / int8_grid));
      const auto kept = [&](P yes, P no) {
        return simd::select_greater(fold, large, no, simd::select_greater(P(-most - 0.5F), fold, no, yes));
      };
      const P length = P::load(to.length + j + l), zeros = simd::select_greater(P(-3e38F), fold, length, infinite);
      kept(length, zeros).store(to.length + j + l);
      kept(fold, P(-most)).store(to.fold + j + l);
      kept(inverse, P(static_cast<float>(std::int64_t{1} << static_cast<int>(int8_most_fold))))
          .store(to.inverse + j + l);
      kept(inverse, zero).store(x.factor + l);
    }
  }
  void stored_values(const row_source& from, isize first, isize last, int8_head& to) noexcept {
    const isize ep = to.ep;
    std::memset(to.v + first * ep, 0, static_cast<std::size_t>(R.keys * ep));
    for (isize j = first; j < last; j += 4) {
      const isize count = last - j < 4 ? last - j : 4;
      float scale[4];
      gather_codes(from, j, count, to.e, codes_, ep, scale);
      for (isize y = 0; y < count; ++y) {
        const bool kept = set_scale(scale[y], j + y, to) > 0;
        std::int8_t* out = to.v + j * ep + y;
        for (isize c = 0; c < to.e; ++c) out[4 * c] = kept ? codes_[y * ep + c] : std::int8_t{0};
      }
    }
  }
  /// What a value's scale gives: `fold` = 64 log2 of it, -infinity for a value of zeros, +infinity for one without a scale. Returns
  /// 1 / scale, or 0. A value of zeros has the least scale that there is: its own p is then 0, which is right, and the denominator
  /// counts it in f32.
  static float set_value(float fold, float inverse, isize j, int8_head& to) noexcept {
    constexpr float most = static_cast<float>(int8_most_fold * int8_grid);
    const bool some = fold >= -most && fold <= most;
    if (!some && fold != -none) to.length[j] = none;
    to.fold[j] = some ? fold : -most;
    to.inverse[j] = some ? inverse : static_cast<float>(std::int64_t{1} << static_cast<int>(int8_most_fold));
    return some ? inverse : 0;
  }
  /// The same for a scale that is given. Its fold is rounded: at most half a step of the score.
  static float set_scale(float scale, isize j, int8_head& to) noexcept {
    const bool some = scale > 0 && scale < none;
    const float fold = some         ? std::nearbyint(std::log2(scale) * static_cast<float>(int8_grid))
                       : scale == 0 ? -none
                                    : none;
    return set_value(fold, 1.0F / scale, j, to);
  }

  /// 1 / scale of 16 keys from j on, in 15 bits, where the scales are alike. Keys behind the last one count nothing.
  static void weights(isize j, isize last, int8_head& to) noexcept {
    using P = simd::pack<float, Arch>;
    const isize end = j + int8_part;
    for (isize y = j < last ? last : j; y < end; ++y) to.inverse[y] = 0, to.fold[y] = 0;
    P up(0.0F), down(-none);
    for (isize y = j; y < end; y += P::size) {
      const P x = P::load(to.inverse + y);
      up = simd::max(up, x), down = simd::max(down, simd::select_greater(x, P(0.0F), P(0.0F) - x, P(-none)));
    }
    const float most = simd::highest(up), least = -simd::highest(down);
    const bool alike = most <= static_cast<float>(int8_most_spread) * least;
    const float unit = !alike || most == 0 ? 0 : 32512.0F / most;
    to.parts[j / int8_part] = {alike ? most / 32512.0F : 0, most};
    for (isize y = j; y < end; y += W) {
      std::int32_t w[W];
      P x[simd::float_packs<Arch>];
      for (isize i = 0; i < simd::float_packs<Arch>; ++i) x[i] = P::load(to.inverse + y + i * P::size) * P(unit);
      simd::to_nearest<Arch>(x).store(w);
      for (isize l = 0; l < W; ++l) {
        std::uint8_t* at = to.weight + (y + l) / 4 * 8 + l % 4;
        at[0] = static_cast<std::uint8_t>(w[l]), at[4] = static_cast<std::uint8_t>((w[l] + 128) >> 8);
      }
    }
  }

  void values_by_channel(const row_source& from, isize first, isize last, isize x, int8_head& to) noexcept {
    const isize ep = to.ep;
    float* channel = to.channel + x * ep;
    for (isize c = 0; c < ep; ++c) channel[c] = 0;
    for (isize j = first; j < first + R.keys; ++j) {
      float* row = rows_ + (j - first) * ep;
      to.fold[j] = 0, to.inverse[j] = 1;
      for (isize c = 0; j >= last && c < ep; ++c) row[c] = 0;
      if (j >= last) continue;
      load_padded<Arch>(from, j, to.e, ep, row);
      float length = 0;
      for (isize c = 0; c < ep; ++c) length += row[c] * row[c];
      if (!(length < none)) {
        to.length[j] = none;
        for (isize c = 0; c < ep; ++c) row[c] = 0;
      }
      for (isize c = 0; c < ep; ++c) channel[c] = channel[c] > std::abs(row[c]) ? channel[c] : std::abs(row[c]);
    }
    for (isize c = 0; c < ep; ++c) channel[c] /= 127.0F;
    for (isize j = first; j < first + R.keys; ++j)
      for (isize c = 0; c < ep; ++c) {
        const float y = rows_[(j - first) * ep + c];
        to.v[(j / 4 * ep + c) * 4 + j % 4] =
            static_cast<std::int8_t>(channel[c] > 0 ? std::nearbyint(y / channel[c]) : 0.0F);
      }
  }

  float *rows_, *turned_;
  std::int8_t* codes_;
};

}  // namespace detail
}  // namespace kernel
}  // namespace FOVEA_ABI
}  // namespace fovea
