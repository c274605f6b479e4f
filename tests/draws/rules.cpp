// SPDX-License-Identifier: MIT
/// @file  Masks and scores of draws, and what they mean.

#include "draws/rules.hpp"

#include <algorithm>

namespace draws {
namespace {

std::size_t index(isize x) { return static_cast<std::size_t>(x); }

/// What a user might write: every third pair or so, by token numbers.
struct sieve {
  isize every;
  bool per_head;
  bool operator()(const mask_site& at, isize i, isize j) const {
    const isize p = i + at.m - at.n;
    return j <= p && (p * 7 + j * 13 + (per_head ? at.h : 0) * 3) % every != 0;
  }
};
/// A logit of one's own, with its slope or without.
template <bool Sloped>
struct bent {
  double by;
  template <class T>
  T operator()(const mask_site& at, isize i, isize j, T s) const {
    const isize away = i + at.m - at.n - j;
    return s * static_cast<T>(1 + 0.1 * static_cast<double>(at.h)) + static_cast<T>(by) * s * s +
           static_cast<T>(0.01) * static_cast<T>(away % 5);
  }
  double slope(const mask_site& at, isize, isize, double s) const requires Sloped {
    return 1 + 0.1 * static_cast<double>(at.h) + 2 * by * s;
  }
};

}  // namespace

struct rules::maker {
  rules& to;
  const draw& d;
  test::random r;
  std::vector<isize> n, m;
  isize most_n = 0, most_m = 0;
  bool alike = true;

  maker(rules& x, const draw& y, std::size_t call)
      : to(x), d(y), r(stream(y.seed, 100 + call)), n(y.calls[call].n), m(y.calls[call].m) {
    for (std::size_t b = 0; b < n.size(); ++b) {
      most_n = std::max(most_n, n[b]), most_m = std::max(most_m, m[b]);
      alike = alike && n[b] == n[0] && m[b] == m[0];
    }
  }

  // ---- tables, which the rules own
  const std::int32_t* keep(std::vector<std::int32_t> x) {
    to.numbers_.push_back(std::move(x));
    return to.numbers_.back().data();
  }
  const float* normals(isize count, double deviation) {
    std::vector<float> x(index(count));
    for (float& y : x) y = static_cast<float>(deviation * r.normal());
    to.floats_.push_back(std::move(x));
    return to.floats_.back().data();
  }
  const std::uint8_t* coins(isize count, double chance) {
    std::vector<std::uint8_t> x(index(count) + 1);
    for (auto& y : x) y = r.coin(chance) ? static_cast<std::uint8_t>(r.integer(1, 255)) : std::uint8_t{0};
    to.bytes_.push_back(std::move(x));
    return to.bytes_.back().data();
  }
  std::vector<std::int32_t> cuts(isize total, isize parts) {
    std::vector<std::int32_t> c{0};
    for (isize s = 1; s < parts; ++s) c.push_back(static_cast<std::int32_t>(r.integer(0, total)));
    c.push_back(static_cast<std::int32_t>(total));
    std::sort(c.begin(), c.end());
    return c;
  }

  // ---- where rows stand
  const std::int32_t* offsets = nullptr;
  alignment_of_rows align() {
    switch (d.align) {
      case place::bottom_right: return bottom_right;
      case place::top_left: return top_left;
      case place::offset: return at_offset(d.offset);
      case place::offsets: break;
    }
    if (offsets == nullptr) {
      std::vector<std::int32_t> x;
      for (isize b = 0; b < d.B; ++b) x.push_back(static_cast<std::int32_t>(r.integer(-10, 60)));
      offsets = keep(x);
    }
    return at_offsets(offsets);
  }
  auto position() {
    align();
    return [how = d.align, fixed = d.offset, each = offsets](const mask_site& at, isize i) -> isize {
      if (how == place::top_left) return i;
      if (how == place::offset) return i + fixed;
      if (how == place::offsets) return i + each[at.b];
      return i + at.m - at.n;
    };
  }
  isize width() const { return d.fault == fault::parameter && d.form != call_form::state ? 0 : d.width; }

  // ---- masks
  void table_mask(boolean_mask& policy, std::function<bool(const mask_site&, isize, isize)>& plain) {
    const isize items = d.per_item ? d.B : 1, heads = d.per_head ? d.H : 1, pairs = most_n * most_m;
    const std::uint8_t* table = coins(items * heads * pairs, r.coin(0.2) ? 0.05 : r.uniform(0.2, 1.0));
    policy = {table, d.per_item ? heads * pairs : 0, d.per_head ? pairs : 0, most_m};
    if (alike && most_n > 0 && most_m > 0) policy.extent = {items, heads, most_n, most_m};
    if (d.fault == fault::table) policy.extent.heads = d.H + 1;
    plain = [=, columns = most_m, by_item = d.per_item, by_head = d.per_head](const mask_site& at, isize i, isize j) {
      return table[(by_item ? at.b : 0) * heads * pairs + (by_head ? at.h : 0) * pairs + i * columns + j] != 0;
    };
  }
  void block_table() {
    block_mask b{.block_q = r.integer(1, 40), .block_k = r.integer(1, 40)};
    b.per_kv_head = r.coin(), b.inverted = r.coin();
    const isize rows = most_n / b.block_q + 1, columns = most_m / b.block_k + 1, size = rows * columns;
    b.table = coins(d.B * d.H * size, r.uniform(0.1, 0.9));
    b.row_stride = columns, b.head_stride = d.per_head ? size : 0, b.batch_stride = d.per_item ? d.H * size : 0;
    to.mask = b;
    to.sees = [b](const mask_site& at, isize i, isize j) {
      const isize head = b.per_kv_head ? at.h / (at.H / at.G) : at.h;
      const bool on =
          b.table[at.b * b.batch_stride + head * b.head_stride + i / b.block_q * b.row_stride + j / b.block_k] != 0;
      return on != b.inverted;
    };
  }
  void trees() {
    const bool one = std::all_of(n.begin(), n.end(), [&](isize x) { return x == n[0]; }) && r.coin();
    std::vector<std::vector<std::int32_t>> parents;
    for (isize b = 0; b < (one ? 1 : d.B); ++b) {
      std::vector<std::int32_t> p;
      for (isize i = 0; i < n[index(b)]; ++i)
        p.push_back(static_cast<std::int32_t>(r.coin(0.6) ? i - 1 : r.integer(-1, i - 1)));
      parents.push_back(p);
      to.trees_.emplace_back(p.data(), static_cast<isize>(p.size()));
    }
    to.mask = tree{to.trees_.data(), one ? 1 : d.B};
    to.sees = [parents, one](const mask_site& at, isize i, isize j) {
      const isize draft = j - (at.m - at.n);
      if (draft < 0) return true;
      const auto& p = parents[one ? 0 : index(at.b)];
      for (isize a = i; a >= 0; a = p[index(a)])
        if (a == draft) return true;
      return false;
    };
  }
  void packed_sequences(bool causal_inside, bool window_inside) {
    const isize parts = r.integer(1, 4);
    const auto q = cuts(n[0], parts), k = cuts(m[0], parts);
    const packed p{keep(q), keep(k), parts, causal_inside};
    if (window_inside)
      to.mask = documents{p, window{width()}};
    else
      to.mask = p;
    to.sees = [=, w = d.width](const mask_site&, isize i, isize j) {
      isize s = 0;
      while (i >= q[index(s + 1)]) ++s;
      if (j < k[index(s)] || j >= k[index(s + 1)]) return false;
      const isize at_row = i - q[index(s)] + (k[index(s + 1)] - k[index(s)]) - (q[index(s + 1)] - q[index(s)]),
                  at_key = j - k[index(s)];
      return !((causal_inside || window_inside) && at_key > at_row) && !(window_inside && at_key <= at_row - w);
    };
  }
  template <class Inner>
  void known_blocks(const Inner& inner) {
    mask_site at{0, 0, n[0], m[0], d.H, d.G, d.B};
    to.blocks_ =
        std::make_unique<mask_blocks>(fovea::mask(inner), at, r.integer(1, 70), r.integer(1, 70), r.coin(), true);
    to.mask = mask_blocks_of{to.blocks_.get(), inner};
  }
  void make_pattern() {
    hsa_pattern p{static_cast<hsa_mode>(r.integer(0, 3)), r.integer(1, 40), align()};
    to.mask = p;
    to.sees = [p, where = position()](const mask_site& at, isize i, isize j) {
      const isize x = where(at, i);
      if (j > x) return false;
      const bool local = x - j < p.stride, strided = (x - j) % p.stride == 0;
      if (p.mode == hsa_mode::local) return local;
      if (p.mode == hsa_mode::strided) return strided;
      if (p.mode == hsa_mode::sparse) return local || strided;
      return x / p.stride == j / p.stride || j % p.stride == p.stride - 1;
    };
  }
  void make_either() {
    const isize stride = r.integer(1, 30), w = d.width;
    to.mask = either{window{width(), 0, align()}, hsa_pattern{hsa_mode::strided, stride, align()}};
    to.sees = [=, where = position()](const mask_site& at, isize i, isize j) {
      const isize p = where(at, i);
      return j <= p && (j > p - w || (p - j) % stride == 0);
    };
  }
  /// A window with first keys, and a table.
  void make_joined(bool listed) {
    boolean_mask table;
    std::function<bool(const mask_site&, isize, isize)> plain;
    table_mask(table, plain);
    const window near{width(), d.first, align()};
    if (listed) {
      to.parts_ = {near, table};
      to.mask = every{to.parts_.data(), 2};
    } else {
      to.mask = both{near, table};
    }
    to.sees = [=, w = d.width, f = d.first, where = position()](const mask_site& at, isize i, isize j) {
      const isize p = where(at, i);
      return j <= p && (j > p - w || j < f) && plain(at, i, j);
    };
  }
  void make_prefix() {
    std::vector<std::int32_t> each;
    for (isize b = 0; b < d.B; ++b) each.push_back(static_cast<std::int32_t>(r.integer(0, most_m)));
    if (!d.per_item) std::fill(each.begin(), each.end(), each[0]);
    to.mask = prefix_lm{each[0], d.per_item ? keep(each) : nullptr, align()};
    to.sees = [each, where = position()](const mask_site& at, isize i, isize j) {
      return j <= where(at, i) || j < each[index(at.b)];
    };
  }
  void make_lengths() {
    std::vector<std::int32_t> each;
    for (isize b = 0; b < d.B; ++b) each.push_back(static_cast<std::int32_t>(r.integer(0, m[index(b)])));
    to.mask = key_lengths{keep(each)};
    to.sees = [each](const mask_site& at, isize, isize j) { return j < each[index(at.b)]; };
  }
  void make_mask() {
    const isize w = d.width, f = d.first, right = d.right;
    const auto by_position = [&](const fovea::mask& policy, auto&& rule) {
      to.mask = policy;
      to.sees = [rule, where = position()](const mask_site& at, isize i, isize j) { return rule(where(at, i), j); };
    };
    switch (d.mask) {
      case mask_form::none: to.sees = [](const mask_site&, isize, isize) { return true; }; break;
      case mask_form::causal: return by_position(causal{align()}, [](isize p, isize j) { return j <= p; });
      case mask_form::window:
        return by_position(window{width(), 0, align()}, [=](isize p, isize j) { return j <= p && j > p - w; });
      case mask_form::window_first:
        return by_position(window{width(), f, align()},
                           [=](isize p, isize j) { return j <= p && (j > p - w || j < f); });
      case mask_form::two_sided:
        return by_position(two_sided{w, right, align()},
                           [=](isize p, isize j) { return j >= p - w && j <= p + right; });
      case mask_form::chunked:
        return by_position(chunked_local{width(), align()}, [=](isize p, isize j) { return j <= p && j / w == p / w; });
      case mask_form::prefix: return make_prefix();
      case mask_form::key_lengths: return make_lengths();
      case mask_form::packed: return packed_sequences(false, false);
      case mask_form::packed_causal: return packed_sequences(true, false);
      case mask_form::documents: return packed_sequences(r.coin(), true);
      case mask_form::boolean: {
        boolean_mask table;
        table_mask(table, to.sees);
        to.mask = table;
        break;
      }
      case mask_form::block: return block_table();
      case mask_form::tree: return trees();
      case mask_form::pattern: return make_pattern();
      case mask_form::both: return make_joined(false);
      case mask_form::every: return make_joined(true);
      case mask_form::either: return make_either();
      case mask_form::functor:
      case mask_form::functor_blocks: {
        const sieve own{r.integer(2, 9), d.per_head};
        to.sees = own;
        if (d.mask == mask_form::functor)
          to.mask = mask_function{own, true};
        else
          known_blocks(mask_function{own, true});
        break;
      }
    }
  }

  // ---- scores
  double cap() const { return d.fault == fault::parameter ? 0 : d.cap; }
  static double capped(double s, double c) { return c * std::tanh(s / c); }
  additive_bias bias() {
    const isize items = d.per_item ? d.B : 1, heads = d.per_head ? d.H : 1, rows = d.per_row ? most_n : 1,
                keys = d.per_key ? most_m : 1;
    additive_bias b;
    to.table_size = std::max<isize>(1, items * heads * rows * keys);
    b.table = normals(to.table_size, 1.0);
    if (r.coin(0.2))
      for (float& x : to.floats_.back())
        if (r.coin(0.1)) x = -std::numeric_limits<float>::infinity();
    b.key_stride = d.per_key ? 1 : 0, b.row_stride = d.per_row ? keys : 0;
    b.head_stride = d.per_head ? rows * keys : 0, b.batch_stride = d.per_item ? heads * rows * keys : 0;
    if (alike && most_n > 0 && most_m > 0) b.extent = {items, heads, rows, keys};
    if (d.fault == fault::table) b.extent.heads = d.H + 1;
    to.slot = [b](const mask_site& at, isize i, isize j) {
      return at.b * b.batch_stride + at.h * b.head_stride + i * b.row_stride + j * b.key_stride;
    };
    return b;
  }
  struct distances {
    relative_bias policy;
    std::function<isize(isize h, isize distance)> at;
  };
  distances relative(bool placed) {
    const isize left = r.integer(0, 40), right = r.integer(0, 20), heads = d.per_head ? d.H : 1,
                size = left + right + 1;
    to.table_size = heads * size;
    const relative_bias b{normals(heads * size, 1.0), left, right, heads, placed ? align() : bottom_right};
    return {b, [=](isize h, isize distance) {
              return (heads == 1 ? 0 : h * size) + left + std::clamp(distance, -left, right);
            }};
  }
  alibi slopes() { return {normals(d.H, 0.1), d.H, align()}; }

  void make_score() {
    switch (d.score) {
      case score_form::none: to.changed = [](const mask_site&, isize, isize, double s) { return s; }; break;
      case score_form::softcap:
        to.score = softcap{cap()};
        to.changed = [c = d.cap](const mask_site&, isize, isize, double s) { return capped(s, c); };
        to.unit_slope = false;
        break;
      case score_form::alibi: {
        const alibi a = slopes();
        to.score = a;
        to.changed = [a, where = position()](const mask_site& at, isize i, isize j, double s) {
          return s - static_cast<double>(a.slopes[at.h]) * static_cast<double>(where(at, i) - j);
        };
        break;
      }
      case score_form::bias:
      case score_form::cap_bias: {
        const additive_bias b = bias();
        const bool with_cap = d.score == score_form::cap_bias;
        if (with_cap)
          to.score = chain{softcap{cap()}, b};
        else
          to.score = b;
        to.unit_slope = !with_cap;
        to.changed = [b, with_cap, c = d.cap, slot = to.slot](const mask_site& at, isize i, isize j, double s) {
          return (with_cap ? capped(s, c) : s) + static_cast<double>(b.table[slot(at, i, j)]);
        };
        break;
      }
      case score_form::relative:
      case score_form::cap_relative_alibi: make_relative(d.score == score_form::cap_relative_alibi); break;
      case score_form::alibi_cap: {
        const alibi a = slopes();
        to.score = chain{a, softcap{cap()}};
        to.unit_slope = false;
        to.changed = [a, c = d.cap, where = position()](const mask_site& at, isize i, isize j, double s) {
          return capped(s - static_cast<double>(a.slopes[at.h]) * static_cast<double>(where(at, i) - j), c);
        };
        break;
      }
      case score_form::functor:
      case score_form::functor_without_slope: {
        const double by = r.uniform(-0.02, 0.02);
        if (d.score == score_form::functor)
          to.score = bent<true>{by};
        else
          to.score = bent<false>{by};
        to.unit_slope = false;
        to.changed = [own = bent<true>{by}](const mask_site& at, isize i, isize j, double s) {
          return own(at, i, j, s);
        };
        break;
      }
      case score_form::documents: make_documents_score(); break;
    }
  }
  void make_relative(bool chained) {
    const distances x = relative(true);
    const alibi a = slopes();
    if (chained)
      to.score = chain{chain{softcap{cap()}, x.policy}, a};
    else
      to.score = x.policy;
    to.unit_slope = !chained;
    to.slot = [x, where = position()](const mask_site& at, isize i, isize j) { return x.at(at.h, j - where(at, i)); };
    to.changed = [=, c = d.cap, slot = to.slot, where = position()](const mask_site& at, isize i, isize j, double s) {
      const double y = (chained ? capped(s, c) : s) + static_cast<double>(x.policy.table[slot(at, i, j)]);
      return chained ? y - static_cast<double>(a.slopes[at.h]) * static_cast<double>(where(at, i) - j) : y;
    };
  }
  void make_documents_score() {
    const isize parts = r.integer(1, 4);
    const auto q = cuts(n[0], parts), k = cuts(m[0], parts);
    const distances x = relative(false);
    to.score = documents_score{packed{keep(q), keep(k), parts, false}, x.policy};
    to.changed = [=](const mask_site& at, isize i, isize j, double s) {
      isize at_q = 0;
      while (i >= q[index(at_q + 1)]) ++at_q;
      const isize first = k[index(at_q)], last = k[index(at_q + 1)];
      if (j < first || j >= last) return s;
      const isize p = i - q[index(at_q)] + (last - first) - (q[index(at_q + 1)] - q[index(at_q)]);
      return s + static_cast<double>(x.policy.table[x.at(at.h, j - first - p)]);
    };
  }
};

rules::rules(const draw& d, std::size_t call) {
  numbers_.reserve(16), floats_.reserve(16), bytes_.reserve(16), trees_.reserve(static_cast<std::size_t>(d.B));
  maker make(*this, d, call);
  make.make_mask();
  make.make_score();
}

}  // namespace draws
