// SPDX-License-Identifier: MIT
/// @file  The sparse golden family: hybrid_attention and its reference twin against third-party outputs.
///
/// quest_bounds is checked against the block summaries; lolcats_window is a windowed_attention.

#include <fovea/hybrid.hpp>
#include <fovea/hybrid/reference.hpp>
#include <fovea/windowed/configure.hpp>

#include "support/catch.hpp"
#include "support/golden.hpp"

namespace {

using fovea::block_selector;
using fovea::compensation;
using fovea::hsa_mode;
using fovea::isize;

struct question {
  fovea::hybrid_attention mechanism;
  std::vector<std::uint8_t> blocks;  // what mechanism.blocks points to
};

void read_blocks(const golden::test_case& c, question& ask) {
  const auto& dims = c.at("blocks").dims;
  ask.blocks = c.list<std::uint8_t>("blocks");
  const auto from_end = [&](std::size_t i) { return dims.size() < i ? isize{1} : dims[dims.size() - i]; };
  ask.mechanism.select = block_selector::given;
  ask.mechanism.blocks =
      fovea::bhnd<const std::uint8_t>(ask.blocks.data(), from_end(4), from_end(3), from_end(2), from_end(1));
}

void make(const golden::test_case& c, question& ask) {
  fovea::hybrid_attention& m = ask.mechanism;
  m.compensate = compensation::none;
  m.is_causal = c.flag("causal");
  m.scale = c.number("scale", 0);
  m.block_q = c.integer("block_q", 1), m.block_k = c.integer("block_k", 16);
  m.top = m.at_least = m.first = m.window = 0, m.budget = m.keep_small = 0;
  if (c.has("blocks")) read_blocks(c, ask);
  if (c.has("selected")) m.select = block_selector::mean, m.top = c.integer("top", 0);
  const std::string pattern = c.text("pattern", ""), rule = c.text("rule", "none");
  if (!pattern.empty()) {
    m.select = block_selector::pattern, m.stride = c.integer("stride", 0);
    m.pattern = pattern == "local"     ? hsa_mode::local
                : pattern == "strided" ? hsa_mode::strided
                : pattern == "sparse"  ? hsa_mode::sparse
                                       : hsa_mode::fixed;
  }
  m.compensate = rule == "zeroth"     ? compensation::zeroth
                 : rule == "cumulant" ? compensation::cumulant
                                      : compensation::none;
}

bool answers(const golden::test_case& c) { return c.name != "quest_bounds" && c.name != "lolcats_window"; }

template <class Run>
void check_case(const golden::test_case& c, test::dtype type, test::layout l, double bound, Run&& run) {
  question ask;
  make(c, ask);
  const test::tensor q = c.tensor("q", type, l), k = c.tensor("k", type, l), v = c.tensor("v", type, l);
  test::tensor out = test::unwritten(type, q.batch(), q.heads(), q.length(), v.width(), l),
               lse = test::unwritten(type, q.batch(), q.heads(), q.length(), 1);
  run(ask.mechanism, q, k, v, out, lse);
  CAPTURE(c.name, test::name_of(l), fovea::name_of(type));
  CHECK_CLOSE(out.values(), c.tensor("o", test::dtype::f64).values(), {.c = bound, .acc = type, .stored = type});
  CHECK_CLOSE(lse.values(), c.tensor("lse", test::dtype::f64).values(), {.c = bound, .acc = type, .stored = type});
  CHECK(out.guards_intact());
}

const auto vector_path = [](const auto& m, const auto& q, const auto& k, const auto& v, auto& out, auto& lse) {
  fovea::prefill(fovea::serial, m, q, k, v, out, {.lse = lse});
};

}  // namespace

TEST_CASE("golden sparse: the reference twin") {
  for (const auto& c : golden::family("sparse"))
    if (answers(c))
      check_case(c, test::dtype::f64, test::layout::bhnd, 256,
                 [](const auto& m, const auto& q, const auto& k, const auto& v, auto& out, auto& lse) {
                   fovea::reference::prefill(m, {q, k, v, out, lse, {}});
                 });
}

TEST_CASE("golden sparse: the vector path in f32, in every layout") {
  for (const auto& c : golden::family("sparse"))
    for (const auto l : test::layouts)
      if (answers(c)) check_case(c, test::dtype::f32, l, 32, vector_path);
}

TEST_CASE("golden sparse: the vector path in f64") {
  for (const auto& c : golden::family("sparse"))
    if (answers(c)) check_case(c, test::dtype::f64, test::layout::strided, 256, vector_path);
}

TEST_CASE("golden sparse: a block-wise causal decode answers as the prefill does") {
  for (const char* name :
       {"mst_local", "mst_strided", "mst_sparse", "mst_fixed", "block_local_causal", "block_gqa_shared", "moba"}) {
    const golden::test_case& c = golden::find("sparse", name);
    question ask;
    make(c, ask);
    const test::tensor q = c.tensor("q", test::dtype::f32), k = c.tensor("k", test::dtype::f32),
                       v = c.tensor("v", test::dtype::f32);
    const isize n = q.length(), split = n / 2 + 3;
    fovea::state s =
        ask.mechanism.make_state({q.batch(), q.heads(), k.heads(), n, n, q.width(), v.width(), test::dtype::f32});
    test::tensor out = test::unwritten(test::dtype::f32, q.batch(), q.heads(), n, v.width());
    const auto part = [&](isize first, isize count) {
      fovea::prefill(fovea::serial, ask.mechanism, q.ref().slice(first, count), k.ref().slice(first, count),
                     v.ref().slice(first, count), out.ref().slice(first, count), s);
    };
    part(0, split);
    for (isize i = split; i < n; ++i) part(i, 1);
    CAPTURE(name);
    CHECK_CLOSE(out.values(), c.tensor("o", test::dtype::f64).values(), {.c = 32});
  }
}

TEST_CASE("golden sparse: LoLCATs' window and linear rest") {
  const golden::test_case& c = golden::find("sparse", "lolcats_window");
  const test::tensor q = c.tensor("q", test::dtype::f32), k = c.tensor("k", test::dtype::f32),
                     v = c.tensor("v", test::dtype::f32);
  // The case weighs the window by G e^(s - c): the same quotient has a rest of e^c / G.
  std::vector<float> weight;
  for (const double g : c.at("gate").data) weight.push_back(static_cast<float>(-std::log(g)));
  fovea::configuration config{"windowed",
                              {{"window", static_cast<double>(c.integer("window", 0))},
                               {"first", 0.0},
                               {"scale", c.number("scale", 0)},
                               {"map", std::string("hedgehog_two")},
                               {"level", std::string("window_maximum")}}};
  const fovea::arrays weights{{"W", fovea::array(c.at("W").dims, c.at("W").data)},
                              {"log_weight", fovea::array(c.at("gate").dims, weight)}};
  fovea::configuration_reader reader(config, weights);
  const fovea::any_attention any = fovea::configure_windowed(reader);
  reader.finish();
  test::tensor out = test::unwritten(test::dtype::f32, q.batch(), q.heads(), q.length(), v.width());
  fovea::prefill(fovea::serial, any, q, k, v, out);
  CHECK_CLOSE(out.values(), c.tensor("o", test::dtype::f64).values(), {.c = 32});
}

TEST_CASE("golden sparse: Quest's page bounds") {
  const golden::test_case& c = golden::find("sparse", "quest_bounds");
  const test::tensor k = c.tensor("k", test::dtype::f64), q = c.tensor("q", test::dtype::f64);
  const isize page = c.integer("page", 16), d = k.width(), pages = fovea::ceil_div(k.length(), page);
  const auto &low = c.at("page_min").data, &high = c.at("page_max").data, &bound = c.at("bound").data;
  for (isize g = 0; g < k.heads(); ++g) {
    fovea::kernel::summary_needs needs;
    needs.range = true;
    fovea::buffer memory(1 << 16);
    fovea::arena scratch(memory.span());
    const fovea::kernel::block_summary<double> s(scratch, needs, k.length(), page, d, d);
    fovea::kernel::summarise<fovea::simd::native>(s, 0, k.length(), k, k, 0, g, scratch.take<double>(d));
    for (isize x = 0; x < pages * d; ++x) {
      CHECK(s.low[x] == low[static_cast<std::size_t>(g * pages * d + x)]);
      CHECK(s.high[x] == high[static_cast<std::size_t>(g * pages * d + x)]);
    }
    for (isize h = g * q.heads() / k.heads(); h < (g + 1) * q.heads() / k.heads(); ++h)
      for (isize J = 0; J < pages; ++J) {
        double sum = 0;
        for (isize x = 0; x < d; ++x)
          sum += std::max(q.get(0, h, 0, x) * s.low[J * d + x], q.get(0, h, 0, x) * s.high[J * d + x]);
        CHECK(sum == Approx(bound[static_cast<std::size_t>(h * pages + J)]).epsilon(1e-12));
      }
  }
}
