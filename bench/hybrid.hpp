// SPDX-License-Identifier: MIT
#pragma once
namespace bench {
/// hybrid/...: `exact_takes`, the time of the library's own exact attention in f32 over the time of the case, in turns. One head, D = 64 unless
/// said. Keys are a random walk with noise, a query is near an earlier block of keys: logits spread as in models (8 to 10 nats).
///   given/B<b>       a random block mask with 1/8 of the tiles, not causal; `per_tile`: time of a computed tile, dense = 1
///   pattern/...      MST's patterns with stride 128, and masks of softmax_attention; `per_tile`: time against the visible share
///   pass             the int8 pass over all visible keys, with block sums; the reciprocal of exact_takes is its share
///   select/...       prefill with a selection, budget max(1/16, 256 keys), the rest pooled or dropped, no kept keys
///   target/...       prefill to an error target, per cent, proven or estimated; `share`: of the block pairs, computed
///   step/...         decoding with 32k keys stored as f16, summaries in place, 9 query and 3 KV heads; refresh<r>: r steps, one selection
void register_hybrid();
}  // namespace bench
