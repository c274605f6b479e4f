// SPDX-License-Identifier: MIT
#pragma once
/// @file  Linformer from its definition, in double: project every head's keys and values, then a two-pass softmax over what a row sees.
///
/// Contract   an item with no keys, or a row before the first key, gives zeros and LSE = -inf. Slow on purpose.

#include <cmath>
#include <limits>
#include <vector>

#include <fovea/linformer.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace reference {
namespace detail {

using rows = std::vector<std::vector<double>>;

/// The slots of rows [first, first + length) of x, head g; those that no row feeds are left out.
inline rows project(const linformer_attention& m, bool values, const tensor_ref& x, isize b, isize g, isize first,
                    isize length) {
  const double none = -std::numeric_limits<double>::infinity();
  const view<const float>& E = values && m.F.data != nullptr ? m.F : m.E;
  const auto taps = values && !m.wv.empty() ? m.wv : m.wk;
  rows out;
  for (isize s = 0; s < m.slots_for() && length > 0; ++s) {
    std::vector<double> slot(static_cast<std::size_t>(x.width), m.projection == sequence_projection::max ? none : 0.0);
    isize fed = 0;
    for (isize i = 0; i < length; ++i) {
      double w = 1;
      if (m.projection == sequence_projection::linear) {
        w = static_cast<double>(E(0, E.heads == 1 ? 0 : g, i, s));
      } else if (m.projection == sequence_projection::conv) {
        const isize t = i - s * static_cast<isize>(taps.size());
        if (t < 0 || t >= static_cast<isize>(taps.size())) continue;
        w = static_cast<double>(taps[static_cast<std::size_t>(t)]);
      } else if (i < s * length / m.slots_for() || i >= (s + 1) * length / m.slots_for()) {
        continue;
      }
      ++fed;
      for (isize c = 0; c < x.width; ++c) {
        double& y = slot[static_cast<std::size_t>(c)];
        const double z = x.get(b, g, first + i, c);
        y = m.projection == sequence_projection::max ? (z > y ? z : y) : y + w * z;
      }
    }
    if (fed == 0) continue;
    if (m.projection == sequence_projection::mean)
      for (double& y : slot) y /= static_cast<double>(fed);
    out.push_back(slot);
  }
  return out;
}

inline void append_rows(rows& to, const rows& from) { to.insert(to.end(), from.begin(), from.end()); }
inline std::vector<double> row_of(const tensor_ref& x, isize b, isize g, isize i) {
  std::vector<double> r(static_cast<std::size_t>(x.width));
  for (isize c = 0; c < x.width; ++c) r[static_cast<std::size_t>(c)] = x.get(b, g, i, c);
  return r;
}

/// One row of softmax attention over explicit keys and values.
inline void attend_row(const problem& p, isize b, isize h, isize i, double scale, const rows& keys,
                       const rows& values) {
  const double none = -std::numeric_limits<double>::infinity();
  std::vector<double> score(keys.size());
  double top = none, sum = 0;
  for (std::size_t j = 0; j < keys.size(); ++j) {
    for (isize c = 0; c < p.q.width; ++c)
      score[j] += scale * p.q.get(b, h, i, c) * keys[j][static_cast<std::size_t>(c)];
    top = score[j] > top ? score[j] : top;
  }
  for (double& x : score) x = std::exp(x - top), sum += x;
  for (isize c = 0; c < p.v.width; ++c) {
    double o = 0;
    for (std::size_t j = 0; j < keys.size(); ++j) o += score[j] * values[j][static_cast<std::size_t>(c)];
    p.out.set(b, h, i, c, keys.empty() ? 0.0 : o / sum);
  }
  if (p.lse) p.lse.set(b, h, i, 0, keys.empty() ? none : top + std::log(sum));
}

}  // namespace detail

inline void prefill(const linformer_attention& m, const problem& p) {
  const shape s = p.shape();
  for (isize b = 0; b < s.B; ++b)
    for (isize g = 0; g < s.G; ++g) {
      std::vector<detail::rows> keys, values;  // one entry: everything; or one for each block that is whole
      for (isize first = 0; m.causal ? first + m.block <= s.m : first == 0; first += m.causal ? m.block : 1) {
        keys.push_back(detail::project(m, false, p.k, b, g, first, m.causal ? m.block : m.keys_of(b, s.m)));
        values.push_back(detail::project(m, true, p.v, b, g, first, m.causal ? m.block : m.keys_of(b, s.m)));
      }
      for (isize h = g * s.group(); h < (g + 1) * s.group(); ++h)
        for (isize i = 0; i < s.n; ++i) {
          const isize position = i + s.m - s.n, own = m.causal && position >= 0 ? position / m.block : m.causal ? 0 : 1;
          detail::rows seen_keys, seen_values;
          for (isize x = 0; x < own; ++x) {
            detail::append_rows(seen_keys, keys[static_cast<std::size_t>(x)]);
            detail::append_rows(seen_values, values[static_cast<std::size_t>(x)]);
          }
          for (isize j = own * m.block; m.causal && j <= position; ++j) {
            seen_keys.push_back(detail::row_of(p.k, b, g, j));
            seen_values.push_back(detail::row_of(p.v, b, g, j));
          }
          detail::attend_row(p, b, h, i, m.scale_for(s), seen_keys, seen_values);
        }
    }
}

}  // namespace reference
}  // namespace FOVEA_ABI
}  // namespace fovea
