// SPDX-License-Identifier: MIT
// What `evaluate` is made of, without a model: intervals, quantiles, the retrieval text, the ranking's file.
#include <cmath>
#include <random>
#include <set>

#include <nlohmann/json.hpp>

#include "catch.hpp"
#include "engine/judged_text.hpp"
#include "engine/ranking.hpp"
#include "engine/statistics.hpp"

using engine::isize;

TEST_CASE("statistics: Student's t", "[judging]") {
  const std::pair<isize, double> known[] = {{1, 12.706}, {5, 2.571},  {7, 2.365},
                                            {10, 2.228}, {30, 2.042}, {120, 1.980}};
  for (const auto& [n, t] : known) CHECK(engine::student(n) == Approx(t).epsilon(2e-3));
  CHECK(std::isinf(engine::student(0)));
}

TEST_CASE("statistics: independent values give the textbook error", "[judging]") {
  const std::vector<std::vector<double>> x{{1, 2, 3, 4}, {5, 6}};
  const auto r = engine::block_mean(x, 1);
  CHECK(r.mean == Approx(3.5));
  CHECK(r.error == Approx(std::sqrt(3.5 / 6)));  // sample variance 3.5
  CHECK(r.blocks == 6);
  CHECK(r.high - r.mean == Approx(2.571 * r.error));
  CHECK(engine::block_mean(x, 100).blocks == 2);
  CHECK(std::isinf(engine::block_mean(std::vector<std::vector<double>>{{1, 2}}, 100).error));
  CHECK(engine::block_mean(std::vector<std::vector<double>>{}, 4).values == 0);
}

TEST_CASE("statistics: blocks see what neighbours share, and the interval holds the truth as often as it says",
          "[judging]") {
  std::mt19937 draw(5);
  std::normal_distribution<double> normal;
  int held = 0, held_single = 0;
  const int runs = 400;
  for (int run = 0; run < runs; ++run) {
    std::vector<double> x(1920);
    double shared = 0;
    for (double& v : x) v = shared = 0.8 * shared + normal(draw);  // mean 0, neighbours alike
    const std::vector<std::vector<double>> series{x};
    const auto r = engine::block_mean(series, 64), single = engine::block_mean(series, 1);
    held += r.low <= 0 && 0 <= r.high, held_single += single.low <= 0 && 0 <= single.high;
  }
  CHECK(held >= runs * 90 / 100);
  CHECK(held <= runs * 98 / 100);
  CHECK(held_single <= runs * 65 / 100);  // what an error without blocks would claim
}

TEST_CASE("statistics: quantile", "[judging]") {
  CHECK(engine::quantile({3, 1, 2}, 0.5) == 2);
  CHECK(engine::quantile({3, 1, 2}, 1.0) == 3);
  CHECK(engine::quantile({}, 0.5) == 0);
}

TEST_CASE("texts: windows, and a copy that only looking back predicts", "[judging]") {
  std::vector<engine::token> ids(1000);
  for (std::size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<engine::token>(i);
  const auto plain = engine::plain_text("t", ids, 200, 3);
  REQUIRE(plain.windows.size() == 3);
  CHECK(plain.windows[2].tokens.front() == 800);
  CHECK(plain.windows[2].tokens.back() == 999);
  CHECK(plain.predictions() == 3 * 199);
  const auto copy = engine::copy_text("t", ids, 256, 2);
  CHECK(copy.retrieval);
  REQUIRE(copy.windows.size() == 2);
  for (const auto& w : copy.windows) {
    REQUIRE(w.tokens.size() == 256);
    CHECK(w.from == 128);
    std::set<engine::token> seen;
    int joined = 0;
    for (std::size_t i = 0; i < 128; ++i) {
      CHECK(w.tokens[i] == w.tokens[i + 128]);
      CHECK(seen.insert(w.tokens[i]).second);
      joined += i > 0 && i % 16 == 0 && w.tokens[i] == w.tokens[i - 1] + 1;
      if (i % 16 != 0) CHECK(w.tokens[i] == w.tokens[i - 1] + 1);
    }
    CHECK(joined <= 2);  // pieces that stayed neighbours
  }
  CHECK(copy.windows[1].tokens != copy.windows[0].tokens);
  CHECK(copy.predictions() == 256);
  std::string said;
  try {
    engine::plain_text("t", ids, 600, 2);
  } catch (const std::exception& e) {
    said = e.what();
  }
  CHECK(said == "t: has 1000 tokens; 2 windows take 1200");
}

TEST_CASE("ranking: what was written is read back, and anything else refused", "[judging]") {
  engine::ranking r;
  for (const isize l : {4, 0, 2}) r.layers.push_back({l, l, {}, 0.1});
  const auto j = nlohmann::json::parse(engine::to_json(r).dump());
  CHECK(engine::quietest_first(j, "r.json", 5) == std::vector<isize>{4, 0, 2});
  CHECK_THROWS(engine::quietest_first(j, "r.json", 4));
  CHECK_THROWS(engine::quietest_first(nlohmann::json::parse("[]"), "r.json", 5));
}
