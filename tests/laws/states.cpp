// SPDX-License-Identifier: MIT
/// @file  The laws of streaming mechanisms: steps, chunks, merge, saved and foreign states.

#include "laws/trial.hpp"

namespace laws {

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
    demand(whole.tokens() == t.s.n && stepped.tokens() == t.s.n, "the states count ", whole.tokens(), " and ",
           stepped.tokens(), " tokens");
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
        const isize count =
            round == 0 ? std::min<isize>(t.s.n - at, (t.s.n + 1) / 2) : r.integer(1, std::min<isize>(t.s.n - at, 70));
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
  return over_shapes(
      subject, 0, 2, [](const shape& s) { return whole_sequence(s) && s.n >= 8; },
      [&](const trial& t) {
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
  return over_shapes(
      subject, 0, 3, [](const shape& s) { return whole_sequence(s) && s.n > 1; },
      [&](const trial& t) {
        const auto m = subject.make(t.s);
        const inputs x = make_inputs(subject, t, 15), first = x.tokens(0, t.s.n / 2),
                     rest = x.tokens(t.s.n / 2, t.s.n - t.s.n / 2);
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
  return over_shapes(
      subject, 1, 3, [](const shape& s) { return whole_sequence(s) && s.n > 3; },
      [&](const trial& t) {
        const auto m = subject.make(t.s);
        const inputs x = make_inputs(subject, t, 16);
        const auto refused = [&](state s, const char* what) {
          result y = outputs(subject, x, t.out, t.l);
          const auto before = y.out.bytes(), saved_before = [&] {
            const auto b = s.save();
            return b;
          }();
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
          demand(test::refusal([&] { state::restore(std::span(saved).first(at)); }) != "accepted", "a state cut to ",
                 at, " bytes was accepted");
        }
      });
}

}  // namespace laws
