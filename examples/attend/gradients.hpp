// SPDX-License-Identifier: MIT
#pragma once
/// @file  The tensor `do`: gradients dq, dk, dv, and of bias, sinks, gates, initial state, E and F or taps, for the rows that a prefill has
///        just written.

#include "attend/run.hpp"

namespace attend {

inline void check_gradients(const fovea::any_attention& a, const question& ask, bool decodes) {
  require(!decodes, "tensor do asks for gradients; there are some of a prefill, not with --decode");
  require(a.differentiable(), "tensor do asks for gradients; ", a.name(), " has no backward pass");
  require(!ask.paged(), "tensor do asks for gradients; keys and values in pages have none");
  require(ask.dout->rank() == ask.q.rank(), "do is ", ask.dout->describe(), "; wanted as many dimensions as q has");
}

/// S0 [B, G, r, e] and z0 [B, G, r], or without B.
inline fovea::tensor_ref state_of(const char* name, const array& a, const question& ask, bool one_wide) {
  const isize B = ask.q.rank() == 4 ? ask.q.dim(0) : 1, e = one_wide ? 1 : a.dim(-1),
              r = one_wide ? a.dim(-1) : a.dim(-2);
  require(B > 0 && r > 0 && e > 0 && a.size() % (B * r * e) == 0, name, " is ", a.describe(), "; wanted [B, G, r",
          one_wide ? "]" : ", e]");
  const isize G = a.size() / (B * r * e);
  return {a.data(), storage_of(name, a), B, G, r, e, G * r * e, r * e, e};
}
/// The same view of other memory.
inline fovea::tensor_mut as_output(const fovea::tensor_ref& like, array& memory) {
  return {memory.mutable_data(),
          storage_of("gradient", memory),
          like.batch,
          like.heads,
          like.length,
          like.width,
          like.batch_stride,
          like.head_stride,
          like.row_stride};
}

/// `out` holds o and lse of a prefill of the same question.
template <class Exec>
arrays gradients(const Exec& exec, const fovea::any_attention& a, const question& ask, const arrays& out) {
  const element type = ask.q.type() == element::f64 ? element::f64 : element::f32;
  arrays result;
  const auto room = [&](const char* name, element t, const array& like) -> array& {
    return result.emplace(name, array(t, like.dims())).first->second;
  };
  fovea::gradients to;
  to.dq = view_to(room("dq", type, ask.q)), to.dk = view_to(room("dk", type, ask.k));
  to.dv = view_to(room("dv", type, ask.v));
  const auto table = [&](const char* of, const char* name) -> float* {
    const auto at = ask.others.find(of);
    return at == ask.others.end() ? nullptr : static_cast<float*>(room(name, element::f32, at->second).mutable_data());
  };
  to.dbias = table("bias", "dbias"), to.dsinks = table("sinks", "dsinks");
  to.dE = table("E", "dE"), to.dF = table("F", "dF");
  if (ask.others.contains("wk")) to.dE = table("wk", "dwk"), to.dF = table("wv", "dwv");
  const fovea::tensor_ref o = view_of("o", out.at("o"));
  const auto lse = out.find("lse");
  const fovea::tensor_ref row_lse = lse == out.end() ? fovea::tensor_ref{}
                                                     : fovea::tensor_ref(lse->second.data(), o.type, o.batch, o.heads,
                                                                         o.length, 1, o.heads * o.length, o.length, 1);
  const isize rank = ask.q.rank();
  const auto of_call = [&](const char* name, const char* gradient, auto&& view) {
    const auto at = ask.call.find(name);
    return at == ask.call.end() ? fovea::tensor_mut{}
                                : as_output(view(name, at->second), room(gradient, type, at->second));
  };
  const auto gate = [&](const char* name, const array& x) { return gate_of(name, x, rank); };
  const auto state = [&](const char* name, const array& x) {
    return state_of(name, x, ask, name == std::string("z0"));
  };
  to.dlog_decay = of_call("g", "dg", gate), to.dbeta = of_call("beta", "dbeta", gate);
  to.derase = of_call("b", "db", gate), to.dwrite = of_call("w", "dw", gate);
  to.dS = of_call("S0", "dS0", state), to.dz = of_call("z0", "dz0", state);
  const auto given = [&](const char* name) {
    const auto at = ask.call.find(name);
    return at == ask.call.end() ? fovea::tensor_ref{} : state(name, at->second);
  };
  fovea::backward(exec, a, view_of("q", ask.q), view_of("k", ask.k), view_of("v", ask.v), o, row_lse,
                  view_of("do", *ask.dout), to, {.gates = gates_of(ask), .from = {given("S0"), given("z0"), 0}});
  return result;
}

}  // namespace attend
