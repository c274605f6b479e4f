// SPDX-License-Identifier: MIT
#include "perplexity.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>

#include <nlohmann/json.hpp>

#include "dense.hpp"
#include "error.hpp"
#include "setup.hpp"

namespace engine {

std::vector<std::int64_t> windows_of(std::size_t tokens, const std::vector<std::int64_t>& offsets, isize context) {
  const auto all = static_cast<std::int64_t>(tokens);
  if (context < 2) refuse("a window of ", context, " tokens predicts nothing; wanted at least 2");
  for (const std::int64_t at : offsets)
    if (at < 0 || at + context > all)
      refuse("the window at offset ", at, " ends at token ", at + context, "; the text has ", all);
  if (!offsets.empty()) return offsets;
  std::vector<std::int64_t> out;
  for (std::int64_t at = 0; at + context <= all; at += context) out.push_back(at);
  if (out.empty()) refuse("the text has ", all, " tokens; a window takes ", context);
  return out;
}

std::vector<double> window_nll(session& run, std::span<const token> ids, std::span<const std::int64_t> offsets,
                               isize context, isize chunk) {
  std::vector<sequence> sequences;
  for (std::size_t w = 0; w < offsets.size(); ++w) sequences.push_back(run.make_sequence());
  std::vector<double> nll(offsets.size() * static_cast<std::size_t>(context - 1));
  for (isize first = 0; first < context - 1; first += chunk) {
    const isize count = std::min(chunk, context - 1 - first);
    std::vector<piece> pieces;
    for (std::size_t w = 0; w < offsets.size(); ++w)
      pieces.push_back(
          {sequences[w], ids.subspan(static_cast<std::size_t>(offsets[w] + first), static_cast<std::size_t>(count))});
    const logits l = run.forward(pieces, logits_of::all);
    for (isize row = 0; row < l.rows; ++row) {
      const isize w = row / count, i = row % count;
      const token next = ids[static_cast<std::size_t>(offsets[static_cast<std::size_t>(w)] + first + i + 1)];
      nll[static_cast<std::size_t>(w * (context - 1) + first + i)] =
          log_sum_exp(l.row(row)) - static_cast<double>(l.row(row)[next]);
    }
  }
  return nll;
}

namespace {
double mean(std::span<const double> x) {
  double sum = 0;
  for (const double a : x) sum += a;
  return sum / static_cast<double>(x.size());
}
}  // namespace

int perplexity(const perplexity_options& o) {
  if (o.chunk < 1 || o.batch < 1) refuse("chunk and batch are ", o.chunk, ", ", o.batch, "; wanted at least 1");
  setup s(o);
  const std::vector<token> ids = read_tokens(o.tokens.empty() ? o.text : o.tokens, o.model, o.tokens.empty());
  const auto offsets = windows_of(ids.size(), o.offsets, o.context);
  if (o.context > s.net.config().context)
    refuse("a window of ", o.context, " tokens is longer than the model's context of ", s.net.config().context);
  session run(s.net, s.plan, s.threads, {.context = o.context, .cache = o.cache});
  const auto start = std::chrono::steady_clock::now();
  std::vector<double> nll, each;
  const auto batch = static_cast<std::size_t>(o.batch);
  for (std::size_t w = 0; w < offsets.size(); w += batch) {
    const auto some = std::span(offsets).subspan(w, std::min(batch, offsets.size() - w));
    const std::vector<double> part = window_nll(run, ids, some, o.context, o.chunk);
    nll.insert(nll.end(), part.begin(), part.end());
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  const auto per = static_cast<std::size_t>(o.context - 1);
  for (std::size_t w = 0; w < offsets.size(); ++w) each.push_back(mean(std::span(nll).subspan(w * per, per)));
  const double all = mean(nll);
  if (o.json) {
    const nlohmann::json out = {{"mean_nll", all},         {"perplexity", std::exp(all)},
                                {"predicted", nll.size()}, {"windows", each.size()},
                                {"nll_each", each},        {"seconds", seconds}};
    std::printf("%s\n", out.dump().c_str());
  } else {
    std::printf("mean NLL %.6f, perplexity %.4f, %zu tokens predicted in %zu windows of %td, %.1f s\n", all,
                std::exp(all), nll.size(), each.size(), o.context, seconds);
  }
  return 0;
}

}  // namespace engine
