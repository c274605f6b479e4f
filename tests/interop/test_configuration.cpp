// SPDX-License-Identifier: MIT
/// @file  Configurations: the reader refuses what it does not know, JSON goes in and out unchanged, errors name file and place.

#include <cmath>
#include <limits>
#include <string>

#include <fovea/interop/json.hpp>

#include "interop/files.hpp"

namespace {

using fovea::array;
using fovea::configuration;
using fovea::configuration_reader;
using test::holds;
using test::message_of;

enum class side { left, right };

std::string refusal(const std::string& json) {
  return message_of<fovea::file_error>([&] { (void)fovea::parse_configuration(json, "c.json"); });
}

}  // namespace

TEST_CASE("configuration_reader: values of the right type, defaults for what is absent") {
  const configuration c{"toy",
                        {{"scale", 0.5},
                         {"window", 256.0},
                         {"causal", true},
                         {"side", "right"},
                         {"name", "x"},
                         {"gamma", std::vector<double>{0.5, 0.25}}}};
  const fovea::arrays tensors{{"W", array({2}, std::vector<float>{1, 2})}};
  configuration_reader r(c, tensors);
  CHECK(r.mechanism() == "toy");
  CHECK(r.number("scale", 1.0) == 0.5);
  CHECK(r.number("scale").value() == 0.5);
  CHECK_FALSE(r.number("eps").has_value());
  CHECK(r.number("eps", 1e-6) == 1e-6);
  CHECK(r.integer("window", 0) == 256);
  CHECK(r.integer("first", 4) == 4);
  CHECK(r.flag("causal", false));
  CHECK(r.flag("normalise", true));
  CHECK(r.choice("side", {{"left", side::left}, {"right", side::right}}, side::left) == side::right);
  CHECK(r.choice("other", {{"left", side::left}}, side::left) == side::left);
  CHECK(r.text("name", "") == "x");
  CHECK(r.numbers("gamma") == std::vector<double>{0.5, 0.25});
  CHECK(r.numbers("scale") == std::vector<double>{0.5});
  CHECK(r.numbers("none").empty());
  REQUIRE(r.tensor("W") != nullptr);
  CHECK(r.need("W", "").at(1) == 2.0);
  CHECK(r.tensor("b") == nullptr);
  CHECK(r.has("scale"));
  CHECK_FALSE(r.has("absent"));
  r.finish();
}

TEST_CASE("configuration_reader: every refusal names the key, its value and what was wanted") {
  const double nan = std::numeric_limits<double>::quiet_NaN(), inf = std::numeric_limits<double>::infinity();
  const configuration c{"toy",
                        {{"half", 0.5},
                         {"nan", nan},
                         {"inf", inf},
                         {"word", "up"},
                         {"yes", true},
                         {"list", std::vector<double>{1, nan}},
                         {"huge", 1e300}}};
  const fovea::arrays tensors{{"W", array({2, 3}, std::vector<float>(6))}};
  configuration_reader r(c, tensors);
  const auto check = [](auto f, const std::string& wanted) {
    CHECK(holds(message_of<fovea::contract_error>(f), wanted));
  };
  check([&] { (void)r.integer("half", 0); }, "configuration of toy: half is 0.5; wanted a whole number");
  check([&] { (void)r.integer("huge", 0); }, "wanted a whole number");
  check([&] { (void)r.number("nan", 0); }, "nan is nan; wanted a finite number");
  check([&] { (void)r.number("inf"); }, "inf is inf; wanted a finite number");
  check([&] { (void)r.integer("nan", 0); }, "wanted a finite number");
  check([&] { (void)r.number("word", 0); }, "word is \"up\"; wanted a number");
  check([&] { (void)r.flag("half", false); }, "half is 0.5; wanted true or false");
  check([&] { (void)r.text("yes", ""); }, "yes is true; wanted a text");
  check([&] { (void)r.numbers("list"); }, "list holds nan; wanted finite numbers");
  check([&] { (void)r.number("list", 0); }, "list is a list of 2 numbers; wanted a number");
  check(
      [&] {
        (void)r.choice("word", {{"left", side::left}, {"right", side::right}}, side::left);
      },
      "word is \"up\"; wanted one of \"left\", \"right\"");
  check([&] { (void)r.choice("half", {{"left", side::left}}, side::left); }, "half is 0.5; wanted one of \"left\"");
  check([&] { (void)r.need("E", "linformer projects by it"); }, "tensor E is missing; linformer projects by it");
}

TEST_CASE("configuration_reader: what nobody asked for is refused with a list of what is known") {
  const configuration c{"toy", {{"scale", 1.0}, {"scael", 1.0}}};
  const fovea::arrays tensors{{"W", array({2, 3}, std::vector<float>(6))}, {"g", array({2}, std::vector<float>(2))}};
  {
    configuration_reader r(c, tensors);
    (void)r.number("scale", 0), (void)r.flag("causal", false);
    const std::string line = message_of<fovea::contract_error>([&] { r.finish(); });
    CHECK(holds(line, "key \"scael\" (1) is not supported; known here: causal, scale"));
  }
  configuration_reader r(c, tensors);
  (void)r.has("scale"), (void)r.has("scael");
  r.call_input("g");
  CHECK(r.call_inputs().contains("g"));
  CHECK(holds(message_of<fovea::contract_error>([&] { r.finish(); }),
              "tensor \"W\" [2, 3] f32 is not supported; known here: g"));
}

TEST_CASE("array: dimensions, conversion, sharing") {
  const array a({2, 3}, std::vector<float>{1, 2, 3, 4, 5, 6});
  CHECK(a.dim(0) == 2);
  CHECK(a.dim(-1) == 3);
  CHECK(a.dim(-3) == 1);
  CHECK(a.rank() == 2);
  CHECK(a.at(4) == 5.0);
  CHECK(a.doubles() == std::vector<double>{1, 2, 3, 4, 5, 6});
  CHECK(a.describe() == "[2, 3] f32");
  const array copy = a;
  CHECK(copy.data() == a.data());
  CHECK(a.reshaped({3, 2}).data() == a.data());
  CHECK(holds(message_of([&] { (void)a.reshaped({4, 2}); }), "cannot be reshaped to [4, 2]"));
  CHECK(holds(message_of([&] { (void)a.as<double>(); }), "was read as another type"));
  CHECK(holds(message_of([] { array({-1, 0}, std::vector<float>{}); }), "must not be negative"));
  CHECK(holds(message_of([] { array(fovea::element::f32, {0, PTRDIFF_MAX, PTRDIFF_MAX}); }), "too large"));
  CHECK(holds(message_of([] { array({2}, std::vector<float>{1.F}); }), "1 values"));
  CHECK(array().size() == 0);
}

TEST_CASE("JSON: a configuration goes out and comes back the same") {
  const configuration c{"linear",
                        {{"map", "elu1"},
                         {"causal", true},
                         {"eps", 1e-10},
                         {"scale", 0.1},
                         {"M", 64.0},
                         {"gamma", std::vector<double>{31.0 / 32, 1.0}},
                         {"third", 1.0 / 3}}};
  const std::string text = fovea::to_json(c).dump();
  CHECK(holds(text, "\"M\":64,"));
  const configuration back = fovea::parse_configuration(text, "c.json");
  CHECK(back.mechanism == c.mechanism);
  CHECK(back.values == c.values);
  const test::folder f;
  fovea::write_configuration(f.file("c.json"), c);
  CHECK(fovea::read_configuration(f.file("c.json")).values == c.values);
}

TEST_CASE("JSON: errors are one line with the file and the place") {
  CHECK(holds(refusal(""), "c.json: line 1, column 1"));
  CHECK(holds(refusal("{\"mechanism\": \"softmax\",\n \"scale\": }"), "c.json: line 2, column 11"));
  CHECK(holds(refusal("[]"), "a configuration is array; wanted an object"));
  CHECK(holds(refusal("{}"), "key \"mechanism\" is missing"));
  CHECK(holds(refusal(R"({"mechanism": 3})"), "key \"mechanism\" is number; wanted a text"));
  CHECK(holds(refusal(R"({"mechanism": "a", "x": null})"), "key \"x\" is null"));
  CHECK(holds(refusal(R"({"mechanism": "a", "x": {"y": 1}})"), "key \"x\" is object"));
  CHECK(holds(refusal(R"({"mechanism": "a", "x": [1, "b"]})"), "key \"x\" is a list that holds string"));
  CHECK(holds(refusal(R"({"mechanism": "a", "x": [[1]]})"), "holds array"));
  CHECK(holds(refusal(R"({"mechanism": "a", "x": 1, "x": 2})"), "key \"x\" is there twice"));
  CHECK(holds(refusal(R"({"mechanism": "a", "mechanism": "b"})"), "key \"mechanism\" is there twice"));
  CHECK(holds(refusal(R"({"mechanism": "a", "x": NaN})"), "c.json: line 1, column 25"));
  CHECK(holds(refusal(R"({"mechanism": "a", "x": 1e999})"), "number overflow"));
  CHECK(holds(refusal(R"({"mechanism": "a"} x)"), "c.json: line 1, column 20"));
  CHECK(holds(refusal("{\"mechanism\": \"\xff\"}"), "c.json: line 1"));
  CHECK(holds(refusal(std::string(100000, '[')), "nested more than 16 deep"));
  CHECK(holds(message_of<fovea::file_error>([] { (void)fovea::read_configuration("/no/such.json"); }),
              "/no/such.json: no such file"));
}
