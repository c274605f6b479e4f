// SPDX-License-Identifier: MIT
#pragma once
/// @file  Mask and score of a draw, twice: as the library's policies, and as plain functions written from their definitions.
///
/// Contract   the plain functions share no code with the policies, but for a user's functor, which is its own definition. They are asked
///            with a whole call's n and m, whatever parts the library cuts it into.

#include <functional>
#include <memory>

#include <fovea/mask/function.hpp>
#include <fovea/mask/patterns.hpp>
#include <fovea/mask/table.hpp>
#include <fovea/mask/tree.hpp>
#include <fovea/score/packed.hpp>

#include "draws/draw.hpp"

namespace draws {

struct rules {
  fovea::mask mask;
  fovea::score score;
  std::function<bool(const mask_site&, isize, isize)> sees;
  std::function<double(const mask_site&, isize, isize, double)> changed;
  std::function<isize(const mask_site&, isize, isize)> slot;  ///< in the table of dbias
  bool unit_slope = true;
  isize table_size = 0;

  rules(const draw& d, std::size_t call);
  rules(const rules&) = delete;
  rules& operator=(const rules&) = delete;

 private:
  struct maker;
  std::vector<std::vector<std::int32_t>> numbers_;
  std::vector<std::vector<std::uint8_t>> bytes_;
  std::vector<std::vector<float>> floats_;
  std::vector<draft_tree> trees_;
  std::vector<fovea::mask> parts_;
  std::unique_ptr<mask_blocks> blocks_;
};

/// The plain functions, as policies for the twin: item b of the draw is item 0 of the twin's problem.
struct plain_mask {
  const rules* of = nullptr;
  isize b = 0, B = 1;
  mask_site site(mask_site at) const {
    at.b += b, at.B = B;
    return at;
  }
  bool operator()(const mask_site& at, isize i, isize j) const { return of->sees(site(at), i, j); }
};
template <bool Unit>
struct plain_score {
  plain_mask at_item;
  double* largest = nullptr;  ///< of the logits before and behind
  static constexpr bool unit_slope = Unit;
  double operator()(const mask_site& at, isize i, isize j, double s) const {
    const double x = at_item.of->changed(at_item.site(at), i, j, s);
    if (largest != nullptr) {
      if (std::fabs(s) > *largest) *largest = std::fabs(s);
      if (std::isfinite(x) && std::fabs(x) > *largest) *largest = std::fabs(x);
    }
    return x;
  }
  double slope(const mask_site&, isize, isize, double) const { return 1; }  // never asked: the twin takes quotients
};

}  // namespace draws
