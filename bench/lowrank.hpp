// SPDX-License-Identifier: MIT
#pragma once

namespace bench {

/// Low rank: Linformer, Efficient Attention, the k-free forms and Nystrom attention over long inputs, forward and backward.
void register_lowrank();

}  // namespace bench
