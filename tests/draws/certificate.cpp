// SPDX-License-Identifier: MIT
/// @file  The certificate of hybrid_attention is never violated: real captures, data that is hard on purpose, needles among 64k keys.
///
/// FOVEA_CERTIFICATE_ROWS=N looks at so many rows of hard data (30,000 in a test run); FOVEA_CERTIFICATE_CAPTURES=FILE:FILE... at so many
/// rows of captures of one's own as well, with other recipes and other pieces of the text each time.

#include <array>
#include <cstdlib>
#include <iostream>
#include <map>
#include <sstream>

#include <fovea/hybrid.hpp>
#include <fovea/hybrid/reference.hpp>
#include <fovea/interop/safetensors.hpp>

#include "support/catch.hpp"
#include "support/tensors.hpp"

namespace {

using namespace fovea;
using test::tensor;

enum class hard : unsigned char {
  normal,
  needles,
  duplicates,
  channel,
  huge,
  tiny,
  denormal,
  zeros,
  long_tails,
  large_values,
  opposite,
  not_finite,
  count
};

struct data {
  tensor q, k, v;
};

tensor as_double(const tensor& x) {
  tensor y(dtype::f64, x.batch(), x.heads(), x.length(), x.width());
  for (isize h = 0; h < x.heads(); ++h)
    for (isize i = 0; i < x.length(); ++i)
      for (isize c = 0; c < x.width(); ++c) y.set(0, h, i, c, x.get(0, h, i, c));
  return y;
}

void spoil(test::random& r, hard what, data& x) {
  const isize m = x.k.length(), d = x.k.width(), e = x.v.width();
  const auto each = [&](tensor& t, auto&& f) {
    for (isize h = 0; h < t.heads(); ++h)
      for (isize i = 0; i < t.length(); ++i)
        for (isize c = 0; c < t.width(); ++c) t.set(0, h, i, c, f(h, i, c, t.get(0, h, i, c)));
  };
  const auto scaled = [&](double by) { return [by](isize, isize, isize, double y) { return y * by; }; };
  const double far = std::pow(10.0, r.uniform(1, 12));
  switch (what) {
    case hard::needles:
      for (int x1 = 0; x1 < 3; ++x1) {
        const isize j = r.integer(0, m - 1), g = r.integer(0, x.k.heads() - 1), i = r.integer(0, x.q.length() - 1);
        for (isize c = 0; c < d; ++c) x.k.set(0, g, j, c, 4 * x.q.get(0, g, i, c));
        for (isize c = 0; c < e; ++c) x.v.set(0, g, j, c, 30 * r.normal());
      }
      break;
    case hard::duplicates: each(x.k, [&](isize h, isize, isize c, double) { return x.k.get(0, h, 0, c); }); break;
    case hard::channel: {  // one channel sets the step of the rounding
      const isize c0 = r.integer(0, d - 1);
      each(x.k, [&](isize, isize, isize c, double y) { return c == c0 ? 60 + y : y; });
      each(x.q, [&](isize, isize, isize c, double y) { return c == c0 ? y / 50 : 3 * y; });
      break;
    }
    case hard::huge: each(x.q, scaled(far)), each(x.k, scaled(std::pow(10.0, r.uniform(0, 12)))); break;
    case hard::tiny:
      each(x.q, scaled(1 / far / far)), each(x.k, scaled(1 / far / far)), each(x.v, scaled(1 / far));
      break;
    case hard::denormal:
      each(x.k, scaled(1e-41)), each(x.q, scaled(r.coin() ? 1e-41 : 1e20)), each(x.v, scaled(1e-42));
      break;
    case hard::zeros:
      each(x.k, [&](isize, isize i, isize, double y) { return i % 3 == 0 ? 0.0 : y; });
      each(x.v, [&](isize, isize i, isize, double y) { return i % 5 == 0 ? 0.0 : y; });
      break;
    case hard::long_tails:
      each(x.k, [&](isize, isize, isize, double y) { return y * y * y; });
      each(x.v, [&](isize, isize, isize, double y) { return y * y * y; });
      break;
    case hard::large_values:
      for (int x1 = 0; x1 < 2; ++x1) {
        const isize j = r.integer(0, m - 1);
        for (isize c = 0; c < e; ++c) x.v.set(0, 0, j, c, far * far * r.normal());
      }
      break;
    case hard::opposite:  // keys of a block cancel in its mean
      each(x.k, [](isize, isize i, isize, double y) { return i % 2 == 0 ? 5 * y : y; });
      for (isize h = 0; h < x.k.heads(); ++h)
        for (isize i = 1; i < m; i += 2)
          for (isize c = 0; c < d; ++c) x.k.set(0, h, i, c, -x.k.get(0, h, i - 1, c));
      break;
    case hard::not_finite: {
      tensor& t = r.coin(0.3) ? x.q : r.coin() ? x.k : x.v;
      t.set(0, 0, r.integer(0, t.length() - 1), 0, r.coin() ? NAN : HUGE_VAL);
      break;
    }
    default: break;
  }
}

hybrid_attention recipe(test::random& r) {
  using enum block_selector;
  hybrid_attention m;
  m.select = std::array{mean, variance, bound, int8, int8, int4, exact}[static_cast<std::size_t>(r.integer(0, 6))];
  m.block_q = r.coin() ? 16 : r.integer(1, 40), m.block_k = r.coin() ? 16 : r.integer(1, 40);
  m.is_causal = r.coin(0.7), m.budget = r.coin(0.8) ? r.uniform() : 0, m.at_least = r.coin() ? 0 : r.integer(0, 40);
  m.first = r.integer(0, 20), m.window = r.integer(0, 40);
  m.compensate = r.coin() ? compensation::none : compensation::zeroth;
  m.keep_small = r.coin() ? 0 : r.uniform(0.02, 0.3), m.share_group = r.coin(0.2);
  if (r.coin(0.3)) m.parts = m.block_k % 4 == 0 ? 4 : m.block_k % 2 == 0 ? 2 : 1;
  if (r.coin(0.2) && (m.select == int8 || m.select == exact)) m.top_p = r.uniform();
  if (r.coin(0.1)) m.align = top_left;
  if (r.coin(0.2)) m.scale = r.uniform(0.01, 2);
  return m;
}

struct findings {
  isize rows = 0, violated = 0, unbounded = 0, wrong = 0;
  double tightest = HUGE_VAL;  ///< bound over error
  std::vector<double> errors, bounds;
  std::string where;
};

/// Compares with exact attention in double, whose own rounding its certificate gives.
void examine(const hybrid_attention& m, const data& x, findings& all, const std::string& name) {
  const isize H = x.q.heads(), n = x.q.length(), e = x.v.width();
  const dtype type = x.q.type() == dtype::f64 ? dtype::f64 : dtype::f32;
  tensor out = test::unwritten(type, 1, H, n, e), bound = test::unwritten(type, 1, H, n, 1),
         want = test::unwritten(dtype::f64, 1, H, n, e), doubt = test::unwritten(dtype::f64, 1, H, n, 1);
  error_bound(serial, m, x.q, x.k, x.v, bound, out);
  const hybrid_attention exact{.block_k = 64,
                               .is_causal = m.is_causal,
                               .budget = 1,
                               .compensate = compensation::none,
                               .align = m.align,
                               .scale = m.scale};
  error_bound(serial, exact, as_double(x.q), as_double(x.k), as_double(x.v), doubt, want);
  for (isize h = 0; h < H; ++h)
    for (isize i = 0; i < n; ++i) {
      double error = 0, size = 0;
      for (isize c = 0; c < e; ++c)
        error = std::hypot(error, out.get(0, h, i, c) - want.get(0, h, i, c)),
        size = std::hypot(size, want.get(0, h, i, c));
      const double b = bound.get(0, h, i, 0), slack = doubt.get(0, h, i, 0);
      ++all.rows;
      if (b == HUGE_VAL) {
        ++all.unbounded;
        continue;
      }
      if (!(error <= b + slack))
        ++all.violated, all.where = name + ", head " + std::to_string(h) + ", row " + std::to_string(i) + ": error " +
                                    std::to_string(error) + ", bound " + std::to_string(b);
      if (!std::isfinite(size)) ++all.wrong;  // a row that nothing can be said of has a bound
      if (error > 1e-3 * size && slack < 1e-6 * error && b > 0) all.tightest = std::min(all.tightest, b / error);
      if (size > 0) all.errors.push_back(error / size), all.bounds.push_back(b / size);
    }
}

double median(std::vector<double> x) {
  std::nth_element(x.begin(), x.begin() + static_cast<std::ptrdiff_t>(x.size() / 2), x.end());
  return x[x.size() / 2];
}

/// Tokens [first, first + n) of `heads` query heads from head h0 on (0: all) with their KV heads.
data piece_of(const safetensors_file& f, isize first, isize n, isize h0 = 0, isize heads = 0) {
  const isize group = f.tensors.at("q").dim(-3) / f.tensors.at("k").dim(-3);
  const auto get = [&](const char* name, isize from, isize count) {
    const array& a = f.tensors.at(name);
    tensor t(dtype::f32, 1, heads == 0 ? a.dim(-3) : count, n, a.dim(-1));
    for (isize h = 0; h < t.heads(); ++h)
      for (isize i = 0; i < n; ++i)
        for (isize c = 0; c < t.width(); ++c)
          t.set(0, h, i, c, a.at(((from + h) * a.dim(-2) + first + i) * t.width() + c));
    return t;
  };
  return {get("q", h0, heads), get("k", h0 / group, heads / group), get("v", h0 / group, heads / group)};
}
data capture(const std::string& file, isize n) {
  return piece_of(read_safetensors(std::string(FOVEA_DATA_DIR) + "/" + file + ".safetensors"), 0, n);
}

}  // namespace

TEST_CASE("certificate: never violated on data that is hard on purpose") {
  const char* text = std::getenv("FOVEA_CERTIFICATE_ROWS");
  const isize wanted = text == nullptr ? 30000 : std::atol(text);
  std::map<hard, findings> by_kind;
  isize rows = 0;
  for (std::uint64_t seed = 0; rows < wanted; ++seed) {
    test::random r(seed);
    const auto what = static_cast<hard>(seed % static_cast<std::uint64_t>(hard::count));
    const isize G = r.integer(1, 2), H = G * r.integer(1, 2), n = r.integer(1, 120), d = r.integer(1, 48),
                e = r.integer(1, 48);
    const isize m = r.coin(0.7) ? n : r.integer(1, 150);
    const auto types = std::array{dtype::f32, dtype::f32, dtype::f32, dtype::f64, dtype::bf16};
    const dtype type = types[static_cast<std::size_t>(r.integer(0, 4))];
    data x{test::normal(r, type, 1, H, n, d), test::normal(r, type, 1, G, m, d), test::normal(r, type, 1, G, m, e)};
    spoil(r, what, x);
    examine(recipe(r), x, by_kind[what], "seed " + std::to_string(seed));
    rows += H * n;
  }
  for (const auto& [what, found] : by_kind) {
    CAPTURE(static_cast<int>(what), found.where, found.rows, found.unbounded, found.tightest);
    if (text != nullptr)
      std::cout << static_cast<int>(what) << ": rows " << found.rows << ", without a bound " << found.unbounded
                << ", violated " << found.violated << ", smallest bound / error " << found.tightest << "\n";
    CHECK(found.violated == 0);
    CHECK(found.wrong == 0);
    if (what != hard::not_finite && what != hard::huge) CHECK(found.unbounded == 0);
    if (what == hard::not_finite) CHECK(found.unbounded > 0);
    // The comparison could fail: somewhere half of the bound would not do.
    if (what == hard::normal || what == hard::needles || what == hard::opposite) CHECK(found.tightest < 2);
  }
}

TEST_CASE("certificate: never violated on captures, and tight enough to be of use") {
  for (const char* file : {"smollm2_layer14", "smollm2_layer29"}) {
    const data x = capture(file, 512);
    for (const auto rest : {compensation::none, compensation::zeroth}) {
      findings found;
      examine({.is_causal = true, .at_least = 0, .compensate = rest}, x, found, file);
      CAPTURE(file, found.where, median(found.errors), median(found.bounds));
      CHECK(found.violated == 0);
      CHECK(found.unbounded == 0);
      CHECK(median(found.bounds) < 0.6);
    }
    findings full;
    examine({.is_causal = true, .budget = 1}, x, full, file);
    CHECK(full.violated == 0);
    CHECK(median(full.bounds) < 0.005);  // nothing skipped: rounding
  }
}

TEST_CASE("certificate: never violated on captures of one's own") {
  const char *rows = std::getenv("FOVEA_CERTIFICATE_ROWS"), *names = std::getenv("FOVEA_CERTIFICATE_CAPTURES");
  std::vector<std::string> files{std::string(FOVEA_DATA_DIR) + "/smollm2_layer14.safetensors"};
  if (names != nullptr) {
    std::stringstream list(names);
    files.clear();
    for (std::string one; std::getline(list, one, ':');) files.push_back(one);
  }
  const isize wanted = rows == nullptr || names == nullptr ? 1500 : std::atol(rows);
  findings found;
  for (std::uint64_t seed = 0; found.rows < wanted; ++seed) {
    test::random r(seed + 1000);
    const auto f = read_safetensors(files[seed % files.size()]);
    const isize G = f.tensors.at("k").dim(-3), group = f.tensors.at("q").dim(-3) / G, all = f.tensors.at("q").dim(-2);
    const isize n = std::min(all, names == nullptr ? isize{256} : r.integer(256, 2048));
    const isize pieces = names == nullptr ? 1 : 8;  // of one file, which is long to read
    for (isize x = 0; x < pieces; ++x) {
      hybrid_attention m = recipe(r);
      m.scale = std::nullopt;
      examine(m, piece_of(f, r.integer(0, all - n), n, r.integer(0, G - 1) * group, group), found,
              files[seed % files.size()] + ", seed " + std::to_string(seed));
    }
  }
  CAPTURE(found.where, found.rows, found.tightest);
  if (names != nullptr)
    std::cout << "captures: rows " << found.rows << ", without a bound " << found.unbounded << ", violated "
              << found.violated << ", smallest bound / error " << found.tightest << "\n";
  CHECK(found.violated == 0);
  CHECK(found.unbounded == 0);
}

TEST_CASE("certificate: prefill_within gets every row under the target, or computes it whole") {
  const data x = capture("smollm2_layer14", 256);
  const isize H = x.q.heads(), n = x.q.length(), e = x.v.width();
  tensor out = test::unwritten(dtype::f32, 1, H, n, e), bound = test::unwritten(dtype::f32, 1, H, n, 1),
         want = test::unwritten(dtype::f64, 1, H, n, e), doubt = test::unwritten(dtype::f64, 1, H, n, 1);
  error_bound(serial, {.is_causal = true, .budget = 1}, as_double(x.q), as_double(x.k), as_double(x.v), doubt, want);
  const auto look = [&](double target, isize& late, isize& violated, isize& beyond) {
    late = violated = beyond = 0;
    for (isize h = 0; h < H; ++h)
      for (isize i = 0; i < n; ++i) {
        double error = 0, size = 0;
        for (isize c = 0; c < e; ++c)
          error = std::hypot(error, out.get(0, h, i, c) - want.get(0, h, i, c)),
          size = std::hypot(size, out.get(0, h, i, c));
        late += bound.get(0, h, i, 0) > target * size * (1 + 1e-6) ? 1 : 0;
        violated += error > bound.get(0, h, i, 0) ? 1 : 0, beyond += error > target * size ? 1 : 0;
      }
  };
  isize late = 0, violated = 0, beyond = 0;
  for (const auto rest : {compensation::none, compensation::zeroth})
    for (const double kept : {0.0, 1.0 / 32}) {
      double before = 0;
      for (const double target : {0.5, 0.2}) {
        const hybrid_attention m{.is_causal = true,
                                 .budget = kept > 0 ? 0.0 : 0.05,
                                 .at_least = 0,
                                 .window = 16,
                                 .keep_small = kept,
                                 .compensate = rest};
        const double share = prefill_within(serial, m, x.q, x.k, x.v, out, bound, {.relative = target});
        look(target, late, violated, beyond);
        CAPTURE(target, share, kept, late);
        CHECK(share > before);
        CHECK(share < 0.97);
        CHECK(late == 0);
        CHECK(violated == 0);
        before = share;
        // The estimate stops earlier; what is proven still holds.
        const double less =
            prefill_within(serial, m, x.q, x.k, x.v, out, bound, {.relative = target, .estimated = true});
        look(target, late, violated, beyond);
        CHECK(less < share);
        CHECK(late > 0);
        CHECK(violated == 0);
        CHECK(beyond < H * n / 100);
      }
    }
  // As an option of the mechanism, on two threads: the same numbers.
  hybrid_attention m{.is_causal = true, .budget = 0, .at_least = 0};
  tensor own = test::unwritten(dtype::f32, 1, H, n, e);
  prefill_within(serial, m, x.q, x.k, x.v, out, bound, {.relative = 0.1});
  m.target = {.relative = 0.1};
  threads two(2);
  prefill(two, m, x.q, x.k, x.v, own);
  CHECK(own.values().data == out.values().data);
  // A target that nothing can reach computes everything that has weight.
  const double all = prefill_within(serial, m, x.q, x.k, x.v, out, bound, {.absolute = 1e-9});
  look(1e-3, late, violated, beyond);
  CHECK(all > 0.97);
  CHECK(beyond == 0);
}

TEST_CASE("certificate: an error target against the twin of the blocks that it computed, and against exact attention") {
  for (std::uint64_t seed = 0; seed < 24; ++seed) {
    test::random r(seed + 4000);
    const isize G = r.integer(1, 2), H = G * r.integer(1, 2), n = r.integer(20, 90), m = n + r.integer(0, 60),
                d = r.integer(4, 24), e = r.integer(4, 24);
    tensor q = test::normal(r, dtype::f32, 1, H, n, d), k = test::normal(r, dtype::f32, 1, G, m, d),
           v = test::normal(r, dtype::f32, 1, G, m, e), out = test::unwritten(dtype::f32, 1, H, n, e),
           bound = test::unwritten(dtype::f32, 1, H, n, 1), want = test::unwritten(dtype::f64, 1, H, n, e);
    hybrid_attention x;
    x.select =
        std::array{block_selector::int8, block_selector::mean, block_selector::exact, block_selector::bound}[seed % 4];
    x.is_causal = r.coin(0.7), x.budget = r.coin() ? 0 : 0.2, x.at_least = 0, x.first = 4, x.window = 8;
    x.block_q = r.integer(1, 20), x.block_k = 2 * r.integer(1, 8), x.keep_small = r.coin() ? 0 : 0.05;
    x.compensate = r.coin(0.3) ? compensation::none : compensation::zeroth;
    x.parts = x.compensate == compensation::zeroth && r.coin() ? 2 : 1;
    x.target = {.relative = r.uniform(0.05, 0.5), .estimated = seed % 6 == 5};
    const problem p{q, k, v, out, {}, {}, {}};
    const isize lines = ceil_div(n, x.block_q), blocks = ceil_div(m, x.block_k);
    std::vector<std::uint8_t> table(static_cast<std::size_t>(H * lines * blocks));
    const buffer work(x.workspace_size(p.shape(), 1) + alignment);
    detail::hybrid_run<float>::prefill(x, serial, p, arena(work.span()), table.data(), bound);
    isize dropped = 0;  // blocks of the selection that were not computed
    problem twin{q, k, v, want, {}, {}, {}};
    reference::prefill_by(x, twin, [&](isize, isize h) {
      auto fates = reference::block_fates(x, p, 0, h);
      for (isize I = 0; I < lines; ++I)
        for (isize J = 0; J < blocks; ++J) {
          int& fate = fates[static_cast<std::size_t>(I)][static_cast<std::size_t>(J)];
          const bool computed = table[static_cast<std::size_t>((h * lines + I) * blocks + J)] == kernel::computed;
          dropped += fate == 1 && !computed ? 1 : 0;
          if (computed) fate = 1;
        }
      return fates;
    });
    CAPTURE(seed, H, G, n, m, d, e, x.block_q, x.block_k, x.is_causal, x.budget, x.keep_small, x.parts);
    CHECK(dropped == 0);
    CHECK_CLOSE(out.values(), want.values(), {.c = 128});
    tensor exact = test::unwritten(dtype::f64, 1, H, n, e);
    hybrid_attention all = x;
    all.target = {};
    reference::prefill_by(all, problem{q, k, v, exact, {}, {}, {}}, [&](isize, isize) {
      return std::vector<std::vector<int>>(static_cast<std::size_t>(lines),
                                           std::vector<int>(static_cast<std::size_t>(blocks), 1));
    });
    for (isize h = 0; h < H; ++h)
      for (isize i = 0; i < n; ++i) {
        double error = 0, size = 0;
        for (isize c = 0; c < e; ++c)
          error = std::hypot(error, out.get(0, h, i, c) - exact.get(0, h, i, c)),
          size = std::hypot(size, out.get(0, h, i, c));
        const double promised = bound.get(0, h, i, 0);
        CHECK(error <= promised);
        if (!x.target.estimated) CHECK(promised <= x.target.relative * size * (1 + 1e-6));
      }
  }
}

TEST_CASE("certificate: a needle at every depth of 64k keys is found by int8, or reported where mean keys miss it") {
  const isize m = 65536, n = 16, d = 32;
  test::random r(5);
  data x{test::normal(r, dtype::f32, 1, 1, n, d), test::normal(r, dtype::f32, 1, 1, m, d),
         test::normal(r, dtype::f32, 1, 1, m, d)};
  std::vector<double> key(static_cast<std::size_t>(d));
  for (double& y : key) y = r.normal();
  for (isize i = 0; i < n; ++i)
    for (isize c = 0; c < d; ++c) x.q.set(0, 0, i, c, 1.2 * key[static_cast<std::size_t>(c)] + 0.2 * r.normal());
  tensor out = test::unwritten(dtype::f32, 1, 1, n, d), bound = test::unwritten(dtype::f32, 1, 1, n, 1);
  isize missed = 0;
  for (isize depth = 0; depth < 16; ++depth) {
    const isize j = depth * (m - 200) / 15 + 30;
    tensor k = x.k, v = x.v;
    for (isize y = j / 16 * 16; y < j / 16 * 16 + 16;
         ++y)  // its neighbours point away: the mean key of the block shows nothing
      for (isize c = 0; c < d; ++c) x.k.set(0, 0, y, c, (y == j ? 4.5 : -0.3) * key[static_cast<std::size_t>(c)]);
    for (isize c = 0; c < d; ++c) x.v.set(0, 0, j, c, c == 3 ? 10.0 : 0.0);
    const hybrid_attention fine{.is_causal = true, .budget = 1.0 / 256, .at_least = 0},
        cheap{.select = block_selector::mean,
              .is_causal = true,
              .budget = 1.0 / 256,
              .at_least = 0,
              .compensate = compensation::none};
    CAPTURE(depth, j);
    prefill(serial, fine, x.q, x.k, x.v, out);
    for (isize i = 0; i < n; ++i) CHECK(out.get(0, 0, i, 3) > 8.5);
    error_bound(serial, cheap, x.q, x.k, x.v, bound, out);
    for (isize i = 0; i < n; ++i) {
      const double got = out.get(0, 0, i, 3);
      if (got > 5) continue;
      ++missed;
      CHECK(bound.get(0, 0, i, 0) > 5);  // the answer has 10 here
    }
    x.k = k, x.v = v;
  }
  CHECK(missed > 0);  // mean keys do miss it
}
