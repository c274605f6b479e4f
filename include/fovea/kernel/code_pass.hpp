// SPDX-License-Identifier: MIT
#pragma once
/// @file  The selection's pass over all rounded keys: integer products, exponentials, and their sums over blocks of keys.
///
///   x_rj = factor_r step_j sum_c q'_rc k'_jc                log2 units
///   peak_rJ = floor(max_{j in J} x_rj),   mass_rJ = sum_{j in J} chord2(x_rj - peak_rJ)
///   chord2(x) = 2^floor(x) (1 + x - floor(x))               >= 2^x by at most 6.2 %, equal at integers
///
/// The chord costs a multiplication, a conversion and a maximum: a float whose bits are (x + 127) 2^23 is chord2(x). A whole number
/// taken from x beforehand changes nothing but the exponent, so the mass does not depend on the peak or on how a block is cut. Where
/// |factor q'| |step k'| is at most 120 octaves no peak is needed (`level`): masses are sums of chord2(x), straight from the products.
/// Queries lie along the lanes. With peaks scores are kept for 64 keys, and two numbers a block and row leave the loop.
///
/// Contract   rows [0, lanes) of a panel; blocks [0, past). A block with a key that has no step (NaN) gets a mass of NaN, so does a
///            row without a factor. Products are exact for d <= 256, rounded to floats beyond that.
/// Cost       d / 4 products of four and about 6 operations a score; VNNI: .15 of exact attention in f32 (d = 64).
/// Reference  hybrid/reference.hpp.       Source  Schraudolph, A fast, compact approximation of the exponential function (1999).

#include <cstring>

#include <fovea/kernel/block_summary.hpp>
#include <fovea/kernel/int8_panels.hpp>
#include <fovea/simd/dot8.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace kernel {

/// Has Arch integers worth the name? Elsewhere products of floats give the same numbers.
template <class Arch>
inline constexpr bool has_code_pass = simd::words<Arch>::size > 4 || std::is_same_v<Arch, simd::neon64>;

/// The rounded keys of one KV head as the products read them.
struct code_keys {
  isize d = 0, dp = 0;
  const std::int8_t* k = nullptr;  // [keys][dp]
  std::int8_t* copy = nullptr;     // where rows are not whole multiples of 16 bytes
  std::int32_t* offset = nullptr;  // [keys] what a product starts from
  float *scale = nullptr, *shift = nullptr;
  float* longest =
      nullptr;  // [blocks] |step k'| of any key up to the block's end, from above; infinite from a broken one on
  std::uint8_t* broken = nullptr;  // [blocks]

  code_keys() = default;
  code_keys(arena& memory, isize keys, isize block, isize width) : d(width), dp(detail::int8_width(width)) {
    const isize all = ceil_div(keys, 4) * 4;
    copy = memory.take<std::int8_t>(dp == d ? 0 : all * dp);
    offset = memory.take<std::int32_t>(all);
    scale = memory.take<float>(all), shift = memory.take<float>(all);
    longest = memory.take<float>(ceil_div(keys, block));
    broken = memory.take<std::uint8_t>(ceil_div(keys, block));
  }
};

/// chord2(x), and 0 below -127.
template <class Arch>
FOVEA_INLINE simd::pack<float, Arch> chord_of_bits(simd::pack<float, Arch> x) noexcept {
  using P = simd::pack<float, Arch>;
  const P bits[1] = {simd::max(P(0.0F), simd::fma(x, P(8388608.0F), P(127 * 8388608.0F)))};
  return simd::as_floats(simd::to_nearest<Arch>(bits));
}

namespace detail {

/// |step code| from above; infinite without a step.
template <class Arch>
float code_length(const std::int8_t* code, isize d, float step) noexcept {
  const float length = step * std::sqrt(static_cast<float>(simd::dot8<Arch>(code, code, d))) * 1.0001F;
  return length < std::numeric_limits<float>::infinity() ? length : std::numeric_limits<float>::infinity();
}

/// What there is of `keys` keys; those that fill up the last four have scores of 0. Kept keys have -infinity: they are computed anyway, and
/// count nothing in the mass of their block.
template <class Arch>
void prepare_codes(const block_summary<float>& s, isize keys, code_keys& to) noexcept {
  to.k = to.copy != nullptr && to.dp != to.d ? to.copy : s.code;
  for (isize J = 0; J < ceil_div(keys, s.block_k); ++J) to.broken[J] = 0;
  float longest = 0;
  for (isize j = 0; j < ceil_div(keys, 4) * 4; ++j) {
    const bool some = j < keys;
    const float step = some ? s.step[j] : 0.0F;
    if (!(step - step == 0)) to.broken[j / s.block_k] = 1;
    // Two bits less, to nearest, so that 1.5 * 2^23 times the scale is exact.
    const float scale = step - step == 0 ? std::bit_cast<float>((std::bit_cast<std::uint32_t>(step) + 2U) & ~3U) : 0.0F;
    to.scale[j] = scale, to.shift[j] = to.dp <= int8_most_width ? -int8_magic * scale : 0.0F;
    std::int32_t sum = 0;
    if (some && to.dp != to.d) {
      std::memcpy(to.copy + j * to.dp, s.code + j * to.d, static_cast<std::size_t>(to.d));
      std::memset(to.copy + j * to.dp + to.d, 0, static_cast<std::size_t>(to.dp - to.d));
    }
    const std::int8_t* row = s.code + (some ? j : 0) * to.d;
    const float length = code_length<Arch>(row, to.d, step);
    longest = length <= longest ? longest : length;
    if (some) to.longest[j / s.block_k] = longest;
    for (isize c = 0; !simd::has_dot4_signed<Arch> && c < to.d; ++c) sum += row[c];
    to.offset[j] = (simd::has_dot4_signed<Arch> ? 0 : -128 * sum) +
                   (to.dp <= int8_most_width ? std::bit_cast<std::int32_t>(int8_magic) : 0);
  }
  for (isize x = 0; s.kept > 0 && x < keys / s.stretch * s.kept; ++x) {
    const isize j = s.small[x];
    if (to.broken[j / s.block_k] == 0) to.scale[j] = 0, to.shift[j] = -std::numeric_limits<float>::infinity();
  }
}

/// f [keys][rows] = scale_j sum_c q'_c k'_jc for keys [first, first + count), of which 4 at a time. q [dp / 4][rows][4], from a vector on.
template <class Arch, int NV, isize Width>
FOVEA_NOINLINE void code_scores(const code_keys& x, isize first, isize count, isize keys, const std::uint8_t* q,
                                float* f) noexcept {
  using word = simd::words<Arch>;
  using P = simd::pack<float, Arch>;
  constexpr isize W = word::size, rows = int8_tile<Arch>::rows;
  const std::int32_t* const offset = x.offset;
  const float *const scale = x.scale, *const shift = x.shift;
  const isize dp = x.dp, last_row = keys - 1;
  const bool exact = dp <= int8_most_width;
  for (isize j = first; j < first + count; j += 4, f += 4 * rows) {
    word acc[4][NV];
    const std::int8_t* k[4];
    tile::unroll<4>([&](auto i) FOVEA_INLINE_LAMBDA {
      tile::unroll<NV>([&](auto v) FOVEA_INLINE_LAMBDA { acc[i][v] = word::splat(offset[j + i]); });
      k[i] = x.k + (j + i < last_row ? j + i : last_row) * dp;
      simd::prefetch(k[i] + 8 * dp, 64);
    });
    const std::uint8_t* u = q;
    const auto step = [&](isize c) FOVEA_INLINE_LAMBDA {  // four channels
      word y[NV];
      tile::unroll<NV>([&](auto v) FOVEA_INLINE_LAMBDA { y[v] = word::load(u + c * rows + 4 * W * v); });
      tile::unroll<4>([&](auto i) FOVEA_INLINE_LAMBDA {
        const word z = simd::splat4<Arch>(k[i] + c);
        tile::unroll<NV>([&](auto v) FOVEA_INLINE_LAMBDA {
          acc[i][v] =
              simd::has_dot4_signed<Arch> ? simd::dot4_signed(acc[i][v], y[v], z) : simd::dot4(acc[i][v], y[v], z);
          simd::keep(acc[i][v]);
        });
      });
    };
    if constexpr (Width > 0) {  // no branch to mispredict: int8_panels.hpp
      FOVEA_UNROLL
      for (isize c = 0; c < Width; c += 4) step(c);
    } else {
      for (isize c = 0; c < dp; c += 4) step(c);
    }
    tile::unroll<4>([&](auto i) FOVEA_INLINE_LAMBDA {
      tile::unroll<NV>([&](auto v) FOVEA_INLINE_LAMBDA {
        const P product = Width > 0 || exact ? simd::as_floats(acc[i][v]) : simd::to_float(acc[i][v]);
        simd::fma(product, P(scale[j + i]), P(shift[j + i])).store(f + i * rows + v * W);
      });
    });
  }
}

/// to [NV vectors, `next` apart][block][W] = sum chord2(x) of whole blocks [first, last) of `block` keys, a multiple of 4. slope [rows]: factor 2^23.
/// A loop that is not unrolled: its code stays among the decoded instructions (unrolled 32 times it took half as long again, d = 128).
template <class Arch, int NV, bool Exact>
FOVEA_NOINLINE void code_masses(const code_keys& x, isize first, isize last, isize block, const std::uint8_t* q,
                                const float* slope, float* to, isize next) noexcept {
  using word = simd::words<Arch>;
  using P = simd::pack<float, Arch>;
  constexpr isize W = word::size, rows = int8_tile<Arch>::rows;
  const std::int32_t* const offset = x.offset;
  const float *const scale = x.scale, *const shift = x.shift;
  const isize dp = x.dp;
  const P one(127 * 8388608.0F);
  for (isize J = first; J < last; ++J) {
    P sum[NV];
    tile::unroll<NV>([&](auto v) FOVEA_INLINE_LAMBDA { sum[v] = P(0.0F); });
    for (isize j = J * block; j < (J + 1) * block; j += 4) {
      const std::int8_t* k = x.k + j * dp;
      word acc[4][NV];
      tile::unroll<4>([&](auto i) FOVEA_INLINE_LAMBDA {
        tile::unroll<NV>([&](auto v) FOVEA_INLINE_LAMBDA { acc[i][v] = word::splat(offset[j + i]); });
        simd::prefetch(k + (8 + i) * dp, 64);
      });
      for (isize c = 0; c < dp; c += 4) {  // four channels
        word y[NV];
        tile::unroll<NV>([&](auto v) FOVEA_INLINE_LAMBDA { y[v] = word::load(q + c * rows + 4 * W * v); });
        tile::unroll<4>([&](auto i) FOVEA_INLINE_LAMBDA {
          const word z = simd::splat4<Arch>(k + i * dp + c);
          tile::unroll<NV>([&](auto v) FOVEA_INLINE_LAMBDA {
            acc[i][v] =
                simd::has_dot4_signed<Arch> ? simd::dot4_signed(acc[i][v], y[v], z) : simd::dot4(acc[i][v], y[v], z);
            simd::keep(acc[i][v]);
          });
        });
      }
      tile::unroll<4>([&](auto i) FOVEA_INLINE_LAMBDA {
        tile::unroll<NV>([&](auto v) FOVEA_INLINE_LAMBDA {
          const P product = Exact ? simd::as_floats(acc[i][v]) : simd::to_float(acc[i][v]);
          const P score = simd::fma(product, P(scale[j + i]), P(shift[j + i]));
          const P bits[1] = {simd::fma(score, P::load(slope + v * W), one)};
          sum[v] = sum[v] + simd::as_floats(simd::to_nearest<Arch>(bits));
        });
      });
    }
    tile::unroll<NV>([&](auto v) FOVEA_INLINE_LAMBDA { sum[v].store(to + v * next + J * W); });
  }
}

/// Folds `count` scores of each of NV vectors into peak [W] and mass [W] of a block, `next` from vector to vector; fresh: they are
/// the first of the block.
template <class Arch, int NV>
FOVEA_NOINLINE void fold_scores(isize count, const float* f, const float* factor, float* to, isize next,
                                bool fresh) noexcept {
  using P = simd::pack<float, Arch>;
  constexpr isize W = P::size, rows = int8_tile<Arch>::rows;
  const P unit(8388608.0F), one(127 * 8388608.0F), zero(0.0F);
  P most[NV], sum[NV], slope[NV], base[NV];
  tile::unroll<NV>([&](auto v) FOVEA_INLINE_LAMBDA { most[v] = P::load(f + v * W), sum[v] = zero; });
  for (isize j = 1; j < count; ++j)
    tile::unroll<NV>([&](auto v) FOVEA_INLINE_LAMBDA { most[v] = simd::max(most[v], P::load(f + j * rows + v * W)); });
  tile::unroll<NV>([&](auto v) FOVEA_INLINE_LAMBDA {
    most[v] = simd::max(most[v], P(-1e30F));  // of kept keys alone
    const P b = P::load(factor + v * W), x = most[v] * b, near = (x + P(int8_magic)) - P(int8_magic);
    most[v] = near - simd::select_greater(near, x, P(1.0F), zero);  // the largest whole number below
    slope[v] = b * unit, base[v] = simd::fma(zero - most[v], unit, one);
  });
  for (isize j = 0; j < count; ++j)
    tile::unroll<NV>([&](auto v) FOVEA_INLINE_LAMBDA {
      const P x[1] = {simd::max(zero, simd::fma(P::load(f + j * rows + v * W), slope[v], base[v]))};
      sum[v] = sum[v] + simd::as_floats(simd::to_nearest<Arch>(x));
    });
  tile::unroll<NV>([&](auto v) FOVEA_INLINE_LAMBDA {
    sum[v] = simd::fma(slope[v], zero, sum[v]);  // NaN of a row without a factor
    if (!fresh) {
      const P old = P::load(to + v * next), both = simd::max(old, most[v]);
      sum[v] = sum[v] * simd::exp2(most[v] - both) + P::load(to + v * next + W) * simd::exp2(old - both);
      most[v] = both;
    }
    most[v].store(to + v * next), sum[v].store(to + v * next + W);
  });
}

}  // namespace detail

/// A panel of up to 64 rounded queries, and the pass of it.
template <class Arch>
class code_pass {
  using T = detail::int8_tile<Arch>;
  static constexpr isize chunk = 64;  // keys whose scores are kept, and up to 3 before them

 public:
  static constexpr isize lanes = 64;

  code_pass(arena& memory, isize d) : d_(d), dp_(detail::int8_width(d)) {
    q_ = memory.take<std::uint8_t>(dp_ * lanes);
    factor_ = memory.take<float>(lanes), slope_ = memory.take<float>(lanes), length_ = memory.take<float>(lanes);
    f_ = memory.take<float>((chunk + 4) * T::rows);
    code_ = memory.take<std::int8_t>(dp_);
  }

  /// A row of d into a lane, rounded to `levels`; factor: scale log2(e).
  void load(const float* x, float factor, int levels, isize lane) noexcept {
    std::memset(code_ + d_, 0, static_cast<std::size_t>(dp_ - d_));
    factor_[lane] = factor * round_row<Arch>(x, d_, levels, code_);
    slope_[lane] = factor_[lane] * 8388608.0F;
    length_[lane] = detail::code_length<Arch>(code_, d_, factor_[lane]);
    put(lane);
  }
  void clear(isize lane) noexcept {
    std::memset(code_, 0, static_cast<std::size_t>(dp_));
    factor_[lane] = slope_[lane] = length_[lane] = 0;
    put(lane);
  }

  /// Are the masses of blocks [0, past) of rows [lane, lane + count) sums of numbers from 2^-120 to 2^120?
  bool level(const code_keys& codes, isize past, isize lane, isize count) const noexcept {
    float most = 0;
    for (isize l = lane; l < lane + count; ++l) most = length_[l] <= most ? most : length_[l];
    return past == 0 || most * codes.longest[past - 1] <= 120;  // no: for NaN, too
  }
  /// to [vector][past][W]: masses of rows [0, count) without peaks; `block` keys a block, a multiple of four, all there.
  void run_level(const code_keys& codes, isize block, isize past, isize count, float* to) noexcept {
    const isize step = block < 256 ? 256 / block : 1;
    for (isize J = 0; J < past; J += step)
      for (isize r = 0; r < count; r += T::rows)
        tile::with_constant<T::NR>(count - r < T::rows ? ceil_div(count - r, T::W) : T::NR, [&](auto nv) {
          float* masses = to + r / T::W * past * T::W;
          const isize last = J + step < past ? J + step : past;
          if (dp_ <= detail::int8_most_width)
            detail::code_masses<Arch, nv, true>(codes, J, last, block, q_ + r * dp_, slope_ + r, masses, past * T::W);
          else
            detail::code_masses<Arch, nv, false>(codes, J, last, block, q_ + r * dp_, slope_ + r, masses, past * T::W);
        });
  }

  /// to [vector][past][2][W]: peak and mass of rows [0, count); `block` keys a block, `keys` in all.
  void run(const code_keys& codes, isize keys, isize block, isize past, isize count, float* to) noexcept {
    const isize vector = past * 2 * T::W;
    const isize last = past * block < keys ? past * block : keys, step = block <= chunk ? chunk / block * block : chunk;
    for (isize j0 = 0; j0 < last; j0 += step) {
      const isize j1 = j0 + step < last ? j0 + step : last, first = j0 / 4 * 4;
      for (isize r = 0; r < count; r += T::rows)
        tile::with_constant<T::NR>(count - r < T::rows ? ceil_div(count - r, T::W) : T::NR, [&](auto nv) {
          score<nv>(codes, first, ceil_div(j1 - first, 4) * 4, keys, q_ + r * dp_);
          for (isize a = j0, b = 0; a < j1; a = b) {
            const isize J = a / block;
            b = (J + 1) * block < j1 ? (J + 1) * block : j1;
            detail::fold_scores<Arch, nv>(b - a, f_ + (a - first) * T::rows, factor_ + r,
                                          to + r / T::W * vector + J * 2 * T::W, vector, a == J * block);
          }
        });
    }
    for (isize J = 0; J < past; ++J)
      for (isize l = 0; codes.broken[J] != 0 && l < count; ++l)
        to[l / T::W * vector + (2 * J + 1) * T::W + l % T::W] = std::numeric_limits<float>::quiet_NaN();
  }

 private:
  template <int NV>
  void score(const code_keys& codes, isize first, isize count, isize keys, const std::uint8_t* q) noexcept {
    if (dp_ == 64)
      detail::code_scores<Arch, NV, 64>(codes, first, count, keys, q, f_);
    else if (dp_ == 128)
      detail::code_scores<Arch, NV, 128>(codes, first, count, keys, q, f_);
    else
      detail::code_scores<Arch, NV, 0>(codes, first, count, keys, q, f_);
  }
  void put(isize lane) noexcept {
    const std::uint32_t flip = simd::has_dot4_signed<Arch> ? 0 : 0x80808080U;
    std::uint8_t* to = q_ + lane / T::rows * T::rows * dp_ + 4 * (lane % T::rows);
    for (isize c = 0; c < dp_; c += 4) {
      std::uint32_t four;
      std::memcpy(&four, code_ + c, 4);
      four ^= flip;
      std::memcpy(to + c * T::rows, &four, 4);
    }
  }

  isize d_, dp_;
  std::uint8_t* q_;
  float *factor_, *slope_, *length_, *f_;
  std::int8_t* code_;
};

}  // namespace kernel
}  // namespace FOVEA_ABI
}  // namespace fovea
