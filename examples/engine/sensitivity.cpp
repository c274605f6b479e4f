// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <map>

#include <nlohmann/json.hpp>

#include <fovea/interop/json.hpp>

#include "error.hpp"
#include "pool.hpp"
#include "progress.hpp"
#include "ranking.hpp"

namespace engine {
namespace {

using json = nlohmann::ordered_json;

void print_swaps(const char* what, const std::vector<swapped>& swaps) {
  std::printf("%s, quietest first\n", what);
  for (const swapped& s : swaps) {
    const std::string name =
        s.first == s.last ? std::to_string(s.first) : std::to_string(s.first) + "-" + std::to_string(s.last);
    std::printf("  %-6s %9.3f ", name.c_str(), 1000 * s.score);
    for (const text_summary& t : s.texts)
      std::printf("  %9.3f %+7.2f +- %.2f", 1000 * t.kl.mean, 100 * (t.ratio() - 1), 100 * t.difference.error);
    std::printf("\n");
  }
}

void write_json(const std::string& path, const json& j) {
  fovea::write_whole(path, [&](std::ostream& out) { out << j.dump(1) << "\n"; });
}

void check(const judging_options& o, const model& net) {
  if (o.block < 1 || o.chunk < 1) refuse("block and chunk must be at least 1");
  if (o.texts.context > net.config().context)
    refuse("windows take ", o.texts.context, " tokens; the model's context is ", net.config().context);
}

/// Loss of the quietest layers swapped together, measured once for each number of layers.
class greedy_choice {
 public:
  greedy_choice(const model& net, fovea::exec_ref exec, const policy& p, std::vector<isize> order,
                std::vector<judged_text> texts, const policy_options& o)
      : net_(net), exec_(exec), policy_(p), order_(std::move(order)), texts_(std::move(texts)), options_(o) {}

  std::set<isize> layers(isize count) const { return {order_.begin(), order_.begin() + count}; }
  policy quietest(isize count) const { return only_in(policy_, layers(count), net_.config().layers); }
  isize all() const { return static_cast<isize>(order_.size()); }

  struct measured {
    text_summary together;
    std::vector<text_summary> each;
  };
  const measured& measure(isize count) {
    if (const auto at = known_.find(count); at != known_.end()) return at->second;
    const auto figures =
        compare_plans(net_, exec_, exact_plan(net_.config()), {{"", make_plan(quietest(count), net_.config())}}, texts_,
                      {options_.chunk, options_.cache});
    measured m{summarise(figures[0], options_.block), {}};
    for (const token_figures& f : figures[0]) m.each.push_back(summarise({&f, 1}, options_.block));
    const measured& kept = known_.emplace(count, m).first->second;
    std::fprintf(stderr, "  %2td layers: loss %+.2f %% +- %.2f, KL %.2f e-3%s\n", count,
                 100 * (kept.together.ratio() - 1), 100 * kept.together.difference.error, 1000 * kept.together.kl.mean,
                 holds(count) ? "" : "  (too much)");
    return kept;
  }
  /// Loss plus one standard error of all texts together within the bound, and no text shown to be beyond it.
  bool holds(isize count) {
    const measured& m = measure(count);
    bool all = std::expm1(m.together.difference.mean + m.together.difference.error) <= options_.keep_loss;
    for (const text_summary& t : m.each)
      all = all && std::expm1(t.difference.mean - t.difference.error) <= options_.keep_loss;
    return all;
  }
  /// Halving, which takes the loss to grow with the layers; whatever it finds was measured itself.
  isize most() {
    isize good = 0, bad = all() + 1;
    while (bad - good > 1) {
      const isize next = good == 0 && bad > all() ? all() : (good + bad) / 2;
      (holds(next) ? good : bad) = next;
    }
    return good;
  }

 private:
  const model& net_;
  fovea::exec_ref exec_;
  const policy& policy_;
  std::vector<isize> order_;
  std::vector<judged_text> texts_;
  const policy_options& options_;
  std::map<isize, measured> known_;
};

}  // namespace

int sensitivity(const sensitivity_options& o) {
  const model net(o.model);
  const pool threads(o.threads);
  check(o, net);
  const policy p = read_policy(o.attention);
  const ranking r = rank_layers(net, threads, p, choose_texts(o.texts, o.model), o);
  json j = to_json(r);
  j["policy"] = p.label;
  if (!o.output.empty()) write_json(o.output, j);
  if (o.json) {
    std::printf("%s\n", j.dump().c_str());
    return 0;
  }
  std::printf("%s: mean KL to exact attention in 0.001 nats; then of each text its KL and loss of perplexity, %%\n",
              p.label.c_str());
  for (std::size_t t = 0; t < r.texts.size(); ++t)
    std::printf("  %s, %td predictions\n", r.texts[t].c_str(), r.predictions[t]);
  print_swaps("one layer at a time", r.layers);
  if (!r.triples.empty()) print_swaps("three layers at a time", r.triples);
  return 0;
}

int make_policy(const policy_options& o) {
  const model net(o.model);
  const pool threads(o.threads);
  check(o, net);
  if (!(o.keep_loss > 0 && o.keep_loss < 10)) refuse("keep-loss is ", o.keep_loss, "; wanted a share such as 0.005");
  const policy p = read_policy(o.attention);
  // Layers are ranked on the first third of each text and the result is judged on the rest.
  text_choice seen = o.texts, unseen = o.texts;
  seen.last = unseen.first = 1.0 / 3;
  std::vector<isize> order;
  if (!o.ranking.empty())
    order = quietest_first(fovea::parse_json(fovea::read_text(o.ranking, 1 << 26), o.ranking), o.ranking,
                           net.config().layers);
  else
    for (const swapped& s : rank_layers(net, threads, p, choose_texts(seen, o.model), o).layers)
      order.push_back(s.first);
  greedy_choice choice(net, threads, p, order, choose_texts(unseen, o.model), o);
  const isize count = choice.most();
  if (count == 0) refuse(p.path, ": not even its quietest layer keeps the loss within ", 100 * o.keep_loss, " %");
  const auto& m = choice.measure(count);
  policy best = choice.quietest(count);
  best.label = p.label + ", " + std::to_string(count) + " layers";
  json j = to_json(best, std::filesystem::path(o.output).parent_path().string());
  j["measured"] = {{"loss", m.together.ratio() - 1},
                   {"error", m.together.difference.error},
                   {"kl", m.together.kl.mean},
                   {"predictions", m.together.difference.values},
                   {"keep_loss", o.keep_loss}};
  write_json(o.output, j);
  std::printf("%td of %td layers; loss %+.2f %% [%+.2f, %+.2f] over %td predictions; written: %s\n", count,
              choice.all(), 100 * (m.together.ratio() - 1), 100 * (m.together.ratio_low() - 1),
              100 * (m.together.ratio_high() - 1), m.together.difference.values, o.output.c_str());
  return 0;
}

}  // namespace engine
