// SPDX-License-Identifier: MIT
#pragma once
/// @file  softmax_attention with a state: a KV cache for a batch of sequences of equal length, contiguous or a ring, in any type.
///
/// Contract   the mask is causal, bottom-right. Token i of a call sees the tokens held and those of the call up to itself, whether they
///            come at once, in chunks or one by one. A ring holds first + window + chunk - 1 tokens of the mask's, whatever the number seen.
/// State      one block of core/kv_layout.hpp with B G heads; a ring adds 8 bytes: the oldest token behind the first ones.

#include <fovea/cache/ring.hpp>
#include <fovea/cache/write_rows.hpp>
#include <fovea/softmax/views.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

/// The rows of a state of these sizes.
class state_rows {
 public:
  state_rows(const softmax_attention& m, const shape& s) : G_(s.G), ring_(m.store.kind == state_store::form::ring) {
    const dtype type = m.store.type ? *m.store.type : s.type;
    if (ring_) {
      const kept_keys kept = m.mask.kept();
      index_.first = kept.first, index_.size = (kept.bounded() ? kept.window : s.m) + m.store.chunk - 1;
    }
    layout_ = kv_layout({.heads = s.B * s.G,
                         .d = s.d,
                         .e = s.e,
                         .type = type,
                         .scale = m.store.scale,
                         .form = m.store.layout,
                         .rotated = m.store.rotated},
                        ring_ ? index_.slots() : s.m);
  }
  /// Throws unless a state for calls of this type can be kept as `store` says.
  static void check_store(const softmax_attention& m, dtype call) {
    const dtype type = m.store.type ? *m.store.type : call;
    require(type <= dtype::i8 && (type == dtype::f64) == (call == dtype::f64), "store.type is ", name_of(type),
            " for a call of ", name_of(call), "; f64 goes with f64 only");
    require(m.store.layout == kv_form::rows || (type == dtype::i8 && m.store.scale == scale_per::row),
            "store is packed; packed rows are int8 with a scale a row (store.type, store.scale)");
    require(!m.store.rotated || type == dtype::i8, "store is rotated and its type ", name_of(type),
            "; rotated keys are int8");
    if (m.store.kind != state_store::form::ring) return;
    require(m.mask.kept().bounded(),
            "store is a ring; the mask must say how far back it looks: window or chunked_local, bottom-right");
    constexpr isize most = isize{1} << 60;
    require(m.store.chunk >= 1 && m.store.chunk <= most, "store.chunk is ", m.store.chunk,
            "; it must be at least 1, and at most 2^60");
    const kept_keys kept = m.mask.kept();
    require(kept.window <= most && kept.first <= most, "store is a ring, and the mask sees ", kept.window, " and ",
            kept.first, " keys; wanted at most 2^60 of each");
  }
  bool ring() const { return ring_; }
  isize slots() const { return layout_.rows(); }
  std::size_t bytes() const { return layout_.bytes() + (ring_ ? sizeof(std::int64_t) : 0); }

  ring_index index(const state& s) const {
    ring_index x = index_;
    x.tokens = s.tokens();
    std::int64_t low = 0;
    std::memcpy(&low, s.as<std::byte>() + layout_.bytes(), sizeof low);
    x.low = x.tokens <= x.first ? 0 : low;  // truncated to the first tokens: as ring_index::truncate
    return x;
  }
  void check(const state& s) const {
    require(s.bytes() == bytes(), "the state holds ", s.bytes(), " bytes; its sizes ask for ", bytes());
  }
  /// A ring that was truncated further than its chunk allows has no more what the next token sees.
  void check_ring(const softmax_attention& m, const state& s) const {
    if (!ring_) return;
    const ring_index x = index(s);
    const isize window = m.mask.kept().window;
    require(x.can_truncate(x.tokens, window), "the state was truncated to ", x.tokens,
            " tokens: the next one sees keys from ", x.tokens - window + 1, " on, and the ring holds none between ",
            x.first, " and ", x.oldest(), " (a larger store.chunk lets it go back further)");
    require(x.sound(), "the state's ring holds tokens that cannot be there; it was not made by make_state");
  }

  kv_sequence sequence(const state& s, isize b) const {
    const kv_sequence all = layout_.sequence(s.as<std::byte>(), b * G_, G_, s.tokens());
    return ring_ ? index(s).view(all) : all;
  }

  /// Tokens [first, first + count) of the call's k and v; `scratch` [threads][max(d, e)].
  void append(const softmax_attention& m, exec_ref exec, const problem& p, isize first, isize count, state& s,
              double* scratch) const {
    const kv_shape& z = layout_.shape();
    const isize wide = z.d > z.e ? z.d : z.e, before = s.tokens() - first;
    const ring_index ring = ring_ ? index(s) : ring_index{};
    const auto head = [&](isize at, isize slot) {
      const isize b = at / G_, g = at % G_;
      const row_writer writer(z, scratch + slot * wide);
      const key_positions to{m.turn, before, p.positions == nullptr ? nullptr : p.positions + b * p.k.length};
      write_tokens(layout_, writer, p.k.part(b, g, 1), p.v.part(b, g, 1), 0, 1, at, first, count, to,
                   [&](isize i, isize& row) {
                     row = ring_ ? ring.slot(before + i) : before + i;
                     return s.as<std::byte>();
                   });
    };
    if (z.heads * count * (z.d + z.e) < (isize{1} << 18))  // not worth waking threads for
      for (isize at = 0; at < z.heads; ++at) head(at, 0);
    else
      exec.for_tasks(z.heads, head);
    s.set_tokens(s.tokens() + count);
    if (!ring_) return;
    ring_index after = ring;
    after.append(count);
    const std::int64_t low = after.low;
    std::memcpy(s.as<std::byte>() + layout_.bytes(), &low, sizeof low);
  }

 private:
  isize G_;
  bool ring_;
  kv_layout layout_;
  ring_index index_;
};

template <class Acc>
void attend_state(const softmax_attention& m, exec_ref exec, const problem& p, state& s, arena scratch) {
  const state_rows rows(m, s.sizes());
  double* own = scratch.take<double>(exec.concurrency() * (p.k.width > p.v.width ? p.k.width : p.v.width));
  const isize n = p.q.length, chunk = rows.ring() ? m.store.chunk : n, before = s.tokens();
  for (isize first = 0; first < n; first += chunk) {
    const isize count = chunk < n - first ? chunk : n - first;
    rows.append(m, exec, p, first, count, s, own);
    problem part = p;
    part.q = p.q.slice(first, count), part.out = p.out.slice(first, count);
    if (p.lse) part.lse = p.lse.slice(first, count);
    if (p.skipped) part.skipped = p.skipped.slice(first, count);
    attend<Acc>(m, exec,
                problem_list(p.q.batch,
                             [&](isize b) {
                               sequence_problem x = item_of(part, b);
                               x.kv = rows.sequence(s, b);
                               if (p.positions != nullptr) x.positions = p.positions + b * n + first;
                               x.first_row = first, x.all_rows = n, x.all_tokens = before + n;
                               return x;
                             }),
                scratch);
  }
}

}  // namespace detail

inline std::uint64_t softmax_attention::tag() const {
  detail::fingerprint f;
  f.text(name).number(static_cast<double>(store.kind)).number(store.type ? static_cast<double>(*store.type) : -1);
  f.number(static_cast<double>(store.scale)).number(turn != nullptr ? 1 : 0);
  if (store.layout != kv_form::rows || store.rotated)
    f.number(static_cast<double>(store.layout)).number(store.rotated ? 1 : 0);
  if (store.kind == state_store::form::ring) {
    const kept_keys kept = mask.kept();
    f.number(static_cast<double>(kept.window)).number(static_cast<double>(kept.first));
    f.number(static_cast<double>(store.chunk));
  }
  return f.value;
}

inline state softmax_attention::make_state(const shape& s) const {
  require(s.B >= 0 && s.G >= 1 && s.m >= 0 && s.d >= 1 && s.e >= 1, "make_state: B, G, m, d, e are ", s.B, ", ", s.G,
          ", ", s.m, ", ", s.d, ", ", s.e, "; wanted sizes of a problem, m tokens of room");
  detail::state_rows::check_store(*this, s.type);
  return {tag(), s, detail::state_rows(*this, s).bytes()};
}

inline std::size_t softmax_attention::state_bytes(const shape& s) const {
  detail::state_rows::check_store(*this, s.type);
  return detail::state_rows(*this, s).bytes();
}

inline void softmax_attention::check(const problem& p, const state& s) const {
  detail::check_problem(p);
  detail::check_skipped(p);
  s.check(tag(), p.shape(), name);
  require(mask.is_causal(),
          "the mask of a softmax_attention with a state must be causal (causal or window, bottom-right); a row cannot "
          "see keys that have not come");
  require(store.type || p.q.type == s.sizes().type, "the state stores ", name_of(s.sizes().type),
          " and the call brings ", name_of(p.q.type));
  detail::state_rows::check_store(*this, p.q.type);
  const detail::state_rows rows(*this, s.sizes());
  rows.check(s);
  rows.check_ring(*this, s);
  require(rows.ring() || s.tokens() + p.k.length <= s.sizes().m, "the state holds ", s.tokens(), " of at most ",
          s.sizes().m, " tokens; ", p.k.length, " more do not fit (make_state with a larger shape.m)");
  shape all = p.shape();
  all.m += s.tokens();  // masks and biases span the tokens held, too
  check_values(all);
  if (turn != nullptr && p.q.batch * p.q.length > 0)
    detail::check_turn(*turn, p.q.width, p.positions, p.q.batch * p.q.length, s.tokens(), p.q.length);
}

inline std::size_t softmax_attention::state_workspace_size(const shape& s, int threads) const {
  const detail::state_rows rows(*this, s);
  const auto need = [&](isize n) {
    shape x = s;
    x.n = n;
    if (rows.ring() && x.m > rows.slots()) x.m = rows.slots();
    return s.type == dtype::f64 ? detail::attend_workspace<double>(*this, x, threads)
                                : detail::attend_workspace<float>(*this, x, threads);
  };
  arena own;
  own.take<double>(threads * (s.d > s.e ? s.d : s.e));
  const bool cut = rows.ring() && s.n > store.chunk;
  const std::size_t whole = need(cut ? store.chunk : s.n), rest = cut ? need(s.n % store.chunk) : 0;
  return own.bytes() + (whole > rest ? whole : rest);
}

inline void softmax_attention::prefill(exec_ref exec, const problem& p, state& s, arena scratch) const {
  if (p.q.type == dtype::f64)
    detail::attend_state<double>(*this, exec, p, s, scratch);
  else
    detail::attend_state<float>(*this, exec, p, s, scratch);
}

}  // namespace FOVEA_ABI
}  // namespace fovea
