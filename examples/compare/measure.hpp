// SPDX-License-Identifier: MIT
#pragma once
/// @file  What is measured of one setting on one input: errors by row, time against exact, bytes, attention pictures.

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "setting.hpp"

namespace compare {

struct head_figures {
  double error_median = 0, error_p95 = 0, cosine = 0;
  std::optional<double> recall;
};

struct figures {
  int input = 0, setting = 0;
  std::string skipped;  ///< why the mechanism does not apply; empty: it does
  std::optional<double> prefill_ms, step_us, macs, recall, recall_p5;
  std::optional<double> density;  ///< share of the visible keys that is computed, over all rows together
  std::optional<double> prefill_ratio, step_ratio, state_ratio;  ///< exact over this, timed in turns
  std::optional<double> state_bytes;
  /// Of int8, each by itself: rounding what is stored (f32 arithmetic over the store), rounding what is multiplied (no store), and the
  /// share of the mass that skipping left out.
  std::optional<double> storage_error, arithmetic_error, skipped_mass;
  double error_median = 0, error_mean = 0, error_p95 = 0, error_p99 = 0, cosine = 0, worst_error = 0;
  int worst_head = 0;
  std::vector<head_figures> heads;
  std::vector<double> row_error, row_recall;  ///< of every row that is judged
  double keys_seen = 0, keys_computed = 0;    ///< of those rows, where a density can be said
};

/// One setting over the rows of all inputs it applies to.
struct pooled_figures {
  int setting = 0, inputs = 0;
  std::size_t rows = 0;
  double error_median = 0, error_mean = 0, error_p95 = 0, error_p99 = 0;
  double p95_by_input = 0;  ///< mean over the inputs of their p95
  std::optional<double> recall, recall_p5, density, prefill_ratio;
};
std::vector<pooled_figures> pooled(const std::vector<figures>& all);

struct timing_options {
  int repeats = 5;
  double budget_s = 0.6;  ///< of one setting on one input
};

/// Exact attention in double, [H, n, e].
std::vector<double> exact_output(const input& in);

/// `exact` is measured in turns with the setting's mechanism, so that a slow passage of the machine hits both.
figures measure(const input& in, const fovea::any_attention& exact, const setting& s, const fovea::any_attention& a,
                fovea::exec_ref exec, const timing_options& t);

/// Where the queries of a head look: [size, size] mass of query bins on key bins, by running the mechanism with bin indicators as values.
std::vector<float> attention_picture(const input& in, const fovea::any_attention& a, isize head, isize size);

}  // namespace compare
