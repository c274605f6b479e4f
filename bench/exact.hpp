// SPDX-License-Identifier: MIT
#pragma once

namespace bench {

/// Exact attention as engines call it: KV stores, strided views, short calls, many threads on one sequence, the absorbed form.
void register_exact();

}  // namespace bench
