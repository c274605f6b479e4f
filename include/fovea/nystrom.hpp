// SPDX-License-Identifier: MIT
#pragma once
/// @file  Nystrom attention: softmax attention through a few landmarks, the means of segments of queries and of keys.
///
///   q~ [l x d], k~ [l x d]    means of l equal segments of Q and of K
///   O = softmax(s Q k~^T) [n x l]   Z [l x l]   ( softmax(s q~ K^T) [l x m]   V ),      Z ~ pinv(softmax(s q~ k~^T))
///   Z_0 = A^T / max_j sum_i |A_ij|,   Z <- Z/4 (13 I - A Z (15 I - A Z (7 I - A Z)))    `iterations` times
///
/// Contract   bidirectional: a landmark mixes the queries, or keys, of a whole segment, so there is no causal form and no state. Any n, m, d,
///            e; l = min(landmarks, n, m). With at least as many landmarks as queries and keys it is exact attention, as in the authors' code.
///            Rows of weights sum to about 1 and may be negative: there is no log-sum-exp. `skip`: a depthwise convolution of the values
///            along the sequence, zero beyond its ends, is added (n = m). `lengths` (keys) and `query_lengths` (queries) of a padded batch:
///            landmarks are means over what an item has, so that it gives bitwise what it gives alone; padding is not read, its rows of out
///            are zeros. Self-attention over a padded batch wants both: without query_lengths padded queries enter the landmarks.
/// Cost       H (n + m) l (d + e) multiply-adds an item and 4 l^3 for each iteration and head; scratch H l (2 d + 2 e + 2 l), with skip H n e more.
/// Numerics   landmarks, A and Z in double whatever the storage; docs/mechanisms/nystrom.md.
/// Reference  nystrom/reference.hpp.       Source  Xiong et al., Nystromformer (2021, arXiv 2102.03902), as in the authors' code.

#include <fovea/nystrom/backward.hpp>
#include <fovea/nystrom/mechanism.hpp>
#include <fovea/nystrom/prefill.hpp>
