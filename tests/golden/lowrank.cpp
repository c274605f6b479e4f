// SPDX-License-Identifier: MIT
/// @file  The golden low-rank vectors: whole Linformer modules, pooling and convolution, per-head projections; Efficient Attention; Nystrom attention.
///        Each case goes through the reference twin (f64), the f64 and f32 vector paths, and the mechanism made from a configuration.

#include <fovea/efficient/configure.hpp>
#include <fovea/efficient/reference.hpp>
#include <fovea/linformer/configure.hpp>
#include <fovea/linformer/reference.hpp>
#include <fovea/nystrom/configure.hpp>
#include <fovea/nystrom/reference.hpp>

#include "support/catch.hpp"
#include "support/golden.hpp"

namespace {

using namespace fovea;
using test::tensor;

struct question {
  test::array q, k, v, want;
};

question question_of(const golden::test_case& c) {
  if (c.has("heads_o")) return {c.at("q"), c.at("k"), c.at("v"), c.at("heads_o")};
  return {c.at("q"), c.at("k"), c.at("v"), c.at("o")};
}

template <class M>
void check_case(const M& m, const question& x, const char* what) {
  INFO(what);
  for (const dtype type : {dtype::f64, dtype::f32}) {
    const tensor q = test::copy_of(x.q, type), k = test::copy_of(x.k, type), v = test::copy_of(x.v, type);
    tensor out = test::unwritten(type, q.batch(), q.heads(), q.length(), v.width());
    prefill(serial, m, q, k, v, out);
    CHECK_CLOSE(out.values(), x.want, {.c = type == dtype::f64 ? 4096.0 : 64.0, .acc = type});
  }
}
template <class M>
void check_twin(const M& m, const question& x) {
  const tensor q = test::copy_of(x.q, dtype::f64), k = test::copy_of(x.k, dtype::f64),
               v = test::copy_of(x.v, dtype::f64);
  tensor out = test::unwritten(dtype::f64, q.batch(), q.heads(), q.length(), v.width());
  fovea::reference::prefill(m, problem{q, k, v, out, {}, {}});
  CHECK_CLOSE(out.values(), x.want, {.c = 4096, .acc = dtype::f64});
}

array weight(const test::array& a) {
  std::vector<float> values;
  for (const double x : a.data) values.push_back(static_cast<float>(x));
  return {a.dims, values};
}

any_attention configured(const configuration& c, const arrays& tensors) {
  configuration_reader reader(c, tensors);
  any_attention a = c.mechanism == "linformer" ? configure_linformer(reader)
                    : c.mechanism == "nystrom" ? configure_nystrom(reader)
                                               : configure_efficient(reader);
  reader.finish();
  return a;
}

}  // namespace

TEST_CASE("golden: linformer") {
  int tried = 0;
  for (const golden::test_case& c : golden::family("lowrank")) {
    if (c.name.rfind("linformer", 0) != 0) continue;
    CAPTURE(c.name);
    ++tried;
    configuration config{"linformer",
                         {{"scale", c.number("scale", 0)}, {"slots", static_cast<double>(c.integer("slots", 0))}}};
    if (c.name == "linformer_mean_pool") config.values["projection"] = std::string("mean");
    if (c.name == "linformer_max_pool") config.values["projection"] = std::string("max");
    if (c.name == "linformer_conv") config.values["projection"] = std::string("conv");
    arrays tensors;
    for (const auto& [from, to] : {std::pair{"proj_k", "E"}, std::pair{"proj_v", "F"}, std::pair{"E", "E"},
                                   std::pair{"F", "F"}, std::pair{"wk", "wk"}, std::pair{"wv", "wv"}})
      if (c.has(from)) tensors[to] = weight(c.at(from));
    const any_attention a = configured(config, tensors);
    const question x = question_of(c);
    check_case(a, x, "configured");
    const auto* m = a.as<linformer_attention>();
    REQUIRE(m != nullptr);
    check_twin(*m, x);
    check_case(*m, x, "direct");
  }
  CHECK(tried == 11);
}

TEST_CASE("golden: efficient") {
  int tried = 0;
  for (const golden::test_case& c : golden::family("lowrank")) {
    if (c.name.rfind("efficient", 0) != 0) continue;
    CAPTURE(c.name);
    ++tried;
    const bool scaling = c.name == "efficient_scaling";
    const any_attention a = configured(
        {"efficient", {{"normalisation", std::string(scaling ? "scaling" : "softmax")}, {"causal", c.flag("causal")}}},
        {});
    const question x = question_of(c);
    check_case(a, x, "configured");
    const auto* m = a.as<efficient_attention>();
    REQUIRE(m != nullptr);
    CHECK(m->causal == (c.name == "efficient_causal"));
    check_twin(*m, x);
    if (m->normalisation == efficient_normalisation::softmax && !m->causal)
      check_case(kfree_reconstruction{}, x, "k-free reconstruction");
  }
  CHECK(tried == 4);
}

TEST_CASE("golden: nystrom") {
  int tried = 0;
  for (const golden::test_case& c : golden::family("lowrank")) {
    if (c.name.rfind("nystrom", 0) != 0) continue;
    CAPTURE(c.name);
    ++tried;
    arrays tensors;
    if (c.has("skip")) tensors["skip"] = weight(c.at("skip"));
    const any_attention a = configured({"nystrom",
                                        {{"landmarks", static_cast<double>(c.integer("landmarks", 0))},
                                         {"iterations", static_cast<double>(c.integer("iterations", 0))},
                                         {"scale", c.number("scale", 0)}}},
                                       tensors);
    const question x = question_of(c);
    check_case(a, x, "configured");
    const auto* m = a.as<nystrom_attention>();
    REQUIRE(m != nullptr);
    check_twin(*m, x);
  }
  CHECK(tried == 2);
}
