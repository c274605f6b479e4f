// SPDX-License-Identifier: MIT
#include "comparison.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <memory>

#include <fovea/simd/exp.hpp>

#include "dense.hpp"

namespace engine {
namespace {

using P = fovea::simd::pack<float, fovea::simd::native>;

/// sum of p (log p - logits + lse), p = exp(log_p); n is the vocabulary.
double divergence(std::span<const float> log_p, std::span<const float> logits, double lse) {
  const auto n = static_cast<isize>(log_p.size());
  const P shift(static_cast<float>(lse));
  double sum = 0;
  isize i = 0;
  while (i + P::size <= n) {  // float sums of a few thousand terms, doubles over them
    P part(0.0F);
    const isize end = std::min(n - P::size, i + 4096);
    for (; i <= end; i += P::size) {
      const P a = P::load(log_p.data() + i);
      part = fovea::simd::fma(fovea::simd::exp(a), a - P::load(logits.data() + i) + shift, part);
    }
    sum += static_cast<double>(fovea::simd::reduce_add(part));
  }
  for (; i < n; ++i) {
    const double a = static_cast<double>(log_p[static_cast<std::size_t>(i)]);
    sum += std::exp(a) * (a - static_cast<double>(logits[static_cast<std::size_t>(i)]) + lse);
  }
  return std::max(sum, 0.0);
}

isize likeliest(std::span<const float> x) { return std::max_element(x.begin(), x.end()) - x.begin(); }

/// Exact attention's view of one chunk.
struct exact_chunk {
  std::vector<float> log_p;  // [rows, vocabulary]
  std::vector<double> nll;
  std::vector<isize> top;
};

exact_chunk look(const logits& l, std::span<const token> next) {
  exact_chunk e;
  e.log_p.resize(static_cast<std::size_t>(l.rows * l.vocabulary));
  for (isize r = 0; r < l.rows; ++r) {
    const auto row = l.row(r);
    const double lse = log_sum_exp(row);
    float* out = e.log_p.data() + r * l.vocabulary;
    for (std::size_t i = 0; i < row.size(); ++i) out[i] = row[i] - static_cast<float>(lse);
    e.nll.push_back(lse - static_cast<double>(row[next[static_cast<std::size_t>(r)]]));
    e.top.push_back(likeliest(row));
  }
  return e;
}

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

/// What one window is run through: exact first, then every plan.
struct runner {
  std::vector<std::unique_ptr<session>> sessions;  // [0] exact
  isize chunk;

  void window(const judged_window& w, std::vector<token_figures*>& into) {
    std::vector<sequence> sequences;
    for (const auto& s : sessions) sequences.push_back(s->make_sequence());
    const auto n = static_cast<isize>(w.tokens.size());
    const std::span<const token> all(w.tokens);
    for (isize at = 0; at < n - 1;) {
      // Calls end where counting begins, so that nothing before it costs logits.
      const bool counts = at + 1 >= w.from;
      const isize count = std::min(chunk, (counts ? n : w.from) - 1 - at);
      const auto tokens = all.subspan(static_cast<std::size_t>(at), static_cast<std::size_t>(count));
      const auto next = all.subspan(static_cast<std::size_t>(at + 1), static_cast<std::size_t>(count));
      exact_chunk exact;
      for (std::size_t s = 0; s < sessions.size(); ++s) {
        const logits l = sessions[s]->forward({{sequences[s], tokens}}, counts ? logits_of::all : logits_of::none);
        if (!counts) continue;
        if (s == 0)
          exact = look(l, next);
        else
          record(exact, l, next, *into[s - 1]);
      }
      at += count;
    }
  }
  static void record(const exact_chunk& exact, const logits& l, std::span<const token> next, token_figures& f) {
    for (isize r = 0; r < l.rows; ++r) {
      const auto i = static_cast<std::size_t>(r);
      const auto row = l.row(r);
      const double lse = log_sum_exp(row);
      f.exact_nll.back().push_back(exact.nll[i]);
      f.nll.back().push_back(lse - static_cast<double>(row[next[i]]));
      f.kl.back().push_back(
          divergence({exact.log_p.data() + r * l.vocabulary, static_cast<std::size_t>(l.vocabulary)}, row, lse));
      f.same.back().push_back(likeliest(row) == exact.top[i] ? 1.0 : 0.0);
    }
  }
};

}  // namespace

std::vector<std::vector<token_figures>> compare_plans(const model& net, fovea::exec_ref exec,
                                                      const attention_plan& exact,
                                                      const std::vector<compared_plan>& plans,
                                                      const std::vector<judged_text>& texts,
                                                      const comparison_options& o,
                                                      const std::function<void(isize, isize)>& progress) {
  isize longest = 2, done = 0, all = 0;
  for (const judged_text& t : texts)
    for (const judged_window& w : t.windows) longest = std::max(longest, static_cast<isize>(w.tokens.size())), ++all;
  runner run{{}, o.chunk};
  const session_options how{.context = longest, .rows = o.chunk, .cache = o.cache};
  run.sessions.push_back(std::make_unique<session>(net, exact, exec, how));
  for (const compared_plan& p : plans) run.sessions.push_back(std::make_unique<session>(net, p.plan, exec, how));
  std::vector<std::vector<token_figures>> figures(plans.size(), std::vector<token_figures>(texts.size()));
  for (std::size_t t = 0; t < texts.size(); ++t)
    for (const judged_window& w : texts[t].windows) {
      std::vector<token_figures*> into;
      for (auto& of_plan : figures) {
        token_figures& f = of_plan[t];
        f.exact_nll.emplace_back(), f.nll.emplace_back(), f.kl.emplace_back(), f.same.emplace_back();
        into.push_back(&f);
      }
      run.window(w, into);
      if (progress) progress(++done, all);
    }
  return figures;
}

double text_summary::ratio() const { return std::exp(difference.mean); }
double text_summary::ratio_low() const { return std::exp(difference.low); }
double text_summary::ratio_high() const { return std::exp(difference.high); }

text_summary summarise(std::span<const token_figures> texts, isize block) {
  std::vector<std::vector<double>> difference, kl;
  std::vector<double> every_kl;
  double exact = 0, mine = 0, same = 0, absolute = 0, count = 0;
  for (const token_figures& t : texts)
    for (std::size_t w = 0; w < t.nll.size(); ++w) {
      difference.emplace_back(), kl.push_back(t.kl[w]);
      every_kl.insert(every_kl.end(), t.kl[w].begin(), t.kl[w].end());
      for (std::size_t i = 0; i < t.nll[w].size(); ++i) {
        const double d = t.nll[w][i] - t.exact_nll[w][i];
        difference.back().push_back(d);
        exact += t.exact_nll[w][i], mine += t.nll[w][i], same += t.same[w][i], absolute += std::abs(d), count += 1;
      }
    }
  text_summary s;
  if (count == 0) return s;
  s.exact_perplexity = std::exp(exact / count), s.perplexity = std::exp(mine / count);
  s.difference = block_mean(difference, block), s.kl = block_mean(kl, block);
  s.kl_p99 = quantile(every_kl, 0.99), s.top1 = same / count, s.absolute = absolute / count;
  return s;
}

speed measure_speed(const model& net, fovea::exec_ref exec, const attention_plan& plan, std::span<const token> ids,
                    isize context, isize steps, fovea::dtype cache) {
  speed r{context, steps};
  session run(net, plan, exec, {.context = context + steps, .cache = cache});
  sequence text = run.make_sequence();
  std::vector<token> prompt;
  for (isize i = 0; i < context + steps; ++i) prompt.push_back(ids[static_cast<std::size_t>(i) % ids.size()]);
  const double start = seconds();
  run.forward({{text, std::span(prompt).first(static_cast<std::size_t>(context))}}, logits_of::last);
  r.prefill = seconds() - start, r.prefill_attention = run.spent.attention;
  std::vector<double> step, attention;
  for (isize i = 0; i < steps; ++i) {
    run.spent = {};
    const double t = seconds();
    run.forward({{text, std::span(prompt).subspan(static_cast<std::size_t>(context + i), 1)}}, logits_of::last);
    step.push_back(seconds() - t), attention.push_back(run.spent.attention);
  }
  r.step = quantile(step, 0.5), r.step_attention = quantile(attention, 0.5);
  r.bytes = text.bytes();
  return r;
}

}  // namespace engine
