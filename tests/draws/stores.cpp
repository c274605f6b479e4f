// SPDX-License-Identifier: MIT
/// @file  Draws over states and KV stores: the rows that lie there are compared with those that came, then attended over.

#include "draws/problem.hpp"

namespace draws {
namespace {

std::size_t index(isize x) { return static_cast<std::size_t>(x); }

/// Row j of a head, as a reader sees it.
std::vector<double> read_row(const row_source& rows, isize j, isize width) {
  const stretch at = rows.at(j);
  std::vector<double> x(index(width));
  for (isize c = 0; c < width; ++c) {
    const double scale =
        rows.type != dtype::i8 ? 1.0 : static_cast<double>(at.scales[rows.scale_row == 1 ? 0 : c / scale_group]);
    x[index(c)] = load_as_double(rows.type, at.data, c) * scale;
  }
  return x;
}

/// Keys and values of one item as a store of the draw has to hold them, in double. Int8 rows are those of a store that nothing else
/// happens to, as far as they are near enough to what came.
struct item_rows {
  test::tensor keys, values;

  item_rows(const problem_of_draw& p, isize b)
      : keys(dtype::f64, 1, p.d.G, p.tokens(b), p.d.d), values(dtype::f64, 1, p.d.G, p.tokens(b), p.d.e) {
    const draw& d = p.d;
    const isize all = p.tokens(b);
    contiguous_store mirror({.heads = d.G, .d = d.d, .e = d.e, .type = d.rows, .scale = d.scale_of}, all);
    if (d.rows == dtype::i8)
      mirror.append(p.tensor_of({&p.k[index(b)]}, 0, all), p.tensor_of({&p.v[index(b)]}, 0, all),
                    {p.turn(), 0, p.at[index(b)].data()});
    const kv_sequence x = mirror.view();
    for (isize g = 0; g < d.G; ++g)
      for (isize j = 0; j < all; ++j) {
        auto key = p.stored_key(b, g, j, d.rows), value = p.stored_value(b, g, j, d.rows);
        if (d.rows == dtype::i8) {
          const bool bad = p.poisoned[index(b)][index(g * all + j)] != 0;
          key = near(d, read_row(x.keys(g), j, d.d), key, bad);
          value = near(d, read_row(x.values(g), j, d.e), value, bad);
        }
        for (isize c = 0; c < d.d; ++c) keys.set(0, g, j, c, key[index(c)]);
        for (isize c = 0; c < d.e; ++c) values.set(0, g, j, c, value[index(c)]);
      }
  }

  /// The first `tokens` tokens lie in the store, bit by bit, but for those that it has dropped.
  void check(const kv_sequence& x, isize tokens) const {
    demand(x.tokens() == tokens, "the store counts ", x.tokens(), " tokens; it was given ", tokens);
    for (isize g = 0; g < keys.heads(); ++g)
      for (isize row = 0; row < x.length; ++row) {
        const isize j = row < x.kept ? row : row + x.dropped;
        same(keys, g, j, read_row(x.keys(g), row, x.d)), same(values, g, j, read_row(x.values(g), row, x.e));
      }
  }

 private:
  static std::vector<double> near(const draw& d, const std::vector<double>& got, const std::vector<double>& want,
                                  bool bad) {
    const auto width = static_cast<isize>(got.size());
    for (isize c = 0; c < width && !bad; ++c) {
      const isize run = d.scale_of == scale_per::row ? width : scale_group, first = c / run * run;
      double most = 0;
      for (isize x = first; x < std::min(first + run, width); ++x) most = std::max(most, std::fabs(want[index(x)]));
      demand(std::fabs(got[index(c)] - want[index(c)]) <= most / 254 * 1.0001, "an int8 row holds ", got[index(c)],
             " for ", want[index(c)]);
    }
    return got;
  }
  static void same(const test::tensor& want, isize g, isize j, const std::vector<double>& got) {
    for (isize c = 0; c < want.width(); ++c) {
      const double x = want.get(0, g, j, c), y = got[index(c)];
      demand(x == y || (std::isnan(x) && std::isnan(y)), "the store holds ", y, " for ", x, ": token ", j, ", head ", g,
             ", column ", c);
    }
  }
};
std::vector<item_rows> all_rows(const problem_of_draw& p) {
  std::vector<item_rows> x;
  for (isize b = 0; b < p.d.B; ++b) x.emplace_back(p, b);
  return x;
}

std::span<const std::int32_t> part(const std::vector<std::int32_t>& x, isize first, isize count) {
  return std::span<const std::int32_t>(x).subspan(index(first), index(count));
}

/// One store of any kind that takes one item's tokens.
class any_store {
 public:
  any_store(const draw& d, isize room, paged_pool* pool) : d_(d), pool_(pool) {
    shape_ = {.heads = d.G, .d = d.d, .e = d.e, .type = d.rows, .scale = d.scale_of};
    if (d.store == store_form::contiguous) contiguous_.emplace(shape_, room);
    if (d.store == store_form::ring) ring_.emplace(shape_, ring_size{d.ring_window, d.ring_first, d.chunk});
    if (d.store == store_form::engine) memory_.resize(index((room / d.page + 1) * page_bytes() + 8));
  }
  /// The pages of another one, as far as they are shared.
  void fork(any_store& from, isize tokens) {
    table_ = pool_->fork(from.table_);
    pool_->truncate(table_, tokens);
  }
  isize tokens() const {
    return contiguous_ ? contiguous_->tokens() : ring_ ? ring_->tokens() : pool_ ? table_.tokens : engine_tokens_;
  }
  void append(const tensor_ref& k, const tensor_ref& v, const key_positions& at) {
    if (contiguous_)
      contiguous_->append(k, v, at);
    else if (ring_)
      ring_->append(k, v, at);
    else
      pool_->append(table_, k, v, at);
  }
  void truncate(isize to) {
    if (contiguous_)
      contiguous_->truncate(to);
    else if (ring_)
      ring_->truncate(to);
    else
      pool_->truncate(table_, to);
  }
  kv_sequence view() const {
    if (contiguous_) return contiguous_->view();
    if (ring_) return ring_->view();
    if (pool_ != nullptr) return pool_->view(table_);
    const isize size = static_cast<isize>(size_of(d_.rows)), k_row = d_.G * d_.d * size, v_row = d_.G * d_.e * size;
    const row_memory k{memory_.data(), page_bytes(), d_.d * size, k_row},
        v{memory_.data() + d_.page * k_row, page_bytes(), d_.e * size, v_row};
    return paged_sequence(shape_, k, v, d_.page, pages_, engine_tokens_);
  }
  /// An engine's own memory: pages in falling order, a token's heads together, values behind the keys of a page.
  void engine_append(const problem_of_draw& p, isize b, isize count) {
    const isize all = engine_tokens_ + count, pages = static_cast<isize>(memory_.size()) / page_bytes();
    for (; engine_tokens_ < all; ++engine_tokens_) {
      const isize j = engine_tokens_;
      if (j % d_.page == 0) pages_.push_back(static_cast<std::int32_t>(pages - 1 - j / d_.page));
      std::byte* page = memory_.data() + pages_.back() * page_bytes();
      const isize size = static_cast<isize>(size_of(d_.rows)), row = j % d_.page;
      for (isize g = 0; g < d_.G; ++g) {
        const auto key = p.stored_key(b, g, j, d_.rows), value = p.stored_value(b, g, j, d_.rows);
        std::byte* to = page + (row * d_.G + g) * d_.d * size;
        for (isize c = 0; c < d_.d; ++c) store_from_double(d_.rows, to, c, key[index(c)]);
        to = page + (d_.page * d_.G * d_.d + (row * d_.G + g) * d_.e) * size;
        for (isize c = 0; c < d_.e; ++c) store_from_double(d_.rows, to, c, value[index(c)]);
      }
    }
  }
  template <class F>
  void with_store(F&& f) {
    if (contiguous_)
      f(*contiguous_);
    else if (ring_)
      f(*ring_);
    else
      f(pooled_sequence(*pool_, table_));
  }

 private:
  isize page_bytes() const { return d_.page * d_.G * (d_.d + d_.e) * static_cast<isize>(size_of(d_.rows)); }

  const draw& d_;
  kv_shape shape_;
  std::optional<contiguous_store> contiguous_;
  std::optional<ring_store> ring_;
  paged_pool* pool_;
  page_table table_;
  std::vector<std::byte> memory_;
  std::vector<std::int32_t> pages_;
  isize engine_tokens_ = 0;
};

/// The stores of all items of a draw.
class store_set {
 public:
  explicit store_set(problem_of_draw& p) : p_(p), d_(p.d) {
    const auto& most = d_.calls.back().m;
    if (d_.store == store_form::paged) {
      isize pages = 0;
      for (isize m : most) pages += m / d_.page + 3;
      pool_.emplace(kv_shape{.heads = d_.G, .d = d_.d, .e = d_.e, .type = d_.rows, .scale = d_.scale_of}, d_.page,
                    d_.fault == fault::full ? 0 : pages);
    }
    stores_.reserve(most.size());
    for (isize m : most) {
      const bool full = d_.fault == fault::full && m == *std::max_element(most.begin(), most.end());
      stores_.emplace_back(d_, full ? m - 1 : m + (d_.rollback || d_.stale ? 3 : 0), pool_ ? &*pool_ : nullptr);
      if (!d_.stale || full) continue;
      garbage(stores_.back(), 3);
      stores_.back().truncate(0);
    }
  }
  any_store& operator[](isize b) { return stores_[index(b)]; }

  /// NaN rows come, and are taken back.
  void roll(any_store& s) {
    if (!d_.rollback || d_.fault == fault::full || d_.fault == fault::ring) return;
    const isize before = s.tokens();
    garbage(s, std::min<isize>(3, d_.chunk));
    s.truncate(before);
  }
  /// Item b grows to `tokens`, in pieces.
  void fill(isize b, isize tokens) {
    any_store& s = stores_[index(b)];
    if (d_.store == store_form::engine) return s.engine_append(p_, b, tokens - s.tokens());
    if (s.tokens() == 0 && p_.shared_tokens(b) > 0) s.fork(stores_[0], p_.shared_tokens(b));
    test::random r(stream(d_.seed, 5));
    while (s.tokens() < tokens) {
      const isize first = s.tokens(), count = std::min(tokens - first, r.integer(1, 70));
      const test::tensor k = p_.tensor_of({&p_.k[index(b)]}, first, count),
                         v = p_.tensor_of({&p_.v[index(b)]}, first, count);
      s.append(k, v, {p_.turn(), first, d_.positions ? p_.at[index(b)].data() + first : nullptr});
    }
  }

 private:
  void garbage(any_store& s, isize count) {
    test::tensor k(d_.type, 1, d_.G, count, d_.d), v(d_.type, 1, d_.G, count, d_.e);
    s.append(k.fill_nan(), v.fill_nan(), {});
  }

  problem_of_draw& p_;
  const draw& d_;
  std::optional<paged_pool> pool_;
  std::vector<any_store> stores_;
};

}  // namespace

void run_state(problem_of_draw& p) {
  const draw& d = p.d;
  const isize all = d.calls.back().m[0];
  const std::vector<item_rows> rows = all_rows(p);
  const exec_ref exec = threads_of(d.threads);
  state s;
  for (std::size_t c = 0; c < d.calls.size(); ++c) {
    const isize n = d.calls[c].n[0], tokens = d.calls[c].m[0], before = tokens - n;
    const softmax_attention m = p.mechanism(c);
    if (c == 0) s = m.make_state({d.B, d.H, d.G, all, d.fault == fault::full ? all - 1 : all, d.d, d.e, d.type});
    std::vector<const numbers*> q, k, v;
    std::vector<std::int32_t> positions;
    for (isize b = 0; b < d.B; ++b) {
      q.push_back(&p.q[c][index(b)]), k.push_back(&p.k[index(b)]), v.push_back(&p.v[index(b)]);
      for (const std::int32_t x : part(p.at[index(b)], before, d.positions ? n : 0)) positions.push_back(x);
    }
    outputs y(d, d.B, n);
    const test::tensor queries = p.tensor_of(q, 0, n), keys = p.tensor_of(k, before, n),
                       values = p.tensor_of(v, before, n);
    const scratch memory(
        d,
        d.H % d.G == 0 ? m.state_workspace_size({d.B, d.H, d.G, n, tokens, d.d, d.e, d.type}, exec.concurrency()) : 0);
    const call_options o{.lse = y.lse_of(d), .gates = {}, .workspace = memory.span(), .positions = positions};
    y.call([&] {
      if (n == 1)
        step(exec, m, queries, keys, values, y.out, s, o);
      else
        prefill(exec, m, queries, keys, values, y.out, s, o);
    });
    memory.check();
    p.spoil(y);
    for (isize b = 0; b < d.B; ++b) {
      rows[index(b)].check(fovea::detail::state_rows(m, s.sizes()).sequence(s, b), tokens);
      p.judge(c, b, y.out_of(b), y.lse_of(d, b), test::rows_of(rows[index(b)].keys, 0, tokens),
              test::rows_of(rows[index(b)].values, 0, tokens), [](isize, isize) { return true; });
    }
  }
}

void run_append(problem_of_draw& p) {
  const draw& d = p.d;
  const std::vector<item_rows> rows = all_rows(p);
  const exec_ref exec = threads_of(d.threads);
  store_set stores(p);
  any_store& own = stores[0];
  for (std::size_t c = 0; c < d.calls.size(); ++c) {
    const isize n = d.calls[c].n[0], tokens = d.calls[c].m[0], before = tokens - n;
    const softmax_attention m = p.mechanism(c);
    stores.roll(own);
    const kv_sequence old = own.view();
    const test::tensor q = p.tensor_of({&p.q[c][0]}, 0, n), k = p.tensor_of({&p.k[0]}, before, n),
                       v = p.tensor_of({&p.v[0]}, before, n);
    outputs y(d, 1, n);
    kv_sequence grown = old;
    grown.length += n;
    const bool cut = d.store == store_form::ring && n > d.chunk;
    const scratch memory(d,
                         n > 0 && !cut && d.H % d.G == 0 ? workspace_size(m, q, {&grown, 1}, exec.concurrency()) : 0);
    const sequence_options o{
        .lse = y.lse_of(d), .positions = part(p.at[0], before, d.positions ? n : 0), .workspace = memory.span()};
    y.call([&] {
      own.with_store([&](auto&& store) {
        if (n == 1)
          step(exec, m, q, k, v, y.out, store, o);
        else
          prefill(exec, m, q, k, v, y.out, store, o);
      });
    });
    memory.check();
    p.spoil(y);
    rows[0].check(own.view(), tokens);
    // A row finds what the ring held when its part of the call had come.
    const isize size = d.ring_window + d.chunk - 1, first = d.ring_first, chunk = d.chunk,
                low = old.dropped > 0 ? old.kept + old.dropped : 0;
    const bool ring = d.store == store_form::ring;
    p.judge(c, 0, y.out_of(0), y.lse_of(d, 0), test::rows_of(rows[0].keys, 0, tokens),
            test::rows_of(rows[0].values, 0, tokens), [=](isize i, isize j) {
              return !ring || j < first || j >= std::max(low, before + std::min(n, (i / chunk + 1) * chunk) - size);
            });
  }
}

void run_sequences(problem_of_draw& p) {
  const draw& d = p.d;
  const std::vector<item_rows> rows = all_rows(p);
  store_set stores(p);
  for (std::size_t c = 0; c < d.calls.size(); ++c) {
    const softmax_attention m = p.mechanism(c);
    const lengths& sizes = d.calls[c];
    std::vector<kv_sequence> kv;
    std::vector<std::int32_t> cu{0}, positions;
    for (isize b = 0; b < d.B; ++b) {
      const isize n = sizes.n[index(b)], tokens = sizes.m[index(b)], before = std::max<isize>(0, tokens - n);
      stores.fill(b, before);
      if (d.store != store_form::engine) stores.roll(stores[b]);
      stores.fill(b, tokens);
      for (isize i = 0; d.positions && i < n; ++i)
        positions.push_back(tokens - n + i < 0 ? 0 : p.at[index(b)][index(tokens - n + i)]);
      cu.push_back(static_cast<std::int32_t>(cu.back() + n));
    }
    for (isize b = 0; b < d.B; ++b) kv.push_back(stores[b].view());
    std::vector<kv_sequence> given = kv;
    p.spoil(given);
    const bool packed = d.form == call_form::packed;
    const isize n = packed ? cu.back() : sizes.n[0];
    test::tensor q(d.type, packed ? 1 : d.B, d.H, n, d.d, d.layout);
    for (isize b = 0; b < d.B; ++b)
      for (isize h = 0; h < d.H; ++h)
        for (isize i = 0; i < sizes.n[index(b)]; ++i)
          for (isize x = 0; x < d.d; ++x)
            q.set(packed ? 0 : b, h, packed ? cu[index(b)] + i : i, x, p.q[c][index(b)].row(h, i)[x]);
    const std::span<const std::int32_t> starts =
        packed ? std::span<const std::int32_t>(cu) : std::span<const std::int32_t>();
    const auto attend = [&](exec_ref exec, outputs& y) {
      const scratch memory(d, d.H % d.G == 0 ? workspace_size(m, q, given, exec.concurrency(), starts) : 0);
      y.call([&] {
        prefill(exec, m, q, given, y.out,
                {.lse = y.lse_of(d), .cu_q = starts, .positions = positions, .workspace = memory.span()});
      });
      memory.check();
    };
    outputs y(d, packed ? 1 : d.B, n);
    attend(threads_of(d.threads), y);
    if (d.threads > 1) {
      outputs alone(d, packed ? 1 : d.B, n);
      attend(serial, alone);
      demand(test::same_bits(y.out, alone.out) && (!d.lse || test::same_bits(y.lse, alone.lse)),
             "the bits depend on the threads");
    }
    p.spoil(y);
    for (isize b = 0; b < d.B; ++b) {
      const isize tokens = sizes.m[index(b)];
      const kv_sequence& x = kv[index(b)];
      rows[index(b)].check(x, tokens);
      const auto own = [&](const tensor_ref& t) {
        return !t ? t : packed ? t.slice(cu[index(b)], sizes.n[index(b)]) : t.part(b, 0, d.H);
      };
      p.judge(c, b, own(y.out), d.lse ? own(y.lse) : tensor_ref{}, test::rows_of(rows[index(b)].keys, 0, tokens),
              test::rows_of(rows[index(b)].values, 0, tokens),
              [&](isize, isize j) { return x.dropped == 0 || j < x.kept || j >= x.kept + x.dropped; });
    }
  }
}

}  // namespace draws
