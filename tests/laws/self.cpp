// SPDX-License-Identifier: MIT
/// @file  The laws, tried: a plain mechanism keeps them all, and for each law there is a fault that it catches.

#include <cmath>

#include "support/catch.hpp"

#include "laws/laws.hpp"

namespace {

using namespace fovea;

enum class fault {
  none,
  wrong_value,
  nan_value,
  leaves_element,
  writes_beside,
  dead_row_nan,
  huge_overflow,
  peeks,
  leaks_nan,
  values_squared,
  order_matters,
  counts_threads,
  counts_batch,
  more_workspace,
  address_matters,
  forgets,
  chunk_matters,
  merge_order,
  merge_identity,
  hidden_memory,
  takes_foreign,
  takes_foreign_late,
  none_causal
};

/// Exponential attention sum_j e^(q.k_j) v_j / sum_j e^(q.k_j) in plain loops. The causal form keeps its keys and values in the state.
template <fault F, bool Causal>
struct plain_attention {
  static constexpr const char* name = "plain";
  isize no_members = 0;

  void check(const problem& p) const { fovea::detail::check_problem(p); }
  void check(const problem& p, const state& s) const {
    check(p);
    if (F == fault::takes_foreign) return;
    s.check(tag(), p.shape(), name);
    require(s.bytes() == payload(s.sizes()), "the state's payload is ", s.bytes(), " bytes");
    if (F != fault::takes_foreign_late) require(s.tokens() + p.k.length <= s.sizes().m, "the state is full");
  }
  std::size_t workspace_size(const shape& s, int threads) const {
    arena a;
    a.take<double>(s.m * threads);
    return a.bytes() / (F == fault::more_workspace ? 2 : 1);
  }
  static std::size_t payload(const shape& s) { return static_cast<std::size_t>(s.B * s.G * s.m * (s.d + s.e)) * 8; }
  state make_state(const shape& s) const { return {tag(), s, payload(s)}; }
  std::uint64_t tag() const { return 77; }

  void prefill(exec_ref exec, const problem& p, arena scratch) const {
    const shape s = p.shape();
    rows(
        exec, p, scratch, s.m - s.n, s.m, [&](isize b, isize g, isize j, isize c) { return p.k.get(b, g, j, c); },
        [&](isize b, isize g, isize j, isize c) { return p.v.get(b, g, j, c); });
  }
  void prefill(exec_ref exec, const problem& p, state& s, arena scratch) const {
    const shape x = p.shape(), cap = s.sizes();
    const isize old = s.tokens();
    double* keys = s.as<double>();
    double* values = keys + cap.B * cap.G * cap.m * cap.d;
    const auto at = [&](isize b, isize g, isize j, isize w) { return ((b * cap.G + g) * cap.m + j) * w; };
    for (isize b = 0; b < x.B; ++b)
      for (isize g = 0; g < x.G; ++g)
        for (isize j = 0; j < x.m && old + j < cap.m; ++j) {
          for (isize c = 0; c < x.d; ++c) keys[at(b, g, old + j, x.d) + c] = p.k.get(b, g, j, c);
          for (isize c = 0; c < x.e; ++c) values[at(b, g, old + j, x.e) + c] = p.v.get(b, g, j, c);
        }
    s.set_tokens(old + x.m);
    static const double* seen = nullptr;  // for hidden_memory: something that save() does not know of
    if (old == 0) seen = keys;
    const bool strange = F == fault::hidden_memory && seen != keys;
    isize first = old;
    if (F == fault::forgets && old > 0) first = old - 1;  // the newest stored key is one too old
    if (F == fault::chunk_matters && x.n > 1 && old > 0) first = old - 1;
    exec.for_tasks(x.B, [&](isize, isize) {});
    (void)scratch;
    buffer own(static_cast<std::size_t>(cap.m + 8) * 8 + 64);
    rows(
        serial, p, arena(own.span()), first, std::min(old + x.m, cap.m),
        [&](isize b, isize g, isize j, isize c) { return keys[at(b, g, j, x.d) + c]; },
        [&](isize b, isize g, isize j, isize c) { return values[at(b, g, j, x.e) + c] + (strange ? 0.125 : 0.0); });
  }
  void merge(state& into, const state& from) const {
    const shape cap = into.sizes();
    isize a = into.tokens();
    if (F == fault::merge_identity && from.tokens() == 0 && a > 0) --a;
    double* to = into.as<double>();
    const double* of = from.as<double>();
    for (isize part = 0; part < 2; ++part) {
      const isize w = part == 0 ? cap.d : cap.e;
      for (isize r = 0; r < cap.B * cap.G; ++r)
        for (isize j = 0; j < from.tokens() && a + j < cap.m; ++j)
          for (isize c = 0; c < w; ++c) to[(r * cap.m + a + j) * w + c] = of[(r * cap.m + j) * w + c];
      to += cap.B * cap.G * cap.m * w, of += cap.B * cap.G * cap.m * w;
    }
    into.set_tokens(a + from.tokens());
    if (F == fault::merge_order && a < from.tokens() && a > 0) into.as<double>()[0] += 1.0;
  }

 private:
  template <class Key, class Value>
  void rows(exec_ref exec, const problem& p, arena scratch, isize first, isize m, Key&& key, Value&& value) const {
    const shape s = p.shape();
    double* memory = scratch.take<double>(m * exec.concurrency());
    exec.for_tasks(s.B * s.H, [&](isize task, isize slot) {
      const isize b = task / s.H, h = task % s.H, g = h / s.group();
      double* w = memory + slot * m;
      for (isize i = 0; i < s.n; ++i) {
        const isize end = Causal ? std::min(first + i + 1, m) : m;
        double top = -HUGE_VAL, sum = 0;
        for (isize j = 0; j < end; ++j) {
          w[j] = 0;
          for (isize c = 0; c < s.d; ++c) w[j] += p.q.get(b, h, i, c) * key(b, g, j, c);
          w[j] /= std::sqrt(static_cast<double>(s.d));
          if (F == fault::order_matters) w[j] += static_cast<double>(j) * 1e-3;
          top = std::max(top, w[j]);
        }
        if (F == fault::huge_overflow) top = 0;
        for (isize j = 0; j < end; ++j) sum += w[j] = std::exp(w[j] - top);
        for (isize c = 0; c < s.e; ++c) {
          if (F == fault::leaves_element && i == s.n - 1 && c == s.e - 1 && h == s.H - 1) continue;
          double o = 0;
          for (isize j = 0; j < end; ++j) o += w[j] * value(b, g, j, c);
          if (F == fault::leaks_nan)
            for (isize j = std::max<isize>(end, 0); j < m; ++j) o += 0.0 * value(b, g, j, c);
          if (F == fault::peeks && m > 0) o += 1e-9 * sum * std::min(1e3, std::max(-1e3, value(b, g, m - 1, c)));
          if (F == fault::values_squared) o += 1e-5 * o * o;
          if (F == fault::counts_threads) o += 1e-6 * sum * exec.concurrency();
          if (F == fault::counts_batch) o += 1e-6 * sum * static_cast<double>(s.B);
          if (F == fault::address_matters) o += 1e-6 * sum * static_cast<double>(scratch_parity(memory));
          if (F == fault::wrong_value && i == 0 && c == 0) o *= 1.001;
          if (F == fault::nan_value && i == 1 && c == 0) o = std::nan("");
          p.out.set(b, h, i, c, sum > 0 ? o / sum : F == fault::dead_row_nan ? o / sum : 0.0);
        }
        if (F == fault::writes_beside && i == s.n - 1 && h == s.H - 1 && b == s.B - 1) p.out.set(b, h, i, s.e, 1.0);
        if (p.lse) p.lse.set(b, h, i, 0, sum > 0 ? top + std::log(sum) : -HUGE_VAL);
      }
    });
  }
  static int scratch_parity(const double* memory) {
    return static_cast<int>(reinterpret_cast<std::uintptr_t>(memory) / 64 % 61);
  }
};

template <fault F, bool Causal>
struct plain_case {
  static constexpr const char* name = Causal ? "plain, causal" : "plain";
  static constexpr laws::promise promises{
      .causal = Causal, .permutable = !Causal, .lse = true, .streams = Causal, .logits = true, .c = 32};
  plain_attention<F, Causal> make(const shape&) { return {}; }
  void reference(const plain_attention<F, Causal>&, const problem& p) {
    buffer own(static_cast<std::size_t>(p.k.length + 16) * 8);
    plain_attention<fault::none, Causal>{}.prefill(serial, p, arena(own.span()));
  }
  bool accepts(const shape& s) const { return s.n * s.m * s.d < 150000; }  // plain loops: keep the run short
};
using law_cases = std::tuple<plain_case<fault::none, true>, plain_case<fault::none, false>>;

template <fault F, bool Causal = true>
void is_caught_by(laws::law law) {
  CAPTURE(static_cast<int>(F), Causal);
  const std::string said = law(laws::subject_of<plain_case<F, Causal>>());
  CHECK(said != std::string());
  CHECK_FALSE(test::says(said, "no shape was tried"));
}

}  // namespace

#define FOVEA_LAWS_OF "a plain mechanism (self-test)"
#include "laws/suite.hpp"

TEST_CASE("laws: each law catches a mechanism that breaks it") {
  is_caught_by<fault::wrong_value>(laws::prefill_is_reference);
  is_caught_by<fault::nan_value, false>(laws::prefill_is_reference);
  is_caught_by<fault::leaves_element>(laws::every_output_is_written);
  is_caught_by<fault::writes_beside>(laws::every_output_is_written);
  is_caught_by<fault::dead_row_nan>(laws::nothing_to_see_gives_zeros);
  is_caught_by<fault::huge_overflow>(laws::huge_logits_stay_right);
  is_caught_by<fault::peeks>(laws::later_keys_change_nothing);
  is_caught_by<fault::leaks_nan>(laws::later_keys_change_nothing);
  is_caught_by<fault::values_squared>(laws::scaling_values_scales_out);
  is_caught_by<fault::order_matters, false>(laws::key_order_changes_nothing);
  is_caught_by<fault::counts_threads>(laws::threads_change_no_bit);
  is_caught_by<fault::counts_batch>(laws::batch_changes_no_bit);
  is_caught_by<fault::address_matters>(laws::workspace_is_what_is_needed);
  is_caught_by<fault::forgets>(laws::prefill_is_steps);
  is_caught_by<fault::chunk_matters>(laws::chunks_join);
  is_caught_by<fault::merge_order>(laws::merge_is_a_monoid);
  is_caught_by<fault::merge_identity>(laws::merge_is_a_monoid);
  is_caught_by<fault::hidden_memory>(laws::saved_states_continue);
  is_caught_by<fault::takes_foreign>(laws::foreign_states_are_refused);
  is_caught_by<fault::takes_foreign_late>(laws::foreign_states_are_refused);
}

TEST_CASE("laws: a law that tries nothing fails") {
  laws::subject s = laws::subject_of<plain_case<fault::none, true>>();
  s.accepts = [](const shape&) { return false; };
  CHECK(laws::prefill_is_reference(s) != std::string());
  CHECK(laws::threads_change_no_bit(s) != std::string());
}
