// SPDX-License-Identifier: MIT
#pragma once
/// @file  The tensor `do`: gradients dq, dk, dv, and of bias and sinks, for the rows that a prefill has just written.

#include "attend/run.hpp"

namespace attend {

inline void check_gradients(const fovea::any_attention& a, const question& ask, bool decodes) {
  require(!decodes, "tensor do asks for gradients; there are some of a prefill, not with --decode");
  require(a.differentiable(), "tensor do asks for gradients; ", a.name(), " has no backward pass");
  require(!ask.paged(), "tensor do asks for gradients; keys and values in pages have none");
  require(ask.dout->rank() == ask.q.rank(), "do is ", ask.dout->describe(), "; wanted as many dimensions as q has");
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
  const fovea::tensor_ref o = view_of("o", out.at("o"));
  const fovea::tensor_ref lse(out.at("lse").data(), o.type, o.batch, o.heads, o.length, 1, o.heads * o.length, o.length,
                              1);
  fovea::backward(exec, a, view_of("q", ask.q), view_of("k", ask.k), view_of("v", ask.v), o, lse,
                  view_of("do", *ask.dout), to);
  return result;
}

}  // namespace attend
