// SPDX-License-Identifier: MIT
#pragma once

namespace bench {

/// Gradients dq, dk, dv of exact attention.
void register_backward();

}  // namespace bench
