// SPDX-License-Identifier: MIT
/// @file  prefill_packed: each sequence has the bits of a call for it alone, with and without states, for any number of threads.
///        prefill_chunks: the same bits for any number of threads, prefill's numbers to rounding.

#include <fovea/core/chunks.hpp>
#include <fovea/core/packed.hpp>
#include <fovea/dijiang.hpp>
#include <fovea/linear.hpp>
#include <fovea/position/rope_table.hpp>
#include <fovea/softmax.hpp>
#include <fovea/windowed.hpp>

#include "support/catch.hpp"
#include "support/errors.hpp"
#include "support/tensors.hpp"

namespace {

using namespace fovea;
using test::dtype;
using test::tensor;

struct inputs {
  tensor q, k, v, decay, beta;
  inputs(test::random& r, dtype type, isize H, isize G, isize rows, isize d, isize e, test::layout l)
      : q(test::normal(r, type, 1, H, rows, d, l)),
        k(test::normal(r, type, 1, G, rows, d, l, 0.3)),
        v(test::normal(r, type, 1, G, rows, e, l)),
        decay(type, 1, G, rows, 1, l),
        beta(type, 1, G, rows, 1, l) {
    decay.fill([&] { return -r.uniform(); }), beta.fill([&] { return r.uniform(); });
  }
  call_options options(bool gated, isize first, isize count) const {
    call_options o;
    if (gated) o.gates.log_decay = decay.ref().slice(first, count), o.gates.beta = beta.ref().slice(first, count);
    return o;
  }
};

/// Two packed calls with states against each sequence by itself.
template <class M>
void check_states(const M& m, bool gated, dtype type, isize d) {
  test::random r(3);
  const std::vector<std::int32_t> first{0, 5, 5, 70, 71, 200},
      second{0, 1, 2, 3, 4, 5};  // lengths, an empty one; then a step each
  const isize H = 4, G = 2, e = 24, sequences = 5;
  const shape one{1, H, G, 0, 0, d, e, type};
  shape all = one;
  all.B = sequences;
  for (const int threads_in_use : {1, 3, 8}) {  // fewer than sequences, more than sequences
    const threads pool(threads_in_use);
    state together = m.make_state(all);
    std::vector<state> alone(static_cast<std::size_t>(sequences), m.make_state(one));
    for (const auto& cu : {first, second}) {
      const inputs x(r, type, H, G, cu.back(), d, e, test::layout::bnhd);
      tensor got = test::unwritten(type, 1, H, cu.back(), e, test::layout::strided),
             want = test::unwritten(type, 1, H, cu.back(), e);
      prefill_packed(pool, m, x.q, x.k, x.v, got, cu, together, x.options(gated, 0, cu.back()));
      for (std::size_t s = 0; s + 1 < cu.size(); ++s) {
        const isize at = cu[s], n = cu[s + 1] - at;
        if (n > 0)
          prefill(serial, m, x.q.ref().slice(at, n), x.k.ref().slice(at, n), x.v.ref().slice(at, n),
                  want.ref().slice(at, n), alone[s], x.options(gated, at, n));
      }
      CAPTURE(threads_in_use, cu.size());
      CHECK_SAME_BITS(got, want);
      CHECK(got.guards_intact());
    }
    CHECK(together.tokens() == 130);
    const std::size_t bytes = together.bytes() / static_cast<std::size_t>(sequences);
    for (std::size_t s = 0; s < alone.size(); ++s)
      CHECK(std::memcmp(together.as<std::byte>() + s * bytes, alone[s].template as<std::byte>(), bytes) == 0);
  }
}

/// 20 tokens into a state, then 700 in chunks of 200: against one thread, and against prefill.
template <class M>
void check_chunks(const M& m, isize gate_width, dtype type) {
  test::random r(6);
  const isize H = 4, G = 2, d = 16, e = 40, n = 700;
  inputs x(r, type, H, G, 20 + n, d, e, test::layout::bnhd);
  tensor gates(type, 1, G, 20 + n, std::max(gate_width, isize{1}));
  gates.fill([&] { return -r.uniform(0, 0.2); });
  const auto options = [&](isize first, isize count) {
    call_options o;
    if (gate_width > 0) o.gates.log_decay = gates.ref().slice(first, count);
    return o;
  };
  const auto rows = [](auto& t, isize first, isize count) { return t.ref().slice(first, count); };
  tensor want = test::unwritten(type, 1, H, 20 + n, e);
  state plain = m.make_state({.H = H, .G = G, .d = d, .e = e, .type = type});
  prefill(serial, m, rows(x.q, 0, 20), rows(x.k, 0, 20), rows(x.v, 0, 20), rows(want, 0, 20), plain, options(0, 20));
  const state start = plain;
  prefill(serial, m, rows(x.q, 20, n), rows(x.k, 20, n), rows(x.v, 20, n), rows(want, 20, n), plain, options(20, n));
  std::vector<tensor> outs;
  std::vector<state> ends;
  for (const int count : {1, 2, 3}) {
    const threads pool(count);
    tensor out = test::unwritten(type, 1, H, n, e, test::layout::strided);
    state s = start;
    prefill_chunks(pool, m, rows(x.q, 20, n), rows(x.k, 20, n), rows(x.v, 20, n), out, s, 200, options(20, n));
    CHECK(out.guards_intact());
    CHECK(s.tokens() == plain.tokens());
    outs.push_back(std::move(out)), ends.push_back(std::move(s));
    CAPTURE(count);
    CHECK_SAME_BITS(outs.back(), outs.front());
    CHECK(std::memcmp(ends.back().template as<std::byte>(), ends.front().template as<std::byte>(), start.bytes()) == 0);
  }
  const tensor behind = test::rows_of(want, 20, n);
  CHECK_CLOSE(outs.front().values(), behind.values(), {.c = 64});
  if constexpr (requires { m.store_state(plain); }) {
    const auto S = m.store_state(ends.front()), T = m.store_state(plain);
    test::array a{{S.at("S").size()}, {}}, b = a;
    for (isize i = 0; i < S.at("S").size(); ++i) a.data.push_back(S.at("S").at(i)), b.data.push_back(T.at("S").at(i));
    CHECK_CLOSE(a, b, {.c = 64});
  }
}

}  // namespace

TEST_CASE("chunks: any number of threads gives the same bits, the sweep's numbers to rounding") {
  for (const dtype type : {dtype::f32, dtype::f64}) {
    check_chunks(linear_attention{}, 0, type);
    check_chunks(linear_attention{.map = identity_map{}, .normalise = false}, 0, type);
    check_chunks(linear_attention{.rule = rule::decay}, 1, type);
    check_chunks(linear_attention{.rule = rule::gla}, 16, type);
    check_chunks(dijiang_attention::make({.head_dim = 16}), 0, type);
  }
}

TEST_CASE("chunks: what they refuse") {
  test::random r(7);
  const inputs x(r, dtype::f32, 2, 2, 10, 8, 8, test::layout::bhnd);
  tensor out = test::unwritten(dtype::f32, 1, 2, 10, 8);
  const auto refused = [&](const auto& m, isize chunk) {
    state s = m.make_state({.H = 2, .G = 2, .d = 8, .e = 8});
    return test::refusal(
        [&] { prefill_chunks(serial, m, x.q, x.k, x.v, out, s, chunk, x.options(is_delta(m.rule), 0, 10)); });
  };
  CHECK_SAYS(refused(linear_attention{}, 0), "chunk is 0");
  CHECK_SAYS(refused(linear_attention{.rule = rule::gated_delta}, 4), "r x r matrix");
}

TEST_CASE("packed calls: states go on, each sequence as if it were alone") {
  check_states(linear_attention{}, false, dtype::f32, 16);
  check_states(linear_attention{.rule = rule::gated_delta}, true, dtype::bf16, 32);
  check_states(dijiang_attention::make({.head_dim = 16}), false, dtype::f64, 16);
}

TEST_CASE("packed calls: any mechanism, without states") {
  test::random r(4);
  const std::vector<std::int32_t> cu{0, 33, 34, 34, 100};
  const inputs x(r, dtype::f32, 4, 2, cu.back(), 16, 8, test::layout::bhnd);
  const auto check = [&](const auto& m, bool has_lse) {
    tensor got = test::unwritten(dtype::f32, 1, 4, cu.back(), 8), lse = test::unwritten(dtype::f32, 1, 4, cu.back(), 1),
           want = got, want_lse = lse;
    call_options o;
    if (has_lse) o.lse = lse;
    prefill_packed(threads(2), m, x.q, x.k, x.v, got, cu, o);
    for (std::size_t s = 0; s + 1 < cu.size(); ++s) {
      const isize at = cu[s], n = cu[s + 1] - at;
      call_options own;
      if (has_lse) own.lse = want_lse.ref().slice(at, n);
      prefill(serial, m, x.q.ref().slice(at, n), x.k.ref().slice(at, n), x.v.ref().slice(at, n),
              want.ref().slice(at, n), own);
    }
    CAPTURE(m.name);
    CHECK_SAME_BITS(got, want);
    if (has_lse) CHECK_SAME_BITS(lse, want_lse);
  };
  check(softmax_attention{.mask = causal{}}, true);
  check(windowed_attention{.window = 9}, true);
  check(linear_attention{}, false);
}

TEST_CASE("packed calls: positions and skipped mass are those of each sequence") {
  test::random r(8);
  const inputs x(r, dtype::f32, 4, 2, 60, 16, 8, test::layout::bnhd);
  const std::vector<std::int32_t> cu{0, 7, 7, 43, 60};
  const rope_table table({.width = 16, .positions = 200});
  const rope turn = table;
  const softmax_attention m{.mask = causal{}, .turn = &turn, .skip = 0.02F};
  std::vector<std::int32_t> positions(60);
  for (std::size_t i = 0; i < positions.size(); ++i) positions[i] = static_cast<std::int32_t>(3 * i % 97);
  tensor got = test::unwritten(dtype::f32, 1, 4, 60, 8), want = test::unwritten(dtype::f32, 1, 4, 60, 8),
         share = test::unwritten(dtype::f32, 1, 4, 60, 1), want_share = test::unwritten(dtype::f32, 1, 4, 60, 1);
  prefill_packed(threads(2), m, x.q, x.k, x.v, got, cu, {.positions = positions, .skipped = share});
  for (std::size_t i = 0; i + 1 < cu.size(); ++i) {
    const isize at = cu[i], n = cu[i + 1] - at;
    prefill(serial, m, x.q.ref().slice(at, n), x.k.ref().slice(at, n), x.v.ref().slice(at, n), want.ref().slice(at, n),
            {.positions = std::span(positions).subspan(static_cast<std::size_t>(at), static_cast<std::size_t>(n)),
             .skipped = want_share.ref().slice(at, n)});
  }
  CHECK_SAME_BITS(got, want);
  CHECK_SAME_BITS(share, want_share);
}

TEST_CASE("packed calls: what they refuse") {
  test::random r(5);
  const inputs x(r, dtype::f32, 2, 2, 10, 8, 8, test::layout::bhnd);
  tensor out = test::unwritten(dtype::f32, 1, 2, 10, 8);
  const linear_attention m;
  const auto refused = [&](std::vector<std::int32_t> cu) {
    return test::refusal([&] { prefill_packed(serial, m, x.q, x.k, x.v, out, cu); });
  };
  CHECK_SAYS(refused({}), "cu is empty");
  CHECK_SAYS(refused({1, 10}), "does not start at 0");
  CHECK_SAYS(refused({0, 6, 5, 10}), "cu[2] is 5 after 6");
  CHECK_SAYS(refused({0, 6}), "cu ends at 6");
  const std::vector<std::int32_t> two{0, 4, 10};
  const linear_attention gated{.rule = rule::gated_delta};
  CHECK_SAYS(test::refusal([&] { prefill_packed(serial, gated, x.q, x.k, x.v, out, two, x.options(true, 0, 9)); }),
             "log_decay (g) has 9 rows and cu ends at 10");
  tensor both = test::normal(r, dtype::f32, 1, 2, 15, 8, test::layout::bnhd);  // out over the q of the second sequence
  CHECK_SAYS(test::refusal(
                 [&] { prefill_packed(serial, m, both.ref().slice(5, 10), x.k, x.v, both.ref().slice(0, 10), two); }),
             "out overlaps q in memory");
  state s = m.make_state({.B = 3, .H = 2, .G = 2, .d = 8, .e = 8});
  CHECK_SAYS(test::refusal([&] {
               prefill_packed(serial, m, x.q, x.k, x.v, out, std::vector<std::int32_t>{0, 4, 10}, s);
             }),
             "made for 3 items");
}
