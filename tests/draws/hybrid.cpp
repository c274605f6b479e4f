// SPDX-License-Identifier: MIT
/// @file  2,000 random calls of hybrid_attention, each against its twin: selectors, blocks, budgets, kept keys, parts, types, layouts, states.
///
/// FOVEA_HYBRID_DRAW=0x... runs one draw again, FOVEA_HYBRID_DRAWS=N runs so many (README.md beside this file).

#include <cstdlib>
#include <iostream>
#include <map>
#include <sstream>

#include <fovea/core/exec.hpp>
#include <fovea/hybrid.hpp>
#include <fovea/hybrid/reference.hpp>

#include "support/catch.hpp"
#include "support/tensors.hpp"

namespace {

using namespace fovea;
using test::tensor;

enum class fault : unsigned char { none, count_of_pool, kept_dropped, one_element, mask_flipped };

struct draw {
  std::uint64_t seed = 0;
  hybrid_attention m;
  isize B = 1, G = 1, H = 1, n = 1, keys = 1, d = 1, e = 1;
  dtype type = dtype::f32;
  test::layout layout = test::layout::bhnd;
  int threads = 1;
  bool streams = false;                     ///< in steps and chunks through a state
  bool per_head = false, per_item = false;  ///< a given mask

  std::string text() const {
    std::ostringstream s;
    s << "FOVEA_HYBRID_DRAW=0x" << std::hex << seed << std::dec << "  select " << static_cast<int>(m.select)
      << " blocks " << m.block_q << " x " << m.block_k << (m.is_causal ? " causal" : "") << " top " << m.top
      << " budget " << m.budget << " top_p " << m.top_p << " at_least " << m.at_least << " first " << m.first
      << " window " << m.window << " small " << m.keep_small << " parts " << m.parts << (m.share_group ? " shared" : "")
      << " rest " << static_cast<int>(m.compensate) << " pattern " << static_cast<int>(m.pattern) << " stride "
      << m.stride << " B " << B << " G " << G << " H " << H << " n " << n << " keys " << keys << " d " << d << " e "
      << e << " " << name_of(type) << " threads " << threads << (streams ? " streams" : "");
    return s.str();
  }
};

draw make_draw(std::uint64_t seed) {
  test::random r(seed ^ 0x68796272696400ULL);
  draw x;
  x.seed = seed;
  x.type = std::array{dtype::f32, dtype::f32, dtype::f64, dtype::bf16,
                      dtype::f16}[static_cast<std::size_t>(r.integer(0, 4))];
  x.layout = test::layouts[r.integer(0, 3)];
  x.B = r.coin(0.8) ? 1 : 2, x.G = r.integer(1, 2), x.H = x.G * r.integer(1, 3), x.threads = r.coin(0.8) ? 1 : 3;
  x.n = r.integer(1, 50), x.keys = r.coin() ? x.n : r.integer(1, 70), x.d = r.integer(1, 24), x.e = r.integer(1, 24);
  hybrid_attention& m = x.m;
  m.select = static_cast<block_selector>(r.integer(0, 7));
  m.is_causal = m.select == block_selector::pattern || r.coin(0.7);
  m.compensate = m.select == block_selector::pattern ? compensation::none : static_cast<compensation>(r.integer(0, 2));
  m.parts = m.compensate == compensation::zeroth ? r.integer(1, 3) : 1;
  m.block_q = r.coin(0.3) ? 1
              : r.coin()  ? r.coin(0.7) ? 16 : 32
                          : r.integer(2, 20),
  m.block_k = m.parts * (r.coin(0.2) ? 16 : r.integer(1, 12));
  m.budget = r.coin(0.9) ? r.uniform() : 0, m.top = r.coin(0.2) ? r.integer(1, 5) : 0;
  const bool tokens =
      m.select == block_selector::int8 || m.select == block_selector::int4 || m.select == block_selector::exact;
  m.top_p = tokens && r.coin(0.3) ? r.uniform() : 0, m.at_least = r.coin() ? 0 : r.integer(0, 20);
  m.first = r.integer(0, 6), m.window = r.integer(0, 12), m.keep_small = r.coin(0.4) ? 0 : r.uniform(0.02, 0.4);
  m.share_group = m.compensate != compensation::cumulant && r.coin(0.3);
  m.pattern = static_cast<hsa_mode>(r.integer(0, 3)), m.stride = r.integer(1, 20);
  x.per_head = r.coin(), x.per_item = r.coin();
  // A state is promised the same answer where rows do not vote together.
  x.streams = m.is_causal && x.keys == x.n && r.coin(0.9) &&
              (m.select == block_selector::pattern || m.select == block_selector::given || m.block_q == 1);
  if (!x.streams && r.coin(0.15)) m.align = top_left;
  if (r.coin(0.2)) m.scale = r.uniform(0.1, 1);
  return x;
}

/// Sizes of stored elements bound the comparison.
test::tolerance allowed(const draw& x) {
  return {.c = 160, .acc = x.type == dtype::f64 ? dtype::f64 : dtype::f32, .stored = x.type};
}

struct numbers {
  tensor q, k, v, out, lse, want, sums;
  std::vector<std::uint8_t> table;
  explicit numbers(const draw& x, hybrid_attention& m) {
    test::random r(x.seed + 77);
    q = test::normal(r, x.type, x.B, x.H, x.n, x.d, x.layout),
    k = test::normal(r, x.type, x.B, x.G, x.keys, x.d, x.layout);
    v = test::normal(r, x.type, x.B, x.G, x.keys, x.e, x.layout),
    out = test::unwritten(x.type, x.B, x.H, x.n, x.e, x.layout);
    lse = test::unwritten(x.type == dtype::f64 ? dtype::f64 : dtype::f32, x.B, x.H, x.n, 1);
    want = test::unwritten(dtype::f64, x.B, x.H, x.n, x.e), sums = test::unwritten(dtype::f64, x.B, x.H, x.n, 1);
    if (m.select != block_selector::given) return;
    const isize B = x.per_item ? x.B : 1, H = x.per_head ? x.H : 1, rows = ceil_div(x.n, m.block_q),
                columns = ceil_div(x.keys, m.block_k);
    table.resize(static_cast<std::size_t>(B * H * rows * columns));
    for (auto& y : table) y = r.coin(0.4);
    m.blocks = bhnd<const std::uint8_t>(table.data(), B, H, rows, columns);
  }
};

void through_a_state(const draw& x, const hybrid_attention& m, numbers& y) {
  test::random r(x.seed + 5);
  state s = m.make_state({x.B, x.H, x.G, x.n, x.n + 3, x.d, x.e, x.type});
  for (isize i = 0; i < x.n;) {
    const isize count = std::min(x.n - i, r.coin() ? 1 : r.integer(1, 20));
    fovea::prefill(serial, m, y.q.ref().slice(i, count), y.k.ref().slice(i, count), y.v.ref().slice(i, count),
                   y.out.ref().slice(i, count), s, {.lse = y.lse.ref().slice(i, count)});
    i += count;
  }
}

/// "" or what is wrong.
std::string run(const draw& x, fault f = fault::none) {
  hybrid_attention m = x.m;
  numbers y(x, m);
  hybrid_attention used = m;
  if (f == fault::kept_dropped) used.keep_small = 0;
  if (f == fault::count_of_pool) used.parts = 1;
  try {
    if (x.streams) {
      through_a_state(x, used, y);
    } else if (x.threads > 1) {
      const fovea::threads pool(x.threads);
      fovea::prefill(pool, used, y.q, y.k, y.v, y.out, {.lse = y.lse});
    } else {
      fovea::prefill(serial, used, y.q, y.k, y.v, y.out, {.lse = y.lse});
    }
  } catch (const std::exception& error) {
    return std::string("refused: ") + error.what();
  }
  if (f == fault::one_element) y.out.set(0, 0, 0, 0, y.out.get(0, 0, 0, 0) + 0.1);
  if (f == fault::mask_flipped && !y.table.empty()) y.table[0] = !y.table[0];
  reference::prefill(m, {y.q, y.k, y.v, y.want, y.sums, {}, {}});
  if (!y.out.guards_intact() || !y.lse.guards_intact()) return "wrote beside the output";
  const auto out = test::compare(y.out.values(), y.want.values(), allowed(x));
  if (!out.ok) return "out: " + out.text;
  test::tolerance sums = allowed(x);
  sums.stored = y.lse.type(), sums.scale = 4;
  const auto lse = test::compare(y.lse.values(), y.sums.values(), sums);
  return lse.ok ? "" : "lse: " + lse.text;
}

std::uint64_t number(const char* variable, std::uint64_t otherwise) {
  const char* text = std::getenv(variable);
  return text == nullptr || *text == '\0' ? otherwise : std::strtoull(text, nullptr, 0);
}

void run_part(std::uint64_t part, std::uint64_t parts) {
  isize failed = 0;
  for (std::uint64_t seed = part; seed < number("FOVEA_HYBRID_DRAWS", 2000) && failed < 10; seed += parts) {
    const draw x = make_draw(seed);
    const std::string wrong = run(x);
    if (wrong.empty()) continue;
    UNSCOPED_INFO(x.text() << "\n    " << wrong);
    ++failed;
  }
  CHECK(failed == 0);
}

}  // namespace

TEST_CASE("hybrid draws: FOVEA_HYBRID_DRAW again") {
  if (std::getenv("FOVEA_HYBRID_DRAW") == nullptr) return;
  const draw x = make_draw(number("FOVEA_HYBRID_DRAW", 0));
  std::cout << x.text() << "\n";
  CHECK(run(x) == "");
}

TEST_CASE("hybrid draws: one half") { run_part(0, 2); }
TEST_CASE("hybrid draws: the other half") { run_part(1, 2); }

TEST_CASE("hybrid draws: every selector meets every type, compensation, and option") {
  std::map<std::string, isize> met;
  for (std::uint64_t seed = 0; seed < 2000; ++seed) {
    const draw x = make_draw(seed);
    const std::string select = "select " + std::to_string(static_cast<int>(x.m.select));
    ++met[select + " " + name_of(x.type)], ++met[select + " rest " + std::to_string(static_cast<int>(x.m.compensate))];
    if (x.streams) ++met[select + " streams"];
    if (x.m.selects() && x.m.keep_small > 0) ++met[select + " keeps"];
    if (x.m.selects() && x.m.share_group) ++met[select + " shared"];
    if (x.m.top_p > 0) ++met[select + " top_p"];
    if (x.m.selects() && x.m.parts > 1) ++met[select + " parts"];
  }
  CHECK(met.size() == 8 * 4 + 1 + 7 * 3 + 8 + 6 + 6 + 3 + 6);
  for (const auto& [what, count] : met) {
    CAPTURE(what);
    CHECK(count >= 8);
  }
}

TEST_CASE("hybrid draws: a library that is wrong on purpose is found out") {
  for (const fault f : {fault::count_of_pool, fault::kept_dropped, fault::one_element, fault::mask_flipped}) {
    isize applied = 0, found = 0;
    for (std::uint64_t seed = 9000; applied < 20 && seed < 20000; ++seed) {
      const draw x = make_draw(seed);
      const bool sharp =
          x.type == dtype::f32 && x.n >= 20 && x.keys >= 30 && x.m.budget < 0.5 && x.m.top_p == 0 && x.m.at_least == 0;
      const bool skips = sharp && x.m.selects() && x.m.block_k <= 12 && x.m.block_k > x.m.parts;
      if (f == fault::count_of_pool && !(skips && x.m.parts > 1 && !x.streams)) continue;
      if (f == fault::kept_dropped && !(skips && x.m.keep_small > 0.1 && x.m.block_k > 1)) continue;
      if (f == fault::mask_flipped && !(sharp && x.m.select == block_selector::given && !x.streams)) continue;
      if (!sharp) continue;
      ++applied;
      found += run(x, f).empty() ? 0 : 1;
    }
    CAPTURE(static_cast<int>(f), applied, found);
    CHECK(applied >= 8);
    CHECK(found >= applied * 2 / 3);  // some selections compute all that the fault could spoil
  }
}
