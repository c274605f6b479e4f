// SPDX-License-Identifier: MIT
#pragma once
/// @file  Learning Linformer's E and F from a layer's captured q, k, v: AdamW on the error of the output, by the library's own backward.
///
///   projection_fit fit(options, q, k, v, scale);          windows of `positions` tokens, exact outputs by softmax_attention
///   fit.start(E, F);   fit.run(exec, report);   fit.weights()      E and F as linformer's configuration reads them
///
/// A window is `positions` consecutive tokens that attend to each other and to nothing else: what E and F are fitted to is positions, so a
/// text longer than that gives many windows. Learned from: windows that lie within the first 1 - held_out of the tokens. Judged by: windows
/// within the rest, whose tokens, keys and values no step has seen. With positions = 0 (the whole text is the one window) the last rows are
/// held out instead: queries that were not seen, over keys and values that were.
///
/// Contract   every draw is a function of (seed, step); same bits for any number of threads. The weights with the least held-out error
///            are kept, so that this error is a little on the kind side: it chose when to stop.
/// Loss       mean over rows and heads of |o^ - o|^2 / |o|^2.

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include <fovea/core/configuration.hpp>
#include <fovea/feature/random.hpp>
#include <fovea/linformer.hpp>
#include <fovea/train/adamw.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace train {

enum class projection_sharing : unsigned char { none, headwise, key_value };  ///< as in the paper: of one layer

struct projection_fit_options {
  isize slots = 64, positions = 0;
  projection_sharing share = projection_sharing::none;
  isize steps = 400, batch = 4, look_every = 20, patience = 10;
  double held_out = 0.25;
  adamw optimiser{.rate = 2e-3};
  std::uint64_t seed = 1;
};

/// Errors |o^ - o| / |o| of a row and head.
struct projection_error {
  double mean = 0, median = 0, p95 = 0, mean_square = 0;
};
struct projection_progress {
  isize step = 0;
  projection_error held_out;
  double best = 0;  ///< least mean held-out error so far
  bool stopped = false;
};

class projection_fit {
 public:
  projection_fit(const projection_fit_options& o, tensor_ref q, tensor_ref k, tensor_ref v, double scale)
      : o_(o), q_(q), k_(k), v_(v), scale_(scale), W_(o.positions > 0 ? o.positions : q.length) {
    check();
    const isize n = q.length;
    const auto split = n - static_cast<isize>(static_cast<double>(n) * o.held_out);
    if (whole()) {
      train_ = held_ = {0}, rows_ = split;
    } else {
      const isize step = std::max<isize>(W_ / 8, 1);
      for (isize at = 0; at + W_ <= split; at += step) train_.push_back(at);
      for (isize at = split; at + W_ <= n; at += step) held_.push_back(at);
      rows_ = W_;
      require(!train_.empty() && !held_.empty(), "q has ", n, " tokens; windows of ", W_, " and a share of ",
              o.held_out, " held out leave ", train_.size(), " windows to learn from and ", held_.size(),
              " to judge by");
    }
    E_.assign(static_cast<std::size_t>(maps() * W_ * o.slots), 0.0F);
    if (o.share != projection_sharing::key_value) F_ = E_;
  }

  bool whole() const { return W_ == q_.length; }
  isize maps() const { return o_.share == projection_sharing::none ? k_.heads : 1; }
  isize positions() const { return W_; }
  const std::vector<isize>& train_windows() const { return train_; }
  const std::vector<isize>& held_out_windows() const { return held_; }
  isize train_rows() const { return rows_; }  ///< of a window

  /// [maps, positions, slots]; F is not read with key_value sharing.
  void start(const std::vector<float>& E, const std::vector<float>& F) {
    require(E.size() == E_.size() && (F_.empty() || F.size() == F_.size()), "start: E holds ", E.size(),
            " numbers; wanted ", E_.size());
    E_ = E;
    if (!F_.empty()) F_ = F;
    best_E_ = E_, best_F_ = F_;
  }

  /// Of the rows that were held out, or of those that were learned from.
  projection_error error(exec_ref exec, bool held_out) const {
    std::vector<double> rows;
    const linformer_attention m = mechanism();
    for (const isize at : held_out ? held_ : train_) {
      const std::vector<float> want = exact(exec, at), got = output(exec, m, at, nullptr);
      const isize first = whole() && held_out ? rows_ : 0, last = whole() && !held_out ? rows_ : W_;
      for (isize h = 0; h < q_.heads; ++h)
        for (isize i = first; i < last; ++i) rows.push_back(row_error(want, got, h, i));
    }
    projection_error e;
    for (const double x : rows) e.mean += x / static_cast<double>(rows.size()), e.mean_square += x * x;
    e.mean_square /= static_cast<double>(rows.size());
    std::sort(rows.begin(), rows.end());
    e.median = rows[rows.size() / 2], e.p95 = rows[rows.size() * 95 / 100];
    return e;
  }

  /// Steps until the last, or until `patience` looks brought nothing. `report` returns false to end it. The best weights are then in place.
  template <class Report>
  void run(exec_ref exec, Report&& report) {
    std::vector<float> mE(E_.size(), 0.0F), vE = mE, mF(F_.size(), 0.0F), vF = mF;
    double best = error(exec, true).mean;
    best_E_ = E_, best_F_ = F_;
    isize misses = 0;
    for (isize step = 1; step <= o_.steps; ++step) {
      gradient(exec, step);
      const double rate = cosine_rate(o_.optimiser.rate, step, o_.steps);
      o_.optimiser.update(step, rate, dE_, mE, vE, E_);
      if (!F_.empty()) o_.optimiser.update(step, rate, dF_, mF, vF, F_);
      if (step % o_.look_every != 0 && step != o_.steps) continue;
      const projection_error now = error(exec, true);
      misses = now.mean < best ? 0 : misses + 1;
      if (now.mean < best) best = now.mean, best_E_ = E_, best_F_ = F_;
      if (!report(projection_progress{step, now, best, misses >= o_.patience}) || misses >= o_.patience) break;
    }
    E_ = best_E_, F_ = best_F_;
  }

  /// Tensors E and F [positions, slots] or [G, positions, slots].
  arrays weights() const {
    const auto dims = o_.share == projection_sharing::none ? std::vector<isize>{maps(), W_, o_.slots}
                                                           : std::vector<isize>{W_, o_.slots};
    arrays out{{"E", array(dims, E_)}};
    if (!F_.empty()) out.emplace("F", array(dims, F_));
    return out;
  }
  /// Exact output of a window, [H, positions, e].
  std::vector<float> exact(exec_ref exec, isize at) const {
    std::vector<float> out(static_cast<std::size_t>(q_.heads * W_ * v_.width));
    prefill(exec, softmax_attention{.mask = no_mask{}, .scale = scale_}, cut(q_, at), cut(k_, at), cut(v_, at),
            over(out, v_.width));
    return out;
  }

 private:
  void check() const {
    require(q_.batch == 1 && k_.batch == 1 && v_.batch == 1, "a fit takes one batch item; q has ", q_.batch);
    require(k_.heads >= 1 && q_.heads % k_.heads == 0 && v_.heads == k_.heads && q_.length == k_.length &&
                v_.length == k_.length && q_.width == k_.width,
            "q, k, v are ", fovea::detail::describe(q_), ", ", fovea::detail::describe(k_), ", ",
            fovea::detail::describe(v_), "; wanted q [1, H, n, d], k [1, G, n, d], v [1, G, n, e]");
    require(q_.type != dtype::f64, "a fit is done in f32; q is f64");
    require(o_.positions >= 0 && W_ >= 2 && W_ <= q_.length, "positions is ", o_.positions, " and q has ", q_.length,
            " tokens; wanted 2 or more, and no more than those");
    require(o_.slots >= 1 && o_.slots <= W_, "slots is ", o_.slots, "; wanted 1 to the ", W_, " positions");
    require(o_.steps >= 0 && o_.batch >= 1 && o_.look_every >= 1 && o_.patience >= 1,
            "steps, batch, look_every, patience must be positive");
    require(o_.held_out > 0 && o_.held_out < 1, "held_out is ", o_.held_out, "; it must lie in (0, 1)");
    require(o_.optimiser.rate > 0 && o_.optimiser.decay >= 0, "rate and decay are ", o_.optimiser.rate, ", ",
            o_.optimiser.decay, "; wanted a positive rate and no negative decay");
  }
  tensor_ref cut(const tensor_ref& x, isize at) const { return x.slice(at, W_); }
  tensor_mut over(std::vector<float>& x, isize width) const {
    return bhnd(x.data(), 1, static_cast<isize>(x.size()) / (W_ * width), W_, width);
  }
  linformer_attention mechanism() const {
    const auto map = [&](const std::vector<float>& x) { return bhnd<const float>(x.data(), 1, maps(), W_, o_.slots); };
    linformer_attention m{.E = map(E_), .scale = scale_};
    if (!F_.empty()) m.F = map(F_);
    return m;
  }
  std::vector<float> output(exec_ref exec, const linformer_attention& m, isize at, std::vector<float>* lse) const {
    std::vector<float> out(static_cast<std::size_t>(q_.heads * W_ * v_.width));
    call_options options;
    if (lse != nullptr) lse->resize(static_cast<std::size_t>(q_.heads * W_)), options.lse = over(*lse, 1);
    prefill(exec, m, cut(q_, at), cut(k_, at), cut(v_, at), over(out, v_.width), options);
    return out;
  }
  double row_error(const std::vector<float>& want, const std::vector<float>& got, isize h, isize i) const {
    double off = 0, size = 0;
    for (isize c = 0; c < v_.width; ++c) {
      const auto x = static_cast<std::size_t>((h * W_ + i) * v_.width + c);
      const double w = static_cast<double>(want[x]), d = static_cast<double>(got[x]) - w;
      off += d * d, size += w * w;
    }
    return size > 0 ? std::sqrt(off / size) : 0.0;
  }

  /// dE_ and dF_ of `batch` windows drawn for this step.
  void gradient(exec_ref exec, isize step) {
    feature::random_source rng(o_.seed * 0x9e3779b97f4a7c15ULL + static_cast<std::uint64_t>(step));
    const isize batch = std::min<isize>(o_.batch, static_cast<isize>(train_.size()));
    dE_.assign(E_.size(), 0.0F), dF_.assign(F_.size(), 0.0F);
    std::vector<float> one_E(E_.size()), one_F(F_.size()), lse;
    const linformer_attention m = mechanism();
    for (isize x = 0; x < batch; ++x) {
      const auto pick = static_cast<std::size_t>((static_cast<double>(x) + rng.uniform()) *
                                                 static_cast<double>(train_.size()) / static_cast<double>(batch));
      const isize at = train_[std::min(pick, train_.size() - 1)];
      const std::vector<float> want = exact(exec, at), got = output(exec, m, at, &lse);
      std::vector<float> dout(got.size(), 0.0F), out = got;
      slope(want, got, batch, dout);
      gradients to;
      to.dE = one_E.data(), to.dF = F_.empty() ? nullptr : one_F.data();
      backward(exec, m, cut(q_, at), cut(k_, at), cut(v_, at), over(out, v_.width), over(lse, 1), over(dout, v_.width),
               to);
      for (std::size_t i = 0; i < dE_.size(); ++i) dE_[i] += one_E[i];
      for (std::size_t i = 0; i < dF_.size(); ++i) dF_[i] += one_F[i];
    }
  }
  void slope(const std::vector<float>& want, const std::vector<float>& got, isize batch,
             std::vector<float>& dout) const {
    const double each = 2 / static_cast<double>(batch * q_.heads * rows_);
    for (isize h = 0; h < q_.heads; ++h)
      for (isize i = 0; i < rows_; ++i) {
        double size = 0;
        const auto at = static_cast<std::size_t>((h * W_ + i) * v_.width);
        for (std::size_t c = at; c < at + static_cast<std::size_t>(v_.width); ++c)
          size += static_cast<double>(want[c]) * static_cast<double>(want[c]);
        for (std::size_t c = at; size > 0 && c < at + static_cast<std::size_t>(v_.width); ++c)
          dout[c] = static_cast<float>(each * (static_cast<double>(got[c]) - static_cast<double>(want[c])) / size);
      }
  }

  projection_fit_options o_;
  tensor_ref q_, k_, v_;
  double scale_;
  isize W_, rows_ = 0;
  std::vector<isize> train_, held_;
  std::vector<float> E_, F_, best_E_, best_F_, dE_, dF_;
};

}  // namespace train
}  // namespace FOVEA_ABI
}  // namespace fovea
