// SPDX-License-Identifier: MIT
/// @file  2,000 random draws of the mechanisms with a state of constant size: member, sizes, types, chunks, how the state is handed over.
///
/// A draw is a linear_attention of any rule with any map, a dijiang_attention or a windowed_attention; its tokens come in one call or in
/// chunks, with a state that is given (S0, z0), saved and restored, copied, or rolled back in between. Output and final state are compared
/// with the twin in double. FOVEA_LINEAR_DRAW=0x... runs one draw again, FOVEA_LINEAR_DRAWS=N runs so many.

#include <cmath>
#include <cstdlib>
#include <iostream>
#include <map>

#include <fovea/dijiang.hpp>
#include <fovea/dijiang/reference.hpp>
#include <fovea/feature/cosformer.hpp>
#include <fovea/feature/favor.hpp>
#include <fovea/feature/learned.hpp>
#include <fovea/feature/polynomial.hpp>
#include <fovea/linear.hpp>
#include <fovea/linear/reference.hpp>
#include <fovea/windowed.hpp>
#include <fovea/windowed/reference.hpp>

#include "support/catch.hpp"
#include "support/tensors.hpp"

namespace {

using namespace fovea;
using test::dtype;
using test::layout;

enum class member { linear, dijiang, windowed };
enum class map_kind { identity, elu1, hedgehog, t2r, favor, cosformer, taylor, square };
constexpr const char* map_names[] = {"identity", "elu1", "hedgehog", "t2r", "favor", "cosformer", "taylor2", "square"};
enum class hand_over { pass, save, copy, roll_back };
constexpr const char* hand_over_names[] = {"pass", "save", "copy", "roll back"};
enum class fault { none, state_lost, not_rolled_back, one_element };

struct chunk {
  isize first, count;
  hand_over before;  // how the state comes to this chunk
};

struct draw {
  std::uint64_t seed = 0;
  fovea::rule rule = fovea::rule::none;
  member kind = member::linear;
  map_kind map = map_kind::elu1;
  bool normalise = false, causal = true, given_state = false, extreme = false, constant_decay = false, gate = false;
  isize B = 1, H = 1, G = 1, values = 1;  // heads of q, of k, of v
  isize n = 0, m = 0, d = 1, e = 1, window = 1, first = 0;
  dtype type = dtype::f32, out = dtype::f32;
  layout l = layout::bhnd;
  int threads = 1;
  double scale = 1.0;
  std::vector<chunk> chunks;  // none: one call without a state

  std::string text() const {
    std::ostringstream s;
    const char* names[] = {"linear", "dijiang", "windowed"};
    s << "FOVEA_LINEAR_DRAW=0x" << std::hex << seed << std::dec << "  " << names[static_cast<int>(kind)] << ' '
      << name_of(rule) << ", map " << map_names[static_cast<int>(map)] << (normalise ? ", normalised" : "")
      << (causal ? "" : ", all keys") << (given_state ? ", S0" : "") << (extreme ? ", extreme gates" : "")
      << "; B, H, G, values " << B << ", " << H << ", " << G << ", " << values << "; n, m, d, e " << n << ", " << m
      << ", " << d << ", " << e << "; " << fovea::name_of(type) << " -> " << fovea::name_of(out) << ", "
      << test::name_of(l) << ", " << threads << " threads;";
    for (const chunk& c : chunks) s << ' ' << c.count << " (" << hand_over_names[static_cast<int>(c.before)] << ')';
    return s.str();
  }
};

bool positive(map_kind k) { return k != map_kind::identity && k != map_kind::cosformer; }

draw make_draw(std::uint64_t seed) {
  test::random r(seed);
  draw x;
  x.seed = seed;
  const auto pick = [&](auto... options) {
    const std::common_type_t<decltype(options)...> all[] = {options...};
    return all[r.integer(0, static_cast<isize>(sizeof...(options)) - 1)];
  };
  x.kind = pick(member::linear, member::linear, member::linear, member::dijiang, member::windowed);
  x.type = pick(dtype::f32, dtype::f32, dtype::bf16, dtype::f16, dtype::f64);
  x.out = fovea::size_of(x.type) == 2 && r.coin() ? dtype::f32 : x.type;
  x.l = test::layouts[r.integer(0, 3)];
  x.B = r.integer(1, 2), x.G = r.integer(1, 2), x.H = x.G * r.integer(1, 3), x.values = x.G;
  x.d = pick(1, 3, 8, 16, 17, 32, 33, 64, 65, 80), x.e = pick(1, 5, 16, 24, 32, 40, 64);
  x.n = pick(0, 1, 2, 3, 5, 20, 33, 64, 65, 127, 130), x.m = x.n;
  x.threads = pick(1, 1, 2, 3);
  x.map = static_cast<map_kind>(r.integer(0, 7));
  if (x.kind == member::linear) {
    x.rule = pick(rule::none, rule::none, rule::none, rule::decay, rule::gla, rule::delta, rule::gated_delta, rule::kda,
                  rule::gdn2);
    if (is_delta(x.rule))  // features longer than 1 make its state grow
      x.map = r.coin(0.8) ? map_kind::identity : map_kind::hedgehog;
    if (x.map == map_kind::favor && x.rule != rule::none && x.rule != rule::decay) x.map = map_kind::elu1;
    x.normalise = !is_delta(x.rule) && positive(x.map) && r.coin();
    x.causal = x.rule != rule::none || r.coin(0.85);
    x.scale = pick(1.0, 0.125, 3.0);
    x.extreme = r.coin(0.2), x.constant_decay = x.rule == rule::decay && r.coin(0.4), x.gate = r.coin();
    if (x.H == x.G && r.coin(0.2)) x.values = x.G * 2;
  } else {
    x.normalise = x.kind == member::windowed || r.coin();
    if (x.kind == member::windowed && (x.map == map_kind::cosformer || x.map == map_kind::identity))
      x.map = map_kind::elu1;
    if (x.kind == member::windowed) x.window = r.integer(1, 40), x.first = r.integer(0, 5), x.gate = r.coin();
    if (x.kind == member::dijiang) x.constant_decay = r.coin(0.4), x.d = pick(2, 8, 16, 24, 40, 64);
  }
  if (x.map == map_kind::taylor || x.map == map_kind::square)
    x.d = std::min(x.d, isize{9});  // features by the square of it
  if (x.map == map_kind::cosformer && x.d > 33) x.d = 33;
  if (x.causal && r.coin(0.7)) {
    const isize most = pick(1, 3, 17, 64, 130);
    for (isize i = 0; i < x.n;) {
      const isize count = std::min(x.n - i, r.integer(1, most));
      x.chunks.push_back({i, count, static_cast<hand_over>(r.integer(0, 3))});
      i += count;
    }
    x.given_state = x.kind == member::linear && x.map != map_kind::favor && x.map != map_kind::cosformer && r.coin(0.4);
  } else if (r.coin()) {
    x.m = pick(0, 1, 4, 63, 140);
  }
  return x;
}

/// Inputs, weights and the mechanism of a draw.
struct setting {
  test::tensor q, k, v, decay, beta, erase, write;
  projection w;
  std::vector<float> weight, gate;
  std::vector<double> gamma;
  arrays initial;
  reference::linear_state start;

  explicit setting(const draw& x) {
    test::random r(x.seed ^ 0x5a17);
    const double spread = x.kind == member::linear && x.map == map_kind::identity ? 0.5 : 1.0;
    q = test::normal(r, x.type, x.B, x.H, x.n, x.d, x.l, spread),
    k = test::normal(r, x.type, x.B, x.G, x.m, x.d, x.l, spread);
    v = test::normal(r, x.type, x.B, x.values, x.m, x.e, x.l);
    if (x.kind == member::linear && is_delta(x.rule)) shorten_keys();
    std::vector<float> rows(static_cast<std::size_t>(6 * x.d));
    for (float& f : rows) f = static_cast<float>(r.normal() / std::sqrt(static_cast<double>(x.d)));
    w = projection(rows.data(), 1, 6, x.d, nullptr);
    for (isize h = 0; h < x.H; ++h) weight.push_back(static_cast<float>(r.normal()));
    for (isize i = 0; i < x.H * x.d; ++i) gate.push_back(static_cast<float>(0.2 * r.normal()));
    if (x.constant_decay) gamma = {r.uniform(0.7, 1.0)};
    if (x.kind == member::linear) add_gates(x, r);
  }
  fovea::gates gates_of(isize first, isize count) const {
    const auto part = [&](const test::tensor& t) {
      return t.size() > 0 || t.width() > 0 ? t.ref().slice(first, count) : tensor_ref{};
    };
    return {part(decay), part(beta), part(erase), part(write)};
  }
  feature_map map(const draw& x) const {
    switch (x.map) {
      case map_kind::identity: return identity_map{};
      case map_kind::hedgehog: return hedgehog{};
      case map_kind::t2r: return t2r{w.ref(), w.ref()};
      case map_kind::favor: return favor_plain{w.ref()};
      case map_kind::cosformer: return cosformer{500};
      case map_kind::taylor: return taylor2{};
      case map_kind::square: return square_map{};
      default: return elu1{};
    }
  }
  linear_attention linear(const draw& x) const {
    return {.map = map(x),
            .rule = x.rule,
            .scale = x.scale,
            .is_causal = x.causal,
            .normalise = x.normalise,
            .clamp = x.normalise ? 0.01 : 0.0,
            .gamma = gamma};
  }
  windowed_attention windowed(const draw& x) const {
    windowed_attention m{.window = x.window, .first = x.first, .map = map(x)};
    if (x.gate) {
      m.level = rest_level::window_maximum;
      m.log_weight = bhnd<const float>(weight.data(), 1, x.H, 1, 1);
      m.query_gate = bhnd<const float>(gate.data(), 1, x.H, 1, x.d);
    }
    return m;
  }
  dijiang_attention dijiang(const draw& x) const {
    return dijiang_attention::make({.head_dim = x.d,
                                    .seed = x.seed % 7 + 1,
                                    .form = x.seed % 2 ? dijiang_form::unbiased : dijiang_form::paper,
                                    .normalise = x.normalise,
                                    .gamma = gamma});
  }

 private:
  void shorten_keys() {  // delta rules take keys of length 1
    for (isize b = 0; b < k.batch(); ++b)
      for (isize h = 0; h < k.heads(); ++h)
        for (isize i = 0; i < k.length(); ++i) {
          double square = 1e-30;
          for (isize c = 0; c < k.width(); ++c) square += k.get(b, h, i, c) * k.get(b, h, i, c);
          for (isize c = 0; c < k.width(); ++c) k.set(b, h, i, c, k.get(b, h, i, c) / std::sqrt(square));
        }
  }
  void add_gates(const draw& x, test::random& r) {
    const isize features = map(x).features(x.d);
    const auto rows = [&](isize width) { return test::tensor(x.type, x.B, x.values, x.m, width, x.l); };
    const auto log_decay = [&] {
      if (x.extreme && r.coin(0.1)) return r.coin() ? -std::numeric_limits<double>::infinity() : -100.0;
      return -2.0 * r.uniform() * r.uniform();
    };
    const bool channel = x.rule == rule::gla || x.rule == rule::kda || x.rule == rule::gdn2;
    if (channel || x.rule == rule::gated_delta || (x.rule == rule::decay && !x.constant_decay))
      decay = rows(channel ? features : 1), decay.fill(log_decay);
    if (is_delta(x.rule) && x.rule != rule::gdn2) beta = rows(1), beta.fill([&] { return r.uniform(); });
    if (x.rule == rule::gdn2) {
      erase = rows(features), erase.fill([&] { return r.uniform(); });
      write = rows(x.e), write.fill([&] { return r.uniform(); });
    }
    if (!x.given_state) return;
    start.S.resize(static_cast<std::size_t>(x.B * x.values * features * x.e)),
        start.z.resize(static_cast<std::size_t>(x.B * x.values * features));
    for (double& s : start.S) s = static_cast<float>(r.normal());
    for (double& s : start.z) s = static_cast<float>(r.uniform(0.5, 2.0));
    initial.emplace("S0", array({x.B, x.values, features, x.e}, start.S));
    initial.emplace("z0", array({x.B, x.values, features}, start.z));
  }
};

struct outcome {
  std::string wrong;
  bool applied = false;  // the fault could be planted
};

/// Runs a mechanism as the draw says.
template <class M>
outcome run(const draw& x, const setting& in, const M& m, fault f) {
  outcome o;
  const isize heads = std::max(x.H, x.values);
  const shape s{x.B, x.H, x.values, x.n, x.m, x.d, x.e, x.type};
  test::tensor got = test::unwritten(x.out, x.B, heads, x.n, x.e, x.l),
               want = test::unwritten(dtype::f64, x.B, heads, x.n, x.e);
  const threads pool(x.threads);
  state held;
  if (x.chunks.empty()) {
    prefill(pool, m, in.q, in.k, in.v, got, {.gates = in.gates_of(0, x.m)});
  } else {
    held = m.make_state(s);
    if constexpr (requires { m.load_state(held, in.initial); })
      if (x.given_state) m.load_state(held, in.initial);
    for (const chunk& c : x.chunks) {
      const auto call = [&](state& with) {
        prefill(pool, m, in.q.ref().slice(c.first, c.count), in.k.ref().slice(c.first, c.count),
                in.v.ref().slice(c.first, c.count), got.ref().slice(c.first, c.count), with,
                {.gates = in.gates_of(c.first, c.count)});
      };
      if (c.before == hand_over::save) held = state::restore(held.save());
      if (c.before == hand_over::copy) held = state(held);
      if (f == fault::state_lost && c.first > 0 && !o.applied) held = m.make_state(s), o.applied = true;
      if (c.before == hand_over::roll_back) {
        state draft = held;  // a draft that is thrown away
        call(f == fault::not_rolled_back ? held : draft);
        o.applied |= f == fault::not_rolled_back;
      }
      call(held);
    }
  }
  if (f == fault::one_element && got.size() > 0 && std::abs(got.get(0, 0, x.n - 1, 0)) > 1e-3)
    got.set(0, 0, x.n - 1, 0, got.get(0, 0, x.n - 1, 0) * 1.5 + 1), o.applied = true;

  problem p;
  p.q = in.q, p.k = in.k, p.v = in.v, p.out = want, p.gates = in.gates_of(0, x.m);
  reference::linear_state last = in.start;
  if constexpr (std::is_same_v<M, linear_attention>)
    reference::prefill(m, p, &last);
  else
    reference::prefill(m, p);
  const dtype acc = x.type == dtype::f64 ? dtype::f64 : dtype::f32;
  const auto judge = [&](const test::array& a, const test::array& b, dtype stored, const char* what) {
    const test::verdict v = test::compare(a, b, {.c = 512, .acc = acc, .stored = stored});
    if (!v && o.wrong.empty()) o.wrong = std::string(what) + ": " + v.text;
  };
  if (want.size() > 0) judge(got.values(), want.values(), x.out, "out");
  if (!got.guards_intact()) o.wrong += " memory beside out was written";
  if constexpr (std::is_same_v<M, linear_attention>)
    if (!x.chunks.empty() && !last.S.empty() && x.map != map_kind::favor) {
      const arrays end = m.store_state(held);
      judge({{static_cast<isize>(last.S.size())}, end.at("S").doubles()}, {{static_cast<isize>(last.S.size())}, last.S},
            acc, "S");
    }
  return o;
}

outcome run(const draw& x, fault f = fault::none) {
  const setting in(x);
  try {
    if (x.kind == member::linear) return run(x, in, in.linear(x), f);
    if (x.kind == member::dijiang) return run(x, in, in.dijiang(x), f);
    return run(x, in, in.windowed(x), f);
  } catch (const std::exception& error) {
    return {std::string("refused: ") + error.what(), false};
  }
}

std::uint64_t number(const char* variable, std::uint64_t otherwise) {
  const char* text = std::getenv(variable);
  return text == nullptr || *text == '\0' ? otherwise : std::strtoull(text, nullptr, 0);
}

void run_part(std::uint64_t part, std::uint64_t parts) {
  isize failed = 0;
  for (std::uint64_t seed = part; seed < number("FOVEA_LINEAR_DRAWS", 2000) && failed < 10; seed += parts) {
    const draw x = make_draw(seed);
    const outcome o = run(x);
    if (o.wrong.empty()) continue;
    UNSCOPED_INFO(x.text() << "\n    " << o.wrong);
    ++failed;
  }
  CHECK(failed == 0);
}

}  // namespace

TEST_CASE("linear draws: FOVEA_LINEAR_DRAW again") {
  if (std::getenv("FOVEA_LINEAR_DRAW") == nullptr) return;
  const draw x = make_draw(number("FOVEA_LINEAR_DRAW", 0));
  std::cout << x.text() << "\n";
  CHECK(run(x).wrong == "");
}

TEST_CASE("linear draws: one half") { run_part(0, 2); }
TEST_CASE("linear draws: the other half") { run_part(1, 2); }

TEST_CASE("linear draws: each member, rule, map and way to hand a state over is drawn, with each type") {
  std::map<std::string, isize> met;
  for (std::uint64_t seed = 0; seed < 2000; ++seed) {
    const draw x = make_draw(seed);
    const std::string type = fovea::name_of(x.type);
    ++met["member " + std::to_string(static_cast<int>(x.kind)) + " " + type];
    if (x.kind == member::linear)
      ++met[std::string(name_of(x.rule)) + " " + type],
          ++met[std::string(map_names[static_cast<int>(x.map)]) + " " + type];
    for (const chunk& c : x.chunks) ++met[std::string(hand_over_names[static_cast<int>(c.before)]) + " " + type];
  }
  CHECK(met.size() == 4 * (3 + 7 + 8 + 4));
  for (const auto& [what, count] : met) {
    CAPTURE(what);
    CHECK(count >= 10);
  }
}

TEST_CASE("linear draws: a library that is wrong on purpose is found out") {
  for (const fault f : {fault::state_lost, fault::not_rolled_back, fault::one_element}) {
    isize applied = 0, found = 0;
    std::string missed;
    for (std::uint64_t seed = 5000; applied < 20 && seed < 9000; ++seed) {
      const draw x = make_draw(seed);
      // A state that fades or is small beside the window hides such a fault from any judge.
      if (fovea::size_of(x.type) == 2 || x.kind != member::linear || x.extreme || x.normalise || x.constant_decay ||
          !x.gate || (x.rule != rule::none && x.rule != rule::delta) || x.n < 20)
        continue;
      const outcome o = run(x, f);
      if (!o.applied) continue;
      ++applied;
      o.wrong.empty() ? void(missed = x.text()) : void(++found);
    }
    CAPTURE(static_cast<int>(f), missed);
    CHECK(applied >= 10);
    CHECK(found == applied);
  }
}
