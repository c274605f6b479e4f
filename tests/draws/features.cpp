// SPDX-License-Identifier: MIT
/// @file  The features of draws, and which of them cannot meet in a draw that is accepted.

#include <algorithm>
#include <functional>
#include <initializer_list>

#include "draws/draw.hpp"

namespace draws {
namespace {

struct named {
  feature what;
  std::function<bool(const draw&)> in;
};

bool any_n(const draw& d, isize low, isize high) {
  return std::any_of(d.calls.begin(), d.calls.end(), [&](const lengths& c) {
    return std::any_of(c.n.begin(), c.n.end(), [&](isize n) { return n >= low && n <= high; });
  });
}
bool any_m(const draw& d, isize low, isize high) {
  return std::any_of(d.calls.begin(), d.calls.end(), [&](const lengths& c) {
    return std::any_of(c.m.begin(), c.m.end(), [&](isize m) { return m >= low && m <= high; });
  });
}
bool more_rows_than_keys(const draw& d) {
  for (const lengths& c : d.calls)
    for (std::size_t b = 0; b < c.n.size(); ++b)
      if (c.n[b] > c.m[b]) return true;
  return false;
}
/// The mask has an alignment.
bool placed(const draw& d) {
  constexpr mask_form by_position[] = {
      mask_form::causal,  mask_form::window,  mask_form::window_first, mask_form::two_sided, mask_form::prefix,
      mask_form::chunked, mask_form::pattern, mask_form::both,         mask_form::either,    mask_form::every};
  return std::find(std::begin(by_position), std::end(by_position), d.mask) != std::end(by_position);
}

std::vector<named> make_features() {
  std::vector<named> all;
  const auto add = [&](const char* group, const char* name, std::function<bool(const draw&)> in) {
    all.push_back({{group, name}, std::move(in)});
  };
  const auto add_all = [&](const char* group, std::initializer_list<const char*> names, auto member, isize first) {
    for (const char* name : names) {
      add(group, name, [=](const draw& d) { return static_cast<isize>(member(d)) == first; });
      ++first;
    }
  };
  add_all(
      "type", {"f32", "f64", "bf16", "f16"}, [](const draw& d) { return d.type; }, 0);
  add("out", "out of another type", [](const draw& d) { return d.out != d.type; });
  add_all(
      "form", {"views", "state", "append", "packed call", "batch"}, [](const draw& d) { return d.form; }, 0);
  add_all(
      "layout", {"bhnd", "bnhd", "strided", "unaligned"}, [](const draw& d) { return d.layout; }, 0);
  add_all(
      "store", {"contiguous", "ring", "paged", "engine"}, [](const draw& d) { return d.store; }, 1);
  const auto stored = [](const draw& d) { return d.store != store_form::none; };
  add("rows", "rows as they come", [=](const draw& d) { return stored(d) && d.rows == d.type; });
  add("rows", "rows converted", [=](const draw& d) { return stored(d) && d.rows != d.type && d.rows != dtype::i8; });
  add("rows", "int8 by row", [](const draw& d) { return d.rows == dtype::i8 && d.scale_of == scale_per::row; });
  add("rows", "int8 by group", [](const draw& d) { return d.rows == dtype::i8 && d.scale_of == scale_per::group; });
  const auto pages = [](isize low, isize high) {
    return [=](const draw& d) {
      return (d.store == store_form::paged || d.store == store_form::engine) && d.page >= low && d.page <= high;
    };
  };
  add("page", "pages of 1", pages(1, 1)), add("page", "pages of 2 to 7", pages(2, 7));
  add("page", "pages of 16", pages(16, 16)), add("page", "pages of 64", pages(64, 64));
  add("stale", "stale", [](const draw& d) { return d.stale; });
  add("shared", "shared", [](const draw& d) { return d.shared; });
  add("rollback", "rollback", [](const draw& d) { return d.rollback; });
  add("calls", "several calls", [](const draw& d) { return d.calls.size() > 1; });
  add("heads", "MHA", [](const draw& d) { return d.H == d.G; });
  add("heads", "GQA", [](const draw& d) { return d.H > d.G && d.G > 1; });
  add("heads", "MQA", [](const draw& d) { return d.H > d.G && d.G == 1; });
  const auto width = [](isize low, isize high) { return [=](const draw& d) { return d.d >= low && d.d <= high; }; };
  add("d", "d < 16", width(1, 15)), add("d", "d 16 to 64", width(16, 64));
  add("d", "d 65 to 160", width(65, 160)), add("d", "d > 160", width(161, 9999));
  add("d odd", "d odd", [](const draw& d) { return d.d % 2 != 0; });
  add("e odd", "e odd", [](const draw& d) { return d.e % 2 != 0; });
  add("e", "e != d", [](const draw& d) { return d.e != d.d; });
  add("no rows", "no rows", [](const draw& d) { return any_n(d, 0, 0); });
  add("one row", "one row", [](const draw& d) { return any_n(d, 1, 1); });
  add("few rows", "few rows",
      [](const draw& d) { return any_n(d, 2, std::max<isize>(1, 8 / std::max<isize>(1, d.H / d.G))); });
  add("many rows", "many rows", [](const draw& d) { return any_n(d, 9, 9999); });
  add("no keys", "no keys", [](const draw& d) { return any_m(d, 0, 0); });
  add("n > m", "n > m", more_rows_than_keys);
  add("m > 4096", "m > 4096", [](const draw& d) { return any_m(d, 4097, 99999); });
  add_all(
      "mask",
      {"causal", "window", "window and first keys", "two-sided window", "prefix-LM", "chunked-local", "key lengths",
       "packed", "packed causal", "documents", "boolean table", "block mask", "tree", "pattern", "both", "either",
       "every", "mask functor", "mask functor with blocks"},
      [](const draw& d) { return d.mask; }, 1);
  add_all(
      "place", {"top-left", "offset", "offsets"},
      [](const draw& d) { return placed(d) ? static_cast<isize>(d.align) : 0; }, 1);
  add_all(
      "score",
      {"softcap", "ALiBi", "bias", "relative bias", "softcap, bias", "ALiBi, softcap", "softcap, relative, ALiBi",
       "score functor", "score functor without slope", "documents score"},
      [](const draw& d) { return d.score; }, 1);
  const auto biased = [](const draw& d) { return d.score == score_form::bias || d.score == score_form::cap_bias; };
  add("bias rows", "bias for all rows", [=](const draw& d) { return biased(d) && !d.per_row; });
  add("bias keys", "bias for all keys", [=](const draw& d) { return biased(d) && !d.per_key; });
  add("sinks", "sinks", [](const draw& d) { return d.sinks; });
  add("scale", "scale", [](const draw& d) { return d.scale != 0; });
  add_all(
      "rope", {"RoPE neox", "RoPE gptj"}, [](const draw& d) { return d.rope; }, 1);
  const auto turned = [](const draw& d) { return d.rope != rope_form::none; };
  add("partial", "partial RoPE", [=](const draw& d) { return turned(d) && d.turned < d.d; });
  add("positions", "positions", [=](const draw& d) { return turned(d) && d.positions; });
  add_all(
      "scaling", {"linear RoPE", "YaRN", "Llama-3 RoPE"},
      [=](const draw& d) { return turned(d) ? static_cast<isize>(d.scaling) : 0; }, 1);
  add("lse", "no LSE", [](const draw& d) { return !d.lse; });
  add("workspace", "workspace", [](const draw& d) { return d.workspace; });
  add_all(
      "threads", {"1 thread", "2 threads", "3 threads"}, [](const draw& d) { return d.threads; }, 1);
  add("backward", "backward", [](const draw& d) { return d.backward; });
  add("dbias", "dbias", [](const draw& d) { return d.dbias; });
  add_all(
      "poison", {"NaN behind the mask", "infinity behind the mask"}, [](const draw& d) { return d.poison; }, 1);
  return all;
}
const std::vector<named>& list() {
  static const std::vector<named> all = make_features();
  return all;
}

using names = std::initializer_list<const char*>;
bool among(const feature& x, names of) {
  return std::any_of(of.begin(), of.end(), [&](const char* y) { return x.name == y || x.group == y; });
}
/// Pairs that no call can have: each of the first with each of the second; names of features, or of whole groups.
struct rule {
  names one, other;
};
const rule rules_of_calls[] = {
    {{"f64"}, {"rows converted", "int8 by row", "int8 by group", "out"}},  // f64 goes with f64 only
    {{"views"}, {"store", "rows", "page", "stale", "shared", "rollback", "calls"}},
    {{"state"}, {"paged", "engine", "page", "stale", "shared", "rollback"}},
    {{"append"}, {"engine", "shared"}},
    {{"contiguous", "ring"}, {"page", "shared"}},
    {{"engine"}, {"int8 by row", "int8 by group", "stale", "shared", "rollback"}},
    // a row cannot see keys that have not come
    {{"state", "append"},
     {"two-sided window", "prefix-LM", "key lengths", "packed", "packed causal", "documents", "boolean table",
      "block mask", "place", "n > m"}},
    {{"place"},
     {"key lengths", "packed", "packed causal", "documents", "boolean table", "block mask", "tree", "mask functor",
      "mask functor with blocks"}},
    {{"tree"}, {"n > m"}},
    {{"backward", "dbias"},
     {"state", "append", "packed call", "batch", "store", "rows", "page", "stale", "shared", "rollback", "calls",
      "rope", "partial", "positions", "scaling", "score functor without slope", "lse"}},
    {{"dbias"}, {"softcap", "ALiBi", "ALiBi, softcap", "score functor", "documents score"}},
    {{"bias rows", "bias keys"},
     {"softcap", "ALiBi", "relative bias", "ALiBi, softcap", "softcap, relative, ALiBi", "score functor",
      "score functor without slope", "documents score"}},
};
/// Pairs that are left out because the twin would take too long, or because one makes the other nearly impossible.
const rule rules_of_draws[] = {
    {{"m > 4096"}, {"state", "append", "ring", "d 16 to 64", "d 65 to 160", "d > 160", "backward", "dbias"}},
};

}  // namespace

const std::vector<feature>& features() {
  static const std::vector<feature> all = [] {
    std::vector<feature> x;
    for (const named& f : list()) x.push_back(f.what);
    return x;
  }();
  return all;
}

std::vector<bool> features_of(const draw& d) {
  std::vector<bool> x;
  for (const named& f : list()) x.push_back(f.in(d));
  return x;
}

bool apart(const feature& a, const feature& b) {
  if (a.group == b.group) return true;
  const auto meets = [&](const rule& r) {
    return (among(a, r.one) && among(b, r.other)) || (among(b, r.one) && among(a, r.other));
  };
  return std::any_of(std::begin(rules_of_calls), std::end(rules_of_calls), meets) ||
         std::any_of(std::begin(rules_of_draws), std::end(rules_of_draws), meets);
}

std::vector<std::uint64_t> seeds(isize count) {
  const auto& all = features();
  const std::size_t size = all.size();
  std::vector<int> met(size * size, 0);
  const auto pairs_of = [&](std::uint64_t seed, auto&& f) {
    const draw d = make_draw(seed);
    if (!refused(d).empty()) return;
    const std::vector<bool> in = features_of(d);
    for (std::size_t a = 0; a < size; ++a)
      for (std::size_t b = a + 1; in[a] && b < size; ++b)
        if (in[b]) f(met[a * size + b], a, b);
  };
  std::vector<std::uint64_t> picked;
  isize tried = 0;
  const isize plain = count - count / 20;
  while (static_cast<isize>(picked.size()) < count) {
    const std::uint64_t seed = stream(0, static_cast<std::uint64_t>(tried++));
    bool lacking = static_cast<isize>(picked.size()) < plain || tried > 20 * count;
    if (!lacking)
      pairs_of(seed, [&](int times, std::size_t a, std::size_t b) {
        lacking = lacking || (times < 3 && !apart(all[a], all[b]));
      });
    if (!lacking) continue;
    pairs_of(seed, [&](int& times, std::size_t, std::size_t) { ++times; });
    picked.push_back(seed);
  }
  return picked;
}

}  // namespace draws
