// SPDX-License-Identifier: MIT
#pragma once
/// @file  What compare prints and writes: the table, report.json, report.html, the policy of --budget. Schema: report.schema.md.

#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "measure.hpp"

namespace compare {

using json = nlohmann::ordered_json;

struct picture {
  int input = 0, head = 0, setting = 0;
  std::string title;
  isize size = 0;
  std::vector<float> values;
};

/// The cheapest setting of each head within the error, and what the whole would save against exact.
struct assignment {
  int input = 0, head = 0, setting = 0;
  double error = 0;
};
struct budget_result {
  double error = 0;
  std::string error_of, cost_of;
  std::vector<assignment> assignments;
  double time_saved = 0, bytes_saved = 0;
};

struct machine_facts {
  std::string cpu, isa;
  int threads = 1;
  double fma_peak_gflops = 0, stream_gbs = 0;
};
machine_facts machine(int threads);

struct report {
  std::string command;
  machine_facts machine;
  std::vector<input> inputs;
  std::vector<setting> settings;
  std::vector<json> configs;  ///< of each setting, for the first input it applies to
  std::vector<figures> results;
  std::vector<picture> pictures;
  std::optional<budget_result> budget;
};

/// `error_of`: "median" or "p95" of a head's rows. `cost_of`: "prefill", "step" or "memory".
budget_result propose(const report& r, double error, const std::string& error_of, const std::string& cost_of);

void print_table(const report& r);
void print_pooled(const report& r);
json to_json(const report& r);
/// {"default": {...}, "overrides": [{"input", "layers", "heads", "attention", "error"}]}; every "attention" loads as an any_attention,
/// with the tensors of "weights" (relative to `folder`, where the policy will stand) if there are any. `engine` reads it.
json policy(const report& r, const std::string& folder);
/// report.json and report.html in `folder`; whole or not at all.
void write_report(const report& r, const std::string& folder);

}  // namespace compare
