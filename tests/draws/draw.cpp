// SPDX-License-Identifier: MIT
/// @file  From a seed to a draw, and which draws the library must refuse.

#include "draws/draw.hpp"

#include <algorithm>
#include <sstream>

namespace draws {
namespace {

using test::random;

template <class T, std::size_t N>
T one_of(random& r, const T (&from)[N]) {
  return from[static_cast<std::size_t>(r.integer(0, static_cast<isize>(N) - 1))];
}
template <class E>
E any(random& r, E last) {
  return static_cast<E>(r.integer(0, static_cast<isize>(last)));
}

isize most(const std::vector<isize>& x) { return x.empty() ? 0 : *std::max_element(x.begin(), x.end()); }
bool alike(const std::vector<isize>& x) {
  return std::all_of(x.begin(), x.end(), [&](isize y) { return y == x[0]; });
}
bool in_order(const draw& d) { return d.form == call_form::state || d.form == call_form::append; }
bool sequences(const draw& d) { return d.form == call_form::packed || d.form == call_form::batch; }

/// No row sees a key behind its own position, and the policy says so.
bool causal(const draw& d) {
  switch (d.mask) {
    case mask_form::causal:
    case mask_form::window:
    case mask_form::window_first:
    case mask_form::chunked:
    case mask_form::pattern:
    case mask_form::both:
    case mask_form::either:
    case mask_form::every: return d.align == place::bottom_right;
    case mask_form::tree:
    case mask_form::functor:
    case mask_form::functor_blocks: return true;
    default: return false;
  }
}
/// The policy says how far back it looks.
bool bounded(const draw& d) {
  switch (d.mask) {
    case mask_form::window:
    case mask_form::window_first:
    case mask_form::chunked:
    case mask_form::both:
    case mask_form::every: return d.align == place::bottom_right;
    default: return false;
  }
}
bool fits_one_size(const draw& d) {
  return d.mask == mask_form::packed || d.mask == mask_form::packed_causal || d.mask == mask_form::documents ||
         d.mask == mask_form::functor_blocks || d.score == score_form::documents;
}

void draw_heads(draw& d, random& r) {
  const isize kind = r.integer(0, 2);  // MHA, GQA, MQA
  d.G = kind == 2 ? 1 : r.integer(kind == 0 ? 1 : 2, 3);
  d.H = kind == 0 ? d.G : d.G * (r.coin(0.15) ? r.integer(5, 12) : r.integer(2, 4));
  const auto width = [&] {
    const isize k = r.integer(0, 9);
    if (k <= 2) return r.integer(1, 15);
    if (k <= 5) return r.integer(16, 64);
    if (k <= 7) return r.integer(65, 160);
    constexpr isize wide[] = {192, 193, 200, 255, 256, 320, 511, 576};
    return one_of(r, wide);
  };
  d.d = width();
  d.e = r.coin(0.4) ? d.d : d.d >= 192 ? r.integer(1, d.d) : width();
}

void draw_form(draw& d, random& r) {
  constexpr call_form forms[] = {call_form::views,  call_form::views,  call_form::state,  call_form::state,
                                 call_form::append, call_form::packed, call_form::packed, call_form::batch};
  d.form = one_of(r, forms);
  constexpr dtype types[] = {dtype::f32, dtype::f64, dtype::bf16, dtype::f16};
  d.type = one_of(r, types);
  d.out = d.type;
  if (d.type != dtype::f64 && r.coin(0.4)) {
    constexpr dtype other[] = {dtype::f32, dtype::bf16, dtype::f16};
    d.out = one_of(r, other);
  }
  d.layout = any(r, test::layout::unaligned);
  d.rows = d.type;
  if (d.form == call_form::views) return;
  switch (d.form) {
    case call_form::state: d.store = r.coin() ? store_form::contiguous : store_form::ring; break;
    case call_form::append: d.store = static_cast<store_form>(r.integer(1, 3)); break;
    default: d.store = r.coin(0.25) ? store_form::paged : static_cast<store_form>(r.integer(1, 4));
  }
  if (d.type != dtype::f64 && r.coin(0.75)) {
    constexpr dtype kept[] = {dtype::f32, dtype::bf16, dtype::f16, dtype::i8, dtype::i8, dtype::i8};
    d.rows = one_of(r, kept);
    if (d.store == store_form::engine && d.rows == dtype::i8) d.rows = dtype::bf16;
  }
  d.scale_of = r.coin() ? scale_per::row : scale_per::group;
  constexpr isize pages[] = {1, 1, 2, 3, 7, 16, 16, 64, 64};
  d.page = one_of(r, pages);
  d.stale = d.form != call_form::state && d.store != store_form::engine && r.coin();
  d.rollback = d.form != call_form::state && d.store != store_form::engine && r.coin(0.4);
  d.shared = sequences(d) && d.store == store_form::paged && r.coin(0.6);
}

void draw_mask(draw& d, random& r) {
  constexpr mask_form ordered[] = {mask_form::causal, mask_form::window,  mask_form::window_first,  mask_form::chunked,
                                   mask_form::tree,   mask_form::pattern, mask_form::both,          mask_form::either,
                                   mask_form::every,  mask_form::functor, mask_form::functor_blocks};
  constexpr mask_form limited[] = {mask_form::window, mask_form::window_first, mask_form::chunked, mask_form::both,
                                   mask_form::every};
  const bool ring = d.form == call_form::state && d.store == store_form::ring;
  if (ring && !r.coin(0.1))
    d.mask = one_of(r, limited);
  else if (in_order(d) && !r.coin(0.1))
    d.mask = one_of(r, ordered);
  else
    d.mask = any(r, mask_form::functor_blocks);
  if (!in_order(d) || r.coin(0.05)) d.align = any(r, place::offsets);
  d.width = r.coin(0.2) ? r.integer(1, 3) : r.integer(1, 90);
  d.first = r.integer(1, 12);
  d.right = r.integer(0, 40);
  d.offset = r.integer(-20, 60);
  d.per_item = r.coin(), d.per_head = r.coin();
  d.per_row = r.coin(0.7), d.per_key = r.coin(0.7);
}

void draw_score(draw& d, random& r) {
  d.score = r.coin(0.15) ? score_form::none : any(r, score_form::documents);
  d.cap = r.uniform(0.5, 12.0);
  d.sinks = r.coin(0.4);
  if (r.coin(0.4)) d.scale = r.uniform(0.02, 0.4);
  if (r.coin(0.55)) {
    d.rope = r.coin() ? rope_form::neox : rope_form::gptj;
    d.turned = r.coin(0.4) ? d.d / 2 * 2 : 2 * r.integer(1, std::max<isize>(1, d.d / 2));
    if (d.turned == 0) d.turned = 2;
    d.scaling = r.coin(0.4) ? scaling_form::none : any(r, scaling_form::llama3);
    d.positions = r.coin(0.4);
  }
}

/// Sizes of about `limit` at most.
void draw_lengths(draw& d, random& r, isize limit, bool endless) {
  const auto few_or_many = [&](isize top) {
    const isize kind = r.integer(0, 9);
    return kind == 0 ? 0 : kind <= 3 ? 1 : kind <= 5 ? r.integer(1, std::min<isize>(8, top)) : r.integer(1, top);
  };
  d.calls.clear();
  if (d.form == call_form::views) {
    const isize n = few_or_many(std::max<isize>(1, limit * 2 / 3));
    const isize m = endless        ? r.integer(4100, 5200)
                    : r.coin(0.06) ? 0
                    : r.coin(0.06) ? 1
                    : r.coin(0.35) ? n
                                   : r.integer(1, limit);
    const auto items = static_cast<std::size_t>(d.B);
    d.calls.push_back({std::vector<isize>(items, n), std::vector<isize>(items, m)});
  } else if (in_order(d)) {
    isize tokens = 0;
    const isize count = r.integer(1, 4);
    for (isize c = 0; c < count; ++c) {
      const isize n = few_or_many(std::max<isize>(1, limit / 3));
      tokens += n;
      const auto items = static_cast<std::size_t>(d.B);
      d.calls.push_back({std::vector<isize>(items, n), std::vector<isize>(items, tokens)});
    }
  } else {
    lengths x;
    const bool same = r.coin(fits_one_size(d) ? 0.7 : 0.1);
    const isize shared_n = few_or_many(std::max<isize>(1, limit / 4));
    for (isize b = 0; b < d.B; ++b) {
      isize m = r.coin(endless ? 0.2 : 0.07)      ? 0
                : endless && (b == 0 || r.coin()) ? r.integer(4100, 4300)
                                                  : r.integer(1, limit);
      isize n = d.form == call_form::batch ? shared_n : few_or_many(std::max<isize>(1, limit / 4));
      if (same && b > 0) m = x.m[0], n = x.n[0];
      if (m < n && r.coin(0.5)) m = n + r.integer(0, limit / 8);
      x.m.push_back(m), x.n.push_back(n);
    }
    d.calls.push_back(x);
    if (r.coin(0.25)) {  // and on
      for (std::size_t b = 0; b < x.n.size(); ++b) {
        x.n[b] = 1;
        x.m[b] += 1;
      }
      d.calls.push_back(x);
    }
  }
}

double work(const draw& d) {
  double pairs = 0;
  for (const lengths& c : d.calls)
    for (std::size_t b = 0; b < c.n.size(); ++b) pairs += static_cast<double>(c.n[b]) * static_cast<double>(c.m[b]);
  return pairs * static_cast<double>(d.H * (d.d + d.e + 12));
}

void draw_sizes(draw& d, random& r) {
  d.B = d.form == call_form::append                                ? 1
        : d.form == call_form::views || d.form == call_form::state ? r.integer(1, 2)
                                                                   : r.integer(1, 4);
  const bool endless = !d.backward && d.store != store_form::ring && !in_order(d) && r.coin(0.1);
  if (endless) {
    d.d = r.integer(1, 12), d.e = r.integer(1, 12), d.turned = std::min(d.turned, d.d / 2 * 2);
    d.H = std::min<isize>(d.H / d.G, 4) * std::min<isize>(d.G, 2), d.G = std::min<isize>(d.G, 2);
  }
  if (endless && d.turned == 0) d.rope = rope_form::none, d.positions = false;
  if (endless) d.B = std::min<isize>(d.B, 2);
  const double most_work = d.backward ? 4e5 : endless ? 4e6 : 2e6;
  for (isize limit = endless ? 64 : r.coin(0.2) ? 24 : 300; limit > 1; limit /= 2) {
    draw_lengths(d, r, limit, endless);
    if (work(d) <= most_work) break;
  }
}

void draw_store_sizes(draw& d, random& r) {
  isize longest = 1;
  for (const lengths& c : d.calls) longest = std::max(longest, most(c.n));
  d.chunk = in_order(d) ? r.integer(1, 24) : longest;
  d.ring_window = d.width, d.ring_first = 0;
  const bool first = d.mask == mask_form::window_first || d.mask == mask_form::both || d.mask == mask_form::every;
  if (first) d.ring_first = d.first;
  if (!bounded(d)) d.ring_first = r.integer(0, 4);
}

/// Makes the draw wrong, where what is to be wrong is there.
void draw_fault(draw& d, random& r) {
  bool rows = false, tokens = false;
  for (const lengths& c : d.calls) rows = rows || most(c.n) > 0, tokens = tokens || most(c.m) > 0;
  if (!rows || !tokens) return;
  const fault f = any(r, fault::ring);
  const auto set = [&](bool can) {
    if (can) d.fault = f;
  };
  switch (f) {
    case fault::none: break;
    case fault::heads:
      set(d.G >= 2);
      if (d.fault != fault::none) d.H += 1;
      break;
    case fault::parameter: set(true); break;
    case fault::sink:
      set(true);
      if (d.fault != fault::none) d.sinks = true;
      break;
    case fault::workspace:
      set(d.form != call_form::append);
      if (d.fault != fault::none) d.workspace = true;
      break;
    case fault::positions:
      set(d.rope == rope_form::none);
      if (d.fault != fault::none) d.positions = true;
      break;
    case fault::rope: set(d.rope != rope_form::none); break;
    case fault::out: set(true); break;
    case fault::full: set(d.store == store_form::contiguous || d.store == store_form::paged); break;
    case fault::table:
      set(d.mask == mask_form::boolean || d.score == score_form::bias || d.score == score_form::cap_bias);
      break;
    case fault::ring:
      set(d.store == store_form::ring && d.form != call_form::state && bounded(d) && d.width > 1);
      break;
  }
  if (d.fault == fault::ring) d.ring_window = 1, d.chunk = 1;
  if (d.fault != fault::none) d.backward = false;
}

/// A key is gone that the first row of a part of the call may see: n rows, m tokens after the call.
bool ring_drops(const draw& d, isize n, isize m) {
  const isize size = d.ring_window + d.chunk - 1, most_rows = d.form == call_form::append ? d.chunk : n;
  for (isize first = 0; first < n; first += most_rows) {
    const isize before = m - n + first, after = before + std::min(most_rows, n - first);
    if (after > d.ring_first + size && before - d.width + 1 < after - size) return true;
  }
  return false;
}

draw one_draw(std::uint64_t seed, random& r) {
  draw d;
  d.seed = seed;
  draw_form(d, r);
  draw_heads(d, r);
  draw_mask(d, r);
  draw_score(d, r);
  d.backward = d.form == call_form::views && r.coin(0.6);
  if (d.backward && r.coin(0.9)) {
    d.rope = rope_form::none, d.positions = false;
    if (d.score == score_form::functor_without_slope) d.score = score_form::functor;
  }
  const bool table = d.score == score_form::bias || d.score == score_form::cap_bias ||
                     d.score == score_form::relative || d.score == score_form::cap_relative_alibi;
  d.dbias = d.backward && (table ? r.coin(0.8) : r.coin(0.02));
  if (d.backward && d.out != dtype::f64) d.out = dtype::f32;  // what backward is given is not rounded
  draw_sizes(d, r);
  draw_store_sizes(d, r);
  d.lse = d.backward || r.coin(0.8);
  d.workspace = r.coin(0.4);
  d.threads = static_cast<int>(r.integer(1, 3));
  d.poison = r.coin(0.4) ? poison_form::none : r.coin() ? poison_form::nan : poison_form::infinity;
  if (r.coin(0.12)) draw_fault(d, r);
  return d;
}

/// How many things a draw has that are seldom drawn.
int rarity(const draw& d) {
  const auto one = [](bool x) { return x ? 1 : 0; };
  isize keys = 0;
  bool more_rows = false;
  for (const lengths& c : d.calls)
    for (std::size_t b = 0; b < c.n.size(); ++b)
      keys = std::max(keys, c.m[b]), more_rows = more_rows || c.n[b] > c.m[b];
  const bool pages = d.store == store_form::paged || d.store == store_form::engine;
  return one(pages) + one(pages && d.page >= 16) + one(d.shared) + one(d.rows == dtype::i8) + one(more_rows) +
         one(keys > 4096) + one(!causal(d) && d.mask != mask_form::none) + one(d.form == call_form::state) +
         one(d.mask == mask_form::block || d.mask == mask_form::boolean || d.mask == mask_form::key_lengths) +
         one(fits_one_size(d)) + one(d.dbias) + one(d.align != place::bottom_right) +
         one(d.scaling != scaling_form::none) +
         one(d.score == score_form::functor_without_slope || !d.per_row || !d.per_key);
}

/// There is a row or a key that the library turns.
bool turns_rows(const draw& d) {
  for (const lengths& c : d.calls)
    if (most(c.n) > 0 || (sequences(d) && d.store != store_form::engine && most(c.m) > 0)) return true;
  return false;
}

}  // namespace

/// The rarest of a few, so that rare things meet.
draw make_draw(std::uint64_t seed) {
  random r(stream(seed, 0));
  draw best = one_draw(seed, r);
  if (r.coin(0.4)) return best;
  for (int x = 0; x < 3; ++x) {
    const draw other = one_draw(seed, r);
    if (refused(other).empty() && rarity(other) > rarity(best)) best = other;
  }
  return best;
}

std::string refused(const draw& d) {
  if (d.fault != fault::none && d.fault != fault::ring) return "a fault on purpose";
  if (in_order(d) && !causal(d)) return "the mask is not causal";
  if (d.form == call_form::state && d.store == store_form::ring && !bounded(d)) return "a ring for an unbounded mask";
  if (d.rope != rope_form::none && d.turned > d.d && turns_rows(d)) return "rope is wider than a row";
  if (d.backward && d.rope != rope_form::none) return "backward takes rows that are turned";
  if (d.backward && d.score == score_form::functor_without_slope) return "backward without a slope";
  if (d.dbias && d.score != score_form::bias && d.score != score_form::cap_bias && d.score != score_form::relative &&
      d.score != score_form::cap_relative_alibi)
    return "dbias without a table";
  for (const lengths& c : d.calls) {
    if (fits_one_size(d) && !(alike(c.n) && alike(c.m))) return "a table of one size for several";
    for (std::size_t b = 0; b < c.n.size(); ++b) {
      const isize n = c.n[b], m = c.m[b];
      if (d.mask == mask_form::tree && n > m) return "a tree of more tokens than there are";
      const bool needs_all = d.form == call_form::views || (!d.positions && n > 0);
      if (d.rope != rope_form::none && n > m && needs_all) return "rows before the first token";
      if (d.store == store_form::ring && d.form != call_form::state && bounded(d) && ring_drops(d, n, m))
        return "the ring has dropped a key that a row sees";
    }
  }
  return {};
}

}  // namespace draws
