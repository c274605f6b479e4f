// SPDX-License-Identifier: MIT
/// @file  linformer_attention: sharing modes, padding, pooling, cross-attention, the block-causal form, absorb and attend, contracts.

#include <fovea/linformer.hpp>
#include <fovea/linformer/configure.hpp>
#include <fovea/linformer/reference.hpp>
#include <fovea/softmax.hpp>

#include "support/catch.hpp"
#include "support/errors.hpp"
#include "support/tensors.hpp"

namespace {

using namespace fovea;
using test::refusal;
using test::tensor;

std::vector<float> weights(isize count, std::uint64_t seed) {
  test::random r(seed);
  std::vector<float> w(static_cast<std::size_t>(count));
  for (auto& x : w) x = static_cast<float>(r.normal() / 8);
  return w;
}
struct sample {
  tensor q, k, v;
  sample(isize B, isize H, isize G, isize n, isize m, isize d, isize e, dtype type = dtype::f32,
         std::uint64_t seed = 1) {
    test::random r(seed);
    q = test::normal(r, type, B, H, n, d), k = test::normal(r, type, B, G, m, d), v = test::normal(r, type, B, G, m, e);
  }
};
template <class M>
tensor run(const M& m, const sample& x, exec_ref exec = serial) {
  tensor out = test::unwritten(x.q.type(), x.q.batch(), x.q.heads(), x.q.length(), x.v.width());
  prefill(exec, m, x.q, x.k, x.v, out);
  return out;
}
tensor twin(const linformer_attention& m, const sample& x) {
  tensor out = test::unwritten(dtype::f64, x.q.batch(), x.q.heads(), x.q.length(), x.v.width());
  problem p;
  p.q = x.q, p.k = x.k, p.v = x.v, p.out = out;
  fovea::reference::prefill(m, p);
  return out;
}

}  // namespace

TEST_CASE("linformer: sharing is a matter of the view") {
  const isize G = 2, longest = 40, slots = 6;
  const auto e = weights(longest * slots, 1);
  std::vector<float> copies = e;  // the same matrix for each head, and again for the values
  copies.insert(copies.end(), e.begin(), e.end());
  const sample x(2, 4, G, 9, 33, 16, 12);
  const auto shared = bhnd<const float>(e.data(), 1, 1, longest, slots),
             own = bhnd<const float>(copies.data(), 1, G, longest, slots);
  const tensor layerwise = run(linformer_attention{.E = shared}, x);
  CHECK_SAME_BITS(layerwise, run(linformer_attention{.E = shared, .F = shared}, x));
  CHECK_SAME_BITS(layerwise, run(linformer_attention{.E = own}, x));
  CHECK_SAME_BITS(layerwise, run(linformer_attention{.E = own, .F = shared}, x));
}

TEST_CASE("linformer: the identity as projection is exact attention, and a wider E than m uses its first rows") {
  std::vector<float> identity(50 * 50, 0.0F);
  for (std::size_t i = 0; i < 50; ++i) identity[i * 50 + i] = 1.0F;
  const sample x(1, 2, 1, 7, 50, 24, 17);
  CHECK_CLOSE(run(linformer_attention{.E = bhnd<const float>(identity.data(), 1, 1, 50, 50)}, x).values(),
              run(softmax_attention{}, x).values(), {.c = 64});
  const auto e = weights(64 * 5, 2);
  const linformer_attention wide{.E = bhnd<const float>(e.data(), 1, 1, 64, 5)},
      narrow{.E = bhnd<const float>(e.data(), 1, 1, 50, 5)};
  CHECK_SAME_BITS(run(wide, x), run(narrow, x));
}

TEST_CASE("linformer: a padded item gives what it gives alone, whatever the padding holds") {
  const auto e = weights(40 * 5, 3), taps = weights(9, 4);
  const linformer_attention forms[] = {{.E = bhnd<const float>(e.data(), 1, 1, 40, 5)},
                                       {.projection = sequence_projection::mean, .slots = 6},
                                       {.projection = sequence_projection::max, .slots = 6},
                                       {.projection = sequence_projection::conv, .wk = taps, .slots = 5}};
  for (const linformer_attention& form : forms) {
    CAPTURE(static_cast<int>(form.projection));
    sample x(3, 2, 1, 5, 40, 16, 12);
    const std::vector<std::int32_t> lengths{40, 17, 0};
    for (isize j = 17; j < 40; ++j)
      for (isize c = 0; c < 16; ++c) x.k.set(1, 0, j, c, std::nan(""));
    for (isize j = 17; j < 40; ++j)
      for (isize c = 0; c < 12; ++c) x.v.set(1, 0, j, c, HUGE_VAL), x.v.set(2, 0, j, c, std::nan(""));
    linformer_attention padded = form;
    padded.lengths = lengths;
    const tensor out = run(padded, x);
    const tensor_ref part_q = x.q.ref().part(1, 0, 2), part_k = x.k.ref().part(1, 0, 1).slice(0, 17),
                     part_v = x.v.ref().part(1, 0, 1).slice(0, 17);
    tensor alone = test::unwritten(dtype::f32, 1, 2, 5, 12);
    prefill(serial, form, part_q, part_k, part_v, alone);
    for (isize h = 0; h < 2; ++h)
      for (isize i = 0; i < 5; ++i)
        for (isize c = 0; c < 12; ++c) {
          REQUIRE(out.get(1, h, i, c) == alone.get(0, h, i, c));
          REQUIRE(out.get(2, h, i, c) == 0);  // all of it is padding
        }
  }
}

TEST_CASE("linformer: pooling against the twin, windows of unequal length, more slots than keys") {
  for (const auto kind : {sequence_projection::mean, sequence_projection::max})
    for (const isize slots : {1, 3, 8, 64})
      for (const isize m : {1, 2, 17, 130}) {
        CAPTURE(static_cast<int>(kind), slots, m);
        const linformer_attention form{.projection = kind, .slots = slots};
        const sample x(1, 3, 1, 6, m, 17, 40);
        CHECK_CLOSE(run(form, x).values(), twin(form, x).values(), {.c = 64});
      }
  const sample x(1, 1, 1, 4, 12, 8, 8);
  CHECK_CLOSE(run(linformer_attention{.projection = sequence_projection::mean, .slots = 30}, x).values(),
              run(softmax_attention{}, x).values(), {.c = 64});
}

TEST_CASE("linformer: widths of 1, 17, 80 and no queries or keys") {
  const auto e = weights(20 * 5, 5);
  const linformer_attention form{.E = bhnd<const float>(e.data(), 1, 1, 20, 5)};
  for (const isize d : {1, 17, 80})
    for (const dtype type : {dtype::f32, dtype::f64, dtype::bf16, dtype::f16}) {
      const sample x(1, 2, 2, 3, 20, d, d, type);
      CHECK_CLOSE(run(form, x).values(), twin(form, x).values(),
                  {.c = 64, .acc = type == dtype::f64 ? type : dtype::f32, .stored = type});
    }
  const sample nothing(1, 2, 2, 3, 0, 8, 8);
  for (const double y : run(form, nothing).values().data) CHECK(y == 0);
  CHECK(run(form, sample(1, 2, 2, 0, 20, 8, 8)).size() == 0);
}

TEST_CASE("linformer: block-causal, first block exact, chunks of any size, decode") {
  const auto e = weights(16 * 4, 6);
  const linformer_attention form{.E = bhnd<const float>(e.data(), 1, 1, 16, 4), .causal = true, .block = 16};
  CHECK(form.streaming());
  const sample first(1, 2, 1, 16, 16, 24, 24);
  CHECK_CLOSE(run(form, first).values(), run(softmax_attention{.mask = causal{}}, first).values(), {.c = 64});
  const sample x(2, 4, 2, 77, 77, 24, 17);
  const tensor want = twin(form, x);
  const threads two(2);
  for (const isize chunk : {1, 7, 16, 50, 77}) {
    CAPTURE(chunk);
    state s = form.make_state(problem{x.q, x.k, x.v, {}, {}, {}}.shape());
    tensor out = test::unwritten(dtype::f32, 2, 4, 77, 17);
    for (isize t = 0; t < 77; t += chunk) {
      const isize some = std::min<isize>(chunk, 77 - t);
      prefill(two, form, x.q.ref().slice(t, some), x.k.ref().slice(t, some), x.v.ref().slice(t, some),
              out.ref().slice(t, some), s);
    }
    CHECK_CLOSE(out.values(), want.values(), {.c = 64});
  }
}

TEST_CASE("linformer: a causal state is continued by a later stretch at a block boundary") {
  const linformer_attention form{.projection = sequence_projection::mean, .slots = 2, .causal = true, .block = 8};
  const sample x(1, 2, 1, 45, 45, 16, 16);
  const shape z = problem{x.q, x.k, x.v, {}, {}, {}}.shape();
  tensor out = test::unwritten(dtype::f32, 1, 2, 45, 16);
  const auto feed = [&](state& s, isize t, isize count) {
    prefill(serial, form, x.q.ref().slice(t, count), x.k.ref().slice(t, count), x.v.ref().slice(t, count),
            out.ref().slice(t, count), s);
  };
  state a = form.make_state(z), b = form.make_state(z), odd = form.make_state(z);
  feed(a, 0, 24), feed(b, 24, 20), feed(odd, 0, 3);
  CHECK_SAYS(refusal([&] { form.append(odd, b); }), "multiple of the block");
  form.append(a, b);
  CHECK(a.tokens() == 44);
  feed(a, 44, 1);
  const tensor want = twin(form, x);
  CHECK_CLOSE(test::rows_of(out, 44, 1).values(), test::rows_of(want, 44, 1).values(), {.c = 64});
}

TEST_CASE("linformer: absorb and attend, in stretches and joined") {
  const auto e = weights(60 * 70, 7), f = weights(60 * 70, 8), taps = weights(6, 9);
  const linformer_attention forms[] = {
      {.E = bhnd<const float>(e.data(), 1, 1, 60, 70), .F = bhnd<const float>(f.data(), 1, 1, 60, 70)},
      {.projection = sequence_projection::conv, .wk = taps, .slots = 10}};
  for (const linformer_attention& form : forms)
    for (const dtype type : {dtype::f32, dtype::f64}) {
      const sample x(2, 4, 2, 5, 50, 24, 17, type);
      const shape z = problem{x.q, x.k, x.v, {}, {}, {}}.shape();
      state a = form.make_state(z), b = form.make_state(z, 31);
      const auto feed = [&](state& s, isize t, isize count) {
        absorb(serial, form, x.k.ref().slice(t, count), x.v.ref().slice(t, count), s);
      };
      feed(a, 0, 30), feed(a, 30, 1), feed(b, 31, 19);
      state joined = a;
      CHECK_SAYS(refusal([&] { form.append(b, a); }), "begins at position 0");
      form.append(joined, b);
      feed(a, 31, 19);
      CHECK(joined.tokens() == 50);
      const tensor want = twin(form, x);
      for (const state* s : {&a, &joined}) {
        tensor out = test::unwritten(type, 2, 4, 5, 17);
        attend(serial, form, x.q, out, *s);
        CHECK_CLOSE(out.values(), want.values(), {.c = 64, .acc = type});
      }
      tensor out = test::unwritten(type, 2, 4, 5, 17);
      CHECK_SAYS(refusal([&] { attend(serial, form, x.q, out, b); }), "append it");
      CHECK_SAYS(refusal([&] { feed(a, 0, 30); }), "reaches 59");
    }
}

TEST_CASE("linformer: what is refused, in sentences") {
  const auto e = weights(64 * 4, 10);
  const auto E = bhnd<const float>(e.data(), 1, 1, 32, 4);
  const sample x(1, 2, 1, 8, 40, 8, 8);
  const auto said = [&](const linformer_attention& m, const sample& y) { return refusal([&] { run(m, y); }); };
  CHECK_SAYS(said({.E = E}, x), "m is 40 and E is 32 positions long");
  CHECK_SAYS(said({.E = E, .causal = true}, x), "no mask over slots is causal");
  CHECK_SAYS(said({.E = E, .block = 8}, x), "blocks belong to the causal form");
  CHECK_SAYS(said({.E = E, .causal = true, .block = 33}, x), "block is 33 and E is 32");
  CHECK_SAYS(said({}, x), "E is null");
  CHECK_SAYS(said({.E = E, .slots = 5}, x), "slots is 5 and E has 4");
  CHECK_SAYS(said({.E = E, .scale = -1.0}, x), "scale is -1");
  CHECK_SAYS(said({.E = E, .scale = std::nan("")}, x), "scale is nan");
  CHECK_SAYS(said({.projection = sequence_projection::mean}, x), "slots is 0");
  CHECK_SAYS(said({.E = E, .wk = e}, x), "no convolution");
  CHECK_SAYS(said({.projection = sequence_projection::conv, .wk = std::span(e).first(3), .slots = 5}, x),
             "5 slots of 3 taps reach 15");
  const std::vector<std::int32_t> two{3, 4}, beyond{41};
  CHECK_SAYS(said({.projection = sequence_projection::mean, .slots = 4, .lengths = two}, x), "lengths has 2 entries");
  CHECK_SAYS(said({.projection = sequence_projection::mean, .slots = 4, .lengths = beyond}, x), "lengths[0] is 41");
  const auto per_head = bhnd<const float>(e.data(), 1, 2, 32, 4);
  CHECK_SAYS(said({.E = per_head}, sample(1, 3, 3, 4, 8, 8, 8)), "E is [1, 2, 32, 4]");

  const linformer_attention full{.E = E}, blocks{.E = E, .causal = true, .block = 8};
  const sample y(1, 2, 1, 8, 8, 8, 8);
  const shape z = problem{y.q, y.k, y.v, {}, {}, {}}.shape();
  tensor out = test::unwritten(dtype::f32, 1, 2, 8, 8);
  state s = full.make_state(z), small = blocks.make_state({1, 2, 1, 0, 7, 8, 8, dtype::f32});
  CHECK_FALSE(full.streaming());
  CHECK_SAYS(refusal([&] { prefill(serial, full, y.q, y.k, y.v, out, s); }), "use absorb and attend");
  CHECK_SAYS(refusal([&] { prefill(serial, blocks, y.q, y.k, y.v, out, s); }), "not made by this linformer");
  CHECK_SAYS(refusal([&] { prefill(serial, blocks, y.q, y.k, y.v, out, small); }), "room for 7 tokens");
  CHECK_SAYS(
      refusal([&] { (void)linformer_attention{.projection = sequence_projection::max, .slots = 4}.make_state(z); }),
      "whole length");
  for (const double value : out.values().data) CHECK(std::isnan(value));  // nothing was written
}

TEST_CASE("linformer: configuration") {
  const auto make = [](const configuration& c, const arrays& tensors) {
    configuration_reader r(c, tensors);
    const any_attention a = configure_linformer(r);
    r.finish();
    return a;
  };
  const arrays E{{"E", array({12, 3}, weights(36, 11))}};
  CHECK_FALSE(make({"linformer", {}}, E).streaming());
  CHECK(make({"linformer", {{"causal", true}, {"block", 12.0}}}, E).streaming());
  CHECK_SAYS(refusal([&] { make({"linformer", {{"causal", true}}}, E); }), "no mask over slots is causal");
  CHECK_SAYS(refusal([&] { make({"linformer", {{"projection", std::string("dct")}}}, E); }), "projection is \"dct\"");
  CHECK_SAYS(refusal([&] { make({"linformer", {}}, {}); }), "E is null");
  CHECK_SAYS(refusal([&] { make({"linformer", {{"window", 4.0}}}, E); }), "window");
  const arrays padded{{"lengths", array({2}, std::vector<std::int32_t>{3, 4})}};
  CHECK(make({"linformer", {{"projection", std::string("mean")}, {"slots", 2.0}}}, padded)
            .as<linformer_attention>()
            ->lengths.size() == 2);
}
