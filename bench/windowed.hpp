// SPDX-License-Identifier: MIT
#pragma once
namespace bench {
/// windowed/<map>/w<window>f<first>/D<d>/N<n>, beside exact attention over the same tokens.
void register_windowed();
}  // namespace bench
