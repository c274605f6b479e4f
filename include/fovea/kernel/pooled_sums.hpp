// SPDX-License-Identifier: MIT
#pragma once
/// @file  What the pooled tokens of query rows add up to, beside a selection by mean keys: its scores and weights are those of the tokens.
///
///   o_r = sum_{J pooled} w_rJ mean(v_J)      l_r = sum_{J pooled} w_rJ      w_rJ = n_J 2^(s q_r.mean(k_J) - m_r), as the selection has them
///
/// What is left is one product with the mean values, W rows at a time. Every block before the query block is multiplied: few are computed, and
/// those have weight 0.
///
/// Contract   a unit is the rows of a query block, in tiles of `height` rows; its sums are the start of those tiles. done(unit) says
///            whether there are any: weights that are not finite, or query blocks that were not in one panel, are left to the caller.
/// Cost       2 e flops a row and block.      Reference  hybrid/reference.hpp.

#include <fovea/core/workspace.hpp>
#include <fovea/kernel/block_choose.hpp>
#include <fovea/kernel/sparse_panels.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace kernel {

template <class Arch, class Acc>
class pooled_sums {
  using P = simd::pack<Acc, Arch>;
  static constexpr isize W = P::size;
  static constexpr isize chunk = 128;  // blocks whose weights and values stay in L1
  static constexpr int columns = W == 16 ? 16 : 8;

 public:
  pooled_sums() = default;
  /// `blocks` key blocks; units of `tiles` tiles of `height` rows.
  pooled_sums(arena& memory, isize units, isize tiles, isize height, isize blocks, isize e)
      : e_(e), height_(height), tiles_(tiles) {
    o_ = memory.take<Acc>(units * tiles * e * height);
    m_ = memory.take<Acc>(units * tiles * height), l_ = memory.take<Acc>(units * tiles * height);
    done_ = memory.take<std::uint8_t>(units);
    some_ = memory.take<Acc>(chunk * W), part_ = memory.take<Acc>(e * W);
    held_ = memory.take<Acc>(blocks), share_ = memory.take<Acc>(blocks);
  }

  bool on() const { return v_ != nullptr; }
  /// The mean values [blocks][e] of the calls to come, of `members` of the `size` keys of their blocks; v null: no sums.
  void open(const Acc* v, const std::int32_t* members, isize size, isize keys, isize units) {
    v_ = v;
    for (isize u = 0; v != nullptr && u < units; ++u) done_[u] = 0;
    for (isize J = 0; v != nullptr && J * size < keys; ++J)
      held_[J] = static_cast<Acc>(members[J]) / static_cast<Acc>(size < keys - J * size ? size : keys - J * size);
  }
  bool done(isize unit) const { return v_ != nullptr && done_[unit] != 0; }
  const Acc* o(isize unit, isize tile) const { return o_ + (unit * tiles_ + tile) * e_ * height_; }
  const Acc* m(isize unit, isize tile) const { return m_ + (unit * tiles_ + tile) * height_; }
  const Acc* l(isize unit, isize tile) const { return l_ + (unit * tiles_ + tile) * height_; }

  /// Before the vectors of a unit.
  void begin(isize unit) noexcept {
    for (isize x = 0; x < tiles_ * height_; ++x) {
      m_[unit * tiles_ * height_ + x] = -std::numeric_limits<Acc>::infinity();
      l_[unit * tiles_ * height_ + x] = Acc(0);
    }
    std::fill_n(o_ + unit * tiles_ * height_ * e_, tiles_ * height_ * e_, Acc(0));
    done_[unit] = 1;
  }
  /// A vector of rows: lanes [low, high) are rows `row`, row + 1, ... of the unit. weight [past][W], of blocks of `size` keys, relative to 2^top.
  void add(isize unit, isize row, isize low, isize high, const Acc* weight, P top, isize past,
           const std::uint8_t* fate) noexcept {
    if (done_[unit] == 0) return;
    for (isize J = 0; J < past; ++J) share_[J] = fate[J] == pooled ? held_[J] : Acc(0);
    std::fill_n(part_, e_ * W, Acc(0));
    P sum[2] = {P(Acc(0)), P(Acc(0))};
    for (isize J = 0; J < past; J += chunk) {
      const isize count = past - J < chunk ? past - J : chunk;
      for (isize y = 0; y < count; ++y) {
        const P w = P::load(weight + (J + y) * W) * P(share_[J + y]);
        w.store(some_ + y * W);
        sum[y % 2] = sum[y % 2] + w;
      }
      product(v_ + J * e_, count);
    }
    const P all = sum[0] + sum[1];
    const auto live = static_cast<simd::lane_bits>((~std::uint64_t{0} >> (64 - (high - low))) << low);
    const P odd = simd::select(live, all * P(Acc(0)) + top * P(Acc(0)), P(Acc(0)));
    if (!(simd::reduce_add(odd) == Acc(0))) {
      done_[unit] = 0;
      return;
    }
    spread(unit, row, low, high, all, top);
  }

 private:
  /// part_ [e][W] += V^T some_ for `count` blocks.
  void product(const Acc* v, isize count) noexcept {
    alignas(64) Acc one[W];
    for (Acc& x : one) x = Acc(1);
    detail::line_feed none;
    const detail::sparse_run<Acc> run{v, 0, static_cast<std::int16_t>(count), false};
    detail::in_panels<columns>(e_, [&](auto m, isize c) {
      detail::sparse_values<Arch, Acc, m, 1>(&run, 1, c, e_, some_, nullptr, one, part_ + c * W, none);
    });
  }
  /// The lanes into the rows of their tiles.
  void spread(isize unit, isize row, isize low, isize high, P all, P top) noexcept {
    Acc *const o = o_ + unit * tiles_ * e_ * height_, *const m = m_ + unit * tiles_ * height_,
               *const l = l_ + unit * tiles_ * height_;
    if (low == 0 && row % W == 0 && height_ % W == 0) {
      Acc* to = o + row / height_ * e_ * height_ + row % height_;
      for (isize c = 0; c < e_; ++c) P::load(part_ + c * W).store(to + c * height_);
      top.store(m + row), all.store(l + row);
      return;
    }
    alignas(64) Acc tops[W], sums[W];
    top.store(tops), all.store(sums);
    for (isize x = low; x < high; ++x) {
      const isize r = row + x - low;
      Acc* to = o + r / height_ * e_ * height_ + r % height_;
      for (isize c = 0; c < e_; ++c) to[c * height_] = part_[c * W + x];
      m[r] = tops[x], l[r] = sums[x];
    }
  }

  const Acc* v_ = nullptr;
  isize e_ = 0, height_ = 0, tiles_ = 0;
  Acc *o_ = nullptr, *m_ = nullptr, *l_ = nullptr;  // of the units
  Acc *held_ = nullptr,
      *share_ = nullptr;  // [blocks]: the part of its keys that it stands for; 0 where it is not pooled
  Acc *some_ = nullptr, *part_ = nullptr;  // [chunk][W], [e][W]
  std::uint8_t* done_ = nullptr;
};

}  // namespace kernel
}  // namespace FOVEA_ABI
}  // namespace fovea
