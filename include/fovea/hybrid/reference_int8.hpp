// SPDX-License-Identifier: MIT
#pragma once
/// @file  Hybrid attention by the int8 recipe (hybrid/int8.hpp) row by row: integers as the recipe says, everything else in double.
///
///   t_j = round(64 log2(e) scale q8 . k8 + fold_j),   M = max of t over the row's keys of 32 slots,   p_j = (2^(15 - (M - t_j) / 64) + dither) >> 7
///
/// A slot is four neighbouring keys of a tile's list (its computed blocks, then its pooled tokens, then its kept keys); a window of keys or a
/// list that ends, ends the slots, too.
///
/// Contract   finite numbers, block_q >= 4, d <= 256; rows that the loop would leave to f32 are not told apart. Rows are rounded in float, as the loop rounds them.
///            `predicted` [B H n]: the squared error of each row that independent roundings would make, from the scales alone.

#include <fovea/hybrid/reference.hpp>
#include <fovea/softmax/reference_int8.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace reference {

class hybrid_int8_twin {
  /// A token of a head: a key, or the mean of some.
  struct token {
    int8_row k, v;
    int fold = 0;        // 64 log2 of the scale of v
    double weight = 0;   // 64 log2 of what the token stands for
    double inverse = 0;  // 1 / scale of v
  };
  struct row_state {
    int8_row q;
    isize lane = 0;
    double top = -std::numeric_limits<double>::infinity(), sum = 0;
    std::vector<double> o;
  };
  /// What a row has taken in.
  struct taken {
    const token* from;
    double t, height;
    bool counted;  // its rounded p is in the denominator, too
  };
  /// The last key that the row sees, and those of the first and last row of its tile.
  struct sight {
    isize row = PTRDIFF_MAX / 2, first = PTRDIFF_MAX / 2, last = PTRDIFF_MAX / 2;
  };
  struct slot_key {
    isize j;
    bool visible, plain;
  };

 public:
  hybrid_int8_twin(const hybrid_attention& m, const problem& p) : m_(m), p_(p), s_(p.shape()) {}

  /// Writes p.out and p.lse. Returns `predicted`, if it is wanted.
  std::vector<double> prefill(bool predict = false) {
    std::vector<double> all;
    for (isize b = 0; b < s_.B; ++b)
      for (isize h = 0; h < s_.H; ++h) {
        const isize g = h / s_.group();
        const auto kept = hybrid_detail::kept_keys_of(m_, p_, b, g);
        const auto pools = hybrid_detail::pools_of(m_, p_, b, g, kept);
        const auto fates = block_fates(m_, p_, b, h);
        round(b, g, pools);
        for (isize i = 0; i < s_.n; ++i)
          all.push_back(row(b, h, i, fates[static_cast<std::size_t>(i / m_.block_q)], pools, kept, predict));
      }
    return all;
  }

 private:
  static token rounded(const std::vector<float>& k, const std::vector<float>& v, double members) {
    token x;
    x.k = detail::round_row(k, true), x.v = detail::round_value(v, x.fold);
    x.weight = std::nearbyint(64 * std::log2(members)), x.inverse = 1 / x.v.scale;
    return x;
  }
  void round(isize b, isize g, const std::vector<hybrid_detail::block_of_keys>& pools) {
    keys_.clear(), pool_.clear();
    for (isize j = 0; j < s_.m; ++j)
      keys_.push_back(rounded(detail::floats_of(p_.k, b, g, j), detail::floats_of(p_.v, b, g, j), 1));
    for (const auto& x : pools)
      pool_.push_back(rounded({x.mean_k.begin(), x.mean_k.end()}, {x.mean_v.begin(), x.mean_v.end()},
                              static_cast<double>(std::max<isize>(x.count, 1))));
  }

  double row(isize b, isize h, isize i, const std::vector<int>& fate,
             const std::vector<hybrid_detail::block_of_keys>& pools, const std::vector<bool>& kept, bool predict) {
    row_state r;
    r.q = detail::round_row(detail::floats_of(p_.q, b, h, i), true);
    r.lane = (i - i / m_.block_q * m_.block_q) % 16;
    r.o.assign(static_cast<std::size_t>(s_.e), 0.0);
    taken_.clear();
    std::vector<isize> computed, pooled, small;
    for (std::size_t J = 0; J < fate.size(); ++J)
      if (fate[J] == 1) computed.push_back(static_cast<isize>(J));
    for (std::size_t x = 0; x < pools.size(); ++x)
      if (fate[static_cast<std::size_t>(pools[x].first / m_.block_k)] == 2 && pools[x].count > 0)
        pooled.push_back(static_cast<isize>(x));
    const isize shift = m_.align.position({b, h, s_.n, s_.m, s_.H, s_.G}, 0);
    for (std::size_t j = 0; j < kept.size(); ++j) {
      const isize keys = static_cast<isize>(std::ceil(1 / m_.keep_small - 1e-9)),
                  stretch = (keys + m_.block_k - 1) / m_.block_k * m_.block_k, y = static_cast<isize>(j);
      const bool over = !m_.is_causal || (y / stretch + 1) * stretch <= i / m_.block_q * m_.block_q + shift;
      if (kept[j] && over && fate[j / static_cast<std::size_t>(m_.block_k)] != 1) small.push_back(y);
    }
    const isize stop = std::min({i / m_.block_q * m_.block_q + m_.block_q, i - r.lane + 16, s_.n});  // of the tile
    const sight own = m_.is_causal ? sight{i + shift, i - r.lane + shift, stop - 1 + shift} : sight{};
    list(r, keys_, computed, m_.block_k, own);
    list(r, pool_, pooled, 1, {});
    list(r, keys_, small, 1, {});
    for (isize c = 0; c < s_.e; ++c) {
      double& x = r.o[static_cast<std::size_t>(c)];
      p_.out.set(b, h, i, c, x = r.sum > 0 ? x / r.sum : 0);
    }
    const double lse = r.sum > 0 ? r.top + std::log2(r.sum / 255) : -std::numeric_limits<double>::infinity();
    if (p_.lse) p_.lse.set(b, h, i, 0, lse * 0.6931471805599453);
    return predict && r.sum > 0 ? predicted(r, lse) : 0;
  }

  void list(row_state& r, const std::vector<token>& tokens, const std::vector<isize>& blocks, isize size,
            const sight& at) {
    const isize all = static_cast<isize>(tokens.size()), window = kernel::sparse_int8<simd::native>::window(s_.d, s_.e);
    if (blocks.empty() || all == 0) return;
    const isize known = std::min(at.first + 1, (blocks.back() + 1) * size), gap = size < 8 ? 8 : 0;
    std::vector<bool> listed(static_cast<std::size_t>(all), false);
    for (const isize J : blocks)
      for (isize j = J * size; j < std::min((J + 1) * size, all); ++j) listed[static_cast<std::size_t>(j)] = true;
    std::vector<slot_key> slots;
    const auto flush = [&] { absorb(r, tokens, slots), slots.clear(); };
    for (isize base = 0; base < all; base += window) {
      const isize end = std::min(base + window, all);
      for (std::size_t x = 0, y = 0; x < blocks.size() && blocks[x] * size < end; x = y) {
        y = x + 1;
        if ((blocks[x] + 1) * size <= base) continue;
        while (y < blocks.size() && (blocks[y] - blocks[y - 1] - 1) * size <= gap && blocks[y] * size < end) ++y;
        const isize first = std::max(blocks[x] * size, base),
                    stop = std::min({(blocks[y - 1] + 1) * size, end, at.last + 1});
        for (isize j = first / 4 * 4; j < stop; j += 4) {
          if (slots.size() == 128) flush();
          for (isize z = j; z < j + 4; ++z)
            slots.push_back({z, z >= first && z < stop && listed[static_cast<std::size_t>(z)] && z <= at.row,
                             j / 16 * 16 + 16 <= known});
        }
      }
      flush();
    }
  }

  void absorb(row_state& r, const std::vector<token>& tokens, const std::vector<slot_key>& slots) {
    const double none = -std::numeric_limits<double>::infinity(), log2e = 1.4426950408889634;
    std::vector<double> t(slots.size(), none);
    double high = none;
    for (std::size_t x = 0; x < slots.size(); ++x) {
      if (!slots[x].visible) continue;
      const token& k = tokens[static_cast<std::size_t>(slots[x].j)];
      double dot = 0;
      for (std::size_t c = 0; c < r.q.codes.size(); ++c) dot += r.q.codes[c] * k.k.codes[c];
      t[x] = std::nearbyint(64 * log2e * m_.scale_for(s_) * r.q.scale * k.k.scale * dot + k.fold + k.weight);
      high = std::fmax(high, t[x]);
    }
    if (high == none) return;
    if (high / 64 > r.top) {
      const double shrink = std::exp2(r.top - high / 64);
      for (double& x : r.o) x *= shrink;
      r.sum *= shrink, r.top = high / 64;
    }
    const double below = std::exp2(high / 64 - r.top);
    double near = 0, exact = 0, coarsest = 0;
    const std::size_t before = taken_.size();
    for (std::size_t x = 0; x < slots.size(); ++x) {
      const auto [integers, largest] = part(tokens, slots[x].j / 16 * 16);
      const bool counts = slots[x].plain && integers;
      if (counts) coarsest = std::fmax(coarsest, largest);
      if (t[x] == none) continue;
      const token& k = tokens[static_cast<std::size_t>(slots[x].j)];
      const double apart = high - t[x];
      const int d = apart > 32767 ? 32767 : static_cast<int>(apart);
      const int p15 = d >> 6 > 15 ? 0 : simd::detail::exp2_entry(d & 63) >> (d >> 6);
      const int p8 = (p15 + kernel::detail::int8_dither(static_cast<int>(x), static_cast<int>(r.lane))) >> 7;
      for (std::size_t c = 0; c < r.o.size(); ++c) r.o[c] += below * p8 * k.v.codes[c];
      const double fine = 255 * std::exp2(-d / 64.0) * k.inverse;
      exact += fine, near += counts ? p8 * k.inverse : fine;
      taken_.push_back({&k, t[x], high, counts});
    }
    const bool again = near < 32 * coarsest;
    r.sum += below * (again ? exact : near);
    for (std::size_t x = before; again && x < taken_.size(); ++x) taken_[x].counted = false;
  }
  /// Are the scales of 16 tokens alike, and the largest of their inverses.
  static std::pair<bool, double> part(const std::vector<token>& tokens, isize j) {
    double least = 1e300, most = 0;
    for (isize y = j; y < std::min<isize>(j + 16, static_cast<isize>(tokens.size())); ++y) {
      const double x = tokens[static_cast<std::size_t>(y)].inverse;
      least = std::fmin(least, x), most = std::fmax(most, x);
    }
    return {most <= 16 * least, most};
  }

  /// Variances of independent roundings: of a code 1/12, of a score (1/64 octave) 1/12, of p with its dither at most 1/4.
  double predicted(const row_state& r, double lse) const {
    const std::size_t d = r.q.exact.size(), e = r.o.size();
    const double qq = detail::dot(r.q.exact, r.q.exact), grid = 0.6931471805599453 / 64, scale = m_.scale_for(s_);
    std::vector<double> turned(e * d, 0.0);  // d o / d score . d score / d q
    double sum = 0;
    for (const taken& x : taken_) {
      const double vs = x.from->v.scale, w = std::exp2(x.t / 64 - lse) / vs,
                   step = std::exp2(x.height / 64 - lse) / 255;
      double apart = 0, apart8 = 0;
      for (std::size_t c = 0; c < e; ++c) {
        const double a = x.from->v.exact[c] - r.o[c], y = x.from->v.codes[c] - (x.counted ? r.o[c] / vs : 0.0);
        apart += a * a, apart8 += y * y;
        for (std::size_t z = 0; z < d; ++z) turned[c * d + z] += w * a * x.from->k.exact[z];
      }
      const double of_weight = x.from->weight == 0 ? 0 : grid * grid;
      sum += w * w * apart * (scale * scale * qq * x.from->k.scale * x.from->k.scale + grid * grid + of_weight) / 12;
      sum += w * w * vs * vs * static_cast<double>(e) / 12 + step * step * apart8 / 4;
    }
    return sum + scale * scale * r.q.scale * r.q.scale / 12 * detail::dot(turned, turned);
  }

  const hybrid_attention& m_;
  const problem& p_;
  shape s_;
  std::vector<token> keys_, pool_;
  std::vector<taken> taken_;
};

}  // namespace reference
}  // namespace FOVEA_ABI
}  // namespace fovea
