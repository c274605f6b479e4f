// SPDX-License-Identifier: MIT
/// @file  Calls over sequences: any lengths, stores and layouts in one call; the same bits as alone, for any threads; no allocation.

#include <fovea/position/rope_table.hpp>

#include "cache/allocations.hpp"
#include "cache/model.hpp"

namespace {

using namespace cache_test;

/// Sequences in stores of all kinds, each with its model.
struct collection {
  std::vector<contiguous_store> contiguous;
  std::vector<ring_store> rings;
  std::vector<paged_pool> pools;
  std::vector<page_table> tables;
  std::vector<kv_sequence> kv;
  std::vector<model> models;

  /// `n` rows of sequence x will be asked for.
  void add(const kv_shape& s, isize tokens, isize n, isize width, isize first, test::random& r) {
    const dtype type = input_type(r, s);
    model m{s, {}, {}};
    const auto fill = [&](auto& store, auto&& view) {
      for (isize at = 0; at < tokens;) {
        const isize count = std::min<isize>(tokens - at, at + n >= tokens ? n : r.integer(1, 40));
        const isize cut = at < tokens - n && at + count > tokens - n ? tokens - n - at : count;
        const tensor k = random_rows(r, type, s.heads, cut, s.d), v = random_rows(r, type, s.heads, cut, s.e);
        store(k, v);
        append_like(m, view(), k, v, {nullptr, 0, nullptr});
        at += cut;
      }
      kv.push_back(view());
    };
    switch (r.integer(0, 2)) {
      case 0: {
        contiguous.emplace_back(s, tokens + r.integer(0, 5));
        contiguous_store& x = contiguous.back();
        const auto store = [&](const tensor& k, const tensor& v) { x.append(k, v); };
        fill(store, [&] { return x.view(); });
        break;
      }
      case 1: {
        rings.emplace_back(s, ring_size{width, first, std::max<isize>(1, n)});
        ring_store& x = rings.back();
        const auto store = [&](const tensor& k, const tensor& v) { x.append(k, v); };
        fill(store, [&] { return x.view(); });
        break;
      }
      default: {
        constexpr isize sizes[] = {1, 2, 3, 16, 64};
        const isize page = page_for(s, sizes[r.integer(0, 4)]);
        pools.emplace_back(s, page, ceil_div(tokens, page) + 3);
        tables.emplace_back();
        paged_pool& x = pools.back();
        page_table& t = tables.back();
        const auto store = [&](const tensor& k, const tensor& v) { x.append(t, k, v); };
        fill(store, [&] { return x.view(t); });
      }
    }
    models.push_back(std::move(m));
  }
  collection() { contiguous.reserve(64), rings.reserve(64), pools.reserve(64), tables.reserve(64); }
};

const executor backwards(4, [](isize n, auto&& f) {
  for (isize i = n - 1; i >= 0; --i) f(i);
});

struct answer {
  tensor out, lse;
  answer(dtype type, isize heads, isize n, isize e)
      : out(test::unwritten(type, 1, heads, n, e, test::layout::strided)),
        lse(test::unwritten(type == dtype::f64 ? dtype::f64 : dtype::f32, 1, heads, n, 1)) {}
};

}  // namespace

TEST_CASE(
    "sequences: prefill and decoding of all stores in one call, as the twin says, as each alone, for any threads") {
  const threads two(2), three(3);
  for (std::uint64_t seed = 1; seed <= 40; ++seed) {
    test::random r(seed);
    kv_shape s = random_kv_shape(r);
    const isize width = r.integer(1, 60), first = r.coin() ? 0 : r.integer(1, 5), group = r.integer(1, 4);
    softmax_attention m{.mask = window{width, first}};
    std::vector<float> slopes(static_cast<std::size_t>(s.heads * group), 0.03F), sinks(slopes.size(), 0.5F);
    if (r.coin(0.3)) m.score = alibi{slopes.data()};
    if (r.coin(0.3)) m.score = softcap{3.0};
    if (r.coin(0.3)) m.sinks = sinks.data();
    const dtype type = input_type(r, s);
    collection all;
    std::vector<std::int32_t> cu{0};
    const isize count = r.integer(1, 7);
    for (isize x = 0; x < count; ++x) {
      const isize tokens = r.coin(0.1) ? 0 : r.integer(1, 220), n = std::min(tokens, r.coin()      ? isize{1}
                                                                                     : r.coin(0.2) ? isize{0}
                                                                                                   : r.integer(1, 90));
      if (type != dtype::f64 && s.type != dtype::f64) {  // the stores of one call may differ in type
        constexpr dtype types[] = {dtype::f32, dtype::bf16, dtype::f16, dtype::i8};
        s.type = types[r.integer(0, 3)];
        s = as_allowed(s);
      }
      all.add(s, tokens, n, width, first, r);
      cu.push_back(static_cast<std::int32_t>(cu.back() + n));
    }
    CAPTURE(seed, s.heads, s.d, s.e, group, width, first, count);
    const isize H = s.heads * group, total = cu.back();
    const tensor q = random_rows(r, type, H, total, s.d);
    answer one(type, H, total, s.e);
    prefill(serial, m, q, all.kv, one.out, {.lse = one.lse, .cu_q = cu});
    CHECK(one.out.guards_intact());
    CHECK(one.lse.guards_intact());
    for (const exec_ref exec : {exec_ref(two), exec_ref(three), exec_ref(backwards)}) {
      answer other(type, H, total, s.e);
      prefill(exec, m, q, all.kv, other.out, {.lse = other.lse, .cu_q = cu});
      CHECK_SAME_BITS(one.out, other.out);
      CHECK_SAME_BITS(one.lse, other.lse);
    }
    for (isize x = 0; x < count; ++x) {
      const auto at = static_cast<std::size_t>(x);
      const isize n = cu[at + 1] - cu[at];
      if (n == 0) continue;
      const tensor rows = test::rows_of(q, cu[at], n);
      answer alone(type, H, n, s.e);
      prefill(serial, m, rows, {&all.kv[at], 1}, alone.out, {.lse = alone.lse});
      CHECK_SAME_BITS(alone.out, test::rows_of(one.out, cu[at], n));
      CHECK_SAME_BITS(alone.lse, test::rows_of(one.lse, cu[at], n));
      const wanted want = twin(m, all.models[at], rows);
      const dtype acc = type == dtype::f64 ? dtype::f64 : dtype::f32;
      CAPTURE(x, n, all.kv[at].length, all.kv[at].dropped);
      CHECK_CLOSE(alone.out.values(), want.out.values(), {.c = 128, .acc = acc, .stored = type});
      CHECK_CLOSE(alone.lse.values(), want.lse.values(), {.c = 128, .acc = acc, .scale = 4});
    }
  }
}

TEST_CASE("sequences: a batch of B items is its items, a call with its workspace allocates nothing") {
  test::random r(7);
  const kv_shape s{.heads = 2, .d = 40, .e = 24, .type = dtype::bf16};
  collection all;
  const isize lengths[] = {1, 5000, 33, 700};
  for (const isize tokens : lengths) all.add(s, tokens, 1, 100000, 0, r);
  const softmax_attention m{.mask = causal{}};
  const tensor q = test::normal(r, dtype::f32, 4, 6, 1, 40);
  tensor out = test::unwritten(dtype::f32, 4, 6, 1, 24), again = test::unwritten(dtype::f32, 4, 6, 1, 24);
  step(serial, m, q, all.kv, out);
  const threads two(2);
  for (const exec_ref exec : {exec_ref(serial), exec_ref(two)}) {
    const std::size_t need = workspace_size(m, q, all.kv, exec.concurrency());
    buffer memory(need + 3);
    std::memset(memory.data(), 0xff, memory.size());
    step(exec, m, q, all.kv, again, {.workspace = memory.span().first(need)});  // threads start their own first time
    const long before = cache_test::allocations();
    step(exec, m, q, all.kv, again, {.workspace = memory.span().first(need)});
    CHECK(cache_test::allocations() == before);
    CHECK_SAME_BITS(out, again);
    for (std::size_t x = need; x < memory.size(); ++x) CHECK(memory.data()[x] == std::byte{0xff});
  }
  for (isize b = 0; b < 4; ++b) {
    tensor alone = test::unwritten(dtype::f32, 1, 6, 1, 24), row(dtype::f32, 1, 6, 1, 40);
    for (isize h = 0; h < 6; ++h)
      for (isize c = 0; c < 40; ++c) row.set(0, h, 0, c, q.get(b, h, 0, c));
    step(serial, m, row, {&all.kv[static_cast<std::size_t>(b)], 1}, alone);
    for (isize h = 0; h < 6; ++h)
      for (isize c = 0; c < 24; ++c) CHECK(alone.get(0, h, 0, c) == out.get(b, h, 0, c));
  }
  // Views, a state's step and a store's step, each with memory of their own.
  const shape one{2, 6, 2, 1, 300, 40, 24, dtype::f32};
  state st = m.make_state(one);
  st.set_tokens(299);
  const tensor nq = test::normal(r, dtype::f32, 2, 6, 1, 40), nk = test::normal(r, dtype::f32, 2, 2, 1, 40),
               nv = test::normal(r, dtype::f32, 2, 2, 1, 24);
  tensor no = test::unwritten(dtype::f32, 2, 6, 1, 24);
  buffer memory(m.workspace_size(one, 1));
  const long before = cache_test::allocations();
  step(serial, m, nq, nk, nv, no, st, {.lse = {}, .gates = {}, .workspace = memory.span()});
  CHECK(cache_test::allocations() == before);
}

TEST_CASE("sequences: memory of an engine's own, in any order") {
  test::random r(11);
  constexpr isize G = 2, d = 32, e = 16, tokens = 50, page = 8, pages = 9;
  const kv_shape s{.heads = G, .d = d, .e = e, .type = dtype::f32};
  const tensor k = test::normal(r, dtype::f32, 1, G, tokens, d, test::layout::bnhd),
               v = test::normal(r, dtype::f32, 1, G, tokens, e, test::layout::strided),
               q = test::normal(r, dtype::f32, 1, 4, 5, d);
  const softmax_attention m{.mask = causal{}};
  tensor want = test::unwritten(dtype::f32, 1, 4, 5, e);
  prefill(serial, m, q, k, v, want);
  const auto gives = [&](const kv_sequence& x) {
    tensor out = test::unwritten(dtype::f32, 1, 4, 5, e);
    prefill(serial, m, q, {&x, 1}, out);
    return test::bits_differ(out, want);
  };
  CHECK(gives(sequence_of(k, v)) == std::string());

  const std::int32_t table[] = {7, 2, 0, 8, 3, 5, 1};
  const auto put = [&](std::vector<float>& to, const tensor& from, isize width, isize base, isize page_step,
                       isize head_step, isize row_step) {
    for (isize g = 0; g < G; ++g)
      for (isize j = 0; j < tokens; ++j)
        for (isize c = 0; c < width; ++c)
          to[static_cast<std::size_t>(base + table[j / page] * page_step + g * head_step + j % page * row_step + c)] =
              static_cast<float>(from.get(0, g, j, c));
  };
  const isize f = sizeof(float);
  SECTION("[pages, heads, page, width], k and v apart") {
    std::vector<float> a(pages * G * page * d), b(pages * G * page * e);
    put(a, k, d, 0, G * page * d, page * d, d), put(b, v, e, 0, G * page * e, page * e, e);
    CHECK(gives(paged_sequence(s, row_memory::heads_first(a.data(), s, page, d),
                               row_memory::heads_first(b.data(), s, page, e), page, table, tokens)) == std::string());
  }
  SECTION("[pages, page, heads, width], k and v in one page") {
    const isize step = page * G * (d + e);
    std::vector<float> a(static_cast<std::size_t>(pages * step));
    put(a, k, d, 0, step, d, G * d), put(a, v, e, page * G * d, step, e, G * e);
    const row_memory keys{a.data(), step * f, d * f, G * d * f},
        values{a.data() + page * G * d, step * f, e * f, G * e * f};
    CHECK(gives(paged_sequence(s, keys, values, page, table, tokens)) == std::string());
  }
  SECTION("a ring of 40 behind 3 first tokens") {
    constexpr isize first = 3, size = 40, slots = first + size;
    std::vector<float> a(slots * G * d), b(slots * G * e);
    for (isize g = 0; g < G; ++g)
      for (isize j = 0; j < tokens; ++j) {
        const isize slot = j < first ? j : first + (j - first) % size;
        for (isize c = 0; c < d; ++c)
          a[static_cast<std::size_t>((g * slots + slot) * d + c)] = static_cast<float>(k.get(0, g, j, c));
        for (isize c = 0; c < e; ++c)
          b[static_cast<std::size_t>((g * slots + slot) * e + c)] = static_cast<float>(v.get(0, g, j, c));
      }
    const softmax_attention w{.mask = window{30, 3}};
    prefill(serial, w, q, k, v, want);
    tensor out = test::unwritten(dtype::f32, 1, 4, 5, e);
    const kv_sequence x = ring_sequence(s, row_memory::heads_first(a.data(), s, slots, d),
                                        row_memory::heads_first(b.data(), s, slots, e), first, size, tokens);
    CHECK(x.dropped == tokens - slots);
    prefill(serial, w, q, {&x, 1}, out);
    CHECK_CLOSE(out.values(), want.values(), {.c = 32});
  }
}

TEST_CASE("sequences: long caches are split over the keys, for few rows and for many") {
  const threads two(2);
  for (const dtype type : {dtype::f32, dtype::f16, dtype::i8}) {
    test::random r(static_cast<std::uint64_t>(type) + 20);
    const kv_shape s{.heads = 2, .d = 24, .e = 40, .type = type, .scale = scale_per::group};
    paged_pool pool(s, 16, 700);
    page_table table;
    model m{s, {}, {}};
    const tensor k = random_rows(r, dtype::f32, 2, 9001, 24), v = random_rows(r, dtype::f32, 2, 9001, 40);
    pool.append(table, k, v);
    append_like(m, pool.view(table), k, v, {nullptr, 0, nullptr});
    const kv_sequence x = pool.view(table);
    const float sinks[] = {0.5F, 3.0F, -1.0F, 2.0F, 0.0F, 9.0F};
    for (const isize n : {1, 2, 12}) {
      CAPTURE(n, fovea::name_of(type));
      const softmax_attention a{.mask = causal{}, .sinks = sinks};
      const tensor q = random_rows(r, dtype::f32, 6, n, 24);
      answer one(dtype::f32, 6, n, 40), other(dtype::f32, 6, n, 40);
      prefill(serial, a, q, {&x, 1}, one.out, {.lse = one.lse});
      prefill(two, a, q, {&x, 1}, other.out, {.lse = other.lse});
      CHECK_SAME_BITS(one.out, other.out);
      CHECK_SAME_BITS(one.lse, other.lse);
      const wanted want = twin(a, m, q);
      CHECK_CLOSE(one.out.values(), want.out.values(), {.c = 128});
      CHECK_CLOSE(one.lse.values(), want.lse.values(), {.c = 128, .scale = 4});
    }
  }
}

TEST_CASE("prefill and step of one store are those of a state and of the twin, with RoPE and positions") {
  for (std::uint64_t seed = 1; seed <= 24; ++seed) {
    test::random r(seed);
    kv_shape s{.heads = r.integer(1, 2),
               .d = 2 * r.integer(1, 20),
               .e = r.integer(1, 40),
               .type = seed % 2 != 0 ? dtype::f32 : dtype::f64};
    const dtype type = s.type;
    const isize total = r.integer(2, 120), width = r.integer(1, 40), first = r.integer(0, 4), chunk = r.integer(1, 20);
    const rope_table table({.width = 2 * r.integer(1, s.d / 2), .positions = 700, .f64 = true});
    const rope turn = table;
    const softmax_attention m{.mask = window{width, first}, .turn = r.coin() ? &turn : nullptr};
    const isize H = s.heads * r.integer(1, 3);
    const tensor q = random_rows(r, type, H, total, s.d), k = random_rows(r, type, s.heads, total, s.d),
                 v = random_rows(r, type, s.heads, total, s.e);
    std::vector<std::int32_t> positions;
    const bool given = m.turn != nullptr && r.coin();
    for (isize i = 0; given && i < total; ++i) positions.push_back(static_cast<std::int32_t>(3 * i + r.integer(0, 2)));
    tensor want = test::unwritten(dtype::f64, 1, H, total, s.e), want_lse = test::unwritten(dtype::f64, 1, H, total, 1);
    fovea::reference::prefill(m, {q, k, v, want, want_lse, {}, given ? positions.data() : nullptr});
    CAPTURE(seed, total, width, first, chunk, given);
    const dtype acc = type == dtype::f64 ? dtype::f64 : dtype::f32;
    const auto runs = [&](auto&& store) {
      test::random cuts(seed);
      tensor out = test::unwritten(type, 1, H, total, s.e), lse = test::unwritten(acc, 1, H, total, 1);
      for (isize at = 0; at < total;) {
        const isize n = cuts.coin() ? 1 : cuts.integer(1, total - at);
        const auto rows = [&](const tensor& t) { return t.ref().slice(at, n); };
        const std::span<const std::int32_t> own = given ? std::span<const std::int32_t>(positions).subspan(
                                                              static_cast<std::size_t>(at), static_cast<std::size_t>(n))
                                                        : std::span<const std::int32_t>();
        const sequence_options o{.lse = lse.ref().slice(at, n), .positions = own};
        if (n == 1)
          step(serial, m, rows(q), rows(k), rows(v), out.ref().slice(at, n), store, o);
        else
          prefill(serial, m, rows(q), rows(k), rows(v), out.ref().slice(at, n), store, o);
        at += n;
      }
      CHECK(store.tokens() == total);
      CHECK_CLOSE(out.values(), want.values(), {.c = 128, .acc = acc});
      CHECK_CLOSE(lse.values(), want_lse.values(), {.c = 128, .acc = acc, .scale = 4});
    };
    runs(contiguous_store(s, total));
    runs(ring_store(s, {width, first, chunk}));
    paged_pool pool(s, 16, ceil_div(total, 16));
    page_table pages;
    runs(pooled_sequence(pool, pages));
    // A plain call and a call with a state, with the same positions.
    tensor out = test::unwritten(type, 1, H, total, s.e);
    const call_options o{.lse = {}, .gates = {}, .workspace = {}, .positions = positions};
    prefill(serial, m, q, k, v, out, o);
    CHECK_CLOSE(out.values(), want.values(), {.c = 128, .acc = acc});
    state st = m.make_state({1, H, s.heads, total, total, s.d, s.e, type});
    out = test::unwritten(type, 1, H, total, s.e);
    prefill(serial, m, q, k, v, out, st, o);
    CHECK_CLOSE(out.values(), want.values(), {.c = 128, .acc = acc});
  }
}

TEST_CASE("a shifted store goes on as if the dropped tokens had never been") {
  test::random r(3);
  const kv_shape s{.heads = 2, .d = 32, .e = 32, .type = dtype::f32};
  const rope_table table({.width = 32, .positions = 300});
  const rope turn = table;
  const softmax_attention m{.mask = causal{}, .turn = &turn};
  const tensor k = random_rows(r, dtype::f32, 2, 100, 32), v = random_rows(r, dtype::f32, 2, 100, 32),
               q = random_rows(r, dtype::f32, 4, 1, 32);
  contiguous_store shifted(s, 100), fresh(s, 100);
  shifted.append(k, v, &turn);
  shifted.shift(37, 4, &turn);
  fresh.append(k.ref().slice(0, 4), v.ref().slice(0, 4), &turn);
  fresh.append(k.ref().slice(41, 59), v.ref().slice(41, 59), &turn);
  const kv_sequence a = shifted.view(), b = fresh.view();
  tensor x = test::unwritten(dtype::f32, 1, 4, 1, 32), y = test::unwritten(dtype::f32, 1, 4, 1, 32);
  step(serial, m, q, {&a, 1}, x), step(serial, m, q, {&b, 1}, y);
  CHECK_CLOSE(x.values(), y.values(), {.c = 128});
}

TEST_CASE("shared prefix: once for all, then merged by LSE") {
  // Rows of all sequences over the prefix, each over its own rest, joined by merge_normalised: what the whole gives.
  test::random r(9);
  const kv_shape s{.heads = 1, .d = 16, .e = 16, .type = dtype::f32};
  contiguous_store prefix(s, 64);
  prefix.append(random_rows(r, dtype::f32, 1, 64, 16), random_rows(r, dtype::f32, 1, 64, 16));
  const tensor q = random_rows(r, dtype::f32, 2, 3, 16);
  tensor out = test::unwritten(dtype::f32, 1, 2, 3, 16), lse = test::unwritten(dtype::f32, 1, 2, 3, 1);
  const kv_sequence p = prefix.view();
  prefill(serial, {}, q, {&p, 1}, out, {.lse = lse});
  for (isize x = 0; x < 3; ++x) {
    const tensor k = random_rows(r, dtype::f32, 1, 5, 16), v = random_rows(r, dtype::f32, 1, 5, 16),
                 row = test::rows_of(q, x, 1);
    const kv_sequence rest = sequence_of(k, v);
    tensor o = test::unwritten(dtype::f32, 1, 2, 1, 16), l = test::unwritten(dtype::f32, 1, 2, 1, 1),
           want = test::unwritten(dtype::f32, 1, 2, 1, 16);
    prefill(serial, {}, row, {&rest, 1}, o, {.lse = l});
    for (isize h = 0; h < 2; ++h) {
      auto* to = static_cast<float*>(o.ref().row(0, h, 0));
      merge_normalised(to, *static_cast<float*>(l.ref().row(0, h, 0)),
                       static_cast<const float*>(out.ref().row(0, h, x)),
                       *static_cast<const float*>(lse.ref().row(0, h, x)), 16);
    }
    contiguous_store whole = prefix;
    whole = contiguous_store(s, 69);
    for (isize j = 0; j < 64; ++j) {
      tensor kr(dtype::f32, 1, 1, 1, 16), vr(dtype::f32, 1, 1, 1, 16);
      const auto a = read_row(p.keys(0), j, 16), b = read_row(p.values(0), j, 16);
      for (isize c = 0; c < 16; ++c)
        kr.set(0, 0, 0, c, a[static_cast<std::size_t>(c)]), vr.set(0, 0, 0, c, b[static_cast<std::size_t>(c)]);
      whole.append(kr, vr);
    }
    whole.append(k, v);
    const kv_sequence w = whole.view();
    prefill(serial, {}, row, {&w, 1}, want);
    CHECK_CLOSE(o.values(), want.values(), {.c = 32});
  }
}
