// SPDX-License-Identifier: MIT
/// @file  Attention mass of keys: against its definition, over views and KV sequences, for any threads, and what it refuses.

#include <fovea/softmax/key_mass.hpp>

#include "backward/problems.hpp"
#include "support/errors.hpp"

using namespace backward_tests;

namespace {

/// [B, heads, 1, m] in double, from the probabilities themselves.
std::vector<double> definition(const softmax_attention& m, const run& x, bool of_groups) {
  const shape& s = x.s;
  const isize heads = of_groups ? s.G : s.H;
  std::vector<double> mass(static_cast<std::size_t>(s.B * heads * s.m), 0.0);
  for (isize b = 0; b < s.B; ++b)
    for (isize h = 0; h < s.H; ++h)
      for (isize i = 0; i < s.n; ++i) {
        mask_site at = m.site(s, b);
        at.h = h;
        std::vector<double> e(static_cast<std::size_t>(s.m), 0.0);
        double sum = m.sinks != nullptr ? std::exp(static_cast<double>(m.sinks[h])) : 0;
        for (isize j = 0; j < s.m; ++j) {
          if (!m.mask.visible(at, i, j)) continue;
          double dot = 0;
          for (isize c = 0; c < s.d; ++c) dot += x.q.get(b, h, i, c) * x.k.get(b, h / s.group(), j, c);
          sum += e[static_cast<std::size_t>(j)] = std::exp(m.score(at, i, j, m.scale_for(s) * dot));
        }
        const isize row = b * heads + (of_groups ? h / s.group() : h);
        for (isize j = 0; j < s.m && sum > 0; ++j)
          mass[static_cast<std::size_t>(row * s.m + j)] += e[static_cast<std::size_t>(j)] / sum;
      }
  return mass;
}

tensor room(const shape& s, isize heads, isize width) { return test::unwritten(wide(s.type), s.B, heads, 1, width); }

}  // namespace

TEST_CASE("key mass: random problems agree with the definition, by query heads and by groups, for any threads") {
  const threads two(2), five(5);
  for (std::uint64_t seed = 1; seed <= 60; ++seed) {
    test::random r(seed);
    const isize G = r.integer(1, 3);
    const shape s{r.integer(1, 2),    G * r.integer(1, 4), G, r.coin(0.3) ? 1 : r.integer(1, 150),
                  r.integer(1, 1100), r.integer(1, 80),    3, static_cast<dtype>(r.integer(0, 3))};
    setting x;
    x.m.mask = make_mask(static_cast<int>(r.integer(0, mask_kinds - 1)), r, s, x);
    make_score(static_cast<int>(r.integer(0, score_kinds - 1)), r, s, x);
    run y(r, s);
    y.forward(x.m);
    CAPTURE(seed, s.B, s.H, s.G, s.n, s.m, s.d, fovea::name_of(s.type));
    for (const bool of_groups : {false, true}) {
      const isize heads = of_groups ? s.G : s.H;
      tensor one = room(s, heads, s.m), many = room(s, heads, s.m);
      key_mass(serial, x.m, y.q, y.k, y.lse, one);
      const std::vector<double> want = definition(x.m, y, of_groups);
      CHECK_CLOSE(one.values(), {{s.B, heads, 1, s.m}, want},
                  {.c = 256, .acc = wide(s.type), .scale = std::max(largest(want), 1.0)});
      key_mass(seed % 2 == 0 ? exec_ref(two) : exec_ref(five), x.m, y.q, y.k, y.lse, many);
      CHECK_SAME_BITS(one, many);
    }
  }
}

TEST_CASE("key mass: a key that a row may not see does not disturb it") {
  test::random r(5);
  const shape s{1, 2, 1, 90, 200, 20, 4, dtype::f32};
  const softmax_attention m{.mask = window{.width = 40}};
  run y(r, s);
  tensor clean = room(s, 2, s.m), poisoned = room(s, 2, s.m);
  y.forward(m);
  key_mass(serial, m, y.q, y.k, y.lse, clean);
  for (isize c = 0; c < s.d; ++c) y.k.set(0, 0, 199, c, std::nan("")), y.q.set(0, 1, 30, c, HUGE_VAL);
  y.forward(m);
  key_mass(serial, m, y.q, y.k, y.lse, poisoned);
  isize wrong = 0;
  for (isize h = 0; h < 2; ++h)
    for (isize j = 0; j < s.m; ++j) {
      const bool touched = j > 159 || (h == 1 && j > 100 && j <= 140);  // seen by row 89, or by row 30
      wrong += !touched && clean.get(0, h, 0, j) != poisoned.get(0, h, 0, j);
    }
  CHECK(wrong == 0);
}

TEST_CASE("key mass: sequences of different lengths, each as if it were alone") {
  test::random r(6);
  const isize H = 4, G = 2, d = 24, e = 8;
  const std::vector<isize> n{1, 7, 0, 40}, keys{300, 7, 12, 900};
  const softmax_attention m{.mask = causal{}};
  std::vector<run> alone;
  std::vector<kv_sequence> kv;
  std::vector<std::int32_t> cu{0};
  for (std::size_t s = 0; s < n.size(); ++s) {
    alone.emplace_back(r, shape{1, H, G, n[s], keys[s], d, e, dtype::f32}, dtype::f32, false);
    cu.push_back(cu.back() + static_cast<std::int32_t>(n[s]));
  }
  tensor q(dtype::f32, 1, H, cu.back(), d), lse(dtype::f32, 1, H, cu.back(), 1);
  for (std::size_t s = 0; s < n.size(); ++s) {
    run& y = alone[s];
    y.forward(m);
    kv.push_back(sequence_of(y.k, y.v));
    for (isize h = 0; h < H; ++h)
      for (isize i = 0; i < n[s]; ++i) {
        for (isize c = 0; c < d; ++c) q.set(0, h, cu[s] + i, c, y.q.get(0, h, i, c));
        lse.set(0, h, cu[s] + i, 0, y.lse.get(0, h, i, 0));
      }
  }
  tensor all = test::unwritten(dtype::f32, 4, H, 1, 900);
  const threads three(3);
  key_mass(three, m, q, kv, lse, all, {.cu_q = cu});
  for (std::size_t s = 0; s < n.size(); ++s) {
    tensor one = test::unwritten(dtype::f32, 1, H, 1, keys[s]);
    key_mass(serial, m, alone[s].q, alone[s].k, alone[s].lse, one);
    isize wrong = 0;
    for (isize h = 0; h < H; ++h)
      for (isize j = 0; j < 900; ++j)
        wrong += all.get(static_cast<isize>(s), h, 0, j) != (j < keys[s] ? one.get(0, h, 0, j) : 0.0);
    CHECK(wrong == 0);
  }
}

TEST_CASE("key mass: what it refuses") {
  test::random r(7);
  run y(r, {1, 4, 2, 3, 5, 8, 6, dtype::f32}, dtype::f32, false);
  y.forward({});
  tensor mass = test::unwritten(dtype::f32, 1, 4, 1, 5), narrow = test::unwritten(dtype::f32, 1, 4, 1, 4),
         heads = test::unwritten(dtype::f32, 1, 3, 1, 5), bf16_mass = test::unwritten(dtype::bf16, 1, 4, 1, 5);
  const auto refused = [&](const tensor& k, const tensor& lse, tensor& to) {
    return test::refusal([&] { key_mass(serial, softmax_attention{}, y.q, k, lse, to); });
  };
  CHECK(refused(y.k, y.lse, mass) == "accepted");
  CHECK_SAYS(refused(y.k, y.lse, narrow), "mass is [1, 4, 1, 4] f32; wanted [1, 4 or 2, 1, 5] f32");
  CHECK_SAYS(refused(y.k, y.lse, heads), "mass is [1, 3, 1, 5] f32");
  CHECK_SAYS(refused(y.k, y.lse, bf16_mass), "mass is [1, 4, 1, 5] bf16");
  CHECK_SAYS(refused(y.k, y.out, mass), "lse is [1, 4, 3, 6] f32; wanted [1, 4, 3, 1] f32");
  CHECK_SAYS(refused(y.v, y.lse, mass), "k is [1, 2, 5, 6] f32");
}
