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
inline rows project(const linformer_attention& m, bool values, const tensor_ref& x, isize b, isize g, isize first, isize length) {
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
inline void attend_row(const problem& p, isize b, isize h, isize i, double scale, const rows& keys, const rows& values) {
  const double none = -std::numeric_limits<double>::infinity();
  std::vector<double> score(keys.size());
  double top = none, sum = 0;
  for (std::size_t j = 0; j < keys.size(); ++j) {
    for (isize c = 0; c < p.q.width; ++c) score[j] += scale * p.q.get(b, h, i, c) * keys[j][static_cast<std::size_t>(c)];
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
    for (isize h = 0; h < s.H; ++h)
      for (isize i = 0; i < s.n; ++i) {
        const isize g = h / s.group(), position = i + s.m - s.n;
        detail::rows keys, values;
        if (!m.causal) {
          keys = detail::project(m, false, p.k, b, g, 0, m.keys_of(b, s.m));
          values = detail::project(m, true, p.v, b, g, 0, m.keys_of(b, s.m));
        } else if (position >= 0) {
          const isize own = position / m.block * m.block;
          for (isize first = 0; first < own; first += m.block) {
            detail::append_rows(keys, detail::project(m, false, p.k, b, g, first, m.block));
            detail::append_rows(values, detail::project(m, true, p.v, b, g, first, m.block));
          }
          for (isize j = own; j <= position; ++j) keys.push_back(detail::row_of(p.k, b, g, j)), values.push_back(detail::row_of(p.v, b, g, j));
        }
        detail::attend_row(p, b, h, i, m.scale_for(s), keys, values);
      }
}

}  // namespace reference
}  // namespace FOVEA_ABI
}  // namespace fovea
