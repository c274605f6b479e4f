// SPDX-License-Identifier: MIT
#pragma once
/// @file  The laws that every mechanism keeps: one suite, one line a mechanism.
///
/// A law case is a default-constructible struct with
///   static constexpr const char* name
///   static constexpr laws::promise promises      what it offers beyond its concepts
///   auto make(const shape&)                      the mechanism; the case owns its weights (the same for any B and n)
///   void reference(const M&, const problem&)     its twin in double
///   bool accepts(const shape&) const             optional: shapes that the mechanism takes
///   void adjust(test::random&, laws::inputs&)    optional: gates, normalised keys
///
/// Each law takes a subject, tries it over a rotating subset of shapes, storage types and layouts, and returns "" or the first
/// violation in a sentence. tests/laws/self.cpp shows for each law a mechanism that breaks it.

#include <functional>
#include <memory>
#include <string>

#include <fovea/core/mechanism.hpp>

#include "support/errors.hpp"
#include "support/tensors.hpp"

namespace laws {

using namespace fovea;
using test::tensor;

struct promise {
  bool causal = false;      ///< row i depends on no key behind its position
  bool permutable = false;  ///< the order of the keys does not matter
  bool lse = false;         ///< gives a log-sum-exp
  bool streams = false;     ///< takes a state
  bool merges = true;       ///< where the type has merge: this setting has it too
  bool logits = false;      ///< exponentials of q.k: tried with logits of +-1e4
  double c = 32;            ///< bound: c * eps(accumulator) * largest |want|
};

/// Arguments of one call; a gate tensor of length 0 is absent.
struct inputs {
  tensor q, k, v, log_decay, beta, erase, write;
  inputs tokens(isize first, isize count) const;  ///< rows [first, first + count) of everything
  inputs item(isize b) const;                     ///< batch item b alone
  fovea::gates gates() const;
};

/// A mechanism made for one shape, behind one type, so that the laws are compiled once.
struct instance {
  virtual ~instance() = default;
  virtual void prefill(exec_ref, const inputs&, tensor_mut out, const call_options&) const = 0;
  virtual void reference(const inputs&, tensor_mut out, tensor_mut lse) const = 0;
  virtual std::size_t workspace_size(const shape&, int threads) const = 0;
  virtual state make_state(const shape&) const = 0;
  virtual void prefill(exec_ref, const inputs&, tensor_mut out, state&, const call_options&) const = 0;
  virtual void step(exec_ref, const inputs&, tensor_mut out, state&, const call_options&) const = 0;
  virtual void merge(state& into, const state& from) const = 0;
};

struct subject {
  std::string name;
  promise promises;
  bool streaming = false, mergeable = false;
  std::function<bool(const shape&)> accepts;
  std::function<void(test::random&, inputs&)> adjust;
  std::function<std::unique_ptr<instance>(const shape&)> make;
};

using law = std::string (*)(const subject&);
std::string prefill_is_reference(const subject&);
std::string every_output_is_written(const subject&);
std::string nothing_to_see_gives_zeros(const subject&);
std::string huge_logits_stay_right(const subject&);
std::string later_keys_change_nothing(const subject&);
std::string scaling_values_scales_out(const subject&);
std::string key_order_changes_nothing(const subject&);
std::string threads_change_no_bit(const subject&);
std::string batch_changes_no_bit(const subject&);
std::string workspace_is_what_is_needed(const subject&);
std::string prefill_is_steps(const subject&);
std::string chunks_join(const subject&);
std::string merge_is_a_monoid(const subject&);
std::string saved_states_continue(const subject&);
std::string foreign_states_are_refused(const subject&);

struct named_law {
  const char* name;
  law check;
};
inline constexpr named_law all[] = {
    {"prefill = double reference", prefill_is_reference},
    {"every output element is written, and nothing else", every_output_is_written},
    {"a row that sees nothing gives zeros and LSE = -inf", nothing_to_see_gives_zeros},
    {"logits of +-1e4", huge_logits_stay_right},
    {"changing key or value j > i does not change row i", later_keys_change_nothing},
    {"scaling v scales out", scaling_values_scales_out},
    {"permuting the keys changes nothing", key_order_changes_nothing},
    {"bitwise equal for any number of threads", threads_change_no_bit},
    {"bitwise equal for any batch composition", batch_changes_no_bit},
    {"a workspace of exactly workspace_size bytes, anywhere, gives the same bits", workspace_is_what_is_needed},
    {"prefill = n steps", prefill_is_steps},
    {"prefill(a) then prefill(b) = prefill(ab)", chunks_join},
    {"merge of states has an identity and is associative", merge_is_a_monoid},
    {"a state restored from bytes continues identically", saved_states_continue},
    {"foreign, damaged or too small states are refused", foreign_states_are_refused},
};

// ---------------------------------------------------------------------------------------------------------------- details
namespace detail {

template <class Case>
struct instance_of final : instance {
  mutable Case made;
  decltype(std::declval<Case&>().make(std::declval<const shape&>())) m;
  using M = std::remove_cvref_t<decltype(m)>;
  static_assert(mechanism<M>, "a law case makes a mechanism");
  static constexpr bool streams = Case::promises.streams && streaming_mechanism<M>;

  explicit instance_of(const shape& s) : m(made.make(s)) {}

  void prefill(exec_ref exec, const inputs& x, tensor_mut out, const call_options& o) const override {
    fovea::prefill(exec, m, x.q, x.k, x.v, out, o);
  }
  void reference(const inputs& x, tensor_mut out, tensor_mut lse) const override {
    const problem p{x.q, x.k, x.v, out, lse, x.gates()};
    made.reference(m, p);
  }
  std::size_t workspace_size(const shape& s, int threads) const override { return m.workspace_size(s, threads); }
  state make_state(const shape& s) const override {
    if constexpr (streams) return m.make_state(s);
    return (void)s, state();
  }
  void prefill(exec_ref exec, const inputs& x, tensor_mut out, state& s, const call_options& o) const override {
    if constexpr (streams) fovea::prefill(exec, m, x.q, x.k, x.v, out, s, o);
    (void)exec, (void)x, (void)out, (void)s, (void)o;
  }
  void step(exec_ref exec, const inputs& x, tensor_mut out, state& s, const call_options& o) const override {
    if constexpr (streams) fovea::step(exec, m, x.q, x.k, x.v, out, s, o);
    (void)exec, (void)x, (void)out, (void)s, (void)o;
  }
  void merge(state& into, const state& from) const override {
    if constexpr (streams && mergeable_mechanism<M>) m.merge(into, from);
    (void)into, (void)from;
  }
};

}  // namespace detail

template <class Case>
subject subject_of() {
  using I = detail::instance_of<Case>;
  subject s;
  s.name = Case::name, s.promises = Case::promises;
  s.streaming = I::streams, s.mergeable = I::streams && Case::promises.merges && mergeable_mechanism<typename I::M>;
  s.accepts = [](const shape& x) {
    if constexpr (requires(const Case& c) { c.accepts(x); }) return Case{}.accepts(x);
    return (void)x, true;
  };
  s.adjust = [](test::random& r, inputs& x) {
    if constexpr (requires(Case & c) { c.adjust(r, x); }) Case{}.adjust(r, x);
    (void)r, (void)x;
  };
  s.make = [](const shape& x) -> std::unique_ptr<instance> { return std::make_unique<I>(x); };
  return s;
}

}  // namespace laws
