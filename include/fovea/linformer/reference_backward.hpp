// SPDX-License-Identifier: MIT
#pragma once
/// @file  The gradients of linformer_attention from the definition of its forward twin, in double.
///
///   o = sum_j p_j v'_j,  dp_j = do . v'_j,  ds_j = p_j (dp_j - sum_x p_x dp_x);   dv'_j += p_j do,  dk'_j += scale ds_j q,  dq = scale sum_j ds_j k'_j
///
/// What a row sees is a list of slots and keys; a slot's gradient goes to the rows that fed it: E_is, 1 / rows, w_t, or, for max, to
/// the first row that holds the maximum of the column.
///
/// Contract   plain loops, O(n m) of everything. dE and dF: of E and F, [heads, positions, slots]; of a convolution [taps]; empty for pooling.
///            Without F (wv) dE has the share of the values and dF is empty.

#include <fovea/linformer/reference.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace reference {

struct linformer_gradients {
  std::vector<double> dq, dk, dv;  ///< [B, H, n, d], [B, G, m, d], [B, G, m, e]
  std::vector<double> dE, dF;
};

namespace detail {

/// One side of a problem, keys or values: where its gradients go.
struct projected_side {
  const linformer_attention& m;
  const tensor_ref& x;
  bool values;
  std::vector<double>&dx, &weights;

  double& at(isize b, isize g, isize i, isize c) const {
    return dx[static_cast<std::size_t>(((b * x.heads + g) * x.length + i) * x.width + c)];
  }
  /// Rows [first, first + length) fed the slots of which `d` are the gradients.
  void back(isize b, isize g, isize first, isize length, const rows& d) const {
    using kind = sequence_projection;
    const view<const float>& E = values && m.F.data != nullptr ? m.F : m.E;
    const auto taps = values && !m.wv.empty() ? m.wv : m.wk;
    const isize all = m.slots_for();
    std::size_t slot = 0;
    for (isize s = 0; s < all && length > 0; ++s) {
      isize low = 0, high = length;
      if (m.projection == kind::conv) {
        low = s * static_cast<isize>(taps.size()), high = low + static_cast<isize>(taps.size());
        high = high < length ? high : length;
      } else if (m.projection != kind::linear) {
        low = s * length / all, high = (s + 1) * length / all;
      }
      if (low >= high) continue;
      for (isize c = 0; c < x.width; ++c) {
        const double y = d[slot][static_cast<std::size_t>(c)];
        isize largest = low;
        for (isize i = low; i < high; ++i)
          if (x.get(b, g, first + i, c) > x.get(b, g, first + largest, c)) largest = i;
        for (isize i = low; i < high; ++i) {
          double w = 1 / static_cast<double>(high - low);
          if (m.projection == kind::max) w = i == largest ? 1 : 0;
          if (m.projection == kind::conv) w = static_cast<double>(taps[static_cast<std::size_t>(i - low)]);
          if (m.projection == kind::linear) w = static_cast<double>(E(0, E.heads == 1 ? 0 : g, i, s));
          at(b, g, first + i, c) += w * y;
          const double by_weight = x.get(b, g, first + i, c) * y;
          if (m.projection == kind::conv) weights[static_cast<std::size_t>(i - low)] += by_weight;
          if (m.projection == kind::linear)
            weights[static_cast<std::size_t>(((E.heads == 1 ? 0 : g) * E.length + i) * E.width + s)] += by_weight;
        }
      }
      ++slot;
    }
  }
};

/// One row's share: dq in place, dk and dv in the order of what it sees.
inline void row_back(const problem& p, const tensor_ref& dout, isize b, isize h, isize i, double scale,
                     const rows& keys, const rows& values, double* dq, rows& dk, rows& dv) {
  double top = -std::numeric_limits<double>::infinity(), sum = 0, mean = 0;
  std::vector<double> weight(keys.size()), by(keys.size());
  for (std::size_t j = 0; j < keys.size(); ++j) {
    for (std::size_t c = 0; c < keys[j].size(); ++c)
      weight[j] += scale * p.q.get(b, h, i, static_cast<isize>(c)) * keys[j][c];
    for (std::size_t c = 0; c < values[j].size(); ++c) by[j] += dout.get(b, h, i, static_cast<isize>(c)) * values[j][c];
    top = weight[j] > top ? weight[j] : top;
  }
  for (double& w : weight) w = std::exp(w - top), sum += w;
  for (std::size_t j = 0; j < keys.size(); ++j) weight[j] /= sum, mean += weight[j] * by[j];
  for (std::size_t j = 0; j < keys.size(); ++j) {
    const double ds = scale * weight[j] * (by[j] - mean);
    for (std::size_t c = 0; c < keys[j].size(); ++c) {
      dq[c] += ds * keys[j][c];
      dk[j][c] += ds * p.q.get(b, h, i, static_cast<isize>(c));
    }
    for (std::size_t c = 0; c < values[j].size(); ++c) dv[j][c] += weight[j] * dout.get(b, h, i, static_cast<isize>(c));
  }
}
inline rows zeros_like(const rows& x) {
  rows out;
  for (const auto& row : x) out.emplace_back(row.size(), 0.0);
  return out;
}

/// Keys or values of one KV head: the slots of the item, or of each block, and their gradients.
struct head_slots {
  std::vector<rows> slots, gradients;

  /// The slots of the first `count` blocks, then rows [first, last) of x as they are.
  rows seen(isize count, const tensor_ref& x, isize b, isize g, isize first, isize last) const {
    rows out;
    for (isize y = 0; y < count; ++y) append_rows(out, slots[static_cast<std::size_t>(y)]);
    for (isize j = first; j < last; ++j) out.push_back(row_of(x, b, g, j));
    return out;
  }
  /// Gradients in that order, to where they belong.
  void back(isize count, const projected_side& to, isize b, isize g, isize first, isize last, const rows& d) {
    std::size_t at = 0;
    for (isize y = 0; y < count; ++y)
      for (auto& slot : gradients[static_cast<std::size_t>(y)]) {
        for (std::size_t c = 0; c < slot.size(); ++c) slot[c] += d[at][c];
        ++at;
      }
    for (isize j = first; j < last; ++j, ++at)
      for (std::size_t c = 0; c < d[at].size(); ++c) to.at(b, g, j, static_cast<isize>(c)) += d[at][c];
  }
};

}  // namespace detail

inline linformer_gradients backward(const linformer_attention& m, const tensor_ref& q, const tensor_ref& k,
                                    const tensor_ref& v, const tensor_ref& dout) {
  using namespace detail;
  const problem p{q, k, v, {}, {}, {}};
  const shape s = p.shape();
  linformer_gradients out;
  const auto sized = [](isize count) { return std::vector<double>(static_cast<std::size_t>(count), 0.0); };
  out.dq = sized(s.B * s.H * s.n * s.d), out.dk = sized(s.B * s.G * s.m * s.d), out.dv = sized(s.B * s.G * s.m * s.e);
  out.dE = sized(m.E.heads * m.E.length * m.E.width + static_cast<isize>(m.wk.size()));
  out.dF = sized(m.F.heads * m.F.length * m.F.width + static_cast<isize>(m.wv.size()));
  const projected_side sides[] = {{m, k, false, out.dk, out.dE},
                                  {m, v, true, out.dv, out.dF.empty() ? out.dE : out.dF}};
  for (isize b = 0; b < s.B; ++b)
    for (isize g = 0; g < s.G; ++g) {
      const isize length = m.causal ? m.block : m.keys_of(b, s.m);
      head_slots of[2];  // keys, values
      for (isize first = 0; m.causal ? first + m.block <= s.m : first == 0; first += m.causal ? m.block : 1)
        for (const int x : {0, 1}) {
          of[x].slots.push_back(detail::project(m, x == 1, sides[x].x, b, g, first, length));
          of[x].gradients.push_back(zeros_like(of[x].slots.back()));
        }
      for (isize h = g * s.group(); h < (g + 1) * s.group(); ++h)
        for (isize i = 0; i < s.n; ++i) {
          const isize position = i + s.m - s.n, blocks = !m.causal ? 1 : position < 0 ? 0 : position / m.block;
          const isize first = m.causal ? blocks * m.block : 0, last = m.causal ? position + 1 : 0;
          const rows keys = of[0].seen(blocks, k, b, g, first, last), values = of[1].seen(blocks, v, b, g, first, last);
          rows by_keys = zeros_like(keys), by_values = zeros_like(values);
          row_back(p, dout, b, h, i, m.scale_for(s), keys, values, out.dq.data() + ((b * s.H + h) * s.n + i) * s.d,
                   by_keys, by_values);
          of[0].back(blocks, sides[0], b, g, first, last, by_keys);
          of[1].back(blocks, sides[1], b, g, first, last, by_values);
        }
      for (const int x : {0, 1})
        for (std::size_t y = 0; y < of[x].slots.size(); ++y)
          sides[x].back(b, g, static_cast<isize>(y) * m.block, length, of[x].gradients[y]);
    }
  return out;
}

}  // namespace reference
}  // namespace FOVEA_ABI
}  // namespace fovea
