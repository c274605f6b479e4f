// SPDX-License-Identifier: MIT
#pragma once
/// @file  Efficient Attention: keys are normalised over positions and queries over features, so that K^T V comes first.
///
///   softmax   o_i = sum_c softmax_c(scale q_i)_c  [ sum_j e^(k_jc) v_j / sum_j e^(k_jc) ]
///   scaling   o_i = scale q_i (K^T V) / m
///
/// Bidirectional: j runs over all keys. Causal: over the keys that row i sees, a prefix softmax for each key channel (a form of this
/// library, not of the paper).
///
/// Contract   any n, m, d, e >= 1; no log-sum-exp, no score mask. A row that sees nothing gives zeros. With a state the mechanism must be
///            causal; the bidirectional one takes tokens by `absorb` and answers by `attend`. `lengths`: item b has lengths[b] keys,
///            what stands behind them is not read.
/// Cost       B (G m + H n) d e multiply-adds; the state is d (e + 2) numbers a KV head; memory independent of n and m.
/// Numerics   f32 accumulation (f64 for f64) by blocks of 128 tokens, exponents <= 0; docs/numerics.md.
/// Reference  efficient/reference.hpp.       Source  Shen et al., Efficient Attention (WACV 2021, arXiv 1812.01243).

#include <fovea/efficient/backward.hpp>
#include <fovea/efficient/kfree.hpp>
#include <fovea/efficient/mechanism.hpp>
#include <fovea/efficient/prefill.hpp>
#include <fovea/efficient/step.hpp>
