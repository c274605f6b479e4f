// SPDX-License-Identifier: MIT
// Exact attention with a C interface, for tools/bench_peers.py: one call each, scratch kept between calls, one thread.
//
//   type 0 f32, 1 bf16, 2 f16; 3, 4: f32 and bf16 computed in int8; tensors are dense [H, n, d], [G, m, d], [G, m, d], [H, n, d] of one sequence
#include <fovea/softmax.hpp>
#include <fovea/softmax/backward.hpp>

#include "common/machine.hpp"

namespace {

using fovea::isize;

constexpr fovea::dtype types[] = {fovea::dtype::f32, fovea::dtype::bf16, fovea::dtype::f16, fovea::dtype::f32,
                                  fovea::dtype::bf16};

fovea::tensor_mut dense(const void* data, fovea::dtype t, isize heads, isize rows, isize width) {
  return {const_cast<void*>(data), t, 1, heads, rows, width, heads * rows * width, rows * width, width};
}
fovea::softmax_attention mechanism(int causal, int type = 0) {
  fovea::softmax_attention a;
  if (type >= 3) a.arithmetic = fovea::precision::int8;
  if (causal != 0) a.mask = fovea::causal{};
  return a;
}
std::span<std::byte> scratch(std::size_t bytes) {
  static fovea::buffer memory;
  if (memory.size() < bytes) memory = fovea::buffer(bytes);
  return memory.span();
}

}  // namespace

extern "C" {

int fovea_peer_prefill(const void* q, const void* k, const void* v, void* out, isize H, isize G, isize n, isize m,
                       isize d, int causal, int type) {
  try {
    const fovea::dtype t = types[type];
    const fovea::softmax_attention a = mechanism(causal, type);
    fovea::prefill(fovea::serial, a, dense(q, t, H, n, d), dense(k, t, G, m, d), dense(v, t, G, m, d),
                   dense(out, t, H, n, d),
                   {.workspace = scratch(a.workspace_size({1, H, G, n, m, d, d, t}, 1) + fovea::alignment)});
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}

/// A forward call with its log-sum-exp, then the gradients of q, k and v; lse is [H, n].
int fovea_peer_train(const float* q, const float* k, const float* v, float* out, float* lse, const float* dout,
                     float* dq, float* dk, float* dv, isize H, isize G, isize n, isize d, int causal, int forward) {
  try {
    const fovea::dtype t = fovea::dtype::f32;
    const fovea::softmax_attention a = mechanism(causal);
    const fovea::tensor_mut Q = dense(q, t, H, n, d), K = dense(k, t, G, n, d), V = dense(v, t, G, n, d),
                            O = dense(out, t, H, n, d), L = dense(lse, t, H, n, 1);
    if (forward != 0)
      fovea::prefill(fovea::serial, a, Q, K, V, O, {.lse = L});
    else
      fovea::backward(fovea::serial, a, Q, K, V, O, L, dense(dout, t, H, n, d),
                      {.dq = dense(dq, t, H, n, d), .dk = dense(dk, t, G, n, d), .dv = dense(dv, t, G, n, d)});
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}

double fovea_peer_peak() { return machine::fma_peak(); }
double fovea_peer_stream(const void* data, std::size_t bytes) { return machine::stream_read(data, bytes); }

}  // extern "C"
