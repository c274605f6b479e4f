// SPDX-License-Identifier: MIT
/// @file  One draw from beginning to end; and what it is called.

#include <sstream>

#include "draws/problem.hpp"

namespace draws {

outcome run(const draw& d, sabotage s) {
  outcome o;
  try {
    problem_of_draw p(d, s);
    try {
      switch (d.form) {
        case call_form::views: run_views(p); break;
        case call_form::state: run_state(p); break;
        case call_form::append: run_append(p); break;
        case call_form::packed:
        case call_form::batch: run_sequences(p); break;
      }
    } catch (const wrong&) {
      o.applied = p.applied.load();
      throw;
    }
    o.applied = p.applied.load();
  } catch (const contract_error& e) {
    o.refusal = e.what();
  } catch (const wrong& e) {
    o.wrong = e.what();
    return o;
  }
  const std::string why = refused(d);
  if (o.refusal.empty() != why.empty())
    o.wrong = why.empty() ? "refused: " + o.refusal : "accepted, and must be refused: " + why;
  return o;
}

}  // namespace draws
