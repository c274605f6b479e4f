// SPDX-License-Identifier: MIT
/// @file  The laws of calls without a state, written once against laws::subject.

#include "laws/trial.hpp"

namespace laws {

inputs inputs::tokens(isize first, isize count) const {
  inputs x;
  const auto cut = [&](const tensor& t) { return t.length() > 0 ? test::rows_of(t, first, count) : tensor(); };
  x.q = cut(q), x.k = cut(k), x.v = cut(v), x.log_decay = cut(log_decay), x.beta = cut(beta), x.erase = cut(erase),
  x.write = cut(write);
  if (x.q.batch() == 0) x.q = tensor(q.type(), q.batch(), q.heads(), 0, q.width());
  if (x.k.batch() == 0)
    x.k = tensor(k.type(), k.batch(), k.heads(), 0, k.width()),
    x.v = tensor(v.type(), v.batch(), v.heads(), 0, v.width());
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
  x.q = cut(q), x.k = cut(k), x.v = cut(v), x.log_decay = cut(log_decay), x.beta = cut(beta), x.erase = cut(erase),
  x.write = cut(write);
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
    const std::string fault = over_shapes(
        subject, l, 3, [](const shape& s) { return s.m > 0; },
        [&](trial t) {
          t.l = test::layouts[l];
          const auto m = subject.make(t.s);
          const inputs x = make_inputs(subject, t, 2);
          const result y = call(subject, *m, serial, x, t);
          for (double v : y.out.values().data)
            demand(std::isfinite(v), "an element of out is not finite, or was not written");
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
          for (isize c = 0; c < t.s.e; ++c)
            demand(y.out.get(b, h, i, c) == 0, "row ", i, " sees nothing and is ", y.out.get(b, h, i, c), "; wanted 0");
          if (y.lse.size() > 0)
            demand(y.lse.get(b, h, i, 0) == -HUGE_VAL, "row ", i, " sees nothing and has an lse of ",
                   y.lse.get(b, h, i, 0));
        }
  });
}

std::string huge_logits_stay_right(const subject& subject) {
  if (!subject.promises.logits) return {};
  return over_shapes(
      subject, 0, 2, [](const shape& s) { return s.m > 1; },
      [&](const trial& t) {
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
    const std::string fault = over_shapes(
        subject, round, 3, [](const shape& s) { return s.n > 1 && s.m > 1; },
        [&](const trial& t) {
          const auto m = subject.make(t.s);
          const inputs x = make_inputs(subject, t, 5);
          const result before = call(subject, *m, serial, x, t);
          for (const isize from : {isize{1}, t.s.m / 2, t.s.m - 1}) {
            inputs y = make_inputs(subject, t, 5);
            for (tensor* z : {&y.k, &y.v, &y.beta, &y.erase, &y.write, &y.log_decay})
              for (isize b = 0; b < z->batch(); ++b)
                for (isize g = 0; g < z->heads(); ++g)
                  for (isize j = from; j < z->length(); ++j)
                    for (isize c = 0; c < z->width(); ++c)
                      z->set(b, g, j, c, z == &y.log_decay ? -std::fabs(plant[round]) : plant[round]);
            const result after = call(subject, *m, serial, y, t);
            const isize rows = std::clamp<isize>(from - (t.s.m - t.s.n), 0, t.s.n);  // rows before position `from`
            const std::string out =
                test::bits_differ(test::rows_of(before.out, 0, rows), test::rows_of(after.out, 0, rows));
            demand(out.empty(), "keys from ", from, " on were set to ", plant[round],
                   " and an earlier row changed: ", out);
            if (before.lse.size() > 0)
              demand(test::same_bits(test::rows_of(before.lse, 0, rows), test::rows_of(after.lse, 0, rows)),
                     "an earlier lse changed");
          }
        });
    if (!fault.empty()) return fault;
  }
  return {};
}

std::string scaling_values_scales_out(const subject& subject) {
  return over_shapes(
      subject, 0, 2, [](const shape& s) { return s.n > 0; },
      [&](trial t) {
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
            throw broken(fovea::detail::sentence("v times -4 gives ", b.data[i], " for ", a.data[i], " at ",
                                                 test::detail::position(a.dims, static_cast<isize>(i))));
        if (one.lse.size() > 0) demand(test::same_bits(one.lse, four.lse), "the lse depends on v");
      });
}

std::string key_order_changes_nothing(const subject& subject) {
  if (!subject.promises.permutable) return {};
  return over_shapes(
      subject, 1, 2, [](const shape& s) { return s.n > 0 && s.m > 1; },
      [&](const trial& t) {
        const auto m = subject.make(t.s);
        const inputs x = make_inputs(subject, t, 7);
        inputs y = make_inputs(subject, t, 7);
        for (const auto& [to, from] : {std::pair{&y.k, &x.k}, std::pair{&y.v, &x.v}})
          for (isize b = 0; b < to->batch(); ++b)
            for (isize g = 0; g < to->heads(); ++g)
              for (isize j = 0; j < t.s.m; ++j)
                for (isize c = 0; c < to->width(); ++c)
                  to->set(b, g, t.s.m - 1 - (j + 3) % t.s.m, c, from->get(b, g, j, c));
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
  return over_shapes(
      subject, 0, 1, [](const shape& s) { return s.B > 1; },
      [&](const trial& t) {
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
  return over_shapes(
      subject, 1, 2, [](const shape& s) { return s.n > 0; },
      [&](const trial& t) {
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
            for (std::size_t i = shift + need; i < memory.size(); ++i)
              intact = intact && memory.data()[i] == std::byte{0xff};
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
        demand(memory.data()[0] == std::byte{0xff} && memory.data()[need + 1] == std::byte{0xff},
               "memory beside the workspace of a call with a state was written");
      });
}

}  // namespace laws
