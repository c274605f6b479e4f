// SPDX-License-Identifier: MIT
#pragma once
/// @file  Threshold skipping from its definition, in double: softmax_attention with `skip` in f32 and f64.
///
///   rows h n + i of a query group in tiles of R; blocks of K keys in the order 0, last, last but one, ..., 1; in each block
///   l_i = l_i + sum of p_ij over its keys,     key j is left out of the tile if p_ij <= skip l_i in every row i of it
///   o_i = sum over the others of p_ij v_j / sum over the others [+ sink],   lse_i of all keys,   skipped_i = sum left out / l_i
///
/// Contract   R and K are those of the loop: kernel::online_softmax<...>::tile_rows and block_keys. A share within rounding of `skip` may fall
///            on the other side in the loop. Groups of up to 8 rows skip nothing. No NaN. Slow on purpose.

#include <fovea/softmax/reference.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace reference {

class skip_twin {
 public:
  skip_twin(const softmax_attention& m, const problem& p, isize rows, isize keys)
      : m_(m), p_(p), s_(p.shape()), rows_(rows), keys_(keys) {}

  /// Writes p.out, p.lse and p.skipped.
  void prefill() {
    for (isize b = 0; b < s_.B; ++b)
      for (isize g = 0; g < s_.G; ++g) {
        k_ = rows_of_head(p_.k, b, g, m_.turn, [&](isize j) { return position(b, j); });
        const isize all = s_.group() * s_.n;
        for (isize r = 0; r < all; r += rows_) tile(b, g, r, std::min(r + rows_, all));
      }
  }

 private:
  struct row {
    std::vector<double> weight, o;  // [m], [e]
    double top = 0, all = 0, lost = 0;
  };
  isize position(isize b, isize j) const {
    return p_.positions != nullptr && j >= s_.m - s_.n ? p_.positions[b * s_.n + j - (s_.m - s_.n)] : j;
  }

  row weigh(isize b, isize h, isize i) const {
    constexpr double none = -std::numeric_limits<double>::infinity();
    row x{std::vector<double>(static_cast<std::size_t>(s_.m)), std::vector<double>(static_cast<std::size_t>(s_.e))};
    mask_site at = m_.site(s_, b);
    at.h = h;
    const auto q = rows_of_head(p_.q.part(b, h, 1).slice(i, 1), 0, 0, m_.turn,
                                [&](isize) { return position(b, s_.m - s_.n + i); });
    x.top = scores_of_row(m_, s_, at, i, q.data(), k_, x.weight.data());
    const double shift = x.top == none ? 0 : x.top;
    for (double& w : x.weight) w = w == none ? 0 : std::exp(w - shift);
    if (m_.sinks != nullptr) x.all = std::exp(static_cast<double>(m_.sinks[h]) - shift);
    return x;
  }

  void tile(isize b, isize g, isize first, isize last) {
    std::vector<row> rows;
    for (isize r = first; r < last; ++r) rows.push_back(weigh(b, g * s_.group() + r / s_.n, r % s_.n));
    const isize blocks = (s_.m + keys_ - 1) / keys_;
    for (isize x = 0; x < blocks; ++x) block(b, g, x == 0 ? 0 : blocks - x, rows);
    for (isize r = first; r < last; ++r) {
      const row& x = rows[static_cast<std::size_t>(r - first)];
      const isize h = g * s_.group() + r / s_.n, i = r % s_.n;
      const double sum = x.all - x.lost;
      for (isize c = 0; c < s_.e; ++c) p_.out.set(b, h, i, c, sum > 0 ? x.o[static_cast<std::size_t>(c)] / sum : 0.0);
      if (p_.lse) p_.lse.set(b, h, i, 0, x.all > 0 ? x.top + std::log(x.all) : x.top);
      if (p_.skipped) p_.skipped.set(b, h, i, 0, x.lost > 0 ? x.lost / x.all : 0.0);
    }
  }

  void block(isize b, isize g, isize which, std::vector<row>& rows) {
    const isize j0 = which * keys_, j1 = std::min(j0 + keys_, s_.m);
    for (row& x : rows)
      for (isize j = j0; j < j1; ++j) x.all += x.weight[static_cast<std::size_t>(j)];
    const bool few = s_.group() * s_.n <= 8;
    for (isize j = j0; j < j1; ++j) {
      bool keep = few;
      for (const row& x : rows)
        keep = keep || x.weight[static_cast<std::size_t>(j)] > static_cast<double>(m_.skip) * x.all;
      for (row& x : rows) {
        const double w = x.weight[static_cast<std::size_t>(j)];
        if (!keep) x.lost += w;
        for (isize c = 0; keep && c < s_.e; ++c) x.o[static_cast<std::size_t>(c)] += w * p_.v.get(b, g, j, c);
      }
    }
  }

  const softmax_attention& m_;
  const problem& p_;
  shape s_;
  isize rows_, keys_;
  std::vector<double> k_;  // of one head
};

}  // namespace reference
}  // namespace FOVEA_ABI
}  // namespace fovea
