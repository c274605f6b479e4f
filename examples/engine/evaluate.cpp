// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cstdio>
#include <set>

#include <fovea/interop/json.hpp>

#include "error.hpp"
#include "evaluation.hpp"
#include "pool.hpp"
#include "progress.hpp"

namespace engine {
namespace {

/// Exact first. Labels are made unique.
std::vector<policy> read_policies(const std::vector<std::string>& files) {
  std::vector<policy> all{exact_policy()};
  std::set<std::string> labels{all[0].label};
  for (const std::string& file : files) {
    policy p = read_policy(file);
    for (int i = 2; !labels.insert(p.label).second; ++i) p.label = p.label + " (" + std::to_string(i) + ")";
    all.push_back(std::move(p));
  }
  return all;
}

/// All policies in turns, `repeats` times: medians, and the medians of the ratios to exact of the same turn.
void measure_speeds(const model& net, fovea::exec_ref exec, const std::vector<attention_plan>& plans,
                    const evaluate_options& o, evaluation& e) {
  const isize context = o.speed_context > 0 ? o.speed_context : o.texts.context;
  std::vector<std::vector<speed>> runs(plans.size());
  progress bar("speed", o.repeats * static_cast<isize>(plans.size()));
  for (isize r = 0; r < o.repeats; ++r)
    for (std::size_t p = 0; p < plans.size(); ++p) {
      const auto& ids = e.texts[0].windows[0].tokens;
      runs[p].push_back(measure_speed(net, exec, plans[p], ids, context, o.steps, o.cache));
      bar.step();
    }
  for (std::size_t p = 0; p < plans.size(); ++p) {
    const auto median = [&](auto value) {
      std::vector<double> all;
      for (std::size_t r = 0; r < runs[p].size(); ++r) all.push_back(value(r));
      return quantile(all, 0.5);
    };
    evaluated_policy& out = e.policies[p];
    out.cost = runs[p][0];
    out.cost.prefill = median([&](std::size_t r) { return runs[p][r].prefill; });
    out.cost.prefill_attention = median([&](std::size_t r) { return runs[p][r].prefill_attention; });
    out.cost.step = median([&](std::size_t r) { return runs[p][r].step; });
    out.cost.step_attention = median([&](std::size_t r) { return runs[p][r].step_attention; });
    out.prefill_ratio = median([&](std::size_t r) { return runs[0][r].prefill / runs[p][r].prefill; });
    out.step_ratio = median([&](std::size_t r) { return runs[0][r].step / runs[p][r].step; });
  }
}

}  // namespace

int evaluate(const evaluate_options& o) {
  if (o.policies.empty()) refuse("no policy is given");
  if (o.block < 1 || o.chunk < 1 || o.repeats < 1 || o.steps < 1)
    refuse("block, chunk, repeats and steps must be at least 1");
  const model net(o.model);
  const pool threads(o.threads);
  evaluation e{o.command, o.model, net.config(), {}, {}};
  std::vector<attention_plan> plans;
  std::vector<compared_plan> others;
  for (policy& p : read_policies(o.policies)) {
    plans.push_back(make_plan(p, net.config()));
    if (!e.policies.empty()) others.push_back({p.label, plans.back()});
    e.policies.push_back({p, static_cast<isize>(changed_layers(p, net.config()).size()), {}, {}, {}});
  }
  const isize longest = std::max(o.texts.context, o.speed_context + o.steps);
  if (longest > net.config().context)
    refuse("windows and timed runs take ", longest, " tokens; the model's context is ", net.config().context);
  e.texts = choose_texts(o.texts, o.model);
  {
    progress bar("texts", 1);
    const auto figures = compare_plans(net, threads, plans[0], others, e.texts, {o.chunk, o.cache},
                                       [&](isize done, isize all) { bar.show(done, all); });
    for (std::size_t p = 0; p < e.policies.size(); ++p) {
      std::vector<token_figures> same = p == 0 ? figures[0] : figures[p - 1];
      for (token_figures& f : same)
        if (p == 0) {  // exact against itself
          f.nll = f.exact_nll;
          for (std::size_t w = 0; w < f.kl.size(); ++w)
            std::fill(f.kl[w].begin(), f.kl[w].end(), 0.0), std::fill(f.same[w].begin(), f.same[w].end(), 1.0);
        }
      for (const token_figures& f : same) e.policies[p].texts.push_back(summarise({&f, 1}, o.block));
      e.policies[p].all = summarise(same, o.block);
    }
  }
  measure_speeds(net, threads, plans, o, e);
  const auto j = to_json(e, o);
  if (o.json)
    std::printf("%s\n", j.dump().c_str());
  else
    print_table(e);
  if (!o.folder.empty()) {
    write_report(j, o.folder);
    std::fprintf(stderr, "written: %s/evaluate.html, %s/evaluate.json\n", o.folder.c_str(), o.folder.c_str());
  }
  return 0;
}

int report(const report_options& o) {
  const auto j = fovea::parse_json(fovea::read_text(o.input, 1 << 26), o.input);
  for (const char* key : {"fovea", "machine", "model", "how", "texts", "policies"})
    if (!j.is_object() || !j.contains(key)) throw fovea::file_error(o.input, "is not what `engine evaluate` writes");
  write_report(nlohmann::ordered_json::parse(j.dump()), o.folder);
  return 0;
}

}  // namespace engine
