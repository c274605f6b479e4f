// SPDX-License-Identifier: MIT
#pragma once
/// @file  Attention transfer: how far the rows of a learned map are from those of exact attention, and the gradient of that.
///
///   p_ij = e^(s_ij - lse_i)                                               exact, s = scale q.k
///   u_ij = e^s_ij (j near: in the window, or first)   e^(a_i) (phi(q_i).phi(k_j) + tiny) (the rest),   w = u / sum u
///   a_i = log_weight + query_gate . q_i, with a window; without one all keys are the rest and a_i = 0
///   loss = mean over rows of   cross_entropy  sum_j p (ln p - ln w)
///                            + mean_square    |o^ - o|^2 / |o|^2,        o^ = sum_j w v,  o exact
///                            + relative       |o^ - o| / |o|
///
/// The derivative of the map is the library's own (feature_map::derive); all keys up to a row take part, nothing is sampled but rows.
///
/// Contract   one KV head with its R query heads at a time, f32; rows in rising order. Deterministic.
/// Cost       a row of i keys: 2 i (2 d + 4 r + 2 e) flops and i exponentials; the features of all keys once a call.
/// Source     Hedgehog (2402.04347), LoLCATs (2410.10254): the losses.

#include <limits>

#include <fovea/feature/rows.hpp>
#include <fovea/kernel/linear_backward_pairs.hpp>
#include <fovea/train/learned_map.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace train {

struct transfer_loss {
  double cross_entropy = 1.0, mean_square = 0.0, relative = 0.0;
  isize window = 0, first = 0;  ///< keys whose exact scores stay; window 0: none
};

/// One KV head of one captured layer, dense rows; o and lse of exact attention.
struct transfer_head {
  isize R = 1, n = 0, d = 0, e = 0;
  bool causal = true;
  float scale = 1;
  std::vector<float> q, k, v, o, lse;     // [R][n][d], [n][d], [n][e], [R][n][e], [R][n]
  std::vector<float> k_turned, v_turned;  // [d][n], [e][n]

  void turn() {
    k_turned.resize(k.size()), v_turned.resize(v.size());
    using pairs = kernel::chunk_pairs<simd::native, float>;
    pairs::turn(k.data(), n, d, d, k_turned.data(), n), pairs::turn(v.data(), n, e, e, v_turned.data(), n);
  }
};

/// Means over rows and heads.
struct transfer_result {
  double loss = 0, cross_entropy = 0, mean_square = 0, relative = 0;
};

class attention_transfer {
 public:
  attention_transfer(const transfer_head& data, const learned_map& map, const transfer_loss& loss)
      : h_(data), form_(map), loss_(loss), r_(map.features()), ld_(ceil_div(map.features(), isize{16}) * 16) {
    const auto size = [](isize x) { return static_cast<std::size_t>(x); };
    phi_k_.resize(size(h_.n * ld_)), turned_.resize(size(r_ * h_.n)), log_k_.resize(size(h_.n));
    dphi_k_.resize(size(h_.n * ld_)), score_.resize(size(stripe * h_.n)), weight_.resize(size(stripe * h_.n));
    step_.resize(size(stripe * h_.n)), phi_q_.resize(size(stripe * ld_)), dphi_q_.resize(size(stripe * ld_));
    rows_.resize(size(stripe * h_.d)), out_.resize(size(stripe * h_.e)), along_.resize(size(stripe * h_.n));
  }

  /// `gradient` (if any) is written: the derivative by all of x. Logarithms cost: the value of the loss only where it is `wanted`.
  transfer_result operator()(const std::vector<float>& x, const std::vector<isize>& rows, std::vector<float>* gradient,
                             bool wanted = true) {
    const auto made = form_.make(x);
    const isize last = h_.causal ? rows.back() + 1 : h_.n;
    scratch_.resize(static_cast<std::size_t>(std::max(made.map.scratch(h_.d), made.map.derive_scratch(h_.d))));
    features_of_keys(made.map, last);
    of_queries_.assign(static_cast<std::size_t>(h_.R * form_.of_head()), 0.0F);
    of_key_.assign(static_cast<std::size_t>(form_.of_head()), 0.0F);
    if (gradient != nullptr) {
      gradient->assign(x.size(), 0.0F);
      std::fill(dphi_k_.begin(), dphi_k_.begin() + last * ld_, 0.0F);
    }
    transfer_result sum;
    const double each = 1.0 / static_cast<double>(h_.R * static_cast<isize>(rows.size()));
    for (isize h = 0; h < h_.R; ++h)
      for (std::size_t at = 0; at < rows.size(); at += stripe)
        some_rows(made.map, x, h, rows.data() + at, std::min<isize>(stripe, static_cast<isize>(rows.size() - at)), each,
                  gradient, wanted, sum);
    if (gradient != nullptr) {
      keys_back(made.map, last);
      std::vector<float> of_map(static_cast<std::size_t>(form_.of_map()));
      form_.gather(x, of_queries_, of_key_, of_map);
      std::copy(of_map.begin(), of_map.end(), gradient->begin());
    }
    sum.loss =
        loss_.cross_entropy * sum.cross_entropy + loss_.mean_square * sum.mean_square + loss_.relative * sum.relative;
    return sum;
  }

  /// log_weight and query_gate from which learning starts: those at which the rest's share of each of `rows` comes closest to the exact
  /// one, in logarithms, by least squares with a small ridge. With a window only.
  void match_rest(std::vector<float>& x, const std::vector<isize>& rows) {
    const auto made = form_.make(x);
    scratch_.resize(static_cast<std::size_t>(std::max(made.map.scratch(h_.d), made.map.derive_scratch(h_.d))));
    features_of_keys(made.map, rows.back() + 1);
    const isize size = h_.d + 1;
    for (isize h = 0; h < h_.R; ++h) {
      std::vector<double> a(static_cast<std::size_t>(size * (size + 1)), 0.0);  // normal equations, right side last
      for (std::size_t at = 0; at < rows.size(); at += stripe) {
        const isize count = std::min<isize>(stripe, static_cast<isize>(rows.size() - at));
        weigh_rows(made.map, x, h, rows.data() + at, count);
        for (isize i = 0; i < count; ++i) add_rest(i, rows[at + static_cast<std::size_t>(i)], a);
      }
      const std::vector<double> best = solve(a, size);
      x[static_cast<std::size_t>(form_.log_weight_at(h))] += static_cast<float>(best[0]);
      for (isize c = 0; c < h_.d; ++c)
        x[static_cast<std::size_t>(form_.gate_at(h) + c)] += static_cast<float>(best[static_cast<std::size_t>(c + 1)]);
    }
  }

 private:
  using native = simd::native;
  using P = simd::pack<float, native>;
  static constexpr isize stripe = 16;
  static constexpr float tiny = 1e-6F;

  feature_block<float> key_block(isize first, isize last) {
    feature_block<float> b;
    b.x = h_.k.data() + first * h_.d, b.x_stride = b.width = h_.d, b.rows = std::min(feature_rows, last - first);
    b.position = first, b.key = true, b.out = phi_k_.data() + first * ld_, b.out_stride = ld_;
    b.log_scale = log_k_.data() + first;
    return b;
  }
  void features_of_keys(const feature_map& map, isize last) {
    for (isize t = 0; t < last; t += feature_rows) map.apply(key_block(t, last), scratch_.data());
    if (!map.log_scaled()) std::fill(log_k_.begin(), log_k_.begin() + last, 0.0F);
    top_log_k_ = *std::max_element(log_k_.begin(), log_k_.begin() + last);
    kernel::chunk_pairs<native, float>::turn(phi_k_.data(), last, r_, ld_, turned_.data(), h_.n);
  }
  void keys_back(const feature_map& map, isize last) {
    for (isize t = 0; t < last; t += feature_rows)
      map.derive(key_block(t, last), {dphi_k_.data() + t * ld_, ld_, nullptr, 0, of_key_.data()}, scratch_.data());
  }

  /// Features, p and w of up to a stripe of rows.
  feature_block<float> weigh_rows(const feature_map& map, const std::vector<float>& x, isize h, const isize* rows,
                                  isize count) {
    const isize m = h_.causal ? rows[count - 1] + 1 : h_.n, d = h_.d, n = h_.n;
    float* const log_q = log_q_;
    std::fill(log_q, log_q + stripe, 0.0F);
    for (isize i = 0; i < count; ++i)
      for (isize c = 0; c < d; ++c)
        rows_[static_cast<std::size_t>(i * d + c)] = h_.q[static_cast<std::size_t>((h * n + rows[i]) * d + c)];
    feature_block<float> b;
    b.x = rows_.data(), b.x_stride = b.width = d, b.rows = count, b.head = h, b.out = phi_q_.data(), b.out_stride = ld_;
    b.log_scale = log_q;
    map.apply(b, scratch_.data());
    tile::gemm<native, float>(count, m, d, rows_.data(), d, 1, h_.k_turned.data(), n, score_.data(), n, false);
    tile::gemm<native, float>(count, m, r_, phi_q_.data(), ld_, 1, turned_.data(), n, weight_.data(), n, false);
    for (isize i = 0; i < count; ++i) weigh(x, h, i, rows[i], map.log_scaled() ? log_q[i] : 0.0F);
    return b;
  }

  /// One row's equation: 1 * log_weight + q . gate = what the logarithm of the rest's weight lacks.
  void add_rest(isize i, isize row, std::vector<double>& a) const {
    const float *p = score_.data() + i * h_.n, *w = weight_.data() + i * h_.n, *q = rows_.data() + i * h_.d;
    double exact[2] = {}, mine[2] = {};  // near, rest
    for (isize j = 0; j < seen(row); ++j) {
      const bool rest = j >= first_of(row) && j < near_of(row);
      exact[rest] += static_cast<double>(p[j]), mine[rest] += static_cast<double>(w[j]);
    }
    constexpr double least = 1e-12;
    for (double* x : {exact, exact + 1, mine, mine + 1}) *x = std::max(*x, least);
    const double lacks = std::log(exact[1] / exact[0]) - std::log(mine[1] / mine[0]);
    const isize size = h_.d + 1;
    const auto of = [&](isize c) { return c == 0 ? 1.0 : c < size ? static_cast<double>(q[c - 1]) : lacks; };
    for (isize y = 0; y < size; ++y)
      for (isize z = 0; z <= size; ++z) a[static_cast<std::size_t>(y * (size + 1) + z)] += of(y) * of(z);
  }
  /// [size][size + 1], symmetric and, with the ridge, positive definite: elimination in place.
  static std::vector<double> solve(std::vector<double>& a, isize size) {
    const auto at = [&](isize y, isize z) -> double& { return a[static_cast<std::size_t>(y * (size + 1) + z)]; };
    double trace = 0;
    for (isize y = 1; y < size; ++y) trace += at(y, y);
    for (isize y = 0; y < size; ++y) at(y, y) += y == 0 ? 1e-9 : 0.01 * trace / static_cast<double>(size - 1) + 1e-9;
    for (isize y = 0; y < size; ++y)
      for (isize z = y + 1; z < size; ++z) {
        const double f = at(z, y) / at(y, y);
        for (isize c = y; c <= size; ++c) at(z, c) -= f * at(y, c);
      }
    std::vector<double> x(static_cast<std::size_t>(size));
    for (isize y = size - 1; y >= 0; --y) {
      double sum = at(y, size);
      for (isize c = y + 1; c < size; ++c) sum -= at(y, c) * x[static_cast<std::size_t>(c)];
      x[static_cast<std::size_t>(y)] = sum / at(y, y);
    }
    return x;
  }

  void some_rows(const feature_map& map, const std::vector<float>& x, isize h, const isize* rows, isize count,
                 double each, std::vector<float>* gradient, bool wanted, transfer_result& sum) {
    const isize m = h_.causal ? rows[count - 1] + 1 : h_.n, n = h_.n;
    const feature_block<float> b = weigh_rows(map, x, h, rows, count);
    const bool outputs = loss_.mean_square != 0 || loss_.relative != 0 || wanted;
    if (outputs) {
      for (isize i = 0; i < count; ++i)  // what a row may not see weighs nothing
        for (isize j = seen(rows[i]); j < m; ++j) weight_[static_cast<std::size_t>(i * n + j)] = 0.0F;
      tile::gemm<native, float>(count, h_.e, m, weight_.data(), n, 1, h_.v.data(), h_.e, out_.data(), h_.e, false);
    }
    if (wanted) values(h, rows, count, each, sum);
    if (gradient == nullptr) return;
    const bool along = loss_.mean_square != 0 || loss_.relative != 0;
    if (along) {
      for (isize i = 0; i < count; ++i) output_slope(h, i, rows[i], each);
      tile::gemm<native, float>(count, m, h_.e, out_.data(), h_.e, 1, h_.v_turned.data(), n, along_.data(), n, false);
    }
    for (isize i = 0; i < count; ++i) row_back(h, i, rows[i], m, each, along, *gradient);
    tile::gemm<native, float>(count, r_, m, step_.data(), n, 1, phi_k_.data(), ld_, dphi_q_.data(), ld_, false);
    tile::gemm<native, float>(m, r_, count, step_.data(), 1, n, phi_q_.data(), ld_, dphi_k_.data(), ld_, true);
    map.derive(b, {dphi_q_.data(), ld_, nullptr, 0, of_queries_.data() + h * form_.of_head()}, scratch_.data());
  }

  isize seen(isize row) const { return h_.causal ? row + 1 : h_.n; }
  /// Keys [0, first) and [near, seen) keep their scores.
  isize first_of(isize row) const { return loss_.window > 0 ? std::min(loss_.first, near_of(row)) : 0; }
  isize near_of(isize row) const { return loss_.window > 0 ? std::max(isize{0}, row + 1 - loss_.window) : seen(row); }

  /// Scores become p, products become w; coefficient_[i] holds what a product of row i was multiplied by (with e^log_k of the key).
  void weigh(const std::vector<float>& x, isize h, isize i, isize row, float log_q) {
    float *s = score_.data() + i * h_.n, *w = weight_.data() + i * h_.n;
    const isize m = seen(row), first = first_of(row), near = near_of(row);
    for (isize j = 0; j < m; ++j) s[j] *= h_.scale;
    float top = -std::numeric_limits<float>::infinity(), level = log_q;
    for (isize j = 0; j < first; ++j) top = std::max(top, s[j]);
    for (isize j = near; j < m; ++j) top = std::max(top, s[j]);
    if (form_.gated()) {
      level += x[static_cast<std::size_t>(form_.log_weight_at(h))];
      for (isize c = 0; c < h_.d; ++c)
        level += x[static_cast<std::size_t>(form_.gate_at(h) + c)] * rows_[static_cast<std::size_t>(i * h_.d + c)];
    }
    if (first < near) top = std::max(top, level + top_log_k_);
    float sum = 0;
    const float rise = std::exp(level - top);
    const bool scaled = form_.log_scaled();
    for (isize j = first; j < near; ++j)
      sum += w[j] = (w[j] + tiny) * (scaled ? std::exp(level + log_k_[static_cast<std::size_t>(j)] - top) : rise);
    for (isize j = 0; j < first; ++j) sum += w[j] = std::exp(s[j] - top);
    for (isize j = near; j < m; ++j) sum += w[j] = std::exp(s[j] - top);
    const float share = 1 / sum;
    feature::row_scale<native, float>(w, m, share);
    coefficient_[i] = rise * share, base_[i] = level - top, share_[i] = share;
    feature::row_exp<native, float>(s, m, 1.0F, h_.lse[static_cast<std::size_t>(h * h_.n + row)], s);
  }

  void values(isize h, const isize* rows, isize count, double each, transfer_result& sum) const {
    for (isize i = 0; i < count; ++i) {
      const float *p = score_.data() + i * h_.n, *w = weight_.data() + i * h_.n;
      double divergence = 0, square = 0, norm = 0;
      for (isize j = 0; j < seen(rows[i]); ++j)
        if (p[j] > 0)
          divergence +=
              static_cast<double>(p[j]) *
              static_cast<double>(std::log(p[j]) - std::log(std::max(w[j], std::numeric_limits<float>::min())));
      const float *o = h_.o.data() + (h * h_.n + rows[i]) * h_.e, *got = out_.data() + i * h_.e;
      for (isize c = 0; c < h_.e; ++c) {
        const double want = static_cast<double>(o[c]), off = static_cast<double>(got[c]) - want;
        square += off * off, norm += want * want;
      }
      const double error = norm > 0 ? square / norm : 0;
      sum.cross_entropy += each * divergence, sum.mean_square += each * error, sum.relative += each * std::sqrt(error);
    }
  }

  /// out_[i] becomes the gradient by o^ of the output losses; slope_[i] its product with o^.
  void output_slope(isize h, isize i, isize row, double each) {
    const float* o = h_.o.data() + (h * h_.n + row) * h_.e;
    float* got = out_.data() + i * h_.e;
    double square = 0, norm = 0;
    for (isize c = 0; c < h_.e; ++c) {
      const double want = static_cast<double>(o[c]), off = static_cast<double>(got[c]) - want;
      square += off * off, norm += want * want;
    }
    double factor = 0;
    if (norm > 0) factor = 2 * loss_.mean_square / norm;
    if (norm > 0 && square > 0) factor += loss_.relative / std::sqrt(square * norm);
    double along = 0;
    for (isize c = 0; c < h_.e; ++c) {
      const double slope = each * factor * (static_cast<double>(got[c]) - static_cast<double>(o[c]));
      along += slope * static_cast<double>(got[c]);
      got[c] = static_cast<float>(slope);
    }
    slope_[i] = static_cast<float>(along);
  }

  /// step_[i]: by the products phi.phi of a row, zero where its scores are exact; the gradients of log_weight and gate.
  void row_back(isize h, isize i, isize row, isize m, double each, bool along, std::vector<float>& gradient) {
    const float *p = score_.data() + i * h_.n, *w = weight_.data() + i * h_.n, *a = along_.data() + i * h_.n;
    float* to = step_.data() + i * h_.n;
    const isize first = first_of(row), near = near_of(row);
    const float ce = static_cast<float>(loss_.cross_entropy * each), mean = slope_[i];
    const bool scaled = form_.log_scaled();
    float level = 0;
    std::fill(to, to + first, 0.0F);
    for (isize j = first; j < near; ++j) {
      float by_log = ce * (w[j] - p[j]);
      if (along) by_log += w[j] * (a[j] - mean);
      level += by_log;
      const float c = scaled ? share_[i] * std::exp(base_[i] + log_k_[static_cast<std::size_t>(j)]) : coefficient_[i];
      to[j] = w[j] > 0 ? by_log * c / w[j] : 0.0F;  // c / w = 1 / (phi.phi + tiny)
    }
    std::fill(to + near, to + m, 0.0F);
    if (!form_.gated()) return;
    gradient[static_cast<std::size_t>(form_.log_weight_at(h))] += level;
    for (isize c = 0; c < h_.d; ++c)
      gradient[static_cast<std::size_t>(form_.gate_at(h) + c)] += level * rows_[static_cast<std::size_t>(i * h_.d + c)];
  }

  const transfer_head& h_;
  const learned_map& form_;
  transfer_loss loss_;
  isize r_, ld_;
  float top_log_k_ = 0, coefficient_[stripe] = {}, base_[stripe] = {}, share_[stripe] = {}, slope_[stripe] = {},
        log_q_[stripe] = {};
  std::vector<float> phi_k_, turned_, log_k_, dphi_k_, score_, weight_, step_, phi_q_, dphi_q_, rows_, out_, along_,
      scratch_, of_queries_, of_key_;
};

}  // namespace train
}  // namespace FOVEA_ABI
}  // namespace fovea
