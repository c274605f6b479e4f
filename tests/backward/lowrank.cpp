// SPDX-License-Identifier: MIT
/// @file  The backward passes of linformer_attention and nystrom_attention: twin or double path against central differences of the forward
///        twin, every storage type, threads, lengths, refusals.

#include <fovea/linformer.hpp>
#include <fovea/linformer/reference_backward.hpp>
#include <fovea/nystrom.hpp>
#include <fovea/nystrom/reference.hpp>

#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/errors.hpp"
#include "support/golden.hpp"
#include "support/random.hpp"
#include "support/tensors.hpp"

namespace {

using namespace fovea;
using test::tensor;

struct inputs {
  shape s;
  tensor q, k, v, dout;
  inputs(const shape& sizes, std::uint64_t seed) : s(sizes) {
    test::random r(seed);
    const auto some = [&](isize heads, isize length, isize width) {
      tensor t = test::unwritten(s.type, s.B, heads, length, width);
      for (isize b = 0; b < s.B; ++b)
        for (isize h = 0; h < heads; ++h)
          for (isize i = 0; i < length; ++i)
            for (isize c = 0; c < width; ++c) t.set(b, h, i, c, r.normal());
      return t;
    };
    q = some(s.H, s.n, s.d), k = some(s.G, s.m, s.d), v = some(s.G, s.m, s.e), dout = some(s.H, s.n, s.e);
  }
};

template <class M>
double loss(const M& m, const inputs& x) {
  tensor out = test::unwritten(dtype::f64, x.s.B, x.s.H, x.s.n, x.s.e);
  reference::prefill(m, problem{x.q, x.k, x.v, out, {}, {}});
  const test::array o = out.values(), g = x.dout.values();
  double sum = 0;
  for (std::size_t i = 0; i < o.data.size(); ++i) sum += o.data[i] * g.data[i];
  return sum;
}
template <class M>
test::array differences(const M& m, inputs& x, tensor& t) {
  test::array out = t.values();
  std::size_t at = 0;
  for (isize b = 0; b < t.batch(); ++b)
    for (isize h = 0; h < t.heads(); ++h)
      for (isize i = 0; i < t.length(); ++i)
        for (isize c = 0; c < t.width(); ++c, ++at) {
          const double y = t.get(b, h, i, c), step = 1e-3;
          const auto shifted = [&](double by) {
            t.set(b, h, i, c, y + by);
            return loss(m, x);
          };
          const double near = (shifted(step) - shifted(-step)) / (2 * step),
                       far = (shifted(2 * step) - shifted(-2 * step)) / (4 * step);
          t.set(b, h, i, c, y);
          out.data[at] = (4 * near - far) / 3;
        }
  return out;
}

/// By numbers that are given as float, rounded so that every shifted one is exact.
template <class M>
std::vector<double> differences(const M& m, const inputs& x, std::vector<float>& numbers) {
  std::vector<double> out;
  for (float& y : numbers) {
    const float old = y;
    const auto shifted = [&](float by) {
      y = old + by;
      return loss(m, x);
    };
    const double near = (shifted(0x1p-10F) - shifted(-0x1p-10F)) / 0x1p-9,
                 far = (shifted(0x1p-9F) - shifted(-0x1p-9F)) / 0x1p-8;
    y = old;
    out.push_back((4 * near - far) / 3);
  }
  return out;
}
test::array shaped(const tensor& like, const std::vector<double>& x) { return {like.values().dims, x}; }
test::array listed(const std::vector<double>& x) { return {{static_cast<isize>(x.size())}, x}; }
test::array listed(const std::vector<float>& x) { return listed(std::vector<double>(x.begin(), x.end())); }

struct results {
  tensor dq, dk, dv;
};
results run(const nystrom_attention& m, const inputs& x, exec_ref exec) {
  const shape& s = x.s;
  tensor out = test::unwritten(s.type, s.B, s.H, s.n, s.e);
  prefill(serial, m, x.q, x.k, x.v, out);
  results r{test::unwritten(s.type, s.B, s.H, s.n, s.d), test::unwritten(s.type, s.B, s.G, s.m, s.d),
            test::unwritten(s.type, s.B, s.G, s.m, s.e)};
  fovea::backward(exec, m, x.q, x.k, x.v, out, {}, x.dout, {.dq = r.dq, .dk = r.dk, .dv = r.dv});
  return r;
}

constexpr std::int32_t some_keys[] = {5, 0, 7}, some_queries[] = {6, 4, 2};
const std::vector<float> skip_taps = {0.5F, -0.25F, 0.75F, 0.125F, 0.25F, -1.0F};

/// Item b without its padding, by itself.
inputs item(const inputs& x, isize b, isize queries, isize keys) {
  inputs one({1, x.s.H, x.s.G, queries, keys, x.s.d, x.s.e, x.s.type}, 1);
  for (auto [to, from] : {std::pair{&one.q, &x.q}, {&one.k, &x.k}, {&one.v, &x.v}, {&one.dout, &x.dout}})
    for (isize h = 0; h < to->heads(); ++h)
      for (isize i = 0; i < to->length(); ++i)
        for (isize c = 0; c < to->width(); ++c) to->set(0, h, i, c, from->get(b, h, i, c));
  return one;
}
/// The first rows of item b are those of `alone`, the others zero.
void is_padded(const tensor& x, isize b, const tensor& alone) {
  for (isize h = 0; h < x.heads(); ++h)
    for (isize i = 0; i < x.length(); ++i)
      for (isize c = 0; c < x.width(); ++c)
        REQUIRE(x.get(b, h, i, c) == (i < alone.length() ? alone.get(0, h, i, c) : 0.0));
}

/// A form of linformer with its numbers: forms(2, 9, 4) reach 9 positions with 4 slots for 2 heads.
struct form {
  std::string name;
  linformer_attention m;
  std::vector<float> E, F;  // or wk, wv
  std::vector<std::int32_t> lengths;

  form(std::string of, sequence_projection kind, isize slots, isize block = 0) : name(std::move(of)) {
    m.projection = kind, m.slots = slots, m.block = block, m.causal = block > 0;
  }
  form(const form&) = delete;
  form(form&& x) = default;
  static std::vector<float> numbers(isize count, std::uint64_t seed) {
    test::random r(seed);
    std::vector<float> w(static_cast<std::size_t>(count));
    for (float& x : w) x = static_cast<float>(std::round(r.normal() * 32) / 64);
    return w;
  }
  form&& linear(isize heads, isize positions, bool apart) && {
    E = numbers(heads * positions * m.slots, 3), F = numbers(apart ? heads * positions * m.slots : 0, 4);
    m.E = bhnd<const float>(E.data(), 1, heads, positions, m.slots);
    if (apart) m.F = bhnd<const float>(F.data(), 1, heads, positions, m.slots);
    return std::move(*this);
  }
  form&& conv(isize taps, bool apart) && {
    E = numbers(taps, 5), F = numbers(apart ? taps : 0, 6);
    m.wk = E, m.wv = F;
    return std::move(*this);
  }
  form&& padded(std::vector<std::int32_t> to) && {
    lengths = std::move(to), m.lengths = lengths;
    return std::move(*this);
  }
};
/// Every form, for B = 2 items of m keys and G = 2 KV heads.
std::vector<form> forms(isize m, isize slots, isize block) {
  using kind = sequence_projection;
  const auto some = static_cast<std::int32_t>(m - m / 3);
  const isize taps = ceil_div(m, slots);
  std::vector<form> all;
  all.push_back(form("E and F of each head", kind::linear, slots).linear(2, m + 2, true));
  all.push_back(form("one E", kind::linear, slots).linear(1, m, false));
  all.push_back(form("E, lengths", kind::linear, slots).linear(2, m, false).padded({some, 0}));
  all.push_back(form("mean", kind::mean, slots));
  all.push_back(form("mean, more slots than keys, lengths", kind::mean, m + 3).padded({some, 1}));
  all.push_back(form("max", kind::max, slots));
  all.push_back(form("max, lengths", kind::max, slots).padded({0, some}));
  all.push_back(form("taps", kind::conv, slots).conv(taps, false));
  all.push_back(form("taps of both, lengths", kind::conv, slots).conv(taps, true).padded({some, 2}));
  all.push_back(form("blocks, E and F", kind::linear, slots, block).linear(2, block + 1, true));
  all.push_back(form("blocks, one E", kind::linear, slots, block).linear(1, block, false));
  all.push_back(form("blocks, mean", kind::mean, 2, block));
  all.push_back(form("blocks, max", kind::max, 2, block));
  all.push_back(form("blocks, taps", kind::conv, 2, block).conv(ceil_div(block, isize{2}), true));
  return all;
}
struct linformer_results {
  tensor dq, dk, dv;
  std::vector<float> dE, dF;
};
linformer_results run(const form& f, const inputs& x, exec_ref exec) {
  const shape& s = x.s;
  const dtype wide = s.type == dtype::f64 ? s.type : dtype::f32;
  tensor out = test::unwritten(wide, s.B, s.H, s.n, s.e), lse = test::unwritten(wide, s.B, s.H, s.n, 1);
  prefill(exec, f.m, x.q, x.k, x.v, out, {.lse = lse, .gates = {}});
  linformer_results r{test::unwritten(s.type, s.B, s.H, s.n, s.d), test::unwritten(s.type, s.B, s.G, s.m, s.d),
                      test::unwritten(s.type, s.B, s.G, s.m, s.e), std::vector<float>(f.E.size(), NAN),
                      std::vector<float>(f.F.size(), NAN)};
  fovea::backward(exec, f.m, x.q, x.k, x.v, out, lse, x.dout,
                  {.dq = r.dq,
                   .dk = r.dk,
                   .dv = r.dv,
                   .dE = r.dE.empty() ? nullptr : r.dE.data(),
                   .dF = r.dF.empty() ? nullptr : r.dF.data()});
  return r;
}

}  // namespace

TEST_CASE("backward of nystrom: central differences of the forward twin") {
  const view<const float> one = bhnd<const float>(skip_taps.data(), 1, 1, 1, 3),
                          each = bhnd<const float>(skip_taps.data(), 1, 2, 1, 3);
  const std::vector<std::pair<nystrom_attention, shape>> cases = {
      {{.landmarks = 3}, {2, 2, 1, 8, 11, 3, 4, dtype::f64}},
      {{.landmarks = 4, .iterations = 2, .scale = 0.8}, {1, 2, 2, 9, 5, 4, 3, dtype::f64}},
      {{.landmarks = 3, .skip = each}, {1, 2, 1, 7, 7, 3, 2, dtype::f64}},
      {{.landmarks = 16, .skip = one}, {1, 2, 1, 6, 6, 3, 2, dtype::f64}},  // exact attention
      {{.landmarks = 1}, {1, 1, 1, 4, 3, 2, 2, dtype::f64}},
      {{.landmarks = 3, .lengths = some_keys, .query_lengths = some_queries}, {3, 2, 1, 6, 7, 3, 2, dtype::f64}},
      {{.landmarks = 2, .skip = each, .lengths = some_keys}, {3, 2, 1, 7, 7, 2, 2, dtype::f64}}};
  std::uint64_t seed = 1;
  for (const auto& [m, s] : cases) {
    inputs x(s, seed++);
    CAPTURE(m.landmarks, s.n, s.m);
    const results got = run(m, x, serial);
    const test::tolerance close{.c = 1e8, .acc = dtype::f64, .scale = 1};  // differences: 1e-8
    CHECK_CLOSE(got.dq.values(), differences(m, x, x.q), close);
    CHECK_CLOSE(got.dk.values(), differences(m, x, x.k), close);
    CHECK_CLOSE(got.dv.values(), differences(m, x, x.v), close);
  }
}

TEST_CASE("backward of nystrom: float and bf16 against double, any number of threads, what is refused") {
  const nystrom_attention m{.landmarks = 12, .skip = bhnd<const float>(skip_taps.data(), 1, 1, 1, 5)};
  for (const dtype type : {dtype::f32, dtype::bf16}) {
    const inputs x({2, 4, 2, 90, 90, 20, 24, type}, 9);
    inputs wide({2, 4, 2, 90, 90, 20, 24, dtype::f64}, 9);
    for (auto [to, from] : {std::pair{&wide.q, &x.q}, {&wide.k, &x.k}, {&wide.v, &x.v}, {&wide.dout, &x.dout}})
      *to = test::copy_of(from->values(), dtype::f64);
    const results got = run(m, x, serial), other = run(m, x, threads(3)), want = run(m, wide, serial);
    CAPTURE(fovea::name_of(type));
    const test::tolerance close{.c = 4096, .acc = dtype::f32, .stored = type};  // times |Z|^2
    CHECK_CLOSE(got.dq.values(), want.dq.values(), close);
    CHECK_CLOSE(got.dk.values(), want.dk.values(), close);
    CHECK_CLOSE(got.dv.values(), want.dv.values(), close);
    CHECK_SAME_BITS(got.dq, other.dq);
    CHECK_SAME_BITS(got.dk, other.dk);
    CHECK_SAME_BITS(got.dv, other.dv);
    if (type != dtype::f32) continue;
    float room[4] = {};
    CHECK_SAYS(test::refusal([&] { fovea::backward(serial, m, x.q, x.k, x.v, x.dout, {}, x.dout, {.dE = room}); }),
               "other than dq, dk and dv");
  }
}

TEST_CASE(
    "nystrom: an item of a padded batch is bitwise what it is alone, forward and backward, whatever the padding "
    "holds") {
  for (const dtype type : {dtype::f32, dtype::bf16})
    for (const bool skips : {false, true}) {
      const isize n = 40;
      inputs x({4, 4, 2, n, n, 16, 24, type}, 12);
      const std::int32_t keys[] = {40, 23, 5, 0}, apart[] = {31, 40, 3, 12};
      const std::int32_t* queries = skips ? keys : apart;  // with a convolution n = m, alone as well
      nystrom_attention alone{.landmarks = 8};
      if (skips) alone.skip = bhnd<const float>(skip_taps.data(), 1, 1, 1, 5);
      for (isize b = 0; b < 4; ++b) {
        for (isize j = keys[b]; j < n; ++j) x.k.set(b, 0, j, 3, NAN), x.v.set(b, 1, j, 0, HUGE_VAL);
        for (isize i = queries[b]; i < n; ++i) x.q.set(b, 2, i, 1, NAN), x.dout.set(b, 0, i, 0, NAN);
      }
      nystrom_attention m = alone;
      m.lengths = keys, m.query_lengths = {queries, 4};
      const auto forward = [](const nystrom_attention& with, const inputs& y) {
        tensor out = test::unwritten(y.s.type, y.s.B, y.s.H, y.s.n, y.s.e);
        prefill(threads(2), with, y.q, y.k, y.v, out);
        return out;
      };
      const tensor out = forward(m, x);
      const results back = run(m, x, threads(3));
      for (isize b = 0; b < 4; ++b) {
        CAPTURE(fovea::name_of(type), skips, b);
        const inputs one = item(x, b, queries[b], keys[b]);
        is_padded(out, b, forward(alone, one));
        const results want = run(alone, one, serial);
        is_padded(back.dq, b, want.dq), is_padded(back.dk, b, want.dk), is_padded(back.dv, b, want.dv);
      }
      tensor twin = test::unwritten(dtype::f64, 4, 4, n, 24);
      reference::prefill(m, problem{x.q, x.k, x.v, twin, {}, {}});
      CHECK_CLOSE(out.values(), twin.values(), {.c = 1024, .acc = dtype::f32, .stored = type});
    }
}

TEST_CASE("backward of linformer: the twin of every form by central differences of the forward twin") {
  const shape shapes[] = {{2, 4, 2, 3, 9, 2, 3, dtype::f64}, {2, 2, 2, 7, 4, 3, 2, dtype::f64}};
  std::uint64_t seed = 1;
  for (const shape& s : shapes)
    for (form& f : forms(s.m, 3, 4)) {
      inputs x(s, seed++);
      CAPTURE(f.name, s.n, s.m);
      const test::tolerance close{.c = 1e8, .acc = dtype::f64, .scale = 1};  // differences: 1e-8
      const auto twin = reference::backward(f.m, x.q, x.k, x.v, x.dout);
      CHECK_CLOSE(shaped(x.q, twin.dq), differences(f.m, x, x.q), close);
      CHECK_CLOSE(shaped(x.k, twin.dk), differences(f.m, x, x.k), close);
      CHECK_CLOSE(shaped(x.v, twin.dv), differences(f.m, x, x.v), close);
      CHECK_CLOSE(listed(twin.dE), listed(differences(f.m, x, f.E)), close);
      CHECK_CLOSE(listed(twin.dF), listed(differences(f.m, x, f.F)), close);
    }
}

TEST_CASE(
    "backward of linformer: every form and storage type against the twin, any number of threads, padding unread") {
  for (const dtype type : {dtype::f64, dtype::f32, dtype::bf16})
    for (const shape& s : {shape{2, 4, 2, 70, 150, 24, 17, type}, shape{2, 2, 2, 90, 61, 16, 40, type},
                           shape{2, 2, 2, 5, 0, 8, 8, type}})
      for (const form& f : forms(std::max<isize>(s.m, 1), 20, 24)) {
        if (s.m == 0 && !f.lengths.empty()) continue;
        inputs x(s, 5);
        for (isize b = 0; b < s.B; ++b)
          for (isize j = f.m.keys_of(b, s.m); j < s.m; ++j) x.k.set(b, 0, j, 1, NAN), x.v.set(b, 1, j, 0, HUGE_VAL);
        CAPTURE(f.name, fovea::name_of(type), s.n, s.m);
        const auto twin = reference::backward(f.m, x.q, x.k, x.v, x.dout);
        const linformer_results got = run(f, x, serial), other = run(f, x, threads(3));
        const test::tolerance close{
            .c = type == dtype::f64 ? 4096.0 : 128.0, .acc = type == dtype::f64 ? type : dtype::f32, .stored = type};
        CHECK_CLOSE(got.dq.values(), shaped(x.q, twin.dq), close);
        CHECK_CLOSE(got.dk.values(), shaped(x.k, twin.dk), close);
        CHECK_CLOSE(got.dv.values(), shaped(x.v, twin.dv), close);
        CHECK_CLOSE(listed(got.dE), listed(twin.dE), {.c = 128});
        CHECK_CLOSE(listed(got.dF), listed(twin.dF), {.c = 128});
        CHECK_SAME_BITS(got.dq, other.dq);
        CHECK_SAME_BITS(got.dk, other.dk);
        CHECK_SAME_BITS(got.dv, other.dv);
        CHECK((got.dE == other.dE && got.dF == other.dF));
      }
}

TEST_CASE("backward of linformer: of equal maxima the first row has the gradient") {
  const form f("max", sequence_projection::max, 2);
  inputs x({1, 1, 1, 3, 140, 2, 2, dtype::f32}, 9);
  for (isize j = 0; j < 140; ++j)
    x.v.set(0, 0, j, 0, j % 70 == 40 || j % 70 == 65 ? 7.0 : 1.0), x.v.set(0, 0, j, 1, -2.0);
  const linformer_results got = run(f, x, serial);
  for (isize j = 0; j < 140; ++j) {
    CHECK((got.dv.get(0, 0, j, 0) != 0) == (j % 70 == 40));
    CHECK((got.dv.get(0, 0, j, 1) != 0) == (j % 70 == 0));
  }
}

TEST_CASE(
    "backward of linformer: golden gradients of a linear projection, what is asked for in parts, what is refused") {
  isize cases = 0;
  for (const golden::test_case& c : golden::family("lowrank")) {
    if (!c.has("dE")) continue;
    ++cases;
    const std::vector<float> E = c.list<float>("E"), F = c.list<float>("F");
    const auto& dims = c.at("E").dims;
    const linformer_attention m{.E = bhnd<const float>(E.data(), 1, 1, dims[0], dims[1]),
                                .F = bhnd<const float>(F.data(), 1, 1, dims[0], dims[1])};
    const auto twin = reference::backward(m, c.tensor("q", dtype::f64), c.tensor("k", dtype::f64),
                                          c.tensor("v", dtype::f64), c.tensor("do", dtype::f64));
    const test::tolerance close{.c = 1e5, .acc = dtype::f64};
    CHECK_CLOSE({c.at("dq").dims, twin.dq}, c.at("dq"), close);
    CHECK_CLOSE({c.at("dk").dims, twin.dk}, c.at("dk"), close);
    CHECK_CLOSE({c.at("dv").dims, twin.dv}, c.at("dv"), close);
    CHECK_CLOSE({dims, twin.dE}, c.at("dE"), close);
    CHECK_CLOSE({dims, twin.dF}, c.at("dF"), close);
  }
  CHECK(cases == 1);
  const inputs x({2, 2, 2, 6, 9, 4, 3, dtype::f32}, 11);
  const shape& s = x.s;
  tensor out = test::unwritten(s.type, s.B, s.H, s.n, s.e), lse = test::unwritten(s.type, s.B, s.H, s.n, 1);
  std::vector<float> room(100);
  for (const form& f : forms(9, 3, 4)) {
    CAPTURE(f.name);
    prefill(serial, f.m, x.q, x.k, x.v, out, {.lse = lse, .gates = {}});
    const linformer_results all = run(f, x, serial);
    tensor dq = test::unwritten(s.type, s.B, s.H, s.n, s.d), dv = test::unwritten(s.type, s.B, s.G, s.m, s.e);
    const auto ask = [&](const gradients& to) { fovea::backward(serial, f.m, x.q, x.k, x.v, out, lse, x.dout, to); };
    ask({.dq = dq}), ask({.dv = dv});
    CHECK_SAME_BITS(dq, all.dq);
    CHECK_SAME_BITS(dv, all.dv);
    if (!f.E.empty()) {
      ask({.dE = room.data()});
      CHECK(std::equal(all.dE.begin(), all.dE.end(), room.begin()));
    } else {
      CHECK_SAYS(test::refusal([&] { ask({.dE = room.data()}); }), "no numbers to learn");
    }
    if (f.F.empty()) CHECK_SAYS(test::refusal([&] { ask({.dF = room.data()}); }), "dF was asked for");
    CHECK_SAYS(test::refusal([&] { ask({.dsinks = room.data()}); }), "linformer has none");
  }
}
