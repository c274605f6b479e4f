// SPDX-License-Identifier: MIT
/// @file  The linear golden family: linear_attention, made by its configuration, and its reference twin against third-party outputs.
///
/// Feature outputs (phi_q, phi_k) are checked at the map's own definition, denominators through the outputs they divide.

#include <algorithm>

#include <fovea/linear.hpp>
#include <fovea/linear/configure.hpp>
#include <fovea/linear/reference.hpp>

#include "support/catch.hpp"
#include "support/golden.hpp"

namespace {

using fovea::isize;
using test::dtype;

bool starts(const std::string& text, const char* with) { return text.rfind(with, 0) == 0; }

std::string rule_of(std::string name) {
  if (starts(name, "grad_")) name = name.substr(5);
  constexpr const char* rules[][2] = {{"gated_delta", "gated_delta"},
                                      {"simple_gla", "decay"},
                                      {"delta_rule", "delta"},
                                      {"retention", "decay"},
                                      {"gdn2", "gdn2"},
                                      {"gla", "gla"},
                                      {"kda", "kda"}};
  for (const auto& [stem, rule] : rules)
    if (starts(name, stem)) return rule;
  return "none";
}

constexpr const char* known_params[] = {"map", "scale", "eps", "clamp", "key_sum_eps", "feature_eps", "M", "gamma"};

struct made {
  fovea::configuration config{"linear", {}};
  fovea::arrays weights;
  fovea::any_attention any;
};

made make(const golden::test_case& c) {
  made out;
  auto& values = out.config.values;
  for (const char* key : known_params) {
    if (!c.params.contains(key)) continue;
    const auto& x = c.params[key];
    if (x.is_string())
      values[key] = x.get<std::string>() == "hedgehog_fla" ? std::string("hedgehog") : x.get<std::string>();
    else if (x.is_array())
      values[key] = x.get<std::vector<double>>();
    else
      values[key] = x.get<double>();
  }
  values["rule"] = rule_of(c.name);
  values.try_emplace("map", std::string("identity"));
  values["causal"] = c.flag("causal", true);
  if (c.params.contains("normalise")) values["normalise"] = c.flag("normalise");
  for (const std::string& name : c.inputs) {
    const bool gate = values["rule"] == fovea::configuration_value(std::string("gdn2")) && name == "b";
    if (!gate && (name == "W" || name == "b" || name == "Wq" || name == "Wk"))
      out.weights.emplace(name, fovea::array(c.at(name).dims, c.at(name).data));
  }
  fovea::configuration_reader reader(out.config, out.weights);
  out.any = fovea::configure_linear(reader);
  reader.finish();
  return out;
}

struct tensors {
  test::tensor q, k, v, g, beta, b, w, out;
  tensors(const golden::test_case& c, dtype type, test::layout l)
      : q(c.tensor("q", type, l)), k(c.tensor("k", type, l)), v(c.tensor("v", type, l)) {
    if (c.has("g")) g = c.tensor("g", type, l);
    if (c.has("beta")) beta = c.tensor("beta", type, l);
    if (c.has("w")) b = c.tensor("b", type, l), w = c.tensor("w", type, l);
    out = test::unwritten(type, q.batch(), std::max(q.heads(), v.heads()), q.length(), v.width(), l);
  }
  fovea::gates gates(isize first, isize count) const {
    const auto cut = [&](const test::tensor& t) {
      return t.size() > 0 ? t.ref().slice(first, count) : fovea::tensor_ref{};
    };
    return {cut(g), cut(beta), cut(b), cut(w)};
  }
};

void check_like(const golden::test_case& c, const char* key, const test::array& got, double bound, dtype type) {
  if (!c.has(key)) return;
  CAPTURE(key);
  CHECK_CLOSE(got, c.at(key), {.c = bound, .acc = type, .stored = type});
}

test::array numbers(const fovea::array& a) {
  test::array out{a.dims(), {}};
  for (isize i = 0; i < a.size(); ++i) out.data.push_back(a.at(i));
  return out;
}

fovea::state first_state(const golden::test_case& c, const fovea::any_attention& a, const fovea::problem& p) {
  fovea::state s = a.make_state(p.shape());
  fovea::arrays given;
  for (const char* key : {"S0", "z0"})
    if (c.has(key)) given.emplace(key, fovea::array(c.at(key).dims, c.at(key).data));
  a.load_state(s, given);
  return s;
}

/// The vector path, in pieces of `chunk` tokens (0: one call; without a state where the case has none).
void check_case(const golden::test_case& c, dtype type, test::layout l, double bound, isize chunk) {
  const made m = make(c);
  CAPTURE(c.name, test::name_of(l), fovea::name_of(type), chunk);
  tensors x(c, type, l);
  const isize n = x.q.length();
  const bool with_state = m.any.streaming() && n == x.k.length() && (chunk > 0 || c.has("S0") || c.has("S"));
  if (!with_state && chunk > 0) return;
  if (!with_state) {
    fovea::prefill(fovea::serial, m.any, x.q, x.k, x.v, x.out, {.gates = x.gates(0, n)});
  } else {
    fovea::state s = first_state(c, m.any, {x.q, x.k, x.v, x.out, {}, x.gates(0, n)});
    const isize step = chunk > 0 ? chunk : n;
    for (isize t = 0; t < n; t += step) {
      const isize count = std::min(step, n - t);
      fovea::prefill(fovea::serial, m.any, x.q.ref().slice(t, count), x.k.ref().slice(t, count),
                     x.v.ref().slice(t, count), x.out.ref().slice(t, count), s, {.gates = x.gates(t, count)});
    }
    const fovea::arrays last = m.any.store_state(s);
    check_like(c, "S", numbers(last.at("S")), bound, type);
    if (last.count("z") != 0) check_like(c, "z", numbers(last.at("z")), bound, type);
  }
  check_like(c, "o", x.out.values(), bound, type);
  CHECK(x.out.guards_intact());
}

}  // namespace

TEST_CASE("golden linear: the reference twin") {
  for (const auto& c : golden::family("linear")) {
    const made m = make(c);
    CAPTURE(c.name);
    tensors x(c, dtype::f64, test::layout::bhnd);
    fovea::reference::linear_state s;
    if (c.has("S0")) s.S = c.at("S0").data;
    if (c.has("z0")) s.z = c.at("z0").data;
    fovea::reference::prefill(*m.any.as<fovea::linear_attention>(),
                              {x.q, x.k, x.v, x.out, {}, x.gates(0, x.q.length())}, &s);
    check_like(c, "o", x.out.values(), 4096, dtype::f64);
    if (c.has("S")) check_like(c, "S", {c.at("S").dims, s.S}, 4096, dtype::f64);
    if (c.has("z")) check_like(c, "z", {c.at("z").dims, s.z}, 4096, dtype::f64);
  }
}

TEST_CASE("golden linear: the vector path in f32, in every layout") {
  for (const auto& c :
       golden::family("linear"))  // 128 as in pieces: the additions of a row come in one order, cut or not
    for (const auto l : test::layouts) check_case(c, dtype::f32, l, 128, 0);
}

TEST_CASE("golden linear: the vector path in f64") {
  for (const auto& c : golden::family("linear")) check_case(c, dtype::f64, test::layout::bhnd, 4096, 0);
}

TEST_CASE("golden linear: in pieces and token by token") {
  for (const auto& c : golden::family("linear"))
    for (const isize chunk : {1, 3, 20}) check_case(c, dtype::f32, test::layout::bhnd, 128, chunk);
}

TEST_CASE("golden linear: the maps as their definition has them") {
  for (const auto& c : golden::family("linear"))
    for (const bool key : {false, true}) {
      const char* name = key ? "phi_k" : "phi_q";
      const std::string map = c.text("map", "identity");
      if (!c.has(name) || (map == "favor" && key)) continue;
      const made m = make(c);
      const auto phi = m.any.as<fovea::linear_attention>()->phi();
      const auto& want = c.at(name);
      const auto& x = c.at(key ? "k" : "q");
      CAPTURE(c.name, name);
      test::array got{want.dims, std::vector<double>(want.data.size())};
      const isize H = want.dims[1], n = want.dims[2], r = want.dims[3], d = x.dims[3];
      for (isize h = 0; h < H; ++h)
        for (isize i = 0; i < n; ++i) {
          double* out = got.data.data() + (h * n + i) * r;
          const double log_scale = phi.define({h, h, i, key, 0.0}, x.data.data() + (h * x.dims[2] + i) * d, d, out);
          for (isize f = 0; f < r; ++f) out[f] *= std::exp(log_scale);
        }
      CHECK_CLOSE(got, want, {.c = 4096, .acc = dtype::f64, .stored = dtype::f64});
    }
}
