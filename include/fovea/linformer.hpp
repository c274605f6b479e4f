// SPDX-License-Identifier: MIT
#pragma once
/// @file  Linformer: softmax attention over keys and values that a learned map has projected along the sequence.
///
///   K' = E^T K [slots x d],  V' = F^T V [slots x e],   o_i = softmax(scale q_i K'^T) V'
///
/// Sharing is a matter of which view is passed:   none: E and F [G, m_max, slots] of this layer;   headwise: [1, m_max, slots];
/// key-value: F left empty (F = E);   layerwise: the same view in every layer's mechanism.
///
/// Contract   the first m rows of E are used; more keys than E has rows are refused. m != n is cross-attention. `lengths`: item b has
///            lengths[b] keys, rows behind them are not read, and the item gives what it would give alone. Pooling windows cut that
///            length; an empty window is no slot, but a slot of a linear E always takes part. An item with no keys gives zeros.
/// Causal     slot j mixes every position, so a causal mask over slots means nothing and is refused. With causal = true and `block`
///            whole past blocks are projected (each by rows 0 .. block - 1 of E into `slots` slots), the row's own block is exact,
///            and both share one denominator. Only this form takes a state; the bidirectional one has absorb and attend.
/// Cost       (G m + H n) slots (d + e) multiply-adds an item; causal: H n (m / block * slots + block) (d + e) / about 2.
/// Numerics   f32 accumulation (f64 for f64); docs/numerics.md.
/// Reference  linformer/reference.hpp.       Source  Wang et al., Linformer (2020, arXiv 2006.04768).

#include <fovea/linformer/backward.hpp>
#include <fovea/linformer/mechanism.hpp>
#include <fovea/linformer/prefill.hpp>
#include <fovea/linformer/step.hpp>
