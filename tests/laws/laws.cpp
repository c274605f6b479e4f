// SPDX-License-Identifier: MIT
/// @file  The laws, written once against laws::subject. Each throws `broken`, or any exception, where a mechanism breaks it.

#include "laws/laws.hpp"

#include <algorithm>
#include <numeric>

namespace laws {

inputs inputs::tokens(isize first, isize count) const {
  inputs x;
  const auto cut = [&](const tensor& t) { return t.length() > 0 ? test::rows_of(t, first, count) : tensor(); };
  x.q = cut(q), x.k = cut(k), x.v = cut(v), x.log_decay = cut(log_decay), x.beta = cut(beta), x.erase = cut(erase), x.write = cut(write);
  if (x.q.batch() == 0) x.q = tensor(q.type(), q.batch(), q.heads(), 0, q.width());
  if (x.k.batch() == 0) x.k = tensor(k.type(), k.batch(), k.heads(), 0, k.width()), x.v = tensor(v.type(), v.batch(), v.heads(), 0, v.width());
  return x;
}
inputs inputs::item(isize b) const {
  const auto cut = [&](const tensor& t) {
    if (t.length() == 0) return t;
    tensor one(t.type(), 1, t.heads(), t.length(), t.width());
    isize h = 0, i = 0, c = 0;
    one.fill([&] {
      const double x = t.get(b, h, i, c);
      if (++c == t.width()) c = 0, ++i;
      if (i == t.length()) i = 0, ++h;
      return x;
    });
    return one;
  };
  inputs x;
  x.q = cut(q), x.k = cut(k), x.v = cut(v), x.log_decay = cut(log_decay), x.beta = cut(beta), x.erase = cut(erase), x.write = cut(write);
  return x;
}
fovea::gates inputs::gates() const {
  fovea::gates g;
  if (log_decay.length() > 0) g.log_decay = log_decay;
  if (beta.length() > 0) g.beta = beta;
  if (erase.length() > 0) g.erase = erase;
  if (write.length() > 0) g.write = write;
  return g;
}

namespace {

using test::layout;

struct broken : std::runtime_error {
  using std::runtime_error::runtime_error;
};
template <class... Args>
void demand(bool holds, const Args&... args) {
  if (!holds) throw broken(fovea::detail::sentence(args...));
}

struct trial {
  shape s;
  layout l;
  dtype out;
  std::string text() const {
    return fovea::detail::sentence("B, H, G, n, m, d, e = ", s.B, ", ", s.H, ", ", s.G, ", ", s.n, ", ", s.m, ", ", s.d, ", ", s.e, ", ", fovea::name_of(s.type), " -> ",
                                   fovea::name_of(out), ", ", test::name_of(l), ": ");
  }
};

constexpr shape shapes[] = {
    // B, H, G, n, m, d, e
    {1, 1, 1, 1, 1, 1, 1},      {1, 1, 1, 2, 2, 17, 17},     {2, 3, 1, 17, 17, 40, 24},   {1, 9, 3, 33, 33, 64, 64},  {1, 2, 2, 130, 130, 80, 96}, {2, 1, 1, 17, 33, 128, 128},
    {1, 2, 1, 33, 17, 64, 40},  {1, 4, 2, 1, 130, 256, 64},  {2, 2, 2, 2, 130, 96, 17},   {1, 1, 1, 130, 33, 17, 64}, {1, 3, 3, 33, 130, 40, 256}, {2, 6, 2, 130, 130, 64, 64},
    {1, 2, 2, 33, 33, 128, 80}, {3, 2, 1, 130, 130, 17, 1},  {1, 1, 1, 33, 33, 256, 256}, {1, 1, 1, 0, 17, 64, 64},   {1, 2, 1, 17, 0, 64, 64},    {1, 1, 1, 33, 33, 96, 96},
};
constexpr dtype types[] = {dtype::f32, dtype::bf16, dtype::f64, dtype::f16};

/// Calls f(trial) for the accepted shapes that `wanted` picks, every `stride`-th of them from `start`; at least one must be left.
template <class Wanted, class F>
std::string over_shapes(const subject& subject, std::size_t start, std::size_t stride, Wanted&& wanted, F&& f) {
  std::size_t accepted = 0, tried = 0, seen = 0;
  for (const shape& s : shapes) accepted += wanted(s) && subject.accepts(s) ? 1 : 0;
  if (accepted < 3 * stride) stride = 1;
  for (std::size_t x = 0; x < std::size(shapes); ++x) {
    shape s = shapes[x];
    s.type = types[(x + start) % 4];
    if (!wanted(s) || !subject.accepts(s)) continue;
    if ((seen++ + start) % stride != 0) continue;
    trial t{s, test::layouts[(x / 2 + start) % 4], s.type};
    if (fovea::size_of(s.type) == 2 && x % 3 == 0) t.out = dtype::f32;
    ++tried;
    try {
      f(t);
    } catch (const std::exception& e) {
      return t.text() + e.what();
    }
  }
  return tried > 0 ? std::string() : "no shape was tried: this law would hold for anything";
}
bool any_shape(const shape&) { return true; }
bool whole_sequence(const shape& s) { return s.n == s.m && s.n > 0; }

inputs make_inputs(const subject& subject, const trial& t, std::uint64_t seed, double deviation = 1.0) {
  test::random r(seed + static_cast<std::uint64_t>(t.s.n * 1000 + t.s.d));
  inputs x;
  x.q = test::normal(r, t.s.type, t.s.B, t.s.H, t.s.n, t.s.d, t.l, deviation);
  x.k = test::normal(r, t.s.type, t.s.B, t.s.G, t.s.m, t.s.d, t.l, deviation);
  x.v = test::normal(r, t.s.type, t.s.B, t.s.G, t.s.m, t.s.e, t.l);
  subject.adjust(r, x);
  return x;
}

struct result {
  tensor out, lse;
};
/// NaN-filled outputs for x.
result outputs(const subject& subject, const inputs& x, dtype type, layout l) {
  result y;
  y.out = test::unwritten(type, x.q.batch(), x.q.heads(), x.q.length(), x.v.width(), l);
  if (subject.promises.lse) y.lse = test::unwritten(x.q.type() == dtype::f64 ? dtype::f64 : dtype::f32, x.q.batch(), x.q.heads(), x.q.length(), 1, l);
  return y;
}
call_options options(const inputs& x, result& y) {
  call_options o;
  if (y.lse.size() > 0) o.lse = y.lse;
  o.gates = x.gates();
  return o;
}
void demand_guards(const inputs& x, const result& y) {
  demand(y.out.guards_intact(), "memory beside out was written");
  demand(y.lse.size() == 0 || y.lse.guards_intact(), "memory beside lse was written");
  demand(x.q.guards_intact() && x.k.guards_intact() && x.v.guards_intact(), "memory beside an input was written");
}
result call(const subject& subject, const instance& m, exec_ref exec, const inputs& x, const trial& t) {
  result y = outputs(subject, x, t.out, t.l);
  m.prefill(exec, x, y.out, options(x, y));
  demand_guards(x, y);
  return y;
}
result call(const subject& subject, const instance& m, exec_ref exec, const inputs& x, const trial& t, state& s) {
  result y = outputs(subject, x, t.out, t.l);
  m.prefill(exec, x, y.out, s, options(x, y));
  demand_guards(x, y);
  return y;
}
result reference(const subject& subject, const instance& m, const inputs& x) {
  result want;
  want.out = test::unwritten(dtype::f64, x.q.batch(), x.q.heads(), x.q.length(), x.v.width());
  if (subject.promises.lse) want.lse = test::unwritten(dtype::f64, x.q.batch(), x.q.heads(), x.q.length(), 1);
  tensor_mut lse;
  if (want.lse.size() > 0) lse = want.lse;
  m.reference(x, want.out, lse);
  return want;
}

/// `strain`: how much larger than 1 the logits are.
void demand_close(const subject& subject, const result& got, const result& want, const trial& t, double strain = 1.0) {
  const dtype acc = t.s.type == dtype::f64 ? dtype::f64 : dtype::f32;
  const auto close = test::compare(got.out.values(), want.out.values(), {.c = subject.promises.c * strain, .acc = acc, .stored = got.out.type()});
  demand(close.ok, "out: ", close.text);
  if (got.lse.size() == 0) return;
  const auto sums = test::compare(got.lse.values(), want.lse.values(), {.c = subject.promises.c * strain, .acc = acc, .stored = got.lse.type(), .scale = 4.0 * strain});
  demand(sums.ok, "lse: ", sums.text);
}
void demand_same(const result& a, const result& b, const char* what) {
  const std::string out = test::bits_differ(a.out, b.out), lse = a.lse.size() > 0 ? test::bits_differ(a.lse, b.lse) : "";
  demand(out.empty(), what, ": out differs at ", out);
  demand(lse.empty(), what, ": lse differs at ", lse);
}
/// The rows of several calls, one after the other.
struct joined {
  result all;
  isize at = 0;
  void add(const result& part) {
    for (const auto& [to, from] : {std::pair{&all.out, &part.out}, std::pair{&all.lse, &part.lse}})
      for (isize b = 0; b < from->batch(); ++b)
        for (isize h = 0; h < from->heads(); ++h)
          for (isize i = 0; i < from->length(); ++i)
            for (isize c = 0; c < from->width(); ++c) to->set(b, h, at + i, c, from->get(b, h, i, c));
    at += part.out.length();
  }
};

}  // namespace

std::string prefill_is_reference(const subject& subject) {
  for (std::size_t round = 0; round < 2; ++round) {  // every shape with two of the four storage types
    const std::string fault = over_shapes(subject, 2 * round, 1, any_shape, [&](const trial& t) {
      const auto m = subject.make(t.s);
      const inputs x = make_inputs(subject, t, 1);
      demand_close(subject, call(subject, *m, serial, x, t), reference(subject, *m, x), t);
    });
    if (!fault.empty()) return fault;
  }
  return {};
}

std::string every_output_is_written(const subject& subject) {
  for (std::size_t l = 0; l < 4; ++l) {
    const std::string fault = over_shapes(subject, l, 3, [](const shape& s) { return s.m > 0; }, [&](trial t) {
      t.l = test::layouts[l];
      const auto m = subject.make(t.s);
      const inputs x = make_inputs(subject, t, 2);
      const result y = call(subject, *m, serial, x, t);
      for (double v : y.out.values().data) demand(std::isfinite(v), "an element of out is not finite, or was not written");
      if (y.lse.size() > 0)
        for (double v : y.lse.values().data) demand(!std::isnan(v), "an element of lse was not written");
    });
    if (!fault.empty()) return fault;
  }
  return {};
}

std::string nothing_to_see_gives_zeros(const subject& subject) {
  const auto dead = [&](const shape& s) { return s.n > 0 && (s.m == 0 || (subject.promises.causal && s.m < s.n)); };
  bool applies = false;
  for (const shape& s : shapes) applies = applies || (dead(s) && subject.accepts(s));
  if (!applies) return {};  // the mechanism takes no such problem
  return over_shapes(subject, 1, 1, dead, [&](const trial& t) {
    const auto m = subject.make(t.s);
    const inputs x = make_inputs(subject, t, 3);
    const result y = call(subject, *m, serial, x, t);
    for (isize b = 0; b < t.s.B; ++b)
      for (isize h = 0; h < t.s.H; ++h)
        for (isize i = 0; i < t.s.n - t.s.m; ++i) {
          for (isize c = 0; c < t.s.e; ++c) demand(y.out.get(b, h, i, c) == 0, "row ", i, " sees nothing and is ", y.out.get(b, h, i, c), "; wanted 0");
          if (y.lse.size() > 0) demand(y.lse.get(b, h, i, 0) == -HUGE_VAL, "row ", i, " sees nothing and has an lse of ", y.lse.get(b, h, i, 0));
        }
  });
}

std::string huge_logits_stay_right(const subject& subject) {
  if (!subject.promises.logits) return {};
  return over_shapes(subject, 0, 2, [](const shape& s) { return s.m > 1; }, [&](const trial& t) {
    const auto m = subject.make(t.s);
    const inputs x = make_inputs(subject, t, 4, 70.0);  // q.k / sqrt(d) ~ 5000 * normal
    demand_close(subject, call(subject, *m, serial, x, t), reference(subject, *m, x), t, 1e4);
  });
}

std::string later_keys_change_nothing(const subject& subject) {
  if (!subject.promises.causal) return {};
  const double huge = 1e30, infinity = HUGE_VAL, bad = std::nan("");
  for (std::size_t round = 0; round < 4; ++round) {
    const double plant[] = {huge, infinity, bad, -3.0};
    const std::string fault = over_shapes(subject, round, 3, [](const shape& s) { return s.n > 1 && s.m > 1; }, [&](const trial& t) {
      const auto m = subject.make(t.s);
      const inputs x = make_inputs(subject, t, 5);
      const result before = call(subject, *m, serial, x, t);
      for (const isize from : {isize{1}, t.s.m / 2, t.s.m - 1}) {
        inputs y = make_inputs(subject, t, 5);
        for (tensor* z : {&y.k, &y.v, &y.beta, &y.erase, &y.write, &y.log_decay})
          for (isize b = 0; b < z->batch(); ++b)
            for (isize g = 0; g < z->heads(); ++g)
              for (isize j = from; j < z->length(); ++j)
                for (isize c = 0; c < z->width(); ++c) z->set(b, g, j, c, z == &y.log_decay ? -std::fabs(plant[round]) : plant[round]);
        const result after = call(subject, *m, serial, y, t);
        const isize rows = std::clamp<isize>(from - (t.s.m - t.s.n), 0, t.s.n);  // rows before position `from`
        const std::string out = test::bits_differ(test::rows_of(before.out, 0, rows), test::rows_of(after.out, 0, rows));
        demand(out.empty(), "keys from ", from, " on were set to ", plant[round], " and an earlier row changed: ", out);
        if (before.lse.size() > 0) demand(test::same_bits(test::rows_of(before.lse, 0, rows), test::rows_of(after.lse, 0, rows)), "an earlier lse changed");
      }
    });
    if (!fault.empty()) return fault;
  }
  return {};
}

std::string scaling_values_scales_out(const subject& subject) {
  return over_shapes(subject, 0, 2, [](const shape& s) { return s.n > 0; }, [&](trial t) {
    if (t.out != dtype::f64) t.out = dtype::f32;  // 16-bit results may be denormal
    const auto m = subject.make(t.s);
    inputs x = make_inputs(subject, t, 6);
    const result one = call(subject, *m, serial, x, t);
    std::size_t at = 0;
    const auto v = x.v.values();
    x.v.fill([&] { return -4.0 * v.data[at++]; });  // exact in every type
    const result four = call(subject, *m, serial, x, t);
    const auto a = one.out.values(), b = four.out.values();
    for (std::size_t i = 0; i < a.data.size(); ++i)
      if (b.data[i] != -4.0 * a.data[i] && !(std::fabs(a.data[i]) < 1e-30))
        throw broken(fovea::detail::sentence("v times -4 gives ", b.data[i], " for ", a.data[i], " at ", test::detail::position(a.dims, static_cast<isize>(i))));
    if (one.lse.size() > 0) demand(test::same_bits(one.lse, four.lse), "the lse depends on v");
  });
}

std::string key_order_changes_nothing(const subject& subject) {
  if (!subject.promises.permutable) return {};
  return over_shapes(subject, 1, 2, [](const shape& s) { return s.n > 0 && s.m > 1; }, [&](const trial& t) {
    const auto m = subject.make(t.s);
    const inputs x = make_inputs(subject, t, 7);
    inputs y = make_inputs(subject, t, 7);
    for (const auto& [to, from] : {std::pair{&y.k, &x.k}, std::pair{&y.v, &x.v}})
      for (isize b = 0; b < to->batch(); ++b)
        for (isize g = 0; g < to->heads(); ++g)
          for (isize j = 0; j < t.s.m; ++j)
            for (isize c = 0; c < to->width(); ++c) to->set(b, g, t.s.m - 1 - (j + 3) % t.s.m, c, from->get(b, g, j, c));
    demand_close(subject, call(subject, *m, serial, y, t), reference(subject, *m, x), t);
  });
}

std::string threads_change_no_bit(const subject& subject) {
  const threads two(2), three(3);
  const executor backwards(4, [](isize n, auto&& f) {
    for (isize i = n - 1; i >= 0; --i) f(i);
  });
  return over_shapes(subject, 0, 2, any_shape, [&](const trial& t) {
    const auto m = subject.make(t.s);
    const inputs x = make_inputs(subject, t, 8);
    const result one = call(subject, *m, serial, x, t);
    demand_same(one, call(subject, *m, two, x, t), "2 threads");
    demand_same(one, call(subject, *m, three, x, t), "3 threads");
    demand_same(one, call(subject, *m, backwards, x, t), "an executor of 4 that runs backwards");
    if (!subject.streaming || !whole_sequence(t.s)) return;
    state a = m->make_state(t.s), b = m->make_state(t.s);
    demand_same(call(subject, *m, serial, x, t, a), call(subject, *m, three, x, t, b), "3 threads with a state");
    demand(a.save() == b.save(), "3 threads leave another state");
  });
}

std::string batch_changes_no_bit(const subject& subject) {
  return over_shapes(subject, 0, 1, [](const shape& s) { return s.B > 1; }, [&](const trial& t) {
    const inputs x = make_inputs(subject, t, 9);
    const result whole = call(subject, *subject.make(t.s), serial, x, t);
    trial alone = t;
    alone.s.B = 1;
    const auto m = subject.make(alone.s);
    for (isize b = 0; b < t.s.B; ++b) {
      const inputs one = x.item(b);
      const result y = call(subject, *m, serial, one, alone);
      inputs same;  // item b of the whole result, cut the same way
      same.q = whole.out, same.k = whole.lse;
      const inputs cut = same.item(b);
      demand(test::same_bits(y.out, cut.q), "item ", b, " alone: ", test::bits_differ(y.out, cut.q));
      if (y.lse.size() > 0) demand(test::same_bits(y.lse, cut.k), "item ", b, " alone has another lse");
    }
  });
}

std::string workspace_is_what_is_needed(const subject& subject) {
  const threads two(2);
  return over_shapes(subject, 1, 2, [](const shape& s) { return s.n > 0; }, [&](const trial& t) {
    const auto m = subject.make(t.s);
    const inputs x = make_inputs(subject, t, 10);
    for (const exec_ref exec : {exec_ref(serial), exec_ref(two)}) {
      const result own = call(subject, *m, exec, x, t);
      const std::size_t need = m->workspace_size(t.s, exec.concurrency());
      for (const std::size_t shift : {std::size_t{1}, std::size_t{63}, std::size_t{64}}) {
        fovea::buffer memory(need + shift + 64);
        std::memset(memory.data(), 0xff, memory.size());
        result y = outputs(subject, x, t.out, t.l);
        call_options o = options(x, y);
        o.workspace = {memory.data() + shift, need};
        m->prefill(exec, x, y.out, o);
        demand_same(own, y, "the caller's workspace");
        bool intact = true;
        for (std::size_t i = 0; i < shift; ++i) intact = intact && memory.data()[i] == std::byte{0xff};
        for (std::size_t i = shift + need; i < memory.size(); ++i) intact = intact && memory.data()[i] == std::byte{0xff};
        demand(intact, "memory beside a workspace of ", need, " bytes was written");
        if (need == 0) continue;
        result untouched = outputs(subject, x, t.out, t.l);
        const auto before = untouched.out.bytes();
        o = options(x, untouched);
        o.workspace = {memory.data() + shift, need - 1};
        const std::string said = test::refusal([&] { m->prefill(exec, x, untouched.out, o); });
        demand(test::says(said, "workspace holds"), "a workspace one byte too small: ", said);
        demand(untouched.out.bytes() == before, "a refused call wrote to out");
      }
    }
    if (!subject.streaming || !whole_sequence(t.s)) return;
    state a = m->make_state(t.s), b = m->make_state(t.s);
    const std::size_t need = m->workspace_size(t.s, 1);
    fovea::buffer memory(need + 2);
    std::memset(memory.data(), 0xff, memory.size());
    result y = outputs(subject, x, t.out, t.l);
    call_options o = options(x, y);
    o.workspace = {memory.data() + 1, need};
    m->prefill(serial, x, y.out, a, o);
    demand_same(call(subject, *m, serial, x, t, b), y, "the caller's workspace with a state");
    demand(memory.data()[0] == std::byte{0xff} && memory.data()[need + 1] == std::byte{0xff}, "memory beside the workspace of a call with a state was written");
  });
}

std::string prefill_is_steps(const subject& subject) {
  if (!subject.streaming) return {};
  return over_shapes(subject, 0, 2, whole_sequence, [&](const trial& t) {
    const auto m = subject.make(t.s);
    const inputs x = make_inputs(subject, t, 11);
    const result want = reference(subject, *m, x);
    state whole = m->make_state(t.s), stepped = m->make_state(t.s);
    demand_close(subject, call(subject, *m, serial, x, t, whole), want, t);
    joined steps{outputs(subject, x, t.out, t.l)};
    for (isize i = 0; i < t.s.n; ++i) {
      const inputs token = x.tokens(i, 1);
      result y = outputs(subject, token, t.out, t.l);
      m->step(serial, token, y.out, stepped, options(token, y));
      demand_guards(token, y);
      steps.add(y);
    }
    demand_close(subject, steps.all, want, t);
    demand(whole.tokens() == t.s.n && stepped.tokens() == t.s.n, "the states count ", whole.tokens(), " and ", stepped.tokens(), " tokens");
  });
}

std::string chunks_join(const subject& subject) {
  if (!subject.streaming) return {};
  return over_shapes(subject, 1, 2, whole_sequence, [&](const trial& t) {
    const auto m = subject.make(t.s);
    const inputs x = make_inputs(subject, t, 12);
    const result want = reference(subject, *m, x);
    test::random r(13);
    for (int round = 0; round < 3; ++round) {
      state s = m->make_state(t.s);
      joined chunks{outputs(subject, x, t.out, t.l)};
      for (isize at = 0; at < t.s.n;) {
        const isize count = round == 0 ? std::min<isize>(t.s.n - at, (t.s.n + 1) / 2) : r.integer(1, std::min<isize>(t.s.n - at, 70));
        chunks.add(call(subject, *m, serial, x.tokens(at, count), t, s));
        at += count;
      }
      const isize tokens = s.tokens();
      call(subject, *m, serial, x.tokens(0, 0), t, s);  // no tokens: nothing happens
      demand(s.tokens() == tokens, "a call without tokens changed the state's count");
      demand_close(subject, chunks.all, want, t);
    }
  });
}

std::string merge_is_a_monoid(const subject& subject) {
  if (!subject.mergeable) return {};
  return over_shapes(subject, 0, 2, [](const shape& s) { return whole_sequence(s) && s.n >= 8; }, [&](const trial& t) {
    const auto m = subject.make(t.s);
    const inputs x = make_inputs(subject, t, 14);
    const isize a = t.s.n / 4, b = t.s.n / 2, c = t.s.n - 3;
    const auto part = [&](isize first, isize last) {
      state s = m->make_state(t.s);
      if (last > first) call(subject, *m, serial, x.tokens(first, last - first), t, s);
      return s;
    };
    const result want = reference(subject, *m, x);
    const auto continues = [&](state s, const char* what) {
      demand(s.tokens() == c, what, ": the state counts ", s.tokens(), " tokens; wanted ", c);
      const result y = call(subject, *m, serial, x.tokens(c, t.s.n - c), t, s);
      result tail;
      tail.out = test::rows_of(want.out, c, t.s.n - c);
      if (want.lse.size() > 0) tail.lse = test::rows_of(want.lse, c, t.s.n - c);
      try {
        demand_close(subject, y, tail, t);
      } catch (const broken& e) {
        throw broken(std::string(what) + ": " + e.what());
      }
    };
    const auto join = [&](state into, const state& from) {
      m->merge(into, from);
      return into;
    };
    continues(part(0, c), "no merge");
    continues(join(join(part(0, a), part(a, b)), part(b, c)), "(x y) z");
    continues(join(part(0, a), join(part(a, b), part(b, c))), "x (y z)");
    continues(join(part(0, 0), part(0, c)), "identity before");
    continues(join(part(0, c), part(0, 0)), "identity behind");
  });
}

std::string saved_states_continue(const subject& subject) {
  if (!subject.streaming) return {};
  return over_shapes(subject, 0, 3, [](const shape& s) { return whole_sequence(s) && s.n > 1; }, [&](const trial& t) {
    const auto m = subject.make(t.s);
    const inputs x = make_inputs(subject, t, 15), first = x.tokens(0, t.s.n / 2), rest = x.tokens(t.s.n / 2, t.s.n - t.s.n / 2);
    state s = m->make_state(t.s);
    call(subject, *m, serial, first, t, s);
    state snapshot = s, restored = state::restore(s.save());
    const result went_on = call(subject, *m, serial, rest, t, s);
    demand_same(went_on, call(subject, *m, serial, rest, t, restored), "the restored state");
    demand(s.save() == restored.save(), "the restored state ends differently");
    demand_same(went_on, call(subject, *m, serial, rest, t, snapshot), "the snapshot");
  });
}

std::string foreign_states_are_refused(const subject& subject) {
  if (!subject.streaming) return {};
  return over_shapes(subject, 1, 3, [](const shape& s) { return whole_sequence(s) && s.n > 3; }, [&](const trial& t) {
    const auto m = subject.make(t.s);
    const inputs x = make_inputs(subject, t, 16);
    const auto refused = [&](state s, const char* what) {
      result y = outputs(subject, x, t.out, t.l);
      const auto before = y.out.bytes(), saved_before = [&] { const auto b = s.save(); return b; }();
      const std::string said = test::refusal([&] { m->prefill(serial, x, y.out, s, options(x, y)); });
      demand(said != "accepted", what, " was accepted");
      demand(y.out.bytes() == before, what, " was refused, and out was written before");
      demand(s.save() == saved_before, what, " was refused, and the state was changed before");
    };
    const state good = m->make_state(t.s);
    refused(state(good.tag() + 1, good.sizes(), good.bytes()), "a foreign state");
    refused(state(), "an empty state");
    shape other = good.sizes();
    other.d += 1;
    refused(state(good.tag(), other, good.bytes()), "a state for another width");
    other = good.sizes(), other.H *= 2, other.G *= 2;
    refused(state(good.tag(), other, good.bytes()), "a state for more heads");
    refused(state(good.tag(), good.sizes(), good.bytes() / 2), "a state whose payload is too short");

    shape small = t.s;  // room for fewer tokens: refused whole, or a state of constant size
    small.m = t.s.m / 2;
    state s = m->make_state(small);
    result y = outputs(subject, x, t.out, t.l);
    const auto before = y.out.bytes();
    if (test::refusal([&] { m->prefill(serial, x, y.out, s, options(x, y)); }) == "accepted")
      demand_close(subject, y, reference(subject, *m, x), t);
    else
      demand(y.out.bytes() == before, "a state too small was refused, and out was written before");

    const auto saved = m->make_state(t.s).save();
    for (const std::size_t at : {std::size_t{0}, std::size_t{20}, std::size_t{45}, saved.size() - 1}) {
      auto damaged = saved;
      damaged[std::min(at, saved.size() - 1)] ^= std::byte{4};
      demand(test::refusal([&] { state::restore(damaged); }) != "accepted", "a damaged byte ", at, " was accepted");
      demand(test::refusal([&] { state::restore(std::span(saved).first(at)); }) != "accepted", "a state cut to ", at, " bytes was accepted");
    }
  });
}

}  // namespace laws
