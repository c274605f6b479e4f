// SPDX-License-Identifier: MIT
/// @file  The dijiang golden family: transforms, quantiles, point sets, and every form of the attention, in the twin and the vector path.

#include <algorithm>

#include <fovea/dijiang.hpp>
#include <fovea/dijiang/configure.hpp>
#include <fovea/dijiang/reference.hpp>

#include "support/catch.hpp"
#include "support/golden.hpp"

namespace {

using fovea::isize;
using test::dtype;

bool is_attention(const golden::test_case& c) { return c.has("o"); }

fovea::any_attention make(const golden::test_case& c) {
  fovea::configuration config{
      "dijiang", {{"form", c.text("form", "")}, {"causal", c.flag("causal")}, {"normalise", c.flag("normalise")}}};
  if (c.params.contains("blocks")) config.values["blocks"] = c.number("blocks", 1);
  fovea::arrays weights;
  for (const char* key : {"t", "D", "r", "signs", "gamma", "log_d1", "log_d2"})
    if (c.has(key)) weights.emplace(key, fovea::array(c.at(key).dims, c.at(key).data));
  fovea::configuration_reader reader(config, weights);
  auto any = fovea::configure_dijiang(reader);
  reader.finish();
  return any;
}

struct tensors {
  test::tensor q, k, v, out;
  tensors(const golden::test_case& c, dtype type, test::layout l)
      : q(c.tensor("q", type, l)), k(c.tensor("k", type, l)), v(c.tensor("v", type, l)) {
    out = test::unwritten(type, q.batch(), q.heads(), q.length(), v.width(), l);
  }
};

/// Exponents of 280 carry 280 eps into the weights.
double bound(const golden::test_case& c, double usual) { return c.name == "paper_huge_exponents" ? 40 * usual : usual; }

template <class T>
void check_transforms(double allowed) {
  for (const auto& c : golden::family("dijiang")) {
    if (!c.has("dct2")) continue;
    const isize d = c.integer("d", 0), rows = 5;
    CAPTURE(d);
    const fovea::feature::cosine_transform transform(d);
    std::vector<T> a, b(static_cast<std::size_t>(rows * d));
    for (const int type : {2, 3}) {
      a = c.list<T>("x");
      test::array got{{rows, d}, {}};
      if (type == 2)
        fovea::feature::cosine_type2<fovea::simd::native, T>(transform.table<T>(), rows, a.data(), b.data());
      for (isize i = 0; type == 3 && i < rows * d; ++i)
        a[static_cast<std::size_t>(i)] *= static_cast<T>(transform.scale(i % d));
      if (type == 3)
        fovea::feature::cosine_type3<fovea::simd::native, T>(transform.table<T>(), rows, a.data(), b.data());
      for (isize i = 0; i < rows * d; ++i)
        got.data.push_back(static_cast<double>(b[static_cast<std::size_t>(i)]) *
                           (type == 2 ? transform.scale(i % d) : 1.0));
      CHECK_CLOSE(got, c.at(type == 2 ? "dct2" : "dct3"), {.c = allowed, .acc = fovea::dtype_of<T>});
    }
  }
}

void check_case(const golden::test_case& c, dtype type, test::layout l, double usual, isize chunk) {
  const auto m = make(c);
  CAPTURE(c.name, test::name_of(l), fovea::name_of(type), chunk);
  tensors x(c, type, l);
  const isize n = x.q.length();
  if (chunk == 0) {
    fovea::prefill(fovea::serial, m, x.q, x.k, x.v, x.out);
  } else {
    if (!m.streaming()) return;
    fovea::state s = m.make_state(fovea::problem{x.q, x.k, x.v, x.out, {}, {}}.shape());
    for (isize t = 0; t < n; t += chunk) {
      const isize count = std::min(chunk, n - t);
      fovea::prefill(fovea::serial, m, x.q.ref().slice(t, count), x.k.ref().slice(t, count), x.v.ref().slice(t, count),
                     x.out.ref().slice(t, count), s);
    }
  }
  CHECK_CLOSE(x.out.values(), c.at("o"), {.c = bound(c, usual), .acc = type, .stored = type});
  CHECK(x.out.guards_intact());
}

}  // namespace

TEST_CASE("golden dijiang: cosine transforms of types 2 and 3") {
  check_transforms<float>(32);
  check_transforms<double>(32);
}

TEST_CASE("golden dijiang: normal and chi quantiles") {
  const auto& c = golden::find("dijiang", "quantiles");
  const auto& t = c.at("t").data;
  for (const auto& [key, degrees] :
       {std::pair<const char*, isize>{"normal", 0}, {"chi_16", 16}, {"chi_64", 64}, {"chi_128", 128}}) {
    CAPTURE(key);
    for (std::size_t i = 0; i < t.size(); ++i) {
      const double got =
          degrees == 0 ? fovea::feature::normal_quantile(t[i]) : fovea::feature::chi_quantile(degrees, t[i]);
      const double want = c.at(key).data[i];
      CAPTURE(t[i], got, want);
      CHECK(std::fabs(got - want) <= 1e-13 * std::fmax(1.0, std::fabs(want)));
    }
  }
}

TEST_CASE("golden dijiang: Sobol and Halton points") {
  const auto& c = golden::find("dijiang", "point_sets");
  CHECK(fovea::feature::sobol(64, 8) == c.at("sobol").data);
  const auto halton = fovea::feature::halton(64, 8);
  for (std::size_t i = 0; i < halton.size(); ++i) CHECK(std::fabs(halton[i] - c.at("halton").data[i]) <= 0x1p-52);
}

TEST_CASE("golden dijiang: the reference twin") {
  for (const auto& c : golden::family("dijiang")) {
    if (!is_attention(c)) continue;
    CAPTURE(c.name);
    tensors x(c, dtype::f64, test::layout::bhnd);
    const auto m = make(c);
    fovea::reference::prefill(*m.as<fovea::dijiang_attention>(), {x.q, x.k, x.v, x.out, {}, {}});
    CHECK_CLOSE(x.out.values(), c.at("o"), {.c = bound(c, 4096), .acc = dtype::f64, .stored = dtype::f64});
  }
}

TEST_CASE("golden dijiang: the vector path in f32, in every layout") {
  for (const auto& c : golden::family("dijiang"))
    for (const auto l : test::layouts)
      if (is_attention(c)) check_case(c, dtype::f32, l, 64, 0);
}

TEST_CASE("golden dijiang: the vector path in f64") {
  for (const auto& c : golden::family("dijiang"))
    if (is_attention(c)) check_case(c, dtype::f64, test::layout::bhnd, 4096, 0);
}

TEST_CASE("golden dijiang: in pieces and token by token") {
  for (const auto& c : golden::family("dijiang"))
    for (const isize chunk : {1, 3, 20})
      if (is_attention(c)) check_case(c, dtype::f32, test::layout::bhnd, 64, chunk);
}

TEST_CASE("golden dijiang: features, by the definition and by the map") {
  for (const auto& c : golden::family("dijiang")) {
    if (!c.has("phi_q")) continue;
    const auto m = make(c);
    const auto tables = m.as<fovea::dijiang_attention>()->tables;
    const auto& want = c.at("phi_q");
    const auto& q = c.at("q");
    const isize rows = q.dims[1] * q.dims[2], d = q.dims[3], r = want.dims[3];
    CAPTURE(c.name);
    test::array defined{want.dims, std::vector<double>(want.data.size())}, mapped = defined;
    std::vector<double> scratch(static_cast<std::size_t>(2 * fovea::feature_rows * d)), log_scale(1);
    for (isize i = 0; i < rows; ++i) {
      tables->define(0, q.data.data() + i * d, defined.data.data() + i * r);
      fovea::feature_block<double> b;
      b.x = q.data.data() + i * d, b.x_stride = d, b.rows = 1, b.width = d;
      b.out = mapped.data.data() + i * r, b.out_stride = r, b.log_scale = log_scale.data();
      const bool decays_elsewhere = tables->gamma.empty();  // the map alone knows no decay
      if (decays_elsewhere) fovea::dijiang_map{tables.get()}.apply<fovea::simd::native, double>(b, scratch.data());
      for (isize f = 0; f < r; ++f) {
        auto& a = defined.data[static_cast<std::size_t>(i * r + f)];
        auto& x = mapped.data[static_cast<std::size_t>(i * r + f)];
        a = std::exp(a);
        x = decays_elsewhere ? x * std::exp(log_scale[0]) : a;
      }
    }
    CHECK_CLOSE(defined, want, {.c = 4096, .acc = dtype::f64, .stored = dtype::f64});
    CHECK_CLOSE(mapped, want, {.c = 4096, .acc = dtype::f64, .stored = dtype::f64});
  }
}
