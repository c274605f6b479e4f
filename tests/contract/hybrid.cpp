// SPDX-License-Identifier: MIT
/// @file  What hybrid_attention refuses.

#include <limits>

#include <fovea/feature/cosformer.hpp>
#include <fovea/hybrid.hpp>
#include <fovea/hybrid/stores.hpp>

#include "contract/contract.hpp"

namespace {
using namespace fovea;
constexpr double bad = std::numeric_limits<double>::quiet_NaN();
}  // namespace

TEST_CASE("contract of hybrid: calls and states") {
  const hybrid_attention m{.is_causal = true}, both_ways{};
  contract::refuses_what_it_must(contract::caller_of(m, true));
  contract::refuses_what_it_must(contract::caller_of(both_ways, true));
  contract::refuses_what_it_must(contract::streaming_caller_of(m, true));
  contract::refuses_foreign_states(m);
  contract::arguments a(3, 3);
  problem p = a.good(false);
  state s = m.make_state(p.shape());
  CHECK_SAYS(test::refusal([&] { fovea::prefill(serial, both_ways, p.q, p.k, p.v, p.out, s); }), "causal");
  CHECK_SAYS(test::refusal(
                 [&] { (void)hybrid_attention{.is_causal = true, .target = {.relative = 0.1}}.make_state(p.shape()); }),
             "error target");
  CHECK_SAYS(test::refusal([&] {
               (void)hybrid_attention{.is_causal = true, .compensate = compensation::linear}.make_state(p.shape());
             }),
             "linear");
  CHECK(a.touched() == std::string());
}

/// A state saved under one configuration and restored under another: what says what it means is in its tag.
TEST_CASE("contract of hybrid: states of other configurations") {
  using H = hybrid_attention;
  const auto changed = [](const H& m, auto&& change) {
    H x = m;
    change(x);
    return x;
  };
  const H m{.select = block_selector::int8, .is_causal = true, .compensate = compensation::sampled};
  const H spread{.is_causal = true, .compensate = compensation::cumulant};
  const std::vector<std::pair<H, H>> foreign{
      {m, changed(m, [](H& x) { x.select = block_selector::int4; })},
      {m, changed(m, [](H& x) { x.block_q = 8; })},
      {m, changed(m, [](H& x) { x.block_k = 8; })},
      {m, changed(m, [](H& x) { x.top = 3; })},
      {m, changed(m, [](H& x) { x.budget = 0.5; })},
      {m, changed(m, [](H& x) { x.at_least = 16; })},
      {m, changed(m, [](H& x) { x.first = 0; })},
      {m, changed(m, [](H& x) { x.window = 0; })},
      {m, changed(m, [](H& x) { x.top_p = 0.9; })},
      {m, changed(m, [](H& x) { x.keep_small = 0; })},
      {m, changed(m, [](H& x) { x.refresh = 4; })},
      {m, changed(m, [](H& x) { x.share_group = true; })},
      {m, changed(m, [](H& x) { x.parts = 2; })},
      {m, changed(m, [](H& x) { x.compensate = compensation::zeroth; })},
      {m, changed(m, [](H& x) { x.seed = 2; })},
      {m, changed(m, [](H& x) { x.scale = 0.5; })},
      {spread, changed(spread, [](H& x) { x.variance_share = 0.25; })},
      {spread, changed(spread, [](H& x) { x.variance_cap = 1; })},
      {H::hsa(hsa_mode::local, 8), H::hsa(hsa_mode::fixed, 8)},
      {H::hsa(hsa_mode::local, 8), H::hsa(hsa_mode::local, 9)},
      {m, changed(m, [](H& x) { x.compensate = compensation::zeroth, x.target.relative = 0.1; })},
      {m, changed(m, [](H& x) { x.align = top_left; })},
      {m, changed(m, [](H& x) { x.is_causal = false; })},
  };
  contract::arguments a(3, 3);
  const problem p = a.good(false);
  for (const auto& pair : foreign) {
    const H &of = pair.first, &other = pair.second;  // not by [of, other]: clang 14 takes no such name into a lambda
    const state made = of.make_state(p.shape());
    state s = state::restore(made.save());
    CHECK(of.tag() != other.tag());
    CHECK(!test::refusal([&] { fovea::prefill(serial, other, p.q, p.k, p.v, p.out, s); }).empty());
    CHECK(!test::refusal([&] { other.merge(s, made); }).empty());
    CHECK(s.save() == made.save());
  }
  CHECK(a.touched() == std::string());
  // Arithmetic is of a call: its state is the same.
  const H whole{.is_causal = true}, in_int8{.is_causal = true, .arithmetic = precision::int8};
  CHECK(whole.tag() == in_int8.tag());
}

TEST_CASE("contract of hybrid: its own values") {
  using contract::refuses_value;
  using H = hybrid_attention;
  refuses_value(H{.block_q = 0}, {"block_q", "0"});
  refuses_value(H{.block_k = -16}, {"block_k", "-16"});
  refuses_value(H{.top = -1}, {"top", "-1"});
  refuses_value(H{.is_causal = true, .align = at_offset(PTRDIFF_MIN)}, {"the offset of row 0 is -9223372036854775808"});
  refuses_value(H{.budget = -0.1}, {"budget is -0.1"});
  refuses_value(H{.budget = 1.5}, {"budget is 1.5"});
  refuses_value(H{.budget = bad}, {"budget is nan"});
  refuses_value(H{.at_least = -5}, {"at_least", "-5"});
  refuses_value(H{.first = -5}, {"first", "-5"});
  refuses_value(H{.window = -5}, {"window", "-5"});
  refuses_value(H{.at_least = PTRDIFF_MAX}, {"at_least", "2^60"});
  refuses_value(H{.first = PTRDIFF_MAX}, {"first", "2^60"});
  refuses_value(H{.window = PTRDIFF_MAX}, {"window", "2^60"});
  const std::int32_t starts[] = {0, 1};
  refuses_value(H{.align = at_offsets(starts)}, {"align has an offset for each of 2 batch items"});
  refuses_value(H{.top_p = -0.5}, {"top_p is -0.5"});
  refuses_value(H{.keep_small = bad}, {"keep_small is nan"});
  refuses_value(H{.parts = 0}, {"parts is 0"});
  refuses_value(H{.scale = bad}, {"scale is nan"});
  refuses_value(H{.scale = -2.0}, {"scale is -2"});
  refuses_value(H{.select = block_selector::pattern, .stride = 0}, {"stride", "0"});
  refuses_value(H{.select = block_selector::given}, {"blocks"});
  refuses_value(H{.target = {.relative = -0.5}}, {"target is -0.5"});
  refuses_value(H{.target = {.absolute = bad}}, {"target.absolute is nan"});
  refuses_value(H{.select = block_selector::int4, .target = {.relative = 0.1}}, {"target", "int4"});
  refuses_value(H{.compensate = compensation::cumulant, .target = {.relative = 0.1}}, {"target", "cumulant"});
  refuses_value(H{.compensate = compensation::sampled, .target = {.relative = 0.1}}, {"target", "sampled"});
  refuses_value(H{.compensate = compensation::zeroth, .variance_cap = 1}, {"variance_cap is 1", "cumulant"});
  refuses_value(H{.compensate = compensation::cumulant, .variance_cap = -1}, {"variance_cap is -1"});
  refuses_value(H{.compensate = compensation::cumulant, .variance_cap = bad}, {"variance_cap is nan"});
  refuses_value(H{.compensate = compensation::cumulant, .variance_share = bad}, {"variance_share is nan"});
  refuses_value(H{.compensate = compensation::sampled, .variance_share = 0.25}, {"variance_share is 0.25", "cumulant"});
  refuses_value(H{.parts = 2, .compensate = compensation::linear}, {"parts is 2", "linear"});
  refuses_value(H{.compensate = compensation::linear, .target = {.relative = 0.1}}, {"target", "linear"});
  refuses_value(H{.compensate = compensation::linear, .arithmetic = precision::int8}, {"int8", "linear"});
  refuses_value(H{.compensate = compensation::linear, .map = cosformer{64}}, {"feature map", "positions"});
  static const float weights[3] = {};
  refuses_value(H{.compensate = compensation::linear, .log_weight = bhnd(weights, 1, 3, 1, 1)}, {"log_weight has 3"});
  refuses_value(H{.compensate = compensation::linear, .query_gate = bhnd(weights, 1, 1, 1, 3)}, {"query_gate", "3"});
  refuses_value(H{.arithmetic = precision::bf16}, {"arithmetic is bf16"});
  refuses_value(H{.compensate = compensation::cumulant, .arithmetic = precision::int8}, {"int8", "cumulant"});
  refuses_value(H{.select = block_selector::pattern,
                  .is_causal = true,
                  .compensate = compensation::none,
                  .arithmetic = precision::int8},
                {"int8", "pattern"});
  static const std::uint8_t table[64] = {};
  refuses_value(H::over(bhnd<const std::uint8_t>(table, 1, 3, 2, 3), 2, 2, false),
                {"blocks", "3"});  // heads: H or G or 1
  refuses_value(H::over(bhnd<const std::uint8_t>(table, 1, 2, 2, 2), 2, 2, false),
                {"blocks", "3"});  // 5 keys are 3 blocks
}

TEST_CASE("contract of hybrid: int8 is of f32 and less, forwards, and without a certificate") {
  const hybrid_attention m{.is_causal = true, .arithmetic = precision::int8};
  contract::refuses_what_it_must(contract::caller_of(m, true));
  contract::refuses_what_it_must(contract::streaming_caller_of(m, true));
  contract::arguments wide(3, 5, 8, 6, dtype::f64);
  CHECK_SAYS(test::refusal([&] { fovea::prefill(serial, m, wide.q, wide.k, wide.v, wide.out); }), "int8");
  CHECK_SAYS(test::refusal([&] { (void)m.make_state({1, 4, 2, 3, 5, 8, 6, dtype::f64}); }), "int8");
  contract::arguments a;
  test::tensor bound(dtype::f32, 2, 4, 3, 1);
  CHECK_SAYS(test::refusal([&] { error_bound(serial, m, a.q, a.k, a.v, bound); }), "int8");
  const hybrid_attention drawn{.is_causal = true, .compensate = compensation::sampled};
  CHECK_SAYS(test::refusal([&] { error_bound(serial, drawn, a.q, a.k, a.v, bound); }), "sampled");
  CHECK_SAYS(test::refusal([&] { prefill_within(serial, m, a.q, a.k, a.v, a.out, bound, {.relative = 0.1}); }), "int8");
}

TEST_CASE("contract of hybrid: summaries and the store beside them") {
  using test::refusal;
  test::random r(5);
  const test::tensor q = test::normal(r, dtype::f32, 1, 4, 3, 8), k = test::normal(r, dtype::f32, 1, 2, 3, 8),
                     v = test::normal(r, dtype::f32, 1, 2, 3, 6), wide = test::normal(r, dtype::f64, 1, 4, 3, 8);
  test::tensor out = test::unwritten(dtype::f32, 1, 4, 3, 6);
  const auto before = out.bytes();
  const hybrid_attention m{.is_causal = true};
  const kv_shape sizes{.heads = 2, .d = 8, .e = 6};
  contiguous_store store(sizes, 4);
  const auto says = [&](const hybrid_attention& a, const tensor_ref& x, const tensor_ref& y, state& s,
                        const call_options& o = {}) {
    const auto saved = s.save();
    const std::string said = refusal([&] { prefill(serial, a, x, y, v, out, store, s, o); });
    CHECK(store.tokens() == 0);
    CHECK(s.save() == saved);
    CHECK(out.bytes() == before);
    return said;
  };
  CHECK_SAYS(refusal([&] { (void)make_summaries({}, 4, sizes, 8); }), "is not causal");
  CHECK_SAYS(
      refusal([&] { (void)make_summaries({.is_causal = true, .compensate = compensation::linear}, 4, sizes, 8); }),
      "linear");
  CHECK_SAYS(refusal([&] { (void)make_summaries({.is_causal = true, .target = {.relative = 0.1}}, 4, sizes, 8); }),
             "error target");
  CHECK_SAYS(refusal([&] { (void)make_summaries(m, 3, sizes, 8); }), "3 query heads, 2 KV heads");
  CHECK_SAYS(refusal([&] { (void)make_summaries(m, 4, sizes, -1); }), "room for -1 tokens");
  state s = make_summaries(m, 4, sizes, 8), tight = make_summaries(m, 4, sizes, 2);
  state other = make_summaries(m, 4, {.heads = 2, .d = 8, .e = 6, .type = dtype::f16}, 8);
  state plain = m.make_state({1, 4, 2, 3, 8, 8, 6, dtype::f32});
  hybrid_attention larger = m, aligned = m, exact = m, given = m, both_ways = m;
  larger.block_k = 32, aligned.align = top_left, both_ways.is_causal = false;
  exact.select = block_selector::exact, given.select = block_selector::given;
  const hybrid_attention aims{.is_causal = true, .target = {.relative = 0.1}};
  CHECK_SAYS(says(aims, q, k, s), "error target");
  CHECK_SAYS(refusal([&] { prefill(serial, aims, q, k, v, out, plain); }), "error target");
  CHECK_SAYS(refusal([&] { (void)store_workspace_size(aims, q, sizes, 8, 1); }), "error target");
  CHECK_SAYS(says(both_ways, q, k, s), "must be causal");
  CHECK_SAYS(says(aligned, q, k, s), "bottom-right");
  CHECK_SAYS(says(larger, q, k, s), "not made for this hybrid");
  CHECK_SAYS(says(m, q, k, plain), "not made for this hybrid");
  CHECK_SAYS(says(m, q, k, other), "rows of f16");
  CHECK_SAYS(says(m, wide, k, s), "f64");
  CHECK_SAYS(refusal([&] { prefill(serial, m, q.ref().slice(0, 2), k, v, out.ref().slice(0, 2), store, s); }),
             "q has 2 tokens and k has 3");
  CHECK_SAYS(says(m, q, k, tight), "will hold 3 tokens; the summaries have room for 2");
  std::byte few[10];
  CHECK_SAYS(says(m, q, k, s, {.workspace = few}), "workspace holds 10 bytes");
  state of_given = make_summaries(given, 4, sizes, 8);
  CHECK_SAYS(says(given, q, k, of_given), "blocks is null");
  CHECK_SAYS(refusal([&] { step(serial, m, q, k, v, out, store, s); }), "step takes one token");
  const kv_sequence held = sequence_of(k, v);
  CHECK_SAYS(refusal([&] { step(serial, m, q, held, out, s); }), "step takes one token");
  CHECK_SAYS(refusal([&] { prefill(serial, m, q, sequence_of(k.ref().slice(0, 2), v.ref().slice(0, 2)), out, s); }),
             "q has 3 tokens and the sequence holds 2 rows");
  CHECK_SAYS(refusal([&] { prefill(serial, larger, q, held, out, s); }), "not made for this hybrid");
  CHECK_SAYS(refusal([&] { prefill(serial, m, q, some_heads(held, 0, 1), out, s); }), "the store holds 1 KV heads");
  CHECK_SAYS(refusal([&] { (void)some_heads(held, 1, 2); }), "2 heads from 1 on, 1 apart; the sequence has 2");
  CHECK(out.bytes() == before);

  ring_store ring(sizes, {2, 0, 1});
  CHECK_SAYS(refusal([&] { prefill(serial, m, q, k, v, out, ring, s); }), "the ring store drops tokens");
  paged_pool pool(sizes, 4, 4);
  page_table table;
  pooled_sequence pages(pool, table);
  state of_exact = make_summaries(exact, 4, sizes, 8);
  CHECK_SAYS(refusal([&] { prefill(serial, exact, q, k, v, out, pages, of_exact); }), "select exact over pages");
  CHECK(out.bytes() == before);
  prefill(serial, m, q, k, v, out, store, s);
  CHECK_SAYS(refusal([&] { prefill(serial, m, q, k, v, out, store, s); }), "do not fit");
  CHECK(store.tokens() == 3);
}

TEST_CASE("hybrid over a store: a call runs in the memory that was announced") {
  test::random r(6);
  const test::tensor q = test::normal(r, dtype::f32, 1, 4, 40, 8), k = test::normal(r, dtype::f32, 1, 2, 40, 8),
                     v = test::normal(r, dtype::f32, 1, 2, 40, 6);
  const kv_shape sizes{.heads = 2, .d = 8, .e = 6};
  for (const hybrid_attention& m : {hybrid_attention{.is_causal = true}, hybrid_attention::hsa(hsa_mode::sparse, 4)}) {
    test::tensor out = test::unwritten(dtype::f32, 1, 4, 40, 6), want = test::unwritten(dtype::f32, 1, 4, 40, 6);
    contiguous_store one(sizes, 40), two(sizes, 40);
    state a = make_summaries(m, 4, sizes, 40), b = make_summaries(m, 4, sizes, 40);
    for (isize i = 0; i < 40; i += i == 0 ? 37 : 1) {
      const isize n = i == 0 ? 37 : 1;
      const tensor_ref rows = q.ref().slice(i, n);
      buffer memory(store_workspace_size(m, rows, sizes, i + n, 1));
      prefill(serial, m, rows, k.ref().slice(i, n), v.ref().slice(i, n), out.ref().slice(i, n), one, a,
              {.workspace = memory.span()});
      prefill(serial, m, rows, k.ref().slice(i, n), v.ref().slice(i, n), want.ref().slice(i, n), two, b);
    }
    CHECK(out.bytes() == want.bytes());
    CHECK(a.tokens() == 40);
  }
}

TEST_CASE("hybrid and softmax over some heads of a shared store are those over a store of their own") {
  test::random r(8);
  const isize n = 70, H = 8, G = 4;
  const test::tensor q = test::normal(r, dtype::f32, 1, H, n, 8), k = test::normal(r, dtype::f32, 1, G, n, 8),
                     v = test::normal(r, dtype::f32, 1, G, n, 6);
  const hybrid_attention hybrid{.block_q = 4, .block_k = 4, .is_causal = true, .at_least = 0};
  const softmax_attention exact{.mask = causal{}};
  for (const kv_shape& form :
       {kv_shape{.heads = G, .d = 8, .e = 6, .type = dtype::bf16},
        kv_shape{.heads = G, .d = 8, .e = 6, .type = dtype::i8, .form = kv_form::packed, .rotated = true}})
    for (const isize page : {0, 16}) {
      // KV heads 1 and 3: query heads 2, 3, 6, 7.
      kv_shape few = form;
      few.heads = 2;
      const auto pick = [](const test::tensor& from, isize first, isize width) {
        test::tensor to(dtype::f32, 1, 4, n, width);
        for (isize h = 0; h < 4; ++h)
          for (isize i = 0; i < n; ++i)
            for (isize c = 0; c < width; ++c) to.set(0, h, i, c, from.get(0, first + (h / 2) * 4 + h % 2, i, c));
        return to;
      };
      const test::tensor some = pick(q, 2, 8);
      tensor_ref k13 = k.ref().part(0, 1, 3), v13 = v.ref().part(0, 1, 3);
      for (tensor_ref* x : {&k13, &v13}) x->heads = 2, x->head_stride *= 2;
      const auto compare = [&](auto&& shared, auto&& own) {
        shared.append(k, v, key_positions{}), own.append(k13, v13, key_positions{});
        const kv_sequence two = some_heads(shared.view(), 1, 2, 2), alone = own.view();
        test::tensor a = test::unwritten(dtype::f32, 1, 4, n, 6), b = test::unwritten(dtype::f32, 1, 4, n, 6);
        prefill(serial, exact, some, {&two, 1}, a), prefill(serial, exact, some, {&alone, 1}, b);
        CHECK(a.bytes() == b.bytes());
        state s = make_summaries(hybrid, 4, few, n), t = make_summaries(hybrid, 4, few, n);
        prefill(serial, hybrid, some, two, a, s), prefill(serial, hybrid, some, alone, b, t);
        CHECK(a.bytes() == b.bytes());
        CHECK(s.save() == t.save());
      };
      if (page == 0) {
        compare(contiguous_store(form, n), contiguous_store(few, n));
      } else {
        paged_pool all(form, page, 8), half(few, page, 8);
        page_table at_all, at_half;
        compare(pooled_sequence(all, at_all), pooled_sequence(half, at_half));
      }
    }
}
