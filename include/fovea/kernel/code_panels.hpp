// SPDX-License-Identifier: MIT
#pragma once
/// @file  Rounded keys in panels of 16, and the selection's pass over them for a few query rows, as in decoding: keys lie in the lanes.
///
///   8 bits   [keys / 16][ceil(d / 4)][16 keys][4]   code + 128 as u8, channels 4 w .. 4 w + 3: packed_keys of core/rows.hpp
///   4 bits   [keys / 16][ceil(d / 8)][16 keys][4]   byte i of word w: code + 8 of channel 8 w + i below, of 8 w + 4 + i above
///
/// Contract   peak and mass of a block as kernel/code_pass.hpp has them: sum_j chord2(s q'.k'_j) = mass 2^peak. A key without a step
///            (NaN) makes its block's mass NaN. Channels behind d count nothing.
/// Cost       d / 64 products of four a key and row, every register of codes read once for up to 4 rows; about a dozen operations a
///            register of keys for the sums: below what reading takes.

#include <cstring>

#include <fovea/kernel/code_pass.hpp>
#include <fovea/simd/reduce.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace kernel {

/// Where the codes of a head lie.
struct code_layout {
  static constexpr isize keys = 16;
  isize d = 0, words = 0;  ///< words of four bytes a key
  bool halves = false;     ///< two codes a byte

  code_layout() = default;
  code_layout(isize width, int levels) : d(width), halves(levels <= 7) { words = ceil_div(d, halves ? 8 : 4); }
  isize bytes(isize tokens) const { return ceil_div(tokens, keys) * keys * words * 4; }

  void put(std::uint8_t* to, isize t, const std::int8_t* code) const noexcept {
    std::uint8_t* at = to + t / keys * keys * words * 4 + t % keys * 4;
    isize first = 0;
    for (; !halves && 4 * first + 4 <= d; ++first, at += keys * 4) {
      std::uint32_t four;
      std::memcpy(&four, code + 4 * first, 4);
      four ^= 0x80808080U;
      std::memcpy(at, &four, 4);
    }
    for (isize w = first; w < words; ++w, at += keys * 4)
      for (isize i = 0; i < 4; ++i) {
        const auto of = [&](isize c, int middle) { return (c < d ? code[c] : 0) + middle; };
        at[i] = static_cast<std::uint8_t>(halves ? of(8 * w + i, 8) | of(8 * w + 4 + i, 8) << 4 : of(4 * w + i, 128));
      }
  }
  void get(const std::uint8_t* from, isize t, std::int8_t* code) const noexcept {
    const std::uint8_t* at = from + t / keys * keys * words * 4 + t % keys * 4;
    isize first = 0;
    for (isize w = 0; !halves && 4 * w + 4 <= d; ++w, first += 4) {
      std::uint32_t four;
      std::memcpy(&four, at + w * keys * 4, 4);
      four ^= 0x80808080U;
      std::memcpy(code + 4 * w, &four, 4);
    }
    for (isize c = first; c < d; ++c) {
      const isize w = halves ? c / 8 : c / 4, i = c % 4;
      const int byte = at[w * keys * 4 + i];
      code[c] = static_cast<std::int8_t>(!halves ? byte - 128 : (c % 8 < 4 ? byte & 15 : byte >> 4) - 8);
    }
  }
};

/// Up to `most` rounded query rows, and the pass of them.
template <class Arch>
class code_panels {
  using word = simd::words<Arch>;
  using P = simd::pack<float, Arch>;
  static constexpr isize W = word::size, panel = code_layout::keys;
  static_assert(P::size == W);

 public:
  static constexpr isize most = 4;

  code_panels(arena& memory, const code_layout& layout, isize block, isize rows) : at_(layout), block_(block) {
    const bool many = block % W == 0 && W * block <= 2048;
    chunk_ = ceil_div(many           ? W * block
                      : block <= 256 ? 256 / block * block
                      : block < 2048 ? block
                                     : 2048,
                      panel) *
             panel;
    q_ = memory.take<std::int32_t>(rows * span());
    start_ = memory.take<std::int32_t>(rows), factor_ = memory.take<float>(rows);
    f_ = memory.take<float>(most * ld_f());
    code_ = memory.take<std::int8_t>(span() * 4);
  }

  /// Row r: x [d], rounded to `levels`; factor: scale log2(e).
  void load(const float* x, float factor, int levels, isize r) noexcept {
    std::memset(code_, 0, static_cast<std::size_t>(span()) * 4);
    factor_[r] = factor * round_row<Arch>(x, at_.d, levels, code_);
    std::int32_t sum = 0;
    for (isize c = 0; c < at_.d; ++c) sum += code_[c];
    start_[r] = at_.halves ? -8 * sum : is_signed ? 0 : -128 * sum;
    std::memcpy(q_ + r * span(), code_, static_cast<std::size_t>(span()) * 4);
  }

  /// Keys that count nothing: of each of the first `stretches` stretches of `size` keys, `kept`.
  struct left_out {
    const std::int32_t* at = nullptr;
    isize size = 1, kept = 0, stretches = 0;
  };

  /// peak, mass [row][ld] of the first `past` blocks, all of whose keys there are. step [keys], and a panel more that may be read.
  void run(const std::uint8_t* codes, const float* step, isize rows, isize past, float* peak, float* mass, isize ld,
           const left_out& out = {}) noexcept {
    const isize last = past * block_;
    const isize whole = block_ <= chunk_ ? chunk_ / block_ * block_ : chunk_;
    for (isize a = 0, b = 0; a < last; a = b) {
      b = a + whole < last ? a + whole : last;
      const isize from = a / panel * panel, count = ceil_div(b - from, panel) * panel;
      for (isize r = 0; r < rows; r += most) {
        const isize some = rows - r < most ? rows - r : most;
        tile::with_constant<most>(some, [&](auto n) {
          if (at_.halves)
            scores<n, true>(codes + from * at_.words * 4, step + from, r, count);
          else
            scores<n, false>(codes + from * at_.words * 4, step + from, r, count);
        });
        for (isize x = a / out.size; x < out.stretches && x * out.size < b; ++x)
          for (isize z = x * out.kept; z < (x + 1) * out.kept; ++z)
            for (isize y = 0; y < some && out.at[z] >= a && out.at[z] < b; ++y)
              f_[y * ld_f() + out.at[z] - from] = -1e30F;  // finite: NaN is for keys without a step
        for (isize y = 0; y < some; ++y)
          fold(f_ + y * ld_f() + a - from, a, b, peak + (r + y) * ld, mass + (r + y) * ld);
      }
    }
  }

 private:
  static constexpr bool is_signed = simd::has_dot4_signed<Arch>;
  isize span() const { return at_.words * (at_.halves ? 2 : 1); }  // words of a query
  isize ld_f() const { return chunk_ + panel; }

  /// f_ [row][ld_f]: scores in log2 of `count` keys, whole panels. Words: of a key, 0: whatever they are.
  template <int R, bool Halves, isize Words>
  FOVEA_NOINLINE void scores(const std::uint8_t* codes, const float* step, isize row, isize count) noexcept {
    const isize words = Words > 0 ? Words : at_.words, size = words * (Halves ? 2 : 1);
    const std::int32_t* const q = q_ + row * size;
    P factor[R];
    word start[R];
    tile::unroll<R>(
        [&](auto r) FOVEA_INLINE_LAMBDA { factor[r] = P(factor_[row + r]), start[r] = word::splat(start_[row + r]); });
    for (isize j = 0; j < count; j += W) {
      const std::uint8_t* const x = codes + j / panel * panel * words * 4 + j % panel * 4;
      word acc[R];
      tile::unroll<R>([&](auto r) FOVEA_INLINE_LAMBDA { acc[r] = start[r]; });
      const auto word_of = [&](isize w) FOVEA_INLINE_LAMBDA {
        const word k = word::load(x + w * panel * 4);
        // While chunks of few words are summed, memory would be idle; with more the products hide it.
        if constexpr (Words > 0 && Words <= 16) simd::prefetch(x + w * panel * 4 + 8192, 64);
        tile::unroll<R>([&](auto r) FOVEA_INLINE_LAMBDA {
          if constexpr (Halves) {
            acc[r] = simd::dot4_small(acc[r], simd::low_halves(k), word::splat(q[r * size + 2 * w]));
            acc[r] = simd::dot4_small(acc[r], simd::high_halves(k), word::splat(q[r * size + 2 * w + 1]));
          } else if constexpr (is_signed) {
            acc[r] =
                simd::dot4_signed(acc[r], word::splat(q[r * size + w]), simd::xor_bits(k, simd::splat_i8<Arch>(-128)));
          } else {
            acc[r] = simd::dot4(acc[r], k, word::splat(q[r * size + w]));
          }
        });
      };
      if constexpr (Words > 0) {  // no branch to mispredict
        FOVEA_UNROLL
        for (isize w = 0; w < Words; ++w) word_of(w);
      } else {
        for (isize w = 0; w < words; ++w) word_of(w);
      }
      const P s = P::load(step + j);
      tile::unroll<R>(
          [&](auto r) FOVEA_INLINE_LAMBDA { (simd::to_float(acc[r]) * (s * factor[r])).store(f_ + r * ld_f() + j); });
    }
  }
  template <int R, bool Halves>
  void scores(const std::uint8_t* codes, const float* step, isize row, isize count) noexcept {
    constexpr isize narrow = Halves ? 8 : 16;  // d = 64
    if (at_.words == narrow)
      scores<R, Halves, narrow>(codes, step, row, count);
    else if (at_.words == 2 * narrow)
      scores<R, Halves, 2 * narrow>(codes, step, row, count);
    else
      scores<R, Halves, 0>(codes, step, row, count);
  }

  /// Scores x of keys [a, b) into the blocks that they belong to.
  void fold(const float* x, isize a, isize b, float* peak, float* mass) noexcept {
    if (block_ % W == 0 && (b - a) % (W * block_) == 0) {
      for (; a < b; a += W * block_, x += W * block_) fold_many(x, peak + a / block_, mass + a / block_);
      return;
    }
    for (isize y = a; y < b;) {
      const isize J = y / block_, end = (J + 1) * block_ < b ? (J + 1) * block_ : b;
      fold_one(x + y - a, end - y, peak + J, mass + J, y == J * block_);
      y = end;
    }
  }
  /// W whole blocks side by side.
  FOVEA_NOINLINE void fold_many(const float* x, float* peak, float* mass) noexcept {
    P top[W];
    for (isize i = 0; i < W; ++i) {
      top[i] = P::load(x + i * block_);
      for (isize c = W; c < block_; c += W) top[i] = simd::max(top[i], P::load(x + i * block_ + c));
    }
    const P magic(12582912.0F), whole = simd::max_each(top), near = (whole + magic) - magic;
    const P level = near - simd::select_greater(near, whole, P(1.0F), P(0.0F));
    level.store(peak);
    P sum[W];
    for (isize i = 0; i < W; ++i) {
      const P level_of(peak[i]);
      sum[i] = P(0.0F);
      for (isize c = 0; c < block_; c += W) {
        const P y = P::load(x + i * block_ + c);
        sum[i] = sum[i] + simd::fma(y, P(0.0F), chord_of_bits<Arch>(y - level_of));
      }
    }
    simd::sum_each(sum).store(mass);
  }
  /// `count` keys of one block; fresh: its first ones.
  static void fold_one(const float* x, isize count, float* peak, float* mass, bool fresh) noexcept {
    P top(-std::numeric_limits<float>::infinity()), sum(0.0F);
    const auto live = [&](isize c) {
      return static_cast<simd::lane_bits>(~std::uint64_t{0} >> (64 - (count - c < W ? count - c : W)));
    };
    for (isize c = 0; c < count; c += W) top = simd::max(top, simd::select(live(c), P::load(x + c), top));
    float level = std::floor(simd::highest(top));
    if (!(level - level == 0)) level = 0;
    for (isize c = 0; c < count; c += W) {
      const P y = P::load(x + c);
      sum = sum + simd::select(live(c), simd::fma(y, P(0.0F), chord_of_bits<Arch>(y - P(level))), P(0.0F));
    }
    float all = simd::reduce_add(sum);
    if (!fresh) {
      const float both = *peak > level ? *peak : level;
      all = all * std::exp2(level - both) + *mass * std::exp2(*peak - both);
      level = both;
    }
    *peak = level, *mass = all;
  }

  code_layout at_;
  isize block_, chunk_;
  std::int32_t *q_, *start_;
  float *factor_, *f_;
  std::int8_t* code_;
};

}  // namespace kernel
}  // namespace FOVEA_ABI
}  // namespace fovea
