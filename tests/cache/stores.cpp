// SPDX-License-Identifier: MIT
/// @file  Random lives of stores against the model: append, fork, truncate, shift, save and restore, attend; from a seed.

#include <fovea/position/rope_table.hpp>

#include "cache/model.hpp"

namespace {

using namespace cache_test;

/// A rope for half of the seeds.
struct turning {
  std::optional<rope_table> table;
  rope turn{};
  const rope* use = nullptr;
  turning(test::random& r, const kv_shape& s) {
    if (r.coin()) return;
    table.emplace(rope_options{.width = 2 * r.integer(1, s.d / 2),
                               .positions = 600,
                               .pair = r.coin() ? rope::pairing::neox : rope::pairing::gptj,
                               .f64 = true});
    turn = *table, use = &turn;
  }
};

template <class Store>
struct life {
  Store store;
  model m;
};

template <class Store>
void append(life<Store>& x, isize n, const turning& t, test::random& r) {
  const dtype type = input_type(r, x.m.s);
  const tensor k = random_rows(r, type, x.m.s.heads, n, x.m.s.d), v = random_rows(r, type, x.m.s.heads, n, x.m.s.e);
  const key_positions at{t.use, x.store.tokens(), nullptr};
  x.store.append(k, v, t.use);
  append_like(x.m, x.store.view(), k, v, at);
}

}  // namespace

TEST_CASE("contiguous_store: random lives agree with the model") {
  for (std::uint64_t seed = 1; seed <= 60; ++seed) {
    test::random r(seed);
    const kv_shape s = random_kv_shape(r);
    const turning t(r, s);
    std::vector<life<contiguous_store>> all;
    all.reserve(64);  // forks are added while one is in hand
    all.push_back({contiguous_store(s, r.integer(10, 120)), {s, {}, {}}});
    CAPTURE(seed, s.heads, s.d, s.e, fovea::name_of(s.type));
    for (int turn = 0; turn < 25; ++turn) {
      auto& x = all[static_cast<std::size_t>(r.integer(0, static_cast<isize>(all.size()) - 1))];
      const isize room = x.store.capacity() - x.store.tokens(), tokens = x.store.tokens();
      switch (r.integer(0, 6)) {
        case 0:
        case 1: append(x, r.integer(0, std::min<isize>(room, 20)), t, r); break;
        case 2: all.push_back(x); break;
        case 3: {
          const isize left = r.integer(0, tokens);
          x.store.truncate(left), x.m.truncate(left);
          break;
        }
        case 4: {
          const isize keep = r.integer(0, tokens), count = r.integer(0, tokens - keep);
          x.store.shift(count, keep, t.use);
          x.m.erase(keep, count);
          if (t.use != nullptr && count > 0) turn_back_like(x.m, x.store.view(), keep, t.turn, count);
          break;
        }
        case 5: x.store = contiguous_store::restore(x.store.save()); break;
        default:
          if (tokens > 0)
            attends({.mask = causal{}}, x.store.view(), x.m, r.integer(1, std::min<isize>(tokens, 12)), r);
      }
      for (const auto& y : all) REQUIRE(differs(y.store.view(), y.m) == std::string());
    }
  }
}

TEST_CASE("ring_store: random lives agree with a store of all tokens") {
  for (std::uint64_t seed = 1; seed <= 80; ++seed) {
    test::random r(seed);
    const kv_shape s = random_kv_shape(r);
    const turning t(r, s);
    const ring_size size{r.integer(1, 20), r.coin() ? r.integer(0, 6) : 0, r.integer(1, 12)};
    std::vector<life<ring_store>> all;
    all.reserve(64);
    all.push_back({ring_store(s, size), {s, {}, {}}});
    const std::size_t bytes = all[0].store.bytes();
    const softmax_attention a{.mask = window{size.window, size.first}};
    CAPTURE(seed, s.heads, s.d, s.e, fovea::name_of(s.type), size.window, size.first, size.chunk);
    for (int turn = 0; turn < 40; ++turn) {
      auto& x = all[static_cast<std::size_t>(r.integer(0, static_cast<isize>(all.size()) - 1))];
      const isize tokens = x.store.tokens();
      switch (r.integer(0, 7)) {
        case 0:
        case 1:
        case 2: {
          const isize n = r.coin(0.1) ? r.integer(0, 60) : r.integer(0, size.chunk);
          append(x, n, t, r);
          // Attended as if every token were there, in chunks of up to `chunk`.
          if (n > 0 && n <= size.chunk) attends(a, x.store.view(), x.m, n, r);
          break;
        }
        case 3:
          if (all.size() < 4) all.push_back(x);
          break;
        case 4: {  // allowed exactly as far as the next token finds what it sees
          const isize left = r.integer(std::max<isize>(0, tokens - size.chunk - 2), tokens);
          const kv_sequence held = x.store.view();
          bool can = held.dropped == 0 || left <= size.first;
          if (!can) can = left + 1 - size.window >= held.kept + held.dropped;
          const std::string said = test::refusal([&] { x.store.truncate(left); });
          CHECK((said == "accepted") == can);
          if (said == "accepted")
            x.m.truncate(left);
          else
            CHECK_SAYS(said, "a larger chunk lets it go back further");
          break;
        }
        case 5: {
          if (tokens <= size.first) break;
          const isize count = r.integer(0, std::min<isize>(tokens - size.first, 300));
          x.store.shift(count, t.use);
          x.m.erase(size.first, count);
          if (t.use != nullptr && count > 0) turn_back_like(x.m, x.store.view(), size.first, t.turn, count);
          break;
        }
        case 6: x.store = ring_store::restore(x.store.save()); break;
        default: {  // after a truncation the last token itself may miss a key: the next one does not
          const kv_sequence held = x.store.view();
          if (tokens > 0 && (held.dropped == 0 || tokens - size.window >= held.kept + held.dropped))
            attends(a, held, x.m, 1, r);
        }
      }
      for (const auto& y : all) {
        REQUIRE(differs(y.store.view(), y.m) == std::string());
        CHECK(y.store.bytes() == bytes);
        CHECK(y.store.view().length <= size.first + size.window + size.chunk - 1);
      }
      if (x.m.tokens() > 400) break;  // the rope's table ends
    }
  }
}

TEST_CASE("paged_pool: random lives of sequences that share pages agree with the model") {
  constexpr isize pages_of[] = {1, 2, 3, 16, 64};
  for (std::uint64_t seed = 1; seed <= 60; ++seed) {
    test::random r(seed);
    const kv_shape s = random_kv_shape(r);
    const turning t(r, s);
    const isize page = page_for(s, pages_of[seed % 5]);
    paged_pool pool(s, page, ceil_div(r.integer(40, 300), page));
    struct sequence {
      page_table table;
      model m;
    };
    std::vector<sequence> all(1);
    all.reserve(64);
    all[0].m.s = s;
    CAPTURE(seed, s.heads, s.d, s.e, fovea::name_of(s.type), page, pool.pages());
    const auto agree = [&] {
      isize used = 0, named = 0;
      for (isize x = 0; x < pool.pages(); ++x) used += pool.references(x) > 0 ? 1 : 0, named += pool.references(x);
      CHECK(used == pool.pages() - pool.free_pages());
      for (const sequence& y : all) {
        named -= static_cast<isize>(y.table.pages.size());
        CHECK(static_cast<isize>(y.table.pages.size()) == ceil_div(y.table.tokens, page));
        REQUIRE(differs(pool.view(y.table), y.m) == std::string());
      }
      CHECK(named == 0);
    };
    for (int turn = 0; turn < 40; ++turn) {
      sequence& x = all[static_cast<std::size_t>(r.integer(0, static_cast<isize>(all.size()) - 1))];
      const isize tokens = x.table.tokens;
      switch (r.integer(0, 8)) {
        case 0:
        case 1:
        case 2: {
          const isize n = r.integer(0, 30), need = pool.pages_for(x.table, n);
          const dtype type = input_type(r, s);
          const tensor k = random_rows(r, type, s.heads, n, s.d), v = random_rows(r, type, s.heads, n, s.e);
          const key_positions at{t.use, tokens, nullptr};
          const isize free = pool.free_pages();
          const std::string said = test::refusal([&] { pool.append(x.table, k, v, t.use); });
          CHECK((said == "accepted") == (need <= free));
          if (said == "accepted") {
            CHECK(pool.free_pages() == free - need);
            append_like(x.m, pool.view(x.table), k, v, at);
          } else {
            CHECK_SAYS(said, "are free");
            CHECK(pool.free_pages() == free);
          }
          break;
        }
        case 3:
          if (all.size() < 6) {
            const isize free = pool.free_pages();
            model copy = x.m;
            page_table table = pool.fork(x.table);
            all.push_back({std::move(table), std::move(copy)});
            CHECK(pool.free_pages() == free);
          }
          break;
        case 4: {
          const isize left = r.integer(0, tokens);
          pool.truncate(x.table, left), x.m.truncate(left);
          break;
        }
        case 5: {
          isize keep = r.integer(0, tokens), count = r.integer(0, tokens - keep);
          if (r.coin()) keep = keep / page * page, count = count / page * page;
          const isize free = pool.free_pages();
          const std::string said = test::refusal([&] { pool.shift(x.table, count, keep, t.use); });
          if (said != "accepted") {
            CHECK_SAYS(said, "shift by");
            CHECK(pool.free_pages() == free);
            break;
          }
          x.m.erase(keep, count);
          if (t.use != nullptr && count > 0) turn_back_like(x.m, pool.view(x.table), keep, t.turn, count);
          break;
        }
        case 6: {
          std::vector<page_table*> tables;
          for (sequence& y : all) tables.push_back(&y.table);
          pool.defragment(tables);
          for (isize p = 0; p < pool.pages() - pool.free_pages(); ++p) CHECK(pool.references(p) > 0);
          break;
        }
        case 7: {
          std::vector<const page_table*> tables;
          for (sequence& y : all) tables.push_back(&y.table);
          auto back = paged_pool::restore(pool.save(tables));
          REQUIRE(back.tables.size() == all.size());
          pool = std::move(back.pool);
          for (std::size_t y = 0; y < all.size(); ++y) all[y].table = std::move(back.tables[y]);
          break;
        }
        default:
          if (tokens > 0)
            attends({.mask = causal{}}, pool.view(x.table), x.m, r.integer(1, std::min<isize>(tokens, 12)), r);
      }
      agree();
    }
    for (sequence& y : all) pool.release(y.table), y.m.truncate(0);
    agree();
    CHECK(pool.free_pages() == pool.pages());
  }
}

TEST_CASE("values that lie in the keys: one row serves both") {
  test::random r(5);
  for (const dtype type : {dtype::f32, dtype::bf16, dtype::i8}) {
    const kv_shape s{.heads = 1, .d = 72, .e = 64, .type = type, .scale = scale_per::group, .values_in_keys = true};
    kv_shape apart = s;
    apart.values_in_keys = false;
    contiguous_store one(s, 40), two(apart, 40);
    CHECK(one.bytes() < two.bytes());
    const tensor k = test::normal(r, dtype::f32, 1, 1, 40, 72);
    tensor_ref v = k.ref();
    v.width = 64;
    one.append(k, v), two.append(k, v);
    const tensor q = test::normal(r, dtype::f32, 1, 16, 3, 72);
    tensor a = test::unwritten(dtype::f32, 1, 16, 3, 64), b = test::unwritten(dtype::f32, 1, 16, 3, 64);
    const kv_sequence x = one.view(), y = two.view();
    prefill(serial, {.mask = causal{}}, q, {&x, 1}, a);
    prefill(serial, {.mask = causal{}}, q, {&y, 1}, b);
    CHECK_SAME_BITS(a, b);
    paged_pool pool(s, 3, 20);
    page_table pages;
    pool.append(pages, k, v);
    for (const isize n : {1, 3}) {  // one query, and a tile of them, over short pages
      const tensor rows = test::normal(r, dtype::f32, 1, 2, n, 72);
      tensor in_pages = test::unwritten(dtype::f32, 1, 2, n, 64), in_one = test::unwritten(dtype::f32, 1, 2, n, 64);
      const kv_sequence p = pool.view(pages);
      prefill(serial, {.mask = causal{}}, rows, {&p, 1}, in_pages);
      prefill(serial, {.mask = causal{}}, rows, {&x, 1}, in_one);
      CHECK_CLOSE(in_pages.values(), in_one.values(), {.c = 32});
    }
    one = contiguous_store::restore(one.save());
    const kv_sequence z = one.view();
    prefill(serial, {.mask = causal{}}, q, {&z, 1}, b);
    CHECK_SAME_BITS(a, b);
  }
}
