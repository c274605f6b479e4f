// SPDX-License-Identifier: MIT
#pragma once
/// @file  Attention plans beside exact attention on the same tokens: what every prediction becomes, and what each plan costs.
///
///   nll       -log q(next), q the plan's distribution; its difference to exact is paired, token by token
///   kl        sum_x p(x) (log p(x) - log q(x)), p exact's distribution of the next token
///   same      the likeliest next token is the same
///
/// Memory     one chunk of exact log-probabilities and of every plan's logits: (1 + plans) * chunk * vocabulary floats.

#include <functional>
#include <string>
#include <vector>

#include "commands.hpp"
#include "judged_text.hpp"
#include "session.hpp"
#include "statistics.hpp"

namespace engine {

/// Of the counted predictions of one text, by window.
struct token_figures {
  std::vector<std::vector<double>> exact_nll, nll, kl, same;
};

struct compared_plan {
  std::string label;
  attention_plan plan;
};

struct comparison_options {
  isize chunk = 128;
  fovea::dtype cache = fovea::dtype::f16;
};

/// [plan][text]. `exact` is what the others are measured against. `progress` is told what is done of how much.
std::vector<std::vector<token_figures>> compare_plans(const model& net, fovea::exec_ref exec,
                                                      const attention_plan& exact,
                                                      const std::vector<compared_plan>& plans,
                                                      const std::vector<judged_text>& texts,
                                                      const comparison_options& o,
                                                      const std::function<void(isize, isize)>& progress = {});

/// Figures of one text, or of several together.
struct text_summary {
  double exact_perplexity = 0, perplexity = 0;
  interval difference;  ///< of the NLL, nats
  interval kl;
  double kl_p99 = 0, top1 = 0;  ///< top1: share of predictions with the same likeliest token
  double absolute = 0;          ///< mean |difference|
  double ratio() const;         ///< perplexity over exact's, by the paired difference
  double ratio_low() const;
  double ratio_high() const;
};
text_summary summarise(std::span<const token_figures> texts, isize block);

/// Seconds and bytes of one plan at a length.
struct speed {
  isize context = 0, steps = 0;
  double prefill = 0, prefill_attention = 0;  ///< seconds of a prefill of `context` tokens
  double step = 0, step_attention = 0;        ///< seconds of one decode step behind it, median
  std::size_t bytes = 0;                      ///< stores and states of the sequence
};
speed measure_speed(const model& net, fovea::exec_ref exec, const attention_plan& plan, std::span<const token> ids,
                    isize context, isize steps, fovea::dtype cache);

}  // namespace engine
