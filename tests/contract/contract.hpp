// SPDX-License-Identifier: MIT
#pragma once
/// @file  What every mechanism must refuse, with a sentence, before anything is written.
///
/// A `caller` is one public call of one mechanism. `refuses_what_it_must` breaks the contract of that call in every way that does
/// not depend on the mechanism, one at a time; a file for each mechanism adds what is its own.

#include <functional>
#include <string>

#include <fovea/core/mechanism.hpp>

#include "support/catch.hpp"
#include "support/errors.hpp"
#include "support/tensors.hpp"

namespace contract {

using namespace fovea;
using test::tensor;

/// Memory for a good call: B, H, G, n, m, d, e = 2, 4, 2, 3, 5, 8, 6 (m = n where a state takes part), f32.
struct arguments {
  tensor q, k, v, out, lse;
  explicit arguments(isize n = 3, isize m = 5, isize d = 8, isize e = 6, dtype type = dtype::f32);
  problem good(bool with_lse) {
    problem p{q, k, v, out, {}, {}};
    if (with_lse) p.lse = lse;
    return p;
  }
  /// "" or what a refused call has changed.
  std::string touched() const;

 private:
  std::vector<std::byte> before_[5];
};

struct caller {
  std::string name;
  std::function<void(const problem&)> call;
  bool lse = false;                                         ///< the mechanism gives one
  bool gates = false;                                       ///< it may take gates
  std::function<void(problem&)> prepare = [](problem&) {};  ///< adds the gates that a good call needs
  isize n = 3, m = 5, d = 8, e = 6;
};

/// The good call is accepted; every violation gives contract_error with a sentence that names it and leaves all memory as it was.
void refuses_what_it_must(const caller&);

/// One violation: `spoil` changes a good problem; each of `words` must stand in the sentence.
void refuses(const caller&, const char* what, const std::function<void(problem&, arguments&)>& spoil,
             std::initializer_list<const char*> words);

template <class M>
caller caller_of(const M& m, bool lse = false) {
  caller c;
  c.name = M::name, c.lse = lse;
  c.call = [m](const problem& p) { fovea::prefill(serial, m, p.q, p.k, p.v, p.out, {.lse = p.lse, .gates = p.gates}); };
  return c;
}
/// The same with a fresh state for each call.
template <class M>
caller streaming_caller_of(const M& m, bool lse = false) {
  caller c = caller_of(m, lse);
  c.name += " with a state", c.m = c.n;
  c.call = [m](const problem& p) {
    state s = m.make_state({2, 4, 2, 3, 3, 8, 6, dtype::f32});
    const auto before = s.save();
    try {
      fovea::prefill(serial, m, p.q, p.k, p.v, p.out, s, {.lse = p.lse, .gates = p.gates});
    } catch (const contract_error&) {
      if (s.save() != before) throw std::runtime_error("a refused call changed the state");
      throw;
    }
  };
  return c;
}

/// A mechanism whose own values are not acceptable.
template <class M>
void refuses_value(const M& m, std::initializer_list<const char*> words, isize n = 3, isize width = 8) {
  arguments a(n, 5, width, 6);
  problem p = a.good(false);
  const std::string said = test::refusal([&] { fovea::prefill(serial, m, p.q, p.k, p.v, p.out); });
  INFO(M::name << " said: " << said);
  CHECK(said != "accepted");
  for (const char* w : words) CHECK_SAYS(said, w);
  CHECK(a.touched() == std::string());
}

/// What a state must not be, and calls that do not suit one.
template <class M>
void refuses_foreign_states(const M& m) {
  arguments a(3, 3);
  problem p = a.good(false);
  const shape s = p.shape();
  const auto with = [&](state x) { return test::refusal([&] { fovea::prefill(serial, m, p.q, p.k, p.v, p.out, x); }); };
  const state good = m.make_state(s);
  CHECK_SAYS(with(state(good.tag() ^ 1U, good.sizes(), good.bytes())), std::string("not made by this ") + M::name);
  shape other = s;
  other.d = 16;
  CHECK_SAYS(with(state(good.tag(), other, good.bytes())),
             "the state was made for B, H, G, d, e = 2, 4, 2, 16, 6; the call has 2, 4, 2, 8, 6");
  CHECK(with(state(good.tag(), good.sizes(), good.bytes() / 2)) != "accepted");
  CHECK(a.touched() == std::string());
  state x = good;
  CHECK_SAYS(test::refusal([&] { fovea::step(serial, m, p.q, p.k, p.v, p.out, x); }),
             "step takes one token; q has 3 and k has 3");
  arguments longer(3, 5);
  problem l = longer.good(false);
  CHECK_SAYS(test::refusal([&] { fovea::prefill(serial, m, l.q, l.k, l.v, l.out, x); }), "q has 3 tokens and k has 5");
  CHECK(longer.touched() == std::string());
  CHECK(a.touched() == std::string());
}

}  // namespace contract
