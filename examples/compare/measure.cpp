// SPDX-License-Identifier: MIT
#include "measure.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>

#include <fovea/hybrid.hpp>
#include <fovea/softmax.hpp>

namespace compare {
namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

double quantile(std::vector<double> x, double at) {
  if (x.empty()) return std::numeric_limits<double>::quiet_NaN();
  const auto i = static_cast<std::ptrdiff_t>(at * static_cast<double>(x.size() - 1) + 0.5);
  std::nth_element(x.begin(), x.begin() + i, x.end());
  return x[static_cast<std::size_t>(i)];
}
double median(const std::vector<double>& x) { return quantile(x, 0.5); }
double mean(const std::vector<double>& x) {
  return std::accumulate(x.begin(), x.end(), 0.0) / static_cast<double>(x.size());
}

/// Two things in turns: the median time of the second, and the median ratio first / second.
struct turns {
  std::vector<double> first, second, ratio;
  template <class A, class B>
  void run(A&& a, B&& b, const timing_options& t) {
    const double start = now();
    for (int r = 0; r < t.repeats + 1; ++r) {
      const double t0 = now();
      a();
      const double t1 = now();
      b();
      const double t2 = now();
      if (r == 0 && t2 - start < t.budget_s) continue;  // warm-up
      first.push_back(t1 - t0), second.push_back(t2 - t1), ratio.push_back((t1 - t0) / (t2 - t1));
      if (t2 - start > t.budget_s) break;
    }
  }
};

/// A prefill or a step, with its workspace allocated beforehand.
struct call {
  const fovea::any_attention& a;
  fovea::exec_ref exec;
  fovea::buffer memory;
  call(const fovea::any_attention& mechanism, fovea::exec_ref e, const fovea::shape& s)
      : a(mechanism), exec(e), memory(a.workspace_size(s, e.concurrency()) + 64) {}
  fovea::call_options options() const { return {.lse = {}, .gates = {}, .workspace = memory.span()}; }
};

void time_prefill(const input& in, const fovea::any_attention& exact, const fovea::any_attention& a,
                  fovea::exec_ref exec, const timing_options& t, std::vector<float>& out, figures& f) {
  const call yard(exact, exec, in.shape()), own(a, exec, in.shape());
  std::vector<float> other(out.size());
  const auto to = [&](std::vector<float>& x) { return fovea::bhnd(x.data(), 1, in.H, in.n, in.e); };
  turns x;
  x.run([&] { fovea::prefill(exec, exact, in.Q(), in.K(), in.V(), to(other), yard.options()); },
        [&] { fovea::prefill(exec, a, in.Q(), in.K(), in.V(), to(out), own.options()); }, t);
  f.prefill_ms = 1e3 * median(x.second);
  f.prefill_ratio = median(x.ratio);
}

/// Steps with the whole input as context: the last token again and again, a few dozen times.
void time_step(const input& in, const fovea::any_attention& exact, const fovea::any_attention& a, fovea::exec_ref exec,
               const timing_options& t, figures& f) {
  if (!in.causal || !a.streaming()) return;
  const isize steps = 4 * t.repeats + 2;
  fovea::shape room = in.shape();
  room.m = in.n + steps;
  fovea::shape one = room;
  one.n = 1;
  const auto last = [&](fovea::view<const float> x) { return x.slice(in.n - 1, 1); };
  std::vector<float> all(static_cast<std::size_t>(in.H * in.n * in.e)), o(static_cast<std::size_t>(in.H * in.e));
  struct stream {
    call prefill, step;
    fovea::state s;
  };
  const auto start = [&](const fovea::any_attention& m) {
    stream x{call(m, exec, room), call(m, exec, one), m.make_state(room)};
    fovea::prefill(exec, m, in.Q(), in.K(), in.V(), fovea::bhnd(all.data(), 1, in.H, in.n, in.e), x.s);
    return x;
  };
  stream yard = start(exact), own = start(a);
  const auto step = [&](const fovea::any_attention& m, stream& x) {
    fovea::step(exec, m, last(in.Q()), last(in.K()), last(in.V()), fovea::bhnd(o.data(), 1, in.H, 1, in.e), x.s,
                x.step.options());
  };
  turns x;
  x.run([&] { step(exact, yard); }, [&] { step(a, own); }, {static_cast<int>(steps) - 2, t.budget_s});
  f.step_us = 1e6 * median(x.second);
  f.step_ratio = median(x.ratio);
}

/// The last `in.decode` rows as decoding gives them: one prefill of what is before them, then step by step.
void decode_rows(const input& in, const fovea::any_attention& a, fovea::exec_ref exec, std::vector<float>& out) {
  if (in.decode == 0 || !in.causal || !a.streaming()) return;
  fovea::state s = a.make_state(in.shape());
  const auto rows = [&](isize first, isize count) {
    fovea::prefill(exec, a, in.Q().slice(first, count), in.K().slice(first, count), in.V().slice(first, count),
                   fovea::bhnd(out.data(), 1, in.H, in.n, in.e).slice(first, count), s);
  };
  rows(0, in.n - in.decode);
  for (isize i = in.n - in.decode; i < in.n; ++i) rows(i, 1);
}

/// Median over rows of all heads of the error against exact attention.
double median_error(const input& in, const std::vector<float>& out) {
  std::vector<double> errors;
  for (isize h = 0; h < in.H; ++h)
    for (isize i = in.from; i < in.n; ++i) {
      double diff = 0, norm = 0;
      for (isize c = 0; c < in.e; ++c) {
        const auto at = static_cast<std::size_t>((h * in.n + i) * in.e + c);
        diff += std::pow(static_cast<double>(out[at]) - in.exact[at], 2), norm += in.exact[at] * in.exact[at];
      }
      errors.push_back(norm > 0 ? std::sqrt(diff / norm) : std::sqrt(diff));
    }
  return median(errors);
}

/// The parts of an int8 setting, or of one that skips. `out`: of a prefill over views; where the setting stores int8 it is replaced by one over its store.
void int8_parts(const input& in, const fovea::any_attention& a, fovea::exec_ref exec, std::vector<float>& out,
                figures& f) {
  const auto* own = a.as<fovea::softmax_attention>();
  if (own == nullptr) return;
  const auto to = [&](std::vector<float>& x) { return fovea::bhnd(x.data(), 1, in.H, in.n, in.e); };
  const auto over_store = [&](const fovea::softmax_attention& m, std::vector<float>& x) {
    fovea::state s = m.make_state(in.shape());
    fovea::prefill(exec, m, in.Q(), in.K(), in.V(), to(x), s);
  };
  const bool stored = in.causal && own->store.type == fovea::dtype::i8;
  fovea::softmax_attention part = *own;
  part.skip = 0;
  std::vector<float> other(out.size()), mass(static_cast<std::size_t>(in.H * in.n));
  if (own->arithmetic == fovea::precision::int8) {
    fovea::prefill(exec, part, in.Q(), in.K(), in.V(), to(other));
    f.arithmetic_error = median_error(in, other);
  }
  if (stored) {
    part.arithmetic = fovea::precision::f32;
    over_store(part, other);
    f.storage_error = median_error(in, other);
    over_store(*own, out);
  }
  if (own->skip > 0) {
    fovea::call_options o;
    o.skipped = fovea::bhnd(mass.data(), 1, in.H, in.n, 1);
    fovea::prefill(exec, *own, in.Q(), in.K(), in.V(), to(other), o);
    double sum = 0;
    for (isize h = 0; h < in.H; ++h)
      for (isize i = in.from; i < in.n; ++i) sum += static_cast<double>(mass[static_cast<std::size_t>(h * in.n + i)]);
    f.skipped_mass = sum / static_cast<double>(in.H * (in.n - in.from));
  }
}

void compare_rows(const input& in, const std::vector<float>& out, figures& f) {
  std::vector<double>& every = f.row_error;
  double cosine_sum = 0;
  for (isize h = 0; h < in.H; ++h) {
    std::vector<double> errors;
    double cosine = 0;
    for (isize i = in.from; i < in.n; ++i) {
      const float* o = out.data() + (h * in.n + i) * in.e;
      const double* want = in.exact.data() + (h * in.n + i) * in.e;
      double diff = 0, norm = 0, own = 0, dot = 0;
      for (isize c = 0; c < in.e; ++c) {
        const double x = static_cast<double>(o[c]);
        diff += (x - want[c]) * (x - want[c]), norm += want[c] * want[c], own += x * x, dot += x * want[c];
      }
      errors.push_back(norm > 0 ? std::sqrt(diff / norm) : std::sqrt(diff));
      cosine += norm > 0 && own > 0 ? dot / std::sqrt(norm * own) : 0;
    }
    head_figures g;
    g.error_median = median(errors), g.error_p95 = quantile(errors, 0.95),
    g.cosine = cosine / static_cast<double>(in.n - in.from);
    every.insert(every.end(), errors.begin(), errors.end());
    cosine_sum += g.cosine;
    if (h == 0 || !(g.error_median <= f.worst_error))
      f.worst_head = static_cast<int>(h), f.worst_error = g.error_median;
    f.heads.push_back(g);
  }
  f.error_median = median(every), f.error_mean = mean(every);
  f.error_p95 = quantile(every, 0.95), f.error_p99 = quantile(every, 0.99);
  f.cosine = cosine_sum / static_cast<double>(in.H);
}

/// Share of the exact attention mass on the keys that a softmax mask lets through, by head.
void mask_recall(const input& in, const fovea::softmax_attention& m, figures& f) {
  const fovea::mask_site at0 = m.site(in.shape(), 0);
  double total = 0;
  std::vector<double> s(static_cast<std::size_t>(in.n));
  for (isize h = 0; h < in.H; ++h) {
    fovea::mask_site at = at0;
    at.h = h;
    double sum = 0;
    isize rows = 0;
    for (isize i = 0; i < in.n; i += 8, ++rows) {  // every eighth row is plenty for a mean
      const isize last = in.causal ? i + 1 : in.n;
      const float *q = in.q.data() + (h * in.n + i) * in.d, *k = in.k.data() + (h / (in.H / in.G)) * in.n * in.d;
      double top = -std::numeric_limits<double>::infinity(), all = 0, kept = 0;
      for (isize j = 0; j < last; ++j) {
        float dot = 0;
        for (isize c = 0; c < in.d; ++c) dot += q[c] * k[j * in.d + c];
        s[static_cast<std::size_t>(j)] = in.scale * static_cast<double>(dot);
        top = std::max(top, s[static_cast<std::size_t>(j)]);
      }
      for (isize j = 0; j < last; ++j) {
        const double p = std::exp(s[static_cast<std::size_t>(j)] - top);
        all += p, kept += m.mask.visible(at, i, j) ? p : 0;
      }
      sum += kept / all;
    }
    f.heads[static_cast<std::size_t>(h)].recall = sum / static_cast<double>(rows);
    total += *f.heads[static_cast<std::size_t>(h)].recall;
  }
  f.recall = total / static_cast<double>(in.H);
}

void find_recall(const input& in, const setting& s, const fovea::any_attention& a, figures& f) {
  if (s.family == "window") {
    if (const auto* m = a.as<fovea::softmax_attention>()) mask_recall(in, *m, f);
  }
  if (const auto* m = a.as<fovea::hybrid_attention>()) {
    std::vector<float> rows(static_cast<std::size_t>(in.H * in.n));
    const auto to = fovea::bhnd(rows.data(), 1, in.H, in.n, 1);
    fovea::mass_recall(fovea::serial, *m, in.Q(), in.K(), in.V(), to);
    double total = 0;
    for (isize h = 0; h < in.H; ++h) {
      double sum = 0;
      for (isize i = in.from; i < in.n; ++i) {
        f.row_recall.push_back(static_cast<double>(rows[static_cast<std::size_t>(h * in.n + i)]));
        sum += f.row_recall.back();
      }
      f.heads[static_cast<std::size_t>(h)].recall = sum / static_cast<double>(in.n - in.from);
      total += sum / static_cast<double>(in.n - in.from);
    }
    f.recall = total / static_cast<double>(in.H), f.recall_p5 = quantile(f.row_recall, 0.05);
    fovea::computed_density(fovea::serial, *m, in.Q(), in.K(), in.V(), to);
    for (isize h = 0; h < in.H; ++h)
      for (isize i = in.from; i < in.n; ++i) {
        const double seen = static_cast<double>(in.causal ? i + 1 : in.n);
        f.keys_seen += seen;
        f.keys_computed += seen * static_cast<double>(rows[static_cast<std::size_t>(h * in.n + i)]);
      }
    f.density = f.keys_computed / f.keys_seen;
  }
}

}  // namespace

std::vector<double> exact_output(const input& in) {
  const auto wide = [](const std::vector<float>& x) { return std::vector<double>(x.begin(), x.end()); };
  const std::vector<double> q = wide(in.q), k = wide(in.k), v = wide(in.v);
  std::vector<double> out(static_cast<std::size_t>(in.H * in.n * in.e));
  const fovea::softmax_attention m{.mask = in.causal ? fovea::mask(fovea::causal{}) : fovea::mask(fovea::no_mask{}),
                                   .scale = in.scale};
  fovea::prefill(fovea::serial, m, fovea::bhnd(q.data(), 1, in.H, in.n, in.d),
                 fovea::bhnd(k.data(), 1, in.G, in.n, in.d), fovea::bhnd(v.data(), 1, in.G, in.n, in.e),
                 fovea::bhnd(out.data(), 1, in.H, in.n, in.e));
  return out;
}

figures measure(const input& in, const fovea::any_attention& exact, const setting& s, const fovea::any_attention& a,
                fovea::exec_ref exec, const timing_options& t) {
  figures f;
  std::vector<float> out(static_cast<std::size_t>(in.H * in.n * in.e), std::numeric_limits<float>::quiet_NaN());
  time_prefill(in, exact, a, exec, t, out, f);
  time_step(in, exact, a, exec, t, f);
  if (s.family == "int8" || a.takes_skipped()) int8_parts(in, a, exec, out, f);
  decode_rows(in, a, exec, out);
  compare_rows(in, out, f);
  f.macs = a.macs(in.shape());
  if (in.causal && a.streaming()) {
    f.state_bytes = static_cast<double>(a.state_bytes(in.shape()));
    f.state_ratio = static_cast<double>(exact.state_bytes(in.shape())) / std::max(1.0, *f.state_bytes);
  }
  if (s.family == "exact") {  // against itself: what is left is noise
    f.prefill_ratio = 1.0;
    if (f.step_ratio) f.step_ratio = 1.0;
  }
  find_recall(in, s, a, f);
  return f;
}

std::vector<pooled_figures> pooled(const std::vector<figures>& all) {
  std::map<int, std::vector<const figures*>> by_setting;
  for (const figures& f : all)
    if (f.skipped.empty()) by_setting[f.setting].push_back(&f);
  std::vector<pooled_figures> table;
  for (const auto& [setting, list] : by_setting) {
    std::vector<double> error, recall, ratio;
    double seen = 0, computed = 0, p95 = 0;
    for (const figures* f : list) {
      error.insert(error.end(), f->row_error.begin(), f->row_error.end());
      recall.insert(recall.end(), f->row_recall.begin(), f->row_recall.end());
      if (f->prefill_ratio) ratio.push_back(*f->prefill_ratio);
      seen += f->keys_seen, computed += f->keys_computed, p95 += f->error_p95;
    }
    pooled_figures x;
    x.setting = setting, x.inputs = static_cast<int>(list.size()), x.rows = error.size();
    x.error_median = median(error), x.error_mean = mean(error);
    x.error_p95 = quantile(error, 0.95), x.error_p99 = quantile(error, 0.99);
    x.p95_by_input = p95 / static_cast<double>(list.size());
    if (recall.size() == error.size()) x.recall = mean(recall), x.recall_p5 = quantile(recall, 0.05);
    if (seen > 0) x.density = computed / seen;
    if (!ratio.empty()) x.prefill_ratio = median(ratio);
    table.push_back(x);
  }
  return table;
}

std::vector<float> attention_picture(const input& in, const fovea::any_attention& a, isize head, isize size) {
  const auto bin = [&](isize i) { return i * size / in.n; };
  std::vector<float> v(static_cast<std::size_t>(in.G * in.n * size), 0.0F),
      out(static_cast<std::size_t>(in.H * in.n * size));
  for (isize g = 0; g < in.G; ++g)
    for (isize j = 0; j < in.n; ++j) v[static_cast<std::size_t>((g * in.n + j) * size + bin(j))] = 1.0F;
  fovea::prefill(fovea::serial, a, in.Q(), in.K(),
                 fovea::bhnd(static_cast<const float*>(v.data()), 1, in.G, in.n, size),
                 fovea::bhnd(out.data(), 1, in.H, in.n, size));
  std::vector<float> picture(static_cast<std::size_t>(size * size), 0.0F), rows(static_cast<std::size_t>(size), 0.0F);
  for (isize i = 0; i < in.n; ++i) {
    rows[static_cast<std::size_t>(bin(i))] += 1.0F;
    for (isize c = 0; c < size; ++c)
      picture[static_cast<std::size_t>(bin(i) * size + c)] +=
          out[static_cast<std::size_t>((head * in.n + i) * size + c)];
  }
  for (isize r = 0; r < size; ++r)
    for (isize c = 0; c < size; ++c)
      picture[static_cast<std::size_t>(r * size + c)] /= rows[static_cast<std::size_t>(r)];
  return picture;
}

}  // namespace compare
