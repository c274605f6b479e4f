// SPDX-License-Identifier: MIT
/// @file  What KV stores and calls over them refuse.

#include <fovea/core/kv_cache.hpp>
#include <fovea/position/rope_table.hpp>
#include <fovea/softmax.hpp>

#include "contract/contract.hpp"

namespace {

using namespace fovea;
using test::refusal;
using test::tensor;

constexpr kv_shape sizes{.heads = 2, .d = 8, .e = 6, .type = dtype::f32};

/// Two sequences of 5 and 7 tokens, q [2, 4, 3, 8].
struct good_call {
  tensor q, k, v, out, lse;
  contiguous_store a, b;
  std::vector<kv_sequence> kv;
  sequence_options options;
  softmax_attention m{.mask = causal{}};
  good_call() : a(sizes, 10), b(sizes, 10) {
    test::random r(1);
    q = test::normal(r, dtype::f32, 2, 4, 3, 8);
    k = test::normal(r, dtype::f32, 1, 2, 7, 8), v = test::normal(r, dtype::f32, 1, 2, 7, 6);
    out = test::unwritten(dtype::f32, 2, 4, 3, 6), lse = test::unwritten(dtype::f32, 2, 4, 3, 1);
    a.append(k.ref().slice(0, 5), v.ref().slice(0, 5)), b.append(k, v);
    kv = {a.view(), b.view()};
    options.lse = lse;
  }
  std::string says() {
    const auto before = out.bytes(), before_lse = lse.bytes();
    const std::string said = refusal([&] { prefill(serial, m, q, kv, out, options); });
    CHECK((said == "accepted" || (out.bytes() == before && lse.bytes() == before_lse)));
    return said;
  }
};

/// One change to a good call, and what must stand in the sentence.
template <class F>
void refuses(F&& spoil, const char* words) {
  good_call c;
  spoil(c);
  CHECK_SAYS(c.says(), words);
}

}  // namespace

TEST_CASE("contract of sequences: the call") {
  CHECK(good_call().says() == "accepted");
  using C = good_call;
  refuses([](C& c) { c.kv.pop_back(); }, "q has a batch of 2 and 1 sequences were given");
  refuses([](C& c) { c.kv[1].heads = 1; }, "sequence 1 has 1 KV heads and sequence 0 has 2");
  refuses([](C& c) { c.kv[0].heads = c.kv[1].heads = 3; }, "the query heads must be a multiple of the KV heads");
  refuses([](C& c) { c.kv[1].d = 9; }, "sequence 1 has keys 9 and values 6 wide; q and out are 8 and 6");
  refuses([](C& c) { c.kv[1].e = 7; }, "sequence 1 has keys 8 and values 7 wide");
  refuses([](C& c) { c.kv[0].length = -1; }, "sequence 0: length, kept, dropped are -1, 0, 0");
  refuses([](C& c) { c.kv[0].dropped = -1; }, "must not be negative");
  refuses([](C& c) { c.kv[0].k.data = nullptr; }, "sequence 0: k is null; wanted 5 rows");
  refuses([](C& c) { c.kv[0].v.data = nullptr; }, "sequence 0: v is null");
  refuses([](C& c) { c.kv[1].v.type = dtype::bf16; }, "sequence 1: keys are f32 and values bf16");
  refuses([](C& c) { c.kv[1].k.type = c.kv[1].v.type = dtype::f64; }, "k is f64 and q is f32");
  refuses([](C& c) { c.kv[1].k.row_bytes = 12; }, "rows of k are 12 bytes apart; 8 elements of f32 do not fit");
  refuses([](C& c) { c.kv[1].k.type = c.kv[1].v.type = dtype::i8; }, "k is i8 with 0 scales a row");
  refuses([](C& c) { c.out.ref(), c.q = tensor(dtype::f64, 2, 4, 3, 8); }, "f64");
  refuses([](C& c) { c.lse = tensor(dtype::f32, 2, 4, 2, 1), c.options.lse = c.lse; }, "lse is [2, 4, 2, 1]");
  refuses([](C& c) { c.m.scale = -1.0; }, "scale is -1");
  refuses([](C& c) { c.m.mask = window{0}; }, "window width is 0");
  const std::int32_t minus[] = {0, -3}, ahead[] = {0, 1};
  refuses([&](C& c) { c.kv[0].k.table = minus, c.kv[0].k.page = 4; }, "the page table of k names page -3");
  refuses([&](C& c) { c.kv[0].k.table = ahead; }, "pages of k hold 0 rows");
  refuses([](C& c) { c.kv[0].k.ring = 2, c.kv[0].k.fixed = 1; }, "k has 5 rows in a ring of 2 behind 1");
  const std::int32_t positions[] = {0, 1, 2, 0, 1, 2};
  refuses([&](C& c) { c.options.positions = positions; }, "this mechanism turns nothing");
  const rope_table table({.width = 8, .positions = 6});
  const rope turn = table;
  refuses([&](C& c) { c.m.turn = &turn; }, "rope has a table of 6 positions; the call needs position 6");
  refuses([&](C& c) { c.m.turn = &turn, c.options.positions = std::span(positions).first(5); },
          "positions holds 5 numbers");
  const std::int32_t negative[] = {0, 1, 2, 0, -1, 2};
  refuses([&](C& c) { c.m.turn = &turn, c.options.positions = negative; }, "a token's position is -1");
}

TEST_CASE("contract of sequences: cumulative lengths, dropped tokens, memory") {
  using C = good_call;
  const auto packed = [](C& c, std::vector<std::int32_t> cu) {
    static std::vector<std::int32_t> keep;
    keep = std::move(cu), c.options.cu_q = keep;
    c.q = tensor(dtype::f32, 1, 4, 6, 8).fill([] { return 1.0; });
    c.out = test::unwritten(dtype::f32, 1, 4, 6, 6), c.lse = test::unwritten(dtype::f32, 1, 4, 6, 1);
    c.options.lse = c.lse;
  };
  {
    C c;
    packed(c, {0, 2, 6});
    CHECK(c.says() == "accepted");
  }
  refuses([&](C& c) { packed(c, {0, 6}); }, "cu_q holds 2 numbers; 2 sequences need 3");
  refuses([&](C& c) { packed(c, {0, 4, 3}); }, "cu_q falls from 4 to 3 at sequence 1");
  refuses([&](C& c) { packed(c, {0, 2, 5}); }, "cu_q runs from 0 to 5; wanted 0 to the 6 rows of q");
  refuses(
      [&](C& c) {
        packed(c, {0, 2, 6}), c.q = tensor(dtype::f32, 2, 4, 3, 8), c.out = tensor(dtype::f32, 2, 4, 3, 6),
                              c.options.lse = {};
      },
      "q has a batch of 2; with cu_q");
  refuses(
      [](C& c) {
        std::byte few[64];
        c.options.workspace = few;
      },
      "workspace holds 64 bytes");
  // Outputs in the keys of a store.
  refuses(
      [](C& c) {
        tensor_mut out = c.out;
        c.kv[0].k.data = static_cast<const std::byte*>(out.data), c.kv[0].k.row_bytes = 32;
      },
      "out overlaps the keys or values");
  refuses([](C& c) { c.kv[0].k.row_bytes = 33; }, "rows of k are 33 bytes apart; wanted whole elements of f32");
  // A ring that has dropped what the first row would see.
  test::random r(2);
  ring_store ring(sizes, {4, 1, 2});
  ring.append(test::normal(r, dtype::f32, 1, 2, 12, 8), test::normal(r, dtype::f32, 1, 2, 12, 6));
  const auto of_ring = [&](C& c, isize n) {
    c.kv = {ring.view()};
    c.q = tensor(dtype::f32, 1, 4, n, 8).fill([] { return 1.0; });
    c.out = test::unwritten(dtype::f32, 1, 4, n, 6), c.options.lse = {};
  };
  refuses(
      [&](C& c) {
        of_ring(c, 3), c.m.mask = window{4, 1};
      },
      "sequence 0 has dropped tokens 1 to 6; its first row sees the first 1 and those from 6 on");
  refuses([&](C& c) { of_ring(c, 1), c.m.mask = window{4, 2}; }, "its first row sees the first 2");
  C fine;
  of_ring(fine, 2), fine.m.mask = window{4, 1};
  CHECK(fine.says() == "accepted");
  const std::int32_t cu[] = {0, 1, 3};
  C c;
  CHECK_SAYS(refusal([&] { step(serial, c.m, c.q, c.kv, c.out); }), "step takes one token of each sequence; q has 3");
  packed(c, {0, 2, 6});
  CHECK_SAYS(refusal([&] { step(serial, c.m, c.q, c.kv, c.out, {.cu_q = cu}); }), "cu_q gives sequence 1 2");
}

TEST_CASE("contract of stores: what is appended, cut and shifted") {
  test::random r(3);
  const tensor k = test::normal(r, dtype::f32, 1, 2, 4, 8), v = test::normal(r, dtype::f32, 1, 2, 4, 6);
  const tensor wide = test::normal(r, dtype::f32, 1, 2, 4, 9), heads = test::normal(r, dtype::f32, 1, 3, 4, 8),
               longer = test::normal(r, dtype::f32, 1, 2, 5, 6), two = test::normal(r, dtype::f32, 2, 2, 4, 8),
               real = test::normal(r, dtype::f64, 1, 2, 4, 8), half = test::normal(r, dtype::f16, 1, 2, 4, 6);
  const rope_table table({.width = 8, .positions = 6});
  const rope turn = table;
  contiguous_store a(sizes, 10);
  ring_store b(sizes, {4, 1, 2});
  paged_pool c(sizes, 2, 3);
  page_table t;
  a.append(k, v), b.append(k, v), c.append(t, k, v);
  const auto each = [&](const tensor_ref& x, const tensor_ref& y, const rope* by, const char* words) {
    const auto before = a.save();
    CHECK_SAYS(refusal([&] { a.append(x, y, by); }), words);
    CHECK_SAYS(refusal([&] { b.append(x, y, by); }), words);
    CHECK_SAYS(refusal([&] { c.append(t, x, y, by); }), words);
    CHECK(a.save() == before);
  };
  each(wide, v, nullptr, "k is [1, 2, 4, 9] f32; the");
  each(heads, v, nullptr, "k is [1, 3, 4, 8] f32; the");
  each(k, longer, nullptr, "v is [1, 2, 5, 6] f32; the");
  each(two, v, nullptr, "k is [2, 2, 4, 8] f32; the");
  each(real, v, nullptr, "f64 goes with f64 only");
  each(k, half, nullptr, "k and v are of one type");
  each(k, v, &turn, "rope has a table of 6 positions; the call needs position 7");
  tensor_ref null = k;
  null.data = nullptr;
  each(null, v, nullptr, "k is null");
  CHECK_SAYS(
      refusal([&] { a.append(test::normal(r, dtype::f32, 1, 2, 7, 8), test::normal(r, dtype::f32, 1, 2, 7, 6)); }),
      "the contiguous store holds 4 of at most 10 tokens; 7 more do not fit");
  CHECK_SAYS(refusal([&] { c.append(t, k, v); }), "append of 4 tokens takes 2 pages of 2 tokens; 1 of 3 are free");
  for (const isize left : {-1, 5}) {
    CHECK_SAYS(refusal([&] { a.truncate(left); }), "truncate to");
    CHECK_SAYS(refusal([&] { b.truncate(left); }), "truncate to");
    CHECK_SAYS(refusal([&] { c.truncate(t, left); }), "truncate to");
  }
  CHECK_SAYS(refusal([&] { a.shift(3, 2); }), "shift drops 3 tokens after the first 2; the contiguous store holds 4");
  CHECK_SAYS(refusal([&] { b.shift(4); }), "shift drops 4 tokens after the first 1; the ring store holds 4");
  CHECK_SAYS(refusal([&] { c.shift(t, -1); }), "shift drops -1 tokens");
  page_table fork = c.fork(t);
  CHECK_SAYS(refusal([&] { c.shift(t, 1, 0, &turn); }), "shift by 1 tokens takes 2 pages");
  page_table* one[] = {&t};
  CHECK_SAYS(refusal([&] { c.defragment(one); }), "page 0 stands in 2 tables, of which 1 were given; all are needed");
  CHECK_SAYS(refusal([&] { contiguous_store({.heads = 0, .d = 8, .e = 8}, 4); }), "heads, d, e are 0, 8, 8");
  CHECK_SAYS(refusal([&] { contiguous_store(sizes, -1); }), "the capacity is -1 tokens");
  CHECK_SAYS(refusal([&] { contiguous_store(sizes, isize{1} << 55); }), "is more than memory can be");
  CHECK_SAYS(refusal([&] { paged_pool(sizes, isize{1} << 30, isize{1} << 30); }), "more than memory can be");
  CHECK_SAYS(refusal([&] { ring_store(sizes, {4, 1, PTRDIFF_MAX}); }), "at most 2^60");
  CHECK_SAYS(refusal([&] { ring_store(sizes, {0, 0, 1}); }), "window, first, chunk are 0, 0, 1");
  CHECK_SAYS(refusal([&] { paged_pool(sizes, 0, 4); }), "4 pages of 0 tokens");
  CHECK_SAYS(refusal([&] { contiguous_store({.heads = 1, .d = 8, .e = 9, .values_in_keys = true}, 4); }),
             "values are 9 wide and keys 8");
  contiguous_store joint({.heads = 2, .d = 8, .e = 6, .values_in_keys = true}, 10);
  CHECK_SAYS(refusal([&] { joint.append(k, v, &turn); }), "the values would turn with them");
}

TEST_CASE("contract of stores: append and attend in one call") {
  test::random r(4);
  const tensor q = test::normal(r, dtype::f32, 1, 4, 3, 8), k = test::normal(r, dtype::f32, 1, 2, 3, 8),
               v = test::normal(r, dtype::f32, 1, 2, 3, 6);
  tensor out = test::unwritten(dtype::f32, 1, 4, 3, 6);
  const auto before = out.bytes();
  contiguous_store store(sizes, 4);
  const softmax_attention m{.mask = causal{}};
  const auto says = [&](const softmax_attention& a, const tensor_ref& x, const tensor_ref& y,
                        const sequence_options& o = {}) {
    const std::string said = refusal([&] { prefill(serial, a, x, y, v, out, store, o); });
    CHECK(store.tokens() == 0);
    CHECK(out.bytes() == before);
    return said;
  };
  const std::int32_t cu[] = {0, 3}, positions[] = {1, 2, 3};
  CHECK_SAYS(says({}, q, k), "must be causal");
  CHECK_SAYS(says(m, q.ref().slice(0, 2), k), "q has 2 tokens and k has 3");
  CHECK_SAYS(says(m, q, k, {.cu_q = cu}), "cu_q was given");
  CHECK_SAYS(says(m, q, k, {.positions = positions}), "this mechanism turns nothing");
  std::byte few[10];
  CHECK_SAYS(says(m, q, k, {.workspace = few}), "workspace holds 10 bytes");
  CHECK_SAYS(refusal([&] { step(serial, m, q, k, v, out, store); }), "step takes one token");
  prefill(serial, m, q, k, v, out, store);
  CHECK_SAYS(refusal([&] { prefill(serial, m, q, k, v, out, store); }),
             "the contiguous store holds 3 of at most 4 tokens; 3 more do not fit");
  CHECK(store.tokens() == 3);
}

TEST_CASE("contract of softmax: states in rings and other types, RoPE") {
  const shape s{2, 4, 2, 3, 8, 8, 6, dtype::f32};
  using S = softmax_attention;
  const state_store ring{.kind = state_store::form::ring, .chunk = 2};
  CHECK_SAYS(refusal([&] { S{.mask = causal{}, .store = ring}.make_state(s); }),
             "the mask must say how far back it looks");
  CHECK_SAYS(refusal([&] { S{.mask = window{4}, .store = {.type = dtype::f64}}.make_state(s); }),
             "store.type is f64 for a call of f32");
  CHECK_SAYS(
      refusal([&] { S{.mask = window{4}, .store = {.kind = state_store::form::ring, .chunk = 0}}.make_state(s); }),
      "store.chunk is 0");
  CHECK_SAYS(refusal([&] {
               S{.mask = causal{}}.make_state({1, 2, 1, 0, isize{1} << 58, 64, 64});
             }),
             "is more than memory can be");
  {  // A ring of window 4 and chunk 2 can be cut by one token: then the next one still finds its four keys.
    test::random r(5);
    const tensor q = test::normal(r, dtype::f32, 1, 2, 9, 8), v = test::normal(r, dtype::f32, 1, 2, 9, 6);
    tensor out = test::unwritten(dtype::f32, 1, 2, 9, 6), one = test::unwritten(dtype::f32, 1, 2, 1, 6);
    for (const isize left : {8, 7, 6, 4, 3, 2, 1, 0}) {
      const isize first = left <= 2 ? left : 0;  // tokens that the ring never drops: nothing behind them is needed
      const S m{.mask = window{4, first}, .store = ring};
      state st = m.make_state({1, 2, 2, 9, 0, 8, 6, dtype::f32});
      prefill(serial, m, q, q, v, out, st);
      kv_cache::truncate(st, left);
      const std::string said = refusal(
          [&] { step(serial, m, q.ref().slice(left, 1), q.ref().slice(left, 1), v.ref().slice(left, 1), one, st); });
      CAPTURE(left);
      if (left < 7 && left > first) CHECK_SAYS(said, "the state was truncated to ");
      if (left >= 7 || left <= first) CHECK(said == "accepted");
      if (left > 0 && left <= first) {  // and the token sees what a state that never had the others would show it
        state fresh = m.make_state({1, 2, 2, 9, 0, 8, 6, dtype::f32});
        tensor want = test::unwritten(dtype::f32, 1, 2, 1, 6);
        prefill(serial, m, q.ref().slice(0, left), q.ref().slice(0, left), v.ref().slice(0, left),
                out.ref().slice(0, left), fresh);
        step(serial, m, q.ref().slice(left, 1), q.ref().slice(left, 1), v.ref().slice(left, 1), want, fresh);
        CHECK_SAME_BITS(one, want);
      }
    }
  }
  contract::refuses_what_it_must(contract::streaming_caller_of(S{.mask = window{4}, .store = ring}, true));
  contract::refuses_what_it_must(
      contract::streaming_caller_of(S{.mask = causal{}, .store = {.type = dtype::i8}}, true));
  contract::refuses_foreign_states(S{.mask = window{4, 1}, .store = ring});
  const rope_table table({.width = 8, .positions = 4});
  const rope turn = table;
  contract::refuses_value(S{.turn = &turn}, {"rope has a table of 4 positions", "position 4"});
  rope odd = turn;
  odd.width = 7;
  contract::refuses_value(S{.turn = &odd}, {"rope width is 7"});
  contract::arguments a(3, 5);
  problem p = a.good(false);
  const std::int32_t positions[] = {0, 1, 2, 0, 1, 2};
  const call_options o{.lse = {}, .gates = {}, .workspace = {}, .positions = positions};
  CHECK_SAYS(refusal([&] { prefill(serial, S{}, p.q, p.k, p.v, p.out, o); }), "this mechanism turns nothing");
  CHECK(a.touched() == std::string());
}
