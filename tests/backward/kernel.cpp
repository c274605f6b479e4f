// SPDX-License-Identifier: MIT
/// @file  The backward kernel against its twin: random problems, every storage type, poison behind masks, the same bits for any threads.

#include "backward/problems.hpp"

using namespace backward_tests;

namespace {

shape random_shape(test::random& r) {
  shape s;
  s.B = r.integer(1, 2), s.G = r.integer(1, 3), s.H = s.G * r.integer(1, 4);
  s.n = r.coin(0.3) ? r.integer(1, 3) : r.integer(1, 200), s.m = r.coin(0.1) ? 1 : r.integer(1, 300);
  s.d = r.integer(1, 100), s.e = r.coin(0.3) ? s.d : r.integer(1, 100);
  s.type = static_cast<dtype>(r.integer(0, 3));
  return s;
}

/// Sums of the twin's ds over the dimensions that the bias broadcasts, and the largest sum of |ds|: floats are added there.
struct bias_gradient {
  std::vector<double> sum, sizes;
  bias_gradient(const std::vector<double>& ds, const shape& s, const additive_bias& b, std::size_t size)
      : sum(size, 0.0), sizes(size, 0.0) {
    std::size_t at = 0;
    for (isize item = 0; item < s.B; ++item)
      for (isize h = 0; h < s.H; ++h)
        for (isize i = 0; i < s.n; ++i)
          for (isize j = 0; j < s.m; ++j, ++at) {
            const auto slot = static_cast<std::size_t>(item * b.batch_stride + h * b.head_stride + i * b.row_stride +
                                                       j * b.key_stride);
            sum[slot] += ds[at], sizes[slot] += std::fabs(ds[at]);
          }
  }
};

/// Runs the problem both ways and compares.
void agrees(const setting& x, const additive_bias* bias, const shape& s, std::uint64_t seed, exec_ref exec = serial) {
  test::random r(seed);
  run y(r, s);
  y.forward(x.m);
  y.backward(x.m, bias != nullptr ? x.bias.size() : 0, exec);
  const reference::softmax_gradients want = reference::backward(x.m, y.q, y.k, y.v, y.dout);
  CAPTURE(seed, s.B, s.H, s.G, s.n, s.m, s.d, s.e, fovea::name_of(s.type));
  const double c = s.type == dtype::f64 && !x.m.score.unit_slope() ? 1e6 : 256;  // the twin's slopes are quotients
  const auto close = [&](const std::vector<double>& w) {
    return test::tolerance{
        .c = c,
        .acc = wide(s.type),
        .stored = s.type,
        .scale = std::max(largest(w), 2.0)};  // where dp and delta cancel, nothing is left to be relative to
  };
  CHECK_CLOSE(y.dq.values(), shaped(y.dq, want.dq), close(want.dq));
  CHECK_CLOSE(y.dk.values(), shaped(y.dk, want.dk), close(want.dk));
  CHECK_CLOSE(y.dv.values(), shaped(y.dv, want.dv), close(want.dv));
  for (const tensor* t : {&y.dq, &y.dk, &y.dv}) CHECK(t->guards_intact());
  if (x.m.sinks != nullptr)
    CHECK_CLOSE({{s.H}, {y.dsinks.begin(), y.dsinks.end()}}, {{s.H}, want.dsinks},
                {.c = 256, .scale = std::max(largest(want.dsinks), 1.0)});
  if (bias == nullptr) return;
  const bias_gradient dbias(want.ds, s, *bias, x.bias.size());
  const std::vector<isize> dims{static_cast<isize>(dbias.sum.size())};
  CHECK_CLOSE({dims, {y.dbias.begin(), y.dbias.end()}}, {dims, dbias.sum},
              {.c = 64, .scale = std::max(largest(dbias.sizes), 2.0)});
}

}  // namespace

TEST_CASE("backward: random problems agree with the twin") {
  const threads two(2);
  for (std::uint64_t seed = 1; seed <= 160; ++seed) {
    test::random r(seed);
    const shape s = random_shape(r);
    setting x;
    x.m.mask = make_mask(static_cast<int>(r.integer(0, mask_kinds - 1)), r, s, x);
    const int score_kind = static_cast<int>(r.integer(0, score_kinds - 1));
    make_score(score_kind == 3 || score_kind == 6 ? 0 : score_kind, r, s, x);
    additive_bias bias;
    const bool biased = score_kind == 3 || score_kind == 6;
    if (biased) bias = make_bias(r, s, x);
    if (score_kind == 3) x.m.score = bias;
    if (score_kind == 6) x.m.score = chain{softcap{4.0}, bias};
    if (seed % 2 == 0)
      agrees(x, biased ? &bias : nullptr, s, seed, two);
    else
      agrees(x, biased ? &bias : nullptr, s, seed);
  }
}

TEST_CASE("backward: widths, many blocks, many pieces of keys") {
  const setting full{}, triangle{{.mask = causal{}}, {}, {}, {}, {}, {}, {}};
  const setting near{{.mask = window{.width = 200, .first = 3}}, {}, {}, {}, {}, {}, {}};
  std::uint64_t seed = 500;
  for (const isize d : {1, 2, 8, 15, 16, 17, 33, 40, 64, 72, 80, 96, 112, 128, 192, 256})
    agrees(d % 2 == 0 ? triangle : full, nullptr, {1, 2, 1, 70, 90, d, d, d % 3 == 0 ? dtype::f64 : dtype::f32},
           seed++);
  agrees(full, nullptr, {1, 1, 1, 40, 60, 576, 512, dtype::f32}, seed++);
  agrees(triangle, nullptr, {1, 2, 1, 300, 2200, 24, 32, dtype::f32}, seed++);
  agrees(triangle, nullptr, {1, 1, 1, 1100, 1100, 16, 16, dtype::f64}, seed++);
  agrees(near, nullptr, {1, 4, 2, 700, 1300, 16, 16, dtype::bf16}, seed++);
  agrees(full, nullptr, {2, 4, 2, 1, 4200, 16, 8, dtype::f16}, seed++);
}

TEST_CASE("backward: rows that see nothing, no queries, no keys") {
  test::random r(9);
  const shape s{1, 2, 1, 30, 20, 12, 10, dtype::f32};  // rows 0 .. 9 stand before the first key
  run y(r, s);
  const softmax_attention m{.mask = causal{}};
  y.forward(m);
  for (isize h = 0; h < s.H; ++h)
    for (isize c = 0; c < s.e; ++c) y.dout.set(0, h, 3, c, std::nan(""));  // nothing of it is used
  y.backward(m);
  for (isize h = 0; h < s.H; ++h)
    for (isize i = 0; i < s.n; ++i)
      for (isize c = 0; c < s.d; ++c) {
        const double g = y.dq.get(0, h, i, c);
        CHECK((i < 10 ? g == 0 : std::isfinite(g)));
      }
  for (double g : y.dk.values().data) CHECK(std::isfinite(g));
  for (double g : y.dv.values().data) CHECK(std::isfinite(g));
  for (const auto& [n, keys] : {std::pair<isize, isize>{0, 7}, {7, 0}, {0, 0}}) {
    run none(r, {2, 2, 1, n, keys, 6, 5, dtype::f32});
    none.forward({});
    none.backward({});
    for (const tensor* t : {&none.dq, &none.dk, &none.dv})
      for (double g : t->values().data) CHECK(g == 0);
  }
}

TEST_CASE("backward: a NaN or infinity stays with the rows and keys that see each other") {
  for (std::uint64_t seed = 200; seed < 260; ++seed) {
    test::random r(seed);
    shape s = random_shape(r);
    s.B = 1;
    setting x;
    x.m.mask = make_mask(static_cast<int>(seed % mask_kinds), r, s, x);
    if (seed % 3 == 0) x.m.score = softcap{5.0};
    test::random same(seed), again(seed);
    run clean(same, s), poisoned(again, s);
    const auto sees = [&](isize h, isize i, isize j) {
      mask_site at = x.m.site(s, 0);
      at.h = h;
      return x.m.mask.visible(at, i, j);
    };
    std::vector<char> bad_key(static_cast<std::size_t>(s.G * s.m)), bad_row(static_cast<std::size_t>(s.H * s.n));
    const auto at = [](std::vector<char>& v, isize i) -> char& { return v[static_cast<std::size_t>(i)]; };
    const auto poison = [&](tensor& t, isize h, isize i) {
      for (isize c = 0; c < t.width(); ++c) t.set(0, h, i, c, r.coin() ? HUGE_VAL : std::nan(""));
    };
    for (isize g = 0; g < s.G; ++g)
      for (isize j = 0; j < s.m; ++j)
        if (r.coin(0.02)) at(bad_key, g * s.m + j) = 1, poison(poisoned.k, g, j), poison(poisoned.v, g, j);
    for (isize h = 0; h < s.H; ++h)
      for (isize i = 0; i < s.n; ++i)
        if (r.coin(0.02)) at(bad_row, h * s.n + i) = 1, poison(poisoned.q, h, i), poison(poisoned.dout, h, i);
    for (run* y : {&clean, &poisoned}) y->forward(x.m), y->backward(x.m);
    // A row is reached by its own poison and by keys that it sees; a key by its own and by rows that see it.
    std::vector<char> reached(bad_row);
    for (isize h = 0; h < s.H; ++h)
      for (isize i = 0; i < s.n; ++i)
        for (isize j = 0; j < s.m; ++j)
          if (at(bad_key, h / s.group() * s.m + j) != 0 && sees(h, i, j)) at(reached, h * s.n + i) = 1;
    isize wrong = 0;
    const auto compare = [&](const tensor& a, const tensor& b, isize h, isize i) {
      for (isize c = 0; c < a.width(); ++c) wrong += a.get(0, h, i, c) != b.get(0, h, i, c);
    };
    for (isize h = 0; h < s.H; ++h)
      for (isize i = 0; i < s.n; ++i)
        if (at(reached, h * s.n + i) == 0) compare(clean.dq, poisoned.dq, h, i);
    for (isize g = 0; g < s.G; ++g)
      for (isize j = 0; j < s.m; ++j) {
        bool touched = at(bad_key, g * s.m + j) != 0;
        for (isize h = g * s.group(); h < (g + 1) * s.group(); ++h)
          for (isize i = 0; i < s.n; ++i) touched = touched || (at(reached, h * s.n + i) != 0 && sees(h, i, j));
        if (!touched) compare(clean.dk, poisoned.dk, g, j), compare(clean.dv, poisoned.dv, g, j);
      }
    CAPTURE(seed, s.H, s.G, s.n, s.m, s.d, s.e, fovea::name_of(s.type));
    CHECK(wrong == 0);
  }
}

TEST_CASE("backward: the same bits for any number of threads, any batch, and any selection of gradients") {
  const threads two(2), three(3), seven(7);
  std::vector<float> sinks{0.5F, -1.0F, 2.0F, 0.0F};
  std::uint64_t seed = 900;
  for (const shape& s : {shape{1, 1, 1, 300, 2100, 20, 20, dtype::f32}, shape{1, 4, 2, 130, 4500, 16, 24, dtype::f32},
                         shape{2, 2, 1, 200, 1100, 16, 16, dtype::f64}, shape{3, 4, 4, 90, 80, 33, 17, dtype::bf16}}) {
    test::random r(seed++);
    setting x;
    x.m.mask = causal{};
    x.m.score = make_bias(r, s, x);
    x.m.sinks = sinks.data();
    run one(r, s);
    one.forward(x.m);
    one.backward(x.m, x.bias.size());
    run many = one;
    for (const threads* pool : {&two, &three, &seven}) {
      for (tensor* t : {&many.dq, &many.dk, &many.dv}) t->fill_nan();
      many.backward(x.m, x.bias.size(), *pool);
      CHECK_SAME_BITS(one.dq, many.dq);
      CHECK_SAME_BITS(one.dk, many.dk);
      CHECK_SAME_BITS(one.dv, many.dv);
      CHECK(one.dbias == many.dbias);
      CHECK(one.dsinks == many.dsinks);
    }
    for (const int which : {0, 1, 2}) {
      run some = one;
      for (tensor* t : {&some.dq, &some.dk, &some.dv}) t->fill_nan();
      gradients to;
      if (which == 0) to.dq = some.dq;
      if (which == 1) to.dk = some.dk;
      if (which == 2) to.dv = some.dv;
      fovea::backward(three, x.m, some.q, some.k, some.v, some.out, some.lse, some.dout, to);
      CHECK_SAME_BITS((which == 0   ? one.dq
                       : which == 1 ? one.dk
                                    : one.dv),
                      (which == 0   ? some.dq
                       : which == 1 ? some.dk
                                    : some.dv));
    }
  }
  {  // a table whose rows share elements
    test::random r(seed);
    const shape s{1, 2, 2, 300, 200, 8, 8, dtype::f32};
    std::vector<float> line;
    fill(r, line, s.n + s.m - 1, 1.0);
    const softmax_attention m{.score = additive_bias{line.data() + s.m - 1, 0, 0, 1, -1}};
    run y(r, s);
    y.forward(m);
    std::vector<float> one(line.size(), std::nanf("")), many(line.size(), std::nanf(""));
    gradients to;
    to.dbias = one.data() + s.m - 1;
    fovea::backward(serial, m, y.q, y.k, y.v, y.out, y.lse, y.dout, to);
    to.dbias = many.data() + s.m - 1;
    fovea::backward(three, m, y.q, y.k, y.v, y.out, y.lse, y.dout, to);
    CHECK(one == many);
    const std::vector<double> ds = reference::backward(m, y.q, y.k, y.v, y.dout).ds;
    std::vector<double> want(line.size(), 0.0);
    std::size_t at = 0;
    for (isize h = 0; h < s.H; ++h)
      for (isize i = 0; i < s.n; ++i)
        for (isize j = 0; j < s.m; ++j) want[static_cast<std::size_t>(s.m - 1 + i - j)] += ds[at++];
    const std::vector<isize> dims{static_cast<isize>(line.size())};
    CHECK_CLOSE({dims, {one.begin(), one.end()}}, {dims, want}, {.c = 256, .scale = 1});
  }
  // An item alone and in a batch of four.
  test::random r(seed);
  const shape s{4, 2, 2, 150, 2100, 24, 24, dtype::f32};
  const softmax_attention m{.mask = causal{}};
  run batch(r, s, dtype::f32, false);
  batch.forward(m);
  batch.backward(m, 0, two);
  for (isize b = 0; b < s.B; ++b) {
    shape part = s;
    part.B = 1;
    run alone(r, part, dtype::f32, false);
    const auto item = [&](const tensor& t) { return t.ref().part(b, 0, t.heads()); };
    fovea::backward(seven, m, item(batch.q), item(batch.k), item(batch.v), item(batch.out), item(batch.lse),
                    item(batch.dout), {.dq = alone.dq, .dk = alone.dk, .dv = alone.dv});
    isize differ = 0;
    const auto compare = [&](const tensor& a, const tensor& all) {
      for (isize h = 0; h < a.heads(); ++h)
        for (isize i = 0; i < a.length(); ++i)
          for (isize c = 0; c < a.width(); ++c) differ += a.get(0, h, i, c) != all.get(b, h, i, c);
    };
    compare(alone.dq, batch.dq), compare(alone.dk, batch.dk), compare(alone.dv, batch.dv);
    CHECK(differ == 0);
  }
}

TEST_CASE("backward: a 16-bit out serves as well, within its own rounding") {
  for (const dtype type : {dtype::bf16, dtype::f16}) {
    test::random r(31);
    run y(r, {1, 4, 2, 60, 90, 40, 32, type}, type);
    const softmax_attention m{.mask = causal{}};
    y.forward(m);
    y.backward(m);
    const reference::softmax_gradients want = reference::backward(m, y.q, y.k, y.v, y.dout);
    const double c = 4 * test::eps(type) / test::eps(dtype::f32);  // delta = do . o takes o as it was stored
    CHECK_CLOSE(y.dq.values(), shaped(y.dq, want.dq), {.c = c, .stored = type});
    CHECK_CLOSE(y.dk.values(), shaped(y.dk, want.dk), {.c = c, .stored = type});
    CHECK_CLOSE(y.dv.values(), shaped(y.dv, want.dv), {.c = 256, .stored = type});
  }
}

TEST_CASE("backward: scratch is linear in n and m") {
  const softmax_attention m{.mask = causal{}};
  const auto bytes = [&](isize n, isize keys) {
    return static_cast<double>(m.workspace_size_backward({1, 8, 2, n, keys, 64, 64, dtype::f32}, 2));
  };
  CHECK(bytes(65536, 65536) <= 2.1 * bytes(32768, 32768));
  CHECK(bytes(131072, 8192) <= 2.1 * bytes(65536, 8192));
}
