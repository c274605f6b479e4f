// SPDX-License-Identifier: MIT
/// @file  2,000 random combinations of everything that softmax_attention can be asked for, each against the twin in double.
///
/// FOVEA_DRAW=0x... runs one draw again, FOVEA_DRAWS=N runs so many (README.md beside this file).

#include <cstdlib>
#include <iostream>

#include "draws/draw.hpp"
#include "support/catch.hpp"

namespace {

using namespace draws;

/// The number in an environment variable, decimal or 0x...; `otherwise` if it is not set.
std::uint64_t number(const char* variable, std::uint64_t otherwise) {
  const char* text = std::getenv(variable);
  return text == nullptr || *text == '\0' ? otherwise : std::strtoull(text, nullptr, 0);
}
bool given(const char* variable) { return std::getenv(variable) != nullptr; }

/// All seeds, split in parts so that they run side by side.
void run_part(isize part, isize parts) {
  if (given("FOVEA_DRAW")) return;  // that one is run by a test of its own
  const auto all = seeds(static_cast<isize>(number("FOVEA_DRAWS", 2000)));
  isize failed = 0;
  for (std::size_t x = static_cast<std::size_t>(part); x < all.size(); x += static_cast<std::size_t>(parts)) {
    const draw d = make_draw(all[x]);
    const outcome o = run(d);
    if (o.wrong.empty()) continue;
    UNSCOPED_INFO(text(d) << "\n    " << o.wrong);
    if (++failed == 20) break;
  }
  CHECK(failed == 0);
}

}  // namespace

TEST_CASE("draws: FOVEA_DRAW again") {
  if (!given("FOVEA_DRAW")) return;
  const draw d = make_draw(number("FOVEA_DRAW", 0));
  std::cout << text(d) << "\n";
  const outcome o = run(d);
  if (!o.refusal.empty()) std::cout << "refused: " << o.refusal << "\n";
  CHECK(o.wrong == "");
}

TEST_CASE("draws: a quarter, 1 of 4") { run_part(0, 4); }
TEST_CASE("draws: a quarter, 2 of 4") { run_part(1, 4); }
TEST_CASE("draws: a quarter, 3 of 4") { run_part(2, 4); }
TEST_CASE("draws: a quarter, 4 of 4") { run_part(3, 4); }

TEST_CASE("draws: every pair of features that can meet is met three times, most draws are accepted") {
  const isize count = static_cast<isize>(number("FOVEA_DRAWS", 2000));
  if (given("FOVEA_DRAW") || count < 2000) return;
  const auto& all = features();
  std::vector<std::vector<int>> met(all.size(), std::vector<int>(all.size(), 0));
  isize accepted = 0;
  for (const std::uint64_t seed : seeds(count)) {
    const draw d = make_draw(seed);
    if (!refused(d).empty()) continue;
    ++accepted;
    const auto in = features_of(d);
    for (std::size_t a = 0; a < all.size(); ++a)
      for (std::size_t b = 0; in[a] && b < all.size(); ++b) met[a][b] += in[b] ? 1 : 0;
  }
  CHECK(accepted >= count * 8 / 10);
  CHECK(accepted <= count * 97 / 100);  // what must be refused is drawn as well
  isize pairs = 0, rare = 0;
  for (std::size_t a = 0; a < all.size(); ++a)
    for (std::size_t b = a + 1; b < all.size(); ++b) {
      if (apart(all[a], all[b])) {
        // Features of one group may stand in one draw (calls of different sizes); others that are called apart may not.
        if (met[a][b] > 0 && all[a].group != all[b].group) {
          UNSCOPED_INFO(all[a].name << " and " << all[b].name << " meet after all");
          ++rare;
        }
        continue;
      }
      ++pairs;
      if (met[a][b] >= 3) continue;
      UNSCOPED_INFO(all[a].name << " and " << all[b].name << " were met " << met[a][b] << " times");
      ++rare;
    }
  CHECK(pairs > 4000);
  CHECK(rare == 0);
}

TEST_CASE("draws: the same seed is the same draw") {
  for (std::uint64_t seed = 0; seed < 50; ++seed) CHECK(text(make_draw(seed)) == text(make_draw(seed)));
}

TEST_CASE("draws: a library that is wrong on purpose is found out") {
  const auto plain = [](const draw& d, sabotage s) {
    const bool sharp = d.type == dtype::f32 && d.out == dtype::f32 && refused(d).empty() && d.fault == fault::none &&
                       (d.score == score_form::none || d.score == score_form::softcap) && d.rows != dtype::i8;
    const bool all_seen =
        sharp && (d.mask == mask_form::none || (d.mask == mask_form::causal && d.calls[0].n[0] <= d.calls[0].m[0])) &&
        d.align == place::bottom_right && d.calls[0].m[0] > 1;
    if (s == sabotage::window_wider)
      return sharp && d.store != store_form::ring && (d.mask == mask_form::window || d.mask == mask_form::window_first);
    if (s == sabotage::turned_late)
      return all_seen && (d.form == call_form::packed || d.form == call_form::batch) && d.store != store_form::ring;
    if (s == sabotage::stale_page || s == sabotage::sink_left_out) return all_seen && d.store != store_form::ring;
    if (s == sabotage::lse_in_bits) return all_seen && d.lse;
    if (s == sabotage::gradient_off)
      return d.type == dtype::f32 && d.backward && refused(d).empty() && d.fault == fault::none && d.calls[0].m[0] > 0;
    return sharp;
  };
  for (int x = 1; x < sabotages; ++x) {
    const auto s = static_cast<sabotage>(x);
    isize applied = 0, found = 0;
    std::string missed;
    for (std::uint64_t seed = 0; seed < 30000 && applied < 8; ++seed) {
      const draw d = make_draw(stream(seed, 1));
      if (!plain(d, s)) continue;
      const outcome o = run(d, s);
      if (!o.applied) continue;
      ++applied;
      if (o.wrong.empty())
        missed = text(d);
      else
        ++found;
    }
    CAPTURE(draws::name_of(s), missed, applied, found);
    CHECK(applied >= 5);
    CHECK(found == applied);
  }
}
