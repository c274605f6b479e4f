// SPDX-License-Identifier: MIT
// The README's first program, with numbers in the tensors and two lines of output; the tests compile and run it.
#include <cstdio>
#include <vector>

#include <fovea/fovea.hpp>

// clang-format off
int main() {
  constexpr fovea::isize B = 1, H = 8, G = 2, n = 1024, d = 64;             // 8 query heads share 2 KV heads
  std::vector<float> Q(B * H * n * d), K(B * G * n * d), V(B * G * n * d), O(B * H * n * d);
  for (std::size_t i = 0; i < Q.size(); ++i) Q[i] = static_cast<float>(i * 2654435761U % 1000) / 500 - 1;
  for (std::size_t i = 0; i < K.size(); ++i) K[i] = static_cast<float>(i * 40503U % 997) / 500 - 1, V[i] = static_cast<float>(i * 69069U % 991) / 500 - 1;
  auto q = fovea::bhnd(Q.data(), B, H, n, d), k = fovea::bhnd(K.data(), B, G, n, d);      // views of your memory; bnhd for [B, n, H, d]
  auto v = fovea::bhnd(V.data(), B, G, n, d), out = fovea::bhnd(O.data(), B, H, n, d);

  fovea::softmax_attention exact{.mask = fovea::causal{}};
  fovea::prefill(fovea::threads(4), exact, q, k, v, out);                   // q [B,H,n,d], k and v [B,G,n,d], out [B,H,n,d]
  std::printf("exact    last token of head 0: %+.5f\n", static_cast<double>(out(0, 0, n - 1, 0)));

  auto dijiang = fovea::dijiang_attention::make({.head_dim = d, .features = 128});
  auto state = dijiang.make_state({.B = B, .H = H, .G = G, .d = d, .e = d});              // constant memory
  fovea::prefill(fovea::serial, dijiang, q.slice(0, n - 1), k.slice(0, n - 1), v.slice(0, n - 1), out.slice(0, n - 1), state);
  fovea::step(fovea::serial, dijiang, q.slice(n - 1, 1), k.slice(n - 1, 1), v.slice(n - 1, 1), out.slice(n - 1, 1), state);
  std::printf("dijiang  last token of head 0: %+.5f   (untrained; state of %zu bytes, whatever the length)\n", static_cast<double>(out(0, 0, n - 1, 0)), state.bytes());
}
