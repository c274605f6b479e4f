// SPDX-License-Identifier: MIT
/// @file  Numbers of a draw, and the judge.

#include "draws/problem.hpp"

#include <fovea/softmax/reference.hpp>

namespace draws {
namespace {

std::size_t index(isize x) { return static_cast<std::size_t>(x); }

double rounded(dtype type, double x) {
  double room = 0;
  store_from_double(type, &room, 0, x);
  return load_as_double(type, &room, 0);
}
dtype wide(dtype t) { return t == dtype::f64 ? dtype::f64 : dtype::f32; }

}  // namespace

exec_ref threads_of(int count) {
  static const threads two(2), three(3);
  return count == 1 ? exec_ref(serial) : count == 2 ? exec_ref(two) : exec_ref(three);
}

problem_of_draw::problem_of_draw(const draw& x, sabotage s) : d(x), wanted(s) {
  for (std::size_t c = 0; c < d.calls.size(); ++c) of_call.push_back(std::make_unique<rules>(d, c));
  make_positions();
  make_numbers();
  plant_poison();
}

isize problem_of_draw::shared_tokens(isize b) const {
  if (!d.shared || b == 0) return 0;
  const auto& m = d.calls.front().m;
  return std::min(m[0], m[index(b)]) / 2;
}

void problem_of_draw::make_positions() {
  test::random r(stream(d.seed, 1));
  isize last = 0;
  for (isize b = 0; b < d.B; ++b) {
    const isize all = d.calls.back().m[index(b)], n = d.calls.back().n[index(b)];
    const isize given = d.form == call_form::views ? all - n : 0;  // keys before them stand where they are
    std::vector<std::int32_t> x;
    for (isize j = 0; j < all; ++j) {
      const bool moved = d.positions && j >= given;
      x.push_back(static_cast<std::int32_t>(moved && j >= shared_tokens(b) ? 2 * j + r.integer(0, 3) : j));
      last = std::max<isize>(last, x.back());
    }
    if (d.shared && b > 0)
      for (isize j = 0; j < shared_tokens(b); ++j) x[index(j)] = at[0][index(j)];
    at.push_back(x);
  }
  if (d.rope == rope_form::none) return;
  rope_options o{.width = d.turned,
                 .positions = last + 3,
                 .pair = d.rope == rope_form::neox ? rope::pairing::neox : rope::pairing::gptj,
                 .f64 = d.type == dtype::f64};
  if (d.scaling == scaling_form::linear) o.scaling = rope_linear{4};
  if (d.scaling == scaling_form::yarn) o.scaling = rope_yarn{.factor = 4, .original = 64};
  if (d.scaling == scaling_form::llama3) o.scaling = rope_llama3{.factor = 8, .original = 64};
  table.emplace(o);
  turns = d.turned <= d.d;
  turn_ = *table, late_ = *table;
  if (d.fault == fault::rope) turn_.positions = last;
  late_.cos += d.turned / 2, late_.sin += d.turned / 2;
  if (late_.cos_f64 != nullptr) late_.cos_f64 += d.turned / 2, late_.sin_f64 += d.turned / 2;
}

void problem_of_draw::make_numbers() {
  test::random r(stream(d.seed, 2));
  const auto fill = [&](numbers& x) {
    for (double& y : x.data) y = rounded(d.type, r.normal());
  };
  for (isize b = 0; b < d.B; ++b) {
    const isize all = d.calls.back().m[index(b)];
    k.emplace_back(d.G, all, d.d), v.emplace_back(d.G, all, d.e);
    fill(k.back()), fill(v.back());
    for (numbers* x : {&k.back(), &v.back()}) {
      const numbers& first = x == &k.back() ? k[0] : v[0];
      for (isize g = 0; g < d.G; ++g)
        for (isize j = 0; j < shared_tokens(b); ++j) std::copy_n(first.row(g, j), x->width, x->row(g, j));
    }
  }
  for (const lengths& c : d.calls) {
    q.emplace_back();
    for (isize b = 0; b < d.B; ++b) {
      q.back().emplace_back(d.H, c.n[index(b)], d.d);
      fill(q.back().back());
    }
  }
  for (isize h = 0; h < d.H; ++h) sinks.push_back(static_cast<float>(1.5 * r.normal()));
  if (d.fault == fault::sink) sinks[0] = std::numeric_limits<float>::infinity();
}

/// Keys and values that no row of any call may see hold NaN or infinity.
void problem_of_draw::plant_poison() {
  for (isize b = 0; b < d.B; ++b) poisoned.emplace_back(index(d.G * tokens(b)), std::uint8_t{0});
  if (d.poison == poison_form::none || !refused(d).empty()) return;  // rules of a refused draw need not fit it
  test::random r(stream(d.seed, 3));
  std::vector<std::vector<std::uint8_t>> seen = poisoned;
  for (std::size_t c = 0; c < d.calls.size(); ++c)
    for (isize b = 0; b < d.B; ++b)
      for (isize h = 0; h < d.H; ++h) {
        const isize n = d.calls[c].n[index(b)], m = d.calls[c].m[index(b)], g = h / (d.H / d.G);
        const mask_site site{b, h, n, m, d.H, d.G, d.B};
        for (isize j = 0; j < m; ++j)
          for (isize i = 0; i < n && seen[index(b)][index(g * tokens(b) + j)] == 0; ++i)
            if (of_call[c]->sees(site, i, j)) seen[index(b)][index(g * tokens(b) + j)] = 1;
      }
  for (isize b = 0; b < d.B; ++b)
    for (isize g = 0; g < d.G; ++g)
      for (isize j = shared_tokens(b); j < tokens(b); ++j) {
        bool hidden = seen[index(b)][index(g * tokens(b) + j)] == 0;
        for (isize other = 1; b == 0 && other < d.B; ++other)
          if (j < shared_tokens(other)) hidden = false;
        if (!hidden) continue;
        poisoned[index(b)][index(g * tokens(b) + j)] = 1;
        const auto bad = [&] {
          if (d.poison == poison_form::nan) return std::nan("");
          return r.coin() ? HUGE_VAL : -HUGE_VAL;
        };
        for (isize c = 0; c < d.d; ++c) k[index(b)].row(g, j)[c] = bad();
        for (isize c = 0; c < d.e; ++c) v[index(b)].row(g, j)[c] = bad();
      }
}

softmax_attention problem_of_draw::mechanism(std::size_t call) {
  softmax_attention m;
  m.mask = of_call[call]->mask, m.score = of_call[call]->score;
  if (d.scale != 0) m.scale = d.scale;
  if (d.fault == fault::parameter) m.scale = -1.0;
  if (d.sinks) m.sinks = sinks.data(), m.sink_count = d.H;
  if (d.rope != rope_form::none) m.turn = turn();
  if (d.form == call_form::state) {
    m.store.kind = d.store == store_form::ring ? state_store::form::ring : state_store::form::contiguous;
    if (d.rows != d.type) m.store.type = d.rows;
    m.store.scale = d.scale_of, m.store.chunk = d.chunk;
  }
  spoil(m, call);
  return m;
}

test::tensor problem_of_draw::tensor_of(const std::vector<const numbers*>& from, isize first, isize count) const {
  const numbers& x = *from[0];
  test::tensor t(d.type, static_cast<isize>(from.size()), x.heads, count, x.width, d.layout);
  for (isize b = 0; b < t.batch(); ++b)
    for (isize h = 0; h < x.heads; ++h)
      for (isize j = 0; j < count; ++j)
        for (isize c = 0; c < x.width; ++c) t.set(b, h, j, c, from[index(b)]->row(h, first + j)[c]);
  return t;
}

std::vector<double> problem_of_draw::turned(const double* row, isize position) const {
  std::vector<double> x(row, row + d.d);
  if (!turns) return x;
  if (d.type == dtype::f64) {
    rotate(turn_, position, x.data());
    return x;
  }
  std::vector<float> y(x.begin(), x.end());
  rotate(turn_, position, y.data());
  const bool neox = d.rope == rope_form::neox;
  for (isize i = 0; i < d.turned / 2; ++i) {  // as the formula has it
    const isize a = neox ? i : 2 * i, b = neox ? i + d.turned / 2 : 2 * i + 1;
    const double angle = static_cast<double>(position) * table->frequencies()[index(i)], size = table->magnitude(),
                 ca = size * std::cos(angle), sa = size * std::sin(angle), u = row[a] * ca - row[b] * sa,
                 w = row[b] * ca + row[a] * sa,
                 allowed = 8 * test::eps(dtype::f32) * (std::fabs(row[a]) + std::fabs(row[b]));
    demand(!std::isfinite(row[a]) || !std::isfinite(row[b]) ||
               (std::fabs(u - static_cast<double>(y[index(a)])) <= allowed &&
                std::fabs(w - static_cast<double>(y[index(b)])) <= allowed),
           "rope: pair ", i, " at position ", position, " is not turned by the angle of the definition");
  }
  return {y.begin(), y.end()};
}
std::vector<double> problem_of_draw::stored_key(isize b, isize g, isize j, dtype type) const {
  auto x = turned(k[index(b)].row(g, j), at[index(b)][index(j)]);
  for (double& y : x) y = type == dtype::i8 ? y : rounded(type, y);
  return x;
}
std::vector<double> problem_of_draw::stored_value(isize b, isize g, isize j, dtype type) const {
  const double* row = v[index(b)].row(g, j);
  std::vector<double> x(row, row + d.e);
  for (double& y : x) y = type == dtype::i8 ? y : rounded(type, y);
  return x;
}

void problem_of_draw::judge(std::size_t call, isize b, const tensor_ref& out, const tensor_ref& lse,
                            const test::tensor& keys, const test::tensor& values,
                            const std::function<bool(isize, isize)>& held) const {
  const isize n = d.calls[call].n[index(b)], m = keys.length();
  if (n == 0) return;
  test::tensor rows(dtype::f64, 1, d.H, n, d.d);
  for (isize h = 0; h < d.H; ++h)
    for (isize i = 0; i < n; ++i) {
      const double* row = q[call][index(b)].row(h, i);
      const isize token = m - n + i;
      const auto x =
          turns ? turned(row, token < 0 ? 0 : at[index(b)][index(token)]) : std::vector<double>(row, row + d.d);
      for (isize c = 0; c < d.d; ++c) rows.set(0, h, i, c, x[index(c)]);
    }
  struct seen_and_held {
    plain_mask rule;
    const std::function<bool(isize, isize)>* held;
    bool operator()(const mask_site& site, isize i, isize j) const { return (*held)(i, j) && rule(site, i, j); }
  };
  double largest = 0;
  const plain_mask rule{of_call[call].get(), b, d.B};
  softmax_attention twin;
  twin.mask = mask_function{seen_and_held{rule, &held}};
  twin.score = plain_score<true>{rule, &largest};
  if (d.scale != 0) twin.scale = d.scale;
  if (d.sinks) twin.sinks = sinks.data();
  test::tensor want(dtype::f64, 1, d.H, n, d.e), want_lse(dtype::f64, 1, d.H, n, 1);
  reference::prefill(twin, {rows, keys, values, want, want_lse, {}});

  const auto array_of = [](const tensor_ref& t) {
    test::array a{{t.batch, t.heads, t.length, t.width}, {}};
    for (isize h = 0; h < t.heads; ++h)
      for (isize i = 0; i < t.length; ++i)
        for (isize c = 0; c < t.width; ++c) a.data.push_back(t.get(0, h, i, c));
    return a;
  };
  // The error of an exponential is that of its argument: bounds grow with the logits.
  // The twin sums in double as well, in another order.
  const double c = 64 + 16 * largest + (d.type == dtype::f64 ? static_cast<double>(m) / 4 : 0);
  const test::array wanted_out = want.values();
  // The mean of many values is small, and its error is that of their sum.
  double scale = m > 512 ? 0.8 : 0;
  for (double x : wanted_out.data) scale = scale > 0 ? std::fmax(scale, std::fabs(x)) : 0;
  const auto close =
      test::compare(array_of(out), wanted_out, {.c = c, .acc = wide(d.type), .stored = out.type, .scale = scale});
  demand(close.ok, "call ", call, ", item ", b, ", out: ", close.text);
  if (!lse) return;
  const auto sums = test::compare(array_of(lse), want_lse.values(),
                                  {.c = c, .acc = wide(d.type), .stored = lse.type, .scale = std::fmax(4.0, largest)});
  demand(sums.ok, "call ", call, ", item ", b, ", lse: ", sums.text);
}

}  // namespace draws
