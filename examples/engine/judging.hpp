// SPDX-License-Identifier: MIT
#pragma once
/// @file  The commands that say what a policy costs and loses: evaluate, sensitivity, policy.

#include <string>
#include <vector>

#include "commands.hpp"
#include "judged_text.hpp"

namespace engine {

struct judging_options : model_options {
  text_choice texts;
  isize block = 64;   ///< predictions that count as one when an interval is made
  isize chunk = 128;  ///< tokens of one call
  bool json = false;  ///< JSON to stdout instead of the table
};

struct evaluate_options : judging_options {
  std::vector<std::string> policies;
  std::string folder;       ///< "" or where evaluate.json and evaluate.html are written
  std::string command;      ///< as typed, for the report
  isize speed_context = 0;  ///< tokens of the timed prefill; 0: those of the texts
  isize steps = 16;         ///< timed decode steps
  isize repeats = 3;        ///< timed runs of each policy, in turns
};
int evaluate(const evaluate_options& o);

/// The page of an evaluate.json made again.
struct report_options {
  std::string input, folder;
};
int report(const report_options& o);

/// `attention` is the policy whose layers are swapped in.
struct sensitivity_options : judging_options {
  std::string output;   ///< "" or a JSON file
  bool triples = true;  ///< groups of three neighbouring layers as well
};
int sensitivity(const sensitivity_options& o);

struct policy_options : sensitivity_options {
  std::string ranking;  ///< a file that `sensitivity` wrote; "": it is measured
  double keep_loss = 0.005;
};
int make_policy(const policy_options& o);

}  // namespace engine
