// SPDX-License-Identifier: MIT
#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <optional>
#include <string_view>

#include <nlohmann/json.hpp>

#include "common/machine.hpp"
#include "error.hpp"
#include "setup.hpp"

namespace engine {
namespace {

double median(std::vector<double> x) {
  std::sort(x.begin(), x.end());
  return x[x.size() / 2];
}

/// Bytes a second at which the threads read all weights once, as a decode step would at best.
double read_rate(fovea::exec_ref exec, const model& net) {
  const model_config& c = net.config();
  std::vector<const matrix*> all{&net.output()};
  for (isize l = 0; l < c.layers; ++l) {
    const layer_weights& w = net.layer(l);
    all.insert(all.end(), {&w.q, &w.k, &w.v, &w.o, &w.gate, &w.up, &w.down});
  }
  const double start = machine::now();
  exec.for_tasks(static_cast<isize>(all.size()), [&](isize i, isize) {
    const matrix& m = *all[static_cast<std::size_t>(i)];
    machine::use(machine::stream_read(m.data, m.bytes()));
  });
  return static_cast<double>(net.decode_bytes()) / (machine::now() - start);
}

/// What attention does according to the mechanisms' own counts; none where one of them has no count.
struct counted {
  double macs = 0;   ///< multiply-adds
  double bytes = 0;  ///< of the state that a step reads
};
std::optional<counted> attention_work(const session& s, isize n, isize m) {
  const model_config& c = s.of().config();
  counted sum;
  try {
    for (const layer_plan& layer : s.plan().layers)
      for (const head_group& g : layer) {
        const fovea::shape z{1,
                             static_cast<isize>(g.heads.size()),
                             static_cast<isize>(kv_heads_of(c, g.heads).size()),
                             n,
                             m,
                             c.head_dim,
                             c.head_dim};
        sum.macs += n == 1 ? g.mechanism.step_macs(z) : g.mechanism.macs(z);
        fovea::shape stored = z;
        if (plain_softmax(g) != nullptr || g.mechanism.name() == std::string_view("hybrid"))
          stored.type = s.options().cache;
        sum.bytes += static_cast<double>(g.mechanism.state_bytes(stored));
      }
  } catch (const fovea::contract_error&) {
    return std::nullopt;
  }
  return sum;
}

double share(double part, double rest) { return part / (part + rest); }

/// True if what a sequence keeps does not grow with its tokens.
bool constant_memory(const attention_plan& plan, const model_config& c) {
  for (const layer_plan& layer : plan.layers)
    for (const head_group& g : layer) {
      fovea::shape z{1,
                     static_cast<isize>(g.heads.size()),
                     static_cast<isize>(kv_heads_of(c, g.heads).size()),
                     1,
                     0,
                     c.head_dim,
                     c.head_dim};
      const auto bytes = [&](isize m) { return z.m = m, g.mechanism.state_bytes(z); };
      if (plain_softmax(g) != nullptr || bytes(1 << 15) != bytes(1 << 16)) return false;
    }
  return true;
}

struct measured {
  isize context = 0, fed = 0;  ///< tokens before the steps; those of them that were fed just before
  double prefill_seconds = 0, step_seconds = 0;
  profile prefill, steps;
  double stream = 0;  ///< bytes a second
  std::size_t state_bytes = 0;
};

/// Feeds `text` until it holds `context` tokens, then times steps behind them.
measured measure(session& s, fovea::exec_ref exec, sequence& text, isize context, isize steps) {
  const auto vocabulary = static_cast<std::uint64_t>(s.of().config().vocabulary);
  std::vector<std::uint32_t> prompt;
  for (auto i = static_cast<std::uint64_t>(text.tokens()); i < static_cast<std::uint64_t>(context); ++i)
    prompt.push_back(static_cast<std::uint32_t>(i * 2654435761U % vocabulary));
  measured r;
  r.context = context, r.fed = static_cast<isize>(prompt.size());
  s.spent = {};
  double start = machine::now();
  s.forward({{text, prompt}}, logits_of::last);
  r.prefill_seconds = machine::now() - start, r.prefill = s.spent;
  s.spent = {};
  std::vector<double> times, rates;
  for (isize i = 0; i < steps; ++i) {
    const std::uint32_t next = prompt[static_cast<std::size_t>(i % r.fed)];
    start = machine::now();
    s.forward({{text, {&next, 1}}}, logits_of::last);
    times.push_back(machine::now() - start);
    if (i % 4 == 0) rates.push_back(read_rate(exec, s.of()));  // between the steps: machines are shared and drift
  }
  r.steps = s.spent, r.step_seconds = median(times), r.stream = median(rates), r.state_bytes = text.bytes();
  return r;
}

nlohmann::json milliseconds(const profile& p, double calls) {
  const double scale = 1000 / calls;
  return {{"attention", p.attention * scale},
          {"dense", p.dense * scale},
          {"output", p.output * scale},
          {"other", p.other * scale}};
}

nlohmann::json describe(const session& s, const measured& r, isize steps) {
  const model& net = s.of();
  const double output = static_cast<double>(net.output().rows) * static_cast<double>(net.output().columns);
  nlohmann::json j = {{"context", r.context},
                      {"prefill_tokens_per_second", static_cast<double>(r.fed) / r.prefill_seconds},
                      {"decode_tokens_per_second", 1 / r.step_seconds},
                      {"prefill_attention_time_share", r.prefill.attention / r.prefill.total()},
                      {"decode_attention_time_share", r.steps.attention / r.steps.total()},
                      {"prefill_milliseconds", milliseconds(r.prefill, 1)},
                      {"step_milliseconds", milliseconds(r.steps, static_cast<double>(steps))},
                      {"state_bytes", r.state_bytes},
                      {"stream_bytes_per_second", r.stream}};
  if (const auto work = attention_work(s, r.fed, r.context))
    j["prefill_attention_flop_share"] = share(work->macs, net.dense_macs() * static_cast<double>(r.fed) + output);
  if (const auto work = attention_work(s, 1, r.context + 1)) {
    j["decode_attention_flop_share"] = share(work->macs, net.dense_macs() + output);
    const double bytes = static_cast<double>(net.decode_bytes()) + work->bytes;
    j["decode_bytes"] = bytes;
    j["decode_bandwidth_share"] = bytes / r.stream / r.step_seconds;
  }
  return j;
}

void print(const nlohmann::json& j) {
  const auto percent = [&](const char* key) { return j.contains(key) ? 100 * j[key].get<double>() : 0.0 / 0.0; };
  std::printf("%8td %9.1f %8.1f %8.1f %10.2f %8.1f %8.1f %9.1f %11.1f\n", j["context"].get<std::ptrdiff_t>(),
              j["prefill_tokens_per_second"].get<double>(), percent("prefill_attention_time_share"),
              percent("prefill_attention_flop_share"), j["decode_tokens_per_second"].get<double>(),
              percent("decode_attention_time_share"), percent("decode_attention_flop_share"),
              percent("decode_bandwidth_share"), j["state_bytes"].get<double>() / 1048576);
  std::fflush(stdout);
}

}  // namespace

int bench(const bench_options& o) {
  setup s(o);
  isize longest = 0;
  for (const isize c : o.contexts) {
    if (c < 1) refuse("a context of ", c, " tokens cannot be measured; wanted at least 1");
    longest = std::max(longest, c);
  }
  const bool goes_on = o.to > longest && constant_memory(s.plan, s.net.config());
  session run(s.net, s.plan, s.threads,
              {.context = std::max(longest, goes_on ? o.to : 0) + o.steps, .rows = o.rows, .cache = o.cache});
  nlohmann::json all = {{"cpu", machine::cpu_name()}, {"threads", o.threads}, {"rows", nlohmann::json::array()}};
  if (!o.json)
    std::printf("%8s %9s %8s %8s %10s %8s %8s %9s %11s\n%8s %9s %8s %8s %10s %8s %8s %9s %11s\n", "context", "prefill",
                "att.time", "att.flop", "decode", "att.time", "att.flop", "of stream", "state", "tokens", "tokens/s",
                "%", "%", "tokens/s", "%", "%", "%", "MiB");
  const auto row = [&](sequence& text, isize c) {
    all["rows"].push_back(describe(run, measure(run, s.threads, text, c, o.steps), o.steps));
    if (!o.json) print(all["rows"].back());
  };
  sequence last = run.make_sequence();
  for (const isize c : o.contexts) row(last = run.make_sequence(), c);
  for (isize c = 2 * o.contexts.back(); goes_on && c <= o.to; c *= 2) row(last, c);
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  all["peak_resident_bytes"] = static_cast<double>(usage.ru_maxrss) * 1024;
  if (o.json)
    std::printf("%s\n", all.dump().c_str());
  else
    std::printf("peak resident memory %.0f MiB, the mapped weights of %.0f MiB included\n",
                static_cast<double>(usage.ru_maxrss) / 1024, static_cast<double>(s.net.decode_bytes()) / 1048576);
  return 0;
}

}  // namespace engine
