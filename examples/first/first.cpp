// SPDX-License-Identifier: MIT
// The README's first program, as it is compiled and run by the tests.
#include <cstdio>
#include <vector>

#include <fovea/fovea.hpp>

int main() {
  // An engine's own memory: q [B, H, n, d], k and v [B, G, n, d], out [B, H, n, d]; 8 query heads share 2 KV heads.
  constexpr fovea::isize B = 1, H = 8, G = 2, n = 1024, d = 64;
  std::vector<float> Q(B * H * n * d), K(B * G * n * d), V(B * G * n * d), O(B * H * n * d), O1(B * H * d);
  for (std::size_t i = 0; i < Q.size(); ++i) Q[i] = static_cast<float>(i * 2654435761U % 1000) / 500 - 1;
  for (std::size_t i = 0; i < K.size(); ++i)
    K[i] = static_cast<float>(i * 40503U % 997) / 500 - 1, V[i] = static_cast<float>(i * 69069U % 991) / 500 - 1;
  const auto q = fovea::bhnd(Q.data(), B, H, n, d), k = fovea::bhnd(K.data(), B, G, n, d),
             v = fovea::bhnd(V.data(), B, G, n, d);
  const auto out = fovea::bhnd(O.data(), B, H, n, d), out1 = fovea::bhnd(O1.data(), B, H, 1, d);

  // Exact attention over a prompt, on four threads.
  fovea::softmax_attention exact{.mask = fovea::causal{}};
  fovea::prefill(fovea::threads(4), exact, q, k, v, out);
  std::printf("exact    out[0] = %+.4f\n", static_cast<double>(O[0]));

  // The same call with another mechanism, and a state of constant size instead of a KV cache.
  auto dijiang = fovea::dijiang_attention::make({.head_dim = d, .features = 128});
  auto state = dijiang.make_state({.B = B, .H = H, .G = G, .d = d, .e = d});
  fovea::prefill(fovea::serial, dijiang, q.slice(0, n - 1), k.slice(0, n - 1), v.slice(0, n - 1), out.slice(0, n - 1),
                 state);
  fovea::step(fovea::serial, dijiang, q.slice(n - 1, 1), k.slice(n - 1, 1), v.slice(n - 1, 1), out1,
              state);  // one token, same state
  std::printf("dijiang  out[0] = %+.4f   state: %zu bytes, whatever the length\n", static_cast<double>(O[0]),
              state.bytes());
}
