// SPDX-License-Identifier: MIT
#pragma once
/// @file  What a model makes of a text: negative log likelihoods (nats) of the tokens of windows, each window from an empty start.

#include <cstdint>
#include <span>
#include <vector>

#include "session.hpp"
#include "text.hpp"

namespace engine {

/// First tokens of the windows of `context` tokens: those given, checked; or window behind window, the incomplete last one left out.
std::vector<std::int64_t> windows_of(std::size_t tokens, const std::vector<std::int64_t>& offsets, isize context);

/// The windows in one batch, `chunk` tokens of each a call: NLL of tokens 1 ... context - 1 of each, window behind window.
std::vector<double> window_nll(session& run, std::span<const token> ids, std::span<const std::int64_t> offsets,
                               isize context, isize chunk);

}  // namespace engine
