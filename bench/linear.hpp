// SPDX-License-Identifier: MIT
#pragma once

namespace bench {

/// Linear mechanisms where a share of the FMA peak says little: steps against the memory of the state, threads, DiJiang against exact decoding.
void register_linear();

}  // namespace bench
