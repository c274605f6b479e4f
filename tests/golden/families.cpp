// SPDX-License-Identifier: MIT
/// @file  The golden data is all there and is read right.

#include "support/catch.hpp"
#include "support/golden.hpp"

TEST_CASE("golden: five families, 146 cases, shapes as announced") {
  const std::pair<const char*, std::size_t> wanted[] = {
      {"softmax", 54}, {"linear", 32}, {"dijiang", 22}, {"lowrank", 17}, {"sparse", 21}};
  for (const auto& [name, count] : wanted) {
    CAPTURE(name);
    CHECK(golden::family(name).size() == count);
    for (const golden::test_case& c : golden::family(name))
      for (const auto& [key, a] : c.tensors) {
        CAPTURE(c.name, key);
        CHECK(test::product(a.dims) == static_cast<test::isize>(a.data.size()));
      }
  }
}

TEST_CASE("golden: a case by name, its parameters, and a tensor of another type") {
  const golden::test_case& c = golden::find("softmax", "single");
  CHECK(c.number("scale", 0) == Approx(1 / std::sqrt(8.0)));
  CHECK(c.at("o").data == c.at("v").data);  // one key: the output is its value
  CHECK(c.tensor("q", test::dtype::bf16).width() == 8);
  CHECK(c.tensor("lse", test::dtype::f64).width() == 1);
  CHECK_THROWS(golden::find("softmax", "no such case"));
}
