// SPDX-License-Identifier: MIT
#pragma once
/// @file  Gradients of Efficient Attention and the k-free forms from their definitions, in double: every row by itself, over all it sees.
///
///   w_jc = e^(k_jc) / sum_(seen) e^(k_jc),   o_i = sum_c p_ic sum_j w_jc v_j
///   dp_ic = sum_j w_jc do_i . v_j,   dw_jc = p_ic do_i . v_j,   dv_j = sum_c p_ic w_jc do_i,   then back through the two softmaxes
///
/// Cost       n m d e: slow on purpose; nothing is shared with the vector path.

#include <cmath>
#include <vector>

#include <fovea/efficient/reference.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace reference {

/// Dense, [B, H, n, d], [B, G, m, d], [B, G, m, e].
struct channel_gradients {
  std::vector<double> dq, dk, dv;
};

namespace detail {

/// Gradient by the logits of a softmax with probabilities w, given that by w.
inline std::vector<double> softmax_slope(const std::vector<double>& w, const std::vector<double>& dw) {
  double along = 0;
  for (std::size_t i = 0; i < w.size(); ++i) along += w[i] * dw[i];
  std::vector<double> out(w.size());
  for (std::size_t i = 0; i < w.size(); ++i) out[i] = w[i] * (dw[i] - along);
  return out;
}

/// What the loops below read and write, by indices.
struct gradient_site {
  tensor_ref q, k, v, dout;
  channel_gradients& g;
  isize group;
  double& dq(isize b, isize h, isize i, isize c) const {
    return g.dq[static_cast<std::size_t>(((b * q.heads + h) * q.length + i) * q.width + c)];
  }
  double& dk(isize b, isize h, isize j, isize c) const {
    return g.dk[static_cast<std::size_t>(((b * k.heads + h) * k.length + j) * k.width + c)];
  }
  double& dv(isize b, isize h, isize j, isize x) const {
    return g.dv[static_cast<std::size_t>(((b * v.heads + h) * v.length + j) * v.width + x)];
  }
  double product(isize b, isize h, isize i, isize j) const {  // do_i . v_j
    double sum = 0;
    for (isize x = 0; x < v.width; ++x) sum += dout.get(b, h, i, x) * v.get(b, h / group, j, x);
    return sum;
  }
};

inline void efficient_row_back(const efficient_attention& m, const gradient_site& s, isize b, isize h, isize i,
                               isize seen) {
  const isize g = h / s.group, d = s.q.width;
  const bool exponential = m.normalisation == efficient_normalisation::softmax;
  std::vector<double> p(static_cast<std::size_t>(d)), dp(p.size(), 0.0);
  for (isize c = 0; c < d; ++c) p[static_cast<std::size_t>(c)] = m.scale_for() * s.q.get(b, h, i, c);
  if (exponential) softmax(p);
  std::vector<double> products;
  for (isize j = 0; j < seen; ++j) products.push_back(s.product(b, h, i, j));
  for (isize c = 0; c < d; ++c) {
    std::vector<double> w, dw;
    for (isize j = 0; j < seen; ++j) w.push_back(s.k.get(b, g, j, c));
    if (exponential) softmax(w);
    const double weight = p[static_cast<std::size_t>(c)];
    for (isize j = 0; j < seen; ++j) {
      double& wj = w[static_cast<std::size_t>(j)];
      if (!exponential) wj /= static_cast<double>(seen);
      dp[static_cast<std::size_t>(c)] += wj * products[static_cast<std::size_t>(j)];
      dw.push_back(weight * products[static_cast<std::size_t>(j)]);
      for (isize x = 0; x < s.v.width; ++x) s.dv(b, g, j, x) += weight * wj * s.dout.get(b, h, i, x);
    }
    if (exponential) dw = softmax_slope(w, dw);
    for (isize j = 0; j < seen; ++j)
      s.dk(b, g, j, c) +=
          exponential ? dw[static_cast<std::size_t>(j)] : dw[static_cast<std::size_t>(j)] / static_cast<double>(seen);
  }
  if (exponential) dp = softmax_slope(p, dp);
  for (isize c = 0; c < d; ++c) s.dq(b, h, i, c) = seen > 0 ? m.scale_for() * dp[static_cast<std::size_t>(c)] : 0.0;
}

/// left_j [d] and right_j [columns] of a context whose rows are normalised, out_i = query_i softmax(scale sum_j left_j^T right_j).
template <class Left, class Right, class Query, class AddLeft, class AddRight, class AddQuery>
void context_back(double scale, isize d, isize columns, isize m, isize n, Left&& left, Right&& right, Query&& query,
                  const tensor_ref& dout, isize b, isize h, AddLeft&& add_left, AddRight&& add_right,
                  AddQuery&& add_query) {
  for (isize c = 0; c < d; ++c) {
    std::vector<double> row(static_cast<std::size_t>(columns), 0.0), slope(row.size(), 0.0);
    for (isize x = 0; x < columns; ++x)
      for (isize j = 0; j < m; ++j) row[static_cast<std::size_t>(x)] += scale * left(j, c) * right(j, x);
    softmax(row);
    for (isize i = 0; i < n; ++i)
      for (isize x = 0; x < columns; ++x) {
        add_query(i, c, row[static_cast<std::size_t>(x)] * dout.get(b, h, i, x));
        slope[static_cast<std::size_t>(x)] += query(i, c) * dout.get(b, h, i, x);
      }
    slope = softmax_slope(row, slope);
    for (isize j = 0; j < m; ++j)
      for (isize x = 0; x < columns; ++x) {
        add_left(j, c, scale * slope[static_cast<std::size_t>(x)] * right(j, x));
        add_right(j, x, scale * slope[static_cast<std::size_t>(x)] * left(j, c));
      }
  }
}

inline channel_gradients no_gradients(const tensor_ref& q, const tensor_ref& k, const tensor_ref& v) {
  const auto size = [](const tensor_ref& t) {
    return static_cast<std::size_t>(t.batch * t.heads * t.length * t.width);
  };
  return {std::vector<double>(size(q), 0.0), std::vector<double>(size(k), 0.0), std::vector<double>(size(v), 0.0)};
}

}  // namespace detail

inline channel_gradients backward(const efficient_attention& m, const tensor_ref& q, const tensor_ref& k,
                                  const tensor_ref& v, const tensor_ref& dout) {
  channel_gradients out = detail::no_gradients(q, k, v);
  const detail::gradient_site site{q, k, v, dout, out, q.heads / k.heads};
  for (isize b = 0; b < q.batch; ++b)
    for (isize h = 0; h < q.heads; ++h)
      for (isize i = 0; i < q.length; ++i) {
        const isize seen = m.causal ? i + k.length - q.length + 1 : m.keys_of(b, k.length);
        detail::efficient_row_back(m, site, b, h, i, seen > 0 ? seen : 0);
      }
  return out;
}

inline channel_gradients backward(const kfree_reconstruction& m, const tensor_ref& q, const tensor_ref& k,
                                  const tensor_ref& v, const tensor_ref& dout) {
  using form = kfree_reconstruction::form_type;
  if (m.form == form::efficient) return backward(efficient_attention{.scale = m.scale}, q, k, v, dout);
  channel_gradients out = detail::no_gradients(q, k, v);
  const isize group = q.heads / k.heads;
  const detail::gradient_site s{q, k, v, dout, out, group};
  const double root = 1 / std::sqrt(static_cast<double>(k.length)), by = m.scale_for();
  for (isize b = 0; b < q.batch; ++b)
    for (isize h = 0; h < q.heads; ++h) {
      const isize g = h / group;
      const auto get_k = [&](isize j, isize x) { return k.get(b, g, j, x); };
      const auto get_q = [&](isize j, isize c) { return q.get(b, h, j, c); };
      const auto get_v = [&](isize j, isize x) { return v.get(b, g, j, x); };
      const auto add_k = [&](isize j, isize x, double y) { s.dk(b, g, j, x) += y; };
      const auto add_v = [&](isize j, isize x, double y) { s.dv(b, g, j, x) += y; };
      if (m.form == form::context)
        detail::context_back(
            root, q.width, v.width, k.length, q.length, get_k, get_v,
            [&](isize i, isize c) { return by * get_q(i, c); }, dout, b, h, add_k, add_v,
            [&](isize i, isize c, double y) { s.dq(b, h, i, c) += by * y; });
      else
        detail::context_back(
            root * by, q.width, q.width, k.length, q.length, get_q, get_k, get_v, dout, b, h,
            [&](isize j, isize c, double y) { s.dq(b, h, j, c) += y; }, add_k, add_v);
    }
  return out;
}

}  // namespace reference
}  // namespace FOVEA_ABI
}  // namespace fovea
