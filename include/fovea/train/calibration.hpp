// SPDX-License-Identifier: MIT
#pragma once
/// @file  Learning the maps of one layer from its captured q, k, v: minibatches of query rows, AdamW, early stop, checkpoints.
///
///   calibration c(options, q, k, v, scale, causal);      exact rows by softmax_attention
///   c.run(exec, [](const calibration_progress& p) { ...; return true; });
///   write_safetensors("w.safetensors", c.weights());      what any_attention reads
///   write_safetensors("run.safetensors", c.checkpoint()); ...later: c.resume(read_safetensors("run.safetensors").tensors)
///
/// The heads that share a KV head learn together, apart from all others. Rows of a batch: one at random from each of `rows` equal
/// stretches. The last `held_out` of the rows (of an encoder: every 8th) are never drawn; the weights with the least loss there are kept, and
/// a head stops after `patience` looks without a better one.
///
/// Contract   every draw is a function of (seed, KV head, step) alone: same bits for any number of threads, and for a run that was
///            interrupted and resumed with equal options.

#include <algorithm>
#include <mutex>

#include <fovea/softmax.hpp>
#include <fovea/train/adamw.hpp>
#include <fovea/train/transfer.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace train {

struct calibration_options {
  map_kind map = map_kind::hedgehog;
  isize features = 0;  ///< 0: d, or 2 d for Hedgehog
  transfer_loss loss;
  isize steps = 400, rows = 48, look_every = 40, patience = 5, look_rows = 64;
  double held_out = 0.125;
  adamw optimiser;
  std::uint64_t seed = 1;
};

/// After a look at the held-out rows.
struct calibration_progress {
  isize kv_head = 0, step = 0, steps = 0;
  transfer_result held_out;
  double first = 0, best = 0;  ///< loss there before the first step, and the least so far
  bool stopped = false;
};

class calibration {
 public:
  calibration(const calibration_options& o, tensor_ref q, tensor_ref k, tensor_ref v, double scale, bool causal)
      : o_(o),
        d_(q.width),
        G_(k.heads),
        n_(q.length),
        causal_(causal),
        form_(o.map, q.width, k.heads > 0 ? q.heads / k.heads : 0, o.features, o.loss.window > 0, o.seed) {
    check(q, k, v);
    data_.resize(static_cast<std::size_t>(G_)), heads_.resize(data_.size());
    exact_rows(q, k, v, scale);
    for (isize g = 0; g < G_; ++g) {
      head& at = heads_[static_cast<std::size_t>(g)];
      at.x = at.best = form_.start(g);
      at.m.assign(at.x.size(), 0.0F), at.v.assign(at.x.size(), 0.0F);
    }
  }

  const learned_map& form() const { return form_; }
  /// Goes on until every head has done its steps or stopped early. `report` is called by one thread at a time; false ends the run after that
  /// head's look, ready for a checkpoint.
  template <class F>
  void run(exec_ref exec, F&& report) {
    std::mutex one;
    bool going = true;
    exec.for_tasks(G_, [&](isize g, isize) {
      run_head(g, [&](const calibration_progress& p) {
        std::lock_guard lock(one);
        going = going && report(p);
        return going;
      });
    });
  }
  bool finished() const {
    return std::all_of(heads_.begin(), heads_.end(), [&](const head& h) { return h.stopped || h.step >= o_.steps; });
  }

  /// The best so far, of all heads.
  arrays weights() const {
    std::vector<std::vector<float>> all;
    for (const head& h : heads_) all.push_back(h.best);
    return form_.tensors(all);
  }
  /// Where an untrained map starts.
  arrays start() const {
    std::vector<std::vector<float>> all;
    for (isize g = 0; g < G_; ++g) all.push_back(form_.start(g));
    return form_.tensors(all);
  }

  arrays checkpoint() const {
    arrays out;
    for (isize g = 0; g < G_; ++g) {
      const head& h = heads_[static_cast<std::size_t>(g)];
      const isize size = static_cast<isize>(h.x.size());
      for (const auto& [name, values] : {std::pair{"x", &h.x}, {"m", &h.m}, {"v", &h.v}, {"best", &h.best}})
        out.emplace(key(g, name), array({size}, *values));
      out.emplace(key(g, "at"), array({5}, std::vector<double>{static_cast<double>(h.step), h.least, h.begin,
                                                               static_cast<double>(h.misses), h.stopped ? 1.0 : 0.0}));
    }
    out.emplace("options", array({static_cast<isize>(fingerprint().size())}, fingerprint()));
    return out;
  }
  void resume(const arrays& from) {
    const auto get = [&](const std::string& name) -> const array& {
      const auto at = from.find(name);
      require(at != from.end(), "the checkpoint has no tensor ", name);
      return at->second;
    };
    require(get("options").doubles() == fingerprint(),
            "the checkpoint was written with other options, or for another layer; resume with the same");
    for (isize g = 0; g < G_; ++g) {
      head next = heads_[static_cast<std::size_t>(g)];
      for (const auto& [name, values] :
           {std::pair{"x", &next.x}, {"m", &next.m}, {"v", &next.v}, {"best", &next.best}}) {
        const array& a = get(key(g, name));
        require(a.size() == static_cast<isize>(values->size()), "the checkpoint's ", key(g, name), " is ", a.describe(),
                "; wanted ", values->size(), " numbers");
        *values = a.floats();
      }
      const array& at = get(key(g, "at"));
      require(at.size() == 5, "the checkpoint's ", key(g, "at"), " is ", at.describe(), "; wanted 5 numbers");
      next.step = static_cast<isize>(at.at(0)), next.least = at.at(1), next.begin = at.at(2);
      next.misses = static_cast<isize>(at.at(3)), next.stopped = at.at(4) != 0.0;
      heads_[static_cast<std::size_t>(g)] = next;
    }
  }

 private:
  struct head {
    std::vector<float> x, m, v, best;
    isize step = 0, misses = 0;
    double least = 0, begin = 0;
    bool stopped = false;
  };
  static std::string key(isize g, const char* name) { return "head." + std::to_string(g) + "." + name; }
  std::vector<double> fingerprint() const {
    const auto& a = o_.optimiser;
    double sum = 0;
    for (const transfer_head& h : data_)
      for (std::size_t i = 0; i < h.lse.size(); i += 7) sum += static_cast<double>(h.lse[i]);
    return {static_cast<double>(o_.map),
            static_cast<double>(form_.features()),
            o_.loss.cross_entropy,
            o_.loss.mean_square,
            o_.loss.relative,
            static_cast<double>(o_.loss.window),
            static_cast<double>(o_.loss.first),
            static_cast<double>(o_.steps),
            static_cast<double>(o_.rows),
            static_cast<double>(o_.look_every),
            static_cast<double>(o_.patience),
            static_cast<double>(o_.look_rows),
            o_.held_out,
            a.rate,
            a.decay,
            a.b1,
            a.b2,
            a.eps,
            static_cast<double>(o_.seed),
            static_cast<double>(n_),
            static_cast<double>(G_),
            sum};
  }

  void check(const tensor_ref& q, const tensor_ref& k, const tensor_ref& v) const {
    require(q.batch == 1 && k.batch == 1 && v.batch == 1, "calibration takes one batch item; q has ", q.batch);
    require(k.heads >= 1 && q.heads % k.heads == 0 && q.length == k.length && v.length == k.length &&
                v.heads == k.heads && q.width == k.width,
            "q, k, v are ", fovea::detail::describe(q), ", ", fovea::detail::describe(k), ", ",
            fovea::detail::describe(v), "; wanted q [1, H, n, d], k [1, G, n, d], v [1, G, n, e]");
    require(q.type != dtype::f64, "calibration is done in f32; q is f64");
    require(o_.steps >= 1 && o_.rows >= 1 && o_.look_every >= 1 && o_.patience >= 1 && o_.look_rows >= 1,
            "steps, rows, look_every, patience, look_rows must be positive");
    require(o_.held_out > 0 && o_.held_out < 1, "held_out is ", o_.held_out, "; it must lie in (0, 1)");
    require(o_.loss.window >= 0 && o_.loss.first >= 0 && (causal_ || o_.loss.window == 0), "window is ", o_.loss.window,
            "; a window needs causal attention");
    require(first_row() + 2 * o_.rows <= train_rows() && train_rows() < n_, "q has ", n_,
            " rows; too few for batches of ", o_.rows, " from rows ", first_row(), " to ", train_rows());
    require(o_.optimiser.rate > 0 && o_.optimiser.decay >= 0, "rate and decay are ", o_.optimiser.rate, ", ",
            o_.optimiser.decay, "; wanted a positive rate and no negative decay");
  }
  /// Rows without any key outside the window teach nothing.
  isize first_row() const { return o_.loss.window > 0 ? o_.loss.window + o_.loss.first : 0; }
  isize train_rows() const { return n_ - static_cast<isize>(static_cast<double>(n_) * o_.held_out); }

  void exact_rows(const tensor_ref& q, const tensor_ref& k, const tensor_ref& v, double scale) {
    const isize R = q.heads / G_, e = v.width;
    const softmax_attention exact{.mask = causal_ ? mask(causal{}) : mask(no_mask{}), .scale = scale};
    std::vector<float> all(static_cast<std::size_t>(q.heads * n_ * e)), all_lse(static_cast<std::size_t>(q.heads * n_));
    prefill(serial, exact, q, k, v, bhnd(all.data(), 1, q.heads, n_, e),
            {.lse = bhnd(all_lse.data(), 1, q.heads, n_, 1)});
    const auto take = [&](const tensor_ref& t, isize first, isize count, std::vector<float>& to) {
      to.resize(static_cast<std::size_t>(count * n_ * t.width));
      for (isize h = 0; h < count; ++h)
        for (isize i = 0; i < n_; ++i)
          simd::load_row<simd::native, float>(t.type, t.row(0, first + h, i), t.width,
                                              to.data() + (h * n_ + i) * t.width);
    };
    for (isize g = 0; g < G_; ++g) {
      transfer_head& t = data_[static_cast<std::size_t>(g)];
      t.R = R, t.n = n_, t.d = d_, t.e = e, t.causal = causal_, t.scale = static_cast<float>(scale);
      take(q, g * R, R, t.q), take(k, g, 1, t.k), take(v, g, 1, t.v);
      t.o.assign(all.begin() + g * R * n_ * e, all.begin() + (g + 1) * R * n_ * e);
      t.lse.assign(all_lse.begin() + g * R * n_, all_lse.begin() + (g + 1) * R * n_);
      t.turn();
    }
  }

  std::vector<isize> batch(isize g, isize step) const {
    feature::random_source rng(o_.seed * 0x9e3779b97f4a7c15ULL + static_cast<std::uint64_t>(g) * 1000000007ULL +
                               static_cast<std::uint64_t>(step));
    const isize from = causal_ ? first_row() : 0, to = causal_ ? train_rows() : n_;
    std::vector<isize> rows;
    for (isize i = 0; i < o_.rows; ++i) {
      const double at = (static_cast<double>(i) + rng.uniform()) / static_cast<double>(o_.rows);
      isize row = from + static_cast<isize>(at * static_cast<double>(to - from));
      if (!causal_ && row % 8 == 7) --row;  // held out
      rows.push_back(std::min(row, to - 1));
    }
    return rows;
  }
  /// Enough rows for a regression on all channels, in rising order.
  std::vector<isize> many_rows(isize g) const {
    std::vector<isize> rows;
    for (isize step = 0; static_cast<isize>(rows.size()) < 6 * d_; ++step)
      for (const isize row : batch(g, step)) rows.push_back(row);
    std::sort(rows.begin(), rows.end());
    return rows;
  }
  std::vector<isize> held_out_rows() const {
    std::vector<isize> rows;
    if (!causal_)
      for (isize i = 7; i < n_; i += 8) rows.push_back(i);
    const isize from = train_rows(), count = std::min(o_.look_rows, n_ - from);
    for (isize i = 0; causal_ && i < count; ++i) rows.push_back(from + (2 * i + 1) * (n_ - from) / (2 * count));
    return rows;
  }

  template <class F>
  void run_head(isize g, F&& report) {
    head& at = heads_[static_cast<std::size_t>(g)];
    attention_transfer loss(data_[static_cast<std::size_t>(g)], form_, o_.loss);
    const std::vector<isize> looks = held_out_rows();
    std::vector<float> gradient;
    const auto look = [&] {
      const transfer_result r = loss(at.x, looks, nullptr);
      if (at.step == 0 || r.loss < at.least) {
        at.least = r.loss, at.best = at.x, at.misses = 0;
        if (at.step == 0) at.begin = r.loss;
      } else if (++at.misses >= o_.patience) {
        at.stopped = true;
      }
      return report({g, at.step, o_.steps, r, at.begin, at.least, at.stopped});
    };
    if (at.step == 0 && form_.gated()) at.x = form_.start(g), loss.match_rest(at.x, many_rows(g));
    if (at.step == 0 && !look()) return;
    while (!at.stopped && at.step < o_.steps) {
      loss(at.x, batch(g, at.step), &gradient, false);
      ++at.step;
      o_.optimiser.update(at.step, cosine_rate(o_.optimiser.rate, at.step, o_.steps), gradient, at.m, at.v, at.x);
      if ((at.step % o_.look_every == 0 || at.step == o_.steps) && !look()) return;
    }
  }

  calibration_options o_;
  isize d_, G_, n_;
  bool causal_;
  learned_map form_;
  std::vector<transfer_head> data_;
  std::vector<head> heads_;
};

}  // namespace train
}  // namespace FOVEA_ABI
}  // namespace fovea
